"""Barnes-Hut attention by the implementation that serves the call; see ``kernels.aten.barnes_hut``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastattn_compile.kernels.aten import barnes_hut as aten
from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.cpu import barnes_hut as cpu
from fastattn_compile.kernels.dispatch import give_way, gpu_obstacle, select

NOT_FINITE = "keys or values hold an infinity or NaN, whose queries ATen tells apart"


def triton_obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(query, key, value)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu import barnes_hut

    return barnes_hut.obstacle(query, key, value, pattern)


def _offered(
    query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern, pool: bool
) -> dict[str, Callable[[], str]]:
    return {
        "triton": lambda: triton_obstacle(query, key, value, pattern),
        "cpp": lambda: cpu.why_not(query, key, value, pattern, pool),
    }


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.barnes_hut.forward``."""
    given = query, key, value, scale, pattern, pool, key_padding
    chosen = select("barnes_hut forward", _offered(query, key, value, pattern, pool))
    if chosen == "triton":
        from fastattn_compile.kernels.gpu import barnes_hut

        return barnes_hut.forward(*given)
    if chosen == "cpp":
        made = cpu.forward(query, key, value, scale, pattern, key_padding)
        if made is not None:
            return made
        give_way("barnes_hut forward", chosen, NOT_FINITE)
    return aten.forward(*given)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.barnes_hut.backward``."""
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp, key_padding
    chosen = select("barnes_hut backward", _offered(query, key, value, pattern, pool))
    if chosen == "triton":
        from fastattn_compile.kernels.gpu import barnes_hut

        return barnes_hut.backward(query, key, value, scale, pattern, pool, *saved)
    if chosen == "cpp":
        made = cpu.backward(query, key, value, scale, pattern, *saved)
        if made is not None:
            return made
        give_way("barnes_hut backward", chosen, NOT_FINITE)
    return aten.backward(query, key, value, scale, pattern, pool, *saved)
