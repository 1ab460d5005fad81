"""Fast multipole attention on the grid of an image (specification 1.9): ``fma`` when its configuration has a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.kernels import fma_grid as kernels
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
from fastattn_compile.operators.exact.operator import exact_backward, exact_forward, refuse_extras
from fastattn_compile.operators.fma.grid_cells import (
    grid_levels,
    grid_mean_start,
    grid_of,
    grid_parameter_layout,
    part_grid,
    side_of,
)
from fastattn_compile.operators.fma.grid_cost import grid_cost
from fastattn_compile.operators.fma.grid_reference import grid_multipole_attention, near_tokens
from fastattn_compile.operators.fma.operator import FastMultipoleAttention

_TERMS = {
    "right": "an order of tokens (causal, or a band)",
    "left": "a window over the sequence",
    "chunk": "chunked attention",
    "prefix": "a bidirectional prefix of a causal mask",
    "segments": "packed documents",
}


class GridMultipoleAttention(FastMultipoleAttention):
    """Tokens of the nine cells around a query exactly, farther ones as pooled rows of growing cells: O(n log n).

    Serves bidirectional self-attention of exactly ``prefix + height * width`` tokens, the grid row after row, of any height
    and width, with key padding. Tokens in front of the grid meet everything exactly, and everything meets them so. A grid
    of at most two cells down and across is attended exactly.
    """

    def supports(self, spec: SiteSpec) -> Support:
        """Yes for bidirectional self-attention of as many tokens as the grid has; else no, with the reason."""
        mask, (height, width), front = spec.mask, grid_of(self.config), self.config.prefix
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        for term in mask.conflicts("end_aligned", "key_padding"):
            return no(
                f"{_TERMS[term]} is not supported on a grid: what lies before a token in the sequence is no side of it in "
                f"the plane, and cells span both ({mask}); leave grid out"
            )
        if spec.kind != "self":
            return no("cross attention has no shared positions, so no key is near a query; exact serves it")
        tokens = front + height * width
        if spec.query_len != tokens or spec.key_len != tokens:
            told = f"{height} x {width}" + (f" and {front} in front of it" if front else "")
            return no(
                f"the grid has {tokens} tokens ({told}), the site {spec.query_len} queries and {spec.key_len} keys; tokens "
                "in front of a grid (class token, registers) are given as prefix"
            )
        if spec.bias != "none":
            return no(
                f"a bias by distance in the sequence ({spec.bias}) is not supported on a grid: it differs within a cell row "
                "by row"
            )
        return refuse_extras(spec)

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        self._check_grid_parameters(inputs, parameters)
        return grid_multipole_attention(self.config, inputs, parameters)

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Some cells of queries at a time, in O(n) memory; the tokens in front of the grid exactly."""
        self._check_grid_parameters(inputs, parameters)
        if self._grid_pattern.levels == 0:
            return exact_forward(inputs)
        front = self.config.prefix
        q, k, v, padding = inputs.query, inputs.key, inputs.value, inputs.key_padding
        made = kernels.forward(q[:, :, front:], k, v, inputs.scale, self._grid_pattern, padding, parameters)
        if not front:
            return AttentionOutput(*made)
        first = exact_forward(_queries(inputs, front))
        return AttentionOutput(torch.cat([first.out, made[0]], 2), torch.cat([first.log_sum_exp, made[1]], 2))

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``, from scores computed a second time."""
        if self._grid_pattern.levels == 0:
            return exact_backward(inputs, output, grad_out, grad_log_sum_exp)
        front = self.config.prefix
        q, k, v = inputs.query, inputs.key, inputs.value
        out, lse, padding = output.out, output.log_sum_exp, inputs.key_padding
        of_lse = grad_log_sum_exp
        grad_query, grad_key, grad_value, learned = kernels.backward(
            q[:, :, front:], k, v, inputs.scale, self._grid_pattern, out[:, :, front:], lse[:, :, front:],
            grad_out[:, :, front:], None if of_lse is None else of_lse[:, :, front:], padding, parameters,
        )  # fmt: skip
        if front:
            made = AttentionOutput(out[:, :, :front].contiguous(), lse[:, :, :front].contiguous())
            grad, of_lse = (
                grad_out[:, :, :front].contiguous(),
                None if of_lse is None else of_lse[:, :, :front],
            )
            first = exact_backward(_queries(inputs, front), made, grad, of_lse)
            grad_query = torch.cat([first.query, grad_query], 2)
            grad_key, grad_value = grad_key + first.key, grad_value + first.value
        return Gradients(grad_query, grad_key.to(k.dtype), grad_value.to(v.dtype), learned)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The nine cells around a query and the tokens in front of the grid; for the latter everything."""
        return inputs.visible(rows) & near_tokens(self.config, rows, rows.device)

    def cost(self, spec: SiteSpec) -> Cost:
        """Counted from the cells of the definition, those cut by the border included."""
        return grid_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """None: the tokens of an image have no order to decode in."""
        return None

    def on_first_tokens(self, longest: int) -> tuple[Operator, int]:
        """On the first rows of the grid."""
        height, width = grid_of(self.config)
        rows = min(height, max(1, (longest - self.config.prefix) // width))
        config = dataclasses.replace(self.config, grid=(rows, width))
        return GridMultipoleAttention(config), self.config.prefix + rows * width

    @property
    def only_on_aten(self) -> bool:
        """The kernels of the sequence form are never taken in its place."""
        return True

    @property
    def _grid_pattern(self) -> kernels.GridPattern:
        config, (height, width) = self.config, grid_of(self.config)
        return kernels.GridPattern(
            height, width, side_of(config), part_grid(config), grid_levels(config), config.prefix,
            config.scale_attn, self.learned,
        )  # fmt: skip

    def _parameters(self, spec: SiteSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        return grid_parameter_layout(self.config, spec.head_dim, spec.value_dim)

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Means of the parts of a cell, without bias."""
        return {name: grid_mean_start(self.config, shape) for name, shape in self._parameters(spec)}

    def _check_grid_parameters(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> None:
        """Refuses tensors of another length than the grid's, and parameters of another shape."""
        spec = inputs.spec()
        support = self.supports(spec)
        if not support:
            raise ValueError(f"fma cannot serve this attention: {support.reason}")
        expected = dict(self._parameters(spec))
        if len(parameters) != len(expected):
            raise ValueError(
                f"fma with basis {self.config.basis!r} on this grid has {len(expected)} parameters, got {len(parameters)}"
            )
        for (name, shape), parameter in zip(expected.items(), parameters):
            if tuple(parameter.shape) != shape:
                raise ValueError(
                    f"parameter {name} of fma must have shape {shape}, got {tuple(parameter.shape)}"
                )


def _queries(inputs: AttentionInputs, count: int) -> AttentionInputs:
    """The first queries against all keys."""
    return dataclasses.replace(inputs, query=inputs.query[:, :, :count])
