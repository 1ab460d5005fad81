"""Fast multipole attention in C++ against its definition: learned rows, rows without rotary embedding, biases."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import make_inputs
from torch import Tensor

from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.check import compare_with_reference
from fastattn_compile.operators.fma import FastMultipoleAttention
from fastattn_compile.operators.fma.config import FmaConfig

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler")

LEARNED = ({"basis": "depthwise"}, {"basis": "dense"}, {"basis": "recursive"})
TURNED = ({"rotary_base": 10000.0}, {"basis": "depthwise", "rotary_base": 10000.0})
BIASES = ("none", "slopes", "distance")


def with_bias(inputs: AttentionInputs, bias: str) -> AttentionInputs:
    heads, length = inputs.query.shape[1:3]
    if bias == "slopes":
        return dataclasses.replace(inputs, bias=2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))
    return dataclasses.replace(
        inputs, bias=torch.randn(heads, 2 * length + 9) if bias == "distance" else None
    )


def drawn(
    inputs: AttentionInputs, options: dict[str, object]
) -> tuple[FastMultipoleAttention, tuple[Tensor, ...]]:
    """An operator, and parameters that are not those it starts from."""
    operator = FastMultipoleAttention(FmaConfig(**{"block": 16, "rank": 4, "sinks": 3, **options}))
    start = operator.initial_parameters(inputs.spec()).values()
    return operator, tuple(x + 0.1 * torch.randn_like(x) for x in start)


def check(inputs: AttentionInputs, **options: object) -> None:
    operator, parameters = drawn(inputs, options)
    with use_kernels("cpp"), recorded_kernels() as ran:
        deviations = compare_with_reference(operator, inputs, parameters, gradients=True)
    assert set(ran.values()) == {"cpp"}
    assert all(d.within for d in deviations), [d for d in deviations if not d.within]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "causal & key_padding"])
@pytest.mark.parametrize("options", [*LEARNED, *TURNED], ids=str)
def test_learned_rows_and_rows_without_rotary_embedding(
    options: dict[str, object], mask: str, dtype: torch.dtype
) -> None:
    check(make_inputs(mask, length=200, head_dim=16, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("basis", ["mean", "depthwise"])
@pytest.mark.parametrize("bias", BIASES[1:])
def test_biases_near_and_far(bias: str, basis: str, mask: str, dtype: torch.dtype) -> None:
    check(with_bias(make_inputs(mask, length=200, head_dim=16, dtype=dtype), bias), basis=basis)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    # Of a few numbers the typical error of a gradient is one of them, not an average; so is that of few learned rows, below.
    st.integers(64, 300), st.sampled_from([(2, 1), (4, 4), (6, 2)]), st.integers(16, 37), st.integers(16, 37),
    st.sampled_from([(8, 2), (12, 3), (5, 5), (7, 1), (20, 20)]), st.booleans(), st.integers(0, 5),
    st.sampled_from(["mean", "depthwise"]), st.sampled_from(BIASES),
)  # fmt: skip
def test_any_shape(
    length: int, heads: tuple[int, int], d: int, e: int, block: tuple[int, int], causal: bool, sinks: int, basis: str,
    bias: str,
) -> None:  # fmt: skip
    torch.manual_seed(length)  # an example is the same whatever came before it
    if basis == "depthwise":
        length = max(length, 8 * block[0])
    inputs = make_inputs(
        "causal" if causal else "none", batch=1, heads=heads[0], kv_heads=heads[1], length=length, head_dim=d,
        value_dim=e,
    )  # fmt: skip
    check(with_bias(inputs, bias), block=block[0], rank=block[1], sinks=min(sinks, block[0]), basis=basis)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_the_gradient_of_a_bias_by_distance(basis: str, mask: str) -> None:
    inputs = with_bias(make_inputs(mask, length=200, head_dim=16), "distance")
    operator, parameters = drawn(inputs, {"basis": basis})
    seed = torch.randn_like(inputs.query)

    def gradient(dtype: torch.dtype) -> Tensor:
        bias = inputs.bias.to(dtype).requires_grad_()
        tensors = {name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")}
        wide = dataclasses.replace(inputs, **tensors, bias=bias)
        out = operator.reference(wide, tuple(p.to(dtype) for p in parameters)).out
        return torch.autograd.grad(out, bias, seed.to(dtype))[0].double()

    exact, typical = gradient(torch.float64), gradient(torch.float32)
    with use_kernels("cpp"), torch.no_grad():
        made = operator.forward(inputs, parameters)
        got = operator.backward(inputs, parameters, made, seed, None).bias
    assert got is not None and got.dtype == torch.float32
    error, typical_error = (float((x.double() - exact).norm() / exact.norm()) for x in (got, typical))
    assert error <= 2 * typical_error + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("options", [{}, LEARNED[0], LEARNED[1], TURNED[1]], ids=str)
def test_bits_do_not_depend_on_what_comes_after(options: dict[str, object], bias: str) -> None:
    if bias != "none" and "rotary_base" in options:
        pytest.skip("not defined together")
    inputs = with_bias(make_inputs("causal", length=200), bias)
    operator, parameters = drawn(inputs, options)
    with use_kernels("cpp"):
        before = operator.forward(inputs, parameters)
        for name in ("query", "key", "value"):
            getattr(inputs, name)[:, :, 150:] = torch.randn_like(getattr(inputs, name)[:, :, 150:])
        after = operator.forward(inputs, parameters)
    assert torch.equal(before.out[:, :, :150], after.out[:, :, :150])
    assert torch.equal(before.log_sum_exp[:, :, :150], after.log_sum_exp[:, :, :150])
    assert not torch.equal(before.out[:, :, 150:], after.out[:, :, 150:])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_bitwise_repeatable_on_any_number_of_threads(basis: str, bias: str, threads: int) -> None:
    inputs = with_bias(make_inputs("causal", length=400, heads=4, kv_heads=4), bias)
    operator, parameters = drawn(inputs, {"basis": basis})

    def run() -> tuple[Tensor, ...]:
        made = operator.forward(inputs, parameters)
        grads = operator.backward(inputs, parameters, made, torch.ones_like(made.out), None)
        of_bias = () if grads.bias is None else (grads.bias,)
        return made.out, made.log_sum_exp, grads.query, grads.key, grads.value, *grads.parameters, *of_bias

    with use_kernels("cpp"):
        alone = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, run()))


@pytest.mark.parametrize("where", ["key", "value", "weight"])
def test_what_is_not_finite_is_left_to_aten(where: str) -> None:
    inputs = make_inputs("causal", length=100)
    operator, parameters = drawn(inputs, {"basis": "depthwise"})
    if where == "weight":
        parameters[0][0, 0, 0] = float("nan")
    else:
        getattr(inputs, where)[0, 0, 40, 3] = float("inf")
    with recorded_kernels() as ran:
        by_auto = operator.forward(inputs, parameters).out
    assert ran == {"fma forward": "aten"}
    with use_kernels("aten"):
        by_aten = operator.forward(inputs, parameters).out
    assert torch.equal(by_auto.isfinite(), by_aten.isfinite())
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="infinity or NaN"):
        operator.forward(inputs, parameters)


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if options.get("dtype") in (torch.float32, None) else made

    monkeypatch.setattr(torch, "empty", poisoned)
    for bias in BIASES:
        check(with_bias(make_inputs("causal & key_padding", length=75), bias), basis="depthwise")


def test_far_slopes_hold_where_nearer_tokens_are_padding() -> None:
    # Weights of so far a distance are no numbers any more; relative to each other they are.
    inputs = with_bias(make_inputs("causal & key_padding", length=400, heads=2, kv_heads=2), "slopes")
    inputs.bias.fill_(1.0)
    inputs.key_padding[:] = True
    inputs.key_padding[:, 40:380] = False
    check(inputs)
