"""Barnes-Hut attention on ATen: a few blocks of queries at a time, the near field by blocks, the far field by
gathered rows.

One softmax over sinks, near keys, keys of the opened leaves and, when wanted, pooled rows of the closed
nodes. The choice is made again in the backward pass and carries no gradient. Memory is O(n); gradients of
gathered rows come back by ``index_add_``, which on a GPU sums in any order unless deterministic algorithms
are on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut_far import FarField, Met
from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.aten.window import Local, LocalTiles, Tile
from fastattn_compile.kernels.tiles import (
    all_finite,
    normalise,
    poison,
    probabilities_,
    statistics_dtype,
    without_nonfinite,
)


def near_field(pattern: TreePattern) -> Local:
    """The own block and its neighbours, as far as the mask shows them."""
    block = pattern.block

    def near(place: Tensor, keys: Tensor) -> Tensor:
        own = torch.div(place, block, rounding_mode="floor")
        return (torch.div(keys, block, rounding_mode="floor") - own).abs() <= 1

    return Local(
        block, block, 0 if pattern.causal else block, near, pattern.left, pattern.right, pattern.sinks
    )


class _Attention:
    """What forward, backward and the estimate share: the tilings, and the way between them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
        key_padding: Tensor | None,
    ) -> None:  # fmt: skip
        self.pattern = pattern
        self.tiles = LocalTiles(query, key, value, near_field(pattern), key_padding)
        self.keys, self.values = self.tiles.array(key), self.tiles.array(value)
        self.finite = all_finite(self.keys, self.values)
        self.far = FarField(query, self.keys, self.values, scale, pattern, self.tiles, pool)
        self.given = self.far.arrays(self.values)
        self.rows = self.given if self.finite else tuple(without_nonfinite(x) for x in self.given)

    def walk(self) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles, with the first positions of their groups of queries."""
        for tile in self.tiles.tiles(extra=self.far.slots):
            yield tile, self.tiles.places(tile.blocks)[:, :: self.pattern.group].flatten()

    def to_groups(self, x: Tensor, tile: Tile) -> Tensor:
        """``(units * blocks, r * rows, k)`` as ``(units, c, groups, r / c * group, k)``."""
        group, choosers = self.pattern.group, self.far.choosers
        split = x.unflatten(0, (tile.units.stop - tile.units.start, -1)).unflatten(
            2, (choosers, -1, self._groups, group)
        )
        return split.permute(0, 2, 1, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3).contiguous()

    def from_groups(self, x: Tensor, tile: Tile) -> Tensor:
        """The way back."""
        split = x.unflatten(2, (-1, self._groups)).unflatten(4, (-1, self.pattern.group))
        return split.permute(0, 2, 1, 4, 3, 5, 6).flatten(2, 5).flatten(0, 1)

    def take(self, rows: Tensor, met: Met, tile: Tile) -> Tensor:
        """Rows that groups meet, ``(units, c, groups, k, channels)``."""
        chosen = self._flat(met, tile)
        return rows.flatten(0, 1).index_select(0, chosen).view(*met.rows.shape, rows.shape[2])

    def give(self, grads: Tensor, met: Met, tile: Tile, x: Tensor) -> None:
        """Adds gradients of what ``take`` gave to those of the rows."""
        grads.flatten(0, 1).index_add_(0, self._flat(met, tile), x.flatten(0, 3))

    def far_scores(self, q: Tensor, k: Tensor, met: Met, tile: Tile) -> Tensor:
        """Scores of the far rows, ``(units * blocks, r * rows, k)``; ``q`` is scaled."""
        scores = (self.to_groups(q, tile) @ k.mT).add_(met.bias[..., None, :])
        return self.from_groups(scores, tile)

    @property
    def _groups(self) -> int:
        return self.pattern.block // self.pattern.group

    def _flat(self, met: Met, tile: Tile) -> Tensor:
        unit = torch.arange(tile.units.start, tile.units.stop, device=met.rows.device)
        return (unit[:, None, None, None] * self.rows[0].shape[1] + met.rows).flatten()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: TreePattern,
    pool: bool,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Barnes-Hut attention.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides.
        key: ``(b, g, n, d)``; types may differ between the three, the work is done in float32 or float64.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: The pattern.
        pool: Whether closed nodes are met as pooled rows, or not at all.
        key_padding: ``(b, n)`` boolean, true where a token is real.

    Returns:
        Output ``(b, h, n, e)``, the values' type, contiguous, 0 where a query sees no key; log-sum-exp ``(b,
        h, n)``,
        float32 (float64 for float64 values), -inf where a query sees no key.
    """
    attention = _Attention(query, key, value, scale, pattern, pool, key_padding)
    tiles, finite = attention.tiles, attention.finite
    near = [(tiles.stretched(x), tiles.sink_rows(x)) for x in (attention.keys, attention.values)]
    clean = near if finite else [(without_nonfinite(x), without_nonfinite(y)) for x, y in near]
    out = tiles.empty(value.shape[3], value.dtype)
    log_sum_exp = tiles.empty(1, statistics_dtype(value))
    for tile, first in attention.walk():
        q = tiles.queries(query, tile) * scale
        k, v = (tiles.gather(*x, tile) for x in clean)
        met = attention.far.met(first, tile.units)
        far_k, far_v = (attention.take(x, met, tile) for x in attention.rows)
        near_scores = torch.bmm(q, k.mT)
        seen = tile.seen(near_scores)
        near_scores.masked_fill_(~seen, -torch.inf)
        scores = torch.cat([near_scores, attention.far_scores(q, far_k, met, tile)], -1)
        weights = torch.empty_like(scores)
        lse = normalise(scores, weights)
        near_weights, far_weights = weights.split([k.shape[1], far_k.shape[3]], -1)
        tile_out = torch.bmm(near_weights, v)
        tile_out += attention.from_groups(attention.to_groups(far_weights, tile) @ far_v, tile)
        tile_out.masked_fill_(lse == -torch.inf, 0)
        if not finite:
            poison(tile_out, lse, seen, *(tiles.gather(*x, tile) for x in near))
            far_out, far_lse = (attention.to_groups(x, tile) for x in (tile_out, lse))
            exists = (
                (met.bias > -torch.inf)[..., None, :].expand(-1, -1, -1, far_out.shape[3], -1).flatten(0, 2)
            )
            raw = (attention.take(x, met, tile).flatten(0, 2) for x in attention.given)
            poison(far_out.flatten(0, 2), far_lse.flatten(0, 2), exists, *raw)
            tile_out, lse = attention.from_groups(far_out, tile), attention.from_groups(far_lse, tile)
        tiles.store(out, tile, tile_out)
        tiles.store(log_sum_exp, tile, lse)
    return tiles.results(out), tiles.results(log_sum_exp).squeeze(-1)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: TreePattern,
    pool: bool,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for the choice it made: ``dS = P * (dO . v - dO . o + dlse)`` with P the
    weights.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        pool: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        key_padding: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type.
    """
    attention = _Attention(query, key, value, scale, pattern, pool, key_padding)
    tiles = attention.tiles
    clean = [without_nonfinite(x) for x in (attention.keys, attention.values)]
    near_k, near_v = [(tiles.stretched(x), tiles.sink_rows(x)) for x in clean]
    grad_near_k, grad_near_v = ([torch.zeros_like(x) for x in pair] for pair in (near_k, near_v))
    # Contiguous whatever the strides of the keys: gradients are added through a flat view of them.
    grad_far_k, grad_far_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in attention.rows)
    grad_query = tiles.empty(query.shape[3], query.dtype)
    slope = (grad_out.to(tiles.dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    for tile, first in attention.walk():
        q, grad_o = tiles.queries(query, tile), tiles.queries(grad_out, tile)
        lse = tiles.queries(log_sum_exp[..., None], tile, -torch.inf)
        slopes = tiles.queries(slope[..., None], tile)
        k, v = tiles.gather(*near_k, tile), tiles.gather(*near_v, tile)
        met = attention.far.met(first, tile.units)
        far_k, far_v = (attention.take(x, met, tile) for x in attention.rows)
        scaled = q * scale
        near_scores = torch.bmm(scaled, k.mT)
        weights = probabilities_(near_scores.masked_fill_(~tile.seen(near_scores), -torch.inf), lse)
        tiles.scatter(grad_near_v[0], grad_near_v[1], tile, torch.bmm(weights.mT, grad_o))
        grad_scores = torch.bmm(grad_o, v.mT).sub_(slopes).mul_(weights).mul_(scale)
        tiles.scatter(grad_near_k[0], grad_near_k[1], tile, torch.bmm(grad_scores.mT, q))
        grad_q = torch.bmm(grad_scores, k)
        far_weights = probabilities_(attention.far_scores(scaled, far_k, met, tile), lse)
        far_weights, group_o, group_slopes, group_q = (
            attention.to_groups(x, tile) for x in (far_weights, grad_o, slopes, q)
        )
        attention.give(grad_far_v, met, tile, far_weights.mT @ group_o)
        grad_scores = (group_o @ far_v.mT).sub_(group_slopes).mul_(far_weights).mul_(scale)
        attention.give(grad_far_k, met, tile, grad_scores.mT @ group_q)
        grad_q += attention.from_groups(grad_scores @ far_k, tile)
        tiles.store(grad_query, tile, grad_q)
    found = []
    for grad_near, grad_far, x in ((grad_near_k, grad_far_k, key), (grad_near_v, grad_far_v, value)):
        tokens = tiles.tokens(*grad_near) + attention.far.scatter_nodes(grad_far)
        found.append(tiles.results_of_keys(tokens).to(x.dtype))
    return tiles.results(grad_query), found[0], found[1]


def unopened_log_mass(
    query: Tensor, key: Tensor, scale: float, pattern: TreePattern, key_padding: Tensor | None = None
) -> Tensor:
    """Estimated logarithm of the softmax mass that stays closed, by the statistic of the pattern.

    With ``statistic="bound"`` it is an upper bound on that mass.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        key_padding: As in ``forward``.

    Returns:
        ``(b, h, n)``, -inf where nothing is closed.
    """
    attention = _Attention(query, key, key, scale, pattern, False, key_padding)
    tiles = attention.tiles
    room = tiles.empty(1, attention.keys.dtype)
    for tile, first in attention.walk():
        q = attention.to_groups(tiles.queries(query, tile), tile)
        mass = attention.far.unopened_log_mass(q, first, tile.units)
        tiles.store(room, tile, attention.from_groups(mass[..., None], tile))
    return tiles.results(room).squeeze(-1)


def choices(
    query: Tensor, key: Tensor, scale: float, pattern: TreePattern, rest: bool, key_padding: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What every group of queries opens, and what it leaves closed.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        rest: Whether the closed nodes are wanted.
        key_padding: As in ``forward``.

    Returns:
        ``(b * h / heads of a chooser, groups, open)`` int32 numbers of leaves, best first, -1 fills up; ``(b * h / heads
        of a chooser, groups, k)`` int32 numbers of the closed nodes, among the nodes of all levels, in any order, -1
        between them.
    """
    attention = _Attention(query, key, key, scale, pattern, False, key_padding)
    (units, length, _), group = attention.keys.shape, pattern.group

    def room(width: int) -> Tensor:
        shape = units, attention.far.choosers, -(-length // group), width
        return torch.full(shape, -1, dtype=torch.int32, device=query.device)

    found, closed = room(pattern.open), None
    for tile, first in attention.walk():
        first = first[first < length]
        choice = attention.far.choose(first, tile.units, rest)
        leaves = choice.leaves.int().masked_fill_(~choice.opened, -1)
        begin = int(first[0]) // group
        place = tile.units, slice(None), slice(begin, begin + len(first))
        found[place][..., : leaves.shape[3]] = leaves
        if choice.rest is not None and choice.closed is not None:
            closed = room(choice.rest.shape[3]) if closed is None else closed
            closed[place] = choice.rest.int().masked_fill_(~choice.closed, -1)
    return found.flatten(0, 1), None if closed is None else closed.flatten(0, 1)


def opened_keys(
    query: Tensor,
    key: Tensor,
    scale: float,
    pattern: TreePattern,
    rows: Tensor,
    key_padding: Tensor | None = None,
) -> Tensor:
    """Which far keys some queries meet one by one.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        rows: ``(r,)`` query positions.
        key_padding: As in ``forward``.

    Returns:
        ``(b, h, r, n)`` boolean.
    """
    attention = _Attention(query, key, key, scale, pattern, False, key_padding)
    tiles = attention.tiles
    met = attention.far.met(torch.div(rows, pattern.group, rounding_mode="floor") * pattern.group)
    found = torch.zeros(*met.rows.shape[:3], tiles.keys, dtype=torch.int8, device=key.device)
    found.scatter_reduce_(3, met.rows, (met.bias > -torch.inf).to(torch.int8), "amax")
    heads = found.bool().repeat_interleave(tiles.group // attention.far.choosers, 1)
    return heads.unflatten(0, (tiles.batch, -1)).flatten(1, 2)
