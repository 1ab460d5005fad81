"""The parts of conv-basis attention that have several implementations: profiles of anchors, sums by transforms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn_compile.kernels.aten import conv_profiles, conv_sums
from fastattn_compile.kernels.aten.conv_profiles import Side
from fastattn_compile.kernels.aten.conv_sums import Buckets
from fastattn_compile.kernels.dispatch import gpu_obstacle, select


def _by_triton(kernel: str, x: Tensor) -> bool:
    def obstacle() -> str:
        from fastattn_compile.kernels.gpu import conv

        return conv.obstacle(x)

    return select(kernel, {"triton": lambda: gpu_obstacle(x) or obstacle()}) == "triton"


def make_side(
    query: Tensor, key: Tensor, scale: float, bounds: Tensor, band: tuple[int, int], flipped: bool,
    uncovered: float | None = None, offset_bias: Tensor | None = None,
) -> Side:  # fmt: skip
    """``conv_profiles.make_side``."""
    given = query, key, scale, bounds, band, flipped, uncovered, offset_bias
    if _by_triton("conv_basis profiles", query):
        from fastattn_compile.kernels.gpu import conv

        return conv.make_side(*given)
    return conv_profiles.make_side(*given)


def weighted_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.weighted_sums``."""
    if _by_triton("conv_basis sums", x):
        from fastattn_compile.kernels.gpu import conv

        return conv.weighted_sums(sides, x, buckets)
    return conv_sums.weighted_sums(sides, x, buckets)


def transposed_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.transposed_sums``."""
    if _by_triton("conv_basis sums", x):
        from fastattn_compile.kernels.gpu import conv

        return conv.transposed_sums(sides, x, buckets)
    return conv_sums.transposed_sums(sides, x, buckets)


def slopes(side: Side, x: Tensor, scaled: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.slopes``."""
    if _by_triton("conv_basis sums", x):
        from fastattn_compile.kernels.gpu import conv

        return conv.slopes(side, x, scaled, buckets)
    return conv_sums.slopes(side, x, scaled, buckets)
