"""Stable sorts of small numbers: counted in Triton on a GPU, where the kernels allow it.

A sort is a step of a kernel, not one a user chooses: what cannot be counted is sorted by ATen whatever was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
