"""What operators say of themselves, against what a dense computation says of them."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import make_inputs, make_parameters

from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.registry import make_operator, operator_names


@pytest.mark.parametrize("mask", ["causal", "none", "causal & key_padding", "causal & segments"])
def test_unopened_mass_of_a_bound_is_no_less_than_the_true_one(mask):
    inputs = make_inputs(mask, length=200, dtype=torch.float64)
    operator = make_operator("barnes_hut", block=8, leaf=2, fanout=2, open=4, beam=4, select="bound")
    told = operator.diagnostics(inputs)["unopened_mass"]
    rows = torch.arange(200)
    scores = inputs.scale * inputs.query @ inputs.key.repeat_interleave(2, 1).mT
    weights = scores.masked_fill(~inputs.visible(rows), -torch.inf).softmax(-1).nan_to_num(0)
    true = (weights * ~operator.exact_keys(inputs, rows)).sum(-1)
    if inputs.key_padding is not None:
        true = true[inputs.key_padding[:, None].expand_as(true)]
    assert 0 < float(true.mean()) <= told <= 1


def test_nothing_is_unopened_where_everything_is_near():
    inputs = make_inputs("causal")
    assert make_operator("barnes_hut").diagnostics(inputs) == {"unopened_mass": 0.0}


@pytest.mark.parametrize("options", [{"k": 6}, {"approximation": "low_rank"}])
def test_the_bound_of_conv_basis_holds_for_the_rows_it_looked_at(options):
    inputs = make_inputs("causal", length=100, dtype=torch.float64, head_dim=4)
    operator = make_operator("conv_basis", **options)
    told = operator.diagnostics(inputs)
    rows = torch.linspace(0, 99, 32).round().long()
    difference = (operator.forward(inputs).out - ExactAttention().forward(inputs).out)[:, :, rows].abs()
    largest = inputs.value.abs().amax((-2, -1)).repeat_interleave(2, 1)
    assert 0 < float((difference.amax((-2, -1)) / largest).mean()) <= told["error_bound"] <= 2
    assert told["error_bound"] <= 2 * math.tanh(told["score_error"] / 2) + 1e-12  # tanh is concave


def test_counts_of_clusters():
    inputs = make_inputs("key_padding", length=60)
    real = int(inputs.key_padding.sum())
    topk = make_operator("cast", clusters=4, cluster_size=10)
    told = topk.diagnostics(inputs, make_parameters(topk, inputs))
    assert told["clusters_per_token"] == pytest.approx(2 * 4 * 10 / real)
    assert 0 < told["in_no_cluster"] < 1 and told["imbalance"] == pytest.approx(1)
    single = make_operator("cast", clusters=4, clustering="sa_topk")
    told = single.diagnostics(inputs, make_parameters(single, inputs))
    assert told["in_no_cluster"] == 0 and told["clusters_per_token"] == 1


def test_one_cluster_that_takes_all_is_as_uneven_as_can_be():
    inputs = make_inputs("causal", length=40)
    operator = make_operator("cast", clusters=5, clustering="token_choice", cluster_size=8, select="key")
    surrogates = torch.zeros(5, 2, 8)
    surrogates[0] = 1
    inputs.key[:] = 1
    parameters = surrogates, torch.zeros(1, 4, 8), torch.zeros(1)
    told = operator.diagnostics(inputs, parameters)
    assert told == {"in_no_cluster": 0.0, "clusters_per_token": 1.0, "imbalance": pytest.approx(5)}


def test_trees_tell_their_routing_statistics():
    inputs = make_inputs("causal")
    operator = make_operator("tf_attention", height=3, capacity=0.5)
    parameters = make_parameters(operator, inputs)
    statistics, told = (
        operator.routing_statistics(inputs, parameters),
        operator.diagnostics(inputs, parameters),
    )
    assert told == {
        "imbalance": statistics.imbalance, "fallback": statistics.fallback, "dropped": statistics.dropped,
    }  # fmt: skip
    assert told["dropped"] > 0


@pytest.mark.parametrize("name", operator_names())
def test_what_is_told_is_finite(name):
    options = {
        "conv_basis": {"k": 9},
        "tf_attention": {"height": 2},
        "tc_attention": {"height": 2},
        "linformer": {"rank": 7},
    }
    operator = make_operator(name, **options.get(name, {}))
    inputs = make_inputs("none")
    told = operator.diagnostics(inputs, make_parameters(operator, inputs))
    assert all(math.isfinite(value) for value in told.values())
