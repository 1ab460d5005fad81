"""Coarse tree attention by the implementation that serves the call; see ``kernels.aten.treeformer_tc``."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import treeformer_tc as aten
from fastattn_compile.kernels.aten.treeformer_tc import Cut, Members, TreeGradients, Weighting
from fastattn_compile.kernels.dispatch import gpu_obstacle, select


def _by_triton(kernel: str, cut: Cut, value: Tensor) -> bool:
    def obstacle() -> str:
        reason = gpu_obstacle(value)
        if reason:
            return reason
        from fastattn_compile.kernels.gpu import coarse

        return coarse.obstacle(cut, value)

    return select(kernel, {"triton": obstacle}) == "triton"


def forward(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """``kernels.aten.treeformer_tc.forward``."""
    if _by_triton("tc_attention forward", cut, value):
        from fastattn_compile.kernels.gpu import coarse

        return coarse.forward(cut, value, weighting)
    return aten.forward(cut, value, weighting)


def backward(
    cut: Cut, value: Tensor, weighting: Weighting, grad_out: Tensor, of_queries: Members, of_keys: Members
) -> TreeGradients:
    """``kernels.aten.treeformer_tc.backward``."""
    given = cut, value, weighting, grad_out, of_queries, of_keys
    if _by_triton("tc_attention backward", cut, value):
        from fastattn_compile.kernels.gpu import coarse

        return coarse.backward(*given)
    return aten.backward(*given)
