"""What fast multipole attention costs, counted from its definition."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import traffic, visible_pairs
from fastattn_compile.operators.fma.config import FmaConfig, level_count
from fastattn_compile.operators.mask import MaskStructure


def _overlap(low: Tensor, high: Tensor, begin: Tensor | int, end: Tensor | int) -> Tensor:
    """Positions that ``low..high`` and ``begin..end`` (all inclusive) share."""
    upper = torch.minimum(high, torch.as_tensor(end))
    return (upper - torch.maximum(low, torch.as_tensor(begin)) + 1).clamp(min=0)


def near_pairs(config: FmaConfig, mask: MaskStructure, length: int) -> int:
    """Pairs of a query and a fine key: the near field, and the sinks outside of it.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence.
    """
    place = torch.arange(length)
    block = torch.div(place, config.block, rounding_mode="floor")
    low = torch.zeros(length, dtype=torch.int64) if mask.left is None else place - mask.left
    high = torch.full((length,), length - 1) if mask.right is None else place + mask.right
    low, high = low.clamp(0), high.clamp(max=length - 1)
    begin, end = (block - 1) * config.block, (block + 2) * config.block - 1
    near = _overlap(low, high, begin, end)
    sinks = _overlap(low, high, 0, config.sinks - 1)
    both = _overlap(torch.maximum(low, begin), torch.minimum(high, end), 0, config.sinks - 1)
    return int((near + sinks - both).sum())


def _rows_of_group(
    config: FmaConfig, mask: MaskStructure, place: Tensor, group: Tensor, width: int, length: int
) -> Tensor:
    """How many rows of a group each query sees; 0 where the group does not exist."""
    exists = (group >= 0) & (group * width < length)
    start = group * width
    if config.basis == "mean":
        part = width // config.rank
        rows = torch.arange(config.rank)
        first = start[:, None] + rows * part
        last = first + part - 1
    else:
        first, last = start[:, None], start[:, None] + width - 1
    last = last.clamp(max=length - 1)
    seen = (last >= first) & (last >= config.sinks)
    if mask.left is not None:
        seen &= first >= place[:, None] - mask.left
    if mask.right is not None:
        seen &= last <= place[:, None] + mask.right
    per_query = seen.sum(1) if config.basis == "mean" else seen[:, 0] * config.rank
    return torch.where(exists, per_query, 0)


def far_pairs(config: FmaConfig, mask: MaskStructure, length: int) -> int:
    """Pairs of a query and a pooled row.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence.
    """
    place = torch.arange(length)
    total = 0
    for level in range(level_count(length, config.block)):
        width = config.block << level
        group = torch.div(place, width, rounding_mode="floor")
        parent, second = torch.div(group, 2, rounding_mode="floor"), group % 2
        for other in (-2, -1, 2, 3):
            met = 2 * parent + other
            if mask.causal:
                allowed = (second >= other + 2) if other < 0 else torch.zeros_like(second, dtype=torch.bool)
            else:
                allowed = (met - group).abs() > 1
            seen = _rows_of_group(config, mask, place, met, width, length)
            total += int((seen * allowed).sum())
    return total


@lru_cache(maxsize=1024)
def pairs(config: FmaConfig, mask: MaskStructure, length: int) -> tuple[int, int]:
    """Near and far pairs of one head without padding.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence.
    """
    if level_count(length, config.block) == 0:
        return visible_pairs(mask, length, length), 0
    return near_pairs(config, mask, length), far_pairs(config, mask, length)


def multipole_cost(config: FmaConfig, spec: SiteSpec) -> Cost:
    """Two products a pair, and the pooling of keys and values, done once a key head."""
    length = int(spec.key_len)
    near, far = pairs(config, spec.mask.positional, length)
    channels = spec.head_dim + spec.value_dim
    attention = 2.0 * spec.batch * spec.heads * (near + far) * channels
    levels = level_count(length, config.block)
    # Means add every token once and then halve; learned rows read every token at every level.
    per_token = (1 if levels else 0) if config.basis == "mean" else 2 * config.rank * levels
    pooling = float(spec.batch * spec.kv_heads * length * per_token * channels)
    learned = 0
    if config.basis == "depthwise":
        learned = sum(channels * config.rank * ((config.block << level) + 1) for level in range(levels))
    moved = traffic(spec) + learned * spec.dtype.itemsize
    return Cost(attention + pooling, moved, (near + far) / max(1, length))
