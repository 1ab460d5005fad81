"""Sizes of the grid form of fast multipole attention: sides of cells, levels, parts of a mean, parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.operators.fma.config import FmaConfig, level_count


def grid_of(config: FmaConfig) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: The configuration has no grid.
    """
    if config.grid is None:
        raise ValueError("this fma has no grid; give grid=(height, width)")
    return config.grid


def side_of(config: FmaConfig) -> int:
    """Rows and columns of a finest cell."""
    return math.isqrt(config.block)


def grid_levels(config: FmaConfig) -> int:
    """Pooled levels, ``max(0, ceil(log2(max(H, W) / side)) - 1)`` (specification 1.9)."""
    return level_count(max(grid_of(config)), side_of(config))


def part_grid(config: FmaConfig) -> tuple[int, int]:
    """Down and across, the parts of a cell whose means are its rows: ``rank`` in all, as square as the side allows.

    There always are some, because the rank divides ``side * side``.
    """
    side, rank = side_of(config), config.rank
    fitting = [
        (down, rank // down)
        for down in range(1, rank + 1)
        if rank % down == 0 and side % down == 0 and side % (rank // down) == 0
    ]
    return min(fitting, key=lambda parts: (abs(parts[0] - parts[1]), parts[0]))


def grid_parameter_layout(
    config: FmaConfig, head_dim: int, value_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the learned parameters, in order: weight and bias of keys and of values for every level.

    Args:
        config: The configuration.
        head_dim: Channels of a key.
        value_dim: Channels of a value.
    """
    if config.basis == "mean":
        return
    for level in range(grid_levels(config)):
        width = side_of(config) << level
        for name, channels in (("key", head_dim), ("value", value_dim)):
            yield f"{name}_weight_{level + 1}", (channels, config.rank, width, width)
            yield f"{name}_bias_{level + 1}", (channels, config.rank)


def grid_mean_start(config: FmaConfig, shape: tuple[int, ...]) -> Tensor:
    """What makes the rows means of the parts of a cell, without bias.

    Args:
        config: The configuration.
        shape: Of a weight or a bias, as ``grid_parameter_layout`` gives it.
    """
    start = torch.zeros(shape)
    if len(shape) == 4:
        width, (down, across) = shape[2], part_grid(config)
        place = torch.arange(width)
        part = (place * down // width)[:, None] * across + place * across // width
        start[:] = (part == torch.arange(config.rank)[:, None, None]) * (config.rank / width**2)
    return start
