"""Causal CAST by the implementation that serves its running summaries; see ``kernels.aten.cast_causal``.

Buckets choose for themselves (``kernels.aten.cast_bucket``).
"""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import cast_causal as aten
from fastattn_compile.kernels.aten.cast_affinity import Rule, Weights
from fastattn_compile.kernels.aten.cast_causal import exact_keys, members
from fastattn_compile.kernels.aten.cast_scan import ClusterScan
from fastattn_compile.kernels.dispatch import gpu_obstacle, select

__all__ = ["backward", "exact_keys", "forward", "members"]


def _scan(kernel: str, query: Tensor, key: Tensor, value: Tensor) -> type[ClusterScan]:
    """Who computes the running summaries of a call."""

    def obstacle() -> str:
        reason = gpu_obstacle(query, key, value)
        if reason:
            return reason
        from fastattn_compile.kernels.gpu import cast_scan

        return cast_scan.obstacle(query, key, value)

    if select(kernel, {"triton": obstacle}) == "triton":
        from fastattn_compile.kernels.gpu import cast_scan

        return cast_scan.Scan
    return ClusterScan


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rule: Rule,
    weights: Weights,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.cast_causal.forward``."""
    kind = _scan("cast scan forward", query, key, value)
    return aten.forward(query, key, value, scale, rule, weights, real, kind)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Weights | None]:  # fmt: skip
    """``kernels.aten.cast_causal.backward``."""
    kind = _scan("cast scan backward", query, key, value)
    given = query, key, value, scale, rule, weights, grad_out, grad_log_sum_exp, real
    return aten.backward(*given, kind)
