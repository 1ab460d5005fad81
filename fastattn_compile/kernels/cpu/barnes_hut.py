"""Barnes-Hut attention in C++: what it serves, and its calls."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.cpu.arguments import (
    BlockArguments,
    backward_tensors,
    block_arguments,
    forward_tensors,
    type_obstacle,
)
from fastattn_compile.kernels.cpu.build import library, obstacle
from fastattn_compile.kernels.tiles import of_key_heads

_MOST_LEVELS = 40


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("block", BlockArguments),
        *((name, ctypes.c_int64) for name in ("leaf", "fanout", "group", "levels", "cumulant")),
        ("keep", ctypes.c_int64 * _MOST_LEVELS),
    )


def why_not(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern, pool: bool) -> str:
    """Why the C++ kernel cannot serve a call, ``""`` when it can.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: The pattern.
        pool: Whether closed nodes are met pooled.
    """
    if pattern.statistic == "bound" or pattern.samples or pattern.tolerance or pool:
        return "it serves the choice by mean keys or cumulants with a fixed number of leaves, what is closed left out"
    if pattern.left is not None or (pattern.right is not None and not pattern.causal):
        return "it serves no windows"
    return type_obstacle(query, key, value) or obstacle("barnes_hut")


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: TreePattern,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Barnes-Hut attention, as ``kernels.aten.barnes_hut.forward``.

    The choice is the same up to rounding: of nodes whose estimates are equal in float32 it may open another.

    Returns:
        Output and log-sum-exp; ``None`` when a key or value is not finite.
    """
    key, value = _own_choices(query, key, value, pattern)
    tensors, log_sum_exp = forward_tensors(query, key, value)
    done = _call(tensors, log_sum_exp, scale, pattern, key_padding)
    return (tensors["out"], log_sum_exp) if done else None


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Gradients of query, key and value, as ``kernels.aten.barnes_hut.backward``; ``None`` as in ``forward``."""
    kv_heads = key.shape[1]
    key, value = _own_choices(query, key, value, pattern)
    tensors = backward_tensors(query, key, value, out, grad_out)
    if grad_log_sum_exp is not None:
        grad_log_sum_exp = grad_log_sum_exp.float().contiguous()
    done = _call(tensors, log_sum_exp.contiguous(), scale, pattern, key_padding, grad_log_sum_exp)
    if not done:
        return None
    grad_key, grad_value = (of_key_heads(tensors[f"grad_{name}"], kv_heads) for name in ("key", "value"))
    return tensors["grad_query"], grad_key, grad_value


def _own_choices(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern) -> tuple[Tensor, Tensor]:
    """Keys and values of every query head by itself where each makes a choice of its own."""
    group = query.shape[1] // key.shape[1]
    if pattern.share or group == 1:
        return key, value
    return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def _call(
    tensors: dict[str, Tensor], log_sum_exp: Tensor, scale: float, pattern: TreePattern, key_padding: Tensor | None,
    grad_log_sum_exp: Tensor | None = None,
) -> bool:  # fmt: skip
    real = None if key_padding is None else key_padding.contiguous()
    arguments = _Arguments()
    arguments.block = block_arguments(
        tensors, log_sum_exp, scale, pattern.block, pattern.sinks, pattern.causal, real
    )
    arguments.block.grad_lse = None if grad_log_sum_exp is None else grad_log_sum_exp.data_ptr()
    arguments.leaf, arguments.fanout, arguments.group = pattern.leaf, pattern.fanout, pattern.group
    arguments.cumulant = pattern.statistic == "cumulant"
    arguments.levels = pattern.levels(tensors["key"].shape[2])
    arguments.keep[: arguments.levels] = [pattern.keep(level) for level in range(arguments.levels)]
    return bool(library("barnes_hut").barnes_hut_run(ctypes.byref(arguments)) == 0)
