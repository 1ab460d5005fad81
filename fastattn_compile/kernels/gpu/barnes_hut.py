"""Barnes-Hut attention in Triton, forward and backward: near blocks, sinks and opened leaves in one online softmax.

A tile of queries is one group of every head that shares its choice. Opened leaves are gathered key by key through the
list of their numbers. The backward pass makes every gradient in one place: ``bh_dq`` walks as the forward does;
``bh_dkv`` owns a tile of keys (or, ``SINKS``, the sinks for a stretch of the queries) and walks the queries near it;
``bh_far_dkv`` owns some of the groups that opened one leaf, found by sorting the opened leaves, and ``bh_far_sum`` adds
what these gave to the tokens of the leaf. No atomics: gradients are the same bits every time.

Sizes as in ``barnes_hut_tree``; ``D`` channels of query and key, ``E`` of value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.gpu.barnes_hut_tree import build_tree, choose
from fastattn_compile.kernels.gpu.op_configs import chosen
from fastattn_compile.kernels.gpu.launch import LIGHT, LOG2_E, channels, padded, precision, tensor_obstacle
from fastattn_compile.kernels.gpu.online import COUNTS, blemish, finite, log2_sum, online_softmax
from fastattn_compile.kernels.gpu.leaf_lists import cut_tiles

# Stretches of queries whose gradients of the sinks are summed apart, and pairs of a group and a leaf of one program.
_STRETCH, _PAIRS = 1024, 256


@triton.jit
def rows_of(X, row, stride_n, stride_d, real, C: tl.constexpr, BC: tl.constexpr):
    """``(rows, channels)`` of one head, 0 where a row is not real."""
    c = tl.arange(0, BC)
    at = X + row.to(tl.int64)[:, None] * stride_n + c[None, :] * stride_d
    return tl.load(at, mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def heads_of(X, batch, head, row, stride_b, stride_h, stride_n, stride_d, real, C: tl.constexpr, BC: tl.constexpr):
    """``(rows, channels)`` of rows of several heads of a sequence."""
    c = tl.arange(0, BC)
    at = batch * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
    return tl.load(X + at[:, None] + c[None, :] * stride_d, mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def shown(place, key, left, right):
    """Whether the mask shows keys to queries by position; a bound below 0 is none."""
    return ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))


@triton.jit
def meet(q, k, v, seen, scale, largest, mass, acc, PRECISION: tl.constexpr):
    """Takes a tile of keys into the running attention of a tile of queries."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + (blemish(k) + blemish(v))[None, :]
    p, shrink, largest, mass = online_softmax(tl.where(seen, s, float("-inf")), largest, mass)
    acc = tl.dot(p.to(v.dtype), finite(v), acc * shrink[:, None], input_precision=PRECISION)
    return largest, mass, acc


@triton.jit
def meet_again(q, k, v, grad, lse, delta, seen, scale, acc, PRECISION: tl.constexpr):
    """Adds to the gradient of a tile of queries, without its factor, what a tile of keys gives."""
    k = finite(k)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    ds = p * (tl.dot(grad, tl.trans(finite(v)), input_precision=PRECISION) - delta[:, None])
    return tl.dot(tl.where(seen, ds, 0.0).to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def give(q, k, v, grad, lse, delta, seen, scale, dk, dv, PRECISION: tl.constexpr):
    """Adds to the gradients of a tile of finite keys and values, without factor, what a tile of queries gives."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
    p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(tl.where(seen, ds, 0.0).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def bh_fwd(
    Q, K, V, OUT, LSE, FINE, SINK, LEAVES, heads, per_unit, length, groups, start,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LEAF: tl.constexpr, OPEN: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of one group of the ``R`` heads of a chooser; ``scale`` carries log2 e.

    The first of the queries given stands at position ``start``.
    """
    group, chooser, m = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BM + tl.arange(0, BM)
    head, first = chooser * R, start + group * GROUP
    batch, unit, kv_heads = (head // heads).to(tl.int64), head // per_unit, heads // per_unit
    row, row_head = first + m % GROUP, head % heads + m // GROUP
    real = (m < R * GROUP) & (row < length)
    q = heads_of(Q, batch, row_head, row - start, q_b, q_h, q_n, q_d, real, D, BD)
    KEY, VALUE = K + batch * k_b + (unit % kv_heads).to(tl.int64) * k_h, V + batch * v_b + (unit % kv_heads).to(tl.int64) * v_h
    FINE += batch * fine_b
    largest, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)

    block = first // BLOCK
    end = tl.minimum(first + GROUP if CAUSAL else (block + 2) * BLOCK, length)
    for begin in range(tl.maximum(block - 1, 0) * BLOCK, end, BN):
        key = begin + tl.arange(0, BN)
        there = (key < end) & (tl.load(FINE + key, mask=key < end, other=0) != 0)
        seen = there[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, there, D, BD), rows_of(VALUE, key, v_n, v_d, there, E, BE)
        largest, mass, acc = meet(q, k, v, seen, scale, largest, mass, acc, PRECISION)
    if OPEN > 0:
        LEAVES += (chooser.to(tl.int64) * groups + group) * OPEN
        i = tl.arange(0, BO)
        slots = tl.sum((tl.load(LEAVES + i, mask=i < OPEN, other=-1) >= 0).to(tl.int32), 0) * LEAF
        for begin in range(0, slots, BN):
            slot = begin + tl.arange(0, BN)
            key = tl.load(LEAVES + slot // LEAF, mask=slot < slots, other=0) * LEAF + slot % LEAF
            there = (slot < slots) & (key < length)
            there = there & (tl.load(FINE + key, mask=there, other=0) != 0)
            k, v = rows_of(KEY, key, k_n, k_d, there, D, BD), rows_of(VALUE, key, v_n, v_d, there, E, BE)
            largest, mass, acc = meet(q, k, v, there[None, :], scale, largest, mass, acc, PRECISION)
    if SINKS > 0:
        i = tl.arange(0, BS)
        key = tl.load(SINK + batch * sink_b + i, mask=i < SINKS, other=-1)
        seen = (key >= 0)[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, key >= 0, D, BD), rows_of(VALUE, key, v_n, v_d, key >= 0, E, BE)
        largest, mass, acc = meet(q, k, v, seen, scale, largest, mass, acc, PRECISION)

    at = (batch * heads + row_head) * (length - start) + row - start
    e = tl.arange(0, BE)
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(OUT + at[:, None] * E + e[None, :], acc.to(OUT.dtype.element_ty), mask=real[:, None] & (e < E)[None, :])
    tl.store(LSE + at, log2_sum(largest, mass) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def bh_dq(
    Q, K, V, OUT, LSE, GRAD, GRAD_LSE, DQ, DELTA, FINE, SINK, LEAVES, heads, per_unit, length, groups,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LEAF: tl.constexpr, OPEN: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Gradient of one group's queries, and ``delta = <grad, out> - grad_lse``."""
    group, chooser, m = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BM + tl.arange(0, BM)
    head, first = chooser * R, group * GROUP
    batch, unit, kv_heads = (head // heads).to(tl.int64), head // per_unit, heads // per_unit
    row, row_head = first + m % GROUP, head % heads + m // GROUP
    real = (m < R * GROUP) & (row < length)
    q = heads_of(Q, batch, row_head, row, q_b, q_h, q_n, q_d, real, D, BD)
    KEY, VALUE = K + batch * k_b + (unit % kv_heads).to(tl.int64) * k_h, V + batch * v_b + (unit % kv_heads).to(tl.int64) * v_h
    FINE += batch * fine_b
    at, e = (batch * heads + row_head) * length + row, tl.arange(0, BE)
    values = real[:, None] & (e < E)[None, :]
    grad = tl.load(GRAD + at[:, None] * E + e[None, :], mask=values, other=0.0)
    out = tl.load(OUT + at[:, None] * E + e[None, :], mask=values, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=real, other=0.0)
    tl.store(DELTA + at, delta, mask=real)
    lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
    acc = tl.zeros([BM, BD], tl.float32)

    block = first // BLOCK
    end = tl.minimum(first + GROUP if CAUSAL else (block + 2) * BLOCK, length)
    for begin in range(tl.maximum(block - 1, 0) * BLOCK, end, BN):
        key = begin + tl.arange(0, BN)
        there = (key < end) & (tl.load(FINE + key, mask=key < end, other=0) != 0)
        seen = there[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, there, D, BD), rows_of(VALUE, key, v_n, v_d, there, E, BE)
        acc = meet_again(q, k, v, grad, lse, delta, seen, scale, acc, PRECISION)
    if OPEN > 0:
        LEAVES += (chooser.to(tl.int64) * groups + group) * OPEN
        i = tl.arange(0, BO)
        slots = tl.sum((tl.load(LEAVES + i, mask=i < OPEN, other=-1) >= 0).to(tl.int32), 0) * LEAF
        for begin in range(0, slots, BN):
            slot = begin + tl.arange(0, BN)
            key = tl.load(LEAVES + slot // LEAF, mask=slot < slots, other=0) * LEAF + slot % LEAF
            there = (slot < slots) & (key < length)
            there = there & (tl.load(FINE + key, mask=there, other=0) != 0)
            k, v = rows_of(KEY, key, k_n, k_d, there, D, BD), rows_of(VALUE, key, v_n, v_d, there, E, BE)
            acc = meet_again(q, k, v, grad, lse, delta, there[None, :], scale, acc, PRECISION)
    if SINKS > 0:
        i = tl.arange(0, BS)
        key = tl.load(SINK + batch * sink_b + i, mask=i < SINKS, other=-1)
        seen = (key >= 0)[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, key >= 0, D, BD), rows_of(VALUE, key, v_n, v_d, key >= 0, E, BE)
        acc = meet_again(q, k, v, grad, lse, delta, seen, scale, acc, PRECISION)

    d = tl.arange(0, BD)
    acc *= scale * 0.6931471805599453
    tl.store(DQ + at[:, None] * D + d[None, :], acc.to(DQ.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def bh_dkv(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, FINE, SINK, heads, per_unit, length, stretch,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of near keys, from the queries of its own and the neighbouring blocks.

    With ``SINKS`` those of the sinks, from one ``stretch`` of the queries: ``DK`` and ``DV`` are then
    ``(u, stretches, SINKS, *)``.
    """
    part, unit = tl.program_id(0), tl.program_id(1)
    kv_heads = heads // per_unit
    batch, kv_head, i = (unit // kv_heads).to(tl.int64), (unit % kv_heads).to(tl.int64), tl.arange(0, BN)
    if SINKS > 0:
        key = tl.load(SINK + batch * sink_b + i, mask=i < SINKS, other=-1)
        there, slots, slot = key >= 0, tl.num_programs(0) * SINKS, part * SINKS + i
        owned = i < SINKS
        low, high = part * stretch, tl.minimum((part + 1) * stretch, length)
    else:
        key = part * BN + i
        owned, slots, slot = key < length, length, key
        there = owned & (tl.load(FINE + batch * fine_b + key, mask=owned, other=0) != 0)
        low = part * BN if CAUSAL else tl.maximum(part * BN // BLOCK - 1, 0) * BLOCK
        high = tl.minimum(((part * BN + BN - 1) // BLOCK + 2) * BLOCK, length)
    block = key // BLOCK
    k = finite(rows_of(K + batch * k_b + kv_head * k_h, key, k_n, k_d, there, D, BD))
    v = finite(rows_of(V + batch * v_b + kv_head * v_h, key, v_n, v_d, there, E, BE))
    dk, dv, e = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BE], tl.float32), tl.arange(0, BE)
    for member in range(per_unit):
        head = kv_head * per_unit + member
        for begin in range(low, high, BM):
            row = begin + tl.arange(0, BM)
            real = row < high
            q = rows_of(Q + batch * q_b + head * q_h, row, q_n, q_d, real, D, BD)
            at = (batch * heads + head) * length + row
            grad = tl.load(GRAD + at[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
            lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            seen = there[:, None] & real[None, :] & shown(row[None, :], key[:, None], left, right)
            if SINKS == 0:
                apart = block[:, None] - (row // BLOCK)[None, :]
                seen = seen & (apart >= -1) & (apart <= 1)
            dk, dv = give(q, k, v, grad, lse, delta, seen, scale, dk, dv, PRECISION)
    d = tl.arange(0, BD)
    at = unit.to(tl.int64) * slots + slot
    dk *= scale * 0.6931471805599453
    tl.store(DK + at[:, None] * D + d[None, :], dk, mask=owned[:, None] & (d < D)[None, :])
    tl.store(DV + at[:, None] * E + e[None, :], dv, mask=owned[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def bh_far_dkv(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, FINE, PAIR, TILE, LEAF_OF, unit, leaves, heads, per_unit, length, groups,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    LEAF: tl.constexpr, OPEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Gradients of one leaf from some of the groups that opened it: ``DK`` and ``DV`` are ``(tiles, LEAF, *)``.

    ``PAIR`` lists places in the unit's ``(c, g, open)`` by leaf; a tile of it holds those of one leaf.
    """
    tile, i = tl.program_id(0), tl.arange(0, BL)
    first, last = tl.load(TILE + tile), tl.load(TILE + tile + 1)
    leaf, kv_heads = tl.load(LEAF_OF + first), heads // per_unit
    batch, kv_head = (unit // kv_heads).to(tl.int64), (unit % kv_heads).to(tl.int64)
    key = leaf * LEAF + i
    there = (leaf < leaves) & (i < LEAF) & (key < length)
    there = there & (tl.load(FINE + batch * fine_b + key, mask=there, other=0) != 0)
    k = finite(rows_of(K + batch * k_b + kv_head * k_h, key, k_n, k_d, there, D, BD))
    v = finite(rows_of(V + batch * v_b + kv_head * v_h, key, v_n, v_d, there, E, BE))
    dk, dv, e = tl.zeros([BL, BD], tl.float32), tl.zeros([BL, BE], tl.float32), tl.arange(0, BE)
    rows = tl.where(leaf < leaves, (last - first) * (R * GROUP), 0)
    for begin in range(0, rows, BM):
        m = begin + tl.arange(0, BM)
        choice = tl.load(PAIR + first + m // (R * GROUP), mask=m < rows, other=0) // OPEN
        row = choice % groups * GROUP + m % GROUP
        head = kv_head * per_unit + choice // groups * R + m % (R * GROUP) // GROUP
        real = (m < rows) & (row < length)
        q = heads_of(Q, batch, head, row, q_b, q_h, q_n, q_d, real, D, BD)
        at = (batch * heads + head) * length + row
        grad = tl.load(GRAD + at[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
        lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + at, mask=real, other=0.0)
        dk, dv = give(q, k, v, grad, lse, delta, there[:, None] & real[None, :], scale, dk, dv, PRECISION)
    d = tl.arange(0, BD)
    at = tile.to(tl.int64) * LEAF + i
    dk *= scale * 0.6931471805599453
    tl.store(DK + at[:, None] * D + d[None, :], dk, mask=(i < LEAF)[:, None] & (d < D)[None, :])
    tl.store(DV + at[:, None] * E + e[None, :], dv, mask=(i < LEAF)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def bh_far_sum(PART, OUT, FIRST, unit, length, C: tl.constexpr, LEAF: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr):
    """Adds the parts ``(tiles, LEAF, C)`` of one leaf, tiles ``FIRST[leaf]`` on, to its tokens in ``(u, n, C)``."""
    leaf, i, c = tl.program_id(0), tl.arange(0, BL), tl.program_id(1) * BC + tl.arange(0, BC)
    owned = ((i < LEAF) & (leaf * LEAF + i < length))[:, None] & (c < C)[None, :]
    at = OUT + (unit.to(tl.int64) * length + leaf * LEAF + i)[:, None] * C + c[None, :]
    total = tl.load(at, mask=owned, other=0.0)
    first = tl.load(FIRST + leaf)
    part = PART + (first.to(tl.int64) * LEAF + i)[:, None] * C + c[None, :]
    for _ in range(first, tl.load(FIRST + leaf + 1)):
        total += tl.load(part, mask=owned, other=0.0)
        part += LEAF * C
    tl.store(at, total, mask=owned)


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern, pool: bool) -> str:
    """Why these kernels cannot serve a call; empty when they can."""
    if pool:
        return "closed nodes are met as pooled rows (rest='pool')"
    if pattern.tolerance:
        return "how many leaves are opened depends on a tolerance"
    for name in ("leaf", "fanout"):
        width = getattr(pattern, name)
        if width & (width - 1):
            return f"{name} must be a power of two, got {width}"
    return tensor_obstacle(query, key, value)


class _Call:
    """What forward and backward share: the tokens, the choice, the arguments of the kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern,
        key_padding: Tensor | None,
    ) -> None:  # fmt: skip
        batch, heads, length, _ = query.shape
        self.pattern, self.kv_heads = pattern, key.shape[1]
        self.per_unit = heads // self.kv_heads
        self.speakers = self.per_unit if pattern.share else 1
        self.groups = -(-length // pattern.group)
        self.choosers = batch * heads // self.speakers
        real = torch.ones(1, length, dtype=torch.bool, device=key.device) if key_padding is None else key_padding
        rank = real.cumsum(1)
        self.fine = real & (rank > pattern.sinks)
        wanted = torch.arange(1, pattern.sinks + 1, device=key.device).expand(real.shape[0], -1).contiguous()
        self.sink = torch.searchsorted(rank, wanted, out_int32=True)
        self.sink = self.sink.masked_fill(self.sink >= length, -1)
        self.leaves = choose(build_tree(pattern, key, self.fine), query, self.kv_heads, scale)
        left, right = (-1 if x is None else x for x in (pattern.left, pattern.right))
        padded = real.shape[0] > 1
        self.sizes = heads, self.per_unit, length
        self.strides = *query.stride(), *key.stride(), *value.stride()
        self.fine_row, self.sink_row = (x.stride(0) if padded else 0 for x in (self.fine, self.sink))
        self.bounds, self.scale = (left, right), scale * LOG2_E
        self.channels = {**channels(D=query.shape[3], E=value.shape[3]), "PRECISION": precision(query.dtype)}

    @property
    def of_group(self) -> dict[str, object]:
        """Constants of the kernels that own a group."""
        pattern = self.pattern
        return {
            **self.channels, "R": self.speakers, "GROUP": pattern.group, "BLOCK": pattern.block, "LEAF": pattern.leaf,
            "OPEN": pattern.open, "SINKS": pattern.sinks, "CAUSAL": pattern.causal,
            "BO": padded(pattern.open), "BS": padded(pattern.sinks),
        }  # fmt: skip

    def of_rows(self, kernel: str, query: Tensor, value: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid and configuration of a kernel that owns the queries of a group, or a tile of them."""
        rows = self.speakers * self.pattern.group
        launch = chosen(kernel if rows > 16 else f"{kernel}_few", query, value).launch
        launch["BM"] = min(launch["BM"], padded(rows))
        return (self.groups, self.choosers, -(-rows // launch["BM"])), launch


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.barnes_hut.forward`` in Triton.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, n, d)``, same type.
        value: ``(b, g, n, e)``, same type.
        scale: Factor on the scores.
        pattern: The pattern.
        pool: Must be false.
        key_padding: ``(b, n)`` boolean, true where a token is real.

    Returns:
        Output ``(b, h, n, e)``, contiguous; log-sum-exp ``(b, h, n)``, float32.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    lse = value.new_empty(query.shape[:3], dtype=torch.float32)
    grid, launch = call.of_rows("bh_fwd", query, value)
    bh_fwd[grid](
        query, key, value, out, lse, call.fine, call.sink, call.leaves, *call.sizes, call.groups, 0,
        *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale, **call.of_group,
        **launch,
    )  # fmt: skip
    return out, lse


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward`` for the choice it made, deterministic.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        pool: Must be false.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        key_padding: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    grad_out, out, lse = grad_out.to(value.dtype).contiguous(), out.contiguous(), log_sum_exp.contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    dq, delta = query.new_empty(query.shape), torch.empty_like(lse)
    grid, launch = call.of_rows("bh_dq", query, value)
    bh_dq[grid](
        query, key, value, out, lse, grad_out, slope, dq, delta, call.fine, call.sink, call.leaves, *call.sizes,
        call.groups, *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale,
        HAS_GRAD_LSE=slope is not None, **call.of_group,
        **launch,
    )  # fmt: skip
    return dq, *_of_keys(call, query, key, value, lse, grad_out, delta)


def _of_keys(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values: near, then the leaves' and the sinks' added."""
    pattern, length = call.pattern, query.shape[2]
    units = key.shape[0] * call.kv_heads
    given = query, key, value, lse, grad_out, delta
    dk, dv = (x.new_empty(units, length, x.shape[3], dtype=torch.float32) for x in (key, value))
    tail = *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale
    config = chosen("bh_dkv", query, value)
    constants = {**call.channels, "BLOCK": pattern.block, "CAUSAL": pattern.causal}
    bh_dkv[(-(-length // config.columns), units)](
        *given, dk, dv, call.fine, call.sink, *call.sizes, 0, *tail, SINKS=0, **constants, **config.launch
    )
    if pattern.open:
        _add_leaves(call, given, dk, dv)
    if pattern.sinks:
        stretches = -(-length // _STRETCH)
        parts = [x.new_empty(units, stretches, pattern.sinks, x.shape[2]) for x in (dk, dv)]
        columns = padded(pattern.sinks)
        bh_dkv[(stretches, units)](
            *given, *parts, call.fine, call.sink, *call.sizes, _STRETCH, *tail, SINKS=pattern.sinks, **constants,
            **{**config.launch, "BN": columns},
        )  # fmt: skip
        # Sinks stand at different places; those that do not exist bring 0 to the first token.
        place = call.sink.clamp(min=0).long().expand(key.shape[0], -1).repeat_interleave(call.kv_heads, 0)
        for total, part in zip((dk, dv), parts):
            total.scatter_add_(1, place[..., None].expand(-1, -1, total.shape[2]), part.sum(1))
    return dk.view(key.shape).to(key.dtype), dv.view(value.shape).to(value.dtype)


def _add_leaves(call: _Call, given: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    """Adds the gradients of opened leaves, unit by unit: what a unit needs for it is as large as its choice."""
    pattern, length = call.pattern, dk.shape[1]
    leaves = -(-length // pattern.leaf)
    config = chosen("bh_far_dkv", given[0], given[2])
    rows = padded(pattern.leaf)
    numbers = torch.arange(leaves + 1, device=dk.device)
    for unit, opened in enumerate(call.leaves.view(dk.shape[0], -1)):
        of_leaf, pair = torch.sort(opened.masked_fill(opened < 0, leaves), stable=True)
        first = torch.ones_like(pair, dtype=torch.bool)
        first[1:] = of_leaf[1:] != of_leaf[:-1]
        tile = cut_tiles(first, _PAIRS)
        tiles = tile.numel() - 1
        parts = [x.new_empty(tiles, pattern.leaf, x.shape[2]) for x in (dk, dv)]
        bh_far_dkv[(tiles,)](
            *given, *parts, call.fine, pair, tile, of_leaf, unit, leaves, *call.sizes, call.groups, *call.strides,
            call.fine_row, call.scale, **call.channels, R=call.speakers, GROUP=pattern.group, LEAF=pattern.leaf,
            OPEN=pattern.open, BL=rows, **config.launch,
        )  # fmt: skip
        begin = torch.searchsorted(of_leaf[tile[:-1].long()], numbers, out_int32=True)
        for part, total in zip(parts, (dk, dv)):
            block = min(64, padded(total.shape[2]))
            bh_far_sum[(leaves, -(-total.shape[2] // block))](
                part, total, begin, unit, length, C=total.shape[2], LEAF=pattern.leaf, BC=block,
                BL=triton.next_power_of_2(pattern.leaf), **LIGHT,
            )  # fmt: skip


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, fine: Tensor, sink: Tensor,
    leaves: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The last query over the near field, the sinks and opened leaves of the keys of a cache.

    Args:
        query: ``(b, h, 1, d)``, of the last position.
        key: ``(u, n, d)``, all keys so far, any strides.
        value: ``(u, n, e)`` likewise.
        scale: Factor on the scores.
        pattern: The pattern, causal.
        fine: ``(u, n)`` boolean, real tokens that are no sinks, rows of any stride.
        sink: ``(u, sinks)`` int32 positions, -1 for none.
        leaves: ``(u * c, 1, open)`` int32 as ``choose`` gives them; ``None`` for none.

    Returns:
        Output ``(b, h, 1, e)`` float32, the type of the cache; log-sum-exp ``(b, h, 1)``.
    """
    batch, heads, _, width = query.shape
    units, length = key.shape[:2]
    per_unit = batch * heads // units
    speakers = per_unit if pattern.share else 1
    query = query.to(key.dtype).contiguous()
    out = value.new_empty(batch, heads, 1, value.shape[2])
    lse = value.new_empty(batch, heads, 1, dtype=torch.float32)
    left, right = (-1 if x is None else x for x in (pattern.left, pattern.right))
    opened = 0 if leaves is None else leaves.shape[2]
    # A unit stands for a sequence with one key head: padding and sinks are then its own.
    bh_fwd[(1, units * per_unit // speakers, 1)](
        query, key, value, out, lse, fine, sink, leaves, per_unit, per_unit, length, 1, length - 1,
        per_unit * width, width, width, 1, key.stride(0), 0, *key.stride()[1:], value.stride(0), 0,
        *value.stride()[1:], fine.stride(0), sink.stride(0), left, right, scale * LOG2_E,
        **channels(D=width, E=value.shape[2]), R=speakers, GROUP=1, BLOCK=pattern.block, LEAF=pattern.leaf,
        OPEN=opened, SINKS=pattern.sinks, CAUSAL=True, PRECISION=precision(key.dtype),
        BO=padded(opened), BS=padded(pattern.sinks),
        **{**chosen("bh_fwd_few", key[None], value[None]).launch, "BM": padded(speakers)},
    )  # fmt: skip
    return out, lse
