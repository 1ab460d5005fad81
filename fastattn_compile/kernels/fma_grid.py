"""Fast multipole attention on a grid: ATen alone has a kernel for it, and no other is taken in its place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn_compile.kernels.aten import fma_grid as aten
from fastattn_compile.kernels.aten.fma_grid_plan import GridPattern
from fastattn_compile.kernels.dispatch import select

__all__ = ["GridPattern", "backward", "forward"]


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: GridPattern, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.fma_grid.forward``."""
    select("fma grid forward", {})
    return aten.forward(query, key, value, scale, pattern, key_padding, weights)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: GridPattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """``kernels.aten.fma_grid.backward``."""
    select("fma grid backward", {})
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp, key_padding
    return aten.backward(query, key, value, scale, pattern, *saved, weights)
