"""Products of two tensors over shared axes: matmul, bmm, baddbmm and einsum in one form."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.passes.axes import LAYOUT_KINDS, Atom, Axes, fresh, leaves, step, unify
from fastattn_compile.passes.graph import Node, Size

CONTRACTION_KINDS = frozenset({"matmul", "baddbmm", "einsum"})


def factors(node: Node) -> tuple[Node, Node] | None:
    """The two tensors a node is the product of, summed or not yet known to be; ``None`` when it is no product.

    A sum over one axis of an elementwise product is one too.
    """
    if node.kind in CONTRACTION_KINDS:
        pair = node.inputs[-2:]
    elif node.kind == "sum" and isinstance(node.inputs[0], Node) and node.inputs[0].kind == "mul":
        pair = node.inputs[0].inputs[:2]
    else:
        return None
    first, second = pair if len(pair) == 2 else (None, None)
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else None


@dataclass(frozen=True)
class Operand:
    """One side of a contraction, traced back through pure layout changes to the tensor it is a view of.

    Args:
        node: The operand as the contraction reads it.
        axes: Its axes.
        origin: The tensor before reshapes, transposes and repeats. Heads that are repeated in ``node`` are not in it.
        origin_axes: Axes of the origin, in the same atoms.
    """

    node: Node
    axes: Axes
    origin: Node
    origin_axes: Axes

    def atoms(self) -> set[Atom]:
        """All resolved atoms of the operand as the contraction reads it."""
        return {leaf for axis in self.axes for leaf in leaves(axis)}


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors, summed over ``contracted``.

    Args:
        node: The product.
        a: First operand.
        b: Second operand.
        axes: Axes of the result.
        contracted: The axis summed over.
    """

    node: Node
    a: Operand
    b: Operand
    axes: Axes
    contracted: list[Atom]


def trace(node: Node, axes: Axes) -> Operand:
    """Follows an operand back through layout changes and labels its origin with the same atoms.

    Args:
        node: The operand.
        axes: Its axes, unified in place with those of its origin.
    """
    chain: list[Node] = []
    origin = node
    while (
        origin.kind in LAYOUT_KINDS
        and isinstance(origin.inputs[0], Node)
        and origin.inputs[0].shape is not None
    ):
        if origin.tainted or origin.dtype != origin.inputs[0].dtype:
            break
        chain.append(origin)
        origin = origin.inputs[0]
    while True:
        start = fresh(origin.shape or ())
        current: Axes | None = start
        kept: list[Node] = []
        for link in reversed(chain):
            current = step(link, current) if current is not None else None
            if current is None:
                origin = link
                break
            kept.append(link)
        if current is not None:
            break
        # A selection in the middle: its result is the origin of what follows.
        chain = chain[: chain.index(origin)]
    if len(current) == len(axes) and all(unify(x, y) for x, y in zip(current, axes)):
        return Operand(node, axes, origin, start)
    return Operand(node, axes, node, axes)


def contraction(node: Node) -> Contraction | None:
    """Reads a product of two tensors, or ``None`` when it is not one (a vector, three operands, a diagonal)."""
    if node.kind == "einsum":
        return _einsum(node)
    if node.kind == "sum":
        return _summed(node)
    if node.kind not in ("matmul", "baddbmm"):
        return None
    a, b = node.inputs[-2:]
    if (
        not (isinstance(a, Node) and isinstance(b, Node))
        or a.shape is None
        or b.shape is None
        or node.shape is None
    ):
        return None
    if len(a.shape) < 2 or len(b.shape) < 2:
        return None
    batch = fresh(node.shape[:-2])
    rows, columns, inner = [Atom(a.shape[-2])], [Atom(b.shape[-1])], [Atom(a.shape[-1])]

    return Contraction(
        node,
        trace(a, [*_axes_had(batch, a.shape[:-2]), rows, inner]),
        trace(b, [*_axes_had(batch, b.shape[:-2]), inner, columns]),
        [*batch, rows, columns],
        inner,
    )


def _axes_had(axes: Axes, shape: tuple[Size, ...]) -> Axes:
    """The axes of an operand that is broadcast to ``axes``: it does not have one along which its size is 1."""
    mine = axes[len(axes) - len(shape) :]
    return [axis if size != 1 or axis[0].size == 1 else [] for axis, size in zip(mine, shape)]


def _summed(node: Node) -> Contraction | None:
    """``(a * b).sum(dim)`` of broadcast tensors: a product where both have the axis that is summed."""
    pair, dims = factors(node), tuple(node.attributes.get("dims") or ())
    product = node.inputs[0]
    if pair is None or len(dims) != 1 or not isinstance(product, Node) or product.shape is None:
        return None
    a, b = pair
    if a.shape is None or b.shape is None or node.shape is None or product.tainted:
        return None
    rank, summed = len(product.shape), dims[0] % len(product.shape)
    axes = fresh(product.shape)
    in_a, in_b = _axes_had(axes, a.shape), _axes_had(axes, b.shape)
    if not all(axes[summed] in operand for operand in (in_a, in_b)):
        return None
    kept: Axes = [axis for d, axis in enumerate(axes) if d != summed]
    if len(node.shape) == rank:
        kept.insert(summed, [])
    return Contraction(node, trace(a, in_a), trace(b, in_b), kept, [*axes[summed]])


def _einsum(node: Node) -> Contraction | None:
    a, b = (node.inputs[0], node.inputs[1]) if len(node.inputs) == 2 else (None, None)
    if (
        not (isinstance(a, Node) and isinstance(b, Node))
        or a.shape is None
        or b.shape is None
        or node.shape is None
    ):
        return None
    equation = node.attributes["equation"].replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        letters = sorted({c for c in left if c.isalpha()})
        result = ("..." if "..." in left else "") + "".join(c for c in letters if left.count(c) == 1)
    ellipsis = max(len(x.shape or ()) - len(t.replace("...", "")) for x, t in ((a, terms[0]), (b, terms[1])))
    dots = [chr(0x3B1 + i) for i in range(max(ellipsis, 0))]

    def letters_of(term: str, rank: int) -> list[str]:
        before, found, after = term.partition("...")
        if not found:
            return list(term)
        count = rank - len(before) - len(after)
        return [*before, *dots[len(dots) - count :], *after]

    in_a, in_b = letters_of(terms[0], len(a.shape)), letters_of(terms[1], len(b.shape))
    out = letters_of(result, len(node.shape))
    if (
        len(set(in_a)) < len(in_a)
        or len(set(in_b)) < len(in_b)
        or len(in_a) != len(a.shape)
        or len(in_b) != len(b.shape)
    ):
        return None
    atoms: dict[str, Atom] = {}
    for letter, size in [*zip(in_a, a.shape), *zip(in_b, b.shape)]:
        if letter not in atoms or atoms[letter].size == 1:
            atoms[letter] = Atom(size)
    if any(letter not in atoms for letter in out):
        return None

    def axes_of(term: list[str], shape: tuple[object, ...]) -> Axes:
        return [[atoms[letter]] if size != 1 else [] for letter, size in zip(term, shape)]

    summed = [atoms[letter] for letter in in_a if letter in in_b and letter not in out]
    return Contraction(
        node,
        trace(a, axes_of(in_a, a.shape)),
        trace(b, axes_of(in_b, b.shape)),
        axes_of(out, node.shape),
        summed,
    )
