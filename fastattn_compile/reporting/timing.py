"""Wall times that can be compared: medians, interleaved runs, the best exact attention as the baseline."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

SDPA = "scaled_dot_product_attention"
EXACT = "the exact operator"


def interleaved_ms(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    after: Callable[[], None] = lambda: None,
    turns: Sequence[int] | None = None,
) -> list[float]:
    """Median time of each call in milliseconds. The calls take turns, so that a busy moment of the machine
    hits all.

    Args:
        calls: What to time; each has run before, so that nothing is compiled here.
        repeats: Rounds.
        after: Called after every round.
        turns: How often each call runs in its turn; once without it.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent, often in zip(calls, times, turns or [1] * len(calls)):
            spent.extend(elapsed_ms(call) for _ in range(often))
        after()
    return [statistics.median(spent) for spent in times]


def elapsed_ms(call: Callable[[], Any]) -> float:
    """Time of one call in milliseconds, devices drained before and after."""
    _drain()
    start = time.perf_counter()
    call()
    _drain()
    return (time.perf_counter() - start) * 1e3


def _drain() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def exact_attention(inputs: AttentionInputs) -> tuple[str, Callable[[], Any]]:
    """The exact attention to time an operator against, and what it is.

    ``scaled_dot_product_attention`` where the mask is none, plain causal or key padding: then no n x n mask
    is needed and its fastest kernels apply. Any other mask goes to the exact operator.

    Args:
        inputs: The tensors of the site.
    """
    q, k, v = inputs.query, inputs.key, inputs.value
    mask = dataclasses.replace(inputs.mask, end_aligned=False)
    shifted = inputs.mask.end_aligned and q.shape[2] != k.shape[2] and mask.right is not None
    plain = mask in (MaskStructure(), MaskStructure(right=0), MaskStructure(key_padding=True))
    if shifted or not plain or inputs.bias is not None or not q.dtype == k.dtype == v.dtype:
        operator = make_operator("exact")
        return EXACT, lambda: operator.forward(inputs)
    visible = inputs.key_padding[:, None, None, :] if inputs.key_padding is not None else None
    return SDPA, lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=mask.causal, scale=inputs.scale, enable_gqa=inputs.group > 1
    )
