"""The scores of conv-basis attention as one-dimensional profiles, and the way back from their gradients.

A side is one triangle of the score matrix. On it, segment ``t`` with anchor column ``s`` has the profile
``u[tau] = scale * <q[s + tau], k[s]>``, and the score of row ``i`` and column ``j`` of the segment is ``u[i -
j]``: the anchor column slid down the diagonal (Conv-Basis, arXiv 2405.05219; specification section 2,
equivalent view). The strict upper triangle is the lower one of the sequence read backwards; everything of a
flipped side counts from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.conv_anchors import segment_of


@dataclass(frozen=True)
class Side:
    """One triangle of the scores.

    Args:
        bounds: ``(b, g, r, k + 1)`` boundaries of the segments; dimensions of lanes that agree are 1.
        segment: ``(b, g, r, n)`` segment of every column, -1 for none.
        profile: ``(b, g, r, k, n)`` scores by offset, -inf where no pair of that offset is visible.
        flipped: Whether the side is the upper triangle, read backwards.
        free: Terms at the front whose profile reads no key (columns that no anchor covers).
    """

    bounds: Tensor
    segment: Tensor
    profile: Tensor
    flipped: bool
    free: int = 0

    @property
    def terms(self) -> int:
        """Number of segments."""
        return self.profile.shape[3]

    def turn(self, x: Tensor, dim: int = -1) -> Tensor:
        """``x`` in the order of this side, or back from it."""
        return x.flip(dim) if self.flipped else x


def _shift_index(bounds: Tensor, n: int) -> Tensor:
    """Row ``s + tau`` of every term and offset: ``(b, g, r, k, n)``; ``n`` and more where there is none."""
    return bounds[..., :-1, None] + torch.arange(n, device=bounds.device)


def make_side(
    query: Tensor,
    key: Tensor,
    scale: float,
    bounds: Tensor,
    band: tuple[int, int],
    flipped: bool,
    uncovered: float | None = None,
    offset_bias: Tensor | None = None,
) -> Side:
    """Computes the profiles of one side: a product of queries and anchors, every row shifted.

    Args:
        query: ``(b, g, r, n, d)``, in the order of the side.
        key: ``(b, g, 1, n, d)``, in the order of the side.
        scale: Factor on the scores.
        bounds: ``(b, g, r, k + 1)``.
        band: Smallest and largest visible offset.
        flipped: Which triangle.
        uncovered: Score of the columns of a first term that no anchor covers; ``None`` when it is an anchor
            as well.
        offset_bias: ``(g, r, 1, n)`` added score of every offset.
    """
    lanes, (n, d) = query.shape[:3], query.shape[3:]
    count = bounds.shape[-1] - 1
    anchors = bounds[..., :-1].clamp(max=n - 1).expand(*lanes, count)
    chosen = key.expand(*lanes, n, d).gather(3, anchors[..., None].expand(*lanes, count, d))
    columns = scale * (chosen @ query.mT)
    rows = _shift_index(bounds, n)
    profile = columns.gather(-1, rows.clamp(max=n - 1).expand(*lanes, count, n))
    if uncovered is not None:
        profile[..., 0, :] = uncovered
    if offset_bias is not None:
        profile += offset_bias
    tau = torch.arange(n, device=query.device)
    hidden = (rows >= n) | (tau < band[0]) | (tau > band[1])
    segment = segment_of(bounds, n)
    return Side(bounds, segment, profile.masked_fill(hidden, -torch.inf), flipped, int(uncovered is not None))


def profile_gradients(
    query: Tensor, key: Tensor, scale: float, side: Side, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys from those of the profiles (specification 7B).

    Args:
        query: ``(b, g, r, n, d)``, in the order of the side.
        key: ``(b, g, 1, n, d)``, in the order of the side.
        scale: Factor on the scores.
        side: The side.
        slope: ``(b, g, r, k, n)`` gradient of every profile value.

    Returns:
        ``(b, g, r, n, d)`` and ``(b, g, 1, n, d)``, in the order of the side.
    """
    lanes, (n, d) = query.shape[:3], query.shape[3:]
    if side.free:
        slope = F.pad(slope[..., side.free :, :], (0, 0, side.free, 0))
    start = side.bounds[..., :-1, None]
    tau = torch.arange(n, device=query.device) - start
    by_row = slope.gather(-1, tau.clamp(min=0).expand(slope.shape)).masked_fill(tau < 0, 0)
    anchors = (
        side.bounds[..., :-1]
        .clamp(max=n - 1)
        .expand(*lanes, side.terms)[..., None]
        .expand(*lanes, side.terms, d)
    )
    chosen = key.expand(*lanes, n, d).gather(3, anchors)
    grad_query = scale * (by_row.mT @ chosen)
    grad_key = torch.zeros_like(query).scatter_add_(3, anchors, scale * (by_row @ query))
    return grad_query, grad_key.sum(2, keepdim=True)


def row_maxima(side: Side) -> Tensor:
    """Largest score of every row: ``(b, g, r, n)``, -inf where there is none.

    A sliding maximum of every profile by doubling, O(k n log n). Columns that padding hides inside a segment
    count, so the result may be too large there, never too small.
    """
    n = side.profile.shape[-1]
    rows = torch.arange(n, device=side.profile.device)
    start, stop = side.bounds[..., :-1, None], side.bounds[..., 1:, None]
    newest = rows - start
    width = torch.minimum(stop - start, newest + 1).clamp(min=0).expand(side.profile.shape)
    table, span = side.profile, 1
    best = torch.full_like(side.profile, -torch.inf)
    newest = newest.expand(side.profile.shape)
    while True:
        here = (width >= span) & (width < 2 * span)
        if bool(here.any()):
            upper = table.gather(-1, (newest - span + 1).clamp(0, n - 1))
            lower = table.gather(-1, (newest - width + 1).clamp(0, n - 1))
            best = torch.where(here, torch.maximum(upper, lower), best)
        if 2 * span > int(width.max()):
            break
        table = torch.maximum(table, F.pad(table[..., span:], (0, span), value=-torch.inf))
        span *= 2
    return side.turn(best.amax(-2))
