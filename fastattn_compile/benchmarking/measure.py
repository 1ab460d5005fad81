"""Measuring one case: first that the kernel is right, then its time beside the best exact attention, then its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastattn_compile.benchmarking.baseline import best_baseline
from fastattn_compile.benchmarking.case import FORWARD, WORK, Case
from fastattn_compile.benchmarking.memory import peak_bytes
from fastattn_compile.kernels.dispatch import recorded_kernels
from fastattn_compile.machine import Rates
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.check import compare_with_reference
from fastattn_compile.reporting.timing import elapsed_ms, interleaved_ms

CHECKED = 1024
_MOST_REPEATS, _MOST_IN_TURN = 25, 5


def measure(
    case: Case, rates: Rates, *, seconds: float = 10.0, flex: bool = False, memory: bool = True
) -> dict[str, Any]:
    """One row of the document: ``ratio`` is how many times faster than the best exact attention the operator is.

    A case that the operator refuses, or whose kernel is wrong, has a ``reason`` and no time.

    Args:
        case: The case.
        rates: The best rates of the device, for the physical limit.
        seconds: Time to spend, about.
        flex: FlexAttention may be the baseline.
        memory: Measure the peak memory as well.
    """
    operator = case.make_operator()
    row: dict[str, Any] = {
        "operator": case.operator, "config": operator.config.to_dict(), "device": case.device,
        "dtype": case.dtype, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "n": case.n, "causal": case.causal, "direction": case.direction,
        "ms": None, "baseline": None, "baseline_ms": None, "ratio": None, "peak_bytes": None,
        "floor_fraction": None, "kernels": None, "reason": "",
    }  # fmt: skip
    support = operator.supports(case.spec())
    row["reason"] = support.reason or wrongness(case, operator)
    if row["reason"]:
        return row
    tensors = case.tensors()
    parameters = case.parameters(operator, case.inputs(tensors))
    call = case.step(case.attention(operator, parameters), tensors)
    with recorded_kernels() as kernels:
        result = call()
    row["kernels"] = "+".join(sorted(set(kernels.values()))) or "aten"
    if not all(bool(torch.isfinite(x).all()) for x in _tensors(result)):
        row["reason"] = "wrong: the result holds NaN or Inf"
        return row
    row["baseline"], exact, _refused = best_baseline(case, tensors, flex)
    calls = [_replayed(case, each) for each in (call, exact)]
    once = [elapsed_ms(each) for each in calls]
    # After seconds of something else a call first gets its memory back from the system, and in a virtual machine from the
    # host: a fast one runs several times in its turn, as layers of a model do.
    turns = [int(min(_MOST_IN_TURN, max(1, max(once) / each))) for each in once]
    round_ms = sum(each * often for each, often in zip(once, turns))
    repeats = int(min(_MOST_REPEATS, max(1, seconds * 1e3 / round_ms - 1)))
    ms, baseline_ms = interleaved_ms(calls, repeats, turns=turns)
    cost = operator.cost(case.spec())
    floor_ms = 1e3 * WORK[case.direction] * max(cost.flops / rates.flops, cost.bytes / rates.bytes)
    row |= {
        "ms": round(ms, 4), "baseline_ms": round(baseline_ms, 4), "ratio": round(baseline_ms / ms, 3),
        "floor_fraction": round(floor_ms / ms, 4), "flops": cost.flops, "repeats": repeats,
        "keys_per_query": round(cost.keys_per_query, 1),
    }  # fmt: skip
    if memory:
        row["peak_bytes"] = peak_bytes(case, torch.get_num_threads())
    return row


def wrongness(case: Case, operator: Operator) -> str:
    """Holds the kernel against its definition on a sequence the definition can take; ``""`` when it is right.

    Args:
        case: The case.
        operator: Its operator.
    """
    group = case.heads // case.kv_heads
    operator, length = operator.on_first_tokens(min(case.n, CHECKED))
    small = dataclasses.replace(case, n=length, batch=1, heads=group, kv_heads=1)
    inputs = small.inputs(small.tensors())
    parameters = small.parameters(operator, inputs)
    gradients = case.direction != FORWARD
    deviations = compare_with_reference(operator, inputs, parameters, gradients=gradients)
    wrong = [d for d in deviations if not d.within]
    return "; ".join(
        f"wrong: relative error of the {d.name} {d.error:.2e} at n = {small.n}, the type explains {d.allowed:.2e}"
        for d in wrong
    )


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _replayed(case: Case, call: Callable[[], Any]) -> Callable[[], Any]:
    """On a GPU the call as a CUDA graph, so that launches cost what they cost in a compiled model; else the call."""
    if case.device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call  # what reads a size from the device cannot be captured; it is timed with its launches
    return graph.replay
