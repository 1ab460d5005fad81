"""What Barnes-Hut attention costs, counted from its definition: keys met one by one, and products spent on
choosing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.operators.barnes_hut.config import SAMPLES, BarnesHutConfig
from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import traffic
from fastattn_compile.operators.mask import MaskStructure


@dataclass(frozen=True)
class Work:
    """Counts of one query head, summed over its queries, without padding.

    Args:
        exact: Keys met one by one: near field, sinks, opened leaves. Under a tolerance an upper limit.
        pooled: Pooled rows met.
        selection: Products of a query vector with a node of the tree; a node of twice the length counts
            twice.
    """

    exact: int
    pooled: int
    selection: float


def near_pairs(config: BarnesHutConfig, mask: MaskStructure, length: int) -> int:
    """Pairs of a query and a key of the near field or a sink."""
    place = torch.arange(length)
    low = torch.zeros_like(place) if mask.left is None else (place - mask.left).clamp(min=0)
    high = (
        torch.full_like(place, length) if mask.right is None else (place + mask.right + 1).clamp(max=length)
    )
    begin = (place // config.block - 1) * config.block
    near_low, near_high = torch.maximum(low, begin), torch.minimum(high, begin + 3 * config.block)
    near = (near_high - near_low).clamp(min=0)
    sinks = (high.clamp(max=config.sinks) - low).clamp(min=0)
    both = (near_high.clamp(max=config.sinks) - near_low).clamp(min=0)
    return int((near + sinks - both).sum())


def _far_nodes(
    config: BarnesHutConfig, mask: MaskStructure, first: Tensor, width: int, length: int
) -> Tensor:
    """Nodes of a level in the far field of each group, on both sides."""
    found = torch.zeros_like(first)
    for begin, end in config.pattern(mask).far(first, length):
        # Nodes of nothing but sinks hold no token; the last node may be short.
        low = torch.maximum(-(-begin // width), torch.as_tensor(config.sinks // width))
        found += (torch.where(end > length, -(-length // width), end // width) - low).clamp(min=0)
    return found


@lru_cache(maxsize=1024)
def count_work(config: BarnesHutConfig, mask: MaskStructure, length: int) -> Work:
    """Counts the descent group by group, every node as if it were full.

    Args:
        config: The configuration.
        mask: Position terms of the mask.
        length: Tokens of the sequence.
    """
    pattern = config.pattern(mask)
    first = torch.arange(0, length, config.group)
    members = (length - first).clamp(max=config.group)
    kept = above = torch.zeros_like(first)
    scored, closed = torch.zeros_like(first), torch.zeros_like(first)
    top = pattern.levels(length) - 1
    for level in range(top, -1, -1):
        here = _far_nodes(config, mask, first, pattern.width(level), length)
        # The last node of the level above may have fewer children.
        missing = (
            0
            if mask.causal
            else -(-length // pattern.width(level + 1)) * config.fanout - -(-length // pattern.width(level))
        )
        edges = (here - above * config.fanout + missing).clamp(min=0)
        listed = here if level == top else torch.minimum(here, kept * config.fanout + edges)
        kept = listed.clamp(max=pattern.keep(level))
        scored, closed, above = scored + listed, closed + listed - kept, here
    opened = int((kept * members).sum()) * config.leaf
    voices = min(SAMPLES, config.group) if config.select == "sampled" else 1
    length_factor = 2 if config.select in ("cumulant", "bound") else 1
    return Work(
        near_pairs(config, mask, length) + opened,
        int((closed * members).sum()) if config.rest == "pool" else 0,
        float(scored.sum()) * voices * length_factor,
    )


def barnes_hut_cost(config: BarnesHutConfig, spec: SiteSpec) -> Cost:
    """Two products a key or pooled row that is met, one a product of the choice, and the building of the
    tree."""
    length = int(spec.key_len)
    work = count_work(config, spec.mask.positional, length)
    met = work.exact + work.pooled
    attention = 2.0 * spec.batch * spec.heads * met * (spec.head_dim + spec.value_dim)
    selection = 2.0 * spec.batch * spec.heads * work.selection * spec.head_dim
    channels = spec.head_dim * (2 if config.select in ("cumulant", "bound") else 1)
    channels += spec.value_dim if config.rest == "pool" else 0
    tree = 2.0 * spec.batch * spec.kv_heads * length * channels
    return Cost(attention + selection + tree, traffic(spec), met / max(1, length))
