"""Fast multipole attention: one face for its kernels on ATen, in C++ and in Triton, with the arguments of ``aten.fma``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastattn_compile.kernels.aten import fma as on_aten
from fastattn_compile.kernels.aten import fma_pooled
from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.cpu import fma as on_cpu
from fastattn_compile.kernels.dispatch import chosen_kernels, give_way, gpu_obstacle, select

NOT_FINITE = (
    "keys or values hold an infinity or NaN, which its sums would spread to queries that do not see it"
)


def triton_obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(query, key, value)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu import fma as on_gpu

    return on_gpu.obstacle(query, key, value, pattern)


def _offered(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, bias: Tensor | None
) -> dict[str, Callable[[], str]]:
    biased = "it adds no bias by distance to the scores" if bias is not None else ""
    offered = {"triton": lambda: biased or triton_obstacle(query, key, value, pattern)}
    if query.device.type == "cpu":
        offered["cpp"] = lambda: on_cpu.why_not(query, key, value, pattern)
    return offered


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.aten.fma.forward``, by the fastest implementation that serves the call."""
    name = select("fma forward", _offered(query, key, value, pattern, bias))
    if name == "triton":
        from fastattn_compile.kernels.gpu import fma as on_gpu

        return on_gpu.forward(query, key, value, scale, pattern, key_padding, weights)
    if name == "cpp":
        made = on_cpu.forward(query, key, value, scale, pattern, key_padding, weights, bias)
        if made is not None:
            return made
        give_way("fma forward", name, NOT_FINITE)
    return on_aten.forward(query, key, value, scale, pattern, key_padding, weights, bias)


def forward_packed(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, segments: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Packed documents where they stand; ``None`` where they must be laid out as sequences, which every kernel serves.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom in a document.
        segments: ``(b, n)`` integer document numbers.
    """
    if not _in_place(query, key, value, pattern, segments):
        return None
    from fastattn_compile.kernels.gpu import fma_packed

    select("fma packed forward", {"triton": lambda: ""})
    return fma_packed.forward(query, key, value, scale, pattern, segments)


def backward_packed(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, segments: Tensor, out: Tensor,
    log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Gradients of packed documents where they stand; ``None`` as for ``forward_packed``.

    Args:
        query: As in ``forward_packed``.
        key: As in ``forward_packed``.
        value: As in ``forward_packed``.
        scale: As in ``forward_packed``.
        pattern: As in ``forward_packed``.
        segments: As in ``forward_packed``.
        out: ``(b, h, n, e)`` output of the forward pass, by whichever implementation.
        log_sum_exp: ``(b, h, n)`` its log-sum-exp.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
    """
    if not _in_place(query, key, value, pattern, segments):
        return None
    from fastattn_compile.kernels.gpu import fma_packed

    select("fma packed backward", {"triton": lambda: ""})
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp
    return fma_packed.backward(query, key, value, scale, pattern, segments, *saved)


def _in_place(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, segments: Tensor) -> bool:
    """Whether Triton serves packed documents where they stand."""
    if chosen_kernels() not in ("auto", "triton") or gpu_obstacle(query, key, value):
        return False
    from fastattn_compile.kernels.gpu import fma_packed

    if fma_packed.obstacle(query, key, value, pattern):
        return False
    # Where numbers rise, the tokens of a document stand side by side. Asked last: a GPU must be waited for.
    return not bool((segments[:, 1:] < segments[:, :-1]).any())


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """As ``kernels.aten.fma.backward``, by the fastest implementation that serves the call."""
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp, key_padding
    name = select("fma backward", _offered(query, key, value, pattern, bias))
    if name == "triton":
        from fastattn_compile.kernels.gpu import fma as on_gpu

        return *on_gpu.backward(query, key, value, scale, pattern, *saved, weights), None
    if name == "cpp":
        made = on_cpu.backward(query, key, value, scale, pattern, *saved, weights, bias)
        if made is not None:
            return made
        give_way("fma backward", name, NOT_FINITE)
    return on_aten.backward(query, key, value, scale, pattern, *saved, weights, bias)


def pooled_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: fma_pooled.PooledPattern,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.aten.fma_pooled.forward``, which has no other implementation."""
    select("fma with pooled queries, forward", {})
    return fma_pooled.forward(query, key, value, scale, pattern, key_padding)


def pooled_backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: fma_pooled.PooledPattern, out: Tensor,
    log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``kernels.aten.fma_pooled.backward``, which has no other implementation."""
    select("fma with pooled queries, backward", {})
    saved = out, log_sum_exp, grad_out, grad_log_sum_exp, key_padding
    return fma_pooled.backward(query, key, value, scale, pattern, *saved)
