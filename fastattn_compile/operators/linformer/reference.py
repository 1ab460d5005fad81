"""Linformer as the paper writes it: dense and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import compute_dtype, grouped, masked_softmax, ungrouped


def linformer_attention(inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> AttentionOutput:
    """``softmax(scale * Q (E K)^T) (F V)`` (Wang et al., arXiv 2006.04768, equation 7).

    Keys and values of padding are 0, and a row that weighs no real token is not seen: a row of blocks beyond
    the end of a short sequence would otherwise draw attention to nothing.

    Args:
        inputs: The tensors of the site; bidirectional.
        parameters: ``E`` and ``F``, each ``(heads or 1, rank, max_length)``.

    Returns:
        The output, and the log-sum-exp over the projected rows.
    """
    dtype, length = compute_dtype(inputs), inputs.key.shape[2]
    query, key, value = grouped(inputs)
    for_keys, for_values = (p.to(dtype)[None, :, None, :, :length] for p in parameters)
    real = inputs.key_padding
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=query.device)
    hidden = ~real[:, None, None, :, None]
    key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    seen = ((for_keys != 0) & real[:, None, None, None]).any(-1)
    scores = inputs.scale * (query @ (for_keys @ key).mT)
    weights, log_sum_exp = masked_softmax(scores, seen[..., None, :])
    return ungrouped(inputs, weights @ (for_values @ value), log_sum_exp)
