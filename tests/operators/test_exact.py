"""Exact attention: cross attention, aligned caches, and both of its kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as, cast, gradients, leaves, make_inputs, relative_error, run
from torch.nn import functional as F

from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.aten import flash_cpu
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.exact import operator as exact_module
from fastattn_compile.operators.exact.cost import visible_pairs
from fastattn_compile.operators.mask import MaskStructure

MASKS = [
    "none",
    "causal",
    "causal & end_aligned",
    "causal & window(5) & end_aligned",
    "right(3) & left(2)",
    "right(-2)",
    "chunk(7) & end_aligned",
    "causal & chunk(7)",
    "left(3) & prefix(4)",
    "causal & key_padding & end_aligned",
    "segments",
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (20, 33), (33, 20), (1, 40)])
def test_cross_attention(mask, queries, keys):
    if "segments" in mask and queries != keys:
        mask += " & end_aligned"
        if queries > keys:
            pytest.skip("a query before the first key has no segment")
    inputs = make_inputs(mask, length=queries, key_len=keys, value_dim=5, dtype=torch.float64)
    seeds = (
        torch.randn(2, 4, queries, 5, dtype=torch.float64),
        torch.randn(2, 4, queries, dtype=torch.float64),
    )
    results = []
    for evaluate in (run, lambda op, tensors: op.reference(tensors)):
        tensors, _, sources = leaves(inputs, ())
        output = evaluate(ExactAttention(), tensors)
        results.append((output.out, output.log_sum_exp, *gradients(output, sources, seeds)))
    for got, wanted in zip(*results):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_kernels_agree_with_the_definition(dtype):
    inputs = make_inputs("causal", length=90, dtype=dtype)
    formula = ExactAttention().reference(inputs)
    oracle = ExactAttention().reference(cast(inputs, torch.float64))
    q, k, v, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    tiled = exact_aten.forward(q, k, v, scale, *exact_module.visibility(inputs))
    for out, log_sum_exp in (flash_cpu.forward(q, k, v, scale, True), tiled):
        assert_as_good_as(out, oracle=oracle.out, formula=formula.out)
        assert_as_good_as(log_sum_exp, oracle=oracle.log_sum_exp, formula=formula.log_sum_exp)


def test_it_is_what_torch_computes():
    inputs = make_inputs("causal", heads=6, kv_heads=2)
    wanted = F.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scale, enable_gqa=True
    )
    assert torch.allclose(run(ExactAttention(), inputs).out, wanted, atol=1e-6)


def test_rows_are_taken_a_few_at_a_time(monkeypatch):
    """However small the tiles, the numbers stay; and no tile holds all queries and all keys."""
    inputs = make_inputs("causal & window(40)", length=300)
    whole = run(ExactAttention(), inputs)
    monkeypatch.setattr(exact_aten, "SCORE_TILE", 1)
    largest = []
    original = exact_aten.normalise
    monkeypatch.setattr(
        exact_aten,
        "normalise",
        lambda scores, weights: largest.append(scores[0].numel()) or original(scores, weights),
    )
    tiled = run(ExactAttention(), inputs)
    assert torch.allclose(whole.out, tiled.out, atol=1e-6)
    assert max(largest) <= inputs.group * 32 * (32 + 40)


@pytest.mark.parametrize("unused", ["out", "log_sum_exp"])
def test_an_output_that_nothing_uses(unused):
    inputs = make_inputs("causal", dtype=torch.float64)
    grads = []
    for evaluate in (run, lambda op, tensors: op.reference(tensors)):
        tensors, _, sources = leaves(inputs, ())
        output = evaluate(ExactAttention(), tensors)
        used = output.log_sum_exp if unused == "out" else output.out
        found = torch.autograd.grad(used.square().sum(), sources, allow_unused=True)
        grads.append([torch.zeros_like(s) if g is None else g for g, s in zip(found, sources)])
    for got, wanted in zip(*grads):
        assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)])
def test_nothing_to_attend(shape):
    batch, heads, length = shape
    given = torch.randn(batch, heads, length, 4)
    output = run(
        ExactAttention(), dataclasses.replace(make_inputs("none"), query=given, key=given, value=given)
    )
    assert output.out.shape == given.shape and output.log_sum_exp.shape == given.shape[:3]


def test_no_keys_at_all():
    inputs = make_inputs("none", length=5, key_len=0)
    output = run(ExactAttention(), inputs)
    assert not output.out.any() and (output.log_sum_exp == -torch.inf).all()


def test_it_serves_every_understood_mask_and_cross_attention():
    for mask in MASKS:
        spec = dataclasses.replace(make_inputs("none").spec(), mask=MaskStructure.parse(mask), kind="cross")
        assert ExactAttention().supports(spec)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_visible_pairs_are_counted_in_closed_form(data):
    def draw(low, high):
        return data.draw(st.none() | st.integers(low, high))

    left, right, chunk, prefix = draw(-5, 20), draw(-20, 9), draw(1, 12), draw(1, 30)
    assume(left is None or right is None or left + right >= 0)
    mask = MaskStructure(left, right, data.draw(st.booleans()), chunk, prefix)
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    seen = mask.visible(torch.arange(queries)[:, None], torch.arange(keys), queries, keys)
    assert visible_pairs(mask, queries, keys) == int(seen.sum())
