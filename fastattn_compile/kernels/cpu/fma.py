"""Fast multipole attention in C++: what it serves, and its calls."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.cpu.arguments import (
    backward_tensors,
    block_arguments,
    forward_tensors,
    type_obstacle,
)
from fastattn_compile.kernels.cpu.build import library, obstacle


def why_not(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why the C++ kernel cannot serve a call, ``""`` when it can.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: Who meets whom.
    """
    served = Pattern(
        pattern.block, pattern.rank, pattern.sinks, pattern.causal, None, pattern.right, pattern.weighted,
        closed=pattern.closed,
    )  # fmt: skip
    if pattern.banded or pattern != served:
        return f"it serves the mean basis without a window, not {pattern}"
    return type_obstacle(query, key, value) or obstacle("fma")


def _call(
    tensors: dict[str, Tensor], log_sum_exp: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None,
    grad_log_sum_exp: Tensor | None = None,
) -> bool:  # fmt: skip
    real = None if key_padding is None else key_padding.contiguous()
    arguments = block_arguments(
        tensors, log_sum_exp, scale, pattern.block, pattern.sinks, pattern.causal, real
    )
    arguments.p, arguments.weighted = pattern.rank, pattern.weighted
    arguments.grad_lse = None if grad_log_sum_exp is None else grad_log_sum_exp.data_ptr()
    return library("fma").fma_run(ctypes.byref(arguments)) == 0


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Fast multipole attention, as ``kernels.aten.fma.forward``.

    Returns:
        Output and log-sum-exp; ``None`` when a key or value is not finite: then only the kernels on ATen say exactly
        which queries see it.
    """
    tensors, log_sum_exp = forward_tensors(query, key, value)
    done = _call(tensors, log_sum_exp, scale, pattern, key_padding)
    return (tensors["out"], log_sum_exp) if done else None


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Gradients of query, key and value, as ``kernels.aten.fma.backward``; ``None`` as in ``forward``."""
    tensors = backward_tensors(query, key, value, out, grad_out)
    if grad_log_sum_exp is not None:
        grad_log_sum_exp = grad_log_sum_exp.float().contiguous()
    done = _call(tensors, log_sum_exp.contiguous(), scale, pattern, key_padding, grad_log_sum_exp)
    return (tensors["grad_query"], tensors["grad_key"], tensors["grad_value"]) if done else None
