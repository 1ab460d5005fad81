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
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv_profiles import Side
from fastattn_compile.kernels.aten.conv_sums import Buckets
from fastattn_compile.kernels.conv_basis import slopes as profile_slopes
from fastattn_compile.kernels.conv_basis import transposed_sums, weighted_sums


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
    return [profile_slopes(side, x, scaled, buckets) for side in sides], grad_value, grad_weight


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
