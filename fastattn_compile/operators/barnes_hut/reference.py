"""Barnes-Hut attention as it is defined: one dense softmax over near keys, sinks, opened leaves and pooled
closed nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.barnes_hut.choice import choose_nodes, near_blocks, taken_tokens
from fastattn_compile.operators.barnes_hut.config import BarnesHutConfig
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, masked_softmax, ungrouped


def _of_rows(chosen: Tensor, config: BarnesHutConfig, length: int) -> Tensor:
    """``(b, g, c, groups, N)`` as ``(b, g, c, n, N)``."""
    return chosen.repeat_interleave(config.group, -2)[..., :length, :]


def barnes_hut_attention(config: BarnesHutConfig, inputs: AttentionInputs) -> AttentionOutput:
    """Dense Barnes-Hut attention, differentiable for its choice; O(n^2) time and memory.

    Args:
        config: The configuration.
        inputs: The tensors; queries and keys stand at the same positions.
    """
    query, key, value = grouped(inputs)
    length = query.shape[3]
    place = torch.arange(length, device=query.device)
    if inputs.key_padding is not None:
        hidden = ~inputs.key_padding[:, None, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    sink, taken = taken_tokens(inputs, config.sinks)
    levels = choose_nodes(config, inputs)
    leaves = _of_rows(levels[0].opened, config, length).repeat_interleave(config.leaf, -1)[..., :length]
    near = near_blocks(place[:, None], place, config.block) | sink[:, None, None]
    met = near[:, :, None] | (leaves & taken[:, None, None, None])
    keys, values, visible = [key], [value], [inputs.visible(place)[:, :, None] & met]
    bias = [torch.zeros(1, length, dtype=key.dtype, device=key.device)]
    if config.rest == "pool":
        part = taken[:, None, None, :, None]
        for level in levels:
            owner = (
                place // level.width == torch.arange(level.begin.numel(), device=place.device)[:, None]
            ).to(key.dtype)
            count = owner @ part.to(key.dtype)
            keys.append(owner @ key.masked_fill(~part, 0) / count.clamp(min=1))
            values.append(owner @ value.masked_fill(~part, 0) / count.clamp(min=1))
            visible.append(_of_rows(level.closed, config, length))
            bias.append(count.clamp(min=1).log()[:, 0, 0, :, 0])
    scores = inputs.scale * (query @ torch.cat(keys, -2).mT)
    rows = max(x.shape[0] for x in bias)
    scores = scores + torch.cat([x.expand(rows, -1) for x in bias], -1)[:, None, None, None]
    shape = scores.shape[:-1]
    weights, log_sum_exp = masked_softmax(scores, torch.cat([x.expand(*shape, -1) for x in visible], -1))
    return ungrouped(inputs, weights @ torch.cat(values, -2), log_sum_exp)
