"""Fast multipole attention in C++: what it serves, and its calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.cpu.arguments import block_arguments, dense_rows, type_obstacle
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
    query, key, value = (dense_rows(x) for x in (query, key, value))
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=value.dtype)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value, "out": out}
    return (out, log_sum_exp) if _call(tensors, log_sum_exp, scale, pattern, key_padding) else None


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Gradients of query, key and value, as ``kernels.aten.fma.backward``; ``None`` as in ``forward``."""
    query, key, value, out, grad_out = (
        dense_rows(x) for x in (query, key, value, out, grad_out.to(out.dtype))
    )
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    tensors = {
        "query": query, "key": key, "value": value, "out": out, "grad_out": grad_out,
        "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2],
    }  # fmt: skip
    if grad_log_sum_exp is not None:
        grad_log_sum_exp = grad_log_sum_exp.float().contiguous()
    done = _call(tensors, log_sum_exp.contiguous(), scale, pattern, key_padding, grad_log_sum_exp)
    return (grads[0], grads[1], grads[2]) if done else None
