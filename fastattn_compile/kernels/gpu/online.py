"""Pieces that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that are numbers, not steps between elements: a kernel is made once for all their values. Without this 1 is
# put into the code, where it has no type, and every multiple of 16 makes a kernel of its own.
COUNTS = (
    "batch", "bins", "channels", "chunks", "count", "count_units", "entries", "first", "first_in",
    "first_node", "first_out", "group", "groups", "heads", "high", "k_heads", "k_len", "leaves", "left", "length",
    "level", "list_len", "lists", "low", "n", "nodes", "per_unit", "q_heads", "q_len", "q_start", "right", "room", "rows",
    "fallback", "size", "slots", "start", "stretch", "summed", "terms", "tiles", "tokens", "total", "trees", "unit", "width",
    "window",
)  # fmt: skip


@triton.jit
def row_offset(row, heads, length, stride_b, stride_h, stride_n):
    """Offset of a row of ``x.flatten(0, 2)`` in ``(b, h, n, d)`` of any strides, int64."""
    head = row // length
    batch = head // heads
    offset = batch.to(tl.int64) * stride_b + (head - batch * heads).to(tl.int64) * stride_h
    return offset + (row - head * length).to(tl.int64) * stride_n


@triton.jit
def blemish(x):
    """``(rows,)`` 0, NaN for a row that holds NaN or infinity: added to its scores, whoever sees it gets NaN."""
    return tl.sum((x * 0.0).to(tl.float32), 1)


@triton.jit
def finite(x):
    """0 in place of NaN and infinity: ``0 * NaN`` would reach rows that do not see them."""
    return tl.where(x - x == 0, x, 0.0).to(x.dtype)


@triton.jit
def online_softmax(s, largest, mass):
    """Takes a tile of scores (log2) into a running softmax: weights, factor on what was summed, new statistics."""
    new = tl.maximum(largest, tl.max(s, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(largest - anchor)
    p = tl.exp2(s - anchor[:, None])
    return p, shrink, new, mass * shrink + tl.sum(p, 1)


@triton.jit
def log2_sum(largest, mass):
    """Log2-sum-exp of a running softmax; -inf where nothing was met."""
    return largest + tl.log2(tl.where(mass == 0, 1.0, mass))
