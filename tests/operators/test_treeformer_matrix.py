"""The shared matrix on tree attention, as far as it fits planes of single heads and straight-through gradients.

Finite differences do not see hard decisions, and heads have parameters of their own: those three checks of the
matrix are in ``test_treeformer.py`` in a form that fits.
"""

from __future__ import annotations

import pytest
from operators import test_matrix as matrix

CASES = {
    "tf": ("tf_attention", {"height": 3}),
    "tf-two-trees": (
        "tf_attention",
        {"height": 2, "n_trees": 2, "shared": False, "window": 5, "sinks": 2, "query_gradient": "sibling"},
    ),
    "tc": ("tc_attention", {"height": 3}),
    "tc-softmax": (
        "tc_attention",
        {"height": 2, "n_trees": 2, "shared": False, "level_weights": "softmax", "estimator": "sum"},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    for name, line in CASES.items():
        monkeypatch.setitem(matrix.OPERATORS, name, line)


@each_case
@matrix.each_mask
@matrix.each_dtype
def test_accuracy(case, mask, dtype):
    matrix.test_forward_is_as_accurate_as_its_type(case, mask, dtype)
    matrix.test_gradients_are_as_accurate_as_their_type(case, mask, dtype)


@each_case
@pytest.mark.parametrize(
    "variant", ["plain", "transposed", "requires_grad", "bfloat16", "padded", "segments", "alibi", "bucketed"]
)
def test_opcheck(case, variant):
    matrix.test_opcheck(case, variant)


@each_case
def test_one_compiled_graph_serves_every_length(case):
    matrix.test_one_compiled_graph_serves_every_length(case, "aot_eager")


@each_case
def test_types_strides_and_repetition(case):
    matrix.test_inputs_of_mixed_types(case)
    matrix.test_autocast_does_not_reach_into_the_kernels(case, "causal")
    for layout in ("transposed", "strided", "expanded"):
        for batch in (1, 2):
            matrix.test_any_strides(case, layout, batch)
    matrix.test_two_runs_are_bitwise_equal(case)


@each_case
@pytest.mark.parametrize("mask", ["causal", "causal & window(21)", "causal & key_padding"])
def test_the_future_does_not_move_the_past(case, mask):
    matrix.test_the_future_does_not_move_the_past(case, mask)


@each_case
@pytest.mark.parametrize("mask", ["key_padding", "causal & key_padding"])
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padding_has_no_influence(case, mask, garbage):
    matrix.test_padding_has_no_influence(case, mask, garbage)


@each_case
@pytest.mark.parametrize("mask", ["key_padding", "causal & key_padding"])
@matrix.each_dtype
def test_queries_without_keys(case, mask, dtype):
    matrix.test_queries_without_keys(case, mask, dtype)


@each_case
@pytest.mark.parametrize("mask", ["none", "causal", "causal & window(21)", "key_padding"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_reaches_every_query_that_sees_it(case, mask, side):
    for place in (0, 37):
        matrix.test_nan_reaches_every_query_that_sees_it(case, mask, side, place)


@each_case
def test_nan_in_a_query_stays_in_its_row(case):
    matrix.test_nan_in_a_query_stays_in_its_row(case)


@each_case
def test_token_and_shapes(case):
    matrix.test_the_token_reads_back(case)
    matrix.test_operators_say_whether_a_sample_moves_their_start(case)
    matrix.test_attention_of_disagreeing_shapes_is_refused(case)


@each_case
@pytest.mark.parametrize(
    ("change", "word"),
    [({"bias": "dense"}, "bias"), ({"softcap": 30.0}, "30"), ({"weights_used": True}, "weights")],
)
def test_refusals_say_why(case, change, word):
    matrix.test_refusals_say_why(case, change, word)
