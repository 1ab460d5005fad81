"""Barnes-Hut attention in Triton, the gradients of keys and values, each made in one place.

``bh_dkv`` owns a tile of keys (or, ``SINKS``, the sinks for a stretch of the queries) and walks the queries near it.
``bh_far_dkv`` owns some of the groups that opened one leaf, found by sorting the opened leaves, and ``bh_far_sum`` adds
what these gave to the tokens of the leaf. Rows of nodes are dealt with as tokens are: a stretch of consecutive nodes is a
leaf of which a group met only some rows. No atomics: gradients are the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.meet import give, heads_of, rows_of, shown
from fastattn_compile.kernels.gpu.online import COUNTS, finite


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
            grad = tl.load(
                GRAD + at[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0
            )
            lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            seen = there[:, None] & real[None, :] & shown(row[None, :], key[:, None], left, right)
            if SINKS == 0:
                apart = block[:, None] - (row // BLOCK)[None, :]
                seen = seen & (apart >= -1) & (apart <= 1)
            dk, dv = give(q, k, v, None, grad, lse, delta, seen, scale, dk, dv, PRECISION)
    d = tl.arange(0, BD)
    at = unit.to(tl.int64) * slots + slot
    dk *= scale * 0.6931471805599453
    tl.store(DK + at[:, None] * D + d[None, :], dk, mask=owned[:, None] & (d < D)[None, :])
    tl.store(DV + at[:, None] * E + e[None, :], dv, mask=owned[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def bh_far_dkv(
    Q, K, V, LSE, GRAD, DELTA, DK, DV, FINE, PAIR, TILE, LEAF_OF, NODE_WEIGHT, MET, nodes, weight_row, unit, leaves,
    heads, per_unit, length, groups,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    LEAF: tl.constexpr, OPEN: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BL: tl.constexpr,
):  # fmt: skip
    """Gradients of one leaf from some of the groups that opened it: ``DK`` and ``DV`` are ``(tiles, LEAF, *)``.

    ``PAIR`` lists places in the unit's ``(c, g, open)`` by leaf; a tile of it holds those of one leaf.
    With ``POOL`` keys and values are rows of nodes, as many as ``nodes``, and bit i of ``MET`` tells of a place whether
    it met row i of the leaf.
    """
    tile, i = tl.program_id(0), tl.arange(0, BL)
    first, last = tl.load(TILE + tile), tl.load(TILE + tile + 1)
    leaf, kv_heads = tl.load(LEAF_OF + first), heads // per_unit
    batch, kv_head = (unit // kv_heads).to(tl.int64), (unit % kv_heads).to(tl.int64)
    key = leaf * LEAF + i
    there = (leaf < leaves) & (i < LEAF)
    if POOL:
        there = there & (key < nodes)
        weight = tl.load(NODE_WEIGHT + batch * weight_row + key, mask=there, other=0.0)[:, None]
    else:
        there = there & (key < length)
        there = there & (tl.load(FINE + batch * fine_b + key, mask=there, other=0) != 0)
        weight = None
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
        seen = there[:, None] & real[None, :]
        if POOL:
            met = tl.load(MET + first + m // (R * GROUP), mask=m < rows, other=0)
            seen = seen & (((met[None, :] >> i[:, None]) & 1) != 0)
        dk, dv = give(q, k, v, weight, grad, lse, delta, seen, scale, dk, dv, PRECISION)
    d = tl.arange(0, BD)
    at = tile.to(tl.int64) * LEAF + i
    dk *= scale * 0.6931471805599453
    tl.store(DK + at[:, None] * D + d[None, :], dk, mask=(i < LEAF)[:, None] & (d < D)[None, :])
    tl.store(DV + at[:, None] * E + e[None, :], dv, mask=(i < LEAF)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def bh_far_sum(
    PART, OUT, FIRST, unit, length, C: tl.constexpr, LEAF: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr
):
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
