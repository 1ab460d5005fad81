"""Local attention: one face for its kernels on ATen, in C++ and in Triton, with the arguments of ``aten.window``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastattn_compile.kernels.aten import window as on_aten
from fastattn_compile.kernels.aten.window import Local
from fastattn_compile.kernels.cpu import ranges as on_cpu
from fastattn_compile.kernels.dispatch import give_way, gpu_obstacle, select

NOT_FINITE = "a key or value that is met holds an infinity or NaN, whose queries ATen tells apart"


def triton_obstacle(query: Tensor, key: Tensor, value: Tensor, local: Local) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(query, key, value)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu import window as on_gpu

    return on_gpu.obstacle(query, key, value, local)


def _offered(
    query: Tensor, key: Tensor, value: Tensor, local: Local, bias: Tensor | None
) -> dict[str, Callable[[], str]]:
    offered = {"triton": lambda: _biased(bias) or triton_obstacle(query, key, value, local)}
    if query.device.type == "cpu":
        offered["cpp"] = lambda: _biased(bias) or on_cpu.window_obstacle(query, key, value, local)
    return offered


def _biased(bias: Tensor | None) -> str:
    return "it adds no bias by distance to the scores" if bias is not None else ""


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, key_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.aten.window.forward``, by the fastest implementation that serves the call."""
    name = select("window forward", _offered(query, key, value, local, bias))
    if name == "triton":
        from fastattn_compile.kernels.gpu import window as on_gpu

        return on_gpu.forward(query, key, value, scale, local, key_padding)
    if name == "cpp":
        made = on_cpu.window(query, key, value, scale, local, key_padding)
        if made is not None:
            return made
        give_way("window forward", name, NOT_FINITE)
    return on_aten.forward(query, key, value, scale, local, key_padding, bias)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As ``kernels.aten.window.backward``, by the fastest implementation that serves the call."""
    given = query, key, value, scale, local, out, log_sum_exp, grad_out, grad_log_sum_exp, key_padding
    name = select("window backward", _offered(query, key, value, local, bias))
    if name == "triton":
        from fastattn_compile.kernels.gpu import window as on_gpu

        return *on_gpu.backward(*given), None
    if name == "cpp":
        made = on_cpu.window_backward(*given)
        if made is not None:
            return *made, None
        give_way("window backward", name, NOT_FINITE)
    return on_aten.backward(*given, bias)
