"""Local attention on ATen: every query meets the keys near it and a few sinks, in tiles of query rows, O(n)
memory.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``u = b * g`` units, ``r = h // g`` query heads of a
unit, ``n`` queries, ``m`` keys, ``d`` channels of query and key, ``e`` of value. A tile is ``Local.rows``
queries of every head of a unit; its keys are the sinks, then ``before + rows + after`` consecutive positions.
``LocalTiles`` is also the near field of operators that add a far field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.window_bias import local_bias
from fastattn_compile.kernels.tiles import (
    SCORE_TILE,
    all_finite,
    normalise,
    poison,
    probabilities_,
    statistics_dtype,
    without_nonfinite,
    work_dtype,
)

Near = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Local:
    """Which keys a query meets.

    Args:
        rows: Queries of a tile.
        before: Positions a tile reaches back from its first query; a multiple of ``rows``.
        after: Positions a tile reaches ahead of its last query; a multiple of ``rows``.
        near: Whether a query at a position is near a key at another; both integer tensors that broadcast.
        left: Largest distance back that the site's mask shows; ``None`` is unbounded.
        right: Largest distance ahead that the site's mask shows; ``None`` is unbounded.
        sinks: First real tokens that every query meets as far as the mask shows them.
        offset: Position of the first query.
    """

    rows: int
    before: int
    after: int
    near: Near
    left: int | None
    right: int | None
    sinks: int
    offset: int = 0

    @property
    def span(self) -> int:
        """Consecutive key positions of a tile."""
        return self.before + self.rows + self.after

    def shown(self, place: Tensor, keys: Tensor) -> Tensor:
        """Whether the site's mask shows keys to queries, by position; integer tensors that broadcast."""
        distance = keys - place
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            seen &= distance >= -self.left
        if self.right is not None:
            seen &= distance <= self.right
        return seen


@dataclass(frozen=True)
class Band:
    """The keys from ``left`` positions back to ``right`` positions ahead."""

    left: int
    right: int

    def __call__(self, place: Tensor, keys: Tensor) -> Tensor:
        """Whether keys are near queries, by position."""
        return (keys - place >= -self.left) & (keys - place <= self.right)


def window_rows(query_len: int, left: int, right: int) -> int:
    """Queries of a tile for a band: enough for a product of some size, few against the band they share."""
    wanted = min(128, max(32, (left + right + 1) // 2))
    return max(1, min(wanted, query_len))


@dataclass(frozen=True)
class Tile:
    """Some blocks of queries of some units, and what they see.

    Args:
        units: Units.
        blocks: Blocks of ``Local.rows`` queries.
        visible: ``(units or 1, blocks, rows, sinks + span)`` boolean.
    """

    units: slice
    blocks: slice
    visible: Tensor

    def seen(self, scores: Tensor) -> Tensor:
        """``visible`` for every query head, shape of ``scores`` ``(units * blocks, r * rows, keys)``."""
        units = self.units.stop - self.units.start
        wide = self.visible.expand(units, -1, -1, -1).flatten(0, 1)
        return wide[:, None].expand(-1, scores.shape[1] // wide.shape[1], -1, -1).reshape(scores.shape)


class LocalTiles:
    """The tiling of one attention.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, e)``.
        local: What is near.
        key_padding: ``(b, m)`` boolean, true where a token is real.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, local: Local, key_padding: Tensor | None
    ) -> None:
        self.local = local
        self.batch, heads, self.length, _ = query.shape
        self.kv_heads, self.keys = key.shape[1:3]
        self.units, self.group = self.batch * self.kv_heads, heads // self.kv_heads
        self.blocks = -(-self.length // local.rows)
        self.dtype = work_dtype(query, key, value)
        self.padding = None if key_padding is None else ~key_padding[:, None, :, None]
        device = key.device
        real = (
            key_padding
            if key_padding is not None
            else torch.ones(1, self.keys, dtype=torch.bool, device=device)
        )
        rank = real.cumsum(-1)
        wanted = torch.arange(1, local.sinks + 1, device=device).expand(real.shape[0], -1).contiguous()
        place = torch.searchsorted(rank, wanted)
        self.sinks_exist = place < self.keys
        self.sink_place = place.clamp(max=self.keys - 1)
        self.fine = real & (rank > local.sinks)

    def array(self, x: Tensor) -> Tensor:
        """Keys or values as ``(u, m, c)`` in the work type, 0 at padding."""
        x = x.to(self.dtype)
        if self.padding is not None:
            x = x.masked_fill(self.padding, 0)
        return x.flatten(0, 1)

    def stretched(self, array: Tensor) -> Tensor:
        """``(u, m, c)`` laid out so that block ``i`` begins at row ``i * rows`` with its ``before``
        positions."""
        local = self.local
        first, front = max(0, local.offset - local.before), max(0, local.before - local.offset)
        total = local.before + self.blocks * local.rows + local.after
        body = array[:, first : first + total - front]
        return F.pad(body, (0, 0, front, total - front - body.shape[1]))

    def sink_rows(self, array: Tensor) -> Tensor:
        """The sinks of ``(u, m, c)`` as ``(u, sinks, c)``."""
        return array.gather(1, self.of_units(self.sink_place)[..., None].expand(-1, -1, array.shape[2]))

    def tiles(self, extra: int = 0) -> Iterator[Tile]:
        """Walks over all queries; a tile's scores stay in cache.

        Args:
            extra: Keys a query meets besides the local ones.
        """
        local = self.local
        size = self.group * local.rows * (local.sinks + local.span + extra)
        blocks = min(self.blocks, max(1, SCORE_TILE // size))
        units = min(self.units, max(1, SCORE_TILE // (size * blocks)))
        for first in range(0, self.blocks, blocks):
            span = slice(first, min(first + blocks, self.blocks))
            visible = self._visible(span)
            for unit in range(0, self.units, units):
                chosen = slice(unit, min(unit + units, self.units))
                yield Tile(chosen, span, visible if visible.shape[0] == 1 else visible[chosen])

    def places(self, blocks: slice) -> Tensor:
        """Positions of the queries of some blocks, ``(blocks, rows)``."""
        rows = self.local.rows
        place = torch.arange(blocks.start * rows, blocks.stop * rows, device=self.fine.device)
        return (place + self.local.offset).unflatten(0, (-1, rows))

    def queries(self, x: Tensor, tile: Tile, fill: float = 0.0) -> Tensor:
        """The tile's part of ``(b, h, n, c)`` as ``(units * blocks, r * rows, c)``; ``fill`` beyond the last
        query."""
        rows = self.local.rows
        first, last = tile.blocks.start * rows, min(tile.blocks.stop * rows, self.length)
        if self.units == tile.units.stop - tile.units.start:
            part = x[:, :, first:last].reshape(self.units, self.group, last - first, -1)
        else:
            part = x.reshape(self.units, self.group, self.length, -1)[tile.units, :, first:last]
        part = part.to(self.dtype)
        if last < tile.blocks.stop * rows:
            part = F.pad(part, (0, 0, 0, tile.blocks.stop * rows - last), value=fill)
        return part.unflatten(2, (-1, rows)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def gather(self, stretched: Tensor, sinks: Tensor, tile: Tile) -> Tensor:
        """Keys or values of a tile, ``(units * blocks, sinks + span, c)``."""
        local = self.local
        rows = stretched[
            tile.units, tile.blocks.start * local.rows : (tile.blocks.stop - 1) * local.rows + local.span
        ]
        windows = rows.unfold(1, local.span, local.rows).transpose(2, 3)
        together = sinks[tile.units, None].expand(-1, windows.shape[1], -1, -1)
        return torch.cat([together, windows], 2).flatten(0, 1)

    def empty(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Room for results of all queries, ``(u, r, blocks, rows, channels)``."""
        shape = (self.units, self.group, self.blocks, self.local.rows, channels)
        return torch.empty(shape, dtype=dtype, device=self.fine.device)

    def store(self, room: Tensor, tile: Tile, x: Tensor) -> None:
        """Writes ``(units * blocks, r * rows, c)`` into ``room``."""
        units = tile.units.stop - tile.units.start
        parts = x.unflatten(0, (units, -1)).unflatten(2, (self.group, -1)).transpose(1, 2)
        room[tile.units, :, tile.blocks] = parts.to(room.dtype)

    def results(self, room: Tensor) -> Tensor:
        """``room`` as ``(b, h, n, c)``, contiguous."""
        flat = room.flatten(2, 3)[:, :, : self.length]
        return flat.reshape(self.batch, -1, self.length, room.shape[-1]).contiguous()

    def scatter(self, grads: Tensor, sink_grads: Tensor, tile: Tile, x: Tensor) -> None:
        """Adds gradients of what ``gather`` gave to those of the stretched array and of the sinks."""
        local = self.local
        split = x.unflatten(0, (tile.units.stop - tile.units.start, -1))
        sink_grads[tile.units] += split[:, :, : local.sinks].sum(1)
        for side in range(local.span // local.rows):
            target = grads[
                tile.units, (tile.blocks.start + side) * local.rows : (tile.blocks.stop + side) * local.rows
            ]
            begin = local.sinks + side * local.rows
            target.unflatten(1, (-1, local.rows)).add_(split[:, :, begin : begin + local.rows])

    def tokens(self, grads: Tensor, sink_grads: Tensor) -> Tensor:
        """Gradients of the stretched array and of the sinks as those of ``array``, ``(u, m, c)``."""
        local = self.local
        first, front = max(0, local.offset - local.before), max(0, local.before - local.offset)
        body = grads[:, front : front + self.keys - first]
        total = F.pad(body, (0, 0, first, self.keys - first - body.shape[1]))
        # Sinks stand at different places; those that do not exist bring 0.
        place = self.of_units(self.sink_place)[..., None].expand(-1, -1, total.shape[2])
        return total.scatter_add_(1, place, sink_grads)

    def results_of_keys(self, tokens: Tensor) -> Tensor:
        """``(u, m, c)`` as ``(b, g, m, c)``, 0 at padding."""
        shaped = tokens.unflatten(0, (self.batch, -1))
        return shaped if self.padding is None else shaped.masked_fill(self.padding, 0)

    def of_units(self, x: Tensor) -> Tensor:
        """``(b or 1, ...)`` as ``(u, ...)``."""
        wide = x.expand(self.batch, *x.shape[1:])
        return wide[:, None].expand(-1, self.kv_heads, *x.shape[1:]).flatten(0, 1)

    def _visible(self, blocks: slice) -> Tensor:
        local, device = self.local, self.fine.device
        place = self.places(blocks)[None, :, :, None]
        keys = place[:, :, :1, 0, None] - local.before + torch.arange(local.span, device=device)
        inside = (keys >= 0) & (keys < self.keys)
        fine = self.fine[:, keys.clamp(0, self.keys - 1).squeeze(0).squeeze(1)][:, :, None]
        near = local.near(place, keys) & local.shown(place, keys) & inside & fine
        sink = local.shown(place, self.sink_place[:, None, None]) & self.sinks_exist[:, None, None]
        batch = max(near.shape[0], sink.shape[0])
        visible = torch.cat([x.expand(batch, -1, -1, -1) for x in (sink, near)], -1)
        return visible if batch == 1 else self.of_units(visible)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, key_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Local attention.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, e)``.
        scale: Factor on the scores.
        local: What is near.
        key_padding: ``(b, m)`` boolean, true where a token is real.
        bias: Added by distance: ``(h,)`` slopes, ``(h, 2 N - 1)``, or ``None`` (``score_bias``).

    Returns:
        Output ``(b, h, n, e)``, the values' type, 0 where a query sees no key; log-sum-exp ``(b, h, n)``,
        float32
        (float64 for float64 values), -inf where a query sees no key.
    """
    tiles = LocalTiles(query, key, value, local, key_padding)
    keys, values = tiles.array(key), tiles.array(value)
    finite = all_finite(keys, values)
    given = [(tiles.stretched(x), tiles.sink_rows(x)) for x in (keys, values)]
    clean = given if finite else [(without_nonfinite(x), without_nonfinite(y)) for x, y in given]
    out = tiles.empty(value.shape[3], value.dtype)
    log_sum_exp = tiles.empty(1, statistics_dtype(value))
    added = local_bias(bias, tiles)
    for tile in tiles.tiles():
        k, v = (tiles.gather(*x, tile) for x in clean)
        scores = torch.bmm(tiles.queries(query, tile) * scale, k.mT)
        if added is not None:
            added.add(scores, tile)
        seen = tile.seen(scores)
        scores.masked_fill_(~seen, -torch.inf)
        weights = torch.empty_like(scores)
        lse = normalise(scores, weights)
        tile_out = torch.bmm(weights, v).masked_fill_(lse == -torch.inf, 0)
        if not finite:
            poison(tile_out, lse, seen, *(tiles.gather(*x, tile) for x in given))
        tiles.store(out, tile, tile_out)
        tiles.store(log_sum_exp, tile, lse)
    return tiles.results(out), tiles.results(log_sum_exp).squeeze(-1)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    local: Local,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``forward``; with P the weights, ``dS = P * (dO . v - dO . o + dlse)``.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        local: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        key_padding: As in ``forward``.
        bias: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type; that of a bias by distance, ``None`` for
        slopes and without a bias.
    """
    tiles = LocalTiles(query, key, value, local, key_padding)
    arrays = [without_nonfinite(tiles.array(x)) for x in (key, value)]
    (keys, key_sinks), (values, value_sinks) = ((tiles.stretched(x), tiles.sink_rows(x)) for x in arrays)
    grad_keys, grad_values = ((torch.zeros_like(x), torch.zeros_like(y)) for x, y in
                              ((keys, key_sinks), (values, value_sinks)))  # fmt: skip
    grad_query = tiles.empty(query.shape[3], query.dtype)
    slope = (grad_out.to(tiles.dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    added = local_bias(bias, tiles)
    for tile in tiles.tiles():
        k, v = tiles.gather(keys, key_sinks, tile), tiles.gather(values, value_sinks, tile)
        q, grad_o = tiles.queries(query, tile), tiles.queries(grad_out, tile)
        lse = tiles.queries(log_sum_exp[..., None], tile, -torch.inf)
        scores = torch.bmm(q * scale, k.mT)
        if added is not None:
            added.add(scores, tile)
        weights = probabilities_(scores.masked_fill_(~tile.seen(scores), -torch.inf), lse)
        tiles.scatter(*grad_values, tile, torch.bmm(weights.mT, grad_o))
        grad_scores = torch.bmm(grad_o, v.mT).sub_(tiles.queries(slope[..., None], tile))
        grad_scores.mul_(weights)
        if added is not None:
            added.take(grad_scores, tile)
        grad_scores.mul_(scale)
        tiles.scatter(*grad_keys, tile, torch.bmm(grad_scores.mT, q))
        tiles.store(grad_query, tile, torch.bmm(grad_scores, k))
    grad_key, grad_value = (tiles.results_of_keys(tiles.tokens(*x)) for x in (grad_keys, grad_values))
    of_bias = None if added is None or bias is None else added.gradient(bias.dtype)
    return tiles.results(grad_query), grad_key.to(key.dtype), grad_value.to(value.dtype), of_bias
