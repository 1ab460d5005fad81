"""The best exact attention there is on a device: every kernel PyTorch offers for the case, the fastest of them wins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.benchmarking.case import Attention, Case
from fastattn_compile.reporting.timing import SDPA, elapsed_ms

_CUDA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def candidates(case: Case, flex: bool) -> dict[str, Attention]:
    """Names and functions of the exact attentions that may serve a case.

    Args:
        case: The case.
        flex: Include FlexAttention, which ``torch.compile`` lowers first (tens of seconds).
    """
    grouped = case.heads != case.kv_heads
    plain = partial(F.scaled_dot_product_attention, is_causal=case.causal, enable_gqa=grouped)
    found: dict[str, Attention] = {}
    if case.device == "cuda":
        for name in _CUDA_BACKENDS:
            found[f"{SDPA} ({name.removesuffix('_ATTENTION').lower()})"] = partial(_with_backend, name, plain)
    else:
        found[SDPA] = plain
    if grouped:
        # Some kernels only serve grouped heads through a slow path: repeating the keys may be faster.
        found[f"{SDPA} (keys repeated)"] = partial(_repeated, case)
    if flex:
        found["flex_attention"] = _flex(case)
    return found


def best_baseline(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor], flex: bool
) -> tuple[str, Callable[[], Any], dict[str, str]]:
    """The exact attention that was fastest in one trial.

    Args:
        case: The case.
        tensors: Its tensors.
        flex: Try FlexAttention too.

    Returns:
        Its name, a call of it, and why others could not serve.

    Raises:
        RuntimeError: None could.
    """
    refused: dict[str, str] = {}
    times: dict[str, tuple[float, Callable[[], Any]]] = {}
    for name, attention in candidates(case, flex).items():
        try:
            call = case.step(attention, tensors)
            call()
            times[name] = elapsed_ms(call), call
        except Exception as error:  # a kernel that does not serve a case says so in many ways
            refused[name] = " ".join(str(error).split())[:200]
    if not times:
        raise RuntimeError(f"no exact attention serves {case}: {refused}")
    name = min(times, key=lambda each: times[each][0])
    return name, times[name][1], refused


def _with_backend(name: str, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return attention(q, k, v)


def _repeated(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)


def _flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    block_mask = (
        create_block_mask(causal, None, None, case.n, case.n, device=case.device) if case.causal else None
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=case.heads != case.kv_heads)
