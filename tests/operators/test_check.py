"""Kernels held against their definitions at run time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import make_inputs, make_parameters, run

from fastattn_compile.errors import NumericError
from fastattn_compile.operators import library
from fastattn_compile.operators.base import AttentionOutput
from fastattn_compile.operators.check import compare_with_reference, excerpt, relative_error
from fastattn_compile.operators.fma import FastMultipoleAttention
from fastattn_compile.operators.registry import make_operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_a_right_kernel_passes_with_gradients(basis: str, dtype: torch.dtype) -> None:
    operator = make_operator("fma", block=8, rank=2, basis=basis)
    inputs = make_inputs("causal", dtype=dtype)
    deviations = compare_with_reference(operator, inputs, make_parameters(operator, inputs), gradients=True)
    assert [d.name for d in deviations][:3] == ["output", "log_sum_exp", "gradient of query"]
    assert all(d.within for d in deviations), deviations


def test_a_wrong_kernel_is_caught_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastMultipoleAttention.forward

    def wrong(self, inputs, parameters=()):
        output = right(self, inputs, parameters)
        return AttentionOutput(output.out * 1.001, output.log_sum_exp)

    operator, inputs = make_operator("fma", block=8, rank=2), make_inputs("causal")
    monkeypatch.setattr(library, "_checked", set())
    monkeypatch.setattr(FastMultipoleAttention, "forward", wrong)
    run(operator, inputs)
    monkeypatch.setenv("FASTATTN_CHECK", "1")
    with pytest.raises(NumericError, match=r"kernel of fma.*disagrees with its definition"):
        run(operator, inputs)
    monkeypatch.setattr(FastMultipoleAttention, "forward", right)
    monkeypatch.setattr(library, "_checked", set())
    run(operator, inputs)


def test_an_excerpt_is_small_and_whole() -> None:
    inputs = make_inputs("causal & key_padding", length=75)
    small = excerpt(inputs, 40).validated()
    assert small.query.shape == (1, 2, 40, 8)
    assert small.key.shape == (1, 1, 40, 8)
    assert excerpt(inputs, 40, whole_heads=True).query.shape == (1, 4, 40, 8)
    biased = dataclasses.replace(inputs, bias=torch.zeros(4))
    assert excerpt(biased, 40).query.shape[1] == 4


def test_differing_infinities_are_an_infinite_error() -> None:
    x = torch.tensor([1.0, -torch.inf])
    assert relative_error(x, x) == 0
    assert relative_error(torch.tensor([1.0, 2.0]), x) == float("inf")
    assert relative_error(torch.tensor([torch.nan, -torch.inf]), x) == float("inf")
