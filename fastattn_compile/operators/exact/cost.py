"""What exact attention costs, counted from the mask."""

from __future__ import annotations

import torch

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.mask import MaskStructure


def visible_pairs(mask: MaskStructure, query_len: int, key_len: int) -> int:
    """Number of (query, key) pairs that the position terms of a mask allow.

    Args:
        mask: An understood mask; padding and segments are not counted, they are facts of the data.
        query_len: Number of queries.
        key_len: Number of keys.
    """
    place = torch.arange(query_len, dtype=torch.int64)
    if mask.end_aligned:
        place += key_len - query_len
    low, high = torch.zeros_like(place), torch.full_like(place, key_len)
    if mask.left is not None:
        low = (place - mask.left).clamp(0, key_len)
    if mask.right is not None:
        high = (place + mask.right + 1).clamp(0, key_len)
    # What the prefix adds is what of it lies outside the band; a chunk then cuts both pieces.
    prefix_high = torch.full_like(place, min(mask.prefix or 0, key_len))
    first, last = torch.zeros_like(place), torch.full_like(place, key_len)
    if mask.chunk is not None:
        first = (torch.div(place, mask.chunk, rounding_mode="floor") * mask.chunk).clamp(0, key_len)
        last = (torch.div(place, mask.chunk, rounding_mode="floor") * mask.chunk + mask.chunk).clamp(
            0, key_len
        )

    def count(start: torch.Tensor, stop: torch.Tensor) -> int:
        return int((torch.minimum(stop, last) - torch.maximum(start, first)).clamp(min=0).sum())

    band = count(low, high)
    prefix = count(torch.zeros_like(place), prefix_high)
    both = count(low, torch.minimum(high, prefix_high))
    return band + prefix - both


def traffic(spec: SiteSpec) -> float:
    """Bytes of queries, keys, values and outputs, each moved once."""
    query_side = spec.heads * spec.query_len * (spec.head_dim + spec.value_dim)
    key_side = spec.kv_heads * spec.key_len * (spec.head_dim + spec.value_dim)
    return float(spec.batch * (query_side + key_side) * spec.dtype.itemsize)


def exact_cost(spec: SiteSpec) -> Cost:
    """Two products a visible pair; an opaque mask counts as none."""
    pairs = visible_pairs(spec.mask, int(spec.query_len), int(spec.key_len))
    flops = 2.0 * spec.batch * spec.heads * pairs * (spec.head_dim + spec.value_dim)
    return Cost(flops, traffic(spec), pairs / max(1, int(spec.query_len)))
