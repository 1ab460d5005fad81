"""What layout calls mean: views, permutations, repetition, indexing, pieces of a tensor. Rules as in
``fx_rules``."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from fastattn_compile.passes.fx_rules import RULES, Meaning, Result, dimension, is_number, rank, rule
from fastattn_compile.passes.fx_vocabulary import Call
from fastattn_compile.passes.graph import Node, Size, same_size

_WHOLE = slice(None)


@rule("view")
def _view(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    if isinstance(x, Node) and x.dtype is not None and result.dtype is not None and x.dtype != result.dtype:
        return None  # Tensor.view(dtype) reinterprets the bits
    return Meaning("reshape", (x,))


def _permute(x: Any, dims: tuple[int | None, ...]) -> Meaning | None:
    known = tuple(d for d in dims if d is not None)
    return Meaning("permute", (x,), {"dims": known}) if len(known) == len(dims) else None


@rule("permute")
def _permute_rule(call: Call, result: Result) -> Meaning | None:
    of = rank(call.get("x"))
    return _permute(call.get("x"), tuple(dimension(d, of) for d in call.get("dims", ())))


@rule("transpose", "mT", "t", "T")
def _transpose(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    of = rank(x)
    if of is None or (call.spelled in ("mH", "H", "adjoint") and x.dtype is not None and x.dtype.is_complex):
        return None
    order: list[int] = list(range(of))
    if call.name == "T":
        order.reverse()
    elif of >= 2:
        i, j = dimension(call.get("dim0", -2), of), dimension(call.get("dim1", -1), of)
        if i is None or j is None:
            return None
        order[i], order[j] = order[j], order[i]
    return _permute(x, tuple(order))


@rule("movedim")
def _movedim(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    of = rank(x)
    pairs = []
    for key in ("source", "destination"):
        value = call.get(key)
        pairs.append([dimension(d, of) for d in (value if isinstance(value, (tuple, list)) else (value,))])
    if of is None or any(d is None for dims in pairs for d in dims):
        return None
    order: list[int | None] = [None] * of
    for source, destination in zip(*pairs):
        order[destination] = source
    rest = iter(d for d in range(of) if d not in pairs[0])
    return _permute(x, tuple(next(rest) if d is None else d for d in order))


@rule("expand")
def _expand(call: Call, result: Result) -> Meaning | None:
    return Meaning("expand", (call.get("x"),))


@rule("repeat", "tile")
def _repeat(call: Call, result: Result) -> Meaning | None:
    x, repeats = call.get("x"), call.get("repeats")
    of = rank(x)
    if of is None or not isinstance(repeats, (tuple, list)) or not all(is_number(r) for r in repeats):
        return None
    return Meaning("repeat", (x,), {"repeats": (1,) * (of - len(repeats)) + tuple(repeats)})


@rule("repeat_interleave")
def _repeat_interleave(call: Call, result: Result) -> Meaning | None:
    x, repeats, dim = call.get("x"), call.get("repeats"), call.get("dim")
    of = rank(x)
    if dim is None and of == 1:
        dim = 0
    dim = dimension(dim, of)
    if dim is None or not is_number(repeats):
        return None
    return Meaning("repeat_interleave", (x,), {"repeats": repeats, "dim": dim})


@rule("cat")
def _cat(call: Call, result: Result) -> Meaning | None:
    tensors = call.get("tensors", call.get("x"))
    of = len(result.shape) if result.shape is not None else None
    dim = dimension(call.get("dim", 0), of)
    if dim is None or not isinstance(tensors, (tuple, list)):
        return None
    return Meaning("cat", tuple(tensors), {"dim": dim})


@rule("stack")
def _stack(call: Call, result: Result) -> Meaning | None:
    tensors, shape = call.get("tensors", call.get("x")), result.shape
    dim = dimension(call.get("dim", 0), len(shape) if shape is not None else None)
    if dim is None or shape is None or not isinstance(tensors, (tuple, list)):
        return None
    single = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = tuple(Meaning("reshape", (x,), {}, single, result.dtype) for x in tensors)
    return Meaning("cat", parts, {"dim": dim})


# ---- indexing


def _slice(entry: slice, before: Size, after: Size) -> slice:
    """A slice with nonnegative ends, from the sizes before and after it; ``slice(None)`` when it keeps
    everything."""
    step = 1 if entry.step is None else entry.step
    if step == 1 and same_size(before, after):
        return _WHOLE
    if step == 1 and _is_end(entry.stop):
        return slice(before - after, before, None)
    start: Any = 0 if entry.start is None else entry.start
    if isinstance(start, int) and start < 0:
        start = max(before + start, 0) if isinstance(before, int) else before + start
    if isinstance(after, int) and after == 0:
        return slice(start, start, None if step == 1 else step)
    # The end follows from the number of elements, whatever the source wrote.
    stop = start + (after - 1) * step + 1
    return slice(start, stop, None if step == 1 else step)


def _is_end(stop: Any) -> bool:
    return stop is None or (isinstance(stop, int) and stop >= 2**62)


def _position(entry: Any, size: Size) -> Any:
    return entry + size if isinstance(entry, int) and entry < 0 else entry


def read_index(
    x: Node, entries: list[Any], result: Result, scalars_broadcast: bool = False
) -> tuple[Any, ...] | None:
    """A subscript with one entry for each dimension of ``x``, and ``None`` for each new axis.

    Args:
        x: What is indexed.
        entries: As written.
        result: Shape of what comes out.
        scalars_broadcast: Index tensors without dimensions stand among the others, as in ``aten.index``. A Python
            subscript selects with them first, and with integers, unlike NumPy.

    Returns:
        Integers and slices nonnegative; ``None`` when the subscript cannot be read (boolean masks, lists).
    """
    if x.shape is None or result.shape is None:
        return None
    if any(
        isinstance(e, (bool, list, tuple, str)) or (isinstance(e, Node) and e.dtype == torch.bool)
        for e in entries
    ):
        return None
    consumed = sum(1 for e in entries if e is not None and e is not Ellipsis)
    missing = [_WHOLE] * (len(x.shape) - consumed)
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries = entries[:at] + missing + entries[at + 1 :]
    else:
        entries = entries + missing
    advanced = [
        i for i, e in enumerate(entries) if isinstance(e, Node) and (scalars_broadcast or rank(e) != 0)
    ]
    sizes, outs = iter(x.shape), list(result.shape)
    if advanced:
        # The broadcast index dimensions stand at the first index when all are adjacent, else in front.
        ranks = [rank(entries[i]) for i in advanced]
        if any(r is None for r in ranks):
            return None
        broadcast = max(r for r in ranks if r is not None)
        # What a subscript selects with is gone before the index tensors are looked at.
        between = entries[advanced[0] : advanced[-1] + 1]
        start = 0
        if not any(e is None or isinstance(e, slice) for e in between):
            start = sum(1 for e in entries[: advanced[0]] if e is None or isinstance(e, slice))
        del outs[start : start + broadcast]
    remaining = iter(outs)
    index: list[Any] = []
    for entry in entries:
        if entry is None:
            index.append(None)
            next(remaining, None)
            continue
        size = next(sizes, None)
        if size is None:
            return None
        if isinstance(entry, slice):
            after = next(remaining, None)
            if after is None or any(isinstance(v, Node) for v in (entry.start, entry.stop, entry.step)):
                return None
            index.append(_slice(entry, size, after))
        else:
            index.append(_position(entry, size))
    return tuple(index)


def _index(x: Any, entries: list[Any], result: Result, scalars_broadcast: bool = False) -> Meaning | None:
    if not isinstance(x, Node):
        return None
    index = read_index(x, entries, result, scalars_broadcast)
    if index is None:
        return None
    if all(isinstance(entry, slice) and entry == _WHOLE for entry in index):
        return Meaning("identity", (x,))
    return Meaning("index", (x, *(e for e in index if isinstance(e, Node))), {"index": index})


@rule("getitem")
def _getitem(call: Call, result: Result) -> Meaning | None:
    index = call.arguments.get("index")
    return _index(call.get("x"), list(index) if isinstance(index, tuple) else [index], result)


@rule("index")
def _aten_index(call: Call, result: Result) -> Meaning | None:
    # ATen writes None for a dimension that is kept.
    indices = call.get("indices", ())
    return _index(
        call.get("x"), [_WHOLE if e is None else e for e in indices], result, scalars_broadcast=True
    )


def _along(call: Call, entry: Any, result: Result) -> Meaning | None:
    x = call.get("x")
    dim = dimension(call.get("dim", 0), rank(x))
    return None if dim is None else _index(x, [_WHOLE] * dim + [entry], result)


@rule("slice")
def _slice_rule(call: Call, result: Result) -> Meaning | None:
    return _along(call, slice(call.get("start"), call.get("end"), call.get("step")), result)


@rule("narrow")
def _narrow(call: Call, result: Result) -> Meaning | None:
    start, length = call.get("start"), call.get("length")
    x = call.get("x")
    dim = dimension(call.get("dim"), rank(x))
    if dim is None or isinstance(start, Node):
        return None
    start = _position(start, x.shape[dim])
    return _along(call, slice(start, start + length), result)


@rule("select", "index_select")
def _select(call: Call, result: Result) -> Meaning | None:
    return _along(call, call.arguments.get("index"), result)


# ---- tuples of pieces: the call itself is an identity without a shape, its elements are read by ``pick``


@rule("chunk", "split", "tensor_split", "unbind")
def _pieces(call: Call, result: Result) -> Meaning | None:
    return Meaning("identity", (call.get("x"),))


@rule("broadcast_tensors")
def _broadcast_tensors(call: Call, result: Result) -> Meaning | None:
    return Meaning("identity", tuple(call.get("tensors", ())))


def pick(source: Call, node: Node, sizes: list[Any], position: Any, result: Result) -> Meaning | None:
    """What an element of a tuple is.

    Args:
        source: The call that gave the tuple.
        node: The node of that call.
        sizes: Shapes of the elements, ``None`` where an element has none.
        position: Which element: a number, or ``"values"`` or ``"indices"``.
        result: Of the element.
    """
    position = {"values": 0, "indices": 1}.get(position, position)
    if not isinstance(position, int):
        return None
    position = position + len(sizes) if position < 0 else position
    x = source.get("x")
    if source.name == "max":
        # The values of max along a dimension are those of amax.
        return RULES["amax"](Call("amax", "amax", source.arguments), result) if position == 0 else None
    if source.name == "broadcast_tensors":
        return Meaning("expand", (source.get("tensors")[position],))
    if source.name in ("chunk", "split", "tensor_split", "unbind"):
        dim = dimension(source.get("dim", 0), rank(x))
        if dim is None or any(shape is None for shape in sizes):
            return None
        if source.name == "unbind":
            return _index(x, [_WHOLE] * dim + [position], result)
        start: Any = sum((shape[dim] for shape in sizes[:position]), start=sympy.Integer(0))
        start = int(start) if start.is_number else start
        return _index(x, [_WHOLE] * dim + [slice(start, start + sizes[position][dim])], result)
    if node.kind in ("sdpa", "dropout", "mha", "flex_attention") and position == 0:
        return Meaning("identity", (node,))
    return None
