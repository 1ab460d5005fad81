"""The far field of a tree code on ATen: who speaks for a group of queries, what it opens, and the rows that
it then meets.

Sizes as in ``barnes_hut_tree``; ``r`` query heads of a unit, ``rows`` the tokens of a unit followed, when
closed nodes are taken pooled, by its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut_tree import (
    Choice,
    TreePattern,
    build_tree,
    choose,
    query_features,
    voices_of,
)
from fastattn_compile.kernels.aten.window import LocalTiles
from fastattn_compile.kernels.tiles import without_nonfinite


@dataclass(frozen=True)
class Met:
    """Rows that groups of queries meet beyond the near field.

    Args:
        rows: ``(u, c, g, k)`` row numbers of a unit.
        bias: ``(u, c, g, k)`` added to the scores: log of the tokens a row stands for, -inf for no row.
    """

    rows: Tensor
    bias: Tensor


class FarField:
    """The tree of one attention and what is chosen from it.

    Args:
        query: ``(b, h, n, d)``.
        keys: ``(u, n, d)`` in the work type, 0 at padding.
        values: ``(u, n, e)`` likewise.
        scale: Factor on the scores.
        pattern: The pattern.
        tiles: The near field.
        pool: Whether closed nodes are met as pooled rows.
    """

    def __init__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, pattern: TreePattern,
        tiles: LocalTiles, pool: bool,
    ) -> None:  # fmt: skip
        self.query, self.keys, self.scale, self.pattern, self.tiles, self.pool = (
            query, keys, scale, pattern, tiles, pool,
        )  # fmt: skip
        self.length = keys.shape[1]
        self.choosers = 1 if pattern.share else tiles.group
        self.taken = tiles.of_units(tiles.fine)
        # The choice may be wider than the attention: values do not take part in it.
        self.tree = build_tree(pattern, keys, values if pool else None, self.taken)
        self._bias = torch.zeros_like(self.taken, dtype=keys.dtype).masked_fill_(~self.taken, -torch.inf)
        if pool:
            self._bias = torch.cat([self._bias, self.tree.counts.log()], 1)

    @property
    def slots(self) -> int:
        """Most rows a group meets."""
        opened = self.pattern.open * self.pattern.leaf
        if not self.pool:
            return opened
        fan = self.pattern.fanout
        levels = range(1, len(self.tree.levels))
        listed = (
            sum(fan * (self.pattern.keep(x) + 4) for x in levels) + self.tree.levels[-1].log_count.shape[1]
        )
        return opened + listed

    def arrays(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value rows, ``(u, rows, d)`` and ``(u, rows, e)``, as given: they may hold NaN."""
        if not self.pool or self.tree.values is None:
            return self.keys, values
        return torch.cat([self.keys, self.tree.keys], 1), torch.cat([values, self.tree.values], 1)

    def choose(self, first: Tensor, units: slice = slice(None), rest: bool = False) -> Choice:
        """What groups of queries of some units open.

        Args:
            first: ``(g,)`` position of each group's first query.
            units: The units.
            rest: Whether the closed nodes are wanted.
        """
        voices = voices_of(self.pattern, self.query, first, self.tiles.kv_heads)[units].to(self.keys.dtype)
        near = self._near_log_mass(voices, first, units) if self.pattern.tolerance else None
        return choose(
            self.pattern, self.tree.levels_of(units), voices, self.scale, first, self.length, near, rest
        )

    def met(self, first: Tensor, units: slice = slice(None)) -> Met:
        """The rows that groups of queries of some units meet."""
        choice = self.choose(first, units, rest=self.pool)
        leaf = self.pattern.leaf
        tokens = choice.leaves[..., None] * leaf + torch.arange(leaf, device=first.device)
        rows = tokens.flatten(-2)
        exists = choice.opened[..., None].expand_as(tokens).flatten(-2) & (rows < self.length)
        rows = rows.clamp(max=self.length - 1)
        if choice.rest is not None and choice.closed is not None:
            rows = torch.cat([rows, choice.rest + self.length], -1)
            exists = torch.cat([exists, choice.closed], -1)
        bias = self._bias[units].gather(1, rows.flatten(1)).view_as(rows).masked_fill_(~exists, -torch.inf)
        return Met(rows, bias)

    def unopened_log_mass(self, query: Tensor, first: Tensor, units: slice) -> Tensor:
        """Estimated log mass of what stays closed, for each query of some groups.

        Args:
            query: ``(u, c, g, q, d)`` queries of the groups.
            first: ``(g,)`` position of each group's first query.
            units: The units.

        Returns:
            ``(u, c, g, q)``, -inf where nothing is closed.
        """
        choice = self.choose(first, units, rest=True)
        assert choice.rest is not None and choice.closed is not None
        features = torch.cat([x.features for x in self.tree.levels], 1)[units]
        nodes = choice.rest.flatten(1)
        rows = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[2])).unflatten(
            1, choice.rest.shape[1:]
        )
        scores = query_features(self.pattern, query, self.scale) @ rows.mT
        count = self.tree.counts[units].gather(1, nodes).view_as(choice.rest).log()
        count = count.masked_fill(~choice.closed, -torch.inf)
        return (scores + count[..., None, :]).logsumexp(-1)

    def scatter_nodes(self, grads: Tensor) -> Tensor:
        """Gradients of ``arrays`` as those of the tokens: a node's mean hands its own to its tokens in equal
        parts."""
        total = grads[:, : self.length].clone()
        if not self.pool:
            return total
        nodes = grads[:, self.length :] / self.tree.counts.clamp(min=1)[..., None]
        for number, level in enumerate(self.tree.levels):
            part = nodes[:, level.first : level.first + level.log_count.shape[1]]
            wide = part.repeat_interleave(self.pattern.width(number), 1)[:, : self.length]
            total += wide.masked_fill(~self.taken[..., None], 0)
        return total

    def _near_log_mass(self, voices: Tensor, first: Tensor, units: slice) -> Tensor:
        """Log mass of the near field and the sinks for the voices, as the first query of each group sees
        them."""
        tiles, local, block = self.tiles, self.tiles.local, self.pattern.block
        begin = torch.div(first, block, rounding_mode="floor") * block - local.before
        place = begin[:, None] + torch.arange(local.span, device=first.device)
        fine = self.taken[units][:, place.clamp(0, self.length - 1)]
        near = local.shown(first[:, None], place) & (place >= 0) & (place < self.length) & fine
        sinks = tiles.of_units(tiles.sink_place)[units], tiles.of_units(tiles.sinks_exist)[units]
        sink_seen = local.shown(first[:, None], sinks[0][:, None]) & sinks[1][:, None]
        keys = without_nonfinite(self.keys[units])
        rows = keys[:, place.clamp(0, self.length - 1)]
        sink_rows = tiles.sink_rows(self.keys)[units]
        scaled = voices * self.scale
        of_sinks = scaled @ without_nonfinite(sink_rows)[:, None, None].mT
        scores = torch.cat([of_sinks, scaled @ rows[:, None].mT], -1)
        seen = torch.cat([sink_seen, near.expand(scores.shape[0], -1, -1)], -1)
        return scores.masked_fill(~seen[:, None, :, None], -torch.inf).logsumexp(-1)
