"""The arguments that the sources take: tensors as pointers and strides, sizes, in the layout of ``BlockArgs``."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

# Large pages of Linux, and the advice that asks for them.
_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STRIDED = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


class BlockArguments(ctypes.Structure):
    """``BlockArgs`` of ``blocks.h``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "out", "log_sum_exp", "real", "grad_out")
        ),
        *((name, ctypes.c_void_p) for name in ("grad_lse", "grad_query", "grad_key", "grad_value")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in _STRIDED),
        *((name, ctypes.c_int64) for name in ("b", "h", "g", "n", "d", "e", "m", "p", "sinks")),
        *((name, ctypes.c_int32) for name in ("causal", "weighted", "dtype", "threads")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("spread", "pool")),
        *((name, ctypes.c_void_p) for name in ("pooled_key", "pooled_value")),
        *((name, ctypes.c_void_p) for name in ("grad_pooled_key", "grad_pooled_value")),
        *(
            (name, ctypes.c_void_p)
            for name in ("within", "share", "row_bias", "slopes", "tables", "grad_tables")
        ),
        *((name, ctypes.c_int64) for name in ("table", "table_zero")),
        *((name, ctypes.c_int32) for name in ("whole", "closed")),
    )


def block_arguments(
    tensors: dict[str, Tensor], log_sum_exp: Tensor, scale: float, block: int, sinks: int, causal: bool,
    key_padding: Tensor | None = None,
) -> BlockArguments:  # fmt: skip
    """Arguments with what all kernels need; the caller keeps the tensors alive until the call is over.

    Args:
        tensors: By the names of the fields; the last dimension is contiguous. ``query`` and ``value`` give the sizes.
        log_sum_exp: ``(b, h, n)`` float32, contiguous.
        scale: Factor on the scores.
        block: Tokens of a block.
        sinks: First real tokens that every query meets.
        causal: Queries see nothing after themselves.
        key_padding: ``(b, n)`` boolean, contiguous, true where a token is real.
    """
    arguments = BlockArguments()
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
        getattr(arguments, f"{name}_strides")[:] = tensor.stride()[:3]
    query, value = tensors["query"], tensors["value"]
    arguments.log_sum_exp = log_sum_exp.data_ptr()
    arguments.real = None if key_padding is None else key_padding.data_ptr()
    arguments.b, arguments.h, arguments.n, arguments.d = query.shape
    arguments.g, arguments.e = value.shape[1], value.shape[3]
    arguments.m, arguments.sinks, arguments.causal = block, sinks, causal
    arguments.dtype, arguments.threads, arguments.scale = TYPES[query.dtype], torch.get_num_threads(), scale
    return arguments


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty``, in large pages where the system has them: its first writing faults every 2 MB, not every 4 KB."""
    made = torch.empty(*shape, dtype=dtype)
    begin, end = made.data_ptr(), made.data_ptr() + made.nbytes
    begin, end = -(-begin // _LARGE_PAGE) * _LARGE_PAGE, end // _LARGE_PAGE * _LARGE_PAGE
    if sys.platform == "linux" and end > begin:
        # Where it is refused the pages stay small.
        _process().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return made


@cache
def _process() -> ctypes.CDLL:
    """What is loaded already; looked up once, not every call."""
    return ctypes.CDLL(None)


def dense_rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; other strides may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a forward pass reads and writes: tensors by the names of the fields, and the log-sum-exp.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
    """
    query, key, value = (dense_rows(x) for x in (query, key, value))
    out = fresh(*query.shape[:3], value.shape[3], dtype=value.dtype)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32)
    return {"query": query, "key": key, "value": value, "out": out}, log_sum_exp


def backward_tensors(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor
) -> dict[str, Tensor]:
    """What a backward pass reads and writes, by the names of the fields.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        out: ``(b, h, n, e)``, of the forward pass.
        grad_out: Its gradient.
    """
    names = ("query", "key", "value", "out", "grad_out")
    tensors = {
        name: dense_rows(x) for name, x in zip(names, (query, key, value, out, grad_out.to(out.dtype)))
    }
    for name in names[:3]:
        tensors[f"grad_{name}"] = fresh(*tensors[name].shape, dtype=tensors[name].dtype)
    return tensors


def type_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why C++ kernels cannot serve these tensors, whatever the operator; ``""`` when they can."""
    if query.device.type != "cpu":
        return f"it runs on a CPU, the tensors are on {query.device.type}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must have one type, got {query.dtype}, {key.dtype}, {value.dtype}"
    if query.dtype not in TYPES:
        return f"it serves float32, bfloat16 and float16, not {query.dtype}"
    return ""
