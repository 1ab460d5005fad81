"""Fast multipole attention in C++: the arguments as the source takes them, and what it does not serve."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.cpu.build import library, obstacle

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STRIDED = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "log_sum_exp", "real", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("grad_lse", "grad_query", "grad_key", "grad_value")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in _STRIDED),
        *((name, ctypes.c_int64) for name in ("b", "h", "g", "n", "d", "e", "m", "p", "sinks")),
        *((name, ctypes.c_int32) for name in ("causal", "weighted", "dtype", "threads")),
        ("scale", ctypes.c_float),
    ]


def why_not(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why the C++ kernel cannot serve a call, ``""`` when it can.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: Who meets whom.
    """
    if query.device.type != "cpu":
        return f"it runs on a CPU, the tensors are on {query.device.type}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must have one type, got {query.dtype}, {key.dtype}, {value.dtype}"
    if query.dtype not in _TYPES:
        return f"it serves float32, bfloat16 and float16, not {query.dtype}"
    if pattern.learned or pattern.banded:
        return f"it serves the mean basis without a window, not {pattern}"
    return obstacle("fma")


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; other strides may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(
    tensors: dict[str, Tensor], log_sum_exp: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None,
    grad_log_sum_exp: Tensor | None = None,
) -> bool:  # fmt: skip
    arguments = _Arguments()
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
        getattr(arguments, f"{name}_strides")[:] = tensor.stride()[:3]
    query, value = tensors["query"], tensors["value"]
    arguments.log_sum_exp = log_sum_exp.data_ptr()
    real = None if key_padding is None else key_padding.contiguous()
    arguments.real = None if real is None else real.data_ptr()
    arguments.grad_lse = None if grad_log_sum_exp is None else grad_log_sum_exp.data_ptr()
    arguments.b, arguments.h, arguments.n, arguments.d = query.shape
    arguments.g, arguments.e = value.shape[1], value.shape[3]
    arguments.m, arguments.p, arguments.sinks = pattern.block, pattern.rank, pattern.sinks
    arguments.causal, arguments.weighted = pattern.causal, pattern.weighted
    arguments.dtype, arguments.threads, arguments.scale = _TYPES[query.dtype], torch.get_num_threads(), scale
    return library("fma").fma_run(ctypes.byref(arguments)) == 0


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Fast multipole attention, as ``kernels.aten.fma.forward``.

    Returns:
        Output and log-sum-exp; ``None`` when a key or value is not finite: then only the kernels on ATen say exactly
        which queries see it.
    """
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=value.dtype)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value, "out": out}
    return (out, log_sum_exp) if _call(tensors, log_sum_exp, scale, pattern, key_padding) else None


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Gradients of query, key and value, as ``kernels.aten.fma.backward``; ``None`` as in ``forward``."""
    query, key, value, out, grad_out = (_dense_rows(x) for x in (query, key, value, out, grad_out.to(out.dtype)))
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    tensors = {
        "query": query, "key": key, "value": value, "out": out, "grad_out": grad_out,
        "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2],
    }  # fmt: skip
    if grad_log_sum_exp is not None:
        grad_log_sum_exp = grad_log_sum_exp.float().contiguous()
    done = _call(tensors, log_sum_exp.contiguous(), scale, pattern, key_padding, grad_log_sum_exp)
    return (grads[0], grads[1], grads[2]) if done else None
