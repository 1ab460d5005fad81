"""Fast multipole attention in C++ against its definition: all types and masks it serves, any length, both directions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import make_inputs

from fastattn_compile.kernels import fma as fma_kernels
from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.check import compare_with_reference
from fastattn_compile.operators.fma import FastMultipoleAttention
from fastattn_compile.operators.fma.config import FmaConfig

needs_compiler = pytest.mark.skipif(
    bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler"
)
pytestmark = needs_compiler


def check(inputs: AttentionInputs, **options: object) -> None:
    operator = FastMultipoleAttention(FmaConfig(**{"block": 16, "rank": 4, "sinks": 3, **options}))
    with use_kernels("cpp"), recorded_kernels() as ran:
        deviations = compare_with_reference(operator, inputs, gradients=inputs.query.shape[2] > 1)
    assert set(ran.values()) <= {"cpp"}  # two blocks and less are plain exact attention
    assert all(d.within for d in deviations), [d for d in deviations if not d.within]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [1, 7, 16, 40, 77, 200, 531])
def test_types_masks_and_lengths(length: int, mask: str, dtype: torch.dtype) -> None:
    check(make_inputs(mask, length=length, head_dim=16, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [{"sinks": 0}, {"scale_attn": False}, {"rank": 1}, {"rank": 16}, {"block": 24, "rank": 3}],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_options(options: dict[str, object], mask: str) -> None:
    check(make_inputs(mask, length=150), **options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    # Of a few tokens the typical error of a gradient is one number, not an average; they are in the table above.
    st.integers(24, 300), st.sampled_from([(2, 1), (4, 4), (6, 2)]), st.integers(8, 40), st.integers(8, 40),
    st.sampled_from([(8, 2), (12, 3), (5, 5), (64, 4)]), st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_any_shape(
    length: int, heads: tuple[int, int], d: int, e: int, block: tuple[int, int], causal: bool, sinks: int
) -> None:
    inputs = make_inputs(
        "causal" if causal else "none",
        batch=1,
        heads=heads[0],
        kv_heads=heads[1],
        length=length,
        head_dim=d,
        value_dim=e,
    )
    check(inputs, block=block[0], rank=block[1], sinks=min(sinks, block[0]))


def test_any_strides() -> None:
    inputs = make_inputs("causal", length=75, head_dim=8)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
    moved[2] = torch.cat([moved[2], moved[2]], -1)[..., ::2]  # the last dimension has gaps
    check(dataclasses.replace(inputs, query=moved[0], key=moved[1].expand(2, -1, -1, -1), value=moved[2]))


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if options.get("dtype") in (torch.float32, None) else made

    monkeypatch.setattr(torch, "empty", poisoned)
    inputs = make_inputs("causal & key_padding", length=75)
    check(inputs)
    inputs.key_padding[0] = False
    check(inputs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_repeatable_on_any_number_of_threads(threads: int) -> None:
    inputs = make_inputs("causal", length=700, heads=4, kv_heads=4)
    operator = FastMultipoleAttention(FmaConfig(block=16, rank=2))

    def run() -> tuple[torch.Tensor, ...]:
        made = operator.forward(inputs)
        grads = operator.backward(inputs, (), made, torch.ones_like(made.out), None)
        return made.out, made.log_sum_exp, grads.query, grads.key, grads.value

    with use_kernels("cpp"):
        alone = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, run()))


def test_what_is_not_finite_is_left_to_aten() -> None:
    inputs = make_inputs("causal", length=75)
    inputs.key[0, 0, 40, 3] = float("nan")
    operator = FastMultipoleAttention(FmaConfig(block=16, rank=4))
    with recorded_kernels() as ran:
        by_auto = operator.forward(inputs).out
    assert ran == {"fma forward": "aten"}
    with use_kernels("aten"):
        by_aten = operator.forward(inputs).out
    assert torch.equal(by_auto.isnan(), by_aten.isnan())
    assert not by_auto[0, :2, :40].isnan().any()
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="infinity or NaN"):
        operator.forward(inputs)


def test_an_explicit_choice_says_why_it_cannot_serve() -> None:
    inputs = make_inputs("causal & window(9)", length=75)
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="serves no window"):
        FastMultipoleAttention(FmaConfig(block=16)).forward(inputs)
    wide = make_inputs("causal", dtype=torch.float64)
    with use_kernels("cpp"), pytest.raises(RuntimeError, match=r"not torch.float64"):
        FastMultipoleAttention(FmaConfig(block=16)).forward(wide)


def test_without_a_compiler_aten_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn_compile.kernels.cpu import fma as on_cpu

    monkeypatch.setattr(on_cpu, "obstacle", lambda name: "no C++ compiler was found")
    inputs = make_inputs("causal", length=75)
    operator = FastMultipoleAttention(FmaConfig(block=16))
    with recorded_kernels() as ran:
        operator.forward(inputs)
    assert ran == {"fma forward": "aten"}
    with use_kernels("cpp"), pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        operator.forward(inputs)
    assert fma_kernels.forward.__doc__


def test_sources_stand_alone() -> None:
    text = build.source("fma")
    assert '#include "' not in text
    assert "torch" not in text.lower()
