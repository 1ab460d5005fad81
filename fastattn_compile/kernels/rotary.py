"""Rotary embeddings: what they did to vectors at known positions, undone and done again.

Pair ``i`` of channels is turned by ``position * base^(-2 i / channels)`` (Su et al., arXiv 2104.09864, equation 15).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """The rotation of the first channels of vectors, pair by pair, each at a position of its own.

    Args:
        cos: ``(..., length, pairs)``; ``None`` turns nothing.
        sin: Likewise.
        interleaved: Channels ``2 i, 2 i + 1`` are a pair, else ``i, i + pairs``.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False

    def undo(self, x: Tensor) -> Tensor:
        """The vectors ``(..., length, c)`` before the embedding; also how gradients go through ``redo``."""
        return x if self.cos is None or self.sin is None else self._turned(x, self.cos, -self.sin)

    def redo(self, x: Tensor) -> Tensor:
        """The way back; also how gradients go through ``undo``."""
        return x if self.cos is None or self.sin is None else self._turned(x, self.cos, self.sin)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = 2 * cos.shape[-1]
        first, second = (
            x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
            if self.interleaved
            else x[..., :turned].chunk(2, -1)
        )
        pairs = first * cos - second * sin, second * cos + first * sin
        made = torch.stack(pairs, -1).flatten(-2) if self.interleaved else torch.cat(pairs, -1)
        return made if turned == x.shape[-1] else torch.cat([made, x[..., turned:]], -1)


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Args:
        base: Of the frequencies, greater than 1.
        channels: How many of the first channels it turns, an even number.
        interleaved: Channels ``2 i, 2 i + 1`` are a pair, else ``i, i + channels / 2``.
    """

    base: float
    channels: int
    interleaved: bool = False

    def at(self, place: Tensor, dtype: torch.dtype) -> Turn:
        """What it does at some positions.

        Args:
            place: Positions ``(..., length)``, whole or not. Angles are found in float64: at large positions they would
                lose their fraction.
            dtype: Type of the rotations.
        """
        even = torch.arange(0, self.channels, 2, dtype=torch.float64, device=place.device)
        angles = place[..., None] * self.base ** (-even / self.channels)
        return Turn(angles.cos().to(dtype), angles.sin().to(dtype), self.interleaved)


def check_base(base: float) -> None:
    """Refuses what is neither 0 nor the base of a rotary embedding.

    Raises:
        ValueError: With what is expected.
    """
    if base and not (base > 1 and math.isfinite(base)):
        raise ValueError(f"rotary_base must be 0 (off) or a finite number greater than 1, got {base}")
