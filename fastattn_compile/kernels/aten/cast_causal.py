"""Causal CAST on ATen: a token chooses its cluster alone, meets its recent members, and running summaries.

Work O(n (size + clusters)), memory O(n clusters); what follows a token has no influence on it. This form is
not in the paper (specification 5.2). Layout as in ``cast_affinity``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import cast_assign
from fastattn_compile.kernels.aten.cast_affinity import (
    Affinities,
    Rule,
    Tokens,
    Weights,
    join_heads,
    split_heads,
)
from fastattn_compile.kernels.aten.cast_bucket import Buckets
from fastattn_compile.kernels.aten.cast_scan import ClusterScan
from fastattn_compile.kernels.tiles import statistics_dtype, work_dtype


def choose(affinities: Affinities) -> Tensor:
    """The cluster of every token, ``(b, n)``; -1 for padding. The choice depends on that token alone."""
    affinity, tie = affinities.selection()
    choice = cast_assign.best_cluster(affinity, tie, torch.ones_like(affinity, dtype=torch.bool))[0]
    real = affinities.tokens.real
    return choice if real is None else choice.masked_fill(~real, -1)


def running_mass(log_weight: Tensor, assigned: Tensor, clusters: int) -> Tensor:
    """Logarithm of the sum of ``exp(log_weight)`` over the members of each cluster so far.

    Args:
        log_weight: ``(g or 1, b, n)``.
        assigned: ``(b, n)`` cluster of each token, -1 for none.
        clusters: Number of clusters.

    Returns:
        ``(g or 1, b, n, clusters)``; -inf while a cluster is empty. Accumulated in float64: rounding would
        grow with ``n``.
    """
    member = assigned[..., None] == torch.arange(clusters, device=assigned.device)
    entries = log_weight.double()[..., None].masked_fill(~member, -torch.inf)
    return entries.logcumsumexp(2)


class _Pass:
    """One forward pass with everything its backward pass reads."""

    def __init__(
        self, tokens: Tokens, weights: Weights, rule: Rule, scale: float, kind: type[ClusterScan]
    ) -> None:
        self.tokens, self.rule, self.scale = tokens, rule, scale
        self.affinities = Affinities(tokens, weights, rule, scale)
        assigned = choose(self.affinities)
        kv_heads, batch, length, group, _ = tokens.query.shape
        self.index = assigned.clamp(min=0)[None, :, :, None, None].expand(kv_heads, -1, -1, group, 1)
        self.member = (assigned >= 0)[None, :, :, None, None]
        self.buckets = Buckets(assigned, rule.clusters, rule.size)
        self.flat = (join_heads(tokens.query), tokens.key.transpose(0, 1), tokens.value.transpose(0, 1))
        self.bucket_out, self.bucket_lse = self.buckets.attend(*self.flat, scale)
        self.inside = split_heads(self.bucket_out, kv_heads)
        if rule.lse:
            log_weight = tokens.key.new_zeros(1, batch, length)
        else:
            own_key = assigned.clamp(min=0)[None, ..., None].expand(kv_heads, -1, -1, 1)
            log_weight = self.affinities.summary_logits().gather(-1, own_key).squeeze(-1)
        self.mass = running_mass(log_weight, assigned, rule.clusters)
        self.scan = kind(log_weight, self.mass, assigned)
        logits = self._one_softmax_logits() if rule.lse else self._mixing_logits()
        self.log_sum_exp = logits.logsumexp(-1)
        self.mixture = logits.softmax(-1).masked_fill_((self.log_sum_exp == -torch.inf)[..., None], 0)
        clusters = self.mixture[..., : rule.clusters]
        self.own = clusters.gather(-1, self.index) * self.member
        self.foreign = clusters if rule.own_summary else self._without_own(clusters)

    def _without_own(self, x: Tensor) -> Tensor:
        """``(g, b, n, r, c)`` with 0 at the own cluster of every token."""
        return x.scatter(-1, self.index, x.gather(-1, self.index).masked_fill(self.member, 0))

    def _mixing_logits(self) -> Tensor:
        empty = self.mass[:, :, :, None] == -torch.inf
        return self.affinities.mixing_logits().masked_fill(empty, -torch.inf)

    def _one_softmax_logits(self) -> Tensor:
        """Scores of running summaries; the bucket of the own cluster; last what fell out of it."""
        _, key, value = self.flat
        self.evicted_key = self.buckets.evicted_mean(key).transpose(0, 1)
        self.evicted_value = self.buckets.evicted_mean(value).transpose(0, 1)
        query = self.tokens.query * self.scale
        logits = self.scan.score(query, self.tokens.key) + self.mass[:, :, :, None].to(query.dtype)
        inside = split_heads(self.bucket_lse, key.shape[1])[..., None]
        logits.scatter_(-1, self.index, torch.where(self.member, inside, logits.gather(-1, self.index)))
        count = self.buckets.evicted_count().to(query.dtype).log()[None, :, :, None]
        evicted = (query * self.evicted_key[:, :, :, None]).sum(-1) + count
        return torch.cat([logits, evicted[..., None]], -1)

    def out(self) -> Tensor:
        """The mixture, ``(g, b, n, r, e)``."""
        out = self.own * self.inside + self.scan.mix(self.foreign, self.tokens.value)
        if self.rule.lse:
            out += self.mixture[..., -1:] * self.evicted_value[:, :, :, None]
        return out

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Weights | None]:
        """Gradients of query, key, value and learned tensors (``None`` where they are 0), in this layout."""
        tokens, rule, scan = self.tokens, self.rule, self.scan
        from_summary = scan.score(grad_out, tokens.value)
        grad_own = (grad_out * self.inside).sum(-1, keepdim=True)
        at_own = from_summary.gather(-1, self.index)
        replaced = grad_own + at_own if rule.own_summary else grad_own
        grad_mixture = from_summary.scatter(-1, self.index, torch.where(self.member, replaced, at_own))
        if rule.lse:
            evicted = (grad_out * self.evicted_value[:, :, :, None]).sum(-1, keepdim=True)
            grad_mixture = torch.cat([grad_mixture, evicted], -1)
        slope = (grad_mixture * self.mixture).sum(-1, keepdim=True)
        if grad_lse is not None:
            slope = slope - grad_lse[..., None]
        grad_logits = (grad_mixture - slope) * self.mixture
        value = scan.transposed(self.foreign, grad_out)

        bucket_lse_gradient = None
        learned = None
        if rule.lse:
            clusters = grad_logits[..., : rule.clusters]
            own = (clusters.gather(-1, self.index) * self.member).squeeze(-1)
            bucket_lse_gradient = join_heads(own)
            foreign = self._without_own(clusters)
            query = scan.mix(foreign, tokens.key) * self.scale
            key = scan.transposed(foreign, tokens.query) * self.scale
            grad_evicted = grad_logits[..., -1:] * self.scale
            query += grad_evicted * self.evicted_key[:, :, :, None]
            key += self._through_evicted((grad_evicted * tokens.query).sum(3))
            value += self._through_evicted((self.mixture[..., -1:] * grad_out).sum(3))
        else:
            query, key, learned = self.affinities.backward(
                grad_logits, self._summary_gradient(grad_out, from_summary)
            )
        bucket = self.buckets.attend_backward(
            *self.flat, self.scale, self.bucket_out, self.bucket_lse,
            join_heads(self.own * grad_out), bucket_lse_gradient,
        )  # fmt: skip
        query += split_heads(bucket[0], tokens.key.shape[0])
        key += bucket[1].transpose(0, 1)
        return query, key, value + bucket[2].transpose(0, 1), learned

    def _through_evicted(self, grad: Tensor) -> Tensor:
        return self.buckets.evicted_mean_backward(grad.transpose(0, 1)).transpose(0, 1)

    def _summary_gradient(self, grad_out: Tensor, from_summary: Tensor) -> Tensor:
        """Gradient of the summary logits, ``(g, b, n, c)``, 0 but at the own cluster."""
        per_token = self.scan.logit_gradient(self.foreign, grad_out, self.tokens.value, from_summary)
        per_token = per_token[..., None] * self.member[..., 0]
        gradient = torch.zeros_like(self.affinities.key)
        return gradient.scatter_(-1, self.index[:, :, :, 0], per_token)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    real: Tensor | None = None, kind: type[ClusterScan] = ClusterScan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal CAST (specification 5.2).

    Args:
        query: ``(b, h, n, d)``; query head ``i`` reads key head ``i // (h // g)``. Types may differ between
            the three.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        rule: How to choose clusters and combine.
        weights: Learned tensors.
        real: ``(b, n)`` boolean, true where a token is no padding. Padding is in no cluster.
        kind: Who computes the running summaries.

    Returns:
        Output ``(b, h, n, e)``, the values' type, contiguous; log of the normaliser of the mixture ``(b, h,
        n)``.
    """
    tokens = Tokens.of(query, key, value, real)
    done = _Pass(tokens.finite(), weights.to(work_dtype(query, key, value)), rule, scale, kind)
    out, log_sum_exp = done.out(), done.log_sum_exp
    if done.tokens is not tokens:
        _poison(out, log_sum_exp, tokens)
    out, log_sum_exp = join_heads(out), join_heads(log_sum_exp)
    return out.to(value.dtype).contiguous(), log_sum_exp.to(statistics_dtype(value)).contiguous()


def _poison(out: Tensor, log_sum_exp: Tensor, tokens: Tokens) -> None:
    """Writes NaN, in place, into results from the first key or value on that is not finite, not before it.

    A key takes part in the clustering of all heads, a value is met by its own.
    """
    bad_key = ~torch.isfinite(tokens.key).all(-1).all(0, keepdim=True)
    bad_value = ~torch.isfinite(tokens.value).all(-1)
    after_key, after_either = ((x.cumsum(2) > 0)[..., None] for x in (bad_key, bad_key | bad_value))
    log_sum_exp.masked_fill_(after_key, torch.nan)
    out.masked_fill_(after_either[..., None], torch.nan)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, real: Tensor | None = None,
    kind: type[ClusterScan] = ClusterScan,
) -> tuple[Tensor, Tensor, Tensor, Weights | None]:  # fmt: skip
    """Gradients of ``forward``, which is computed again. No gradient passes the choice of clusters.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        rule: As in ``forward``.
        weights: As in ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log of the normaliser; ``None`` is zero.
        real: As in ``forward``.
        kind: As in ``forward``.

    Returns:
        As ``cast_aten.backward``.
    """
    tokens = Tokens.of(query, key, value, real)
    done = _Pass(tokens.finite(), weights.to(work_dtype(query, key, value)), rule, scale, kind)
    kv_heads, dtype = key.shape[1], tokens.query.dtype
    grad = split_heads(grad_out.to(dtype), kv_heads)
    grad_lse = None if grad_log_sum_exp is None else split_heads(grad_log_sum_exp.to(dtype), kv_heads)
    grad_query, grad_key, grad_value, learned = done.backward(grad, grad_lse)
    return *tokens.gradients(grad_query, grad_key, grad_value, like=(query, key, value)), learned


def members(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``cast.members`` under token choice."""
    tokens = Tokens.of(query, key, value, real)
    assigned = choose(Affinities(tokens, weights.to(work_dtype(query, key, value)), rule, scale))
    return assigned[:, None] == torch.arange(rule.clusters, device=assigned.device)[:, None]


def exact_keys(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights, rows: Tensor,
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which tokens are in the buckets of the given queries.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        rule: As in ``forward``.
        weights: As in ``forward``.
        rows: ``(r,)`` query positions.
        real: As in ``forward``.

    Returns:
        ``(b, 1, r, n)`` boolean.
    """
    tokens = Tokens.of(query, key, value, real)
    assigned = choose(Affinities(tokens, weights.to(work_dtype(query, key, value)), rule, scale))
    order = cast_assign.ranks(assigned, rule.clusters)
    behind = order[:, rows, None] - order[:, None]
    same = (assigned[:, rows, None] == assigned[:, None]) & (assigned[:, None] >= 0)
    return (same & (behind >= 0) & (behind < rule.size))[:, None]
