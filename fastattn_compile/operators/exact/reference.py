"""Softmax attention as the textbook writes it: what every approximation is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput


def masked_softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights and log-sum-exp of dense scores.

    Args:
        scores: ``(..., queries, keys)``.
        visible: Boolean, broadcastable to ``scores``.

    Returns:
        Weights of the shape of ``scores``, 0 for a query that sees no key; log-sum-exp ``(..., queries)`` in
        float32 (float64 for float64 scores), -inf for such a query.
    """
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return weights, wide.logsumexp(-1)


def compute_dtype(inputs: AttentionInputs) -> torch.dtype:
    """The type a definition is evaluated in: the widest of the three inputs."""
    widest = torch.promote_types(inputs.query.dtype, inputs.key.dtype)
    return torch.promote_types(widest, inputs.value.dtype)


def grouped(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query as ``(b, g, h // g, n, d)``, key and value as ``(b, g, 1, m, d)``, in the type to compute in."""
    dtype = compute_dtype(inputs)
    query = inputs.query.to(dtype).unflatten(1, (inputs.key.shape[1], inputs.group))
    return query, inputs.key.to(dtype).unsqueeze(2), inputs.value.to(dtype).unsqueeze(2)


def grouped_bias(inputs: AttentionInputs, added: Tensor) -> Tensor:
    """A bias ``(1, heads or 1, ...)`` as ``(1, g or 1, h // g or 1, ...)``, in the type to compute in."""
    groups = (1, 1) if added.shape[1] == 1 else (inputs.key.shape[1], inputs.group)
    return added.to(compute_dtype(inputs)).unflatten(1, groups)


def ungrouped(inputs: AttentionInputs, out: Tensor, log_sum_exp: Tensor) -> AttentionOutput:
    """The results of grouped heads in the layout and types an operator returns."""
    wide = torch.float64 if inputs.value.dtype == torch.float64 else torch.float32
    return AttentionOutput(out.flatten(1, 2).to(inputs.value.dtype), log_sum_exp.flatten(1, 2).to(wide))


def exact_attention(inputs: AttentionInputs) -> AttentionOutput:
    """``softmax(scale * q k^T + bias + mask) v``, dense and differentiable (Vaswani et al. 2017, equation 1).

    Keys hidden by the mask are set to 0 first, so that what stands there (NaN in padding) cannot matter.
    """
    query, key, value = grouped(inputs)
    rows = torch.arange(query.shape[3], device=query.device)
    scores = inputs.scale * (query @ key.mT) + grouped_bias(inputs, inputs.added(rows))
    weights, log_sum_exp = masked_softmax(scores, inputs.visible(rows).unsqueeze(2))
    if inputs.key_padding is not None:
        value = value.masked_fill(~inputs.key_padding[:, None, None, :, None], 0)
    return ungrouped(inputs, weights @ value, log_sum_exp)
