"""Formulas of views, repetition and indexing: rules of ``mask_lift.Lifter``. Indices change, never values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch

from fastattn_compile.passes.expression import (
    ZERO,
    Constant,
    Expression,
    Load,
    add,
    axes_of,
    bounds,
    constant,
    floordiv,
    mod,
    mul,
    nonnegative,
    substitute,
)
from fastattn_compile.passes.graph import Node, Size, same_size
from fastattn_compile.passes.lift_values import NotIndexArithmetic, dim, rule

if TYPE_CHECKING:
    from fastattn_compile.passes.mask_lift import Lifter


def _source(node: Node) -> tuple[Node, tuple[Size, ...], tuple[Size, ...]]:
    """The tensor a layout node reads, its shape and the shape of the node."""
    x = node.inputs[0]
    if not isinstance(x, Node) or x.shape is None or node.shape is None:
        raise NotIndexArithmetic
    return x, x.shape, node.shape


def _at(lifter: Lifter, x: Node, indices: Sequence[Expression]) -> Expression:
    """The element of ``x`` at the given indices."""
    return substitute(lifter.of(x), {f"d{i}": index for i, index in enumerate(indices)})


@rule("permute")
def _permute(lifter: Lifter, node: Node) -> Expression | None:
    x, before, after = _source(node)
    indices: list[Expression] = [ZERO] * len(before)
    for out, source in enumerate(node.attributes["dims"]):
        indices[source] = dim(out, after[out])
    return _at(lifter, x, indices)


@rule("reshape")
def _reshape(lifter: Lifter, node: Node) -> Expression | None:
    x, before, after = _source(node)
    indices: list[Expression] = [ZERO] * len(before)
    groups = _groups(
        [d for d, n in enumerate(before) if n != 1], [d for d, n in enumerate(after) if n != 1], before, after
    )
    if groups is None:
        return None
    for sources, outs in groups:
        flat: Expression = ZERO
        for d in outs:
            flat = add(mul(flat, constant(after[d])), dim(d, after[d]))
        inner: Size = 1
        for d in reversed(sources):
            index = floordiv(flat, constant(inner)) if inner != 1 else flat
            indices[d] = mod(index, constant(before[d])) if d != sources[0] else index
            inner = inner * before[d]
    return _at(lifter, x, indices)


def _groups(
    sources: list[int], outs: list[int], before: tuple[Size, ...], after: tuple[Size, ...]
) -> list[tuple[list[int], list[int]]] | None:
    """Pairs the dimensions of two shapes into the smallest groups of equal products, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    sources, outs = list(sources), list(outs)
    while sources or outs:
        taken: tuple[list[int], list[int]] = ([], [])
        of_source: Size = 1
        of_out: Size = 1
        while not taken[0] or not same_size(of_source, of_out):
            behind = not taken[0] or (taken[1] and _divides(of_source, of_out))
            if behind and sources:
                taken[0].append(sources.pop(0))
                of_source = of_source * before[taken[0][-1]]
            elif outs:
                taken[1].append(outs.pop(0))
                of_out = of_out * after[taken[1][-1]]
            else:
                return None
        groups.append(taken)
    return groups


def _divides(a: Size, b: Size) -> bool:
    """Whether ``a`` is the smaller of two products that grow toward each other."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    ratio = sympy.cancel(sympy.sympify(b) / sympy.sympify(a))
    return bool(sympy.denom(ratio) == 1)


@rule("repeat_interleave")
def _repeat_interleave(lifter: Lifter, node: Node) -> Expression | None:
    x, before, after = _source(node)
    along, repeats = node.attributes.get("dim"), node.attributes.get("repeats")
    if not isinstance(along, int) or isinstance(repeats, Node):
        return None
    indices = [dim(d, size) for d, size in enumerate(after)]
    indices[along] = floordiv(indices[along], lifter.scalar(repeats)) if before[along] != 1 else ZERO
    return _at(lifter, x, indices)


@rule("repeat")
def _repeat(lifter: Lifter, node: Node) -> Expression | None:
    x, before, after = _source(node)
    offset = len(after) - len(before)
    return _at(
        lifter, x, [mod(dim(d + offset, after[d + offset]), constant(n)) for d, n in enumerate(before)]
    )


@rule("embedding")
def _embedding(lifter: Lifter, node: Node) -> Expression | None:
    indices, table = node.inputs[:2]
    if not isinstance(indices, Node) or not isinstance(table, Node) or not node.shape:
        return None
    last = len(node.shape) - 1
    return _at(lifter, table, [lifter.of(indices), dim(last, node.shape[last])])


@rule("index")
def _index(lifter: Lifter, node: Node) -> Expression | None:
    """Numbers, slices and new axes act first, index tensors on what they leave, as torch does it."""
    x, before, after = _source(node)
    entries = node.attributes.get("index")
    entries = list(entries) if isinstance(entries, (tuple, list)) else [entries]
    entries = _without_ellipsis(entries, len(before))
    tensors = [e for e in entries if isinstance(e, Node) and e.shape != ()]
    block = max((len(e.shape or ()) for e in tensors), default=0)
    start = _block_start([e for e in entries if not _is_number(e)]) if tensors else 0
    out = 0 if start or not tensors else block
    placed = start == 0
    indices: list[Expression] = []
    for entry in entries:
        if tensors and not placed and out == start:
            out, placed = out + block, True
        if entry is None:
            out += 1
        elif isinstance(entry, slice):
            if out == len(after):
                return None
            indices.append(_along_slice(lifter, entry, before[len(indices)], out, after[out]))
            out += 1
        elif isinstance(entry, Node) and entry.shape:
            if entry.dtype == torch.bool or start + block > len(after):
                return None  # a mask selects, it does not index
            shift = start + block - len(entry.shape)
            places = {f"d{j}": dim(j + shift, after[j + shift]) for j in range(len(entry.shape))}
            indices.append(substitute(lifter.of(entry), places))
        else:
            indices.append(_counted(lifter.scalar(entry), before[len(indices)]))
    if out + (0 if placed or not tensors else block) != len(after) or len(indices) != len(before):
        return None
    return _at(lifter, x, indices) if _in_range(lifter.of(x), indices) else None


def _is_number(entry: Any) -> bool:
    return not (entry is None or isinstance(entry, slice) or (isinstance(entry, Node) and bool(entry.shape)))


def _without_ellipsis(entries: list[Any], rank: int) -> list[Any]:
    used = sum(1 for e in entries if e is not None and e is not Ellipsis)
    rest = [slice(None)] * (rank - used)
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    return entries[:at] + rest + [e for e in entries[at:] if e is not Ellipsis]


def _block_start(entries: list[Any]) -> int:
    """Where the dimensions of index tensors stand: at the first when they are side by side, else in front."""
    at = [i for i, e in enumerate(entries) if isinstance(e, Node)]
    return at[0] if at[-1] - at[0] == len(at) - 1 else 0


def _along_slice(lifter: Lifter, entry: slice, size: Size, place: int, length: Size) -> Expression:
    """The index along a sliced dimension; ``length`` is the size that is left at dimension ``place``."""
    step = 1 if entry.step is None else entry.step
    if not isinstance(step, int) or step < 1:
        raise NotIndexArithmetic
    start = _counted(lifter.scalar(0 if entry.start is None else entry.start), size)
    stop = constant(size) if entry.stop is None else _counted(lifter.scalar(entry.stop), size)
    # A start below zero counts from the end or is cut to 0: only a proven one says what comes first.
    if not isinstance(start, Constant) or not isinstance(stop, Constant) or not nonnegative(start.value):
        raise NotIndexArithmetic
    end = min(stop.value, size) if isinstance(stop.value, int) and isinstance(size, int) else stop.value
    if not same_size(length * step, end - start.value + (start.value - end) % step):
        raise NotIndexArithmetic  # read from another dimension than the one written to
    return add(mul(dim(place, length), constant(step)), start) if size != 1 else ZERO


def _counted(index: Expression, size: Size) -> Expression:
    """An index from the front when it is a negative number."""
    negative = isinstance(index, Constant) and isinstance(index.value, int) and index.value < 0
    return add(index, constant(size)) if negative else index


def _in_range(x: Expression, indices: Sequence[Expression]) -> bool:
    """Whether no index can be negative (it would count from the end), or the tensor is read as indexed."""
    plain = isinstance(x, Load) and all(index == axis for index, axis in zip(x.indices, _dims_of(x)))
    if plain:
        return True
    used = axes_of(x)
    return all(f"d{d}" not in used or nonnegative(bounds(index)[0]) for d, index in enumerate(indices))


def _dims_of(x: Load) -> list[Expression]:
    return [dim(d, size) for d, size in enumerate(x.node.shape or ())]
