"""Softmax attention inside gathered clusters, forward and backward, a few clusters at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.kernels.tiles import SCORE_TILE, normalise, probabilities_


def _chunks(query: Tensor, key: Tensor) -> Iterator[slice]:
    heads, tiles, rows, _ = query.shape
    together = max(1, 4 * SCORE_TILE // max(1, heads * rows * key.shape[2]))
    return (slice(start, start + together) for start in range(0, tiles, together))


def _scores(query: Tensor, key: Tensor, scale: float, offset: Tensor) -> Tensor:
    return (query * scale @ key.mT).add_(offset[:, None, :])


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every cluster's queries over the cluster's keys.

    Args:
        query: ``(heads, tiles, rows, d)``.
        key: ``(heads, tiles, slots, d)``.
        value: ``(heads, tiles, slots, e)``.
        scale: Factor on the scores.
        offset: ``(tiles, slots)`` added to the score of a key; -inf for an empty slot.

    Returns:
        Output ``(heads, tiles, rows, e)``, 0 in a tile without keys; log-sum-exp ``(heads, tiles, rows)``,
        -inf there.
    """
    out = query.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = query.new_empty(query.shape[:3])
    for part in _chunks(query, key):
        scores = _scores(query[:, part], key[:, part], scale, offset[part])
        weights = torch.empty_like(scores)
        lse = normalise(scores, weights)
        out[:, part] = (weights @ value[:, part]).masked_fill_(lse == -torch.inf, 0)
        log_sum_exp[:, part] = lse.squeeze(-1)
    return out, log_sum_exp


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, offset: Tensor,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward`` with respect to query, key and value.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        offset: As in ``forward``; takes no gradient.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.

    Returns:
        Gradients of the shapes of query, key and value.
    """
    slope = (grad_out * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    for part in _chunks(query, key):
        scores = _scores(query[:, part], key[:, part], scale, offset[part])
        weights = probabilities_(scores, log_sum_exp[:, part, :, None])
        grad_value[:, part] = weights.mT @ grad_out[:, part]
        grad_scores = (grad_out[:, part] @ value[:, part].mT).sub_(slope[:, part, :, None]).mul_(weights)
        grad_query[:, part] = (grad_scores @ key[:, part]).mul_(scale)
        grad_key[:, part] = (grad_scores.mT @ query[:, part]).mul_(scale)
    return grad_query, grad_key, grad_value
