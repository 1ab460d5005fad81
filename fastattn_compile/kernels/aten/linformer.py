"""Linformer on ATen: keys and values projected, then exact attention over the rows, O(n rank).

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` tokens, ``d`` channels of query and key, ``e``
of value, ``r`` rows, ``p`` projections, 1 for all heads or one for each key head, ``m >= n`` their columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.tiles import statistics_dtype, work_dtype


class _Projected:
    """Projected rows, and each key head as a sequence of its own, since rows may be hidden head by head."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        projections: tuple[Tensor, Tensor],
        real: Tensor | None,
    ) -> None:
        self.dtype = work_dtype(query, key, value)
        self.kv_heads, length = key.shape[1:3]
        self.real = real
        self.key, self.value = self._clean(key), self._clean(value)
        self.for_keys, self.for_values = (x[..., :length].to(self.dtype) for x in projections)
        self.query = query.to(self.dtype).unflatten(1, (self.kv_heads, -1)).flatten(0, 1)
        self.key_rows = (self.for_keys @ self.key).flatten(0, 1)[:, None]
        self.value_rows = (self.for_values @ self.value).flatten(0, 1)[:, None]
        self.mask: dict[str, Any] = {}
        seen = self._seen()
        if not bool(seen.all()):
            self.mask["visible"] = lambda head, rows, keys: seen[head, keys].expand(len(rows), -1)

    def _clean(self, x: Tensor) -> Tensor:
        # What stands at padding may be NaN, and 0 * NaN is NaN.
        x = x.to(self.dtype)
        return x if self.real is None else x.masked_fill(~self.real[:, None, :, None], 0)

    def _seen(self) -> Tensor:
        """Rows that weigh a real token, ``(b g, r)``."""
        batch = self.key.shape[0]
        used = (self.for_keys != 0).to(self.dtype)
        if self.real is None:
            counts = used.sum(-1).expand(batch, self.kv_heads, -1)
        else:
            counts = torch.einsum("prn,bn->bpr", used, self.real.to(self.dtype)).expand(-1, self.kv_heads, -1)
        return counts.flatten(0, 1) > 0

    def heads(self, x: Tensor) -> Tensor:
        """``(b, h, n, ...)`` as ``(b g, h / g, n, ...)``."""
        return x.unflatten(1, (self.kv_heads, -1)).flatten(0, 1)

    def back(self, x: Tensor) -> Tensor:
        """``(b g, h / g, n, ...)`` as ``(b, h, n, ...)``."""
        return x.unflatten(0, (-1, self.kv_heads)).flatten(1, 2)

    def carried(self, rows: Tensor, projection: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``(b, g, n, *)`` tokens and ``(p, r, n)`` projection from that of the rows."""
        grad = rows.squeeze(1).unflatten(0, (-1, self.kv_heads))
        to_projection = (grad @ tokens.mT).sum(0)
        if projection.shape[0] == 1:
            to_projection = to_projection.sum(0, keepdim=True)
        return self._clean(projection.mT @ grad), to_projection


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, projections: tuple[Tensor, Tensor],
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over projected keys and values.

    Args:
        query: ``(b, h, n, d)``; query head ``i`` reads key head ``i // (h // g)``. Types may differ between
            the three.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        projections: Of keys and of values, each ``(p, r, m)``.
        real: ``(b, n)`` boolean, true where a token is no padding.

    Returns:
        Output ``(b, h, n, e)``, the values' type, contiguous; log-sum-exp over the rows ``(b, h, n)``.
    """
    projected = _Projected(query, key, value, projections, real)
    out, lse = exact_aten.forward(
        projected.query, projected.key_rows, projected.value_rows, scale, **projected.mask
    )
    return projected.back(out).to(value.dtype), projected.back(lse).to(statistics_dtype(value))


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, projections: tuple[Tensor, Tensor],
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Gradients of ``forward``.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        projections: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
        real: As in ``forward``.

    Returns:
        Gradients of query, key, value and projections, each of its input's shape and type, contiguous; 0 in
        the columns beyond the sequence.
    """
    projected = _Projected(query, key, value, projections, real)
    given, lse, grad = (projected.heads(x.to(projected.dtype)) for x in (out, log_sum_exp, grad_out))
    grad_lse = None if grad_log_sum_exp is None else projected.heads(grad_log_sum_exp.to(projected.dtype))
    grad_query, key_rows, value_rows, _ = exact_aten.backward(
        projected.query, projected.key_rows, projected.value_rows, scale, given, lse, grad, grad_lse,
        **projected.mask,
    )  # fmt: skip
    grad_key, for_keys = projected.carried(key_rows, projected.for_keys, projected.key)
    grad_value, for_values = projected.carried(value_rows, projected.for_values, projected.value)
    grad_projections = tuple(
        torch.nn.functional.pad(grad, (0, x.shape[-1] - grad.shape[-1])).to(x.dtype).contiguous()
        for grad, x in zip((for_keys, for_values), projections)
    )
    return (
        projected.back(grad_query).to(query.dtype).contiguous(), grad_key.to(key.dtype).contiguous(),
        grad_value.to(value.dtype).contiguous(), (grad_projections[0], grad_projections[1]),
    )  # fmt: skip
