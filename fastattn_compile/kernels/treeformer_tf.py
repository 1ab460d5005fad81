"""Leaf attention by the implementation that serves the call; see ``kernels.aten.treeformer_tf``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastattn_compile.kernels.aten import treeformer_tf as aten
from fastattn_compile.kernels.aten.treeformer_tf import Part, PartGradients
from fastattn_compile.kernels.cpu import ranges as cpu
from fastattn_compile.kernels.dispatch import give_way, gpu_obstacle, select

BIASED = "a bias by distance is added to the scores"
NOT_FINITE = "a key or value that is met holds an infinity or NaN, whose queries ATen tells apart"


def triton_obstacle(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(query, key, value) or _bias_obstacle(parts)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu import leaf

    return leaf.obstacle(query, key, value, parts)


def _offered(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]
) -> dict[str, Callable[[], str]]:
    offered = {"triton": lambda: triton_obstacle(query, key, value, parts)}
    if query.device.type == "cpu":
        offered["cpp"] = lambda: _bias_obstacle(parts) or cpu.why_not(query, key, value, parts)
    return offered


def _bias_obstacle(parts: Sequence[Part]) -> str:
    return BIASED if any(part.bias is not None for part in parts) else ""


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.treeformer_tf.attend``; Triton gives the output in the type of the values."""
    name = select("tf_attention forward", _offered(query, key, value, parts))
    if name == "triton":
        from fastattn_compile.kernels.gpu import leaf

        return leaf.attend(query, key, value, scale, parts)
    if name == "cpp":
        made = cpu.attend(query, key, value, scale, parts)
        if made is not None:
            return made
        give_way("tf_attention forward", name, NOT_FINITE)
    return aten.attend(query, key, value, scale, parts)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part], out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[PartGradients]]:  # fmt: skip
    """``kernels.aten.treeformer_tf.backward``."""
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp
    name = select("tf_attention backward", _offered(query, key, value, parts))
    if name == "triton":
        from fastattn_compile.kernels.gpu import leaf

        return leaf.backward(query, key, value, scale, parts, *saved)
    if name == "cpp":
        made = cpu.backward(query, key, value, scale, parts, *saved)
        if made is not None:
            return made
        give_way("tf_attention backward", name, NOT_FINITE)
    return aten.backward(query, key, value, scale, parts, *saved)
