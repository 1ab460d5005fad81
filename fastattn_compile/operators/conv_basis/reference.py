"""Conv-basis attention as it is defined: a dense softmax over scores whose columns copy anchor columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv_anchors import segment_of
from fastattn_compile.kernels.aten.conv_pattern import Pattern, real_span, select
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, masked_softmax, ungrouped


def slid(content: Tensor, bounds: Tensor, uncovered: float | None) -> tuple[Tensor, Tensor]:
    """The lower triangle with every column replaced by the left anchor column slid down the diagonal.

    ``H[i, j] = S[i - (j - s), s]`` with ``s`` the anchor of the segment that holds ``j`` (specification
    section 2).

    Args:
        content: ``(b, g, r, n, n)`` scores ``S``.
        bounds: ``(b, g, r, k + 1)`` boundaries of the segments.
        uncovered: Score of the columns of the first segment when it has no anchor.

    Returns:
        Scores ``(b, g, r, n, n)``, meaningful at and below the diagonal, and which columns belong to a
        segment, ``(b, g, r, 1, n)``.
    """
    n = content.shape[-1]
    place = torch.arange(n, device=content.device)
    segment = segment_of(bounds, n)
    anchor = bounds.gather(-1, segment.clamp(min=0)).clamp(max=n - 1).unsqueeze(-2)
    row = (place[:, None] - place + anchor).clamp(0, n - 1)
    index = (row * n + anchor).flatten(-2).expand(*content.shape[:3], n * n)
    scores = content.flatten(-2).gather(-1, index).view(content.shape)
    if uncovered is not None:
        scores = scores.masked_fill((segment == 0).unsqueeze(-2), uncovered)
    return scores, (segment >= 0).unsqueeze(-2)


def conv_attention(
    pattern: Pattern,
    inputs: AttentionInputs,
    offset_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> AttentionOutput:
    """Dense conv-basis attention, differentiable; O(n^2) memory.

    With ``pattern.formula`` the scores are those of the conv basis and their derivatives those of the exact
    scores: the gradient formula of softmax attention with the fast weights in it (specification 7A).

    Args:
        pattern: Anchors and band.
        inputs: The tensors; queries and keys stand at the same positions.
        offset_bias: ``(h, 2 n - 1)`` added score of ``i - j = -(n - 1) .. n - 1``.
        key_bias: ``(b or 1, h or 1, n)`` added score of every key.
    """
    query, key, value = grouped(inputs)
    groups, group, n = query.shape[1], query.shape[2], query.shape[3]
    place = torch.arange(n, device=query.device)
    offset = place[:, None] - place
    hidden = torch.zeros(query.shape[0], n, dtype=torch.bool, device=query.device)
    if inputs.key_padding is not None:
        hidden = hidden | ~inputs.key_padding
    if key_bias is not None:
        hidden = hidden | (key_bias == -torch.inf).all(1)
    query, key, value = (x.masked_fill(hidden[:, None, None, :, None], 0) for x in (query, key, value))

    content = inputs.scale * (query @ key.mT)
    chosen = select(pattern, query.detach(), key.detach(), inputs.scale, *real_span(hidden))
    scores, covered = slid(content, *chosen)
    turned = query.detach().flip(3), key.detach().flip(3)
    chosen = select(pattern, *turned, inputs.scale, *real_span(hidden.flip(1)))
    upper, upper_covered = (x.flip(-2, -1) for x in slid(content.flip(-2, -1), *chosen))
    scores = torch.where(offset >= 0, scores, upper)
    visible = torch.where(offset >= 0, covered, upper_covered) & inputs.visible(place).unsqueeze(2)
    visible = visible & ~hidden[:, None, None, None, :]
    if pattern.formula:
        scores = content + (scores - content).detach()
    if offset_bias is not None:
        scores = scores + offset_bias.to(scores.dtype)[:, offset + n - 1].unflatten(0, (groups, group))
    if key_bias is not None:
        finite = key_bias.masked_fill(key_bias == -torch.inf, 0).to(scores.dtype)
        spread = finite.expand(-1, groups * group, -1).unflatten(1, (groups, group)).unsqueeze(-2)
        present = (
            (key_bias != -torch.inf)
            .expand(-1, groups * group, -1)
            .unflatten(1, (groups, group))
            .unsqueeze(-2)
        )
        scores, visible = scores + spread, visible & present
    if pattern.uncovered == "zeros":
        visible = visible & (scores.detach() != -torch.inf)
    weights, log_sum_exp = masked_softmax(scores, visible)
    return ungrouped(inputs, weights @ value, log_sum_exp)
