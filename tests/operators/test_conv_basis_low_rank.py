"""The low-rank approximation of conv-basis attention, against its dense definition, mask by mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import (
    assert_as_good_as,
    cast,
    gradients,
    leaves,
    make_inputs,
    make_parameters,
    run,
)

from fastattn_compile.kernels.aten import conv_lowrank
from fastattn_compile.kernels.aten.conv_lowrank import (
    Ranges,
    feature_count,
    features,
    masked_sums,
    polynomial,
)
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

MASKS = [
    "none", "causal", "causal & window(21)", "right(13) & left(22)", "left(30) & right(-3)", "chunk(16)",
    "causal & chunk(16)", "causal & prefix(9)", "segments", "key_padding", "causal & key_padding",
]  # fmt: skip


def build(**options):
    return make_operator("conv_basis", approximation="low_rank", **options)


@pytest.mark.parametrize("degree", [0, 1, 2, 4])
def test_features_factor_the_polynomial(degree):
    left, right = torch.randn(2, 6, 3, dtype=torch.float64)
    both = features(left, degree) @ features(right, degree).T
    assert both.shape == (6, 6) and features(left, degree).shape[-1] == feature_count(3, degree)
    assert torch.allclose(both, polynomial(left @ right.T, degree), atol=1e-12)


def test_an_even_polynomial_is_positive_and_tends_to_the_exponential():
    x = torch.linspace(-6, 6, 301, dtype=torch.float64)
    assert all((polynomial(x, degree) > 0).all() for degree in (0, 2, 4, 6))
    assert torch.allclose(polynomial(x, 40), x.exp(), rtol=1e-12)
    assert not polynomial(x, -1).any()


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("n", [1, 5, 37, 70])
def test_masked_sums_and_their_transpose(block, n, monkeypatch):
    monkeypatch.setattr(conv_lowrank, "BLOCK", block)
    i = torch.arange(n)
    zero, end, chunk = 0 * i, 0 * i + n, i // 16 * 16
    masks = [
        Ranges(zero, end),
        Ranges(zero, i + 1),
        Ranges((i - 6).clamp(0), i + 1),
        Ranges((i - 9).clamp(0), (i + 5).clamp(max=n)),
        Ranges((i - 9).clamp(0), (i - 2).clamp(0)),
        Ranges((i + 2).clamp(max=n), end),
        Ranges(chunk, (chunk + 16).clamp(max=n)),
        Ranges(zero, (i + 1).clamp(min=min(9, n))),
    ]
    left, right = torch.randn(2, 2, n, 3, dtype=torch.float64)
    x = torch.randn(2, n, 2, dtype=torch.float64)
    for mask in masks:
        turned = mask.transposed()
        dense = (i >= mask.first[:, None]) & (i < mask.last[:, None])
        assert torch.equal(dense.T, (i >= turned.first[:, None]) & (i < turned.last[:, None]))
        weights = polynomial(left @ right.mT, 2) * dense
        assert torch.allclose(masked_sums(left, right, x, 2, mask), weights @ x, atol=1e-11)
        assert torch.allclose(masked_sums(right, left, x, 2, turned), weights.mT @ x, atol=1e-11)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("degree", [0, 2, 4])
def test_outputs_and_gradients(mask, dtype, degree):
    inputs = make_inputs(mask, length=75, head_dim=3, value_dim=4, dtype=dtype)
    operator = build(degree=degree, key_bias=True)
    assert operator.supports(inputs.spec())
    parameters = make_parameters(operator, inputs)
    seeds = torch.randn(2, 4, 75, 4), torch.randn(2, 4, 75)
    found = []
    for evaluate, kind in ((lambda i, p: run(operator, i, p), dtype), (operator.reference, torch.float64),
                           (operator.reference, dtype)):  # fmt: skip
        given, params, sources = leaves(cast(inputs, kind), tuple(p.to(kind) for p in parameters))
        output = evaluate(given, params)
        found.append([output.out, output.log_sum_exp, *gradients(output, sources, seeds)])
    for number, (got, oracle, formula) in enumerate(zip(*found)):
        if dtype == torch.float64:
            assert torch.allclose(got, oracle, atol=1e-10), number
        elif degree or number not in (2, 3):
            assert_as_good_as(got, oracle=oracle, formula=formula, name=str(number))
        else:
            assert not got.any(), "weights of degree 0 do not depend on scores"


def test_finite_differences():
    inputs = make_inputs("causal", batch=1, heads=2, kv_heads=1, length=19, head_dim=2, dtype=torch.float64)
    inputs, _, sources = leaves(inputs, ())

    def function(q, k, v):
        output = run(build(), dataclasses.replace(inputs, query=q, key=k, value=v))
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


@pytest.mark.parametrize("mask", ["causal", "causal & window(21)", "causal & key_padding"])
def test_the_future_does_not_move_the_past(mask):
    inputs = make_inputs(mask, length=150, head_dim=3)
    before = run(build(), inputs)
    for now in (1, 64, 100):
        tensors = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
        for x in tensors:
            x[:, :, now:] = 50 * torch.randn_like(x[:, :, now:])
        after = run(build(), dataclasses.replace(inputs, query=tensors[0], key=tensors[1], value=tensors[2]))
        assert torch.equal(before.out[:, :, :now], after.out[:, :, :now])


@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(21)"])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("place", [0, 40, 149])
def test_nan_reaches_every_query_that_sees_it_and_no_other(mask, side, place):
    inputs = make_inputs(mask, length=150, head_dim=3)
    getattr(inputs, side)[:, :, place, 0] = torch.nan
    got = run(build(), inputs)
    sees = inputs.visible(torch.arange(150))[0, 0, :, place].expand(2, 4, 150)
    assert torch.equal(got.out.isnan().any(-1), sees)
    assert torch.equal(got.log_sum_exp.isnan(), sees if side == "key" else torch.zeros_like(sees))


@pytest.mark.parametrize("mask", ["key_padding", "causal & key_padding"])
def test_padding_is_never_read(mask):
    inputs = make_inputs(mask, length=75, head_dim=3)
    padding = ~inputs.key_padding[:, None, :, None]
    dirty = dataclasses.replace(
        inputs,
        key=inputs.key.masked_fill(padding, torch.nan),
        value=inputs.value.masked_fill(padding, torch.nan),
    )
    assert torch.equal(run(build(), inputs).out, run(build(), dirty).out)


@pytest.mark.parametrize("degree", [2, 4])
def test_the_error_stays_under_the_reported_bound(degree):
    inputs = make_inputs("causal", length=80, head_dim=3, dtype=torch.float64)
    operator = build(degree=degree)
    bound = operator.error_bound(inputs)
    error = (run(operator, inputs).out - make_operator("exact").reference(inputs).out).abs().amax((-2, -1))
    assert bound.certified and (error > 0).all() and (error <= bound.output).all()


def test_a_higher_degree_is_closer():
    inputs = make_inputs("causal", length=80, head_dim=3, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=0.3 * inputs.query)
    exact = make_operator("exact").reference(inputs).out
    errors = [float((run(build(degree=d), inputs).out - exact).abs().max()) for d in (0, 2, 4)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (MaskStructure(left=5, right=0, prefix=4), "two ranges of keys"),
        (MaskStructure(right=0, segments=True), "without any other bound"),
        (MaskStructure(opaque="by a function"), "by a function"),
    ],
)
def test_masks_that_are_not_exact_are_refused(mask, text):
    support = build().supports(dataclasses.replace(make_inputs("causal").spec(), mask=mask))
    assert not support and text in support.reason


def test_too_many_features_and_questions_without_an_answer():
    spec = make_inputs("causal", length=64, head_dim=64).spec()
    assert "2145 features" in build().supports(spec).reason
    inputs = make_inputs("causal", head_dim=3)
    assert not build().exact_keys(inputs, torch.tensor([5])).any()
    assert build().cost(inputs.spec()).flops > 0
    with pytest.raises(ValueError, match="set by degree"):
        build().choose_terms(inputs, 0.1)
