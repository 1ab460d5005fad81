"""What conv-basis attention costs, counted from its definition (specification section 10)."""

from __future__ import annotations

import math

import torch

from fastattn_compile.kernels.aten.conv import fft_flops, gather_flops, prefers_gather
from fastattn_compile.kernels.aten.conv_anchors import strided
from fastattn_compile.kernels.aten.conv_pattern import Pattern, triangles
from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.conv_basis.config import ConvBasisConfig
from fastattn_compile.operators.exact.cost import traffic


def anchor_places(pattern: Pattern, n: int) -> list[int]:
    """Where anchors stand in a sequence without padding; those that content decides are taken to stand evenly.

    Args:
        pattern: The pattern.
        n: Tokens, at least one.
    """
    first, stop = torch.zeros(1, dtype=torch.int64), torch.full((1,), n)
    sinks = pattern.sinks if pattern.anchors == "sink_strided" else 0
    bounds = strided(first, stop, min(pattern.terms, n), sinks, pattern.stride).flatten().tolist()
    return [place for place in dict.fromkeys(bounds) if place < n]


def conv_cost(config: ConvBasisConfig, pattern: Pattern, spec: SiteSpec) -> Cost:
    """Finding anchors, their columns, and the sums in the form that the lengths call for; one bucket of rows.

    Args:
        config: The configuration.
        pattern: Anchors and band at the site.
        spec: The site.
    """
    n, d, e = int(spec.key_len), int(spec.head_dim), int(spec.value_dim)
    sides = triangles(pattern, n)
    places = anchor_places(pattern, n)
    count = len(places)
    longest = max(stop - start for start, stop in zip(places, [*places[1:], n]))
    products = float(sum(n - start for start in places))
    probes = 0.0
    if pattern.anchors == "recover":
        probes = float(count * pattern.probe * math.ceil(math.log2(max(2, n))))
    elif pattern.anchors == "jumps":
        probes = float(pattern.probe * n)
    tiles = pattern.form == "gather" or (pattern.form == "auto" and prefers_gather(pattern, n, e))
    alike = pattern.share or pattern.anchors in ("strided", "sink_strided")
    group = spec.heads // spec.kv_heads if alike else 1
    sums = (
        gather_flops(n, e)
        if tiles
        else fft_flops(n, pattern.terms, e, len(sides), sharing=group, longest=longest)
    )
    heads = spec.batch * spec.heads
    anchors = len(sides) * 2.0 * d * (products + probes)
    # Profiles are written once and read once, 8 bytes a number.
    moved = traffic(spec) + 16.0 * heads * len(sides) * count * n
    return Cost(heads * (anchors + sums), moved, len(sides) * (products + probes) / n)


def low_rank_cost(features: int, block: int, spec: SiteSpec) -> Cost:
    """Products with features in blocks, and the pairs of the blocks on a boundary of the mask.

    Args:
        features: Monomials of the polynomial.
        block: Rows of a block.
        spec: The site.
    """
    n, channels = int(spec.key_len), int(spec.value_dim) + 1
    heads = float(spec.batch * spec.heads)
    # Every end of a row's range falls into a block, whose pairs are computed one by one.
    near_keys = min(n, block * ((spec.mask.left is not None) + (spec.mask.right is not None)))
    near = 2.0 * near_keys * (spec.head_dim + channels)
    far = 4.0 * features * channels
    return Cost(
        heads * n * (near + far),
        traffic(spec),
        float(near_keys + features / max(1, int(spec.head_dim))),
    )
