"""Fast multipole attention as an operator (Kang, Tran, De Sterck, arXiv 2310.11960)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.kernels import fma as fma_kernels
from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.aten.fma_pooled import PooledPattern
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
from fastattn_compile.operators.documents import (
    backward_documents,
    exact_keys_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.operator import exact_backward, exact_forward, refuse_extras
from fastattn_compile.operators.fma import boundary
from fastattn_compile.operators.fma.basis import mean_start, parameter_layout, unfold, unfold_backward
from fastattn_compile.operators.fma.config import FmaConfig, level_count
from fastattn_compile.operators.fma.cost import multipole_cost
from fastattn_compile.operators.fma.decode import FmaDecoder
from fastattn_compile.operators.fma.reference import (
    bias_of_rows,
    multipole_attention,
    near_field,
    sink_tokens,
)

# Tokens that a decoder with the recursive basis serves: its unfolded weights grow with them.
DECODED = 1 << 15

_TERMS = {
    "chunk": "chunked attention",
    "prefix": "a bidirectional prefix",
}


class FastMultipoleAttention(Operator[FmaConfig]):
    """Near tokens exactly, far tokens as pooled rows of growing groups, one softmax over all: O(n log n).

    Serves self-attention, causal and bidirectional, with sliding windows, bands, key padding and packed
    documents, at any length; a sequence of at most two blocks is attended exactly. A pooled row is seen only where every
    position it covers is visible, so nothing outside the mask ever has influence. Every packed document is a
    sequence of its own: positions, blocks and sinks begin anew with it. Biases by distance (ALiBi, buckets) are
    added near and far.
    """

    name = "fma"
    implementation = 3
    config_type = FmaConfig

    def __new__(cls, config: FmaConfig | None = None) -> FastMultipoleAttention:
        """The form for images when the configuration has a grid."""
        if config is not None and config.grid is not None:
            from fastattn_compile.operators.fma.grid import GridMultipoleAttention

            cls = GridMultipoleAttention
        return super().__new__(cls)

    def __init__(self, config: FmaConfig | None = None) -> None:
        super().__init__(config)
        # torch.compile traces ``supports`` and takes a float read there for a variable, which costs a second
        # compilation.
        self._unrotates = self.config.rotary_base > 0

    def supports(self, spec: SiteSpec) -> Support:
        """Yes for self-attention with causal, windowed, banded or padded masks; else no, with the reason."""
        mask = spec.mask
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        for term in mask.conflicts("left", "right", "end_aligned", "key_padding", "segments"):
            return no(f"{_TERMS[term]} is not supported: groups would span what the mask separates ({mask})")
        if spec.kind != "self":
            return no("cross attention has no shared positions, so no key is near a query; exact serves it")
        if spec.query_len == 1:
            return no(
                "a single query (decoding) gains nothing from keys pooled for one step; exact is faster"
            )
        if spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries and {spec.key_len} keys do not stand at the same positions; "
                "exact serves that"
            )
        if mask.right is not None and mask.right < 0:
            return no(f"a causal mask shifted by {mask.right} is not supported; only an offset of 0")
        if mask.left is not None and mask.left < 0:
            return no(f"a mask that hides the query's own position (left({mask.left})) is not supported")
        if self.config.queries == "pooled":
            return self._supports_pooled(spec)
        if self._unrotates and not (turned := self._turned(spec)):
            return turned
        extras = refuse_extras(spec, "alibi", "bucketed")
        if extras and self.config.boundary == "zero_pad":
            return no(boundary.obstacle(self.config, spec))
        return extras

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        self._check_parameters(inputs, parameters)
        if inputs.segments is not None:
            return reference_documents(lambda one: self.reference(one, parameters), inputs)
        return self._bounded(multipole_attention(self.config, inputs, parameters))

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """A few blocks of queries at a time, in O(n) memory."""
        self._check_parameters(inputs, parameters)
        if inputs.segments is not None:
            packed = self._packed(inputs)
            if packed is not None:
                return packed
            return forward_documents(lambda one: self.forward(one, parameters), inputs, self.config.block)
        if self._levels(inputs) == 0:
            return self._bounded(exact_forward(inputs))
        q, k, v, scale = inputs.query, inputs.key, inputs.value, inputs.scale
        if self.config.queries == "pooled":
            pooled = self._pooled_pattern(inputs)
            return AttentionOutput(*fma_kernels.pooled_forward(q, k, v, scale, pooled, inputs.key_padding))
        pattern, used = self._pattern(inputs), self._used(inputs, parameters)
        bias = bias_of_rows(self.config, inputs)
        return self._bounded(
            AttentionOutput(*fma_kernels.forward(q, k, v, scale, pattern, inputs.key_padding, used, bias))
        )

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``, from scores computed a second time; unused levels get zeros."""
        if inputs.segments is not None:
            saved_packed = output, grad_out, grad_log_sum_exp
            packed = self._packed_backward(inputs, *saved_packed)
            if packed is not None:
                return packed
            return backward_documents(
                lambda one, *saved: self.backward(one, parameters, *saved),
                inputs,
                *saved_packed,
                self.config.block,
            )
        if self._levels(inputs) == 0:
            grads = exact_backward(inputs, output, grad_out, grad_log_sum_exp)
            return dataclasses.replace(grads, parameters=tuple(torch.zeros_like(p) for p in parameters))
        q, k, v, scale = inputs.query, inputs.key, inputs.value, inputs.scale
        out, lse = output.out, output.log_sum_exp
        if self.config.queries == "pooled":
            saved = out, lse, grad_out, grad_log_sum_exp, inputs.key_padding
            return Gradients(
                *fma_kernels.pooled_backward(q, k, v, scale, self._pooled_pattern(inputs), *saved)
            )
        pattern, used = self._pattern(inputs), self._used(inputs, parameters)
        facts = inputs.key_padding, used, bias_of_rows(self.config, inputs)
        grad_query, grad_key, grad_value, learned, of_bias = fma_kernels.backward(
            q, k, v, scale, pattern, out, lse, grad_out, grad_log_sum_exp, *facts
        )
        if self.config.basis == "recursive":
            learned = unfold_backward(parameters, self._levels(inputs), learned)
        unused = tuple(torch.zeros_like(p) for p in parameters[len(learned) :])
        if inputs.bias is not None and inputs.bias.dim() == 1:
            of_bias = None
        return Gradients(grad_query, grad_key, grad_value, learned + unused, of_bias)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The near field and the sinks, as far as the mask shows them."""
        if inputs.segments is not None:
            return exact_keys_documents(self.exact_keys, inputs, rows)
        real = inputs.key_padding
        length = inputs.key.shape[2]
        if real is None:
            real = torch.ones(1, length, dtype=torch.bool, device=rows.device)
        sinks = sink_tokens(real, self.config.sinks)[:, None, None, :]
        near = near_field(rows[:, None], torch.arange(length, device=rows.device), self.config.block)
        return inputs.visible(rows) & (near | sinks)

    def cost(self, spec: SiteSpec) -> Cost:
        """Counted from the lists of the definition (specification section 2), sinks and windows included.

        Packed documents are counted as one sequence, which is the most that they can cost: their lengths are data.
        """
        return multipole_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """The last two blocks, the sinks and four groups a level: O(block + rank * log n) rows.

        None for the boundary ``"zero_pad"``, whose outputs depend on the length of the whole sequence, and for pooled
        queries, which know later tokens. The recursive basis
        is unfolded for ``DECODED`` tokens.
        """
        if self.config.boundary == "zero_pad" or self.config.queries == "pooled":
            return None
        if self.config.basis == "recursive":
            unfolded = unfold(parameters, level_count(DECODED, self.config.block))
            return FmaDecoder(self, scale, parameters, unfolded)
        return FmaDecoder(self, scale, parameters)

    @property
    def comes_apart(self) -> bool:
        """Fine keys and pooled rows stand in one softmax of one query; zero keys are neither."""
        return self.config.boundary == "clean" and self.config.queries == "all"

    @property
    def learned(self) -> bool:
        """Every basis but the mean is learned."""
        return self.config.basis != "mean"

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Learned combinations for the levels of ``spec.key_len``; shorter sequences use the first ones."""
        return dict(self._parameters(spec))

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Whatever the basis, means of the parts of a group, without bias (specification 5.1)."""
        return {name: mean_start(shape) for name, shape in self._parameters(spec)}

    def _parameters(self, spec: SiteSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        levels = level_count(int(spec.key_len), self.config.block)
        return parameter_layout(self.config, levels, spec.head_dim, spec.value_dim)

    def _levels(self, inputs: AttentionInputs) -> int:
        return level_count(inputs.key.shape[2], self.config.block)

    def _used(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Combinations for the levels that this length has."""
        if self.config.basis == "recursive":
            return unfold(parameters, self._levels(inputs))
        return parameters[: 4 * self._levels(inputs)]

    def _pattern(self, inputs: AttentionInputs) -> Pattern:
        config, mask = self.config, inputs.mask
        return Pattern(
            config.block, config.rank, config.sinks, mask.causal, mask.left, mask.right,
            config.scale_attn, self.learned, dense=config.basis == "dense", rotary=config.rotary(inputs.key.shape[3]),
            closed=config.boundary == "clean",
        )  # fmt: skip

    def _packed(self, inputs: AttentionInputs) -> AttentionOutput | None:
        """Packed documents without laying them out, where kernels can."""
        segments = self._segments_in_place(inputs)
        if segments is None:
            return None
        tensors = inputs.query, inputs.key, inputs.value
        made = fma_kernels.forward_packed(*tensors, inputs.scale, self._pattern(inputs), segments)
        return None if made is None else AttentionOutput(*made)

    def _packed_backward(
        self,
        inputs: AttentionInputs,
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients | None:
        """Gradients of ``_packed``."""
        segments = self._segments_in_place(inputs)
        if segments is None:
            return None
        given = inputs.query, inputs.key, inputs.value, inputs.scale, self._pattern(inputs), segments
        saved = output.out, output.log_sum_exp, grad_out, grad_log_sum_exp
        made = fma_kernels.backward_packed(*given, *saved)
        return None if made is None else Gradients(*made)

    def _segments_in_place(self, inputs: AttentionInputs) -> Tensor | None:
        """The documents of a call that kernels may serve where they stand; ``None`` for all other calls."""
        more = inputs.key_padding is not None or inputs.bias is not None
        plain = self.config.boundary == "clean" and self.config.queries == "all"
        return inputs.segments if plain and not more else None

    def _pooled_pattern(self, inputs: AttentionInputs) -> PooledPattern:
        return PooledPattern(
            self.config.block, self.config.rank, self._levels(inputs), self.config.scale_attn
        )

    def _turned(self, spec: SiteSpec) -> Support:
        """Whether keys of a site can carry the rotary embedding of the configuration."""
        turned = self.config.rotary_dim or spec.head_dim
        if turned % 2:
            return no(
                f"rotary_base undoes rotations of pairs of channels, and head_dim {spec.head_dim} is odd"
            )
        if turned > spec.head_dim:
            return no(f"rotary_dim {turned} is more than the {spec.head_dim} channels of a head")
        if spec.mask.segments and self.learned:
            return no(
                "rotary_base with a learned basis does not know where the positions of packed documents start"
            )
        if spec.bias != "none":
            return no(
                f"rotary_base is not defined with a bias by distance ({spec.bias}), which weighs keys before they are pooled"
            )
        return YES

    @staticmethod
    def _supports_pooled(spec: SiteSpec) -> Support:
        extras, mask = refuse_extras(spec), spec.mask
        if not extras:
            return extras
        if mask.causal:
            return no(
                "queries 'pooled' averages queries with later ones, which leaks the future; use queries 'all'"
            )
        if mask.left is not None or mask.right is not None:
            return no(
                f"queries 'pooled' serves attention without a window, not {mask}: the queries of a group would see "
                "different rows; use queries 'all'"
            )
        return extras

    def _bounded(self, output: AttentionOutput) -> AttentionOutput:
        """With the zero keys of the boundary, if it has them."""
        return output if self.config.boundary == "clean" else boundary.with_phantoms(self.config, output)

    def _check_parameters(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> None:
        """Refuses parameters that are not those of this configuration, sizes and length."""
        spec = inputs.spec()
        if self.config.basis == "mean":
            if parameters:
                raise ValueError(f"fma with basis 'mean' has no parameters, got {len(parameters)}")
            return
        recursive = self.config.basis == "recursive"
        if recursive and len(parameters) != 6:
            raise ValueError(f"fma with basis 'recursive' takes 6 parameters, got {len(parameters)}")
        if not recursive and len(parameters) % 4:
            raise ValueError(
                f"fma with basis {self.config.basis!r} takes 4 parameters a level, got {len(parameters)}"
            )
        needed, given = self._levels(inputs), len(parameters) // 4
        if not recursive and given < needed:
            made_for = self.config.block << (given + 1)
            raise ValueError(
                f"the parameters of this fma were created for at most {made_for} tokens ({given} levels), "
                f"the sequence has {inputs.key.shape[2]} ({needed} levels); create them for the longer length"
            )
        for (name, shape), parameter in zip(self._parameters(spec), parameters):
            if tuple(parameter.shape) != shape:
                raise ValueError(
                    f"parameter {name} of fma must have shape {shape}, got {tuple(parameter.shape)}"
                )
