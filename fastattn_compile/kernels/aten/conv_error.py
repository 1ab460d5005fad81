"""How far conv-basis scores and weights are from the exact ones, row by row, in tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv import make_lanes
from fastattn_compile.kernels.aten.conv_gather import row_scores
from fastattn_compile.kernels.aten.conv_pattern import Pattern
from fastattn_compile.kernels.tiles import SCORE_TILE


@dataclass(frozen=True)
class Deviation:
    """Differences from exact attention at some rows.

    Args:
        score: ``(b, h)`` largest difference of a visible score.
        variation: ``(b, h, rows)`` total variation distance of the weights; 0 where a row sees no key.
        seen: ``(b, rows)`` rows that see a key.
    """

    score: Tensor
    variation: Tensor
    seen: Tensor

    @staticmethod
    def none(batch: int, heads: int, rows: int, device: torch.device) -> Deviation:
        """No difference at any row, none of which sees a key; to be filled."""
        return Deviation(
            torch.zeros(batch, heads, dtype=torch.float64, device=device),
            torch.zeros(batch, heads, rows, dtype=torch.float64, device=device),
            torch.zeros(batch, rows, dtype=torch.bool, device=device),
        )


def deviation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    rows: Tensor,
    hidden: Tensor | None = None,
    offset_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Deviation:
    """Compares the scores and weights of some rows with the exact ones, in float64; ``O(rows * n * d)`` work.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``; only its shape is read.
        scale: Factor on the scores.
        pattern: Anchors and band.
        rows: ``(m,)`` row numbers.
        hidden: ``(b, n)`` keys nobody sees.
        offset_bias: ``(h, 2 n - 1)``.
        key_bias: ``(b or 1, h or 1, n)``.
    """
    batch, heads, n, _ = query.shape
    made = Deviation.none(batch, heads, len(rows), query.device)
    place = torch.arange(n, device=query.device)
    given = query, key, value, scale, hidden, offset_bias, key_bias
    for lanes in make_lanes(pattern, *given, torch.float64):
        group = lanes.query.shape[2]
        size = max(1, SCORE_TILE // max(1, n * lanes.query.shape[:3].numel()))
        into_score = made.score[lanes.batch].unflatten(0, (-1, group))[lanes.heads]
        into_variation = made.variation[lanes.batch].unflatten(0, (-1, group))[lanes.heads]
        for begin in range(0, len(rows), size):
            some = rows[begin : begin + size]
            fast = row_scores(lanes.sides, lanes.log_weight, some)
            exact = scale * (lanes.query[..., some, :] @ lanes.key.mT) + lanes.log_weight.unsqueeze(-2)
            offset = some[:, None] - place
            if offset_bias is not None:
                spread = offset_bias.to(exact.dtype).unflatten(0, (-1, group))[lanes.heads]
                exact = exact + spread[..., offset + n - 1]
            visible = torch.ones_like(offset, dtype=torch.bool)
            if pattern.left is not None:
                visible &= offset <= pattern.left
            if pattern.right is not None:
                visible &= offset >= -pattern.right
            exact = exact.masked_fill(~visible, -torch.inf)
            shown = exact != -torch.inf
            difference = (fast - exact).abs().masked_fill(~shown, 0)
            into_score.copy_(torch.maximum(into_score, difference.amax((-2, -1))[0]))
            weights = fast.softmax(-1).nan_to_num(0), exact.softmax(-1).nan_to_num(0)
            into_variation[..., begin : begin + size] = 0.5 * (weights[0] - weights[1]).abs().sum(-1)[0]
        made.seen[lanes.batch] = lanes.seen[0, 0, 0, rows]
    return made
