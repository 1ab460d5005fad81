"""The sums of conv-basis attention by fast Fourier transforms, bucket by bucket of rows.

A transform's error is a fraction of the largest number in it, while rows of attention differ in size by many
orders: every profile enters as ``exp(u - top)`` of the bucket of the rows that are wanted (``conv_fft``).

Sizes as in ``conv_anchors``; ``c`` channels stand before the tokens here, ``(b, g, r, c, n)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv_profiles import Side

# A row further below the largest score than this has no weight of any use; bounds the number of buckets
# tried.
_MOST_BUCKETS = 4096

# Numbers of all lanes and of some channels that are transformed together: few enough to stay in a cache.
_PORTION = 1 << 19
_FEWEST_CHANNELS = 4

# Rounding may put a row's largest score a little above the number that its bucket was chosen by.
ABOVE_TOP = 1e-3


@lru_cache(maxsize=1024)
def fast_length(least: int) -> int:
    """Smallest number of the form 2^a 3^b 5^c that is at least ``least``: lengths that transform fast."""
    best = 1 << max(0, least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            candidate = three << max(0, -(-least // three) - 1).bit_length()
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def transform_length(side: Side) -> int:
    """Length at which no product of profile and segment wraps: ``n + longest segment`` (section 5)."""
    longest = int((side.bounds[..., 1:] - side.bounds[..., :-1]).max())
    return fast_length(side.profile.shape[-1] + max(1, longest))


class Buckets:
    """Rows grouped by magnitude, lane by lane.

    Args:
        magnitude: ``(b, g, r, n)`` a number at least the largest score of every row; -inf for rows without a
            key.
        width: Nats a bucket spans; infinite for a single bucket.
    """

    def __init__(self, magnitude: Tensor, width: float) -> None:
        empty = magnitude == -torch.inf
        largest = magnitude.amax(-1, keepdim=True)
        self.largest = largest.masked_fill(largest == -torch.inf, 0)
        depth = torch.zeros_like(magnitude) if math.isinf(width) else (self.largest - magnitude) / width
        level = depth.masked_fill(empty, 0).floor().clamp(max=_MOST_BUCKETS).long()
        self.width = 0.0 if math.isinf(width) else width
        self.level = level.masked_fill(empty, -1)
        self.live: list[int] = [int(a) for a in self.level.unique() if a >= 0]

    def top(self, level: int) -> Tensor:
        """Upper end of a bucket: ``(b, g, r, 1)``."""
        return self.largest - level * self.width

    def tops(self) -> Tensor:
        """Upper end of every row's bucket: ``(b, g, r, n)``; of the first bucket for rows without a key."""
        return self.largest - self.level.clamp(min=0) * self.width


def _weights(profile: Tensor, top: Tensor) -> Tensor:
    """``exp(profile - top)``, 0 above the top, where no row of the bucket looks."""
    shifted = profile - top
    return shifted.masked_fill(shifted > ABOVE_TOP, -torch.inf).exp_()


def _segments(side: Side) -> Iterator[tuple[int, Tensor]]:
    """Terms that hold a column in some lane, with their columns as ``(b, g, r, 1, n)``."""
    for term in range(side.terms):
        inside = (side.segment == term).unsqueeze(-2)
        if bool(inside.any()):
            yield term, inside


class _Spectra:
    """Transforms of the profiles of one side; those of a single bucket are made once."""

    def __init__(self, side: Side, buckets: Buckets, size: int) -> None:
        self.side, self.buckets, self.size = side, buckets, size
        self.kept: dict[int, Tensor] = {}

    def __call__(self, term: int, level: int) -> Tensor:
        """``(b, g, r, 1, frequencies)`` of a term's profile under the top of a bucket."""
        if term in self.kept:
            return self.kept[term]
        weights = _weights(self.side.profile[..., term, :], self.buckets.top(level))
        made = torch.fft.rfft(weights, self.size).unsqueeze(-2)
        if len(self.buckets.live) == 1:
            self.kept[term] = made
        return made


def _portions(x: Tensor, lanes: int) -> Iterator[slice]:
    """Channels that are transformed together."""
    channels, n = x.shape[-2:]
    step = max(_FEWEST_CHANNELS, _PORTION // max(1, lanes * n))
    return (slice(start, start + step) for start in range(0, channels, step))


def weighted_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``sum_j exp(score_ij - top_i) x_j`` for every row, ``top_i`` the upper end of its bucket.

    Args:
        sides: The triangles of the scores.
        x: ``(b, g, r or 1, c, n)``, 0 at hidden keys.
        buckets: The rows' buckets.

    Returns:
        ``(b, g, r, c, n)``.
    """
    lanes, (c, n) = sides[0].profile.shape[:3], x.shape[3:]
    out = x.new_zeros(*lanes, c, n)
    for side in sides:
        size, segments = transform_length(side), list(_segments(side))
        spectra = _Spectra(side, buckets, size)
        for channels in _portions(x, lanes.numel()):
            total: dict[int, Tensor] = {}
            turned = side.turn(x[..., channels, :])
            for term, inside in segments:
                spectrum = torch.fft.rfft(turned * inside, size)
                for level in buckets.live:
                    product = spectrum * spectra(term, level)
                    total[level] = total[level].add_(product) if level in total else product
            for level, spectrum in total.items():
                rows = side.turn(torch.fft.irfft(spectrum, size)[..., :n])
                out[..., channels, :] += rows * (buckets.level == level).unsqueeze(-2)
    return out


def transposed_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``sum_i exp(score_ij - top_i) x_i`` for every column: correlations with the profiles.

    Args:
        sides: The triangles of the scores.
        x: ``(b, g, r, c, n)``.
        buckets: The rows' buckets.

    Returns:
        ``(b, g, r, c, n)``.
    """
    n = x.shape[-1]
    out = torch.zeros_like(x)
    for side in sides:
        size, segments = transform_length(side), list(_segments(side))
        profiles = _Spectra(side, buckets, size)
        for channels in _portions(x, x.shape[:3].numel()):
            some = x[..., channels, :]
            spectra = {
                a: torch.fft.rfft(side.turn(some * (buckets.level == a).unsqueeze(-2)), size)
                for a in buckets.live
            }
            for term, inside in segments:
                total: Tensor | None = None
                for level, spectrum in spectra.items():
                    product = spectrum * profiles(term, level).conj()
                    total = product if total is None else total.add_(product)
                if total is not None:
                    out[..., channels, :] += side.turn(torch.fft.irfft(total, size)[..., :n] * inside)
    return out


def slopes(side: Side, x: Tensor, scaled: Tensor, buckets: Buckets) -> Tensor:
    """``dL/du[tau] = e[tau] * sum over pairs of that offset of (grad . value - rho)``, bucket by bucket."""
    n, size = x.shape[-1], transform_length(side)
    turned = side.turn(x)
    upstream = {
        a: torch.fft.rfft(side.turn(scaled * (buckets.level == a).unsqueeze(-2)), size) for a in buckets.live
    }
    slope = torch.zeros_like(side.profile)
    for term, inside in _segments(side):
        spectrum = torch.fft.rfft(turned * inside, size).conj()
        for level, other in upstream.items():
            pairs = torch.fft.irfft((spectrum * other).sum(-2), size)[..., :n]
            slope[..., term, :] += _weights(side.profile[..., term, :], buckets.top(level)) * pairs
    return slope
