"""Stable sort of small numbers by counting, in Triton: about 12 bytes an item, where a radix sort passes many times.

``sort_count`` counts the numbers of a chunk, a scan over all chunks in the order of the numbers says where those of
each chunk begin, ``sort_place`` puts every item there behind the equal ones before it in its chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import LIGHT
from fastattn_compile.kernels.gpu.online import COUNTS

_CHUNK, _MOST_BINS = 128, 4096


@triton.jit(do_not_specialize=COUNTS)
def sort_count(CODE, COUNT, n, chunks, bins, BINS: tl.constexpr, T: tl.constexpr):
    """How often each number stands in one chunk: ``(u, bins, chunks)``."""
    chunk, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, number = chunk * T + tl.arange(0, T), tl.arange(0, BINS)
    code = tl.load(CODE + unit * n + i, mask=i < n, other=0).to(tl.int32)
    count = tl.histogram(code, BINS, mask=i < n)
    tl.store(COUNT + (unit * bins + number) * chunks + chunk, count, mask=number < bins)


@triton.jit(do_not_specialize=COUNTS)
def sort_place(CODE, BASE, ORDER, n, chunks, bins, T: tl.constexpr):
    """Writes the items of one chunk to their places."""
    chunk, unit, i = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, T)
    item = chunk * T + i
    code = tl.load(CODE + unit * n + item, mask=item < n, other=-1)
    other = tl.load(CODE + unit * n + item, mask=item < n, other=-2)
    rank = tl.sum(((code[:, None] == other[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    base = tl.load(BASE + (unit * bins + code) * chunks + chunk, mask=item < n, other=0)
    tl.store(ORDER + unit * n + base + rank, item.to(ORDER.dtype.element_ty), mask=item < n)


def obstacle(code: Tensor, bins: int) -> str:
    """Why these kernels cannot sort; empty when they can."""
    return "" if bins <= _MOST_BINS else f"{bins} different numbers; up to {_MOST_BINS} are counted"


def stable_order(code: Tensor, bins: int) -> Tensor:
    """Positions of the items of each row, sorted by number.

    Args:
        code: ``(u, n)`` whole numbers from 0 to ``bins - 1``.
        bins: Number of numbers.

    Returns:
        ``(u, n)`` int64; equal to ``torch.sort(code, stable=True).indices``.
    """
    units, n = code.shape
    code, chunks = code.contiguous(), -(-n // _CHUNK)
    count = torch.empty(units, bins, chunks, dtype=torch.int32, device=code.device)
    sort_count[(chunks, units)](
        code, count, n, chunks, bins, BINS=max(2, triton.next_power_of_2(bins)), T=_CHUNK, **LIGHT
    )
    flat = count.view(units, -1)
    base = flat.cumsum(1, dtype=torch.int32) - flat
    order = torch.empty_like(code, dtype=torch.int64)
    sort_place[(chunks, units)](code, base, order, n, chunks, bins, T=_CHUNK, **LIGHT)
    return order
