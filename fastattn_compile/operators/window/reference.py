"""Local window attention as it is defined: dense softmax attention with a narrower mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, grouped_bias, masked_softmax, ungrouped
from fastattn_compile.operators.window.config import WindowConfig


def sink_tokens(inputs: AttentionInputs, sinks: int) -> Tensor:
    """The first ``sinks`` real tokens of every sequence, ``(batch or 1, key_len)`` boolean."""
    real = inputs.key_padding
    if real is None:
        real = torch.ones(1, inputs.key.shape[2], dtype=torch.bool, device=inputs.key.device)
    return real & (real.cumsum(-1) <= sinks)


def window_keys(config: WindowConfig, inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """Which keys some queries meet.

    Args:
        config: The configuration.
        inputs: The tensors.
        rows: ``(r,)`` query positions.

    Returns:
        ``(batch or 1, 1, r, key_len)`` boolean.
    """
    query_len, key_len = inputs.query.shape[2], inputs.key.shape[2]
    keys = torch.arange(key_len, device=rows.device)
    near = config.band(inputs.mask).visible(rows[:, None], keys, query_len, key_len)
    return inputs.visible(rows) & (near | sink_tokens(inputs, config.sinks)[:, None, None])


def window_attention(config: WindowConfig, inputs: AttentionInputs) -> AttentionOutput:
    """Dense local attention, differentiable (Beltagy et al., arXiv 2004.05150; sinks: Xiao et al., arXiv
    2309.17453).

    Args:
        config: The configuration.
        inputs: The tensors.
    """
    query, key, value = grouped(inputs)
    if inputs.key_padding is not None:
        hidden = ~inputs.key_padding[:, None, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    met = window_keys(config, inputs, torch.arange(query.shape[3], device=query.device))[:, None]
    added = inputs.added(torch.arange(query.shape[3], device=query.device))
    scores = inputs.scale * (query @ key.mT) + grouped_bias(inputs, added)
    weights, log_sum_exp = masked_softmax(scores, met)
    return ungrouped(inputs, weights @ value, log_sum_exp)
