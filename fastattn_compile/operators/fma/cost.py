"""What fast multipole attention costs, counted from its definition."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import pairs_between, traffic, visible_pairs
from fastattn_compile.operators.fma.basis import parameter_layout
from fastattn_compile.operators.fma.config import FmaConfig, level_count
from fastattn_compile.operators.mask import MaskStructure


def near_pairs(config: FmaConfig, mask: MaskStructure, length: int) -> int:
    """Pairs of a query and a fine key: the near field, and the sinks outside of it.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence, more than two blocks.
    """
    m = config.block

    def near(block: int) -> int:
        rows = range(block * m, min((block + 1) * m, length))
        return pairs_between(mask, rows, range(max(0, (block - 1) * m), min((block + 2) * m, length)))

    # All blocks but the first and those at the end are alike.
    whole = length // m
    pairs = near(0) + (whole - 2) * near(1) + sum(near(b) for b in range(whole - 1, -(-length // m)))
    sinks = pairs_between(mask, range(2 * m, length), range(config.sinks))
    return pairs + sinks


def far_pairs(config: FmaConfig, mask: MaskStructure, length: int) -> int:
    """Pairs of a query and a pooled row.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence.
    """
    # Without a window all queries of a block see the same rows.
    windowed = mask.left is not None or (mask.right is not None and not mask.causal)
    place = np.arange(0, length, 1 if windowed else config.block)
    queries = np.minimum(1 if windowed else config.block, length - place)
    total = 0
    for level in range(level_count(length, config.block)):
        width = config.block << level
        if config.queries == "pooled":  # one query a group
            place = np.arange(0, length, width)
            queries = np.ones_like(place)
        own = place // width
        # The groups of the neighbouring parents, counted from the first child of the query's own parent.
        for other in (-2, -1) if mask.causal else (-2, -1, 2, 3):
            reach = mask.left if other < 0 else mask.right
            if reach is not None and reach < width:
                continue  # a whole group lies between
            group = own // 2 * 2 + other
            met = (own % 2 >= other + 2) if mask.causal else (np.abs(group - own) > 1)
            met &= (group >= 0) & (group * width < length)
            seen = _rows_seen(config, mask, place, group * width, width, length)
            total += int((queries * met * seen).sum())
    return total


def _rows_seen(
    config: FmaConfig, mask: MaskStructure, place: NDArray, start: NDArray, width: int, length: int
) -> NDArray:
    """How many rows of the group that begins at ``start`` each query sees."""
    if config.basis == "mean":
        cover, weight = width // config.rank, 1
        first = start[:, None] + cover * np.arange(config.rank)
    else:
        cover, weight = width, config.rank
        first = start[:, None]
    last = np.minimum(first + cover, length) - 1
    seen = (last >= first) & (last >= config.sinks)
    if mask.left is not None:
        seen &= first >= place[:, None] - mask.left
    if mask.right is not None:
        seen &= last <= place[:, None] + mask.right
    return weight * seen.sum(1)


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
    products = spec.head_dim**2 + spec.value_dim**2 if config.basis == "dense" else channels
    pooling = float(spec.batch * spec.kv_heads * length * per_token * products)
    if config.queries == "pooled":
        pooling += float(spec.batch * spec.heads * length * per_token * spec.head_dim)
    learned = 0
    for name, shape in parameter_layout(config, levels, spec.head_dim, spec.value_dim):
        learned += math.prod(shape)
        if config.basis == "recursive" and name.endswith("merge"):  # unfolded once a call, level by level
            pooling += sum(2.0 * math.prod(shape) * (config.block << level) for level in range(levels))
    moved = traffic(spec) + learned * spec.dtype.itemsize
    return Cost(attention + pooling, moved, (near + far) / max(1, length))
