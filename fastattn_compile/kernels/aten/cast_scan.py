"""Running summaries of clusters, chunk by chunk: means over members so far, never formed for every token.

``b`` batch, ``g`` key heads, ``n`` tokens, ``r`` query heads of a key head, ``c`` clusters. With ``a_j`` the
logit of token ``j`` in the summary of its cluster ``k_j``, and ``z_tc`` the logarithm of the sum of
``exp(a_j)`` over the members of ``c`` up to ``t``, the summary of cluster ``c`` at time ``t`` is

    x_tc = sum of exp(a_j - z_tc) v_j over j <= t with k_j = c.

A cluster's weight in a chunk is one product of the chunk with itself and one with the summaries at its start.
All exponents are at most 0, so nothing overflows and what comes later has no influence, not even by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 64


class ClusterScan:
    """Summaries of clusters as functions of time, and the two transposes that gradients need.

    Args:
        log_weight: ``(g or 1, b, n)``, ``a``.
        log_mass: ``(g or 1, b, n, c)`` float64, ``z``; -inf while a cluster is empty.
        assigned: ``(b, n)`` cluster of each token, -1 for none.
    """

    def __init__(self, log_weight: Tensor, log_mass: Tensor, assigned: Tensor) -> None:
        self.log_weight, self.log_mass = log_weight, log_mass
        self.assigned, self.own = assigned >= 0, assigned.clamp(min=0)

    def _parts(self) -> Iterator[slice]:
        length = self.own.shape[1]
        return (slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK))

    def _exp(self, exponent: Tensor) -> Tensor:
        # Masses are float64: rounded to float32 they would cost as many digits of a weight as they are large.
        return exponent.to(self.log_weight.dtype).exp()

    def _decay(self, part: slice) -> Tensor:
        """``exp(a_j - z_t)`` at the cluster of ``j``, 0 unless ``j <= t``: ``(g or 1, b, t, j)``."""
        mass = self.log_mass[:, :, part]
        width = mass.shape[2]
        index = self.own[None, :, None, part].expand(mass.shape[0], -1, width, -1)
        exponent = self.log_weight[:, :, None, part] - mass.gather(-1, index)
        past = torch.ones(width, width, dtype=torch.bool, device=mass.device).tril()
        return self._exp(exponent.masked_fill(~(past & self.assigned[:, None, part]), -torch.inf))

    def _carry(self, part: slice) -> Tensor:
        """What remains at ``t`` of a summary at the chunk's start: ``(g or 1, b, t, c)``."""
        mass = self.log_mass[:, :, part]
        if part.start == 0:
            return self._exp(torch.full_like(mass, -torch.inf))
        before = self.log_mass[:, :, part.start - 1, None]
        return self._exp((before - mass).masked_fill(before == -torch.inf, -torch.inf))

    def _members(self, part: slice, dtype: torch.dtype) -> Tensor:
        """One row a token with 1 at its cluster: ``(b, t, c)``."""
        clusters = self.log_mass.shape[-1]
        member = torch.nn.functional.one_hot(self.own[:, part], clusters) * self.assigned[:, part, None]
        return member.to(dtype)

    def _at_own(self, weight: Tensor, part: slice) -> Tensor:
        """``(g, b, t, r, c)`` at the clusters of the chunk's tokens: ``(g, b, t, r, j)``."""
        index = self.own[None, :, None, None, part].expand(*weight.shape[:4], -1)
        return weight.gather(-1, index)

    def _advanced(self, state: Tensor, value: Tensor, decay: Tensor, carry: Tensor, member: Tensor) -> Tensor:
        """Summaries at the end of a chunk, ``(g, b, c, e)``, from those at its start."""
        return carry[:, :, -1, :, None] * state + member.mT @ (decay[:, :, -1, :, None] * value)

    def mix(self, weight: Tensor, value: Tensor) -> Tensor:
        """``sum_c weight_tc x_tc``.

        Args:
            weight: ``(g, b, n, r, c)``; 0 where a cluster is empty.
            value: ``(g, b, n, e)``, ``v``.

        Returns:
            ``(g, b, n, r, e)``.
        """
        heads, batch, _, group, clusters = weight.shape
        out = value.new_empty(*weight.shape[:4], value.shape[-1])
        state = value.new_zeros(heads, batch, clusters, value.shape[-1])
        for part in self._parts():
            decay, carry, v, w = self._decay(part), self._carry(part), value[:, :, part], weight[:, :, part]
            inside = self._at_own(w, part) * decay[:, :, :, None]
            mixed = inside.flatten(2, 3) @ v + (w * carry[:, :, :, None]).flatten(2, 3) @ state
            out[:, :, part] = mixed.unflatten(2, (-1, group))
            state = self._advanced(state, v, decay, carry, self._members(part, v.dtype))
        return out

    def score(self, query: Tensor, value: Tensor) -> Tensor:
        """``query_t . x_tc``.

        Args:
            query: ``(g, b, n, r, e)``.
            value: ``(g, b, n, e)``, ``v``.

        Returns:
            ``(g, b, n, r, c)``; 0 where a cluster is empty.
        """
        heads, batch, length, group, channels = query.shape
        clusters = self.log_mass.shape[-1]
        out = query.new_empty(heads, batch, length, group, clusters)
        state = value.new_zeros(heads, batch, clusters, channels)
        for part in self._parts():
            decay, carry, v = self._decay(part), self._carry(part), value[:, :, part]
            q, member = query[:, :, part].flatten(2, 3), self._members(part, v.dtype)
            inside = (q @ v.mT).unflatten(2, (-1, group)) * decay[:, :, :, None]
            before = (q @ state.mT).unflatten(2, (-1, group)) * carry[:, :, :, None]
            out[:, :, part] = (inside.flatten(2, 3) @ member).unflatten(2, (-1, group)) + before
            state = self._advanced(state, v, decay, carry, member)
        return out

    def transposed(self, weight: Tensor, query: Tensor) -> Tensor:
        """What reaches ``v_j``: ``sum over t >= j and r of weight_t exp(a_j - z_t) query_t`` at its cluster.

        Args:
            weight: ``(g, b, n, r, c)``; 0 where a cluster is empty.
            query: ``(g, b, n, r, e)``.

        Returns:
            ``(g, b, n, e)``; 0 for tokens without a cluster.
        """
        heads, batch, length, _, clusters = weight.shape
        out = query.new_empty(heads, batch, length, query.shape[-1])
        # What later chunks ask of each cluster, as it reaches the last token of the chunk at hand.
        state = query.new_zeros(heads, batch, clusters, query.shape[-1])
        for part in reversed(list(self._parts())):
            decay, carry, w = self._decay(part), self._carry(part), weight[:, :, part]
            q, member = query[:, :, part].flatten(2, 3), self._members(part, query.dtype)
            inside = (self._at_own(w, part) * decay[:, :, :, None]).flatten(2, 3)
            out[:, :, part] = inside.mT @ q + decay[:, :, -1, :, None] * (member @ state)
            state = carry[:, :, -1, :, None] * state + (w * carry[:, :, :, None]).flatten(2, 3).mT @ q
        return out

    def logit_gradient(self, weight: Tensor, query: Tensor, value: Tensor, score: Tensor) -> Tensor:
        """Gradient of ``a`` where ``query`` is that of ``mix(weight, value)``; masses follow from ``a``.

        Pairs of a chunk are subtracted before they are summed: two sums of the two parts would cancel.

        Args:
            weight: ``(g, b, n, r, c)``; 0 where a cluster is empty.
            query: ``(g, b, n, r, e)``.
            value: ``(g, b, n, e)``, ``v``.
            score: ``(g, b, n, r, c)``, ``self.score(query, value)``.

        Returns:
            ``(g, b, n)``: ``sum over t >= j and r of weight_t exp(a_j - z_t) (query_t . v_j - score_t)``, at
            the cluster of ``j``; 0 for tokens without one.
        """
        heads, batch, length, group, clusters = weight.shape
        out = query.new_empty(heads, batch, length)
        state = query.new_zeros(heads, batch, clusters, query.shape[-1])
        state_score = query.new_zeros(heads, batch, clusters)
        for part in reversed(list(self._parts())):
            decay, carry = self._decay(part), self._carry(part)
            w, s, v = weight[:, :, part], score[:, :, part], value[:, :, part]
            q, member = query[:, :, part].flatten(2, 3), self._members(part, query.dtype)
            pairs = (q @ v.mT).unflatten(2, (-1, group)) - self._at_own(s, part)
            inside = (pairs * self._at_own(w, part) * decay[:, :, :, None]).sum((2, 3))
            later = ((member @ state) * v).sum(-1) - (member @ state_score[..., None]).squeeze(-1)
            out[:, :, part] = inside + decay[:, :, -1] * later
            last, reaching = carry[:, :, -1], w * carry[:, :, :, None]
            state = last[..., None] * state + reaching.flatten(2, 3).mT @ q
            state_score = last * state_score + (reaching * s).sum((2, 3))
        return out
