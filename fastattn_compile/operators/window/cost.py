"""What local window attention costs, counted from its definition."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import traffic
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.window.config import WindowConfig


@lru_cache(maxsize=1024)
def window_pairs(config: WindowConfig, mask: MaskStructure, query_len: int, key_len: int) -> int:
    """Pairs of a query and a key it meets, of one head without padding.

    Args:
        config: The configuration.
        mask: Position terms of the mask: ``left``, ``right`` and ``end_aligned``.
        query_len: Number of queries.
        key_len: Number of keys.
    """
    place = torch.arange(query_len) + (key_len - query_len if mask.end_aligned else 0)
    low = torch.zeros_like(place) if mask.left is None else (place - mask.left).clamp(min=0)
    high = (
        torch.full_like(place, key_len) if mask.right is None else (place + mask.right + 1).clamp(max=key_len)
    )
    left, right = config.reach(mask.causal)
    near_low, near_high = torch.maximum(low, place - left), torch.minimum(high, place + right + 1)
    near = (near_high - near_low).clamp(min=0)
    sinks = (high.clamp(max=config.sinks) - low).clamp(min=0)
    both = (near_high.clamp(max=config.sinks) - near_low).clamp(min=0)
    return int((near + sinks - both).sum())


def window_cost(config: WindowConfig, spec: SiteSpec) -> Cost:
    """Two products a pair; queries, keys, values and outputs moved once."""
    pairs = window_pairs(config, spec.mask.positional, int(spec.query_len), int(spec.key_len))
    flops = 2.0 * spec.batch * spec.heads * pairs * (spec.head_dim + spec.value_dim)
    return Cost(flops, traffic(spec), pairs / max(1, int(spec.query_len)))


def equal_window(keys_per_query: float, spec: SiteSpec, sinks: int = 4) -> WindowConfig:
    """The narrowest window that meets at least so many keys a query in the mean: the control at equal cost.

    Args:
        keys_per_query: Of the operator it is compared with (``Cost.keys_per_query``).
        spec: The site. Of its mask the terms by position count.
        sinks: First tokens that the window keeps meeting.

    Returns:
        A window as wide as the site when even that meets too few.
    """
    queries, keys = int(spec.query_len), int(spec.key_len)
    # Half a bidirectional window lies on either side, hence twice the length.
    narrow, wide = 1, 2 * keys
    while narrow < wide:
        middle = (narrow + wide) // 2
        pairs = window_pairs(WindowConfig(width=middle, sinks=sinks), spec.mask.positional, queries, keys)
        narrow, wide = (narrow, middle) if pairs >= keys_per_query * queries else (middle + 1, wide)
    return WindowConfig(width=narrow, sinks=sinks)
