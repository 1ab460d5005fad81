"""Barnes-Hut attention in Triton, the walks of queries: output, and the gradient of queries.

A tile of queries is one group of every head that shares its choice. Near blocks, opened leaves, closed nodes and sinks
share one online softmax; opened leaves are gathered key by key through the list of their numbers, closed nodes row by
row: a node is one mean key and value that counts as often as it has tokens.

Sizes as in ``barnes_hut_tree``; ``D`` channels of query and key, ``E`` of value. ``NODE_K``, ``NODE_V`` and
``NODE_WEIGHT`` are the rows of ``barnes_hut_pool``, ``CLOSED`` and ``CLOSED_COUNT`` the lists of ``barnes_hut_tree.Closed``,
each with ``room`` for as many; without ``POOL`` no node is met and these are ``None``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.meet import heads_of, meet, meet_again, rows_of, shown
from fastattn_compile.kernels.gpu.online import COUNTS, log2_sum


@triton.jit
def closed_rows(
    NODE_K, NODE_V, NODE_WEIGHT, CLOSED, begin, slots, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys, values and weights of some closed nodes of a list, and which of them are there."""
    slot = begin + tl.arange(0, BN)
    there = slot < slots
    node = tl.load(CLOSED + slot, mask=there, other=0)
    weight = tl.load(NODE_WEIGHT + node, mask=there, other=0.0)
    k, v = rows_of(NODE_K, node, D, 1, there, D, BD), rows_of(NODE_V, node, E, 1, there, E, BE)
    return k, v, weight, there


@triton.jit(do_not_specialize=COUNTS)
def bh_fwd(
    Q, K, V, OUT, LSE, FINE, SINK, LEAVES, NODE_K, NODE_V, NODE_WEIGHT, CLOSED, CLOSED_COUNT, room, nodes, weight_row,
    heads, per_unit, length, groups, start,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LEAF: tl.constexpr, OPEN: tl.constexpr, POOL: tl.constexpr, SINKS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    BS: tl.constexpr,
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
    KEY, VALUE = (
        K + batch * k_b + (unit % kv_heads).to(tl.int64) * k_h,
        V + batch * v_b + (unit % kv_heads).to(tl.int64) * v_h,
    )
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
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)
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
            largest, mass, acc = meet(q, k, v, None, there[None, :], scale, largest, mass, acc, PRECISION)
    if POOL:
        choice = chooser.to(tl.int64) * groups + group
        NODE_K += unit.to(tl.int64) * nodes * D
        NODE_V += unit.to(tl.int64) * nodes * E
        NODE_WEIGHT += batch * weight_row
        slots = tl.load(CLOSED_COUNT + choice)
        for begin in range(0, slots, BN):
            k, v, weight, there = closed_rows(
                NODE_K, NODE_V, NODE_WEIGHT, CLOSED + choice * room, begin, slots, D, E, BD, BE, BN
            )
            largest, mass, acc = meet(q, k, v, weight, there[None, :], scale, largest, mass, acc, PRECISION)
    if SINKS > 0:
        i = tl.arange(0, BS)
        key = tl.load(SINK + batch * sink_b + i, mask=i < SINKS, other=-1)
        seen = (key >= 0)[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, key >= 0, D, BD), rows_of(VALUE, key, v_n, v_d, key >= 0, E, BE)
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)

    at = (batch * heads + row_head) * (length - start) + row - start
    e = tl.arange(0, BE)
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(
        OUT + at[:, None] * E + e[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    tl.store(LSE + at, log2_sum(largest, mass) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def bh_dq(
    Q, K, V, OUT, LSE, GRAD, GRAD_LSE, DQ, DELTA, FINE, SINK, LEAVES, NODE_K, NODE_V, NODE_WEIGHT, CLOSED, CLOSED_COUNT,
    room, nodes, weight_row, heads, per_unit, length, groups,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LEAF: tl.constexpr, OPEN: tl.constexpr, POOL: tl.constexpr, SINKS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BO: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradient of one group's queries, and ``delta = <grad, out> - grad_lse``."""
    group, chooser, m = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BM + tl.arange(0, BM)
    head, first = chooser * R, group * GROUP
    batch, unit, kv_heads = (head // heads).to(tl.int64), head // per_unit, heads // per_unit
    row, row_head = first + m % GROUP, head % heads + m // GROUP
    real = (m < R * GROUP) & (row < length)
    q = heads_of(Q, batch, row_head, row, q_b, q_h, q_n, q_d, real, D, BD)
    KEY, VALUE = (
        K + batch * k_b + (unit % kv_heads).to(tl.int64) * k_h,
        V + batch * v_b + (unit % kv_heads).to(tl.int64) * v_h,
    )
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
        acc = meet_again(q, k, v, None, grad, lse, delta, seen, scale, acc, PRECISION)
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
            acc = meet_again(q, k, v, None, grad, lse, delta, there[None, :], scale, acc, PRECISION)
    if POOL:
        choice = chooser.to(tl.int64) * groups + group
        NODE_K += unit.to(tl.int64) * nodes * D
        NODE_V += unit.to(tl.int64) * nodes * E
        NODE_WEIGHT += batch * weight_row
        slots = tl.load(CLOSED_COUNT + choice)
        for begin in range(0, slots, BN):
            k, v, weight, there = closed_rows(
                NODE_K, NODE_V, NODE_WEIGHT, CLOSED + choice * room, begin, slots, D, E, BD, BE, BN
            )
            acc = meet_again(
                q, k, v, weight[None, :], grad, lse, delta, there[None, :], scale, acc, PRECISION
            )
    if SINKS > 0:
        i = tl.arange(0, BS)
        key = tl.load(SINK + batch * sink_b + i, mask=i < SINKS, other=-1)
        seen = (key >= 0)[None, :] & shown(row[:, None], key[None, :], left, right)
        k, v = rows_of(KEY, key, k_n, k_d, key >= 0, D, BD), rows_of(VALUE, key, v_n, v_d, key >= 0, E, BE)
        acc = meet_again(q, k, v, None, grad, lse, delta, seen, scale, acc, PRECISION)

    d = tl.arange(0, BD)
    acc *= scale * 0.6931471805599453
    tl.store(
        DQ + at[:, None] * D + d[None, :], acc.to(DQ.dtype.element_ty), mask=real[:, None] & (d < D)[None, :]
    )
