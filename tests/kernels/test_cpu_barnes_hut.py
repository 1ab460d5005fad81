"""Barnes-Hut attention in C++ against its definition, and against the choice the kernels on ATen make."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_good_as, cast, make_inputs

from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.check import compare_with_reference
from fastattn_compile.operators.registry import make_operator

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler")
SMALL = {"block": 16, "open": 6, "beam": 8, "sinks": 3}


def by_cpp(inputs: AttentionInputs, **options: object) -> AttentionOutput:
    with use_kernels("cpp"), recorded_kernels() as ran:
        made = make_operator("barnes_hut", **{**SMALL, **options}).forward(inputs)
    assert set(ran.values()) <= {"cpp"}
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [40, 77, 200])
def test_types_masks_and_lengths(length: int, mask: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(mask, length=length, head_dim=16, dtype=dtype)
    for options in ({}, {"group": 16}, {"select": "cumulant"}, {"share_group": False}):
        operator = make_operator("barnes_hut", **SMALL, **options)
        with use_kernels("cpp"), recorded_kernels() as ran:
            deviations = compare_with_reference(operator, inputs, gradients=True)
        assert set(ran.values()) <= {"cpp"}
        assert all(d.within for d in deviations), deviations


@pytest.mark.parametrize(
    "options",
    [
        {"group": 4},
        {"group": 16},
        {"leaf": 2},
        {"leaf": 8, "fanout": 2},
        {"open": 40},
        {"sinks": 0},
        {"select": "cumulant"},
        {"select": "cumulant", "group": 16, "leaf": 2},
        {"share_group": False},
        {"select": "cumulant", "group": 4, "share_group": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (5, 5)], ids=str)
def test_options_and_heads_as_on_aten(heads: tuple[int, int], options: dict[str, object]) -> None:
    inputs = make_inputs("causal", heads=heads[0], kv_heads=heads[1], length=333, head_dim=20, value_dim=13)
    made = by_cpp(inputs, **options)
    with use_kernels("aten"):
        wanted = make_operator("barnes_hut", **{**SMALL, **options}).forward(inputs)
    same = torch.isclose(made.out, wanted.out, rtol=1e-4, atol=1e-5).all(-1)
    # Of two nodes whose estimates are equal up to rounding, one may be opened here and the other there.
    assert same.float().mean() > 0.995
    torch.testing.assert_close(made.log_sum_exp[same], wanted.log_sum_exp[same])
    # Gradients, and none to the few queries that opened something else.
    operator, exact = make_operator("barnes_hut", **{**SMALL, **options}), cast(inputs, torch.float64)
    with use_kernels("aten"):
        wide = operator.forward(exact)
    for out in (made.out, wide.out.float()):
        same &= torch.isclose(out, wanted.out, rtol=1e-5, atol=1e-6).all(-1)
    assert same.float().mean() > 0.99
    seeds = torch.cos(wanted.out) * same[..., None], torch.sin(wanted.log_sum_exp) * same
    with use_kernels("cpp"):
        grads = operator.backward(inputs, (), made, *seeds)
    with use_kernels("aten"):
        formula = operator.backward(inputs, (), wanted, *seeds)
        oracle = operator.backward(exact, (), wide, *(x.double() for x in seeds))
    for name in ("query", "key", "value"):
        three = (getattr(each, name) for each in (grads, oracle, formula))
        assert_as_good_as(next(three), oracle=next(three), formula=next(three), name=name)


def test_the_past_does_not_move_when_the_future_changes() -> None:
    inputs = make_inputs("causal", length=300)
    before = by_cpp(inputs).out[:, :, :151].clone()
    for x in (inputs.query, inputs.key, inputs.value):
        x[:, :, 151:] = 10 * torch.randn_like(x[:, :, 151:])
    assert torch.equal(by_cpp(inputs).out[:, :, :151], before)


def test_opening_everything_is_exact_attention() -> None:
    inputs = make_inputs("causal", length=200)
    made = by_cpp(inputs, open=200, beam=200)
    with use_kernels("aten"):
        exact = make_operator("exact").forward(inputs)
    torch.testing.assert_close(made.out, exact.out)


def test_repeatable_on_any_number_of_threads() -> None:
    inputs = make_inputs("causal", length=400)

    def run() -> tuple[torch.Tensor, ...]:
        made = by_cpp(inputs)
        with use_kernels("cpp"):
            grads = make_operator("barnes_hut", **SMALL).backward(inputs, (), made, torch.cos(made.out), None)
        return made.out, grads.query, grads.key, grads.value

    alone = run()
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, run()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"select": "bound"}, "choice by mean keys"),
        ({"rest": "pool"}, "closed left out"),
        ({"tolerance": 0.1}, "fixed number"),
    ],
)
def test_what_it_does_not_serve_is_said(options: dict[str, object], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        by_cpp(make_inputs("causal", length=100), **options)


def test_what_is_not_finite_is_left_to_aten() -> None:
    inputs = make_inputs("causal", length=100)
    inputs.value[0, 0, 50] = float("inf")
    operator = make_operator("barnes_hut", **SMALL)
    with recorded_kernels() as ran:
        made = operator.forward(inputs).out
    assert ran == {"barnes_hut forward": "aten"}
    with use_kernels("aten"):
        assert torch.equal(made.isnan(), operator.forward(inputs).out.isnan())
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="infinity or NaN"):
        operator.forward(inputs)
