"""Fast multipole attention in Triton, the walks of keys: gradients of keys, values, pooled rows and sinks. No atomics.

``fma_far`` walks ``S`` consecutive blocks of queries. The rows of a level that a block meets stay the same below one
parent, ``2 << level`` blocks: where such a run ends, or the walk, its sum is stored as a run of its own. ``fma_runs`` adds
the runs of each row in order, those of the parent after it and, without causality, of the parent before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.fma_attend import sink_keys
from fastattn_compile.kernels.gpu.fma_rows import covered, far_rows, first_row, near, whose
from fastattn_compile.kernels.gpu.meet import give, heads_of, rows_of, shown
from fastattn_compile.kernels.gpu.online import finite


@triton.jit
def run_bits(level, LOG2S: tl.constexpr):
    """Log2 of the blocks of a run of a level."""
    return tl.minimum(level + 1, LOG2S)


@triton.jit
def first_run(level, nb, LOG2S: tl.constexpr):
    """Where the runs of a level begin among those of all levels."""
    # Levels below LOG2S have nb / 2, nb / 4, ... runs, all others nb / S.
    short = tl.minimum(level, LOG2S - 1)
    return nb - (nb >> short) + (level - short) * (nb >> LOG2S)


@triton.jit
def first_of_runs(DOCUMENT, unit, heads, runs, PACKED: tl.constexpr):
    """Where the runs of a unit begin; each has ``runs``, or every key head of the packed documents has."""
    if PACKED:
        at = unit % heads * runs + tl.load(DOCUMENT + unit // heads * 6 + 5)
    else:
        at = unit * runs
    return at


@triton.jit(do_not_specialize=["length", "nb", "levels", "all_rows", "runs"])
def fma_far(
    Q, ROWS_K, ROWS_V, MASS, LSE, DELTA, GRAD, RUNS_K, RUNS_V, DOCUMENT, heads, length, nb, levels, all_rows, runs,
    q_b, q_h, q_n, q_d, mass_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, LEARNED: tl.constexpr, LOG2S: tl.constexpr,
    PACKED: tl.constexpr, WHICH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Sums of the gradients of far slots over runs of blocks; ``WHICH`` of keys (1), of values (2) or of both (3)."""
    SLOTS: tl.constexpr = 2 * RANK if CAUSAL else 4 * RANK
    sup, unit, total = tl.program_id(0), tl.program_id(1).to(tl.int64), length
    head = unit % heads
    number, batch, opening, length, nb, levels, base, rows = whose(
        DOCUMENT, unit, heads, length, nb, levels, all_rows, PACKED
    )
    Q += opening * q_n
    blocks = (length + BLOCK - 1) // BLOCK
    slot = tl.program_id(2) * BF + tl.arange(0, BF)
    level = slot // SLOTS
    bits = run_bits(level, LOG2S)
    ROWS_K += rows * D
    ROWS_V += rows * E
    MASS += number * mass_b + base
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    dk, dv = tl.zeros([BF, BD], tl.float32), tl.zeros([BF, BE], tl.float32)
    stop = tl.minimum((sup + 1) << LOG2S, blocks)
    if PACKED:
        # The grid is that of the document with most levels.
        stop = tl.where(tl.program_id(2) * BF < levels * SLOTS, stop, 0)
    for block in range(sup << LOG2S, stop):
        row, there = far_rows(block, slot, nb, levels, RANK, CAUSAL)
        weight = tl.load(MASS + row, mask=there, other=float("-inf"))
        there = there & (weight != float("-inf"))
        weight = tl.where(there, weight, 0.0)
        k = finite(rows_of(ROWS_K, row, D, 1, there, D, BD))
        v = finite(rows_of(ROWS_V, row, E, 1, there, E, BE))
        for begin in range(0, G * BLOCK, BM):
            r = begin + tl.arange(0, BM)
            place = block * BLOCK + r // G
            real = (r < G * BLOCK) & (place < length)
            of_group = head * G + r % G
            at = (batch * heads * G + of_group) * total + opening + place
            q = heads_of(Q, batch, of_group, place, q_b, q_h, q_n, q_d, real, D, BD)
            grad = rows_of(GRAD, at, E, 1, real, E, BE)
            lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            seen = there[:, None] & real[None, :]
            if BANDED:
                low, high = covered(slot, row, length, nb, BLOCK, RANK, CAUSAL, LEARNED)
                seen = seen & ((left < 0) | (low[:, None] >= place[None, :] - left))
                seen = seen & ((right < 0) | (high[:, None] <= place[None, :] + right))
            dk, dv = give_part(
                q, k, v, weight[:, None], grad, lse, delta, seen, scale, dk, dv, WHICH, PRECISION
            )
        done = (((block + 1) & ((1 << bits) - 1)) == 0) | (block + 1 == stop)
        run = (first_run(level, nb, LOG2S) + (block >> bits)).to(tl.int64)
        out = (first_of_runs(DOCUMENT, unit, heads, runs, PACKED) + run) * SLOTS + slot % SLOTS
        keep = done & (level < levels)
        if WHICH & 1:
            tl.store(RUNS_K + out[:, None] * D + d[None, :], dk, mask=keep[:, None] & (d < D)[None, :])
        if WHICH & 2:
            tl.store(RUNS_V + out[:, None] * E + e[None, :], dv, mask=keep[:, None] & (e < E)[None, :])
        # A product, not a choice: the choice breaks Triton's code for Blackwell.
        rest = tl.where(done, 0.0, 1.0)[:, None]
        dk, dv = dk * rest, dv * rest


@triton.jit
def give_part(
    q, k, v, weight, grad, lse, delta, seen, scale, dk, dv, WHICH: tl.constexpr, PRECISION: tl.constexpr
):
    """``give``, for one of the two gradients where both do not fit registers."""
    if WHICH == 3:
        dk, dv = give(q, k, v, weight, grad, lse, delta, seen, scale, dk, dv, PRECISION)
    else:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + weight
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        if WHICH == 2:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        else:
            ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(tl.where(seen, ds, 0.0).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["length", "nb", "levels", "all_rows", "runs"])
def fma_runs(
    RUNS, OUT, DOCUMENT, heads, length, nb, levels, all_rows, runs, factor,
    C: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, CAUSAL: tl.constexpr, LOG2S: tl.constexpr,
    PACKED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradient of pooled rows: ``B`` rows of one level, the runs of those who met them added in order."""
    SLOTS: tl.constexpr = 2 * RANK if CAUSAL else 4 * RANK
    unit, level, c = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.arange(0, BC)
    _, _, _, length, nb, levels, _, rows = whose(DOCUMENT, unit, heads, length, nb, levels, all_rows, PACKED)
    blocks, first = (length + BLOCK - 1) // BLOCK, first_of_runs(DOCUMENT, unit, heads, runs, PACKED)
    at = tl.program_id(0) * B + tl.arange(0, B)
    mine = at < RANK * (nb >> level)
    if PACKED:
        mine = mine & (level < levels)
    parent, slot = at // (2 * RANK), at % (2 * RANK)
    bits = run_bits(level, LOG2S)
    # Runs below one parent, and those that a query stands in.
    below, real = 1 << (level + 1 - bits), (blocks + (1 << bits) - 1) >> bits
    total = tl.zeros([B, BC], tl.float32)
    for side in tl.static_range(1 if CAUSAL else 2):
        # Side 0 are the rows of the parent before the queries' own: it is met by the parent after it.
        met_by = parent + 1 - 2 * side
        for i in range(0, below):
            run = met_by * below + i
            there = mine & (met_by >= 0) & (run < real)
            source = (first + first_run(level, nb, LOG2S) + run) * SLOTS + side * 2 * RANK + slot
            total += tl.load(
                RUNS + source[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0
            )
    row = rows + first_row(level, nb, RANK) + at
    tl.store(OUT + row[:, None] * C + c[None, :], total * factor, mask=mine[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["length", "levels", "all_rows"])
def fma_dkv(
    Q, K, V, FINE, POOLED, CELLS_K, CELLS_V, LSE, DELTA, GRAD, DK, DV, DOCUMENT, heads, length, levels, all_rows,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, pooled_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    CELL: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, PADDED: tl.constexpr, ALL: tl.constexpr,
    SPREAD: tl.constexpr, PACKED: tl.constexpr, WHICH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys: what the queries near them give, and with ``SPREAD`` the share of their cells."""
    unit, total = tl.program_id(1).to(tl.int64), length
    head = unit % heads
    _, batch, opening, length, _, levels, _, cells = whose(
        DOCUMENT, unit, heads, length, 0, levels, all_rows, PACKED
    )
    Q += opening * q_n
    K += batch * k_b + head * k_h + opening * k_n
    V += batch * v_b + head * v_h + opening * v_n
    if PACKED:  # noqa: SIM102  known when it is compiled, the other is not
        if tl.program_id(0) * BN >= length:
            return  # the grid is that of the longest document
    key = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = key < length
    there = inside
    if PADDED:
        there = there & (tl.load(FINE + batch * fine_b + key, mask=inside, other=0) != 0)
    k = finite(rows_of(K, key, k_n, k_d, there, D, BD))
    v = finite(rows_of(V, key, v_n, v_d, there, E, BE))
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BE], tl.float32)
    begin = tl.program_id(0) * BN
    block, last = begin // BLOCK, tl.minimum(begin + BN, length) - 1
    low = begin if CAUSAL else tl.maximum(block - 1, 0) * BLOCK
    high = tl.minimum((last // BLOCK + 2) * BLOCK, length)
    for first in range(low * G, high * G, BM):
        r = first + tl.arange(0, BM)
        place, of_group = r // G, head * G + r % G
        real = place < high
        at = (batch * heads * G + of_group) * total + opening + place
        q = heads_of(Q, batch, of_group, place, q_b, q_h, q_n, q_d, real, D, BD)
        grad = rows_of(GRAD, at, E, 1, real, E, BE)
        lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + at, mask=real, other=0.0)
        seen = near(place[None, :], key[:, None], BLOCK, CAUSAL) & there[:, None] & real[None, :]
        if BANDED:
            seen = seen & shown(place[None, :], key[:, None], left, right)
        dk, dv = give_part(q, k, v, 0.0, grad, lse, delta, seen, scale, dk, dv, WHICH, PRECISION)
    dk *= scale * 0.6931471805599453
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    if SPREAD:
        pooled = there
        if PACKED:
            pooled = pooled & (levels > 0)
        if not ALL:
            taken = tl.load(POOLED + batch * pooled_b + opening + key, mask=inside, other=0)
            pooled = pooled & (taken != 0)
        cell = cells + key // CELL
        if WHICH & 1:
            dk += rows_of(CELLS_K, cell, D, 1, pooled, D, BD)
        if WHICH & 2:
            dv += rows_of(CELLS_V, cell, E, 1, pooled, E, BE)
    if PACKED:
        at = (batch * heads + head) * total + opening + key
    else:
        at = unit * total + key
    if WHICH & 1:
        tl.store(
            DK + at[:, None] * D + d[None, :],
            dk.to(DK.dtype.element_ty),
            mask=inside[:, None] & (d < D)[None, :],
        )
    if WHICH & 2:
        tl.store(
            DV + at[:, None] * E + e[None, :],
            dv.to(DV.dtype.element_ty),
            mask=inside[:, None] & (e < E)[None, :],
        )


@triton.jit(do_not_specialize=["length", "start"])
def fma_sinks(
    Q, K, V, SINK, LSE, DELTA, GRAD, DK, DV, DOCUMENT, heads, length, start, stretch,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the sinks from a stretch of the packed queries, which begin at position ``start``."""
    part, unit, total = tl.program_id(0), tl.program_id(1).to(tl.int64), length
    head = unit % heads
    number, batch, opening, length, _, _, _, _ = whose(DOCUMENT, unit, heads, length, 0, 0, 0, PACKED)
    Q += opening * q_n
    K += batch * k_b + head * k_h + opening * k_n
    V += batch * v_b + head * v_h + opening * v_n
    i = tl.arange(0, BS)
    key = tl.load(SINK + number * sink_b + i, mask=i < SINKS, other=-1)
    k = finite(rows_of(K, key, k_n, k_d, key >= 0, D, BD))
    v = finite(rows_of(V, key, v_n, v_d, key >= 0, E, BE))
    dk, dv = tl.zeros([BS, BD], tl.float32), tl.zeros([BS, BE], tl.float32)
    begin = part.to(tl.int64) * stretch * G
    end = tl.minimum((part.to(tl.int64) + 1) * stretch, length) * G
    for first in range(begin, end, BM):
        r = first + tl.arange(0, BM)
        place, of_group, real = r // G, head * G + r % G, r < end
        at = (batch * heads * G + of_group) * total + opening + place
        q = heads_of(Q, batch, of_group, place, q_b, q_h, q_n, q_d, real, D, BD)
        grad = rows_of(GRAD, at, E, 1, real, E, BE)
        lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + at, mask=real, other=0.0)
        _sink, _there, seen = sink_keys(
            start + place, SINK + number * sink_b, left, right, BLOCK, CAUSAL, BANDED, SINKS, BS
        )
        seen = tl.trans(seen & real[:, None])
        dk, dv = give(q, k, v, 0.0, grad, lse, delta, seen, scale, dk, dv, PRECISION)
    at = (unit * tl.num_programs(0) + part) * SINKS + i
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    dk *= scale * 0.6931471805599453
    tl.store(DK + at[:, None] * D + d[None, :], dk, mask=(i < SINKS)[:, None] & (d < D)[None, :])
    tl.store(DV + at[:, None] * E + e[None, :], dv, mask=(i < SINKS)[:, None] & (e < E)[None, :])
