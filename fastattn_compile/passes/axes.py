"""Axes that survive reshapes: what each dimension of a tensor is made of.

A dimension is a list of atoms, outermost first. ``view(b * h, n, d)`` of a tensor with axes ``[b], [h], [n], [d]`` has axes
``[b, h], [n], [d]``; whatever layout the scores pass through, queries, keys and heads can be told apart. Two tensors that
meet in a contraction have their atoms unified; an atom that turns out to be a product is split. Sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy

from fastattn_compile.passes.graph import Node, Size, same_size

LAYOUT_KINDS = frozenset({"reshape", "permute", "expand", "identity", "index", "repeat_interleave", "repeat"})


class Atom:
    """An indivisible axis, until something shows that it is a product.

    Args:
        size: Its length.
    """

    __slots__ = ("_parts", "_same", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self._same: Atom | None = None
        self._parts: list[Atom] | None = None

    def __repr__(self) -> str:
        return f"Atom({self.size})"

    def resolve(self) -> list[Atom]:
        """The atoms this one stands for now."""
        if self._same is not None:
            return self._same.resolve()
        if self._parts is not None:
            return [leaf for part in self._parts for leaf in part.resolve()]
        return [self]

    def split(self, inner: Size) -> None:
        """Declares this atom a product: an outer axis and an inner one of size ``inner``."""
        self._parts = [Atom(_quotient(self.size, inner) or 1), Atom(inner)]

    def identify(self, other: Atom) -> None:
        """Declares that this atom and ``other`` are the same axis."""
        if self is not other:
            self._same = other


Axis = list[Atom]
Axes = list[Axis]


def leaves(axis: Iterable[Atom]) -> list[Atom]:
    """The resolved atoms of an axis, without those of size 1."""
    return [leaf for atom in axis for leaf in atom.resolve() if leaf.size != 1]


def length(axis: Iterable[Atom]) -> Size:
    """Number of positions along an axis."""
    total: Size = 1
    for atom in leaves(axis):
        total = total * atom.size
    return total


def fresh(shape: Sequence[Size]) -> Axes:
    """One new atom a dimension."""
    return [[Atom(size)] for size in shape]


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` when ``b`` divides ``a`` for every value of their symbols, else ``None``."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if ratio.is_number:
        return int(ratio) if ratio.is_integer else None
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1 or not all(
        c.is_integer for c in sympy.Poly(numerator, *numerator.free_symbols).coeffs()
    ):
        return None
    return ratio


def unify(a: Iterable[Atom], b: Iterable[Atom]) -> bool:
    """Declares two axes the same, splitting atoms where one is finer. False when their sizes cannot agree."""
    left, right = leaves(a), leaves(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x is y:
            continue
        if same_size(x.size, y.size):
            x.identify(y)
            continue
        for big, small, rest in ((x, y, left), (y, x, right)):
            inner = _quotient(big.size, small.size)
            if inner is not None:
                big.split(inner)
                outer, remainder = big.resolve()
                outer.identify(small)
                rest.insert(0, remainder)
                break
        else:
            return False
    return not left and not right


def regroup(axes: Axes, shape: Sequence[Size]) -> Axes | None:
    """The axes of a reshape, splitting atoms at the new borders. ``None`` when a border cannot be expressed."""
    flat = [leaf for axis in axes for leaf in leaves(axis)]
    result: Axes = []
    for size in shape:
        axis: Axis = []
        missing: Size = size
        while missing != 1:
            if not flat:
                return None
            atom = flat.pop(0)
            if same_size(atom.size, missing):
                axis.append(atom)
                missing = 1
                continue
            rest = _quotient(missing, atom.size)
            if rest is not None:
                axis.append(atom)
                missing = rest
                continue
            inner = _quotient(atom.size, missing)
            if inner is None:
                return None
            atom.split(inner)
            outer, remainder = atom.resolve()
            axis.append(outer)
            flat.insert(0, remainder)
            missing = 1
        result.append(axis)
    return result if not flat else None


def step(node: Node, axes: Axes) -> Axes | None:
    """The axes of a layout node's output from those of its input. ``None`` when it is not a pure relabelling."""
    if node.shape is None:
        return None
    if node.kind == "permute":
        return [axes[d] for d in node.attributes["dims"]]
    if node.kind == "reshape":
        return regroup(axes, node.shape)
    if node.kind == "expand":
        padded: Axes = [[] for _ in range(len(node.shape) - len(axes))] + axes
        return [
            axis if same_size(length(axis), size) else [Atom(size)] for axis, size in zip(padded, node.shape)
        ]
    if node.kind == "repeat_interleave":
        if not isinstance(node.attributes["repeats"], int):
            return None
        dim = node.attributes["dim"]
        return [
            [*axis, Atom(node.attributes["repeats"])] if d == dim else axis for d, axis in enumerate(axes)
        ]
    if node.kind == "repeat":
        repeats = node.attributes["repeats"]
        padded = [[] for _ in range(len(repeats) - len(axes))] + axes
        return [axis if r == 1 else [Atom(r), *axis] for r, axis in zip(repeats, padded)]
    if node.kind == "index":
        return _step_index(node, axes)
    # Elementwise: broadcasting may add dimensions in front.
    return [[] for _ in range(len(node.shape) - len(axes))] + axes


def _step_index(node: Node, axes: Axes) -> Axes | None:
    result: Axes = []
    remaining = iter(axes)
    for entry in node.attributes["index"]:
        if entry is None:
            result.append([])
            continue
        axis = next(remaining, None)
        if axis is None or not isinstance(entry, slice):
            return None
        result.append(axis)
    result.extend(remaining)
    if node.shape is None or len(result) != len(node.shape):
        return None
    # A slice that keeps everything has the length of its axis; one that does not is a selection.
    whole = all(same_size(length(axis), size) for axis, size in zip(result, node.shape))
    steps = (entry.step for entry in node.attributes["index"] if isinstance(entry, slice))
    return result if whole and all(s in (None, 1) for s in steps) else None
