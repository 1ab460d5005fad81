"""Barnes-Hut attention as an operator: a tree code with a content-based choice of what is opened. Nothing is
learned."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels import barnes_hut as kernel
from fastattn_compile.kernels.aten import barnes_hut as barnes_hut_aten
from fastattn_compile.kernels.aten import window as window_aten
from fastattn_compile.operators.barnes_hut.config import BarnesHutConfig
from fastattn_compile.operators.barnes_hut.cost import barnes_hut_cost, count_work
from fastattn_compile.operators.barnes_hut.decode import BarnesHutDecoder
from fastattn_compile.operators.barnes_hut.reference import barnes_hut_attention
from fastattn_compile.operators.base import (
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
from fastattn_compile.operators.documents import (
    backward_documents,
    exact_keys_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.operator import refuse_extras
from fastattn_compile.operators.window.reference import sink_tokens

_TERMS = {
    "chunk": "chunked attention",
    "prefix": "a bidirectional prefix",
}


class BarnesHutAttention(Operator[BarnesHutConfig]):
    """Near field and sinks exactly, and the far keys under the nodes of a tree that promise the most softmax
    mass.

    Serves self-attention, causal and bidirectional, with sliding windows, bands, key padding and packed
    documents (each a sequence with a tree of its own), at any length; a sequence of at most
    two blocks is attended exactly. Work is
    O(n log n), and the choice of a query never depends on what follows it under a causal mask.
    """

    name = "barnes_hut"
    config_type = BarnesHutConfig
    implementation = 3

    def supports(self, spec: SiteSpec) -> Support:
        """Self-attention with causal, windowed, banded or padded masks; anything else is refused with the
        reason."""
        mask = spec.mask
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        for term in mask.conflicts("left", "right", "end_aligned", "key_padding", "segments"):
            return no(f"{_TERMS[term]} is not supported: groups would span what the mask separates ({mask})")
        if spec.kind != "self":
            return no(
                "cross attention has no shared positions, so no key is near a query; "
                "only self-attention is served"
            )
        if spec.query_len == 1:
            return no(
                "a single query (decoding) gains nothing from a tree made for one step; exact is faster"
            )
        if spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys: "
                "queries and keys must stand at the same positions"
            )
        if mask.right is not None and mask.right < 0:
            return no(f"a causal mask shifted by {mask.right} is not supported; only an offset of 0")
        if mask.left is not None and mask.left < 0:
            return no(f"a mask that hides the query's own position (left({mask.left})) is not supported")
        if spec.bias in ("alibi", "bucketed"):
            return no(
                f"an additive bias by distance ({spec.bias}) is not supported: the choice of what to open estimates scores "
                "from keys alone; fma and window add it"
            )
        return refuse_extras(spec)

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        if inputs.segments is not None:
            return reference_documents(self.reference, inputs)
        return barnes_hut_attention(self.config, inputs)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """A few blocks of queries at a time, in O(n) memory."""
        if inputs.segments is not None:
            return forward_documents(self.forward, inputs, self._unit(inputs))
        pattern, pool = self.config.pattern(inputs.mask), self.config.rest == "pool"
        given = inputs.query, inputs.key, inputs.value, inputs.scale
        if self._near_alone(inputs):
            local = barnes_hut_aten.near_field(pattern)
            return AttentionOutput(*window_aten.forward(*given, local, inputs.key_padding))
        return AttentionOutput(*kernel.forward(*given, pattern, pool, inputs.key_padding))

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward`` through the softmax; the choice is made again and carries none."""
        if inputs.segments is not None:
            packed = inputs, output, grad_out, grad_log_sum_exp, self._unit(inputs)
            return backward_documents(lambda one, *saved: self.backward(one, (), *saved), *packed)
        pattern, pool = self.config.pattern(inputs.mask), self.config.rest == "pool"
        given = inputs.query, inputs.key, inputs.value, inputs.scale
        saved = output.out, output.log_sum_exp, grad_out, grad_log_sum_exp
        if self._near_alone(inputs):
            local = barnes_hut_aten.near_field(pattern)
            return Gradients(*window_aten.backward(*given, local, *saved, inputs.key_padding)[:3])
        return Gradients(*kernel.backward(*given, pattern, pool, *saved, inputs.key_padding))

    @property
    def comes_apart(self) -> bool:
        """Pooled nodes stand in one softmax with the keys; with ``rest="drop"`` there is no far half."""
        return self.config.rest == "pool"

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The near field, the sinks and the opened leaves, as far as the mask shows them."""
        if inputs.segments is not None:
            return exact_keys_documents(self.exact_keys, inputs, rows)
        keys = torch.arange(inputs.key.shape[2], device=rows.device)
        near = (rows[:, None] // self.config.block - keys // self.config.block).abs() <= 1
        near = near | sink_tokens(inputs, self.config.sinks)[:, None, None]
        if self._near_alone(inputs):
            return inputs.visible(rows) & near
        opened = barnes_hut_aten.opened_keys(
            inputs.query, inputs.key, inputs.scale, self.config.pattern(inputs.mask), rows, inputs.key_padding
        )
        return inputs.visible(rows) & (near | opened)

    def unopened_mass(self, inputs: AttentionInputs) -> Tensor:
        """Estimated share of every row's softmax mass that lies on keys which were not opened.

        Half the L1 distance between the row's weights and the exact ones is at most the true share, and the
        error of the
        output at most twice the share times the spread of the values. With ``select="bound"`` the estimate is
        an upper
        bound on the true share; else it is an estimate, usually too small since a mean key hides its best
        member.

        Args:
            inputs: The tensors.

        Returns:
            ``(batch, heads, n)`` between 0 and 1; 0 for rows that see no key.
        """
        if inputs.segments is not None:

            def of_documents(one: AttentionInputs) -> AttentionOutput:
                share = self.unopened_mass(one)
                return AttentionOutput(share[..., None], share)

            return forward_documents(of_documents, inputs, self._unit(inputs)).log_sum_exp
        mass = barnes_hut_aten.unopened_log_mass(
            inputs.query, inputs.key, inputs.scale, self.config.pattern(inputs.mask), inputs.key_padding
        )
        dropped = type(self)(BarnesHutConfig.from_dict({**self.config.to_dict(), "rest": "drop"}))
        met = dropped.forward(inputs).log_sum_exp.to(mass.dtype)
        return torch.where(mass == -torch.inf, 0.0, torch.sigmoid(mass - met))

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """``unopened_mass``: the estimated share of a row's softmax mass on keys that were not opened."""
        share = self.unopened_mass(inputs)
        seen = torch.ones_like(share, dtype=torch.bool)
        if inputs.key_padding is not None:
            seen = inputs.key_padding[:, None].expand_as(share)
        return {"unopened_mass": float(share[seen].double().mean())}

    def cost(self, spec: SiteSpec) -> Cost:
        """Keys met, pooled rows met, the products of the choice and the tree; ``keys_per_query`` leaves out
        the choice."""
        return barnes_hut_cost(self.config, spec)

    def selection_products(self, spec: SiteSpec) -> float:
        """Mean number of products with nodes of the tree that choosing costs a query."""
        length = int(spec.key_len)
        return count_work(self.config, spec.mask.positional, length).selection / max(1, length)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """All keys, and a tree over them that grows with every token."""
        return BarnesHutDecoder(self, scale)

    def _unit(self, inputs: AttentionInputs) -> int | None:
        """Padding speaks for the last group of a bidirectional sequence: its documents go by their very length."""
        return self.config.block if inputs.mask.causal else None

    def _near_alone(self, inputs: AttentionInputs) -> bool:
        """Whether no query has a far field, or nothing of it is ever met."""
        blocks = -(-inputs.key.shape[2] // self.config.block)
        return blocks <= 2 or (self.config.most_open == 0 and self.config.rest == "drop")
