"""Rules for what moves tensors without computing, and for fused attention, whose heads are unfolded by such moves."""

from __future__ import annotations

from typing import Any

from fastattn_compile.passes.fx_rules import Meaning
from fastattn_compile.passes.graph import Node
from fastattn_compile.passes.onnx.rules import MICROSOFT, Call, rule


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(call: Call, at: int) -> Meaning:
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
    if (
        x is None
        or indices is None
        or call.get("batch_dims", 0)
        or indices.shape is None
        or not indices.shape
    ):
        return None
    columns = indices.shape[-1]
    if not isinstance(columns, int):
        return None
    last = len(indices.shape) - 1
    parts = [
        Meaning(
            "index",
            (indices,),
            {"index": (*(slice(None),) * last, c)},
            tuple(indices.shape[:-1]),
            indices.dtype,
        )
        for c in range(columns)
    ]
    return Meaning("gather_columns", (x, *parts))


# ---- fused attention


@rule("Attention")
def _attention(call: Call, at: int) -> Meaning | None:
    """The standard operator (opset 23 and 24) on four dimensions, without cache; three dimensions carry folded heads."""
    if at:
        return None
    q, k, v = (call.tensor(i) for i in range(3))
    if q is None or k is None or v is None or any(x.shape is None for x in (q, k, v)):
        return None
    if any(call.tensor(i) is not None for i in (4, 5)) or call.get("softcap", 0.0):
        return None
    heads, kv_heads = call.get("q_num_heads"), call.get("kv_num_heads")
    if len(q.shape or ()) == 3:
        if not heads or not kv_heads:
            return None
        return unfolded(
            call, q, k, v, int(heads), int(kv_heads), call.tensor(3), bool(call.get("is_causal", 0))
        )
    attributes = {
        "dropout": 0.0, "is_causal": bool(call.get("is_causal", 0)), "scale": call.get("scale"), "enable_gqa": True,
    }  # fmt: skip
    return Meaning("sdpa", (q, k, v, call.tensor(3)), attributes)


def unfolded(
    call: Call, q: Node, k: Node, v: Node, heads: int, kv_heads: int, mask: Any, causal: bool
) -> Meaning | None:
    """A fused call on ``(batch, length, heads * d)`` as the same call on four dimensions, folded again behind it."""

    def split(x: Node, count: int) -> Meaning | None:
        batch, length, channels = x.shape or (0, 0, 0)
        if not isinstance(channels, int) or channels % count:
            return None
        shape = (batch, length, count, channels // count)
        inner = Meaning("reshape", (x,), {}, shape, x.dtype)
        moved = (batch, count, length, channels // count)
        return Meaning("permute", (inner,), {"dims": (0, 2, 1, 3)}, moved, x.dtype)

    parts = [split(q, heads), split(k, kv_heads), split(v, kv_heads)]
    if any(p is None for p in parts) or q.shape is None or v.shape is None:
        return None
    value_dim = int(v.shape[2]) // kv_heads
    shape = (q.shape[0], heads, q.shape[1], value_dim)
    attributes = {"dropout": 0.0, "is_causal": causal, "scale": call.get("scale") or None, "enable_gqa": True}
    fused = Meaning("sdpa", (*parts, mask), attributes, shape, q.dtype)
    back = Meaning(
        "permute", (fused,), {"dims": (0, 2, 1, 3)}, (shape[0], shape[2], shape[1], shape[3]), q.dtype
    )
    return Meaning("reshape", (back,))


@rule("MultiHeadAttention", domain=MICROSOFT)
def _multi_head(call: Call, at: int) -> Meaning | None:
    """Separate query, key and value of three dimensions, without bias and cache."""
    if at or any(call.tensor(i) is not None for i in range(3, 8)):
        return None
    q, k, v = (call.tensor(i) for i in range(3))
    if q is None or k is None or v is None or any(len(x.shape or ()) != 3 for x in (q, k, v)):
        return None
    heads = int(call.get("num_heads"))
    return unfolded(call, q, k, v, heads, heads, None, bool(call.get("unidirectional", 0)))
