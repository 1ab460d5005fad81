"""Configuration of CAST."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.operators.base import OperatorConfig

CHOICES = {
    "clustering": ("topk", "sa_topk", "token_choice"),
    "combine": ("paper", "lse"),
    "select": ("mix", "key", "query"),
    "sa_order": ("token", "pair"),
    "head_reduce": ("sum", "mean", "softmax_mean"),
    "affinity_scale": ("none", "sqrt_width"),
    "xi": ("one_plus_softplus", "softplus"),
    "tau": ("fixed", "learned"),
    "surrogate_space": ("projected", "input"),
    "own_summary": ("excluded", "included"),
    "phi_heads": ("shared", "per_head"),
}


@dataclass(frozen=True, kw_only=True)
class CastConfig(OperatorConfig):
    """What CAST can be told. Numbers in brackets are sections of the specification.

    Args:
        clusters: Number of clusters. Cost is least near ``sqrt(2 n / 3)``.
        cluster_size: Tokens of a cluster; ``None`` is just enough for all clusters to hold the sequence
            together. Under token choice, how many recent members of its cluster a token meets; it must be
            given.
        clustering: ``"topk"``, a cluster takes its best tokens, which may share clusters or be in none;
            ``"sa_topk"``, every token in exactly one cluster [1.3]; ``"token_choice"``, the causal form
            [5.2].
        combine: ``"paper"``, a learned mixture of the attention inside own clusters and of learned summaries
            [1.5, 1.6]; ``"lse"``, one softmax over own tokens and mean summaries [5.1]. Tokens in ``m``
            clusters count ``1 / m`` in each.
        select: Which affinity clusters tokens: of keys, of queries, or a mix by a learned gate [1.2]. The
            specification's causal form is ``"key"``.
        sa_order: Greedy order of single assignment: tokens by their best affinity, or (token, cluster) pairs
            [1.3].
        head_reduce: How heads agree on one affinity: logits summed, averaged, or their softmaxes averaged.
        affinity_scale: ``"sqrt_width"`` divides logits by the square root of all heads' channels before the
            softmax.
        xi: Factor that the gate puts on logits.
        tau: ``"learned"`` learns factors on the temperature of mixing and of summaries. They start neutral:
            mixing at the site's scale, summaries as plain means [5.1].
        surrogate_space: ``"input"`` learns surrogates of queries and of keys apart.
        own_summary: ``"included"`` adds the summary of own clusters to the mixture; weights then exceed 1.
            Paper only.
        phi_heads: One gate for all heads, or one for each key head. Heads average their gates to cluster.
    """

    clusters: int = 32
    cluster_size: int | None = None
    clustering: str = "topk"
    combine: str = "paper"
    select: str = "mix"
    sa_order: str = "token"
    head_reduce: str = "sum"
    affinity_scale: str = "none"
    xi: str = "one_plus_softplus"
    tau: str = "fixed"
    surrogate_space: str = "projected"
    own_summary: str = "excluded"
    phi_heads: str = "shared"

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; one of: {', '.join(valid)}")
        if self.clusters < 1:
            raise ValueError(f"clusters must be a positive number, got {self.clusters}")
        if self.cluster_size is not None:
            if type(self.cluster_size) is not int:
                raise TypeError(f"cluster_size must be int or None, got {self.cluster_size!r}")
            if self.cluster_size < 1:
                raise ValueError(f"cluster_size must be a positive number of tokens, got {self.cluster_size}")
        elif self.clustering == "token_choice":
            raise ValueError(
                "token_choice needs a cluster_size: how many recent members a token meets cannot follow from "
                "the length of a sequence that is still being written"
            )
        if self.combine == "lse":
            if self.own_summary == "included":
                raise ValueError(
                    "own_summary='included' needs combine='paper': one softmax would count own tokens twice"
                )
            if self.tau == "learned":
                raise ValueError(
                    "tau='learned' needs combine='paper': one softmax is at the site's own scale"
                )

    @property
    def causal(self) -> bool:
        """Whether this is the causal form."""
        return self.clustering == "token_choice"

    @property
    def gated(self) -> bool:
        """Whether the learned gate takes part in anything."""
        return self.combine == "paper" or self.select == "mix"

    def size(self, length: int) -> int:
        """Slots of a cluster for a sequence of ``length`` tokens."""
        return self.cluster_size if self.cluster_size is not None else -(-length // self.clusters)
