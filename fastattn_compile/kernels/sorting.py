"""Stable sorts of small numbers: counted in Triton on a GPU and in C++ on a CPU, where the kernels allow it.

A sort is a step of a kernel, not one a user chooses: what cannot be counted is sorted by ATen whatever was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.cpu import build, trees
from fastattn_compile.kernels.dispatch import chosen_kernels, gpu_obstacle


def stable_order(code: Tensor, bins: int) -> Tensor:
    """Positions of the items of each row, sorted by number.

    Args:
        code: ``(u, n)`` whole numbers from 0 to ``bins - 1``.
        bins: Number of numbers.

    Returns:
        ``(u, n)`` int64.
    """
    if chosen_kernels() in ("auto", "triton") and not gpu_obstacle(code):
        from fastattn_compile.kernels.gpu import counting_sort

        if not counting_sort.obstacle(code, bins):
            return counting_sort.stable_order(code, bins)
    return torch.sort(code, dim=-1, stable=True).indices


def ranked(
    code: Tensor, bins: int, wanted: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Items sorted by number, and where in that order those of a wanted number between two positions stand.

    Args:
        code: ``(u, m)`` int64 from 0 to ``bins - 1``.
        bins: Number of numbers.
        wanted: ``(u, r, n)`` int64, a number for every query.
        low: ``(n,)`` int64, first position that a query asks for; never falls from query to query.
        high: ``(n,)`` int64, one past the last; likewise.

    Returns:
        ``(u, m)`` positions in order; ``(u, r, n)`` first place and one past the last.
    """
    if code.device.type == "cpu" and chosen_kernels() in ("auto", "cpp") and not build.obstacle("trees"):
        return trees.ranked(code, bins, wanted, low, high)
    order = stable_order(code, bins)
    ladder = code.gather(-1, order) * code.shape[1] + order
    at = wanted * code.shape[1]
    start, stop = (torch.searchsorted(ladder, (at + edge).flatten(1)).view_as(wanted) for edge in (low, high))
    return order, start, stop
