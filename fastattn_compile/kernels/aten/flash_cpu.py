"""PyTorch's own flash attention for CPUs, with its log-sum-exp, for the two plain masks: none and causal."""

from __future__ import annotations

import torch
from torch import Tensor


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's kernel takes these tensors: on a CPU, one type, one head dimension, nothing empty."""
    same_type = query.dtype == key.dtype == value.dtype
    return (
        query.device.type == "cpu"
        and same_type
        and query.shape[3] == value.shape[3]
        and min(query.numel(), key.numel()) > 0
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Exact attention by the CPU flash kernel.

    The members of a query group are served one after another against the same keys: nothing is repeated in
    memory.

    Args:
        query: ``(b, h, n, d)``; query head ``i`` reads key head ``i // (h // g)``.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, d)``.
        scale: Factor on the scores.
        causal: Query ``i`` sees keys up to ``i``; needs ``n == m``.

    Returns:
        Output ``(b, h, n, d)`` and log-sum-exp ``(b, h, n)``, both contiguous.
    """
    group = query.shape[1] // key.shape[1]
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    out = value.new_empty(query.shape)
    statistics = torch.float64 if value.dtype == torch.float64 else torch.float32
    log_sum_exp = value.new_empty(query.shape[:3], dtype=statistics)
    for member in range(group):
        heads = slice(member, None, group)
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, heads], key, value, 0.0, causal, scale=scale
        )
        out[:, heads] = part
        log_sum_exp[:, heads] = lse
    return out, log_sum_exp


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward`` with respect to query, key and value; the log-sum-exp takes no gradient here.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        causal: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.

    Returns:
        Gradients, each of its input's shape and type, contiguous.
    """
    group = query.shape[1] // key.shape[1]
    query, key, value, grad_out = (_rows_contiguous(x) for x in (query, key, value, grad_out))
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide) for x in (key, value))
    for member in range(group):
        heads = slice(member, None, group)
        part, part_key, part_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, heads],
            query[:, heads],
            key,
            value,
            out[:, heads],
            log_sum_exp[:, heads],
            0.0,
            causal,
            scale=scale,
        )
        grad_query[:, heads] = part
        grad_key += part_key
        grad_value += part_value
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
