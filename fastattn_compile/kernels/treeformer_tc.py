"""Coarse tree attention by the implementation that serves the call; see ``kernels.aten.treeformer_tc``."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import treeformer_tc as aten
from fastattn_compile.kernels.aten.treeformer_tc import Cut, Members, TreeGradients, Weighting
from fastattn_compile.kernels.cpu import trees as cpu
from fastattn_compile.kernels.dispatch import gpu_obstacle, select, takes_step


def triton_obstacle(cut: Cut, value: Tensor) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(value)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu import coarse

    return coarse.obstacle(cut, value)


def takes_whole(value: Tensor) -> bool:
    """Whether a forward pass over these values takes whole sequences of all units at once: nothing need be cut for it."""
    return takes_step("cpp", lambda: cpu.why_not(value))


def forward(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """``kernels.aten.treeformer_tc.forward``."""
    offered = {"triton": lambda: triton_obstacle(cut, value), "cpp": lambda: cpu.why_not(value, cut.real)}
    name = select("tc_attention forward", offered)
    if name == "triton":
        from fastattn_compile.kernels.gpu import coarse

        return coarse.forward(cut, value, weighting)
    return cpu.coarse(cut, value, weighting) if name == "cpp" else aten.forward(cut, value, weighting)


def backward(
    cut: Cut, value: Tensor, weighting: Weighting, grad_out: Tensor, of_queries: Members, of_keys: Members
) -> TreeGradients:
    """``kernels.aten.treeformer_tc.backward``."""
    given = cut, value, weighting, grad_out, of_queries, of_keys
    if select("tc_attention backward", {"triton": lambda: triton_obstacle(cut, value)}) == "triton":
        from fastattn_compile.kernels.gpu import coarse

        return coarse.backward(*given)
    return aten.backward(*given)
