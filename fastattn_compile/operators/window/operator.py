"""Local window attention as an operator: exact for what is near, blind for the rest. The control of every
report."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels import window as window_kernels
from fastattn_compile.kernels.aten import window as window_aten
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
from fastattn_compile.operators.window.config import WindowConfig
from fastattn_compile.operators.window.cost import window_cost
from fastattn_compile.operators.window.decode import WindowDecoder
from fastattn_compile.operators.window.reference import window_attention, window_keys

_TERMS = {
    "chunk": "chunked attention",
    "prefix": "a bidirectional prefix",
}


class WindowAttention(Operator[WindowConfig]):
    """The ``width`` tokens around a query and the first ``sinks`` of the sequence, as far as the site's mask
    shows them.

    Serves causal and bidirectional self-attention with sliding windows, bands, key padding and packed
    documents (each with sinks of its own), at any length, and queries that continue a cache (``end_aligned``). Biases by
    distance (ALiBi, buckets) are added to what is met.
    """

    name = "window"
    config_type = WindowConfig

    def supports(self, spec: SiteSpec) -> Support:
        """Positions must be shared by queries and keys."""
        mask = spec.mask
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        for term in mask.conflicts("left", "right", "end_aligned", "key_padding", "segments"):
            return no(
                f"{_TERMS[term]} is not supported: the sinks are the first tokens of the sequence ({mask})"
            )
        if spec.kind != "self" and not mask.end_aligned:
            return no(
                "cross attention has no shared positions, so no key is near a query; "
                "only self-attention is served"
            )
        if mask.segments and spec.query_len != spec.key_len:
            return no(
                "queries that continue a cache of packed documents are not supported; exact serves them"
            )
        if spec.query_len != spec.key_len and not mask.end_aligned:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys: queries and keys must stand "
                "at the same positions, or the last query at the last key"
            )
        return refuse_extras(spec, "alibi", "bucketed")

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Dense attention with the narrower mask."""
        if inputs.segments is not None:
            return reference_documents(self.reference, inputs)
        return window_attention(self.config, inputs)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Tiles of query rows against the stretch of keys around them."""
        if inputs.segments is not None:
            return forward_documents(self.forward, inputs, self.config.width)
        given = inputs.query, inputs.key, inputs.value, inputs.scale
        facts = inputs.key_padding, inputs.bias
        return AttentionOutput(*window_kernels.forward(*given, self._local(inputs), *facts))

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``, computed from the scores again."""
        if inputs.segments is not None:
            packed = inputs, output, grad_out, grad_log_sum_exp, self.config.width
            return backward_documents(lambda one, *saved: self.backward(one, (), *saved), *packed)
        given = inputs.query, inputs.key, inputs.value, inputs.scale
        saved = output.out, output.log_sum_exp, grad_out, grad_log_sum_exp
        facts = inputs.key_padding, inputs.bias
        dq, dk, dv, of_bias = window_kernels.backward(*given, self._local(inputs), *saved, *facts)
        return Gradients(dq, dk, dv, bias=of_bias)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The window and the sinks."""
        if inputs.segments is not None:
            return exact_keys_documents(self.exact_keys, inputs, rows)
        return window_keys(self.config, inputs, rows)

    def cost(self, spec: SiteSpec) -> Cost:
        """Visible pairs inside the window, and the sinks outside of it."""
        return window_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """The last ``width`` tokens and the sinks."""
        return WindowDecoder(self, scale)

    def _local(self, inputs: AttentionInputs) -> window_aten.Local:
        mask = inputs.mask
        query_len, key_len = inputs.query.shape[2], inputs.key.shape[2]
        left, right = self.config.reach(mask.causal)
        # A wider window than the mask or the sequence shows costs work and nothing else.
        left = min(left, key_len, left if mask.left is None else max(0, mask.left))
        right = min(right, key_len, right if mask.right is None else max(0, mask.right))
        rows = window_aten.window_rows(query_len, left, right)
        return window_aten.Local(
            rows, -(-left // rows) * rows, -(-right // rows) * rows, window_aten.Band(left, right),
            mask.left, mask.right, self.config.sinks, key_len - query_len if mask.end_aligned else 0,
        )  # fmt: skip
