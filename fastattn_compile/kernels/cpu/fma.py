"""Fast multipole attention in C++: what it serves, and its calls."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma import for_slopes, of_keys, of_values
from fastattn_compile.kernels.aten.fma_bias import Decay, level_tables, level_tables_backward, row_cover
from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan, make_plan
from fastattn_compile.kernels.cpu.arguments import (
    backward_tensors,
    block_arguments,
    forward_tensors,
    type_obstacle,
)
from fastattn_compile.kernels.cpu.build import library, obstacle
from fastattn_compile.kernels.cpu.fma_rows import PooledRows, lists_of
from fastattn_compile.kernels.tiles import of_key_heads

_LOG2E = 1 / math.log(2)
_PAST = 32  # numbers of a table that the last tile of queries reads beyond its end, at most


def why_not(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why the C++ kernel cannot serve a call, ``""`` when it can.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: Who meets whom.
    """
    if pattern.banded:
        return f"it serves no window, got {pattern}"
    reason = type_obstacle(query, key, value) or obstacle("fma")
    return reason or (obstacle("pool") if pattern.learned and not pattern.dense else "")


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Fast multipole attention, as ``kernels.aten.fma.forward``.

    Returns:
        Output and log-sum-exp; ``None`` when a key or value is not finite: then only the kernels on ATen say exactly
        which queries see it.
    """
    call = _Call(query, key, value, scale, pattern, key_padding, weights, bias)
    tensors, log_sum_exp = forward_tensors(call.query, call.key, call.value)
    return (tensors["out"].to(value.dtype), log_sum_exp) if call.run(tensors, log_sum_exp) else None


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None] | None:  # fmt: skip
    """Gradients as ``kernels.aten.fma.backward``; ``None`` as in ``forward``."""
    given = query, key, value
    if pattern.learned or pattern.rotary is not None:
        # The gradients of rows are added to those of tokens, which are not rounded before.
        query, key, value = (x.float() for x in given)
    call = _Call(query, key, value, scale, pattern, key_padding, weights, bias)
    tensors = backward_tensors(call.query, call.key, call.value, out.to(call.value.dtype), grad_out)
    if grad_log_sum_exp is not None:
        grad_log_sum_exp = grad_log_sum_exp.float().contiguous()
    if not call.run(tensors, log_sum_exp.contiguous(), grad_log_sum_exp):
        return None
    grads = [tensors[f"grad_{name}"] for name in ("query", "key", "value")]
    grad_weights = call.spread(*grads[1:])
    grad_query, grad_key, grad_value = (
        of_key_heads(grad, x.shape[1]).to(x.dtype) for grad, x in zip(grads, given)
    )
    learned = tuple(grad.to(w.dtype) for grad, w in zip(grad_weights, weights))
    return grad_query, grad_key, grad_value, learned, call.bias_gradient()


class _Call:
    """One call of the kernel, and what its pattern and bias add to the plain one.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real.
        weights: As for ``kernels.aten.fma.forward``.
        bias: Likewise.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None,
        weights: Sequence[Tensor], bias: Tensor | None,
    ) -> None:  # fmt: skip
        self.key, self.value, self.pattern = for_slopes(query, key, value, pattern, bias)
        self.query = query.to(self.key.dtype)
        self.scale, self.bias, self.weights = scale, bias, weights
        self.real = None if key_padding is None else key_padding.contiguous()
        self.fields: dict[str, Tensor] = {}
        self.rows: tuple[PooledRows, PooledRows] | None = None
        self.tables: Tensor | None = None
        plan = make_plan(query.shape[2], self.pattern, query.device)
        self.levels = plan.levels
        if plan.levels and (pattern.learned or pattern.rotary is not None):
            lists = lists_of(plan, self.pattern, query.shape[0], key_padding)
            self.rows = (
                PooledRows(plan, self.pattern, lists, of_keys(weights), True),
                PooledRows(plan, self.pattern, lists, of_values(weights), False),
            )
            for name, rows, x in zip(("key", "value"), self.rows, (self.key, self.value)):
                self.fields[f"pooled_{name}"] = rows.make(x)
        if bias is not None and bias.dim() == 1:
            self._add_slopes(bias.float(), plan, key_padding)
        elif bias is not None:
            self._add_tables(bias.float())

    def run(
        self, tensors: dict[str, Tensor], log_sum_exp: Tensor, grad_log_sum_exp: Tensor | None = None
    ) -> bool:
        """Runs the kernel; false when a key or value is not finite."""
        pattern, fields = self.pattern, self.fields
        if "grad_out" in tensors:
            if self.rows is not None:
                for name in ("pooled_key", "pooled_value"):
                    fields[f"grad_{name}"] = torch.zeros_like(fields[name])
            if self.tables is not None:  # those of every sequence are added in the sequences' order
                fields["grad_tables"] = torch.zeros(len(self.query), *fields["tables"].shape)
        arguments = block_arguments(
            tensors, log_sum_exp, self.scale, pattern.block, pattern.sinks, pattern.causal, self.real
        )
        arguments.p, arguments.weighted = pattern.rank, pattern.weighted
        arguments.whole, arguments.closed = pattern.learned, pattern.closed
        arguments.grad_lse = None if grad_log_sum_exp is None else grad_log_sum_exp.data_ptr()
        for name, tensor in fields.items():
            setattr(arguments, name, tensor.data_ptr())
        if self.tables is not None:
            arguments.table, arguments.table_zero = fields["tables"].shape[2], self._size // 2
        return bool(library("fma").fma_run(ctypes.byref(arguments)) == 0)

    def spread(self, grad_key: Tensor, grad_value: Tensor) -> list[Tensor]:
        """Adds what pooled rows got to the gradients of tokens; those of the weights, in their order."""
        if self.rows is None:
            return [torch.zeros_like(w) for w in self.weights]
        keys, values = (
            rows.spread(x, self.fields[f"grad_pooled_{name}"], grad)
            for rows, x, name, grad in zip(
                self.rows, (self.key, self.value), ("key", "value"), (grad_key, grad_value)
            )
        )
        both = (x[at : at + 2] for at in range(0, len(keys), 2) for x in (keys, values))
        return [grad for pair in both for grad in pair]

    def bias_gradient(self) -> Tensor | None:
        """Of a bias by distance; ``None`` for slopes and without a bias."""
        if self.tables is None or self.bias is None:
            return None
        grads = self.fields["grad_tables"].sum(0)[..., : self._size].flip(-1).flatten(1)
        cover = row_cover(self.pattern)
        return level_tables_backward(self.tables, grads, cover, self.levels).to(self.bias.dtype)

    def _add_slopes(self, slopes: Tensor, plan: Plan, key_padding: Tensor | None) -> None:
        """Slopes, and rows that are means weighted by them."""
        self.fields["slopes"] = slopes * _LOG2E
        if not plan.levels:
            return
        lists = lists_of(plan, self.pattern, self.query.shape[0], key_padding)
        # Without padding all sequences are alike.
        kinds = lists if key_padding is not None else lists[:1]
        each = [Decay(slopes, one, plan, self.pattern).weights() for one in kinds]
        within, share, log_mean = (
            torch.stack(x).expand(len(lists), *x[0].shape).contiguous() for x in zip(*each)
        )
        self.fields.update(within=within, share=share, row_bias=log_mean * _LOG2E)

    def _add_tables(self, bias: Tensor) -> None:
        """Numbers by the distance from key to query, so that those of queries side by side stand side by side."""
        self.tables = level_tables(bias, row_cover(self.pattern), self.levels)
        each = self.tables.unflatten(1, (self.levels + 1, -1))
        self._size = each.shape[2]
        self.fields["tables"] = torch.nn.functional.pad(each.flip(-1) * _LOG2E, (0, _PAST))
