"""What tree attention costs, counted for trees that split evenly (specification section 10)."""

from __future__ import annotations

import dataclasses

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.exact.cost import parameter_bytes, traffic, visible_pairs
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.treeformer.config import TcConfig, TfConfig, TreeConfig
from fastattn_compile.operators.treeformer.trees import parameter_shapes


def routing_flops(config: TreeConfig, spec: SiteSpec) -> float:
    """One product with a plane for each level that a query or key passes."""
    vectors = spec.heads * int(spec.query_len) + spec.kv_heads * int(spec.key_len)
    return 2.0 * spec.batch * config.n_trees * vectors * config.height * spec.head_dim


def _near_pairs(config: TfConfig, mask: MaskStructure, queries: int, keys: int) -> int:
    """Pairs within the window or with a sink, as far as the mask shows them."""

    reach = config.window - 1
    left = reach if mask.left is None else min(mask.left, reach)
    right = reach if mask.right is None else min(mask.right, reach)
    empty = not config.window or left + right < 0
    window = 0 if empty else visible_pairs(dataclasses.replace(mask, left=left, right=right), queries, keys)
    return window + min(config.sinks, keys) * queries


def leaf_cost(config: TfConfig, spec: SiteSpec) -> Cost:
    """Routing, then two products a pair: visible keys of a leaf are the visible keys over the number of
    leaves.
    """
    queries, keys = int(spec.query_len), int(spec.key_len)
    mask = spec.mask.positional
    visible = visible_pairs(mask, queries, keys)
    near = min(visible, _near_pairs(config, mask, queries, keys))
    leaves = config.leaves >> (config.query_gradient == "sibling")
    share = 1 / leaves
    if config.capacity:
        share = min(share, config.keys_of_leaf(keys) / max(1, keys))
    met = 1 - (1 - share) ** config.n_trees if config.combine == "union" else config.n_trees * share
    repeated = config.n_trees if config.combine == "mean" else 1
    pairs = repeated * near + (visible - near) * met
    flops = routing_flops(config, spec) + 2.0 * spec.batch * spec.heads * pairs * (
        spec.head_dim + spec.value_dim
    )
    moved = traffic(spec) + parameter_bytes(parameter_shapes(config, spec))
    return Cost(flops, moved, pairs / max(1, queries))


def coarse_cost(config: TcConfig, spec: SiteSpec) -> Cost:
    """Routing, sums of the leaves and of their parents, and ``height + 1`` rows read and weighted a query."""
    queries, keys, levels = int(spec.query_len), int(spec.key_len), config.height + 1
    sums = spec.batch * spec.kv_heads * config.n_trees * (keys + 2 * config.leaves) * spec.value_dim
    reads = 2 * spec.batch * spec.heads * config.n_trees * queries * levels * spec.value_dim
    moved = traffic(spec) + parameter_bytes(parameter_shapes(config, spec))
    return Cost(routing_flops(config, spec) + sums + reads, moved, config.n_trees * levels)
