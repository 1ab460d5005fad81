"""Biases by distance in local attention on ATen: the stretch of keys around a block is alike everywhere, sinks are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.score_bias import ScoreBias, score_bias

if TYPE_CHECKING:
    from fastattn_compile.kernels.aten.window import LocalTiles, Tile


class LocalBias:
    """The bias of one attention, and its gradient.

    Args:
        bias: The bias.
        tiles: The tiling.
    """

    def __init__(self, bias: ScoreBias, tiles: LocalTiles) -> None:
        self._bias, self._tiles, local = bias, tiles, tiles.local
        device = tiles.fine.device
        stretch = torch.arange(local.span, device=device) - local.before
        self._stretch = stretch - torch.arange(local.rows, device=device)[:, None]
        self._near = bias.at(slice(None), self._stretch)  # (g, r, rows, span)
        self._gradient = bias.new_gradient(slice(None))
        self._near_gradient = None if self._gradient is None else torch.zeros_like(self._near)

    def _heads(self, tile: Tile) -> Tensor:
        """The key head of every unit of a tile."""
        units = torch.arange(tile.units.start, tile.units.stop, device=self._near.device)
        return units % self._tiles.kv_heads

    def _to_sinks(self, tile: Tile) -> Tensor:
        """Sink less query position, ``(units, blocks, rows, sinks)``."""
        place = self._tiles.places(tile.blocks)
        return self._tiles.of_units(self._tiles.sink_place)[tile.units, None, None] - place[..., None]

    def _split(self, x: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """``(units * blocks, r * rows, k)`` as ``(units, blocks, r, rows, k)``, sinks and stretch apart."""
        units = tile.units.stop - tile.units.start
        split = x.unflatten(0, (units, -1)).unflatten(2, (self._tiles.group, -1))
        sinks = self._tiles.local.sinks
        return split[..., :sinks], split[..., sinks:]

    def add(self, scores: Tensor, tile: Tile) -> None:
        """Adds the bias to ``(units * blocks, r * rows, sinks + span)``."""
        sinks, stretch = self._split(scores, tile)
        if sinks.shape[-1]:
            sinks += self._bias.at_each(self._heads(tile), self._to_sinks(tile)).transpose(1, 2)
        stretch += self._near[self._heads(tile), None]

    def take(self, grad_scores: Tensor, tile: Tile) -> None:
        """Adds the gradients of scores to that of the bias."""
        if self._near_gradient is None:
            return
        sinks, stretch = self._split(grad_scores, tile)
        if sinks.shape[-1]:
            apart = sinks.transpose(1, 2)
            self._bias.take_each(self._gradient, self._heads(tile), apart, self._to_sinks(tile))
        self._near_gradient.index_add_(0, self._heads(tile), stretch.sum(1))

    def gradient(self, dtype: torch.dtype) -> Tensor | None:
        """What was added up, ``(h, 2 N - 1)``; ``None`` when the bias gets no gradient. Asked for once."""
        if self._gradient is None or self._near_gradient is None:
            return None
        self._bias.take(self._gradient, self._near_gradient, self._stretch)
        return self._gradient.T.contiguous().to(dtype)


def local_bias(bias: Tensor | None, tiles: LocalTiles) -> LocalBias | None:
    """The bias that a tensor describes.

    Args:
        bias: ``(h,)`` slopes, ``(h, 2 N - 1)`` by distance, or ``None``.
        tiles: The tiling.
    """
    made = score_bias(bias, tiles.kv_heads, tiles.dtype)
    return None if made is None else LocalBias(made, tiles)
