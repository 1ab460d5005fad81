"""CAST as it is defined: dense, differentiable, one loop over clusters. The judge of the kernels.

Every form of CAST says of every cluster which pairs of tokens meet exactly (``near``) and which keys are in
the summary that a query meets (``pool``); causal forms differ in those two masks alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.cast_affinity import Weights
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.parameters import sharpness, unpacked
from fastattn_compile.operators.exact.reference import compute_dtype, masked_softmax


@dataclass(frozen=True)
class Products:
    """Products of a sequence with surrogates: query ``(h, n, c)``, key ``(g, n, c)``; gate ``(p, n)``."""

    query: Tensor
    key: Tensor
    gate: Tensor | None

    @staticmethod
    def of(query: Tensor, key: Tensor, weights: Weights) -> Products:
        """Products of ``(h, n, d)`` queries and ``(g, n, d)`` keys."""
        gate = None
        if weights.gate is not None and weights.gate_bias is not None:
            gate = torch.einsum("hnd,phd->pn", query, weights.gate) + weights.gate_bias[:, None]
        return Products(
            torch.einsum("hnd,chd->hnc", query, weights.query_surrogates),
            torch.einsum("gnd,cgd->gnc", key, weights.key_surrogates),
            gate,
        )

    def affinity(self, config: CastConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """``A_g`` and the logits that break its ties, both ``(n, c)`` (specification 1.2)."""

        def reduced(x: Tensor) -> tuple[Tensor, Tensor]:
            if config.affinity_scale == "sqrt_width":
                x = x * (x.shape[0] * head_dim) ** -0.5
            if config.head_reduce == "softmax_mean":
                return x.softmax(-1).mean(0), x.sum(0)
            logits = x.sum(0) if config.head_reduce == "sum" else x.mean(0)
            return logits.softmax(-1), logits

        (query, query_tie), (key, key_tie) = reduced(self.query), reduced(self.key)
        if config.select == "query":
            return query, query_tie
        if config.select == "key" or self.gate is None:
            return key, key_tie
        share = self.gate.sigmoid().mean(0)[:, None]
        return share * query + (1 - share) * key, share * query_tie + (1 - share) * key_tie


def clusters_of(affinity: Tensor, tie: Tensor, config: CastConfig, real: Tensor) -> Tensor:
    """Which cluster holds which token (specification 1.3, 5.2), one token or pair after the other.

    Args:
        affinity: ``(n, c)``.
        tie: ``(n, c)``.
        config: The configuration.
        real: ``(n,)`` boolean.

    Returns:
        ``(n, c)`` boolean.
    """
    length, clusters = affinity.shape
    size = config.size(length)
    scores, ties = affinity.tolist(), tie.tolist()
    tokens = [i for i in range(length) if bool(real[i])]
    member = torch.zeros(length, clusters, dtype=torch.bool)

    def rank(pair: tuple[int, int]) -> tuple[float, float]:
        return -scores[pair[0]][pair[1]], -ties[pair[0]][pair[1]]

    if config.clustering == "topk":
        for c in range(clusters):
            for i, _ in sorted(((i, c) for i in tokens), key=rank)[:size]:
                member[i, c] = True
        return member.to(affinity.device)
    choices = {i: sorted(((i, c) for c in range(clusters)), key=rank) for i in tokens}
    if config.clustering == "token_choice":
        visits = [choices[i][0] for i in tokens]
        size = length
    elif config.sa_order == "token":
        visits = [pair for i in sorted(tokens, key=lambda i: rank(choices[i][0])) for pair in choices[i]]
    else:
        visits = sorted(((i, c) for i in tokens for c in range(clusters)), key=rank)
    for i, c in visits:
        if not bool(member[i].any()) and int(member[:, c].sum()) < size:
            member[i, c] = True
    return member.to(affinity.device)


def _masks(config: CastConfig, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that meet exactly, keys of the summary a query meets, and keys that the own cluster has evicted.

    Returns:
        Three boolean ``(c, n, n)``, queries before keys.
    """
    inside = member.T
    near = inside[:, :, None] & inside[:, None, :]
    pool = inside[:, None, :].expand_as(near)
    if not config.causal:
        return near, pool, torch.zeros_like(near)
    order = inside.long().cumsum(-1)
    behind = order[:, :, None] - order[:, None, :]
    recent = (behind >= 0) & (behind < config.size(member.shape[0]))
    past = torch.ones_like(near[0]).tril()
    return near & recent & past, pool & past, near & (behind >= config.size(member.shape[0]))


def _sequence(
    config: CastConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    weights: Weights,
    member: Tensor,
) -> tuple[Tensor, Tensor]:
    """CAST of one sequence, ``(h, n, d)``, ``(g, n, d)``, ``(g, n, e)`` to ``(h, n, e)`` and ``(h, n)``."""
    group = query.shape[0] // key.shape[0]
    products = Products.of(query, key, weights)
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = scale * (query @ keys.mT)
    near, pool, evicted = _masks(config, member)
    own = member.T[:, :, None]
    if config.combine == "lse":
        return _one_softmax(scores, values, member, (near, pool, evicted))
    if products.gate is None:
        raise ValueError("the paper's combination needs the gate")
    gate = products.gate.expand(key.shape[0], -1)
    factors = weights.temperature if weights.temperature is not None else scores.new_ones(2)
    sharp_query = (sharpness(config) + F.softplus(gate)).repeat_interleave(group, 0)
    sharp_key = sharpness(config) + F.softplus(-gate)
    mixing = products.query * sharp_query[..., None] * scale * factors[0]
    pooling = (products.key * sharp_key[..., None] * scale * factors[1]).repeat_interleave(group, 0)
    met = pool.any(-1)
    mixture, log_sum_exp = masked_softmax(mixing, met.T)
    out = torch.zeros_like(query[..., :1] * values[..., :1, :])
    for c in range(config.clusters):
        inside = masked_softmax(scores, near[c])[0] @ values
        summary = masked_softmax(pooling[:, None, :, c].expand_as(scores), pool[c])[0] @ values
        met_there = torch.where(own[c], inside, summary)
        if config.own_summary == "included":
            met_there = torch.where(own[c], inside + summary, summary)
        out = out + mixture[..., c, None] * met_there
    return out, log_sum_exp


def _one_softmax(
    scores: Tensor, values: Tensor, member: Tensor, masks: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """One softmax over the tokens met exactly and one entry for every summary (specification 5.1).

    A token in ``m`` clusters counts ``1 / m`` in each. The key of a summary is the mean of its keys, so its
    score is the mean of their scores; it counts as many keys as it stands for.
    """
    near, pool, evicted = masks
    share = 1 / member.sum(-1).clamp(min=1).to(scores.dtype)
    tiny = torch.finfo(scores.dtype).tiny
    mass = near.sum(0) * share
    logits, visible = [scores + mass.clamp(min=tiny).log()], [near.any(0)]
    means = []
    own = member.T[:, :, None]
    for summarised in (*(pool & ~own), evicted.any(0)):
        mass = (summarised * share).sum(-1, keepdim=True)
        mean = summarised * share / mass.clamp(min=tiny)
        logits.append((mean * scores).sum(-1, keepdim=True) + mass.clamp(min=tiny).log())
        visible.append(summarised.any(-1, keepdim=True))
        means.append(mean)
    weights, log_sum_exp = masked_softmax(torch.cat(logits, -1), torch.cat(visible, -1))
    exact, pooled = weights.split([scores.shape[-1], len(means)], -1)
    return (exact + sum(pooled[..., e, None] * mean for e, mean in enumerate(means))) @ values, log_sum_exp


def cast_attention(
    config: CastConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
) -> AttentionOutput:
    """CAST (van Engelenhoven et al., arXiv 2402.04239), sequence by sequence.

    Clusters are chosen in float32 or wider whatever the type of the tensors, and pass no gradient. Queries,
    keys and values of padding are set to 0; such a token is in no cluster.

    Args:
        config: The configuration.
        inputs: The tensors of the site.
        parameters: Learned parameters in order.

    Returns:
        The output, and the log-sum-exp of the one softmax of ``combine="lse"``. The paper's combination has
        none over keys; the logarithm of the normaliser of its mixture over clusters stands in its place.
    """
    dtype = compute_dtype(inputs)
    query, key, value = (x.to(dtype) for x in (inputs.query, inputs.key, inputs.value))
    batch, heads, length, head_dim = query.shape
    real = inputs.key_padding
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    query, key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (query, key, value))
    weights = unpacked(config, parameters, heads)
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for b in range(batch):
        with torch.no_grad():
            products = Products.of(query[b].to(wide), key[b].to(wide), weights.to(wide))
            member = clusters_of(*products.affinity(config, head_dim), config, real[b])
        results.append(_sequence(config, query[b], key[b], value[b], inputs.scale, weights.to(dtype), member))
    out, log_sum_exp = (torch.stack(x) for x in zip(*results))
    statistics = torch.float64 if inputs.value.dtype == torch.float64 else torch.float32
    return AttentionOutput(out.to(inputs.value.dtype), log_sum_exp.to(statistics))
