"""The pooled rows of fast multipole attention: all levels from the tokens, and their gradients back.

Levels are a binary tree over cells of ``block / rank`` tokens. ``fma_pool`` makes six levels in one launch with one
product by a matrix of zeros and ones; what it leaves are sums of its last level, which the next launch takes for tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.fma_rows import document, first_row, whose
from fastattn_compile.kernels.gpu.launch import padded, precision, step
from fastattn_compile.kernels.gpu.online import blemish, finite

# Cells of one program, a power of two: the rows of all its levels are one product of 64 rows.
CELLS = 32
_LEVELS = CELLS.bit_length()
# Channels of one program; float32 is made in three parts, which take registers.
_CHANNELS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


@triton.jit(do_not_specialize=["length", "nb", "level", "levels", "all_rows"])
def fma_pool(
    X, TAKEN, COUNT, ROWS, SUMS, DOCUMENT, heads, length, nb, level, levels, cell, all_rows, x_b, x_h, x_n, x_d, taken_b,
    count_b,
    C: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, ALL: tl.constexpr, PACKED: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Levels from ``level`` on of ``R / 2`` cells, each of ``cell`` rows of ``X``: means to ROWS, sums of the last to SUMS.

    ROWS is ``(b, heads, all_rows, C)``. ``PACKED``, the documents of a table take the place of the sequences, and there
    is one list of rows for all of them.
    """
    chunk, unit, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BC + tl.arange(0, BC)
    batch, inside = unit // heads, (c < C)[None, :]
    out_unit, base = unit, unit * 0
    if PACKED:
        sequence, opening, size, levels, base = document(DOCUMENT, batch)
        out_unit, nb = unit % heads, 2 << levels
        if level == 0:
            batch, length = sequence, tl.where(levels > 0, size, 0)
            X += opening * x_n
            TAKEN += opening
    X += batch * x_b + (unit % heads) * x_h
    # The program's rows: R / 2 of its first level, R / 4 of the next, one of the last, and one that is not used.
    r = tl.arange(0, R)
    up, begin = tl.zeros([R], tl.int32), tl.zeros([R], tl.int32)
    for i in tl.static_range(1, 12):
        if (R >> i) >= 1:
            start = R - (R >> i)
            up = tl.where(r >= start, i, up)
            begin = tl.where(r >= start, start, begin)
    index, width = r - begin, cell << up
    tokens = cell * (R // 2)
    acc, fault = tl.zeros([R, BC], tl.float32), tl.zeros([R], tl.float32)
    for first in range(0, tokens, BT):
        local = first + tl.arange(0, BT)
        t = chunk.to(tl.int64) * tokens + local
        there = (local < tokens) & (t < length)
        if not ALL:
            there = there & (tl.load(TAKEN + batch * taken_b + t, mask=there, other=0) != 0)
        x = tl.load(X + t[:, None] * x_n + c[None, :] * x_d, mask=there[:, None] & inside, other=0.0)
        member = (local[None, :] // width[:, None] == index[:, None]) & (r < R - 1)[:, None]
        acc = tl.dot(member.to(x.dtype), finite(x), acc, input_precision=PRECISION)
        fault += tl.sum(tl.where(member, blemish(x)[None, :], 0.0), 1)
    acc += fault[:, None]
    at = chunk * ((R // 2) >> up) + index
    real = (r < R - 1) & (level + up < levels) & (at < RANK * (nb >> (level + up)))
    row = (first_row(level + up, nb, RANK) + at).to(tl.int64)
    row += base
    count = tl.load(COUNT + batch * count_b + row, mask=real, other=1.0)
    mean = acc / tl.maximum(count, 1.0)[:, None]
    out = (out_unit * all_rows + row)[:, None] * C + c[None, :]
    tl.store(ROWS + out, mean.to(ROWS.dtype.element_ty), mask=real[:, None] & inside)
    last = (unit * tl.num_programs(0) + chunk) * C + c
    tl.store(SUMS + last[None, :] + tl.zeros([R, 1], tl.int64), acc, mask=(r == R - 2)[:, None] & inside)


@triton.jit(do_not_specialize=["nb", "levels", "all_rows"])
def fma_spread(
    ROWS, COUNT, DOCUMENT, heads, nb, levels, all_rows, count_b,
    C: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, PACKED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """For each cell the sum over all levels of its row's gradient, divided by the tokens of the row.

    It takes the place of the row of the lowest level, which is read for this cell alone.
    """
    at, unit, c = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1).to(tl.int64), tl.arange(0, BC)
    number, _, _, _, nb, levels, base, rows = whose(DOCUMENT, unit, heads, 0, nb, levels, all_rows, PACKED)
    mine = at < RANK * nb
    if PACKED:
        mine = mine & (levels > 0)
    total = tl.zeros([B, BC], tl.float32)
    mask = mine[:, None] & (c < C)[None, :]
    for level in range(0, levels):
        row = (first_row(level, nb, RANK) + (at >> level)).to(tl.int64)
        count = tl.load(COUNT + number * count_b + base + row, mask=mine, other=1.0)
        grad = tl.load(ROWS + (rows + row)[:, None] * C + c[None, :], mask=mask, other=0.0)
        total += grad / tl.maximum(count, 1.0)[:, None]
    tl.store(ROWS + (rows + at)[:, None] * C + c[None, :], total, mask=mask)


def pool_means(
    x: Tensor, taken: Tensor | None, counts: Tensor, nb: int, levels: int, rank: int, block: int,
    documents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Means of the tokens of every row.

    Args:
        x: Keys or values, ``(b, g, n, c)``, any strides.
        taken: ``(b or 1, n)`` uint8, the tokens that are pooled; ``None`` for all.
        counts: ``(b or 1, rows)`` float32, tokens of every row.
        nb: Blocks, rounded up to a power of two.
        levels: Pooled levels.
        rank: Rows of a group.
        block: Tokens of a finest group.
        documents: ``(k, 6)`` int32 as ``fma_rows.document`` reads it; ``nb`` and ``levels`` are then those of the longest.

    Returns:
        ``(b, g, rows, c)`` in the type of ``x``; of documents ``(1, g, rows of all, c)``.
    """
    batch, heads, _, c = x.shape
    pooled = x.new_empty(batch if documents is None else 1, heads, counts.shape[1], c)
    batch = batch if documents is None else len(documents)
    source, cell, level = x, block // rank, 0
    while level < levels:
        chunks = -(-(rank * (nb >> level)) // CELLS)
        sums = x.new_empty(batch, heads, chunks, c, dtype=torch.float32)
        bc = min(_CHANNELS[source.dtype], padded(c))
        every = taken is None or level > 0
        fma_pool[(chunks, batch * heads, -(-c // bc))](
            source, None if every else taken, counts, pooled, sums, documents, heads, source.shape[2], nb, level, levels,
            cell, counts.shape[1], *source.stride(), step(taken), step(counts), C=c, BC=bc, RANK=rank, ALL=every,
            PACKED=documents is not None, R=2 * CELLS, BT=64, PRECISION=precision(source.dtype),
            num_warps=4 if bc < 128 else 8, num_stages=2,
        )  # fmt: skip
        source, cell, level = sums, 2, level + _LEVELS
    return pooled


def spread(
    grad_rows: Tensor, counts: Tensor, nb: int, levels: int, rank: int, documents: Tensor | None = None
) -> None:
    """The transpose of ``pool_means``, up to the tokens: gradients that every token of a cell takes.

    They take the place of the gradients of the rows of the lowest level, of which there is one a cell.

    Args:
        grad_rows: ``(b, g, rows, c)`` float32; of documents ``(1, g, rows of all, c)``.
        counts: As in ``pool_means``.
        nb: As in ``pool_means``.
        levels: As in ``pool_means``.
        rank: As in ``pool_means``.
        documents: As in ``pool_means``.
    """
    batch, heads, rows, c = grad_rows.shape
    tile, units = 16, heads * (batch if documents is None else len(documents))
    fma_spread[(-(-rank * nb // tile), units)](
        grad_rows, counts, documents, heads, nb, levels, rows, step(counts), C=c, BC=padded(c), RANK=rank,
        PACKED=documents is not None, B=tile,
    )  # fmt: skip
