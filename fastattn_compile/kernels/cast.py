"""CAST over all tokens at once by the implementation that serves the call; see ``kernels.aten.cast``."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import cast as aten
from fastattn_compile.kernels.aten.cast import exact_keys, members
from fastattn_compile.kernels.aten.cast_affinity import Rule, Weights
from fastattn_compile.kernels.dispatch import gpu_obstacle, select

__all__ = ["backward", "exact_keys", "forward", "members"]


def _by_triton(kernel: str, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> bool:
    def obstacle() -> str:
        reason = gpu_obstacle(query, key, value)
        if reason:
            return reason
        from fastattn_compile.kernels.gpu import cast

        return cast.obstacle(query, key, value, rule)

    return select(kernel, {"triton": obstacle}) == "triton"


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rule: Rule,
    weights: Weights,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.cast.forward``."""
    given = query, key, value, scale, rule, weights, real
    if _by_triton("cast forward", query, key, value, rule):
        from fastattn_compile.kernels.gpu import cast

        return cast.forward(*given)
    return aten.forward(*given)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Weights | None]:  # fmt: skip
    """``kernels.aten.cast.backward``."""
    given = query, key, value, scale, rule, weights, grad_out, grad_log_sum_exp, real
    if _by_triton("cast backward", query, key, value, rule):
        from fastattn_compile.kernels.gpu import cast

        return cast.backward(*given)
    return aten.backward(*given)
