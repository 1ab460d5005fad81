"""The far field of a tree code on ATen: who speaks for a group of queries, what it opens, and the rows that it then meets.

Sizes as in ``barnes_hut_tree``; ``r`` query heads of a unit, ``rows`` the tokens of a unit followed, when closed nodes are
taken pooled, by its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.barnes_hut_tree import (
    Choice,
    TreePattern,
    build_tree,
    choose,
    query_features,
)
from fastattn_compile.kernels.tiles import without_nonfinite, work_dtype
from fastattn_compile.kernels.window_aten import LocalTiles


@dataclass(frozen=True)
class Met:
    """Rows that groups of queries meet beyond the near field.

    Args:
        rows: ``(u, c, g, k)`` row numbers of a unit.
        bias: ``(u, c, g, k)`` added to the scores: log of the tokens a row stands for, -inf for no row.
        shown: ``(u, c, g, group, k)`` boolean, what the mask shows each query of a group, or ``None`` for all.
    """

    rows: Tensor
    bias: Tensor
    shown: Tensor | None

    @property
    def exists(self) -> Tensor:
        """``(u, c, g, group or 1, k)`` boolean: what each query of a group meets."""
        real = (self.bias > -torch.inf)[..., None, :]
        return real if self.shown is None else real & self.shown


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
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, pattern: TreePattern, tiles: LocalTiles,
        pool: bool,
    ) -> None:  # fmt: skip
        self.query, self.keys, self.scale, self.pattern, self.tiles, self.pool = (
            query, keys, scale, pattern, tiles, pool,
        )  # fmt: skip
        self.length = keys.shape[1]
        self.choosers = 1 if pattern.share else tiles.group
        self.taken = tiles.of_units(tiles.fine)
        # The choice may be wider than the attention: values do not take part in it.
        self.tree = build_tree(pattern, keys, values if pool else None, self.taken)
        device = keys.device
        token = torch.arange(self.length, device=device)
        self._first, self._last = [token], [token]
        self._bias = torch.zeros_like(self.taken, dtype=keys.dtype).masked_fill_(~self.taken, -torch.inf)
        if pool:
            for number, level in enumerate(self.tree.levels):
                begin = torch.arange(level.log_count.shape[1], device=device) * pattern.width(number)
                self._first.append(begin)
                self._last.append((begin + pattern.width(number)).clamp(max=self.length) - 1)
            self._bias = torch.cat([self._bias, self.tree.counts.log()], 1)

    @property
    def slots(self) -> int:
        """Most rows a group meets."""
        opened = self.pattern.open * self.pattern.leaf
        if not self.pool:
            return opened
        fan = self.pattern.fanout
        levels = range(1, len(self.tree.levels))
        listed = sum(fan * (self.pattern.keep(x) + 2) for x in levels) + self.tree.levels[-1].log_count.shape[1]
        return opened + listed

    def arrays(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value rows, ``(u, rows, d)`` and ``(u, rows, e)``, as given: they may hold NaN."""
        if not self.pool or self.tree.values is None:
            return self.keys, values
        return torch.cat([self.keys, self.tree.keys], 1), torch.cat([values, self.tree.values], 1)

    def voices(self, first: Tensor) -> Tensor:
        """The queries that speak for groups, ``(u, c, g, v, d)``.

        Causal: the mean of the ``group`` queries that end with the group's first one, or some of them; nothing later, so
        that the choice is known when the first query of the group is. Else the group's own queries.

        Args:
            first: ``(g,)`` position of each group's first query.
        """
        size, samples = self.pattern.group, min(self.pattern.samples, self.pattern.group)
        steps = torch.arange(samples or size, device=first.device) * (size // samples if samples else 1)
        place = first[:, None] - steps if self.pattern.causal else first[:, None] + steps
        real = (place >= 0) & (place < self.tiles.length)
        dtype = work_dtype(self.query, self.keys)
        taken = self.query[:, :, place.clamp(0, self.tiles.length - 1)].to(dtype)
        taken = without_nonfinite(taken)
        if not samples:
            weight = real.to(dtype) / real.sum(-1, keepdim=True).clamp(min=1)
            taken = (taken * weight[..., None]).sum(-2, keepdim=True)
        units = taken.unflatten(1, (self.tiles.kv_heads, -1)).flatten(0, 1)
        if self.pattern.share:
            return units.transpose(1, 2).flatten(2, 3)[:, None]
        return units

    def choose(self, first: Tensor, units: slice = slice(None), rest: bool = False) -> Choice:
        """What groups of queries of some units open.

        Args:
            first: ``(g,)`` position of each group's first query.
            units: The units.
            rest: Whether the closed nodes are wanted.
        """
        voices = self.voices(first)[units]
        near = self._near_log_mass(voices, first, units) if self.pattern.tolerance else None
        return choose(self.pattern, self.tree.of(units), voices, self.scale, first, near, rest)

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
        if self.pattern.left is None and self.pattern.right in (None, 0):
            return Met(rows, bias, None)
        place = (first[:, None] + torch.arange(self.pattern.group, device=first.device))[..., None]
        begin, last = (torch.cat(x)[rows][..., None, :] for x in (self._first, self._last))
        local = self.tiles.local
        return Met(rows, bias, local.shown(place, begin) & local.shown(place, last))

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
        rows = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[2])).unflatten(1, choice.rest.shape[1:])
        scores = query_features(self.pattern, query, self.scale) @ rows.mT
        count = self.tree.counts[units].gather(1, nodes).view_as(choice.rest).log()
        count = count.masked_fill(~choice.closed, -torch.inf)
        return (scores + count[..., None, :]).logsumexp(-1)

    def scatter_nodes(self, grads: Tensor) -> Tensor:
        """Gradients of ``arrays`` as those of the tokens: a node's mean hands its own to its tokens in equal parts."""
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
        """Log mass of the near field and the sinks for the voices, as the first query of each group sees them."""
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
