"""What each block of queries meets in fast multipole attention, as tables of indices.

A head's keys (or values) stand in one array of rows: ``block`` rows of padding, the tokens up to a whole
number of blocks, ``block`` rows of padding, then the pooled rows level by level, ``2 * rank`` for every
parent. All queries of a block meet the same rows (specification 1.3), so one index table per length serves
every head: near field, sinks, then for every level the rows of the parent before the query's own and, without
causality, of the parent after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.kernels.rotary import Rotary


@dataclass(frozen=True)
class Pattern:
    """The numbers that decide who meets whom.

    Args:
        block: Tokens of a finest group.
        rank: Pooled rows of a group; divides ``block``.
        sinks: First real tokens that every query meets exactly.
        causal: Whether the causal lists hold, else the bidirectional ones.
        left: Largest distance back that is visible, ``None`` for any.
        right: Largest distance ahead that is visible, ``None`` for any; 0 when ``causal``.
        weighted: A pooled row counts as many keys as it stands for.
        learned: Every pooled row covers its whole group, else its part of the group.
        dense: Learned rows mix channels: weights ``(c, rank, c, width)`` in place of ``(c, rank, width)``.
        sides: Sets of pooled rows: 2 when the queries after a group and those before it meet rows of their own.
        rotary: The embedding without which keys are pooled, and that their rows get at their mean position.
        closed: The log-sum-exp is that of what a query meets; false where zero keys were added to it.
    """

    block: int
    rank: int
    sinks: int
    causal: bool
    left: int | None = None
    right: int | None = None
    weighted: bool = True
    learned: bool = False
    sides: int = 1
    dense: bool = False
    rotary: Rotary | None = None
    closed: bool = True

    @property
    def near(self) -> int:
        """Keys of the near field of a block."""
        return (2 if self.causal else 3) * self.block

    @property
    def banded(self) -> bool:
        """Whether a window cuts the lists, so that queries of one block may see different rows."""
        return self.left is not None or (self.right is not None and not self.causal)


@dataclass(frozen=True)
class Plan:
    """The lists of all blocks of a sequence.

    Args:
        length: Tokens.
        blocks: Blocks of queries.
        levels: Pooled levels.
        fine_rows: Rows of the array before the pooled ones.
        offsets: Where a level begins among the pooled rows; the last entry is their number.
        index: ``(blocks, slots)`` int32, rows of the array.
        met: ``(blocks, slots)`` boolean, whether a slot is used.
        first: ``(blocks, slots)`` int32, first position a slot covers.
        last: ``(blocks, slots)`` int32, last position a slot covers.
        sides: Sets of pooled rows, one after the other.
    """

    length: int
    blocks: int
    levels: int
    fine_rows: int
    offsets: tuple[int, ...]
    index: Tensor
    met: Tensor
    first: Tensor
    last: Tensor
    sides: int = 1

    @property
    def rows(self) -> int:
        """Rows of the whole array."""
        return self.fine_rows + self.sides * self.offsets[-1]

    def parents(self, level: int) -> int:
        """Parents of the groups of a level (counted from 0), in the array."""
        return 1 << (self.levels - level)


def level_count(length: int, block: int) -> int:
    """Pooled levels of a sequence."""
    return max(0, (-(-length // block) - 1).bit_length() - 1)


def sink_slots_met(position: Tensor, block: Tensor, pattern: Pattern) -> Tensor:
    """Whether a block of queries meets a sink through the sink slots: it lies outside the near field.

    Args:
        position: Positions of the sinks, ``(1, s)``.
        block: Numbers of the blocks, ``(blocks, 1)``.
        pattern: The pattern.
    """
    distance = block - torch.div(position, pattern.block, rounding_mode="floor")
    return distance > 1 if pattern.causal else distance.abs() > 1


@lru_cache(maxsize=16)
def make_plan(length: int, pattern: Pattern, device: torch.device) -> Plan:
    """The lists for a length. Cached: a model meets few lengths, and every layer and head shares them.

    Args:
        length: Tokens, at least 1.
        pattern: The pattern.
        device: Where the tables lie.
    """
    m = pattern.block
    blocks = -(-length // m)
    levels = level_count(length, m)
    offsets = [0]
    for level in range(levels):
        offsets.append(offsets[-1] + (2 * pattern.rank << (levels - level)))
    fine_rows = (blocks + 2) * m
    block = torch.arange(blocks, device=device)[:, None]

    near = block * m + torch.arange(pattern.near, device=device)
    sink = torch.arange(pattern.sinks, device=device).expand(blocks, -1)
    # Columns of index, met, first position, last position, from near to far.
    columns = [
        (near, (near >= m) & (near - m < length), near - m, near - m),
        (sink + m, sink_slots_met(sink, block, pattern), sink, sink),
    ]
    for level in range(levels):
        for side in (-1,) if pattern.causal else (-1, 1):
            begin = fine_rows + offsets[level] + (offsets[-1] if side > 0 and pattern.sides > 1 else 0)
            columns.append(_level_columns(block, level, side, begin, length, pattern))
    index, met, first, last = (torch.cat(parts, 1) for parts in zip(*columns))
    # A slot that is not met may point anywhere: let it point at padding, which is always there.
    index = torch.where(met, index, 0)
    index, first, last = (x.to(torch.int32) for x in (index, first, last))
    return Plan(length, blocks, levels, fine_rows, tuple(offsets), index, met, first, last, pattern.sides)


def _level_columns(
    block: Tensor, level: int, side: int, offset: int, length: int, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of the parents before (``side`` -1) or after (1) each block's own, at one level."""
    row = torch.arange(2 * pattern.rank, device=block.device)
    child = torch.div(row, pattern.rank, rounding_mode="floor")
    width = pattern.block << level
    parent, second = (block >> (level + 1)) + side, (block >> level) & 1
    group = 2 * parent + child
    if pattern.causal:
        allowed = child <= second
    else:
        # The child next to the block's own group is left out: it belongs to a finer level.
        allowed = (child == 0) | (second == 1) if side < 0 else (child == 1) | (second == 0)
    met = allowed & (parent >= 0) & (group * width < length)
    cover = width if pattern.learned else width // pattern.rank
    first = group * width + (0 if pattern.learned else row % pattern.rank * cover)
    index = offset + 2 * pattern.rank * parent + row
    return index, met, first, (first + cover).clamp(max=length) - 1
