"""Conv-basis attention as an operator (Conv-Basis, arXiv 2405.05219)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.errors import NumericError
from fastattn_compile.kernels.aten import conv as conv_aten
from fastattn_compile.kernels.aten.conv_anchors import segment_of
from fastattn_compile.kernels.aten.conv_error import Deviation, deviation
from fastattn_compile.kernels.aten.conv_lowrank import BLOCK, feature_count
from fastattn_compile.kernels.aten.conv_pattern import Pattern, real_span, select, triangles
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
from fastattn_compile.operators.conv_basis import low_rank
from fastattn_compile.operators.conv_basis.biases import biases, site_bias_gradient, unspread
from fastattn_compile.operators.conv_basis.bounds import ErrorBound, TermChoice, error_bound, sampling_margin
from fastattn_compile.operators.conv_basis.config import ConvBasisConfig
from fastattn_compile.operators.conv_basis.cost import conv_cost, low_rank_cost
from fastattn_compile.operators.conv_basis.decode import ConvBasisDecoder
from fastattn_compile.operators.conv_basis.reference import conv_attention
from fastattn_compile.operators.documents import (
    asked_documents,
    backward_documents,
    exact_keys_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.cost import parameter_bytes
from fastattn_compile.operators.exact.operator import refuse_extras
from fastattn_compile.operators.mask import MaskStructure

_DIAGNOSED_ROWS = 32
_REFUSED = {
    "chunk": "chunked attention is not a band of the diagonal",
    "prefix": "a bidirectional prefix is not a band of the diagonal",
}


class ConvBasisAttention(Operator[ConvBasisConfig]):
    """Scores as at most ``k`` columns slid down the diagonal, sums by fast Fourier transforms: O(k n log n).

    Exact where the scores are piecewise Toeplitz (positions only, repeated content); on rotary language
    models it is a poor replacement without training. Serves self-attention: causal, windowed, banded,
    bidirectional, with key padding, and packed documents: each a sequence of its own, exact up to ``k`` tokens.
    Biases by distance (ALiBi, buckets) are part of the profiles: exact, and they cost no term.
    """

    name = "conv_basis"
    config_type = ConvBasisConfig
    implementation = 3

    def supports(self, spec: SiteSpec) -> Support:
        """Self-attention with a mask of ``i - j`` and of real keys; else no, with the reason."""
        mask = spec.mask
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        if self._low_rank:
            if low_rank.refusal(mask):
                return no(low_rank.refusal(mask))
        else:
            for term in mask.conflicts("left", "right", "end_aligned", "key_padding", "segments"):
                return no(f"{_REFUSED[term]} ({mask})")
            if mask.segments and self.config.key_bias:
                return no(
                    "a bias by key has one place for every token of a sequence, packed documents have several"
                )
        if spec.kind != "self":
            return no("cross attention has no diagonal for scores to follow; only self-attention is served")
        if spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys: they must stand at the same positions"
            )
        if self._low_rank:
            count = feature_count(spec.head_dim, self.config.degree)
            if spec.key_len <= count:
                return no(
                    f"degree {self.config.degree} in {spec.head_dim} channels makes {count} features: "
                    f"more work than exact attention over {spec.key_len} tokens"
                )
        elif spec.key_len < self.config.k:
            return no(_too_many(self.config.k, spec.key_len))
        return refuse_extras(spec) if self._low_rank else refuse_extras(spec, "alibi", "bucketed")

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition; its gradient is the one the configuration names."""
        if self._packed(inputs):
            return reference_documents(
                lambda one: self.shortened(one.key.shape[2]).reference(one, parameters), inputs
            )
        offset_bias, key_bias = biases(self.config, inputs, parameters)
        if self._low_rank:
            return low_rank.low_rank_attention(self.config.degree, inputs, key_bias)
        return conv_attention(self._pattern(inputs), inputs, offset_bias, key_bias)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Sums by transforms or gathered tiles, in O(k n) memory.

        Raises:
            NumericError: The configuration names a form that the range of the scores does not allow.
        """
        if self._packed(inputs):
            return forward_documents(
                lambda one: self.shortened(one.key.shape[2]).forward(one, parameters), inputs, 1
            )
        if self._low_rank:
            return low_rank.forward(self.config, inputs, biases(self.config, inputs, parameters)[1])
        try:
            return AttentionOutput(*conv_aten.forward(*self._tensors(inputs, parameters)))
        except conv_aten.RangeError as error:
            raise NumericError(f"conv_basis: {error}") from error

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """The gradient the configuration names (specification section 7), places of anchors held constant."""
        if self._packed(inputs):
            packed = inputs, output, grad_out, grad_log_sum_exp, 1
            return backward_documents(
                lambda one, *saved: self.shortened(one.key.shape[2]).backward(one, parameters, *saved),
                *packed,
            )
        given = inputs, parameters, output, grad_out, grad_log_sum_exp
        found = self._low_rank_backward(*given) if self._low_rank else self._conv_backward(*given)
        dq, dk, dv, d_offset, d_key = found
        learned, of_bias = list(parameters), None
        if self.config.offset_bias == "learned" and d_offset is not None:
            learned[0] = unspread(parameters[0], d_offset, inputs.mask.causal)
        if self.config.key_bias and d_key is not None:
            learned[-1] = torch.zeros_like(parameters[-1])
            learned[-1][..., : d_key.shape[-1]] = d_key
        if inputs.bias is not None and inputs.bias.dim() == 2 and d_offset is not None:
            of_bias = site_bias_gradient(inputs.bias, d_offset)
        return Gradients(dq, dk, dv, tuple(learned), of_bias)

    def _conv_backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        q, k, v, scale, pattern, hidden, offset_bias, key_bias = self._tensors(inputs, parameters)
        return conv_aten.backward(
            q, k, v, scale, pattern, output.out, output.log_sum_exp, grad_out, grad_log_sum_exp,
            hidden, offset_bias, key_bias,
        )  # fmt: skip

    def _low_rank_backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        key_bias = biases(self.config, inputs, parameters)[1]
        found, by_key = low_rank.backward(self.config, inputs, output, grad_out, grad_log_sum_exp, key_bias)
        if key_bias is None:
            return found.query, found.key, found.value, None, None
        by_key = by_key.sum_to_size(key_bias.shape).to(key_bias.dtype)
        return found.query, found.key, found.value, None, by_key

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The anchor columns: their scores are the exact ones. None in the low-rank approximation."""
        if self._packed(inputs):
            return exact_keys_documents(
                lambda one, some: self.shortened(one.key.shape[2]).exact_keys(one, some), inputs, rows
            )
        if self._low_rank:
            return torch.zeros(1, 1, len(rows), inputs.key.shape[2], dtype=torch.bool, device=rows.device)
        batch, n = inputs.key.shape[0], inputs.key.shape[2]
        pattern = self._pattern(inputs)
        hidden = torch.zeros(batch, n, dtype=torch.bool, device=rows.device)
        if inputs.key_padding is not None:
            hidden = ~inputs.key_padding
        query = inputs.query.unflatten(1, (inputs.key.shape[1], inputs.group))
        key = inputs.key.unsqueeze(2)
        place = torch.arange(n, device=rows.device)
        exact = torch.zeros(1, 1, 1, len(rows), n, dtype=torch.bool, device=rows.device)
        for flipped, _ in triangles(pattern, n):
            q, k, gone = (x.flip(dim) if flipped else x for x, dim in ((query, 3), (key, 3), (hidden, 1)))
            q, k = (x.masked_fill(gone[:, None, None, :, None], 0) for x in (q, k))
            bounds, uncovered = select(pattern, q, k, inputs.scale, *real_span(gone))
            segment = segment_of(bounds, n)
            anchor = bounds.gather(-1, segment.clamp(min=0)) == place
            anchor = anchor & (segment >= (1 if uncovered is not None else 0))
            below = rows[:, None] < place if flipped else rows[:, None] >= place
            exact = exact | ((anchor.flip(-1) if flipped else anchor).unsqueeze(-2) & below)
        lanes = torch.broadcast_to(exact, (*exact.shape[:1], *query.shape[1:3], *exact.shape[3:]))
        return lanes.flatten(1, 2) & inputs.visible(rows)

    def cost(self, spec: SiteSpec) -> Cost:
        """Counted by the formulas of specification section 10, in the form that the lengths call for."""
        if self._low_rank:
            found = low_rank_cost(feature_count(spec.head_dim, self.config.degree), BLOCK, spec)
        else:
            found = conv_cost(self.config, self._pattern_of(spec.mask), spec)
        return dataclasses.replace(found, bytes=found.bytes + parameter_bytes(self.parameter_shapes(spec)))

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """Profiles of anchors at a fixed ``stride``; without one their places depend on the final length."""
        config = self.config
        if not config.stride or config.key_bias or self._low_rank:
            return None
        return ConvBasisDecoder(self, scale, parameters)

    def shortened(self, length: int) -> ConvBasisAttention:
        """The same operator for a sequence that may have fewer tokens than terms: each column is then its own anchor."""
        if length >= self.config.k:
            return self
        return type(self)(dataclasses.replace(self.config, k=max(1, length)))

    def _packed(self, inputs: AttentionInputs) -> bool:
        """Whether documents are attended one by one; the low-rank form has a mask for them."""
        return inputs.segments is not None and not self._low_rank

    @property
    def _low_rank(self) -> bool:
        return self.config.approximation == "low_rank"

    @property
    def learned(self) -> bool:
        """Whether a bias by distance or by key is learned."""
        return self.config.offset_bias == "learned" or self.config.key_bias

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Biases of every head for the length of the site; shorter sequences use the part that is theirs.

        ``offset_bias`` holds the distances ``0 .. n - 1`` at a causal site, ``-(n - 1) .. n - 1`` of ``i -
        j`` at others. ``key_bias`` is ``(batch, heads, n)``, with 1 for a dimension that shares it.
        """
        n = int(spec.key_len)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.config.offset_bias == "learned":
            shapes["offset_bias"] = (spec.heads, n if spec.mask.causal else 2 * n - 1)
        if self.config.key_bias:
            shapes["key_bias"] = (1, spec.heads, n)
        return shapes

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Biases of 0."""
        return {name: torch.zeros(shape) for name, shape in self.parameter_shapes(spec).items()}

    def error_bound(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = (), rows: Tensor | None = None
    ) -> ErrorBound:
        """Bounds the output error of every head on some tensors (section 6); O(rows * n * d) work.

        Args:
            inputs: The tensors of the site.
            parameters: Learned parameters, in order.
            rows: ``(m,)`` query rows to look at; all of them when ``None``, and only then the bound is
                certain.
        """
        n = inputs.key.shape[2]
        looked_at = torch.arange(n, device=inputs.query.device) if rows is None else rows
        if self._low_rank:
            score = low_rank.score_error(self.config.degree, inputs, looked_at)
        else:
            score = self._deviation(inputs, parameters, looked_at).score
        value = inputs.value.repeat_interleave(inputs.group, 1)
        if inputs.key_padding is not None:
            # A hidden value may be anything: a real one of the sequence stands in for it.
            real = (
                inputs.key_padding.int()
                .argmax(1)[:, None, None, None]
                .expand(*value.shape[:2], 1, value.shape[3])
            )
            value = torch.where(inputs.key_padding[:, None, :, None], value, value.gather(2, real))
        return error_bound(score, value, rows is None)

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """Of sampled rows, means over heads: ``score_error``, the largest error of a score, and ``error_bound``,
        what it allows for the output relative to ``max |V|`` (section 6).
        """
        n = inputs.key.shape[2]
        rows = torch.linspace(0, n - 1, min(_DIAGNOSED_ROWS, n), device=inputs.query.device).round().long()
        bound = self.error_bound(inputs, parameters, rows)
        relative = 2 * (bound.score_error / 2).tanh()
        return {
            "score_error": float(bound.score_error.mean()),
            "error_bound": float(relative.mean()),
        }

    def choose_terms(
        self,
        inputs: AttentionInputs,
        budget: float,
        parameters: tuple[Tensor, ...] = (),
        *,
        rows: int = 32,
        confidence: float = 0.95,
        most: int | None = None,
    ) -> TermChoice:
        """The fewest terms, doubling from 1, whose error is within a budget (specification section 14.1).

        The error is twice the mean total variation of the weights, an upper bound of the output error
        relative to ``max |V|``, over heads and sampled rows, plus twice the margin of a sample of so many rows: 0.48 for 32
        rows of one sequence, so smaller budgets ask for more.

        Args:
            inputs: Tensors of the site.
            budget: Largest mean output error relative to ``max |V|``.
            parameters: Learned parameters, in order.
            rows: Query rows to sample, evenly, the last among them.
            confidence: Probability with which the estimate is not too small.
            most: Largest number of terms; ``n / 200`` when ``None``, above which exact attention is faster.

        Raises:
            ValueError: The budget is not positive, or the approximation has no terms to choose.
        """
        if self._low_rank:
            raise ValueError("the low-rank approximation has no terms to choose; its error is set by degree")
        if not budget > 0:
            raise ValueError(f"budget must be a positive relative error, got {budget}")
        n = inputs.key.shape[2]
        limit = min(n, max(1, n // 200) if most is None else most)
        place = torch.linspace(0, n - 1, min(rows, n), device=inputs.query.device).round().long().flip(0)
        tried: list[tuple[int, float]] = []
        for k in [1 << power for power in range(limit.bit_length())]:
            operator = type(self)(dataclasses.replace(self.config, k=k))
            found = operator._deviation(inputs, parameters, place)
            # The heads of a row read the same tokens: together they are one sample.
            samples = int(found.seen.sum())
            mean = float(found.variation.sum()) / max(1, samples * inputs.query.shape[1])
            tried.append((k, 2 * (mean + sampling_margin(samples, confidence))))
            if tried[-1][1] <= budget:
                return TermChoice(k, tried[-1][1], tuple(tried))
        return TermChoice(None, tried[-1][1] if tried else math.inf, tuple(tried))

    def _deviation(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor) -> Deviation:
        if self._packed(inputs):
            return self._deviation_of_documents(inputs, parameters, rows)
        q, k, v, scale, pattern, hidden, offset_bias, key_bias = self._tensors(inputs, parameters)
        return deviation(q, k, v, scale, pattern, rows, hidden, offset_bias, key_bias)

    def _deviation_of_documents(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
    ) -> Deviation:
        """Each document has anchors of its own; the largest error of a score is that of the worst one."""
        batch, heads = inputs.query.shape[:2]
        made = Deviation.none(batch, heads, len(rows), rows.device)
        for asked in asked_documents(inputs, rows):
            operator = self.shortened(asked.inputs.key.shape[2])
            one = operator._deviation(asked.inputs, parameters, asked.rows)
            worst = made.score[asked.sequence]
            worst.copy_(torch.maximum(worst, one.score[0]))
            made.variation[asked.sequence, :, asked.number] = one.variation[0]
            made.seen[asked.sequence, asked.number] = one.seen[0]
        return made

    def _tensors(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Query, key, value, scale, pattern, hidden keys, bias by offset and by key."""
        offset_bias, key_bias = biases(self.config, inputs, parameters)
        hidden = None if inputs.key_padding is None else ~inputs.key_padding
        pattern = self._pattern(inputs)
        return inputs.query, inputs.key, inputs.value, inputs.scale, pattern, hidden, offset_bias, key_bias

    def _pattern(self, inputs: AttentionInputs) -> Pattern:
        n = inputs.key.shape[2]
        if self.config.k > n:
            raise ValueError(_too_many(self.config.k, n))
        if inputs.query.shape[2] != n:
            raise ValueError(
                f"{inputs.query.shape[2]} queries against {n} keys: conv_basis serves self-attention"
            )
        return self._pattern_of(inputs.mask)

    def _pattern_of(self, mask: MaskStructure) -> Pattern:
        config = self.config
        return Pattern(
            config.k, config.anchors, config.sinks, config.probe, config.delta, config.eps, config.uncovered,
            config.share_anchors, config.form, config.width, getattr(torch, config.transform),
            config.gradient == "softmax_formula", mask.left, mask.right, config.stride,
        )  # fmt: skip


def _too_many(k: int, length: int) -> str:
    return f"k={k} terms for {length} tokens: k must be at most the number of tokens"
