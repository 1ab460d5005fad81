"""Decoding by conv-basis attention, and anchors at a fixed distance, which it needs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import gradients, leaves, make_inputs, relative_error, run

from fastattn_compile.kernels.aten.conv_anchors import strided
from fastattn_compile.operators.registry import make_operator


def part(inputs, span):
    padding = None if inputs.key_padding is None else inputs.key_padding[:, span]
    q, k, v = (x[:, :, span] for x in (inputs.query, inputs.key, inputs.value))
    return dataclasses.replace(inputs, query=q, key=k, value=v, key_padding=padding)


@pytest.mark.parametrize("prefilled", [1, 3, 20, 74])
@pytest.mark.parametrize(
    "mask",
    [
        "causal",
        "causal & window(21)",
        "causal & key_padding",
        "causal + alibi",
        "causal & key_padding + bucketed",
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"k": 12, "stride": 7},
        {"k": 12, "stride": 7, "anchors": "strided"},
        {"k": 5, "stride": 4, "sinks": 9, "offset_bias": "alibi"},
        {"k": 9, "stride": 8, "offset_bias": "learned"},
    ],
)
def test_decoding_equals_one_pass(options, mask, prefilled):
    inputs = make_inputs(mask, dtype=torch.float64)
    if inputs.key_padding is not None:
        padding = inputs.key_padding.clone()
        padding[:, prefilled:] = True
        inputs = dataclasses.replace(inputs, key_padding=padding)
    operator = make_operator("conv_basis", **options)
    shape = operator.parameter_shapes(inputs.spec())
    parameters = tuple(torch.randn(s, dtype=torch.float64) for s in shape.values())
    wanted = operator.reference(inputs, parameters)
    decoder = operator.decoder(inputs.scale, parameters)
    outputs = [decoder.prefill(part(inputs, slice(0, prefilled)))]
    for now in range(prefilled, 75):
        one = part(inputs, slice(now, now + 1))
        outputs.append(decoder.step(one.query, one.key, one.value))
    assert decoder.stored_rows() == 75 + options["k"]
    assert relative_error(torch.cat([x.out for x in outputs], 2), wanted.out) < 1e-12
    assert relative_error(torch.cat([x.log_sum_exp for x in outputs], 2), wanted.log_sum_exp) < 1e-12


def test_types_of_a_step():
    inputs = make_inputs("causal", dtype=torch.bfloat16, length=30)
    operator = make_operator("conv_basis", k=6, stride=5)
    decoder = operator.decoder(inputs.scale)
    decoder.prefill(part(inputs, slice(0, 29)))
    last = part(inputs, slice(29, 30))
    got, wanted = decoder.step(last.query, last.key, last.value), run(operator, inputs)
    assert got.out.dtype == torch.bfloat16 and got.log_sum_exp.dtype == torch.float32
    assert relative_error(got.out, wanted.out[:, :, 29:]) <= torch.finfo(torch.bfloat16).eps


def test_decoding_refuses_what_it_cannot_do():
    for options in ({}, {"stride": 4, "key_bias": True}, {"approximation": "low_rank"}):
        assert make_operator("conv_basis", **options).decoder(1.0) is None
    decoder = make_operator("conv_basis", k=4, stride=4, offset_bias="learned").decoder(
        1.0, (torch.zeros(4, 10),)
    )
    inputs = make_inputs("causal", length=10)
    with pytest.raises(RuntimeError, match="prefill"):
        decoder.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])
    with pytest.raises(ValueError, match="causal mask"):
        decoder.prefill(make_inputs("none", length=10))
    decoder.prefill(inputs)
    with pytest.raises(ValueError, match="attended tokens already"):
        decoder.prefill(inputs)
    short = make_operator("conv_basis", k=4, stride=4).decoder(1.0)
    short.prefill(make_inputs("causal + bucketed", length=10))
    with pytest.raises(ValueError, match="distances of 10 tokens"):
        short.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])
    with pytest.raises(ValueError, match="11 or more"):
        decoder.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])


def test_bounds_at_a_fixed_distance_do_not_move_with_the_end():
    first = torch.tensor([0, 3])
    for stop in (20, 41):
        bounds = strided(first, torch.full((2,), stop), 6, 2, 9)[:, 0, 0].tolist()
        assert bounds[0] == [min(x, stop) for x in (0, 1, 2, 11, 20, 29, stop)]
        assert bounds[1] == [min(x, stop) for x in (3, 4, 5, 14, 23, 32, stop)]


@pytest.mark.parametrize("form", ["fft", "buckets", "gather"])
@pytest.mark.parametrize("mask", ["causal", "none", "key_padding", "causal & window(30)"])
def test_a_stride_equals_the_definition(form, mask):
    inputs = make_inputs(mask, dtype=torch.float64)
    operator = make_operator("conv_basis", k=7, sinks=2, stride=9, form=form)
    given, _, sources = leaves(inputs, ())
    got, wanted = run(operator, given), operator.reference(given)
    assert relative_error(got.out, wanted.out) < 1e-11
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=torch.float64)
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert float((g - w).abs().max()) < 1e-10 * max(1.0, float(w.abs().max()))


def test_with_a_stride_a_prefix_gives_the_prefix_of_the_whole():
    inputs = make_inputs("causal", dtype=torch.float64)
    operator = make_operator("conv_basis", k=7, stride=9)
    whole, prefix = run(operator, inputs), run(operator, part(inputs, slice(0, 40)))
    assert relative_error(prefix.out, whole.out[:, :, :40]) < 1e-12


def test_bad_strides():
    with pytest.raises(ValueError, match="stride must be a positive number"):
        make_operator("conv_basis", stride=-1)
    with pytest.raises(ValueError, match="finds places of its own"):
        make_operator("conv_basis", stride=4, anchors="jumps")
