"""What CAST costs, counted from its definition (specification 2)."""

from __future__ import annotations

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.parameters import shapes
from fastattn_compile.operators.exact.cost import parameter_bytes, traffic


def exact_pairs(config: CastConfig, length: int) -> int:
    """Pairs of a query and a key that meet inside clusters, for one head.

    Top-K fills every slot. Single assignment is counted as unevenly as capacity allows, token choice with a
    full bucket for every token: how tokens fall depends on the data, and both are upper bounds.

    Args:
        config: The configuration.
        length: Tokens of the sequence.
    """
    size = min(config.size(length), length)
    if config.clustering == "topk":
        return config.clusters * size * size
    if config.clustering == "sa_topk":
        full, rest = divmod(length, size)
        return full * size * size + rest * rest
    return size * (size + 1) // 2 + (length - size) * size


def cast_cost(config: CastConfig, spec: SiteSpec) -> Cost:
    """Two products a pair; affinities and gate to cluster by; summaries; the mixture of summaries."""
    length, clusters = int(spec.key_len), config.clusters
    heads, kv_heads, d, e = spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim
    pairs = exact_pairs(config, length)
    attention = 2.0 * heads * pairs * (d + e)
    tokens_clusters = length * clusters
    query_side = config.combine == "paper" or config.select != "key"
    key_side = config.combine == "paper" or config.select != "query"
    affinity = 2.0 * tokens_clusters * d * (heads * query_side + kv_heads * key_side)
    gates = (1 if config.phi_heads == "shared" else kv_heads) if config.gated else 0
    gate = 2.0 * gates * length * heads * d
    slots = clusters * min(config.size(length), length) if not config.causal else length
    mean_keys = config.combine == "lse"
    summaries = 2.0 * kv_heads * slots * (e + d * mean_keys)
    mixture = 2.0 * heads * tokens_clusters * (e + d * mean_keys)
    return Cost(
        spec.batch * (attention + affinity + gate + summaries + mixture),
        traffic(spec) + parameter_bytes(shapes(config, spec)),
        pairs / max(1, length) + clusters,
    )
