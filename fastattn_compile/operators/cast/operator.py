"""CAST as an operator (van Engelenhoven, Strisciuglio, Talavera, arXiv 2402.04239)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels import cast as cast_kernel
from fastattn_compile.kernels import cast_causal
from fastattn_compile.kernels.aten.cast_affinity import Rule
from fastattn_compile.operators.base import (
    YES,
    AttentionInputs,
    AttentionOutput,
    Cost,
    Decoder,
    Gradients,
    Operator,
    SiteSpec,
    Support,
    no,
)
from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.cost import cast_cost
from fastattn_compile.operators.cast.decoder import CastDecoder
from fastattn_compile.operators.cast.losses import routing_loss
from fastattn_compile.operators.cast.parameters import (
    check,
    initial,
    packed_gradients,
    shapes,
    sharpness,
    unpacked,
)
from fastattn_compile.operators.cast.reference import cast_attention
from fastattn_compile.operators.documents import (
    backward_documents,
    exact_keys_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.operator import refuse_extras


class CastAttention(Operator[CastConfig]):
    """Attention inside clusters of tokens chosen by learned surrogates, and a summary of every other cluster.

    Serves bidirectional self-attention, and causal self-attention under ``token_choice``, with key padding,
    at any length that the clusters hold.
    """

    name = "cast"
    config_type = CastConfig
    implementation = 2

    def supports(self, spec: SiteSpec) -> Support:
        """Self-attention whose mask fits the clustering; anything else is refused with the reason."""
        mask, config = spec.mask, self.config
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        extras = refuse_extras(spec)
        if not extras:
            return extras
        for term in mask.conflicts("right", "end_aligned", "key_padding", "segments"):
            return no(f"the mask term {term} is not supported: clusters span what it separates ({mask})")
        if spec.kind != "self":
            return no("cross attention is not supported: a token's cluster comes from its query and its key")
        if spec.query_len == 1:
            return no(
                "a single query (decoding) has nothing to cluster; token_choice decodes through its decoder"
            )
        if spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys: they must stand at the same positions"
            )
        if mask.right is not None and mask.right != 0:
            return no(f"a band that ends {mask.right} positions from the query is not supported")
        if mask.causal and not config.causal:
            return no(
                f"{config.clustering} looks at all tokens: future ones would move past ones elsewhere; "
                "set clustering='token_choice', which is causal, with a cluster_size"
            )
        if config.causal and not mask.causal:
            return no(
                "token_choice shows a token its past alone and this site is not causal; use topk or sa_topk"
            )
        if config.cluster_size is not None and not config.causal:
            if spec.key_len < config.cluster_size:
                return no(
                    f"a cluster of {config.cluster_size} is larger than the sequence of {spec.key_len} tokens"
                )
            if config.clustering == "sa_topk" and spec.key_len > config.clusters * config.cluster_size:
                return no(
                    f"{config.clusters} clusters of {config.cluster_size} hold fewer than {spec.key_len} "
                    "tokens; raise clusters or cluster_size, or leave cluster_size out"
                )
        return YES

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        if inputs.segments is not None:
            return reference_documents(lambda one: self.reference(one, parameters), inputs)
        check(self.config, parameters, inputs)
        return cast_attention(self.config, inputs, parameters)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Clusters gathered into tiles, or chunks of a causal scan."""
        if inputs.segments is not None:
            return forward_documents(lambda one: self.forward(one, parameters), inputs, self._unit)
        check(self.config, parameters, inputs)
        kernel = cast_causal if self.config.causal else cast_kernel
        return AttentionOutput(
            *kernel.forward(
                inputs.query, inputs.key, inputs.value, inputs.scale, self.rule(inputs.key.shape[2]),
                unpacked(self.config, parameters, inputs.query.shape[1]), inputs.key_padding,
            )
        )  # fmt: skip

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``, computed anew; none passes the choice of clusters (specification 1.7)."""
        if inputs.segments is not None:
            packed = inputs, output, grad_out, grad_log_sum_exp, self._unit
            return backward_documents(lambda one, *saved: self.backward(one, parameters, *saved), *packed)
        kernel = cast_causal if self.config.causal else cast_kernel
        query, key, value, learned = kernel.backward(
            inputs.query, inputs.key, inputs.value, inputs.scale, self.rule(inputs.key.shape[2]),
            unpacked(self.config, parameters, inputs.query.shape[1]), grad_out, grad_log_sum_exp,
            inputs.key_padding,
        )  # fmt: skip
        return Gradients(query, key, value, packed_gradients(self.config, learned, parameters))

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The keys that share a cluster with the query, under token choice the most recent ones.

        Clusters depend on learned parameters. Without them all that is known is that a token meets itself,
        and under ``topk``, where it may be in no cluster, not even that.
        """
        if inputs.segments is not None:
            return exact_keys_documents(
                lambda one, some: self.exact_keys(one, some, parameters), inputs, rows
            )
        seen = inputs.visible(rows)
        if not parameters:
            itself = rows[:, None] == torch.arange(inputs.key.shape[2], device=rows.device)
            return seen & itself & (self.config.clustering != "topk")
        kernel = cast_causal if self.config.causal else cast_kernel
        return seen & kernel.exact_keys(
            inputs.query, inputs.key, inputs.value, inputs.scale, self.rule(inputs.key.shape[2]),
            unpacked(self.config, parameters, inputs.query.shape[1]), rows, inputs.key_padding,
        )  # fmt: skip

    def routing_loss(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
    ) -> Tensor | None:
        """Softmax mass outside the clusters of a query, from the affinities that clusters are chosen by."""
        check(self.config, parameters, inputs)
        return routing_loss(self.config, inputs, parameters, rows)

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """How tokens fall into clusters (specification 4).

        ``in_no_cluster``: share of tokens that only their own summaries' readers would have met, so nobody.
        ``clusters_per_token``: their mean number. ``imbalance``: pairs inside the clusters over those of even
        ones; 1 is even.
        """
        check(self.config, parameters, inputs)
        members = cast_causal.members if self.config.causal else cast_kernel.members
        member = members(
            inputs.query, inputs.key, inputs.value, inputs.scale, self.rule(inputs.key.shape[2]),
            unpacked(self.config, parameters, inputs.query.shape[1]), inputs.key_padding,
        )  # fmt: skip
        real = inputs.key_padding
        if real is None:
            real = torch.ones_like(member[:, 0])
        count, filled = member.sum(1)[real].double(), member.sum(-1).double()
        even = filled.sum(-1, keepdim=True).square() / self.config.clusters
        return {
            "in_no_cluster": float((count == 0).double().mean()),
            "clusters_per_token": float(count.mean()),
            "imbalance": float((filled.square().sum(-1, keepdim=True) / even.clamp(min=1)).mean()),
        }

    def cost(self, spec: SiteSpec) -> Cost:
        """Counted from the definition; ``keys_per_query`` is pairs inside clusters and one a summary."""
        return cast_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """Buckets and summaries under ``token_choice``; the bidirectional clusterings have no such form."""
        if not self.config.causal:
            return None
        return CastDecoder(self.config, self.rule(1), scale, parameters)

    @property
    def learned(self) -> bool:
        """Always: without surrogate tokens there are no clusters."""
        return True

    @property
    def starts_from_sample(self) -> bool:
        """Surrogates start at centroids of keys."""
        return True

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Surrogates, gate and temperature, as far as the configuration has them; lengths do not matter."""
        return shapes(self.config, spec)

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Surrogates at the centroids of the sample's keys, random without a sample; a gate of 0."""
        return initial(self.config, spec, sample)

    @property
    def _unit(self) -> int | None:
        """Documents of one length go together where it decides the size of a cluster; else padding moves nothing."""
        return 1 if self.config.cluster_size is not None else None

    def rule(self, length: int) -> Rule:
        """The configuration as the kernels read it, for a sequence of ``length`` tokens."""
        config = self.config
        return Rule(
            config.clusters, config.size(length), config.clustering, config.sa_order == "pair",
            config.head_reduce, config.affinity_scale == "sqrt_width", config.select, sharpness(config),
            config.own_summary == "included", config.combine == "lse",
        )  # fmt: skip
