"""Biases by distance while fast multipole attention decodes: what the rows of the state add to the scores of a query.

Sizes: ``b`` batch, ``h`` query heads, ``l`` levels, ``p`` rank, ``s`` exact rows. Positions count from the first token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_bias import level_tables
from fastattn_compile.kernels.aten.score_bias import Distances, ScoreBias, Slopes
from fastattn_compile.operators.fma.config import level_count


class DecodeBias(Protocol):
    """A bias, seen from one query."""

    def fine(self, place: Tensor, now: int) -> Tensor:
        """What exact rows at positions ``(b, s)`` add, ``(b, h, s)``."""

    def far(self, first: Tensor, now: int) -> Tensor:
        """What pooled rows that begin at ``(l, 2, p)`` add besides what their tokens weigh, ``(h, l, 2, p)``."""

    def weights(self, place: Tensor) -> Tensor | None:
        """How much tokens at positions ``(k,)`` count in the rows of every level, ``(h, l, k)``; alike when ``None``."""


def _fine(bias: ScoreBias, place: Tensor, now: int) -> Tensor:
    return bias.at(slice(None), place - now).flatten(0, 1).transpose(0, 1)


class DecodeSlopes:
    """ALiBi. A row's tokens are weighed from that end of it where they weigh most.

    Args:
        slopes: ``(h,)``.
        covers: ``(l,)`` tokens that a row of each level spans.
    """

    def __init__(self, slopes: Tensor, covers: Tensor) -> None:
        self._slopes, self._covers, self._fine = slopes, covers, Slopes(slopes[:, None])

    def fine(self, place: Tensor, now: int) -> Tensor:
        """``-slope * distance``."""
        return _fine(self._fine, place, now)

    def far(self, first: Tensor, now: int) -> Tensor:
        """``-slope * distance`` to the end that the weights are counted from."""
        covers = self._covers[:, None, None]
        last = first + covers - 1
        end = torch.where(self._slopes[:, None, None, None] >= 0, last, first)
        return -self._slopes[:, None, None, None] * (now - end)

    def weights(self, place: Tensor) -> Tensor:
        """Exponentials of the distance to that end; never above 1."""
        inside = place % self._covers[:, None]
        slopes = self._slopes[:, None, None]
        away = torch.where(slopes >= 0, self._covers[:, None] - 1 - inside, inside)
        return (-slopes.abs() * away).exp()


class DecodeTable:
    """Numbers by distance: they bound the length.

    Args:
        table: ``(h, 2 N - 1)``.
        covers: ``(l,)`` tokens that a row of each level spans.
        block: Tokens of a finest group.
    """

    def __init__(self, table: Tensor, covers: Tensor, block: int) -> None:
        self.longest, self._fine = table.shape[1] // 2 + 1, Distances(table[:, None])
        self._levels = min(len(covers), level_count(self.longest, block))
        self._tables = level_tables(table, int(covers[0]), self._levels).unflatten(1, (self._levels + 1, -1))

    def fine(self, place: Tensor, now: int) -> Tensor:
        """From the table."""
        return _fine(self._fine, place, now)

    def far(self, first: Tensor, now: int) -> Tensor:
        """From the tables of the levels that can hold rows."""
        added = self._tables.new_zeros(self._tables.shape[0], *first.shape)
        most = self.longest - 1
        for level in range(self._levels):
            where = (first[level] - now).clamp(-most, most) + most
            added[:, level] = self._tables[:, level + 1, where]
        return added

    def weights(self, place: Tensor) -> None:
        """Tokens count alike."""
        return
