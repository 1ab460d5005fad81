"""Exact attention as an operator: what a site falls back to, and what the others are compared with."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.aten import flash_cpu
from fastattn_compile.kernels.aten.exact import Span, Visible
from fastattn_compile.kernels.tiles import all_finite
from fastattn_compile.operators.base import (
    YES,
    AttentionInputs,
    AttentionOutput,
    Cost,
    Gradients,
    Operator,
    SiteSpec,
    Support,
    no,
)
from fastattn_compile.operators.documents import (
    backward_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.config import ExactConfig
from fastattn_compile.operators.exact.cost import exact_cost
from fastattn_compile.operators.exact.reference import exact_attention


class ExactAttention(Operator[ExactConfig]):
    """Softmax attention without approximation, self and cross, with every mask understood as structure."""

    name = "exact"
    config_type = ExactConfig

    def supports(self, spec: SiteSpec) -> Support:
        """Yes for every understood mask; refuses what changes the scores or reads the weights."""
        if not spec.mask.understood:
            return no(
                f"the mask is not understood as structure ({spec.mask.opaque}); leave the site as it is"
            )
        if spec.bias != "none" and spec.mask.segments and spec.query_len != spec.key_len:
            return no("a bias on queries that continue a cache of packed documents is not supported")
        return refuse_extras(spec, "alibi", "bucketed")

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Dense softmax attention."""
        if _by_document(inputs):
            return reference_documents(exact_attention, inputs)
        return exact_attention(inputs)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """PyTorch's CPU flash kernel where it applies, tiles of query rows on ATen elsewhere."""
        return exact_forward(inputs)

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``."""
        return exact_backward(inputs, output, grad_out, grad_log_sum_exp)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Every visible key."""
        return inputs.visible(rows)

    def cost(self, spec: SiteSpec) -> Cost:
        """Visible pairs, two products each; queries, keys, values and outputs moved once."""
        return exact_cost(spec)


def exact_forward(inputs: AttentionInputs) -> AttentionOutput:
    """Exact attention by the best kernel there is, without autograd."""
    if _by_document(inputs):
        return forward_documents(exact_forward, inputs, 1)
    q, k, v, scale, mask = inputs.query, inputs.key, inputs.value, inputs.scale, inputs.mask
    # The flash kernel would let a NaN reach rows of its tile that do not see it.
    if _plain(inputs) and flash_cpu.serves(q, k, v) and (not mask.causal or all_finite(k, v)):
        return AttentionOutput(*flash_cpu.forward(q, k, v, scale, mask.causal))
    visible, span = visibility(inputs)
    return AttentionOutput(*exact_aten.forward(q, k, v, scale, visible, span, *_bias(inputs)))


def exact_backward(
    inputs: AttentionInputs, output: AttentionOutput, grad_out: Tensor, grad_log_sum_exp: Tensor | None
) -> Gradients:
    """Gradients of ``exact_forward``.

    Args:
        inputs: What ``exact_forward`` was given.
        output: What it returned.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp, ``None`` or zeros when nothing used it.
    """
    if _by_document(inputs):
        return backward_documents(exact_backward, inputs, output, grad_out, grad_log_sum_exp, 1)
    q, k, v, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    out, lse = output.out, output.log_sum_exp
    plain = _plain(inputs) and flash_cpu.serves(q, k, v) and grad_out.dtype == v.dtype
    # Autograd hands over zeros for an output that nothing used; the flash kernel takes no such gradient.
    if plain and (grad_log_sum_exp is None or not bool(grad_log_sum_exp.any())) and all_finite(k, v):
        return Gradients(*flash_cpu.backward(q, k, v, scale, inputs.mask.causal, out, lse, grad_out))
    visible, span = visibility(inputs)
    saved = out, lse, grad_out, grad_log_sum_exp
    dq, dk, dv, of_bias = exact_aten.backward(q, k, v, scale, *saved, visible, span, *_bias(inputs))
    return Gradients(dq, dk, dv, bias=of_bias)


def _by_document(inputs: AttentionInputs) -> bool:
    """Whether documents are packed and a bias counts distances inside them; chunks and prefixes are those of the whole."""
    mask = inputs.mask
    return inputs.bias is not None and mask.segments and mask.chunk is None and mask.prefix is None


def _bias(inputs: AttentionInputs) -> tuple[Tensor | None, int]:
    """The bias, and the place of the first query among the keys."""
    offset = inputs.key.shape[2] - inputs.query.shape[2] if inputs.mask.end_aligned else 0
    return inputs.bias, offset


def refuse_extras(spec: SiteSpec, *biases: str) -> Support:
    """Refuses what the kernels do not compute: bias, soft cap, sink logits, dropout, used weights.

    Args:
        spec: The site.
        *biases: The kinds of bias that they do compute.
    """
    if spec.bias != "none" and spec.bias not in biases:
        return no(f"an additive bias on the scores ({spec.bias}) is not supported")
    if spec.softcap:
        return no(f"a soft cap ({spec.softcap:g}) on the scores is not supported")
    if spec.sink_logits:
        return no("learned sink logits in the softmax are not supported")
    if spec.dropout > 0:
        return no(
            f"dropout ({spec.dropout:g}) on the attention weights is not supported; "
            "set it to 0 or put the model in eval mode"
        )
    if spec.weights_used:
        return no("the attention weights are read by something else, and a fused kernel never forms them")
    return YES


def _plain(inputs: AttentionInputs) -> bool:
    """Whether there is no bias, and the mask is none or causal over equal lengths."""
    mask = inputs.mask
    if mask.conflicts("right", "end_aligned") or inputs.bias is not None:
        return False
    return mask.right is None or (mask.right == 0 and inputs.query.shape[2] == inputs.key.shape[2])


def visibility(inputs: AttentionInputs) -> tuple[Visible | None, Span | None]:
    """The mask as the two functions the row-tiled kernel takes; ``None`` when every query sees every key."""
    mask = inputs.mask
    query_len, key_len = inputs.query.shape[2], inputs.key.shape[2]
    if not mask.conflicts("end_aligned"):
        return None, None
    offset = key_len - query_len if mask.end_aligned else 0

    def visible(batch: int, rows: Tensor, keys: Tensor) -> Tensor:
        seen = mask.visible(rows[:, None], keys[None], query_len, key_len)
        if inputs.key_padding is not None:
            seen = seen & inputs.key_padding[batch, keys]
        if inputs.segments is not None:
            seen = seen & (inputs.segments[batch, rows + offset, None] == inputs.segments[batch, keys])
        return seen

    def span(start: int, stop: int) -> tuple[int, int]:
        first, last = 0, key_len
        if mask.left is not None and mask.prefix is None:
            first = max(first, start + offset - mask.left)
        if mask.right is not None:
            last = min(last, max(stop + offset + mask.right, mask.prefix or 0))
        if mask.chunk is not None:
            first = max(first, (start + offset) // mask.chunk * mask.chunk)
            last = min(last, ((stop - 1 + offset) // mask.chunk + 1) * mask.chunk)
        return min(first, key_len), max(last, 0)

    return visible, span
