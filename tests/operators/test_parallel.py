"""Parts of a kernel on several threads: the same numbers, and nothing of it left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import leaves, make_inputs, make_parameters, run

from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.aten import fma as fma_aten
from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import normalise
from fastattn_compile.operators.registry import make_operator

CPU = torch.device("cpu")


def results_of(work, count, threads):
    torch.set_num_threads(threads)
    taken = []
    run_parts(work, range(count), list, CPU, taken.append)
    return taken


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order_and_state_stays_with_a_thread(threads):
    meet = threading.Barrier(threads)

    def work(own, item):
        if item < threads:
            meet.wait(timeout=20)  # only threads that really run at once get past it
        own.append(item)
        return item, threading.current_thread().name, list(own)

    taken = results_of(work, 7, threads)
    assert [item for item, _, _ in taken] == list(range(7))
    assert all(seen == sorted(seen) for _, _, seen in taken)
    assert len({name for _, name, _ in taken[:threads]}) == threads
    assert torch.get_num_threads() == threads


def test_a_part_has_one_thread_and_no_autograd():
    def work(own, item):
        return torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu"):
        assert set(results_of(work, 4, 2)) == {(1, False, False)}


def test_an_error_in_a_part_reaches_the_caller():
    def work(own, item):
        raise ZeroDivisionError(item)

    with pytest.raises(ZeroDivisionError):
        results_of(work, 4, 2)


@pytest.mark.parametrize("name", ["exact", "mean", "depthwise"])
@pytest.mark.parametrize("mask", ["causal & window(60)", "key_padding"])
def test_attention_on_two_threads(name, mask, monkeypatch):
    inputs = make_inputs(mask, length=150, heads=6, kv_heads=3)
    operator = (
        make_operator("exact") if name == "exact" else make_operator("fma", block=8, rank=2, basis=name)
    )
    parameters = make_parameters(operator, inputs)
    names = set()

    def watched(scores, *rest):
        names.add(threading.current_thread().name)
        return normalise(scores, *rest)

    monkeypatch.setattr(exact_aten if name == "exact" else fma_aten, "normalise", watched)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        given, params, sources = leaves(inputs, parameters)
        with use_kernels("aten"):
            output = run(operator, given, params)
            total = output.out.square().sum() + output.log_sum_exp.sum()
            results.append((output.out, output.log_sum_exp, *torch.autograd.grad(total, sources)))
    assert any(name.startswith("fastattn") for name in names)
    for one, two, again in zip(*results):
        assert torch.allclose(one, two, atol=1e-5)
        assert torch.equal(two, again)


def test_inference_mode_on_two_threads():
    inputs = make_inputs("causal", length=150)
    operator = make_operator("fma", block=8, rank=2)
    wanted = run(operator, inputs).out
    torch.set_num_threads(2)
    with torch.inference_mode():
        inside = run(operator, inputs).out
    assert torch.allclose(inside, wanted, atol=1e-6)
    given, _, sources = leaves(inputs, ())
    torch.autograd.grad(run(operator, given).out.sum(), sources)
