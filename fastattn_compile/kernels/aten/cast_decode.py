"""Causal CAST one token at a time: a bucket of recent members and a running summary for every cluster.

Layout as in ``cast_affinity``; ``s`` slots of a bucket. What a step costs and keeps does not depend on how
long the sequence is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import cast_assign
from fastattn_compile.kernels.aten.cast_affinity import Affinities, Rule, Tokens, Weights, join_heads
from fastattn_compile.kernels.aten.cast_causal import choose, running_mass
from fastattn_compile.kernels.tiles import statistics_dtype, work_dtype


@dataclass
class ClusterState:
    """What later tokens need of earlier ones. Changed in place by ``step``.

    Args:
        count: ``(b, c)`` members so far.
        bucket_key: ``(g, b, c, s, d)``; member ``i`` of a cluster stands in slot ``i % s``.
        bucket_value: ``(g, b, c, s, e)``.
        mass: ``(g, b, c)`` logarithm of the weights in the summary; -inf while a cluster is empty.
        key: ``(g, b, c, d)`` mean key of all members, met in the one softmax only.
        value: ``(g, b, c, e)`` summary of all members.
        evicted_key: ``(g, b, c, d)`` mean key of the members that left the bucket.
        evicted_value: ``(g, b, c, e)``.
    """

    count: Tensor
    bucket_key: Tensor
    bucket_value: Tensor
    mass: Tensor
    key: Tensor
    value: Tensor
    evicted_key: Tensor
    evicted_value: Tensor


def _empty(tokens: Tokens, rule: Rule) -> ClusterState:
    heads, batch, _, head_dim = tokens.key.shape
    new, sizes = tokens.key.new_zeros, (heads, batch, rule.clusters)
    value_dim = tokens.value.shape[-1]
    return ClusterState(
        torch.zeros(batch, rule.clusters, dtype=torch.int64, device=tokens.key.device),
        new(*sizes, rule.size, head_dim), new(*sizes, rule.size, value_dim),
        torch.full_like(new(sizes), -torch.inf),
        new(*sizes, head_dim), new(*sizes, value_dim), new(*sizes, head_dim), new(*sizes, value_dim),
    )  # fmt: skip


def _log_weights(affinities: Affinities, assigned: Tensor) -> Tensor:
    """Logit of every token in the summary of its own cluster, ``(g, b, n)``."""
    heads, batch, length, _ = affinities.key.shape
    if affinities.rule.lse:
        return affinities.key.new_zeros(heads, batch, length)
    own = assigned.clamp(min=0)[None, ..., None].expand(heads, -1, -1, 1)
    return affinities.summary_logits().gather(-1, own).squeeze(-1)


def prefilled(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    real: Tensor | None = None,
) -> ClusterState:  # fmt: skip
    """The state after a first stretch of tokens.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        rule: As in ``cast_causal.forward``.
        weights: Learned tensors.
        real: ``(b, n)`` boolean, true where a token is no padding.
    """
    tokens = Tokens.of(query, key, value, real)
    affinities = Affinities(tokens, weights.to(work_dtype(query, key, value)), rule, scale)
    state = _empty(tokens, rule)
    assigned = choose(affinities)
    if assigned.shape[1] == 0:
        return state
    present, own = assigned >= 0, assigned.clamp(min=0)
    log_weight = _log_weights(affinities, assigned)
    state.mass = running_mass(log_weight, assigned, rule.clusters)[:, :, -1].to(tokens.key.dtype)
    member = torch.nn.functional.one_hot(own, rule.clusters) * present[..., None]
    state.count = member.sum(1)
    member = member.to(tokens.key.dtype)
    at_own = state.mass.gather(-1, own.expand_as(log_weight))
    share = (log_weight - at_own).masked_fill(~present, -torch.inf).exp()[..., None]
    state.key, state.value = (member.mT @ (share * x) for x in (tokens.key, tokens.value))

    order = cast_assign.ranks(assigned, rule.clusters)
    behind = state.count.gather(1, own) - order
    gone = (present & (behind > rule.size)).to(tokens.key.dtype)
    left = (state.count - rule.size).clamp(min=1)[..., None]
    state.evicted_key, state.evicted_value = (
        (member.mT @ (gone[..., None] * x)) / left for x in (tokens.key, tokens.value)
    )
    sequence, place = (present & (behind <= rule.size)).nonzero(as_tuple=True)
    cluster, slot = own[sequence, place], order[sequence, place] % rule.size
    state.bucket_key[:, sequence, cluster, slot] = tokens.key[:, sequence, place]
    state.bucket_value[:, sequence, cluster, slot] = tokens.value[:, sequence, place]
    return state


def step(
    state: ClusterState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rule: Rule,
    weights: Weights,
) -> tuple[ClusterState, Tensor, Tensor]:
    """Attends the next token and keeps it.

    Args:
        state: What earlier tokens left, ``None`` before the first; changed in place.
        query: ``(b, h, 1, d)``.
        key: ``(b, g, 1, d)``.
        value: ``(b, g, 1, e)``.
        scale: Factor on the scores.
        rule: As in ``cast_causal.forward``.
        weights: Learned tensors.

    Returns:
        The state, output ``(b, h, 1, e)`` and log of the normaliser ``(b, h, 1)``.
    """
    tokens = Tokens.of(query, key, value, None)
    affinities = Affinities(tokens, weights.to(work_dtype(query, key, value)), rule, scale)
    if state is None:
        state = _empty(tokens, rule)
    own = choose(affinities)[:, 0]
    _keep(state, tokens, _log_weights(affinities, own[:, None])[..., 0], own, rule.size)

    everyone = torch.arange(own.shape[0], device=own.device)
    q = tokens.query[:, :, 0] * scale
    bucket_key, bucket_value = state.bucket_key[:, everyone, own], state.bucket_value[:, everyone, own]
    filled = torch.arange(rule.size, device=own.device) < state.count[everyone, own, None]
    scores = (q @ bucket_key.mT).masked_fill(~filled[:, None], -torch.inf)
    inside, inside_lse = scores.softmax(-1) @ bucket_value, scores.logsumexp(-1)

    index = own[None, :, None, None].expand(*q.shape[:3], 1)
    if rule.lse:
        logits = q @ state.key.mT + state.mass[:, :, None]
        logits = logits.scatter(-1, index, inside_lse[..., None])
        gone = (state.count[everyone, own] - rule.size).clamp(min=0).to(q.dtype).log()
        evicted = (q * state.evicted_key[:, everyone, own, None]).sum(-1) + gone[:, None]
        logits = torch.cat([logits, evicted[..., None]], -1)
    else:
        logits = affinities.mixing_logits()[:, :, 0].masked_fill(
            (state.mass == -torch.inf)[:, :, None], -torch.inf
        )
    mixture = logits.softmax(-1)
    clusters = mixture[..., : rule.clusters]
    foreign = clusters if rule.own_summary else clusters.scatter(-1, index, 0)
    out = clusters.gather(-1, index) * inside + foreign @ state.value
    if rule.lse:
        out = out + mixture[..., -1:] * state.evicted_value[:, everyone, own, None]
    results = (join_heads(x.unsqueeze(2)) for x in (out, logits.logsumexp(-1)))
    out, log_sum_exp = results
    return state, out.to(value.dtype), log_sum_exp.to(statistics_dtype(value))


def _keep(state: ClusterState, tokens: Tokens, log_weight: Tensor, own: Tensor, size: int) -> None:
    """Adds a token to the summary and the bucket of its cluster; the oldest of a full bucket is evicted."""
    everyone = torch.arange(own.shape[0], device=own.device)
    key, value = tokens.key[:, :, 0], tokens.value[:, :, 0]
    before = state.mass[:, everyone, own]
    mass = torch.logaddexp(before, log_weight)
    remains, share = (before - mass).exp()[..., None], (log_weight - mass).exp()[..., None]
    for summary, new in ((state.key, key), (state.value, value)):
        summary[:, everyone, own] = remains * summary[:, everyone, own] + share * new
    state.mass[:, everyone, own] = mass

    count = state.count[everyone, own]
    slot, full = count % size, (count >= size)[:, None]
    gone = (count - size + 1).clamp(min=1)[:, None]
    for bucket, evicted, new in (
        (state.bucket_key, state.evicted_key, key),
        (state.bucket_value, state.evicted_value, value),
    ):
        mean = evicted[:, everyone, own]
        moved = mean + (bucket[:, everyone, own, slot] - mean) / gone
        evicted[:, everyone, own] = torch.where(full, moved, mean)
        bucket[:, everyone, own, slot] = new
    state.count[everyone, own] += 1
