"""What a conv-basis attention is told, and from it the anchors and profiles of its triangles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import conv_anchors
from fastattn_compile.kernels.aten.conv_profiles import Side
from fastattn_compile.kernels.conv_basis import make_side


@dataclass(frozen=True)
class Pattern:
    """The numbers that decide anchors, visibility and arithmetic.

    Args:
        terms: Segments of a triangle, ``k``.
        anchors: ``"recover"``, ``"strided"``, ``"sink_strided"`` or ``"jumps"``.
        sinks: Leading columns that are segments of their own (``"sink_strided"``, ``"jumps"``).
        probe: Scores of a column that are compared, ``T``.
        delta: Separation of anchors.
        eps: Noise of a score.
        uncovered: Columns before the first anchor: ``"anchor"`` makes the first column one, ``"ones"`` gives
            them score 0, ``"zeros"`` hides them.
        share: Query heads of a key head share anchor positions.
        form: ``"auto"``, ``"fft"``, ``"buckets"`` or ``"gather"``.
        width: Nats of a bucket.
        transform: Type of the transforms.
        formula: The gradient is that of the softmax formula (7A), not of this function (7B).
        left: Largest visible distance back, ``None`` for any.
        right: Largest visible distance ahead, ``None`` for any.
        stride: Distance of strided anchors; 0 spreads them evenly over the sequence.
    """

    terms: int
    anchors: str = "sink_strided"
    sinks: int = 4
    probe: int = 8
    delta: float = 8.0
    eps: float = 0.0
    uncovered: str = "anchor"
    share: bool = False
    form: str = "auto"
    width: float = 8.0
    transform: torch.dtype = torch.float64
    formula: bool = False
    left: int | None = None
    right: int | None = None
    stride: int = 0


def triangles(pattern: Pattern, n: int) -> list[tuple[bool, tuple[int, int]]]:
    """Triangles a band touches, with their visible offsets; the diagonal is in the lower one."""
    back = n - 1 if pattern.left is None else min(pattern.left, n - 1)
    ahead = n - 1 if pattern.right is None else min(pattern.right, n - 1)
    found = [(False, (max(0, -ahead), back))]
    if ahead > 0:
        found.append((True, (max(1, -back), ahead)))
    return found


def select(
    pattern: Pattern, query: Tensor, key: Tensor, scale: float, first: Tensor, stop: Tensor
) -> tuple[Tensor, float | None]:
    """Boundaries of the segments of one triangle, and the score of a first term that no anchor covers.

    Always decided in float64, so that the same numbers give the same anchors whatever type they are stored
    in.

    Args:
        pattern: The pattern.
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        scale: Factor on the scores.
        first: ``(b,)`` first real column.
        stop: ``(b,)`` column after the last real one.
    """
    p, count = pattern, pattern.terms
    if p.anchors == "strided":
        return conv_anchors.strided(first, stop, count, stride=p.stride), None
    if p.anchors == "sink_strided":
        return conv_anchors.strided(first, stop, count, p.sinks, p.stride), None
    wide = query.double(), key.double(), scale, first, stop, count, p.probe
    if p.anchors == "jumps":
        return conv_anchors.column_jumps(*wide, sinks=p.sinks, share=p.share), None
    force = p.uncovered == "anchor"
    bounds = conv_anchors.recover(*wide, p.delta, p.eps, force_first=force, share=p.share)
    if force:
        return bounds, None
    before = first[:, None, None, None].expand(*bounds.shape[:3], 1)
    return torch.cat([before, bounds], -1), 0.0 if p.uncovered == "ones" else -torch.inf


def real_span(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """First real column and the one after the last, ``(b,)`` each; 0 and 0 where all are hidden."""
    n = hidden.shape[1]
    place = torch.arange(n, device=hidden.device)
    stop = (place + 1).masked_fill(hidden, 0).amax(1)
    return torch.minimum(place.expand_as(hidden).masked_fill(hidden, n).amin(1), stop), stop


def make_sides(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    scale: float,
    hidden: Tensor,
    offset_bias: Tensor | None = None,
) -> tuple[Side, ...]:
    """Anchors and profiles of all triangles.

    Args:
        pattern: The pattern.
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        scale: Factor on the scores.
        hidden: ``(b, n)`` keys nobody sees.
        offset_bias: ``(g, r, 2 n - 1)`` added score of ``i - j = -(n - 1) .. n - 1``.
    """
    n = key.shape[3]
    sides = []
    for flipped, band in triangles(pattern, n):
        q, k, gone = (x.flip(dim) if flipped else x for x, dim in ((query, 3), (key, 3), (hidden, 1)))
        bounds, uncovered = select(pattern, q, k, scale, *real_span(gone))
        bias = None
        if offset_bias is not None:
            bias = (offset_bias[..., :n].flip(-1) if flipped else offset_bias[..., n - 1 :]).unsqueeze(-2)
        sides.append(make_side(q, k, scale, bounds, band, flipped, uncovered, bias))
    return tuple(sides)
