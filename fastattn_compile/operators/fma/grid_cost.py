"""What fast multipole attention on a grid costs, counted from its definition."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import traffic
from fastattn_compile.operators.fma.config import FmaConfig
from fastattn_compile.operators.fma.grid_cells import (
    grid_levels,
    grid_of,
    grid_parameter_layout,
    part_grid,
    side_of,
)


def _along(length: int, width: int, parts: int, learned: bool) -> tuple[NDArray, NDArray]:
    """Of one axis: tokens of every cell, and along it how many parts of the cell hold tokens."""
    cells = -(-length // width)
    tokens = np.minimum(width, length - width * np.arange(cells))
    return tokens, np.full(cells, parts) if learned else -(-tokens // (width // parts))


def _met(tokens: NDArray, rows: NDArray, parents: bool) -> int:
    """Pairs along one axis of a token and a row of its cell's neighbourhood, or of its parent's."""
    total, cells = np.concatenate([[0], np.cumsum(rows)]), np.arange(len(tokens))
    first, last = (cells // 2 * 2 - 2, cells // 2 * 2 + 4) if parents else (cells - 1, cells + 2)
    reach = total[np.clip(last, 0, len(tokens))] - total[np.clip(first, 0, len(tokens))]
    return int((tokens * reach).sum())


@lru_cache(maxsize=256)
def grid_pairs(config: FmaConfig) -> tuple[int, int]:
    """Pairs of a query and a token it meets one by one, and of a query and a pooled row, without padding.

    Both neighbourhoods are products of one along each axis, so their pairs are too.

    Args:
        config: A configuration with a grid.
    """
    height, width = grid_of(config)
    length, levels, side = config.prefix + height * width, grid_levels(config), side_of(config)
    if levels == 0:
        return length * length, 0
    fine = 1
    for size in (height, width):
        tokens, _ = _along(size, side, 1, False)
        fine *= _met(tokens, tokens, parents=False)
    front = config.prefix * (length + height * width)
    far, learned, parts = 0, config.basis != "mean", part_grid(config)
    for level in range(levels):
        axes = [_along(size, side << level, part, learned) for size, part in zip((height, width), parts)]
        window, near = (math.prod(_met(*axis, parents=whole) for axis in axes) for whole in (True, False))
        far += window - near
    return fine + front, far


def grid_cost(config: FmaConfig, spec: SiteSpec) -> Cost:
    """Two products a pair, and the pooling of keys and values, done once a key head.

    Args:
        config: A configuration with a grid.
        spec: The site.
    """
    height, width = grid_of(config)
    near, far = grid_pairs(config)
    channels, levels = spec.head_dim + spec.value_dim, grid_levels(config)
    attention = 2.0 * spec.batch * spec.heads * (near + far) * channels
    # Means add every token once and then quarter; learned rows read every token at every level.
    per_token = min(1, levels) if config.basis == "mean" else 2 * config.rank * levels
    pooling = float(spec.batch * spec.kv_heads * height * width * per_token * channels)
    shapes = dict(grid_parameter_layout(config, spec.head_dim, spec.value_dim))
    learned = sum(math.prod(shape) for shape in shapes.values())
    moved = traffic(spec) + learned * spec.dtype.itemsize
    return Cost(attention + pooling, moved, (near + far) / (config.prefix + height * width))
