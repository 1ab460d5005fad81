"""One step of decoding by fast multipole attention in Triton: the token is taken into the state and attended, in one launch.

The state is that of ``operators/fma/decode.py``. A program owns up to ``BM`` of the query heads that share a key head; it
reads the last two blocks, the sinks, and of every level that the length has reached the parent before the query's own:
O(block + rank * log n) rows. What a step writes (a slot of the ring, rows of the own parents, a sink inside the near field)
no query of the step reads from memory, so that programs of one key head may run side by side: the first of them writes.
All is computed in float32; in half precision products of numbers of ten bits, which keys and values are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.fma_configs import chosen
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision, tensor_obstacle
from fastattn_compile.kernels.gpu.meet import meet, rows_of
from fastattn_compile.kernels.gpu.online import log2_sum

MOST_SINKS = 64
# Levels whose rows take a token together.
_LEVELS = 8


@triton.jit
def take_rows(
    SUMS, FACTOR, token, at, number, fresh, real, C: tl.constexpr, BC: tl.constexpr, LEARNED: tl.constexpr
):
    """Adds a token, times the factors of a learned row, to some rows; those of a fresh parent begin with it."""
    c = tl.arange(0, BC)
    place = SUMS + at[:, None] * C + c[None, :]
    mask = real[:, None] & (c < C)[None, :]
    token = token[None, :]
    if LEARNED:
        token = token * tl.load(FACTOR + number[:, None] * C + c[None, :], mask=mask, other=0.0)
    before = tl.load(place, mask=mask & (fresh == 0)[:, None], other=0.0)
    tl.store(place, before + token, mask=mask)


@triton.jit
def pooled_rows(
    SUMS, SHIFT, row, number, factor, there, C: tl.constexpr, BC: tl.constexpr, LEARNED: tl.constexpr
):
    """Rows from their sums: a factor, and the shift of a learned row."""
    x = rows_of(SUMS, row, C, 1, there, C, BC) * factor[:, None]
    if LEARNED:
        x += rows_of(SHIFT, number, C, 1, there, C, BC)
    return x


@triton.jit
def clear_rows(SUMS, at, real, C: tl.constexpr, BC: tl.constexpr):
    """Zeros rows."""
    c = tl.arange(0, BC)
    nothing = tl.zeros([at.shape[0], BC], tl.float32)
    tl.store(SUMS + at[:, None] * C + c[None, :], nothing, mask=real[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["heads", "now", "since", "left", "levels", "reached", "fresh_levels"])
def fma_decode(
    Q, K, V, RING_K, RING_V, RING_PLACE, SINK_K, SINK_V, SINK_PLACE, FOUND, SUMS_K, SUMS_V, COUNT, FACTOR_K, FACTOR_V,
    SHIFT_K, SHIFT_V, OUT, LSE, heads, now, since, left, levels, reached, fresh_levels, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, SINKS: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of the query at ``now``, and the state with its token; ``scale`` carries log2 e.

    ``since`` is the length of the prompt, ``reached`` counts the levels of which the query meets a parent, ``fresh_levels``
    those where a parent begins with the token.
    """
    unit, g = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM)
    batch, d, e = unit // heads, tl.arange(0, BD), tl.arange(0, BE)
    own, slot_now = now // BLOCK, now % (2 * BLOCK)
    q = rows_of(Q + unit * G * D, g, D, 1, g < G, D, BD).to(tl.float32)
    k_now = tl.load(K + unit * D + d, mask=d < D, other=0.0)
    v_now = tl.load(V + unit * E + e, mask=e < E, other=0.0)
    RING_K += unit * (2 * BLOCK * D)
    RING_V += unit * (2 * BLOCK * E)
    RING_PLACE += batch * (2 * BLOCK)
    SUMS_K += unit * levels * (4 * RANK * D)
    SUMS_V += unit * levels * (4 * RANK * E)
    COUNT += batch * levels * (4 * RANK)
    largest, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    farthest = tl.where(left < 0, 0, tl.maximum(now - left, 0))

    for begin in range(0, tl.minimum(now + 1, 2 * BLOCK), BN):
        slot = begin + tl.arange(0, BN)
        new = slot == slot_now
        place = tl.load(RING_PLACE + slot, mask=(slot < 2 * BLOCK) & (slot != slot_now), other=-1)
        place = tl.where(new, now, place.to(tl.int32))
        there = (place >= tl.maximum((own - 1) * BLOCK, 0)) & (place >= farthest)
        k = rows_of(RING_K, slot, D, 1, there & (slot != slot_now), D, BD)
        v = rows_of(RING_V, slot, E, 1, there & (slot != slot_now), E, BE)
        k = tl.where(new[:, None], k_now[None, :], k).to(tl.float32)
        v = tl.where(new[:, None], v_now[None, :], v).to(tl.float32)
        largest, mass, acc = meet(q, k, v, None, there[None, :], scale, largest, mass, acc, PRECISION)
    for begin in range(0, reached * 2 * RANK, BF):
        slot = begin + tl.arange(0, BF)
        level, r = slot // (2 * RANK), slot % (2 * RANK)
        width, child = BLOCK << level, r // RANK
        parent = now // (2 * width)
        first = (2 * (parent - 1) + child) * width
        if not LEARNED:
            first += r % RANK * (width // RANK)
        there = (level < reached) & (child <= now // width % 2) & (first >= farthest)
        row = (level * 2 + 1 - parent % 2) * (2 * RANK) + r
        count = tl.load(COUNT + row, mask=there, other=0.0)
        there = there & (count > 0)
        count = tl.maximum(count, 1.0)
        number, share = level * RANK + r % RANK, 1 / count
        if LEARNED:
            share, count = width / count, count / RANK
        k = pooled_rows(SUMS_K, SHIFT_K, row, number, share, there, D, BD, LEARNED)
        v = pooled_rows(SUMS_V, SHIFT_V, row, number, share, there, E, BE, LEARNED)
        weight = tl.log2(count) if WEIGHTED else tl.zeros([BF], tl.float32)
        largest, mass, acc = meet(q, k, v, weight, there[None, :], scale, largest, mass, acc, PRECISION)
    becomes_sink = 0
    if SINKS > 0:
        i = tl.arange(0, BS)
        SINK_K += unit * (SINKS * D)
        SINK_V += unit * (SINKS * E)
        SINK_PLACE += batch * SINKS
        place = tl.load(SINK_PLACE + i, mask=i < SINKS, other=-1).to(tl.int32)
        there = (place >= farthest) & (own - place // BLOCK > 1)
        k = rows_of(SINK_K, i, D, 1, there, D, BD).to(tl.float32)
        v = rows_of(SINK_V, i, E, 1, there, E, BE).to(tl.float32)
        largest, mass, acc = meet(q, k, v, None, there[None, :], scale, largest, mass, acc, PRECISION)
        # Every token after the prompt is real.
        sink_rank = tl.load(FOUND + batch).to(tl.int32) + now - since
        becomes_sink = (sink_rank < SINKS).to(tl.int32)

    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    query = unit * G + g
    tl.store(
        OUT + query[:, None] * E + e[None, :], acc.to(OUT.dtype.element_ty), mask=(g < G)[:, None] & (e < E)[None, :]
    )  # fmt: skip
    tl.store(LSE + query, log2_sum(largest, mass) * 0.6931471805599453, mask=g < G)

    if tl.program_id(1) == 0:
        leads = unit % heads == 0
        # Loaded anew: held through the loops they would take registers.
        k_now = tl.load(K + unit * D + d, mask=d < D, other=0.0)
        v_now = tl.load(V + unit * E + e, mask=e < E, other=0.0)
        tl.store(RING_K + slot_now * D + d, k_now, mask=d < D)
        tl.store(RING_V + slot_now * E + e, v_now, mask=e < E)
        tl.store(RING_PLACE + slot_now, now, mask=leads)
        if SINKS > 0:
            tl.store(SINK_K + sink_rank * D + d, k_now, mask=(d < D) & (becomes_sink != 0))
            tl.store(SINK_V + sink_rank * E + e, v_now, mask=(e < E) & (becomes_sink != 0))
            tl.store(SINK_PLACE + sink_rank, now, mask=leads & (becomes_sink != 0))
        kept = tl.where(becomes_sink != 0, 0.0, 1.0)
        k_kept, v_kept = k_now.to(tl.float32) * kept, v_now.to(tl.float32) * kept
        # A token is in one row of a group, or in all that are learned.
        EACH: tl.constexpr = RANK if LEARNED else 1
        for lowest in range(0, levels * EACH, BL):
            number = lowest + tl.arange(0, BL)
            real = number < levels * EACH
            level = tl.minimum(number // EACH, levels - 1)
            width = BLOCK << level
            fresh = now % (2 * width) == 0
            row = (level * 2 + now // (2 * width) % 2) * (2 * RANK)
            row += now // width % 2 * RANK
            if LEARNED:
                row += number % RANK
            else:
                row += now % width // (width // RANK)
            take_rows(SUMS_K, FACTOR_K, k_kept, row, number, fresh, real, D, BD, LEARNED)
            take_rows(SUMS_V, FACTOR_V, v_kept, row, number, fresh, real, E, BE, LEARNED)
            before = tl.load(COUNT + row, mask=real & (fresh == 0) & leads, other=0.0)
            tl.store(COUNT + row, before + kept, mask=real & leads)
        # The other rows of parents that begin: they still hold a parent that no query will meet again.
        r = tl.arange(0, BR)
        others = (r >= EACH) & (r < 2 * RANK)
        for level in range(0, fresh_levels):
            row = (level * 2 + now // (2 * BLOCK << level) % 2) * (2 * RANK) + r
            clear_rows(SUMS_K, row, others, D, BD)
            clear_rows(SUMS_V, row, others, E, BE)
            tl.store(COUNT + row, tl.zeros([BR], tl.float32), mask=others & leads)


@torch.library.custom_op(
    "fastattn::fma_decode",
    mutates_args=(
        "ring_key", "ring_value", "ring_place", "sink_key", "sink_value", "sink_place", "sum_key", "sum_value", "count"
    ),
    device_types=("cuda", "cpu"),
)  # fmt: skip
def step(
    query: Tensor, key: Tensor, value: Tensor, ring_key: Tensor, ring_value: Tensor, ring_place: Tensor,
    sink_key: Tensor, sink_value: Tensor, sink_place: Tensor, found: Tensor, sum_key: Tensor, sum_value: Tensor,
    count: Tensor, learned: Sequence[Tensor], now: int, since: int, left: int, scale: float, weighted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Takes a token into the state and attends it. The state's tensors are contiguous.

    Args:
        query: ``(b, h, 1, d)``, float16, bfloat16 or float32.
        key: ``(b, g, 1, d)``, same type.
        value: ``(b, g, 1, e)``, same type.
        ring_key: ``(b, g, 2 * block, d)``, same type; position ``t`` at ``t % (2 * block)``.
        ring_value: ``(b, g, 2 * block, e)``, likewise.
        ring_place: ``(b, 2 * block)`` int64 positions, -1 for none.
        sink_key: ``(b, g, sinks, d)``, same type.
        sink_value: ``(b, g, sinks, e)``, same type.
        sink_place: ``(b, sinks)`` int64 positions, -1 for none.
        found: ``(b,)`` int64, sinks in the prompt.
        sum_key: ``(b, g, levels, 2, 2, rank, d)`` float32; parent ``i`` of a level at ``i % 2``, its children, their rows.
        sum_value: ``(b, g, levels, 2, 2, rank, e)`` float32.
        count: ``(b, 1, levels, 2, 2, rank, 1)`` float32, tokens of a row.
        learned: None, or of learned rows, ``(levels, rank, d)`` for keys and ``(levels, rank, e)`` for values, float32:
            the factors of the token's place, keys and values, then the shifts of the rows.
        now: Position of the token.
        since: Length of the prompt.
        left: Largest distance that is visible, below 0 for any.
        scale: Factor on the scores.
        weighted: Whether a row counts as many keys as it stands for.

    Returns:
        Output ``(b, h, 1, e)`` in the type of ``value``; log-sum-exp ``(b, h, 1)`` float32.
    """
    batch, kv_heads, levels, _, _, rank, _ = sum_key.shape
    heads, d, e = query.shape[1], query.shape[3], value.shape[3]
    block, sinks, config = ring_key.shape[2] // 2, sink_place.shape[1], chosen("fma_decode", query, value)
    out = value.new_empty(batch, heads, 1, e)
    log_sum_exp = value.new_empty(batch, heads, 1, dtype=torch.float32)
    parents, inside = divmod(now, 2 * block)
    # A parent of level l begins where l more bits of the lowest level's number are 0; before the first, nothing is kept.
    fresh_levels = 0 if inside or not now else min(levels, (parents & -parents).bit_length())
    fma_decode[(batch * kv_heads, -(-heads // kv_heads // config.rows))](
        query.contiguous(), key.contiguous(), value.contiguous(), ring_key, ring_value, ring_place, sink_key, sink_value,
        sink_place, found, sum_key, sum_value, count, *(learned or (None,) * 4), out, log_sum_exp, kv_heads, now, since,
        left, levels, min(levels, parents.bit_length()), fresh_levels, scale * LOG2_E, **channels(D=d, E=e),
        G=heads // kv_heads, BLOCK=block, RANK=rank, SINKS=sinks, WEIGHTED=weighted, LEARNED=bool(learned),
        PRECISION=precision(query.dtype), BS=padded(sinks), BR=padded(2 * rank), BL=_LEVELS, **config.launch,
    )  # fmt: skip
    return out, log_sum_exp


@step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *state: object) -> tuple[Tensor, Tensor]:
    shape = *query.shape[:3], value.shape[3]
    return value.new_empty(shape), value.new_empty(shape[:3], dtype=torch.float32)


def obstacle(query: Tensor, key: Tensor, value: Tensor, sinks: int) -> str:
    """Why this kernel cannot serve a step; empty when it can."""
    if sinks > MOST_SINKS:
        return f"{sinks} sinks, a tile holds up to {MOST_SINKS}"
    return tensor_obstacle(query, key, value)
