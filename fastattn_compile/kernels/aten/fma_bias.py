"""Biases by distance in fast multipole attention on ATen: near tokens get theirs, a pooled row the mean of its tokens'.

A row that stands for tokens ``j`` gets ``log mean_j exp(b_ij)`` (specification 5.3), beside the logarithm of their number.
ALiBi's exponentials factor: what a query adds depends on its distance to the row, what the tokens of a row weigh among each
other does not, so that means weighted by it make the far field exact where keys agree. For numbers by distance the mean
over a row's positions is a table of its own for every level, and tokens weigh alike.

``u`` counts the key heads of a part, ``r`` the query heads of a key head, ``m`` tokens of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial, reduce

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_lists import Lists
from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan


def _places(lists: Lists, blocks: slice, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query positions ``(blocks, m, 1)`` and the first and last positions of slots, ``(blocks, 1, slots)``."""
    rows = range(blocks.start * block, blocks.stop * block)
    place = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=lists.index.device)
    return place.view(-1, block, 1), lists.first[blocks, None], lists.last[blocks, None]


class FarBias(ABC):
    """The bias of one part: some key heads of one sequence."""

    @abstractmethod
    def add(self, scores: Tensor, blocks: slice) -> None:
        """Adds what the queries of some blocks add to their slots: ``(u, r, blocks, m, slots)``, -inf where hidden."""

    def take(self, grad_scores: Tensor, blocks: slice) -> None:  # noqa: B027  not every bias is learned
        """Adds the gradients of scores, ``(u, r, blocks, m, slots)``, to that of the bias."""

    def gradient(self) -> Tensor | None:
        """What was added up, ``(tables, u * r)``; ``None`` when the bias gets no gradient."""
        return None


class Decay(FarBias):
    """ALiBi, every query head with keys of its own (``r`` is 1).

    Rows on either side of a query weigh their tokens towards it: without causality there are two sets of pooled rows, one
    for the queries behind them and one for those before.

    Args:
        slopes: ``(u,)``.
        lists: Of the sequence.
        plan: The plan.
        pattern: The pattern; it pools by means.
    """

    def __init__(self, slopes: Tensor, lists: Lists, plan: Plan, pattern: Pattern) -> None:
        self.slopes, self.lists, self.plan, self.pattern = slopes[:, None], lists, plan, pattern
        taken = torch.zeros(plan.blocks * pattern.block, dtype=torch.bool, device=slopes.device)
        taken[: plan.length] = True if lists.padding is None else ~lists.padding
        taken[lists.sinks] = False
        self._sides = [_Side(self.slopes, taken, plan, pattern, side == 1) for side in range(plan.sides)]
        share = lists.counts.log().masked_fill(lists.counts == 0, 0)
        fine = slopes.new_zeros(len(slopes), plan.fine_rows)
        self._log_mean = torch.cat([fine, *(side.log_mass - share for side in self._sides)], 1)
        self._log_mean.masked_fill_(self._log_mean == -torch.inf, 0)  # such rows are in no list

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The means as numbers.

        Returns:
            Weights of tokens in the finest rows ``(u, sides, blocks * m)``; of rows in the rows above them, and the
            logarithm of the mean of exponentials, seen from a row's nearest position, both ``(u, sides, plan.offsets[-1])``.
        """
        rows = self.plan.offsets[-1]
        within = torch.stack([side.within.flatten(1) for side in self._sides], 1)
        share = torch.stack([side.shares_above(rows) for side in self._sides], 1)
        return within, share, self._log_mean[:, self.plan.fine_rows :].unflatten(1, (-1, rows))

    def add(self, scores: Tensor, blocks: slice) -> None:
        """By the distance to the nearest position of a row, and what its tokens add up to there."""
        place, first, last = _places(self.lists, blocks, self.pattern.block)
        of_rows = self._log_mean[:, self.lists.index[blocks]][:, None, :, None]
        slopes = self.slopes[..., None, None, None]
        if self.pattern.causal:
            # What is seen stands behind: one number a query and one a row, counted from the block so that none is large.
            start = place[:, :1]
            scores += of_rows + slopes * (last - start)
            scores -= slopes * (place - start)
        else:
            scores += of_rows
            scores -= slopes * torch.maximum(place - last, first - place)

    def pool(self, tokens: Tensor, pooled: Tensor) -> None:
        """Fills the pooled rows ``(u, sides * plan.offsets[-1], c)`` with weighted means of tokens, 0 where none is."""
        for side, rows in zip(self._sides, pooled.split(self.plan.offsets[-1], 1)):
            side.pool(tokens, rows)

    def spread(self, pooled: Tensor, tokens: Tensor) -> None:
        """The transpose of ``pool``: gradients of rows, overwritten, are added to those of tokens."""
        for side, rows in zip(self._sides, pooled.split(self.plan.offsets[-1], 1)):
            side.spread(rows, tokens)


class _Side:
    """Weights of the tokens in the rows that queries on one side meet.

    Args:
        slopes: ``(u, 1)``.
        taken: ``(blocks * m,)`` boolean, the tokens that are pooled.
        plan: The plan.
        pattern: The pattern.
        behind: The queries stand before the rows, so that a row's first token is the nearest.
    """

    def __init__(self, slopes: Tensor, taken: Tensor, plan: Plan, pattern: Pattern, behind: bool) -> None:
        self.slopes, self.plan, self.cover = slopes, plan, pattern.block // pattern.rank
        self._finest = plan.blocks * pattern.rank if plan.levels else 0
        masses, self._shares = [], []
        if plan.levels:
            away = torch.arange(self.cover, device=slopes.device)
            away = away if behind else self.cover - 1 - away
            weights = (-slopes[..., None] * away).masked_fill(~taken.view(-1, self.cover), -torch.inf)
            mass = weights.logsumexp(-1)
            self.within = (weights - mass[..., None]).exp_().nan_to_num_(0)
            masses.append(
                torch.nn.functional.pad(mass, (0, plan.offsets[1] - self._finest), value=-torch.inf)
            )
        for level in range(1, plan.levels):
            step = slopes * (self.cover << (level - 1))
            halves = [masses[-1][:, 0::2], masses[-1][:, 1::2]]
            halves[int(behind)] = halves[int(behind)] - step
            masses.append(torch.logaddexp(*halves))
            shares = torch.stack(halves, 2) - masses[-1][..., None]
            self._shares.append(shares.exp_().nan_to_num_(0))
        self.log_mass = torch.cat(masses, 1) if masses else slopes.new_zeros(len(slopes), 0)

    def shares_above(self, rows: int) -> Tensor:
        shares = self.slopes.new_zeros(len(self.slopes), rows)
        for level, share in enumerate(self._shares):
            shares[:, self.plan.offsets[level] : self.plan.offsets[level + 1]] = share.flatten(1)
        return shares

    def pool(self, tokens: Tensor, rows: Tensor) -> None:
        offsets = self.plan.offsets
        for level in range(self.plan.levels):
            into = rows[:, offsets[level] : offsets[level + 1]]
            if level == 0:
                parts = tokens.unflatten(1, (self._finest, self.cover))
                into[:, : self._finest] = torch.einsum("upt,uptc->upc", self.within, parts)
                into[:, self._finest :] = 0
            else:
                below = rows[:, offsets[level - 1] : offsets[level]].unflatten(1, (-1, 2))
                torch.sum(below * self._shares[level - 1][..., None], 2, out=into)

    def spread(self, rows: Tensor, tokens: Tensor) -> None:
        offsets = self.plan.offsets
        for level in reversed(range(self.plan.levels)):
            grad = rows[:, offsets[level] : offsets[level + 1]]
            if level == 0:
                parts = tokens.unflatten(1, (self._finest, self.cover))
                parts.add_(self.within[..., None] * grad[:, : self._finest, None])
            else:
                below = rows[:, offsets[level - 1] : offsets[level]].unflatten(1, (-1, 2))
                below.add_(self._shares[level - 1][..., None] * grad[:, :, None])


class ByDistance(FarBias):
    """Numbers by distance, for near tokens and, as means over what rows cover, for every level.

    Args:
        tables: ``(u, r, tables)``: tables of ``2 N - 1`` numbers one after the other, for tokens and for each level.
        lists: Of the sequence.
        plan: The plan.
        pattern: The pattern.
    """

    def __init__(self, tables: Tensor, lists: Lists, plan: Plan, pattern: Pattern) -> None:
        self.tables, self.lists, self.pattern = tables, lists, pattern
        self._size = tables.shape[2] // (plan.levels + 1)
        slots = lists.index.shape[1]
        far = slots - pattern.near - pattern.sinks
        level = torch.zeros(slots, dtype=torch.int32, device=tables.device)
        if plan.levels:
            each = far // plan.levels
            level[slots - far :] = torch.arange(
                1, plan.levels + 1, dtype=torch.int32, device=tables.device
            ).repeat_interleave(each)
        self._begin = level[pattern.near :] * self._size
        # The near field stands alike around every block.
        inside = torch.arange(pattern.block, device=tables.device)[:, None]
        near = torch.arange(pattern.near, device=tables.device) - pattern.block - inside
        self._at_near = self._within(near)
        self._near = self._found(self._at_near)
        self._gradient: Tensor | None = None
        self._near_gradient = torch.zeros_like(self._near)

    def _within(self, distance: Tensor) -> Tensor:
        """Places of distances in a table."""
        most = self._size // 2
        return distance.clamp(-most, most).add_(most)

    def _found(self, where: Tensor) -> Tensor:
        """What stands at some places, ``(u, r, *where.shape)``."""
        return self.tables.index_select(2, where.flatten()).unflatten(2, where.shape)

    def _beyond(self, blocks: slice) -> Tensor:
        """Places of the slots after the near field in the tables, ``(blocks, m, slots)``."""
        place, first, _ = _places(self.lists, blocks, self.pattern.block)
        return self._within(first[..., self.pattern.near :] - place).add_(self._begin)

    def add(self, scores: Tensor, blocks: slice) -> None:
        """From the tables."""
        near = self.pattern.near
        scores[..., :near] += self._near[:, :, None]
        scores[..., near:] += self._found(self._beyond(blocks))

    def take(self, grad_scores: Tensor, blocks: slice) -> None:
        """Adds the gradients of scores, in a fixed order."""
        near = self.pattern.near
        self._near_gradient += grad_scores[..., :near].sum(2)
        self._add_up(grad_scores[..., near:], self._beyond(blocks))

    def _add_up(self, grads: Tensor, where: Tensor) -> Tensor:
        units, group, size = self.tables.shape
        if self._gradient is None:
            self._gradient = self.tables.new_zeros(size, units * group)
        return self._gradient.index_add_(0, where.flatten(), grads.flatten(2).flatten(0, 1).T)

    def gradient(self) -> Tensor:
        """What was added up; asked for once."""
        return self._add_up(self._near_gradient, self._at_near)


def row_cover(pattern: Pattern) -> int:
    """Tokens that a row of the lowest level spans."""
    return pattern.block if pattern.learned else pattern.block // pattern.rank


def level_tables(table: Tensor, cover: int, levels: int) -> Tensor:
    """The numbers of tokens, and of the rows of every level: the logarithm of the mean of their exponentials.

    Args:
        table: ``(h, 2 N - 1)``; distances beyond it have the number of the farthest one.
        cover: Tokens that a row of the lowest level spans.
        levels: Levels.

    Returns:
        ``(h, (levels + 1) * (2 N - 1))``; a row stands at the distance of its first position.
    """
    tables = [table]
    for count, step in _merges(cover, levels):
        parts = [partial(_moved, tables[-1], part * step) for part in range(count)]
        highest = reduce(torch.maximum, (part() for part in parts))
        total = torch.zeros_like(highest)
        for part in parts:
            total += (part() - highest).exp_()
        tables.append(highest + (total / count).log_())
    return torch.cat(tables, 1)


def level_tables_backward(tables: Tensor, gradient: Tensor, cover: int, levels: int) -> Tensor:
    """Gradient of the table, given those of ``level_tables``.

    Args:
        tables: What ``level_tables`` returned.
        gradient: Its gradient, the same shape.
        cover: As given.
        levels: As given.

    Returns:
        ``(h, 2 N - 1)``.
    """
    made, grads = (list(x.clone().chunk(levels + 1, 1)) for x in (tables, gradient))
    for level, (count, step) in reversed(list(enumerate(_merges(cover, levels)))):
        size = made[level].shape[1]
        for part in range(count):
            grad = (_moved(made[level], part * step) - made[level + 1]).exp_() * grads[level + 1] / count
            kept = max(0, size - part * step)
            grads[level][:, size - kept :] += grad[:, :kept]
            grads[level][:, -1] += grad[:, kept:].sum(1)
    return grads[0]


def _merges(cover: int, levels: int) -> list[tuple[int, int]]:
    """For every level, of how many numbers of the table before it one is the mean, and how far they stand apart."""
    return [(cover, 1) if level == 0 else (2, cover << (level - 1)) for level in range(levels)]


def _moved(table: Tensor, by: int) -> Tensor:
    """The table ``(h, size)`` from one distance on, its last number repeated."""
    by = min(by, table.shape[1] - 1)
    return torch.cat([table[:, by:], table[:, -1:].expand(-1, by)], 1)
