"""Softmax attention of every query to a range of a list of keys, in Triton, forward and backward.

Leaf attention, clusters and every other partition of the keys are such ranges. Rows of queries, keys and values are
gathered through lists; no sorted copy of them is ever written. Queries that share a node stand together, a tile of
queries never spans two nodes and begins with its node: what comes later in a causal sequence does not change the order
of a query's sums. Every number has one writer, nothing is added atomically.

The backward pass has two kernels: ``leaf_dq`` walks as the forward does and also makes ``delta``; ``leaf_dkv`` owns a
tile of the key list and walks the queries whose ranges reach it, a stretch of the sorted queries.

Sizes: ``D`` channels of query and key, ``E`` of value; a row is a number in ``x.flatten(0, 2)`` of ``(b, h, n, d)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_tf import NearPairs, Part, PartGradients, join
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, precision, tensor_obstacle
from fastattn_compile.kernels.gpu.leaf_lists import Lists, cluster_lists, range_lists
from fastattn_compile.kernels.gpu.online import COUNTS, blemish, finite, log2_sum, online_softmax, row_offset
from fastattn_compile.kernels.gpu.op_configs import Config, chosen


@triton.jit
def met_near(key, k_heads, k_len, low, high, SINK, SINKS: tl.constexpr):
    """Whether keys, by their rows, stand between two positions or are sinks: these are met elsewhere."""
    position = key % k_len
    found = (position >= low) & (position < high)
    if SINKS:
        found = found | (tl.load(SINK + key // (k_heads * k_len) * k_len + position) != 0)
    return found


@triton.jit(do_not_specialize=COUNTS)
def leaf_fwd(
    Q, K, V, OUT, LSE, QUERY_ROW, OUT_ROW, START, STOP, TILE, KEY_ROW, BIAS, LOW, HIGH, SINK,
    q_heads, q_len, q_b, q_h, q_n, q_d, k_heads, k_len, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (natural) of one tile of the sorted queries; ``scale`` carries log2 e."""
    tile = tl.program_id(0)
    place, end = tl.load(TILE + tile) + tl.arange(0, BM), tl.load(TILE + tile + 1)
    real, d, e = place < end, tl.arange(0, BD), tl.arange(0, BE)
    start, stop = tl.load(START + place, mask=real, other=0), tl.load(STOP + place, mask=real, other=0)
    row = tl.load(QUERY_ROW + place, mask=real, other=0)
    at = row_offset(row, q_heads, q_len, q_b, q_h, q_n)
    q = tl.load(Q + at[:, None] + d[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if HIDDEN:
        low, high = tl.load(LOW + row)[:, None], tl.load(HIGH + row)[:, None]
    largest, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    first, last = tl.min(tl.where(real, start, 2147483647), 0), tl.max(stop, 0)
    for begin in range(first, last, BN):
        slot = begin + tl.arange(0, BN)
        listed = slot < last
        key = tl.load(KEY_ROW + slot, mask=listed, other=0)
        k_at, v_at = (
            row_offset(key, k_heads, k_len, k_b, k_h, k_n),
            row_offset(key, k_heads, k_len, v_b, v_h, v_n),
        )
        k = tl.load(K + k_at[:, None] + d[None, :] * k_d, mask=listed[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(V + v_at[:, None] + e[None, :] * v_d, mask=listed[:, None] & (e < E)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + (blemish(k) + blemish(v))[None, :]
        if HAS_BIAS:
            s += tl.load(BIAS + slot, mask=listed, other=0.0)[None, :] * 1.4426950408889634
        seen = (slot[None, :] >= start[:, None]) & (slot[None, :] < stop[:, None])
        if HIDDEN:
            seen &= ~met_near(key[None, :], k_heads, k_len, low, high, SINK, SINKS)
        p, shrink, largest, mass = online_softmax(tl.where(seen, s, float("-inf")), largest, mass)
        acc = tl.dot(p.to(v.dtype), finite(v), acc * shrink[:, None], input_precision=PRECISION)
    out_row = tl.load(OUT_ROW + place, mask=real, other=0).to(tl.int64)
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(
        OUT + out_row[:, None] * E + e[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    tl.store(LSE + out_row, log2_sum(largest, mass) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def leaf_dq(
    Q, K, V, OUT, LSE, GRAD, GRAD_LSE, DQ, DELTA, SUM, QUERY_ROW, OUT_ROW, START, STOP, TILE, KEY_ROW, BIAS,
    LOW, HIGH, SINK, q_heads, q_len, q_b, q_h, q_n, q_d, k_heads, k_len, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr,
    SINKS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, ``delta = <grad, out> - grad_lse``, and the sum of its score gradients."""
    tile = tl.program_id(0)
    place, end = tl.load(TILE + tile) + tl.arange(0, BM), tl.load(TILE + tile + 1)
    real, d, e = place < end, tl.arange(0, BD), tl.arange(0, BE)
    start, stop = tl.load(START + place, mask=real, other=0), tl.load(STOP + place, mask=real, other=0)
    row = tl.load(QUERY_ROW + place, mask=real, other=0)
    at = row_offset(row, q_heads, q_len, q_b, q_h, q_n)
    q = tl.load(Q + at[:, None] + d[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
    out_row = tl.load(OUT_ROW + place, mask=real, other=0).to(tl.int64)
    out_at, values = out_row[:, None] * E + e[None, :], real[:, None] & (e < E)[None, :]
    grad, out = tl.load(GRAD + out_at, mask=values, other=0.0), tl.load(OUT + out_at, mask=values, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + out_row, mask=real, other=0.0)
    tl.store(DELTA + out_row, delta, mask=real)
    lse = tl.load(LSE + out_row, mask=real, other=0.0) * 1.4426950408889634
    if HIDDEN:
        low, high = tl.load(LOW + row)[:, None], tl.load(HIGH + row)[:, None]
    acc, total = tl.zeros([BM, BD], tl.float32), tl.zeros([BM], tl.float32)
    first, last = tl.min(tl.where(real, start, 2147483647), 0), tl.max(stop, 0)
    for begin in range(first, last, BN):
        slot = begin + tl.arange(0, BN)
        listed = slot < last
        key = tl.load(KEY_ROW + slot, mask=listed, other=0)
        k_at, v_at = (
            row_offset(key, k_heads, k_len, k_b, k_h, k_n),
            row_offset(key, k_heads, k_len, v_b, v_h, v_n),
        )
        k = finite(
            tl.load(K + k_at[:, None] + d[None, :] * k_d, mask=listed[:, None] & (d < D)[None, :], other=0.0)
        )
        v = finite(
            tl.load(V + v_at[:, None] + e[None, :] * v_d, mask=listed[:, None] & (e < E)[None, :], other=0.0)
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += tl.load(BIAS + slot, mask=listed, other=0.0)[None, :] * 1.4426950408889634
        seen = (slot[None, :] >= start[:, None]) & (slot[None, :] < stop[:, None])
        if HIDDEN:
            seen &= ~met_near(key[None, :], k_heads, k_len, low, high, SINK, SINKS)
        slope = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        # Where a query meets nothing its log-sum-exp is -inf: chosen, not multiplied.
        seen &= s != float("-inf")
        ds = tl.where(seen, tl.exp2(s - lse[:, None]) * slope, 0.0)
        total += tl.sum(ds, 1)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    acc *= scale * 0.6931471805599453
    tl.store(
        DQ + out_row[:, None] * D + d[None, :],
        acc.to(DQ.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )
    tl.store(SUM + out_row, total, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def leaf_dkv(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, SUM, QUERY_ROW, OUT_ROW, START, STOP, FIRST, LAST, KEY_ROW, GRAD_ROW, BIAS,
    LOW, HIGH, SINK, q_heads, q_len, q_b, q_h, q_n, q_d, k_heads, k_len, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    list_len, lists, level, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr,
    SINKS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one tile of one list; ``ADD`` to what an earlier list gave them."""
    part, unit = tl.program_id(0), tl.program_id(1)
    inside = part * BN + tl.arange(0, BN)
    listed, d, e = inside < list_len, tl.arange(0, BD), tl.arange(0, BE)
    slot = (unit * lists + level) * list_len + inside
    key = tl.load(KEY_ROW + slot, mask=listed, other=0)
    k_at, v_at = (
        row_offset(key, k_heads, k_len, k_b, k_h, k_n),
        row_offset(key, k_heads, k_len, v_b, v_h, v_n),
    )
    k = finite(
        tl.load(K + k_at[:, None] + d[None, :] * k_d, mask=listed[:, None] & (d < D)[None, :], other=0.0)
    )
    v = finite(
        tl.load(V + v_at[:, None] + e[None, :] * v_d, mask=listed[:, None] & (e < E)[None, :], other=0.0)
    )
    bias = tl.zeros([BN], tl.float32)
    if HAS_BIAS:
        bias += tl.load(BIAS + slot, mask=listed, other=0.0) * 1.4426950408889634
    dk, dv, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BE], tl.float32), tl.zeros([BN], tl.float32)
    owner = unit * tl.num_programs(0) + part
    last = tl.load(LAST + owner)
    for begin in range(tl.load(FIRST + owner), last, BM):
        place = begin + tl.arange(0, BM)
        real = place < last
        start, stop = tl.load(START + place, mask=real, other=0), tl.load(STOP + place, mask=real, other=0)
        row = tl.load(QUERY_ROW + place, mask=real, other=0)
        at = row_offset(row, q_heads, q_len, q_b, q_h, q_n)
        out_row = tl.load(OUT_ROW + place, mask=real, other=0).to(tl.int64)
        q = tl.load(Q + at[:, None] + d[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
        grad = tl.load(
            GRAD + out_row[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0
        )
        lse = tl.load(LSE + out_row, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + out_row, mask=real, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None]
        seen = (slot[:, None] >= start[None, :]) & (slot[:, None] < stop[None, :]) & (s != float("-inf"))
        if HIDDEN:
            low, high = tl.load(LOW + row)[None, :], tl.load(HIGH + row)[None, :]
            seen &= ~met_near(key[:, None], k_heads, k_len, low, high, SINK, SINKS)
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = tl.where(seen, p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]), 0.0)
        total += tl.sum(ds, 1)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale * 0.6931471805599453
    key_row = tl.load(GRAD_ROW + slot, mask=listed, other=0).to(tl.int64)
    dk_at, dv_at = DK + key_row[:, None] * D + d[None, :], DV + key_row[:, None] * E + e[None, :]
    dk_mask, dv_mask = listed[:, None] & (d < D)[None, :], listed[:, None] & (e < E)[None, :]
    if ADD:
        dk += tl.load(dk_at, mask=dk_mask, other=0.0).to(tl.float32)
        dv += tl.load(dv_at, mask=dv_mask, other=0.0).to(tl.float32)
    tl.store(dk_at, dk.to(DK.dtype.element_ty), mask=dk_mask)
    tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=dv_mask)
    tl.store(SUM + key_row * lists + level, total, mask=listed)


def attend_lists(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lists: Lists, results: int, config: Config,
    hidden: NearPairs | None = None, kind: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention through lists.

    Args:
        query: ``(b, h, n, d)``, any strides.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, e)``.
        scale: Factor on the scores.
        lists: Who meets whom.
        results: Rows of results; ``lists.out_row`` names each once.
        config: Of ``leaf_fwd``; its ``BM`` is that of the lists' tiles.
        hidden: Pairs that are met elsewhere.
        kind: Type of the output, that of the values when ``None``.

    Returns:
        ``(results, e)``, 0 where a query meets nothing; log-sum-exp ``(results,)`` float32,
        -inf there.
    """
    out = value.new_empty(results, value.shape[3], dtype=kind or value.dtype)
    lse = value.new_empty(results, dtype=torch.float32)
    leaf_fwd[(lists.tile.numel() - 1,)](
        query, key, value, out, lse, lists.query_row, lists.out_row, lists.start, lists.stop, lists.tile,
        lists.key_row, lists.bias, *_near(hidden), *_shape(query, key, value, scale),
        **_sizes(query, value, lists, hidden), **config.launch,
    )  # fmt: skip
    return out, lse


def attend_lists_backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lists: Lists, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None, config_dq: Config, config_dkv: Config,
    hidden: NearPairs | None = None, kind: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``attend_lists``.

    Args:
        query: As in ``attend_lists``.
        key: As in ``attend_lists``.
        value: As in ``attend_lists``.
        scale: As in ``attend_lists``.
        lists: As in ``attend_lists``.
        out: Output of ``attend_lists``.
        log_sum_exp: Log-sum-exp of ``attend_lists``.
        grad_out: Gradient of the output, contiguous.
        grad_log_sum_exp: Gradient of the log-sum-exp, contiguous; ``None`` is zero.
        config_dq: Of ``leaf_dq``; its ``BM`` is that of the lists' tiles.
        config_dkv: Of ``leaf_dkv``.
        hidden: Pairs that are met elsewhere.
        kind: Type of the gradients, that of the tensors when ``None``.

    Returns:
        Gradients of queries ``(results, d)``, keys ``(key results, d)`` and values; the sums of the gradients of
        the scores of each query ``(results,)`` and of each key in each list ``(key results, lists)``, float32.
    """
    results, keys = out.shape[0], lists.length * lists.units
    # Keys that stand in several lists gather their gradients list by list, in full precision.
    of_lists = (kind or query.dtype) if lists.lists == 1 else torch.float32
    dq = query.new_empty(results, query.shape[3], dtype=kind or query.dtype)
    delta, of_query = (query.new_empty(results, dtype=torch.float32) for _ in range(2))
    dk, dv = (x.new_empty(keys, x.shape[3], dtype=of_lists) for x in (key, value))
    of_key = key.new_empty(keys, lists.lists, dtype=torch.float32)
    shape, sizes, near = _shape(query, key, value, scale), _sizes(query, value, lists, hidden), _near(hidden)
    leaf_dq[(lists.tile.numel() - 1,)](
        query, key, value, out, log_sum_exp, grad_out, grad_log_sum_exp, dq, delta, of_query, lists.query_row,
        lists.out_row, lists.start, lists.stop, lists.tile, lists.key_row, lists.bias, *near, *shape,
        HAS_GRAD_LSE=grad_log_sum_exp is not None, **sizes, **config_dq.launch,
    )  # fmt: skip
    columns = config_dkv.columns
    for level in range(lists.lists):
        leaf_dkv[(-(-lists.length // columns), lists.units)](
            query, key, value, log_sum_exp, grad_out, delta, dk, dv, of_key, lists.query_row, lists.out_row,
            lists.start, lists.stop, *lists.reaching(level, columns), lists.key_row, lists.grad_row, lists.bias,
            *near, *shape[:-1], lists.length, lists.lists, level, shape[-1], ADD=level > 0, **sizes, **config_dkv.launch,
        )  # fmt: skip
    return dq, dk, dv, of_query, of_key


def _shape(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[int | float, ...]:
    return (
        *query.shape[1:3],
        *query.stride(),
        *key.shape[1:3],
        *key.stride(),
        *value.stride(),
        scale * LOG2_E,
    )


def _near(hidden: NearPairs | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bounds of the positions that each query meets elsewhere, and the sinks."""
    if hidden is None:
        return None, None, None
    return hidden.low.int().contiguous(), hidden.high.int().contiguous(), hidden.sinks


def _sizes(query: Tensor, value: Tensor, lists: Lists, hidden: NearPairs | None) -> dict[str, object]:
    return {
        **channels(D=query.shape[3], E=value.shape[3]), "HAS_BIAS": lists.bias is not None, "HIDDEN": hidden is not None,
        "SINKS": hidden is not None and hidden.sinks is not None, "PRECISION": precision(query.dtype),
    }  # fmt: skip


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """``treeformer_tf.attend`` in Triton, part by part; the output has the values' type.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, m, d)``, same type.
        value: ``(b, g, m, e)``, same type.
        scale: Factor on the scores.
        parts: Who meets whom, without gates; what is hidden are ``NearPairs``.

    Returns:
        Output ``(b, h, n, e)`` and log-sum-exp ``(b, h, n, 1)``, float32.
    """
    config, made = chosen("leaf_fwd", query, value), None
    kind = value.dtype if len(parts) == 1 else torch.float32
    for part in parts:
        lists = range_lists(part.ranges, key.shape[2], config.rows)
        results = query.shape[:3].numel()
        out, lse = attend_lists(query, key, value, scale, lists, results, config, _hidden(part), kind)
        made = (out, lse[:, None]) if made is None else join(*made, out, lse[:, None])
    assert made is not None
    return made[0].to(value.dtype).view(*query.shape[:3], -1), made[1].view(*query.shape[:3], 1)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part], out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[PartGradients]]:  # fmt: skip
    """``treeformer_tf.backward`` in Triton, deterministic.

    Args:
        query: As in ``attend``.
        key: As in ``attend``.
        value: As in ``attend``.
        scale: As in ``attend``.
        parts: As in ``attend``.
        out: Output of ``attend``.
        log_sum_exp: ``(b, h, n, 1)``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: ``(b, h, n)``; ``None`` is zero.

    Returns:
        Gradients of query, key and value, and what each part says of memberships.
    """
    config_dq, config_dkv = chosen("leaf_dq", query, value), chosen("leaf_dkv", query, value)
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    saved = (
        out.flatten(0, 2).contiguous(),
        log_sum_exp.float().flatten().contiguous(),
        grad_out.to(query.dtype).contiguous(),
    )
    kind, total, said = query.dtype if len(parts) == 1 else torch.float32, None, []
    for part in parts:
        lists = range_lists(part.ranges, key.shape[2], config_dq.rows)
        *grads, of_query, of_key = attend_lists_backward(
            query, key, value, scale, lists, *saved, slope, config_dq, config_dkv, _hidden(part), kind
        )
        total = grads if total is None else [a.add_(b) for a, b in zip(total, grads)]
        said.append(PartGradients(of_query, of_key, None, None))
    assert total is not None
    dq, dk, dv = (x.view(like.shape) for x, like in zip(total, (query, key, value)))
    return dq, dk, dv, said


def _hidden(part: Part) -> NearPairs | None:
    assert isinstance(part.hidden, (NearPairs, type(None)))
    return part.hidden


def cluster_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, token: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention inside clusters of gathered tokens: ``cast_tiles.forward`` without its gathered copies.

    Args:
        query: ``(g, b, n, r, d)``, contiguous.
        key: ``(g, b, n, d)``, contiguous.
        value: ``(g, b, n, e)``, contiguous.
        scale: Factor on the scores.
        token: ``(tiles, slots)`` row of the flat ``(b n)`` tokens in each slot.
        offset: ``(tiles, slots)`` added to the score of a key; -inf for an empty slot.

    Returns:
        Output ``(g, tiles, slots * r, e)``; log-sum-exp ``(g, tiles, slots * r)``, float32.
    """
    heads, tiles = query.shape[0], token.shape[0]
    rows = _cluster_rows(query, key, value)
    config = chosen("leaf_fwd", *rows[::2])
    lists = cluster_lists(token, offset, key.shape[1:3].numel(), heads, query.shape[3], config.rows)
    out, lse = attend_lists(*rows, scale, lists, lists.out_row.numel(), config)
    return out.view(heads, tiles, -1, value.shape[3]), lse.view(heads, tiles, -1)


def cluster_backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, token: Tensor, offset: Tensor,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``cluster_forward``, slot by slot.

    Args:
        query: As in ``cluster_forward``.
        key: As in ``cluster_forward``.
        value: As in ``cluster_forward``.
        scale: As in ``cluster_forward``.
        token: As in ``cluster_forward``.
        offset: As in ``cluster_forward``; takes no gradient.
        out: Output of ``cluster_forward``.
        log_sum_exp: Log-sum-exp of ``cluster_forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.

    Returns:
        Gradients ``(g, tiles, slots * r, d)``, ``(g, tiles, slots, d)`` and ``(g, tiles, slots, e)``.
    """
    heads, tiles = query.shape[0], token.shape[0]
    rows = _cluster_rows(query, key, value)
    config_dq, config_dkv = chosen("leaf_dq", *rows[::2]), chosen("leaf_dkv", *rows[::2])
    lists = cluster_lists(token, offset, key.shape[1:3].numel(), heads, query.shape[3], config_dq.rows)
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    dq, dk, dv, _, _ = attend_lists_backward(
        *rows, scale, lists, out.flatten(0, 2), log_sum_exp.flatten(), grad_out.to(query.dtype).contiguous(), slope,
        config_dq, config_dkv,
    )  # fmt: skip
    by_slot = [x.view(heads, tiles, -1, x.shape[1]) for x in (dq, dk, dv)]
    return by_slot[0], by_slot[1], by_slot[2]


def _cluster_rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.flatten(0, 3)[None, None], key.flatten(0, 2)[None, None], value.flatten(0, 2)[None, None]


def obstacle(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]) -> str:
    """Why these kernels cannot serve a call of ``treeformer_tf``; empty when they can."""
    if any(not isinstance(part.hidden, (NearPairs, type(None))) for part in parts):
        return "pairs that an earlier tree met are hidden"
    if any(part.gate is not None for part in parts):
        return "a gate changes the scores"
    return tensor_obstacle(query, key, value)
