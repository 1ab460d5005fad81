"""Which cells of a grid meet which: the plan of fast multipole attention on images (specification 1.9).

The grid is covered by square cells of ``side`` tokens, four of which make a cell of the next level. A query meets the
tokens of its own and the eight cells around it; at every level it meets the cells below its parent's neighbourhood that
do not touch its own cell, by their pooled rows. Cells are numbered row after row, level after level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NEAR_CELLS, FAR_CELLS = 9, 27


@dataclass(frozen=True)
class GridPattern:
    """What a call computes.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        side: Rows and columns of a finest cell.
        parts: Down and across, in how many parts the mean of a cell is taken; their product is the rank.
        levels: Pooled levels, at least 1.
        prefix: Tokens in front of the grid, as keys.
        scale_attn: A pooled row counts as many keys as it stands for.
        learned: Rows are learned combinations of the tokens of a cell, not means of its parts.
    """

    height: int
    width: int
    side: int
    parts: tuple[int, int]
    levels: int
    prefix: int = 0
    scale_attn: bool = True
    learned: bool = False

    @property
    def rank(self) -> int:
        """Pooled rows of a cell."""
        return self.parts[0] * self.parts[1]

    @property
    def block(self) -> int:
        """Tokens of a finest cell."""
        return self.side * self.side

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.height * self.width

    def cells(self, level: int) -> tuple[int, int]:
        """Cells of a level, down and across; level 0 has the finest ones."""
        width = self.side << level
        return -(-self.height // width), -(-self.width // width)


@lru_cache(maxsize=64)
def level_offsets(pattern: GridPattern) -> tuple[int, ...]:
    """Where the cells of every level begin among the pooled cells; the last number counts them all."""
    offsets = [0]
    for level in range(pattern.levels):
        down, across = pattern.cells(level)
        offsets.append(offsets[-1] + down * across)
    return tuple(offsets)


@lru_cache(maxsize=8)
def _steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """To the 9 near cells ``(9, 2)``, and to the 27 far ones of a first or second child, down and across ``(4, 27, 2)``."""
    near = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    far = [
        [
            (y, x)
            for y in range(-2 - down, 4 - down)
            for x in range(-2 - across, 4 - across)
            if max(abs(y), abs(x)) > 1
        ]
        for down in (0, 1)
        for across in (0, 1)
    ]
    return torch.tensor(near, device=device), torch.tensor(far, device=device)


def met_cells(pattern: GridPattern, cells: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """What some finest cells meet.

    Args:
        pattern: The pattern.
        cells: Of the finest level.
        device: Of the results.

    Returns:
        Near cells ``(cells, 9)`` of the finest level; pooled cells ``(cells, 27 * levels)`` of all levels, in rising order.
        What lies outside the grid has the number after the last: of the near ones in its place, of the far ones at the end.
    """
    near_steps, far_steps = _steps(device)
    down, across = pattern.cells(0)
    number = torch.arange(cells.start, cells.stop, device=device)
    own = torch.stack([number // across, number % across], -1)
    near = own[:, None] + near_steps
    inside = ((near >= 0) & (near < near.new_tensor([down, across]))).all(-1)
    near_cells = torch.where(inside, near[..., 0] * across + near[..., 1], down * across)

    shift = torch.arange(pattern.levels, device=device)[:, None]
    at = own[:, None] >> shift
    far = at[:, :, None] + far_steps[at[..., 0] % 2 * 2 + at[..., 1] % 2]
    sizes = torch.tensor([pattern.cells(level) for level in range(pattern.levels)], device=device)
    offsets = level_offsets(pattern)
    begin = torch.tensor(offsets[:-1], device=device)[:, None]
    inside = ((far >= 0) & (far < sizes[:, None])).all(-1)
    found = torch.where(inside, begin + far[..., 0] * sizes[:, None, 1] + far[..., 1], offsets[-1])
    return near_cells, found.flatten(1).sort(1).values
