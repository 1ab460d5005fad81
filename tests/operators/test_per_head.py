"""Heads of one site by different operators: each head is what its operator alone makes of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import make_inputs

from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL, MaskStructure
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.speed import predicted_seconds

WINDOW = {"operator": "window", "options": {"width": 9, "sinks": 2}}
TREE = {
    "operator": "barnes_hut",
    "options": {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 2, "beam": 8},
}
FMA = {"operator": "fma", "options": {"block": 8, "rank": 2}}


def alone(part, inputs):
    operator = make_operator(part["operator"], **part["options"])
    return attend(inputs.query, inputs.key, inputs.value, operator, scale=inputs.scale, mask=inputs.mask)


def test_each_head_is_what_its_operator_makes_of_it():
    inputs = make_inputs("causal", length=90)
    operator = make_operator("per_head", parts=[WINDOW, TREE], heads=[1, 0])
    out, log_sum_exp = attend(
        inputs.query, inputs.key, inputs.value, operator, scale=inputs.scale, mask=CAUSAL
    )
    group = inputs.group
    for part, heads in ((TREE, slice(0, group)), (WINDOW, slice(group, None))):
        wanted = alone(part, inputs)
        torch.testing.assert_close(out[:, heads], wanted[0][:, heads])
        torch.testing.assert_close(log_sum_exp[:, heads], wanted[1][:, heads])
    met = operator.exact_keys(inputs, torch.arange(90))
    assert met.shape == (inputs.query.shape[0], inputs.query.shape[1], 90, 90)
    assert met[:, :group].sum() != met[:, group:].sum()


def test_cost_and_predicted_time_are_sums_over_the_heads():
    spec = make_inputs("causal", length=256).spec()
    operator = make_operator("per_head", parts=[WINDOW, TREE], heads=[1, 0])
    half = dataclasses.replace(spec, heads=spec.heads // 2, kv_heads=1)
    parts = [make_operator(p["operator"], **p["options"]) for p in (WINDOW, TREE)]
    cost = operator.cost(spec)
    assert cost.flops == sum(p.cost(half).flops for p in parts)
    assert cost.keys_per_query == pytest.approx(sum(p.cost(half).keys_per_query for p in parts) / 2)
    assert predicted_seconds(operator, spec) == pytest.approx(sum(predicted_seconds(p, half) for p in parts))


def test_decoding_goes_on_where_the_prompt_ended():
    inputs = make_inputs("causal", length=60)
    operator = make_operator("per_head", parts=[TREE, FMA], heads=[0, 1])
    whole, _ = attend(inputs.query, inputs.key, inputs.value, operator, scale=inputs.scale, mask=CAUSAL)
    decoder = operator.decoder(inputs.scale)
    with pytest.raises(RuntimeError, match="prefill"):
        decoder.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])
    first = dataclasses.replace(
        inputs, query=inputs.query[:, :, :41], key=inputs.key[:, :, :41], value=inputs.value[:, :, :41]
    )
    got = [decoder.prefill(first).out]
    got += [
        decoder.step(*(x[:, :, t : t + 1] for x in (inputs.query, inputs.key, inputs.value))).out
        for t in range(41, 60)
    ]
    torch.testing.assert_close(torch.cat(got, 2), whole)
    held = [part.decoder(inputs.scale) for part in operator.operators]
    for one in held:
        one.prefill(inputs)
    assert decoder.stored_rows() == -(-sum(one.stored_rows() for one in held) // 2)


def test_parameters_of_a_longer_sequence_are_shared_out():
    learned = {"operator": "fma", "options": {"block": 8, "rank": 2, "basis": "depthwise"}}
    operator = make_operator("per_head", parts=[learned, WINDOW, FMA, learned], heads=[0, 3])
    short, long = make_inputs("causal", length=40), make_inputs("causal", length=200)
    few, many = (operator.parameter_shapes(x.spec()) for x in (short, long))
    assert len(few) < len(many) and {name.split("_")[0] for name in many} == {"part0", "part3"}
    parameters = tuple(operator.initial_parameters(long.spec(), long).values())
    sizes = [len(own) for _, _, own in operator.split(short, parameters)]
    assert sizes == [len(many) // 2, len(many) // 2]
    with pytest.raises(ValueError, match="learned parameters at"):
        operator.split(short, parameters[:1])


def test_a_part_without_a_decoding_form_is_named():
    inputs = make_inputs("causal", length=60)
    operator = make_operator("per_head", parts=[WINDOW, {"operator": "exact"}], heads=[0, 1])
    with pytest.raises(ValueError, match=r"exact.*no decoding form"):
        operator.decoder(inputs.scale).prefill(inputs)


def test_refusals_name_the_part_and_its_heads():
    spec = make_inputs("causal").spec()
    linformer = {"operator": "linformer", "options": {"rank": 4}}
    assert make_operator("per_head", parts=[WINDOW, linformer], heads=[0, 0]).supports(spec)
    refused = make_operator("per_head", parts=[WINDOW, linformer], heads=[0, 1]).supports(spec)
    assert "linformer of key heads 1: the mask (causal)" in refused.reason
    assert (
        "names 3 key heads, the site has 2"
        in make_operator("per_head", heads=[0, 0, 0]).supports(spec).reason
    )
    cross = dataclasses.replace(spec, mask=MaskStructure(), kind="cross", query_len=9)
    assert "window of key heads 0, 1" in make_operator("per_head", parts=[WINDOW]).supports(cross).reason


def test_its_name_says_who_serves_what():
    assert repr(make_operator("per_head", parts=[WINDOW, FMA], heads=[1, 0, 1])).startswith(
        "per_head(key heads 1: window(width=9, sinks=2); key heads 0, 2: fma(block=8, rank=2"
    )
    assert repr(make_operator("per_head", parts=[WINDOW])) == "per_head(all heads: window(width=9, sinks=2))"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": []}, "at least one operator"),
        ({"parts": [{"operator": "per_head"}]}, "per_head themselves"),
        ({"parts": [{"name": "window"}]}, "'operator': name"),
        ({"parts": [WINDOW], "heads": [0, 1]}, "numbers of parts, 0 to 0"),
        ({"parts": [WINDOW], "heads": [True]}, "numbers of parts"),
        ({"parts": [{"operator": "windows"}]}, "unknown operator 'windows'"),
        ({"parts": [{"operator": "window", "options": {"widths": 3}}]}, "unknown option widths"),
    ],
)
def test_bad_configurations(options, words):
    with pytest.raises(ValueError, match=words):
        make_operator("per_head", **options)
