"""Where the pooled rows of fast multipole attention stand, and which a block of queries sees: bit operations, no tables.

The rows of a head are one array, level by level as ``kernels/aten/fma_plan.py`` lays them out: ``nb`` is the number of
blocks rounded up to a power of two, and level ``l`` has ``RANK * (nb >> l)`` rows from ``2 * RANK * (nb - (nb >> l))`` on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_row(level, nb, RANK: tl.constexpr):
    """Where a level begins."""
    return 2 * RANK * (nb - (nb >> level))


@triton.jit
def document(DOCUMENT, number):
    """Of one packed document: its sequence, first token, length, levels, and first row among those of all."""
    at = DOCUMENT + number * 6
    sequence, first = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    return sequence, first, tl.load(at + 2), tl.load(at + 3), tl.load(at + 4).to(tl.int64)


@triton.jit
def whose(DOCUMENT, unit, heads, length, nb, levels, all_rows, PACKED: tl.constexpr):
    """Whom a unit is: a key head of a sequence or, ``PACKED``, of a document of a table.

    Returns its number, the sequence, its first token there, length, blocks rounded up, levels, its first row among those
    of the head, and the same among those of all heads, of which each has ``all_rows``.
    """
    number = unit // heads
    if PACKED:
        batch, opening, length, levels, base = document(DOCUMENT, number)
        nb = 2 << levels
        rows = unit % heads * all_rows + base
    else:
        batch, opening, base, rows = number, number * 0, number * 0, unit * all_rows
    return number, batch, opening, length, nb, levels, base, rows


@triton.jit
def far_rows(block, slot, nb, levels, RANK: tl.constexpr, CAUSAL: tl.constexpr):
    """Row of each far slot of a block, and whether the block sees it.

    A level has the ``2 * RANK`` rows of the parent before the block's own and, without causality, of the parent after it.
    """
    SLOTS: tl.constexpr = 2 * RANK if CAUSAL else 4 * RANK
    level, r = slot // SLOTS, slot % SLOTS
    child = r // RANK % 2
    second = (block >> level) & 1
    parent = (block >> (level + 1)) - 1
    if CAUSAL:
        seen = child <= second
    else:
        after = r // (2 * RANK)
        parent += 2 * after
        seen = tl.where(after == 0, (child == 0) | (second == 1), (child == 1) | (second == 0))
    group = 2 * parent + child
    seen = seen & (level < levels) & (parent >= 0) & (group < (nb >> level))
    row = first_row(level, nb, RANK) + group * RANK + r % RANK
    return tl.where(seen, row, 0), seen


@triton.jit
def covered(
    slot,
    row,
    length,
    nb,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """First and last position that the row of each slot covers."""
    SLOTS: tl.constexpr = 2 * RANK if CAUSAL else 4 * RANK
    level = slot // SLOTS
    own = row - first_row(level, nb, RANK)
    if LEARNED:
        width = BLOCK << level
        first = own // RANK * width
    else:
        width = (BLOCK // RANK) << level
        first = own * width
    return first, tl.minimum(first + width, length) - 1


@triton.jit
def near(place, key, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether keys stand in the near field of queries, by position."""
    first = (place // BLOCK - 1) * BLOCK
    if CAUSAL:
        return (key >= first) & (key <= place)
    return (key >= first) & (key < first + 3 * BLOCK)


@triton.jit
def beyond(place, key, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether sinks stand outside the near field of queries, where a query may meet them; by position."""
    distance = place // BLOCK - key // BLOCK
    if CAUSAL:
        return distance > 1
    return (distance > 1) | (distance < -1)
