"""Leaf attention by the implementation that serves the call; see ``kernels.aten.treeformer_tf``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn_compile.kernels.aten import treeformer_tf as aten
from fastattn_compile.kernels.aten.treeformer_tf import Part, PartGradients
from fastattn_compile.kernels.dispatch import gpu_obstacle, select


def _by_triton(kernel: str, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]) -> bool:
    def obstacle() -> str:
        reason = gpu_obstacle(query, key, value)
        if reason:
            return reason
        from fastattn_compile.kernels.gpu import leaf

        return leaf.obstacle(query, key, value, parts)

    return select(kernel, {"triton": obstacle}) == "triton"


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.treeformer_tf.attend``; Triton gives the output in the type of the values."""
    if _by_triton("tf_attention forward", query, key, value, parts):
        from fastattn_compile.kernels.gpu import leaf

        return leaf.forward(query, key, value, scale, parts[0])
    return aten.attend(query, key, value, scale, parts)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part], out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[PartGradients]]:  # fmt: skip
    """``kernels.aten.treeformer_tf.backward``."""
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp
    if _by_triton("tf_attention backward", query, key, value, parts):
        from fastattn_compile.kernels.gpu import leaf

        *grads, said = leaf.backward(query, key, value, scale, parts[0], *saved)
        return grads[0], grads[1], grads[2], [said]
    return aten.backward(query, key, value, scale, parts, *saved)
