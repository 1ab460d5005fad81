"""Conv-basis attention by fast Fourier transforms: O(k n log n) a value channel, no n x n tensor.

A transform's error is a fraction of the largest number in it, while rows of attention differ in size by many
orders. So rows are bucketed by magnitude: all rows of a bucket have their largest score within ``width``
below its top, every profile enters as ``exp(u - top)`` with the scores above the top left out, which no row
of the bucket can see (they would be its largest). All terms are positive (segment form, specification section
4), nothing is ever subtracted.

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
    # Rounding may put a row's largest score a little above the number that its bucket was chosen by.
    return shifted.masked_fill(shifted > 1e-3, -torch.inf).exp_()


def _segments(side: Side) -> Iterator[tuple[int, Tensor]]:
    """Terms that hold a column in some lane, with their columns as ``(b, g, r, 1, n)``."""
    for term in range(side.terms):
        inside = (side.segment == term).unsqueeze(-2)
        if bool(inside.any()):
            yield term, inside


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
        size = transform_length(side)
        total: dict[int, Tensor] = {}
        turned = side.turn(x)
        for term, inside in _segments(side):
            spectrum = torch.fft.rfft(turned * inside, size)
            for level in buckets.live:
                weights = _weights(side.profile[..., term, :], buckets.top(level))
                product = spectrum * torch.fft.rfft(weights, size).unsqueeze(-2)
                total[level] = total[level].add_(product) if level in total else product
        for level, spectrum in total.items():
            rows = side.turn(torch.fft.irfft(spectrum, size)[..., :n])
            out += rows * (buckets.level == level).unsqueeze(-2)
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
        size = transform_length(side)
        spectra = {
            a: torch.fft.rfft(side.turn(x * (buckets.level == a).unsqueeze(-2)), size) for a in buckets.live
        }
        for term, inside in _segments(side):
            total: Tensor | None = None
            for level, spectrum in spectra.items():
                weights = _weights(side.profile[..., term, :], buckets.top(level))
                product = spectrum * torch.fft.rfft(weights, size).conj().unsqueeze(-2)
                total = product if total is None else total.add_(product)
            if total is not None:
                out += side.turn(torch.fft.irfft(total, size)[..., :n] * inside)
    return out


def forward(
    sides: Sequence[Side], value: Tensor, weight: Tensor, seen: Tensor, buckets: Buckets
) -> tuple[Tensor, Tensor, bool]:
    """Output and log-sum-exp, without the logarithm of the largest key weight.

    Args:
        sides: The triangles of the scores.
        value: ``(b, g, 1, n, e)``, 0 at hidden keys.
        weight: ``(b, g or 1, r or 1, n)`` factor of every key, 0 for hidden ones.
        seen: ``(b, 1, 1, n)`` rows that see a key.
        buckets: The rows' buckets.

    Returns:
        ``(b, g, r, n, e)``, ``(b, g, r, n)``, and whether every row stands clear of the noise of the
        transforms.
    """
    x = torch.cat([value.mT, torch.ones_like(value[..., :1]).mT], -2) * weight.unsqueeze(-2)
    sums = weighted_sums(sides, x, buckets)
    mass = sums[..., -1, :]
    # The error of a transform is spread evenly: 4 standard deviations of it, where half the digits must
    # remain.
    unit = torch.finfo(mass.dtype).eps
    noise = 4 * unit * math.sqrt(math.log2(2 * mass.shape[-1])) * _largest_mean_square(mass, buckets)
    trusted = bool(((mass * math.sqrt(unit) > noise) | ~seen).all()) and bool(torch.isfinite(sums).all())
    mass = mass.masked_fill(~seen, 1)
    out = (sums[..., :-1, :] / mass.unsqueeze(-2)).masked_fill(~seen.unsqueeze(-2), 0)
    log_sum_exp = (mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + buckets.tops()).masked_fill(
        ~seen, -torch.inf
    )
    return out.mT, log_sum_exp, trusted


def _largest_mean_square(mass: Tensor, buckets: Buckets) -> Tensor:
    """Root mean square of the sums of every row's bucket: ``(b, g, r, n)``."""
    scale = torch.zeros_like(mass)
    for level in buckets.live:
        here = buckets.level == level
        mean = (mass.square() * here).mean(-1, keepdim=True).sqrt()
        scale += mean * here
    return scale


def _scaled_rows(x: Tensor, log_sum_exp: Tensor, buckets: Buckets) -> Tensor:
    """``x * exp(top - log_sum_exp)`` row by row, 0 for rows that see no key; ``x`` is ``(b, g, r, c, n)``."""
    empty = log_sum_exp == -torch.inf
    factor = (buckets.tops() - log_sum_exp.masked_fill(empty, 0)).exp().masked_fill(empty, 0)
    return x * factor.unsqueeze(-2)


def backward(
    sides: Sequence[Side],
    value: Tensor,
    weight: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    rho: Tensor,
    buckets: Buckets,
    slopes: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the profiles, the values and the logarithms of the key weights (specification 7B).

    Args:
        sides: The triangles of the scores.
        value: ``(b, g, 1, n, e)``, 0 at hidden keys.
        weight: ``(b, g or 1, r or 1, n)``.
        log_sum_exp: ``(b, g, r, n)`` as ``forward`` gave it.
        grad_out: ``(b, g, r, n, e)``.
        rho: ``(b, g, r, n)``, ``<grad_out, out> - grad_log_sum_exp``.
        buckets: The rows' buckets, of a finite width.
        slopes: Whether the gradients of the profiles are wanted.

    Returns:
        Of every side ``(b, g, r, k, n)`` (no sides when not wanted); values ``(b, g, 1, n, e)``; ``(b, g, r,
        n)``.
    """
    upstream = torch.cat([grad_out.mT, -rho.unsqueeze(-2)], -2)
    scaled = _scaled_rows(upstream, log_sum_exp, buckets)
    columns = transposed_sums(sides, scaled, buckets) * weight.unsqueeze(-2)
    grad_value = columns[..., :-1, :].sum(2, keepdim=True).mT
    grad_weight = (columns[..., :-1, :] * value.mT).sum(-2) + columns[..., -1, :]
    if not slopes:
        return [], grad_value, grad_weight
    x = torch.cat([value.mT, torch.ones_like(value[..., :1]).mT], -2) * weight.unsqueeze(-2)
    return [_slopes(side, x, scaled, buckets) for side in sides], grad_value, grad_weight


def _slopes(side: Side, x: Tensor, scaled: Tensor, buckets: Buckets) -> Tensor:
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


def formula_gradients(
    sides: Sequence[Side],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    weight: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    rho: Tensor,
    buckets: Buckets,
    channels: int = 4096,
) -> tuple[Tensor, Tensor]:
    """The gradient formula of softmax attention with the fast weights in it (specification 7A).

    ``dQ = s (sum_c diag(G_c) P (V_c o K) - diag(rho) P K)`` and ``dK = s (sum_c diag(V_c) P^T (G_c o Q) - P^T
    diag(rho) Q)``: ``e * d`` channels through the operator, in portions of value channels.

    Args:
        sides: The triangles of the scores.
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        value: ``(b, g, 1, n, e)``, 0 at hidden keys.
        scale: Factor on the scores.
        weight: ``(b, g or 1, r or 1, n)``.
        log_sum_exp: ``(b, g, r, n)``.
        grad_out: ``(b, g, r, n, e)``.
        rho: ``(b, g, r, n)``.
        buckets: The rows' buckets, of a finite width.
        channels: Channels that go through the operator at a time.

    Returns:
        ``(b, g, r, n, d)`` and ``(b, g, 1, n, d)``.
    """
    q, k = query.mT, key.mT
    d, e = q.shape[-2], value.shape[-1]
    # The last channel pair carries -rho and 1: dS = P o (G V^T - rho 1^T) has rank e + 1.
    left = torch.cat([grad_out.mT, -rho.unsqueeze(-2)], -2)
    right = torch.cat([value.mT, torch.ones_like(value[..., :1]).mT], -2)
    grad_query, grad_key = torch.zeros_like(q), torch.zeros_like(q)
    portion = max(1, channels // d)
    for begin in range(0, e + 1, portion):
        some_left, some_right = (x[..., begin : begin + portion, :].unsqueeze(-2) for x in (left, right))
        keys = (some_right * k.unsqueeze(-3)).flatten(3, 4) * weight.unsqueeze(-2)
        met = _scaled_rows(weighted_sums(sides, keys, buckets), log_sum_exp, buckets)
        grad_query += (some_left * met.unflatten(3, (-1, d))).sum(3)
        queries = _scaled_rows((some_left * q.unsqueeze(-3)).flatten(3, 4), log_sum_exp, buckets)
        met = transposed_sums(sides, queries, buckets) * weight.unsqueeze(-2)
        grad_key += (some_right * met.unflatten(3, (-1, d))).sum(3)
    return scale * grad_query.mT, scale * grad_key.sum(2, keepdim=True).mT
