"""Rules for what moves tensors without computing, and for fused attention, whose heads are unfolded by such moves."""

from __future__ import annotations

from typing import Any

import sympy

from fastattn_compile.passes.fx_rules import Meaning
from fastattn_compile.passes.onnx.rules import Call, rule


@rule("Flatten", "Squeeze", "Unsqueeze")
def _regrouped(call: Call, at: int) -> Meaning:
    return Meaning("reshape", (call.inputs[0],))


@rule("Reshape")
def _reshape(call: Call, at: int) -> Meaning | None:
    """Where a size is what is left over of sizes that only a run shows to divide, the result is a tensor by itself."""
    x, after = call.tensor(0), call.result()
    before = x.shape if x is not None and x.shape is not None else ()
    for size in after or ():
        if isinstance(size, sympy.Expr) and not size.is_polynomial() and size not in before:
            return None
    return Meaning("reshape", (call.inputs[0],))


@rule("Transpose")
def _transpose(call: Call, at: int) -> Meaning | None:
    rank = call.rank
    if rank is None:
        return None
    return Meaning("permute", (call.inputs[0],), {"dims": tuple(call.get("perm") or reversed(range(rank)))})


@rule("Expand")
def _expand(call: Call, at: int) -> Meaning:
    return Meaning("expand", (call.inputs[0],))


@rule("Tile")
def _tile(call: Call, at: int) -> Meaning | None:
    repeats = call.sizes(1)
    return None if repeats is None else Meaning("repeat", (call.inputs[0],), {"repeats": tuple(repeats)})


@rule("Concat")
def _concat(call: Call, at: int) -> Meaning | None:
    rank = call.rank
    return None if rank is None else Meaning("cat", tuple(call.inputs), {"dim": call.get("axis", 0) % rank})


@rule("Slice")
def _slice(call: Call, at: int) -> Meaning | None:
    rank, x = call.rank, call.tensor(0)
    if rank is None or x is None or x.shape is None:
        return None
    if call.opset < 10:
        starts, stops, axes, steps = call.get("starts"), call.get("ends"), call.get("axes"), None
    else:
        starts, stops, axes, steps = (call.sizes(i) for i in (1, 2, 3, 4))
    if starts is None or stops is None:
        return None
    axes = list(range(len(starts))) if axes is None else [int(a) % rank for a in axes]
    index: list[Any] = [slice(None)] * rank
    for d, start, stop, step in zip(axes, starts, stops, steps or [1] * len(starts)):
        # Exporters write the largest integer for "to the end".
        end = None if isinstance(stop, int) and stop >= (1 << 31) - 1 else stop
        index[d] = slice(None if start == 0 else start, end, None if step == 1 else step)
        if index[d].stop is not None and _same(index[d].stop, x.shape[d]):
            index[d] = slice(index[d].start, None, index[d].step)
    return Meaning("index", (x,), {"index": tuple(index)})


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


@rule("Split")
def _split(call: Call, at: int) -> Meaning | None:
    rank, x = call.rank, call.tensor(0)
    if rank is None or x is None:
        return None
    axis = call.get("axis", 0) % rank
    start: Any = 0
    for earlier in range(at):
        shape = call.result(earlier)
        if shape is None:
            return None
        start = start + shape[axis]
    shape = call.result(at)
    if shape is None:
        return None
    index = tuple(slice(start, start + shape[axis]) if d == axis else slice(None) for d in range(rank))
    return Meaning("index", (x,), {"index": index})


@rule("Gather")
def _gather(call: Call, at: int) -> Meaning | None:
    rank, x, indices = call.rank, call.tensor(0), call.tensor(1)
    if rank is None or x is None or indices is None:
        return None
    axis = call.get("axis", 0) % rank
    if axis == 0 and rank == 2 and x.kind == "parameter":
        return Meaning("embedding", (indices, x))
    number = call.sizes(1)
    entry: Any = number[0] if number is not None and indices.shape == () else indices
    index = (slice(None),) * axis + (entry,)
    return Meaning("index", (x, indices) if entry is indices else (x,), {"index": index})


@rule("GatherND")
def _gather_nd(call: Call, at: int) -> Meaning | None:
    """Indices that were concatenated along the last axis, one column a dimension of the data."""
    x, indices = call.tensor(0), call.tensor(1)
    if x is None or indices is None or call.get("batch_dims", 0) or not indices.shape:
        return None
    columns, last = indices.shape[-1], len(indices.shape) - 1
    if not isinstance(columns, int):
        return None
    sources = [(indices, column) for column in range(columns)]
    if indices.kind == "cat" and indices.attributes["dim"] == last and len(indices.operands) == columns:
        sources = [(column, 0) for column in indices.operands]
    parts = tuple(
        Meaning(
            "index", (source,), {"index": (*(slice(None),) * last, column)}, indices.shape[:-1], indices.dtype
        )
        for source, column in sources
    )
    return Meaning("index", (x, *parts), {"index": parts})


# ---- fused attention


@rule("Attention")
def _attention(call: Call, at: int) -> Meaning | None:
    """The standard operator on four dimensions, without cache; other fused nodes are written out before (``unfold``)."""
    if at:
        return None
    q, k, v = (call.tensor(i) for i in range(3))
    attributes = {
        "dropout": 0.0, "is_causal": bool(call.get("is_causal", 0)), "scale": call.get("scale"), "enable_gqa": True,
    }  # fmt: skip
    return Meaning("sdpa", (q, k, v, call.tensor(3)), attributes)
