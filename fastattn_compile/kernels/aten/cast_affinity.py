"""Affinities of tokens to surrogate tokens: what clustering, mixing and summaries of CAST are made from.

Heads are laid out for the products that follow: queries ``(g, b, n, r, d)`` with ``r`` query heads that share
one of ``g`` key heads, keys ``(g, b, n, d)``, values ``(g, b, n, e)``; ``c`` clusters. A gate ``phi`` of
every token is shared by all heads (``p = 1``) or belongs to a key head (``p = g``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.tiles import all_finite, without_nonfinite, work_dtype


@dataclass(frozen=True)
class Rule:
    """How CAST clusters and combines; the names are those of its configuration.

    Args:
        clusters: Number of clusters.
        size: Slots of a cluster, or of the bucket of recent members under token choice.
        clustering: ``"topk"``, ``"sa_topk"`` or ``"token_choice"``.
        by_pair: Greedy order of single assignment goes by pairs.
        head_reduce: ``"sum"``, ``"mean"`` or ``"softmax_mean"``.
        width_scale: Affinities are divided by the square root of the width before their softmax.
        select: ``"mix"``, ``"key"`` or ``"query"``.
        sharpness: 1 or 0, what is added to the softplus of the gate.
        own_summary: A token meets the summaries of its own clusters too.
        lse: One softmax over own tokens and summaries, instead of the paper's mixture.
    """

    clusters: int
    size: int
    clustering: str = "topk"
    by_pair: bool = False
    head_reduce: str = "sum"
    width_scale: bool = False
    select: str = "mix"
    sharpness: float = 1.0
    own_summary: bool = False
    lse: bool = False


@dataclass(frozen=True)
class Weights:
    """The learned tensors, in the type of the computation; gradients have the same form.

    Args:
        query_surrogates: ``(c, h, d)``.
        key_surrogates: ``(c, g, d)``.
        gate: ``(p, h, d)``, or ``None`` where no gate is used.
        gate_bias: ``(p,)``, or ``None``.
        temperature: ``(2,)`` factors on the scale of mixing and of summaries, or ``None`` for 1.
    """

    query_surrogates: Tensor
    key_surrogates: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    temperature: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Weights:
        """The same tensors in another type."""
        cast = (None if x is None else x.to(dtype) for x in (self.gate, self.gate_bias, self.temperature))
        return Weights(self.query_surrogates.to(dtype), self.key_surrogates.to(dtype), *cast)


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values in the layout of this module; keys, values and queries of padding are 0.

    Args:
        query: ``(g, b, n, r, d)``.
        key: ``(g, b, n, d)``.
        value: ``(g, b, n, e)``.
        real: ``(b, n)`` boolean, or ``None`` when all are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tokens:
        """Lays out ``(b, h, n, d)``, ``(b, g, n, d)`` and ``(b, g, n, e)``."""
        dtype = work_dtype(query, key, value)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if real is not None:
            # What stands at padding may be NaN, and 0 * NaN is NaN.
            q, k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (q, k, v))
        return Tokens(
            split_heads(q, key.shape[1]), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), real
        )

    def finite(self) -> Tokens:
        """The same tokens with 0 in place of keys and values that are not finite."""
        if all_finite(self.key, self.value):
            return self
        return Tokens(self.query, without_nonfinite(self.key), without_nonfinite(self.value), self.real)

    def gradients(
        self, query: Tensor, key: Tensor, value: Tensor, like: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in this layout as gradients of the tensors ``like`` that were given to ``of``."""

        def back(x: Tensor, origin: Tensor) -> Tensor:
            if self.real is not None:
                x = x.masked_fill(~self.real[:, None, :, None], 0)
            return x.to(origin.dtype).contiguous()

        return (
            back(join_heads(query), like[0]),
            back(key.transpose(0, 1), like[1]),
            back(value.transpose(0, 1), like[2]),
        )


def split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """``(b, h, n, *)`` as ``(g, b, n, r, *)``."""
    return x.unflatten(1, (kv_heads, -1)).movedim((1, 0, 3, 2), (0, 1, 2, 3)).contiguous()


def join_heads(x: Tensor) -> Tensor:
    """``(g, b, n, r, *)`` as ``(b, h, n, *)``."""
    return x.movedim((0, 1, 2, 3), (1, 0, 3, 2)).flatten(1, 2)


class Affinities:
    """Products of tokens with surrogates, their gates, and the gradients of both.

    Args:
        tokens: The tokens.
        weights: The learned tensors.
        rule: The rule.
        scale: Factor on the scores of the site, ``1 / tau``.
    """

    def __init__(self, tokens: Tokens, weights: Weights, rule: Rule, scale: float) -> None:
        kv_heads, _, _, group, _ = tokens.query.shape
        self.tokens, self.weights, self.rule, self.scale = tokens, weights, rule, scale
        self.query_surrogates = weights.query_surrogates.unflatten(1, (kv_heads, group))
        self.gate: Tensor | None = None
        if weights.gate is not None and weights.gate_bias is not None:
            projection = weights.gate.unflatten(1, (kv_heads, group))
            gate = torch.einsum("gbnrd,pgrd->pbn", tokens.query, projection)
            gate = gate + weights.gate_bias[:, None, None]
            # Others meet a token through its gate: without this, NaN in a query would leave its row.
            self.gate = gate.masked_fill(~torch.isfinite(gate), 0)

    @cached_property
    def query(self) -> Tensor:
        """Products of queries with surrogates, ``(g, b, n, r, c)``; one softmax that selects by keys needs none."""
        return torch.einsum("gbnrd,cgrd->gbnrc", self.tokens.query, self.query_surrogates)

    @cached_property
    def key(self) -> Tensor:
        """Products of keys with surrogates, ``(g, b, n, c)``."""
        return torch.einsum("gbnd,cgd->gbnc", self.tokens.key, self.weights.key_surrogates)

    def selection(self) -> tuple[Tensor, Tensor]:
        """The affinity that clusters tokens and what breaks its ties (specification 1.2, 4), ``(b, n, c)``.

        Both are finite whatever the tokens hold: an assignment must end even where a token is NaN.
        """
        sides = {
            "query": self.query.movedim(3, 1).flatten(0, 1) if self.rule.select != "key" else None,
            "key": self.key if self.rule.select != "query" else None,
        }
        found = {name: self._reduced(x, name) for name, x in sides.items() if x is not None}
        if self.rule.select != "mix":
            affinity, tie = found[self.rule.select]
            return affinity.nan_to_num(), tie.nan_to_num()
        if self.gate is None:
            raise ValueError("selection by a mix of query and key needs the gate")
        share = self.gate.sigmoid().mean(0)[..., None]
        (query, query_tie), (key, key_tie) = found["query"], found["key"]
        affinity, tie = share * query + (1 - share) * key, share * query_tie + (1 - share) * key_tie
        return affinity.nan_to_num(), tie.nan_to_num()

    def _reduced(self, x: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """``(heads, b, n, c)`` products as one affinity for all heads, and as its logits."""
        heads = x.shape[0]
        if self.rule.width_scale:
            x = x * (heads * self.tokens.key.shape[-1]) ** -0.5
        logits = x.sum(0)
        if self.rule.head_reduce == "softmax_mean":
            return x.softmax(-1).mean(0), logits
        if self.rule.head_reduce == "mean":
            logits = logits / heads
        return logits.softmax(-1), logits

    def _temperature(self, side: int) -> Tensor | float:
        return 1.0 if self.weights.temperature is None else self.weights.temperature[side]

    def _gate(self) -> Tensor:
        if self.gate is None:
            raise ValueError("the paper's combination needs the gate")
        return self.gate

    def mixing_logits(self) -> Tensor:
        """Logits of the mixture over clusters, ``(g, b, n, r, c)`` (specification 1.6)."""
        sharpened = (self.rule.sharpness + F.softplus(self._gate()))[..., None, None]
        return self.query * (sharpened * (self.scale * self._temperature(0)))

    def summary_logits(self) -> Tensor:
        """Logits of every token in the summary of every cluster, ``(g, b, n, c)`` (specification 1.5)."""
        sharpened = (self.rule.sharpness + F.softplus(-self._gate()))[..., None]
        return self.key * (sharpened * (self.scale * self._temperature(1)))

    def backward(self, grad_mixing: Tensor, grad_summary: Tensor) -> tuple[Tensor, Tensor, Weights]:
        """Gradients of the two logits carried to tokens and learned tensors (specification 1.7).

        Args:
            grad_mixing: Gradient of ``mixing_logits``.
            grad_summary: Gradient of ``summary_logits``.

        Returns:
            Gradients of queries and keys in the layout of the tokens, and of the learned tensors.
        """
        gate, tokens, weights = self._gate(), self.tokens, self.weights
        shared = gate.shape[0] == 1

        def of_gate(x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True) if shared else x

        sharp_query = self.rule.sharpness + F.softplus(gate)
        sharp_key = self.rule.sharpness + F.softplus(-gate)
        # What a logit changes with its factor, before scale and temperature.
        slope_query = of_gate((grad_mixing * self.query).sum((-2, -1))) * self.scale
        slope_key = of_gate((grad_summary * self.key).sum(-1)) * self.scale
        t_query, t_key = self._temperature(0), self._temperature(1)
        grad_gate = slope_query * t_query * gate.sigmoid() - slope_key * t_key * (-gate).sigmoid()
        grad_query_affinity = grad_mixing * (sharp_query * (self.scale * t_query))[..., None, None]
        grad_key_affinity = grad_summary * (sharp_key * (self.scale * t_key))[..., None]

        query = torch.einsum("gbnrc,cgrd->gbnrd", grad_query_affinity, self.query_surrogates)
        key = torch.einsum("gbnc,cgd->gbnd", grad_key_affinity, weights.key_surrogates)
        if weights.gate is None:
            raise ValueError("the paper's combination needs the gate")
        projection = weights.gate.unflatten(1, self.query_surrogates.shape[1:3])
        query += torch.einsum("pbn,pgrd->gbnrd", grad_gate, projection)
        temperature = None
        if weights.temperature is not None:
            temperature = torch.stack([(slope_query * sharp_query).sum(), (slope_key * sharp_key).sum()])
        return query, key, Weights(
            torch.einsum("gbnrc,gbnrd->cgrd", grad_query_affinity, tokens.query).flatten(1, 2),
            torch.einsum("gbnc,gbnd->cgd", grad_key_affinity, tokens.key),
            torch.einsum("pbn,gbnrd->pgrd", grad_gate, tokens.query).flatten(1, 2),
            grad_gate.sum((1, 2)),
            temperature,
        )  # fmt: skip
