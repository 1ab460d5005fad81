"""CAST on ATen, bidirectional: exact inside clusters, summaries of the others, O(n (size + clusters)).

Both combinations are one mixture ``out_i = sum_c W_ic x_ic`` with ``x_ic`` the attention of token ``i``
inside its own cluster ``c`` or the summary of a foreign one, and ``W_i = softmax_c(Z_i)``. The paper's ``Z``
are learned affinities; one softmax over own tokens and summaries has as ``Z`` the log-sum-exp of the former
and the scores of the latter.

Layout as in ``cast_affinity``: queries ``(g, b, n, r, d)``, keys ``(g, b, n, d)``; ``c`` clusters of ``s``
slots; ``m`` is the number of filled slots of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import cast_assign, cast_tiles
from fastattn_compile.kernels.aten.cast_affinity import (
    Affinities,
    Rule,
    Tokens,
    Weights,
    join_heads,
    split_heads,
)
from fastattn_compile.kernels.tiles import statistics_dtype, work_dtype


def cluster(affinities: Affinities) -> Tensor:
    """The members of every cluster, ``(b, c, s)`` token numbers, -1 in an empty slot."""
    rule, real = affinities.rule, affinities.tokens.real
    affinity, tie = affinities.selection()
    if rule.clustering == "topk":
        return cast_assign.top_k(affinity, tie, rule.size, real)
    assigned = cast_assign.single_assignment(affinity, tie, rule.size, real, rule.by_pair)
    return cast_assign.slots(assigned, rule.clusters, rule.size)


@dataclass(frozen=True)
class Slots:
    """Where the members of clusters stand.

    Args:
        token: ``(b c s,)`` row of the flat ``(b n)`` tokens in each slot; 0 in an empty slot.
        filled: ``(b, c, s)`` boolean.
        members: ``(m,)`` numbers of the filled slots.
        share: ``(b, c, s)`` by how much a token counts in a cluster: one over the number of its clusters; 0
            when empty.
        own: ``(m r,)`` places of (member, own cluster) in a flat ``(b, n, r, c)``.
        own_key: ``(m,)`` the same in a flat ``(b, n, c)``.
    """

    token: Tensor
    filled: Tensor
    members: Tensor
    share: Tensor
    own: Tensor
    own_key: Tensor

    @staticmethod
    def of(table: Tensor, length: int, group: int, dtype: torch.dtype) -> Slots:
        """The slots of a table of tokens, ``(b, clusters, slots)``, -1 where a slot is empty."""
        batch, clusters, _ = table.shape
        filled = table >= 0
        first = torch.arange(batch, device=table.device)[:, None, None] * length
        token = (table.clamp(min=0) + first).flatten()
        members = filled.flatten().nonzero().squeeze(-1)
        count = torch.zeros(batch * length, dtype=dtype, device=table.device)
        count.index_add_(0, token, filled.flatten().to(dtype))
        share = (filled / count[token].view_as(filled).clamp(min=1)).to(dtype)
        number = (
            torch.arange(clusters, device=table.device)[None, :, None].expand(table.shape).flatten()[members]
        )
        rows = token[members]
        place = torch.arange(group, device=table.device)
        own = ((rows[:, None] * group + place) * clusters + number[:, None]).flatten()
        return Slots(token, filled, members, share, own, rows * clusters + number)

    def gather(self, x: Tensor) -> Tensor:
        """``(g, b, n, ...)`` tokens as ``(g, b c, s, ...)`` slots."""
        batch, clusters, size = self.filled.shape
        return x.flatten(1, 2).index_select(1, self.token).unflatten(1, (batch * clusters, size))

    def add_(self, x: Tensor, slots: Tensor) -> None:
        """Adds the filled ``(g, b c, s, ...)`` slots to contiguous ``(g, b, n, ...)`` tokens in place."""
        rows = slots.flatten(1, 2).index_select(1, self.members)
        x.flatten(1, 2).index_add_(1, self.token[self.members], rows)


class Pass:
    """One forward pass with all that its backward pass reads, in memory O(n (size + clusters))."""

    def __init__(self, tokens: Tokens, weights: Weights, rule: Rule, scale: float) -> None:
        self.tokens, self.rule, self.scale = tokens, rule, scale
        self.affinities = Affinities(tokens, weights, rule, scale)
        table = cluster(self.affinities)
        self.heads, self.batch, self.length, self.group, _ = tokens.query.shape
        self.slots = Slots.of(table, self.length, self.group, tokens.query.dtype)
        self.alive = self.slots.filled.any(-1)
        self.query, self.key, self.value = (
            self.slots.gather(x) for x in (tokens.query, tokens.key, tokens.value)
        )
        mass = self.slots.share if rule.lse else self.slots.filled.to(tokens.query.dtype)
        self.offset = mass.log().flatten(0, 1)
        inside, self.inside_lse = self._attend()
        self.inside = inside.unflatten(2, (-1, self.group))
        self.shares = self._shares()
        self.summary = self._pooled(self.value)
        self.summary_key = self._pooled(self.key) if rule.lse else None
        self.mixture, self.log_sum_exp = self._mix(self._logits())

    @cached_property
    def own(self) -> Tensor:
        """Shares of the own clusters of tokens, ``(g, m, r)``."""
        return self.mixture.flatten(1).index_select(1, self.slots.own).unflatten(1, (-1, self.group))

    @cached_property
    def foreign(self) -> Tensor:
        """Shares of the summaries, ``(g, b, n, r, c)``."""
        return self.mixture if self.rule.own_summary else self._without_own(self.mixture)

    def _mix(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the clusters, 0 where a token meets none, and the logarithm of their normaliser."""
        log_sum_exp = logits.logsumexp(-1)
        return logits.softmax(-1).masked_fill_((log_sum_exp == -torch.inf)[..., None], 0), log_sum_exp

    def _attend(self) -> tuple[Tensor, Tensor]:
        """Attention inside the clusters, ``(g, b c, s r, e)``, and its log-sum-exp."""
        return cast_tiles.forward(self.query.flatten(2, 3), self.key, self.value, self.scale, self.offset)

    def _attend_backward(
        self, grad_inside: Tensor, grad_inside_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``_attend`` for the queries, keys and values of the slots."""
        return cast_tiles.backward(
            self.query.flatten(2, 3), self.key, self.value, self.scale, self.offset,
            self.inside.flatten(2, 3), self.inside_lse, grad_inside, grad_inside_lse,
        )  # fmt: skip

    def _add_(self, x: Tensor, slots: Tensor) -> None:
        """``Slots.add_``."""
        self.slots.add_(x, slots)

    def _without_own(self, x: Tensor) -> Tensor:
        """A contiguous ``(g, b, n, r, c)`` with 0 at the own clusters of every token."""
        cleared = x.clone()
        cleared.flatten(1).index_fill_(1, self.slots.own, 0)
        return cleared

    def _shares(self) -> Tensor:
        """Weight of a slot in its cluster's summary, ``(g or 1, b c, s)``; 0 in a cluster without members."""
        filled = self.slots.filled.flatten(0, 1)
        if self.rule.lse:
            share = self.slots.share.flatten(0, 1)
            return (share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny))[None]
        logits = self.affinities.summary_logits()
        slots = (
            torch.full_like(filled, -torch.inf, dtype=logits.dtype).expand(self.heads, -1, -1).contiguous()
        )
        slots.flatten(1).index_copy_(
            1, self.slots.members, logits.flatten(1).index_select(1, self.slots.own_key)
        )
        return slots.softmax(-1).masked_fill(~filled.any(-1, keepdim=True), 0)

    def _pooled(self, slots: Tensor) -> Tensor:
        """Summaries ``(g, b, c, *)`` of ``(g, b c, s, *)``."""
        return (self.shares.unsqueeze(2) @ slots).squeeze(2).unflatten(1, (self.batch, -1))

    def _logits(self) -> Tensor:
        """Logits ``Z`` of the mixture, ``(g, b, n, r, c)``; -inf at an empty cluster."""
        if self.summary_key is None:
            return self.affinities.mixing_logits().masked_fill(~self.alive[:, None, None], -torch.inf)
        mass = self.slots.share.sum(-1).log()
        scores = self._rows(self.tokens.query) * self.scale @ self.summary_key.mT
        logits = (scores + mass[:, None]).unflatten(2, (-1, self.group))
        inside = self.inside_lse.flatten(1).unflatten(1, (-1, self.group)).index_select(1, self.slots.members)
        logits.flatten(1).index_copy_(1, self.slots.own, inside.flatten(1))
        return logits

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """``(g, b, n, r, *)`` as ``(g, b, n r, *)``."""
        return x.flatten(2, 3)

    def out(self) -> Tensor:
        """The mixture of summaries, and of the attention inside own clusters: ``(g, b, n, r, e)``."""
        out = (self._rows(self.foreign) @ self.summary).unflatten(2, (-1, self.group))
        self._scatter_own(out, self._members(self.inside), self.own)
        return out

    def _members(self, slots: Tensor) -> Tensor:
        """The filled ones of ``(g, b c, s, *)`` slots, ``(g, m, *)``."""
        return slots.flatten(1, 2).index_select(1, self.slots.members)

    def _scatter_own(self, x: Tensor, members: Tensor, weight: Tensor) -> None:
        x.flatten(1, 2).index_add_(1, self.slots.token[self.slots.members], members * weight[..., None])

    def _to_slots(self, members: Tensor) -> Tensor:
        """``(g, m, r, ...)`` as ``(g, b c, s r, ...)``, 0 in empty slots."""
        batch, clusters, size = self.slots.filled.shape
        slots = members.new_zeros(self.heads, batch * clusters * size, *members.shape[2:])
        slots.index_copy_(1, self.slots.members, members)
        return slots.unflatten(1, (batch * clusters, size)).flatten(2, 3)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Weights | None]:
        """Gradients of query, key, value and learned tensors (``None`` where they are 0), in this layout."""
        slots, tokens = self.slots, self.tokens
        grad_rows = grad_out.flatten(1, 2).index_select(1, slots.token[slots.members])
        grad_own = (grad_rows * self._members(self.inside)).sum(-1)
        grad_mixture = (self._rows(grad_out) @ self.summary.mT).unflatten(2, (-1, self.group))
        flat = grad_mixture.flatten(1)
        if self.rule.own_summary:
            flat.index_add_(1, slots.own, grad_own.flatten(1))
        else:
            flat.index_copy_(1, slots.own, grad_own.flatten(1))
        slope = (grad_mixture * self.mixture).sum(-1, keepdim=True)
        if grad_lse is not None:
            slope = slope - grad_lse[..., None]
        grad_logits = (grad_mixture - slope) * self.mixture
        grad_summary = self._rows(self.foreign).mT @ self._rows(grad_out)

        inside_lse_gradient = None
        if self.rule.lse:
            own = grad_logits.flatten(1).index_select(1, slots.own).unflatten(1, (-1, self.group))
            inside_lse_gradient = self._to_slots(own)
        slot_query, slot_key, slot_value = self._attend_backward(
            self._to_slots(self.own[..., None] * grad_rows), inside_lse_gradient
        )
        slot_value += self.shares[..., None] * grad_summary.flatten(1, 2).unsqueeze(2)
        learned = None
        if self.summary_key is not None:
            foreign = self._rows(self._without_own(grad_logits))
            query = (foreign @ self.summary_key * self.scale).unflatten(2, (-1, self.group))
            grad_summary_key = foreign.mT @ self._rows(tokens.query) * self.scale
            slot_key += self.shares[..., None] * grad_summary_key.flatten(1, 2).unsqueeze(2)
            key = torch.zeros_like(tokens.key)
        else:
            query, key, learned = self.affinities.backward(grad_logits, self._summary_gradient(grad_summary))
        self._add_(query, slot_query.unflatten(2, (-1, self.group)))
        self._add_(key, slot_key)
        value = torch.zeros_like(tokens.value)
        self._add_(value, slot_value)
        return query, key, value, learned

    def _summary_gradient(self, grad_summary: Tensor) -> Tensor:
        """Gradient of the summary logits, ``(g, b, n, c)``: a softmax over the members of each cluster."""
        grad_shares = (self.value @ grad_summary.flatten(1, 2).unsqueeze(-1)).squeeze(-1)
        slope = (grad_shares * self.shares).sum(-1, keepdim=True)
        per_slot = (self.shares * (grad_shares - slope)).flatten(1).index_select(1, self.slots.members)
        gradient = torch.zeros_like(self.affinities.key)
        gradient.flatten(1).index_copy_(1, self.slots.own_key, per_slot)
        return gradient


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    real: Tensor | None = None, kind: type[Pass] = Pass,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CAST over all tokens at once (specification 1.2 to 1.6, 5.1).

    Args:
        query: ``(b, h, n, d)``; query head ``i`` reads key head ``i // (h // g)``. Types may differ between
            the three, the work is done in float32 or float64.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        rule: How to cluster and combine; ``topk`` or ``sa_topk``.
        weights: Learned tensors.
        real: ``(b, n)`` boolean, true where a token is no padding. Padding is in no cluster.
        kind: Who computes it.

    Returns:
        Output ``(b, h, n, e)``, the values' type, contiguous; log of the normaliser of the mixture ``(b, h,
        n)``.
    """
    done = kind(Tokens.of(query, key, value, real), weights.to(work_dtype(query, key, value)), rule, scale)
    # A key takes part in the choice of all clusters: one that is not finite leaves nothing of its sequence.
    broken = ~torch.isfinite(done.tokens.key).flatten(2).all(-1).all(0)[:, None, None]
    out = join_heads(done.out()).masked_fill_(broken[..., None], torch.nan)
    log_sum_exp = join_heads(done.log_sum_exp).masked_fill_(broken, torch.nan)
    return out.to(value.dtype).contiguous(), log_sum_exp.to(statistics_dtype(value)).contiguous()


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, real: Tensor | None = None,
    kind: type[Pass] = Pass,
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
        Gradients of query, key and value, each of its input's shape and type, contiguous; those of the
        learned tensors in the type of the computation, ``None`` where they are zero (one softmax does not
        depend on them).
    """
    tokens = Tokens.of(query, key, value, real)
    done = kind(tokens, weights.to(work_dtype(query, key, value)), rule, scale)
    kv_heads, dtype = key.shape[1], tokens.query.dtype
    grad = split_heads(grad_out.to(dtype), kv_heads)
    grad_lse = None if grad_log_sum_exp is None else split_heads(grad_log_sum_exp.to(dtype), kv_heads)
    grad_query, grad_key, grad_value, learned = done.backward(grad, grad_lse)
    return *tokens.gradients(grad_query, grad_key, grad_value, like=(query, key, value)), learned


def members(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which tokens are in which cluster.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        rule: As in ``forward``.
        weights: As in ``forward``.
        real: As in ``forward``.

    Returns:
        ``(b, c, n)`` boolean.
    """
    tokens = Tokens.of(query, key, value, real)
    table = cluster(Affinities(tokens, weights.to(work_dtype(query, key, value)), rule, scale))
    batch, clusters, _ = table.shape
    length = query.shape[2]
    # Empty slots mark one token past the end, which is cut off.
    member = torch.zeros(batch, clusters, length + 1, dtype=torch.bool, device=query.device)
    return member.scatter_(2, table.masked_fill(table < 0, length), True)[..., :-1]


def exact_keys(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights, rows: Tensor,
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which tokens share a cluster with the given queries.

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
    member = members(query, key, value, scale, rule, weights, real).float()
    return ((member[..., rows].mT @ member) > 0)[:, None]
