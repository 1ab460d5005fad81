"""Tree attention against its specification: golden numbers, identities, gradients, drawn configurations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import gradients, leaves, make_inputs, make_parameters, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn_compile.kernels.aten.treeformer_route import (
    Estimator,
    dense_backward,
    follow,
    path_gradients,
    score_gradients,
)
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator

W = [(1, 0), (0, 1), (0, 1)]
Q = [(1, 1), (-1, 1), (1, -1), (-1, -1), (2, 1), (-2, 1), (1, -2), (-1, 2)]
K = [(1, 2), (-1, 1), (2, -1), (1, 1), (-2, 1), (1, -1), (2, 2), (-1, 3)]
V = [(1, 0), (0, 1), (2, -1), (-1, 3), (1, 1), (0, -2), (3, 0), (-1, 1)]
TF = [
    (1.8718922003, 0.4200877351), (-0.2919799355, 1), (1.3395230987, -1.3302384507), (0.5456654869, 1),
    (2.2914647354, 0.2638462163), (0, 1), (1.3395230987, -1.3302384507), (-0.7465160553, 1),
]  # fmt: skip
TF_CAUSAL = [
    (1, 0), (0, 1), (2, -1), (0, 1), (0.3395230987, 0.9907153520), (0.8044296825, 1),
    (1.3395230987, -1.3302384507), (-0.7465160553, 1),
]  # fmt: skip
TC = [
    (0.90625, 0.59375), (0.15625, 0.84375), (0.90625, -0.65625), (0.15625, 0.34375),
    (0.90625, 0.59375), (0.15625, 0.84375), (0.90625, -0.65625), (0.15625, 0.84375),
]  # fmt: skip
TC_CAUSAL = [
    (1, 0), (0.125, 0.875), (1.625, -0.625), (0.125, 0.4375), (0.3166666667, 1.1166666667), (0.5, 0.8333333333),
    (0.9642857143, -0.6785714286), (0.15625, 0.84375),
]  # fmt: skip
TC_GRADIENTS = {
    "query": [
        (0.1474589499, 0), (-0.0888108029, 0.1379637862), (0.1474589499, 0), (-0.1569541137, 0.1379637862),
        (0.0787451891, 0), (-0.0474262394, 0.1158835043), (0.1474589499, 0), (-0.0667305210, 0.0736746358),
    ],
    "key": [
        (0.1521249192, -0.0141185620), (-0.1136725465, 0.0088128488), (0.1670221701, -0.0522992530),
        (-0.5021545557, 0.1007887063), (0, 0), (0.1471120679, -0.0553598324), (0.1974018886, -0.0370837855),
        (-0.2128275597, 0.0040499584),
    ],
    "value": [
        (0.6583333333, 0.125), (0.125, 0.9583333333), (0.825, 0.125), (0.6583333333, 0.125),
        (0.125, 0.9583333333), (0.825, 0.125), (0.6583333333, 0.125), (0.125, 0.9583333333),
    ],
    "planes": [(1.8596457994, -1.1983070852), (-0.4552343719, 0.2782208521), (-0.2864534173, 0.1120177443)],
    "offsets": [-0.0037932541, 0.1984490828, 0.2218267102],
    "weights": [4, 8, 7],
}  # fmt: skip
ROUNDED = 6e-11  # the specification prints ten decimals


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def golden(mask, operator, **options):
    inputs = AttentionInputs(*(tensor(x)[None, None] for x in (Q, K, V)), 2**-0.5, mask)
    parameters = (tensor(W)[None, None], torch.zeros(1, 1, 3, dtype=torch.float64))
    if operator == "tc_attention":
        parameters = (*parameters, tensor([0.25, 0.25, 0.5])[None, None])
    return make_operator(operator, height=2, **options), inputs, parameters


@pytest.mark.parametrize("way", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("name", "mask", "wanted"),
    [
        ("tf_attention", NO_MASK, TF),
        ("tf_attention", CAUSAL, TF_CAUSAL),
        ("tc_attention", NO_MASK, TC),
        ("tc_attention", CAUSAL, TC_CAUSAL),
    ],
)
def test_golden_outputs(way, name, mask, wanted):
    operator, inputs, parameters = golden(mask, name)
    evaluate = operator.reference if way == "reference" else operator.forward
    assert (evaluate(inputs, parameters).out[0, 0] - tensor(wanted)).abs().max() < ROUNDED


def test_golden_leaves():
    """The root decides by the first channel, both nodes below by the second; no key is in leaf 0."""
    planes, offsets = tensor(W)[None, None], torch.zeros(1, 1, 3, dtype=torch.float64)
    query, key = (follow(tensor(x)[None, None], planes, offsets)[0].flatten().tolist() for x in (Q, K))
    assert query == [3, 1, 2, 0, 3, 1, 2, 1]
    assert key == [3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("way", ["reference", "kernel"])
def test_golden_gradients_of_coarse_attention(way):
    operator, inputs, parameters = golden(NO_MASK, "tc_attention")
    given_inputs, given_parameters, sources = leaves(inputs, parameters)
    evaluate = operator.reference if way == "reference" else lambda i, p: run(operator, i, p)
    out = evaluate(given_inputs, given_parameters).out
    seed = tensor([(1, 0), (0, 1)]).repeat(4, 1)[None, None]
    for name, got in zip(TC_GRADIENTS, torch.autograd.grad((out * seed).sum(), sources)):
        assert (got.squeeze() - tensor(TC_GRADIENTS[name])).abs().max() < ROUNDED, name


@pytest.mark.parametrize("height", [1, 3, 8])
def test_routing_follows_the_rule_node_by_node_and_ties_go_to_the_first_child(height):
    planes = 2**height - 1
    x = torch.randint(-2, 3, (2, 2, 30, 3)).double()
    weight, offset = torch.randint(-1, 2, (2, 2, planes, 3)).double(), torch.zeros(2, 2, planes).double()
    leaf, scores = follow(x, weight, offset)
    assert (scores == 0).any()
    for b, h, t, n in torch.cartesian_prod(*(torch.arange(s) for s in leaf.shape))[::7].tolist():
        node = 0
        for level in range(height):
            z = weight[h, t, 2**level - 1 + node] @ x[b, h, n]
            assert z == scores[b, h, t, n, level]
            node = 2 * node + int(z > 0)
        assert node == leaf[b, h, t, n]


@pytest.mark.parametrize("kind", ["soft", "sum"])
@pytest.mark.parametrize("surrogate", ["clip", "sigmoid"])
def test_the_sparse_backward_of_routing_is_the_dense_one_on_paths(kind, surrogate):
    estimator, height = Estimator(kind, surrogate, 1.7), 3
    x, weight, offset = (
        torch.randn(1, 1, 40, 4).double(),
        torch.randn(1, 1, 7, 4).double(),
        torch.randn(1, 1, 7).double(),
    )
    leaf, scores = follow(x, weight, offset)
    grad = torch.randn(1, 1, 1, 40, height + 1).double()
    dense = []
    for level in range(height + 1):
        node = leaf[0, 0, 0] >> (height - level)
        dense.append(
            torch.zeros(40, 2**level).double().scatter(1, node[:, None], grad[0, 0, 0, :, level, None])
        )
    got = path_gradients(x, weight, leaf, score_gradients(scores, estimator, grad))
    wanted = dense_backward(x[0, 0], weight[0, 0], offset[0, 0], estimator, dense)
    for g, w in zip(got, wanted):
        assert relative_error(g.squeeze(), w) < 1e-13


@pytest.mark.parametrize(
    "mask",
    [
        "none", "causal", "causal & window(21)", "causal & key_padding", "causal & segments", "none + alibi",
        "causal & key_padding + bucketed", "causal & segments + bucketed", "segments + alibi",
    ],
)  # fmt: skip
def test_leaf_attention_without_decisions_is_softmax_attention(mask):
    inputs = make_inputs(mask, dtype=torch.float64)
    wanted = make_operator("exact").reference(inputs)
    flat = make_operator("tf_attention", height=0)
    assert not flat.learned and flat.parameter_shapes(inputs.spec()) == {}
    # Planes that send every vector to leaf 0.
    deep = make_operator("tf_attention", height=2)
    planes = torch.zeros(2, 1, 3, 8).double(), -torch.ones(2, 1, 3).double()
    for operator, parameters in ((flat, ()), (deep, planes)):
        got = run(operator, inputs, parameters)
        assert relative_error(got.out, wanted.out) < 1e-13
        assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-13


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_coarse_attention_without_decisions_is_the_mean(mask):
    inputs = make_inputs(mask, dtype=torch.float64)
    got = run(make_operator("tc_attention", height=0), inputs, (torch.ones(4, 1, 1).double(),))
    value = inputs.value.repeat_interleave(2, 1)
    count = torch.arange(1, 76).double()[:, None]
    wanted = value.cumsum(2) / count if mask == "causal" else value.mean(2, keepdim=True).expand_as(value)
    assert relative_error(got.out, wanted) < 1e-13


def test_the_softmax_over_a_leaf_gives_its_own_queries_planes_nothing_and_the_remedies_do():
    inputs = make_inputs("causal", dtype=torch.float64)
    found = {}
    for remedy in ("none", "gate", "sibling"):
        operator = make_operator("tf_attention", height=3, shared=False, query_gradient=remedy)
        parameters = make_parameters(operator, inputs)
        given_inputs, given_parameters, _ = leaves(inputs, parameters)
        out = run(operator, given_inputs, given_parameters).out
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        names = operator.parameter_shapes(inputs.spec())
        found[remedy] = dict(zip(names, torch.autograd.grad((out * seed).sum(), given_parameters)))
    assert found["none"]["query_planes"].abs().max() < 1e-13
    assert found["none"]["key_planes"].abs().max() > 1e-2
    assert found["gate"]["query_planes"].abs().max() > 1e-2
    deepest = found["sibling"]["query_planes"]
    assert deepest[:, :, 3:].abs().max() > 1e-2
    assert deepest[:, :, :3].abs().max() < 1e-13


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {"query_gradient": "none"},
        {"n_trees": 2, "window": 3, "sinks": 2},
        {"n_trees": 2, "combine": "mean", "fallback": "self+window", "fallback_window": 3},
        {"query_gradient": "sibling"},
        {"capacity": 1.0, "fallback": "zero"},
    ],
)
def test_finite_differences_where_routing_is_flat(mask, options):
    """A flat sigmoid passes nothing through decisions: what is left is the gradient of the retained pairs."""
    inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, length=35, head_dim=3, dtype=torch.float64)
    operator = make_operator("tf_attention", height=2, beta=1e-12, **options)
    parameters = make_parameters(operator, inputs)
    inputs, _, sources = leaves(inputs, ())

    def function(q, k, v):
        output = run(operator, dataclasses.replace(inputs, query=q, key=k, value=v), parameters)
        log_sum_exp = output.log_sum_exp
        if options.get("combine") == "mean":
            return output.out
        return output.out, log_sum_exp.masked_fill(log_sum_exp.detach() == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


@pytest.mark.parametrize("mask", ["none + bucketed", "causal & key_padding + bucketed"])
@pytest.mark.parametrize(
    "options", [{}, {"n_trees": 2, "window": 3, "sinks": 2}, {"n_trees": 2, "combine": "mean"}]
)
def test_finite_differences_of_a_bias(mask, options):
    inputs = make_inputs(mask, batch=2, heads=2, kv_heads=1, length=21, head_dim=3, dtype=torch.float64)
    operator = make_operator("tf_attention", height=2, **options)
    parameters = make_parameters(operator, inputs)

    def function(bias):
        return run(operator, dataclasses.replace(inputs, bias=bias), parameters).out

    assert torch.autograd.gradcheck(function, inputs.bias.requires_grad_(), fast_mode=True)


def test_finite_differences_of_the_last_decision_of_queries():
    inputs = make_inputs("causal", batch=1, heads=2, kv_heads=1, length=35, head_dim=3, dtype=torch.float64)
    operator = make_operator("tf_attention", height=2, shared=False, query_gradient="sibling")
    planes, offsets, query_planes, query_offsets = make_parameters(operator, inputs)

    def function(weight, offset):
        both = weight, offset
        joined = [torch.cat([old[:, :, :1], new], 2) for old, new in zip((query_planes, query_offsets), both)]
        return run(operator, inputs, (planes, offsets, *joined)).out

    deepest = [x[:, :, 1:].clone().requires_grad_() for x in (query_planes, query_offsets)]
    assert torch.autograd.gradcheck(function, deepest, fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "causal", "causal & key_padding"])
@pytest.mark.parametrize("options", [{}, {"n_trees": 2, "include_root": False}, {"level_weights": "softmax"}])
def test_finite_differences_of_values_and_level_weights(mask, options):
    inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, length=35, head_dim=3, dtype=torch.float64)
    operator = make_operator("tc_attention", height=2, **options)
    *planes, weights = make_parameters(operator, inputs)

    def function(value, learned):
        return run(operator, dataclasses.replace(inputs, value=value), (*planes, learned)).out

    sources = inputs.value.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


MASKS = [
    "none", "causal", "causal & window(21)", "right(13) & left(22)", "key_padding", "causal & key_padding",
    "causal & window(30) & key_padding", "chunk(16)", "causal & prefix(9)", "causal & segments", "segments",
    "causal + alibi", "none + bucketed", "causal & key_padding + bucketed", "causal & segments + bucketed",
    "segments & key_padding + alibi",
]  # fmt: skip
TREES = {
    "height": st.integers(0, 4), "n_trees": st.integers(1, 3), "shared": st.booleans(),
    "estimator": st.sampled_from(["soft", "sum"]), "surrogate": st.sampled_from(["clip", "sigmoid"]),
    "beta": st.sampled_from([1.0, 2.0]), "rotary_base": st.sampled_from([0.0, 100.0]),
    "init": st.sampled_from(["pca", "kmeans", "random"]),
}  # fmt: skip
OPTIONS = {
    "tf_attention": {
        **TREES, "fallback": st.sampled_from(["ancestor", "zero", "self+window"]), "fallback_window": st.just(5),
        "window": st.sampled_from([0, 1, 4]), "sinks": st.sampled_from([0, 3]),
        "combine": st.sampled_from(["union", "mean"]), "capacity": st.sampled_from([0.0, 0.5, 1.0]),
        "query_gradient": st.sampled_from(["gate", "sibling", "none"]),
        "overflow": st.sampled_from(["oldest", "margin"]),
    },
    "tc_attention": {
        **TREES, "include_root": st.booleans(), "level_weights": st.sampled_from(["free", "softmax"]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_configuration_equals_the_definition(name, data):
    group, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    inputs = make_inputs(
        data.draw(st.sampled_from(MASKS)), batch=data.draw(st.integers(1, 2)), heads=group * kv_heads,
        kv_heads=kv_heads, length=data.draw(st.integers(2, 150 if name == "tf_attention" else 70)),
        head_dim=data.draw(st.sampled_from([2, 4, 5])), value_dim=data.draw(st.integers(1, 5)),
        dtype=torch.float64, seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    try:
        operator = make_operator(name, **{key: data.draw(values) for key, values in OPTIONS[name].items()})
    except ValueError:
        return
    if not operator.supports(inputs.spec()):
        return
    compare(operator, inputs)


def compare(operator, inputs):
    given_inputs, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    seeds = torch.randn(shape, dtype=torch.float64), torch.randn(shape[:3], dtype=torch.float64)
    got, wanted = run(operator, given_inputs, parameters), operator.reference(given_inputs, parameters)
    assert float((got.out - wanted.out).detach().abs().max()) < 1e-11
    finite = ~wanted.log_sum_exp.isnan()
    assert torch.equal(finite, ~got.log_sum_exp.isnan())
    assert relative_error(got.log_sum_exp[finite], wanted.log_sum_exp[finite]) < 1e-12
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert not w.numel() or float((g - w).abs().max()) < 1e-11 * max(1.0, float(w.abs().max()))


@pytest.mark.parametrize(
    ("name", "mask", "key_len"),
    [
        ("tf_attention", "none", 90),
        ("tf_attention", "key_padding", 40),
        ("tf_attention", "causal & end_aligned", 90),
        ("tf_attention", "causal & end_aligned + bucketed", 90),
        ("tc_attention", "none", 90),
        ("tc_attention", "key_padding", 40),
    ],
)
def test_cross_attention_and_queries_that_continue_keys(name, mask, key_len):
    inputs = make_inputs(mask, length=61, key_len=key_len, dtype=torch.float64)
    compare(make_operator(name, height=3, shared=False), inputs)


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
def test_heads_are_independent_and_bring_their_parameters(name):
    inputs = make_inputs("causal", heads=3, kv_heads=3)
    operator = make_operator(name, height=3, shared=False)
    parameters = make_parameters(operator, inputs)
    heads = torch.tensor([1, 2, 0])
    moved = dataclasses.replace(
        inputs, query=inputs.query[:, heads], key=inputs.key[:, heads], value=inputs.value[:, heads]
    )
    got = run(operator, moved, tuple(p[heads] for p in parameters)).out
    assert torch.allclose(got, run(operator, inputs, parameters).out[:, heads], atol=1e-6)


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
@pytest.mark.parametrize("shared", [True, False])
def test_query_groups_equal_repeated_keys(name, shared):
    inputs = make_inputs("causal", heads=6, kv_heads=2)
    operator = make_operator(name, height=3, shared=shared)
    parameters = make_parameters(operator, inputs)
    repeated = dataclasses.replace(
        inputs, key=inputs.key.repeat_interleave(3, 1), value=inputs.value.repeat_interleave(3, 1)
    )
    spread = (*(p.repeat_interleave(3, 0) for p in parameters[:2]), *parameters[2:])
    assert torch.allclose(
        run(operator, inputs, parameters).out, run(operator, repeated, spread).out, atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"n_trees": 2, "window": 3, "sinks": 2}, {"capacity": 0.5}])
def test_exact_keys_are_the_keys_that_matter(options):
    inputs = make_inputs("causal & key_padding", dtype=torch.float64)
    operator = make_operator("tf_attention", height=3, **options)
    parameters = make_parameters(operator, inputs)
    rows = torch.arange(75)
    met = operator.exact_keys(inputs, rows, parameters).expand(2, 4, 75, 75)
    known = operator.exact_keys(inputs, rows)
    assert not (met & ~inputs.visible(rows)).any() and not (known & ~met).any()
    assert 0.02 < met.double().mean() < 0.3
    before = operator.forward(inputs, parameters).out
    for place in (3, 40):
        value = inputs.value.clone()
        value[:, :, place] += 1
        after = operator.forward(dataclasses.replace(inputs, value=value), parameters).out
        assert torch.equal((after != before).any(-1), met[..., place])


def test_coarse_attention_meets_no_key_one_by_one():
    operator, inputs, parameters = golden(CAUSAL, "tc_attention")
    assert not operator.exact_keys(inputs, torch.arange(8), parameters).any()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_no_tensor_is_as_large_as_the_scores(name, mask):
    inputs = make_inputs(mask, batch=1, heads=1, kv_heads=1, length=2048, head_dim=8)
    operator = make_operator(name, height=6)
    parameters = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
    with Largest() as largest:
        output = operator.forward(inputs, parameters)
        operator.backward(inputs, parameters, output, torch.ones_like(output.out), None)
    assert largest.elements <= 2048 * 2048 / 8


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
def test_straight_through_gradients_train_the_planes(name):
    """The gradient of a regression on a teacher that is a tree itself brings the planes nearer to it."""
    inputs = make_inputs("none", batch=2, heads=1, kv_heads=1, length=96, head_dim=4)
    operator = make_operator(name, height=1, beta=2.0)
    parameters = list(operator.initial_parameters(inputs.spec(), inputs).values())
    teacher = operator.forward(inputs, tuple(parameters)).out
    learned = [p.clone() for p in parameters]
    learned[0] += 0.6 * torch.randn(learned[0].shape, generator=torch.Generator().manual_seed(5))
    learned = [p.requires_grad_() for p in learned]
    optimizer = torch.optim.Adam(learned, lr=0.03)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (run(operator, inputs, tuple(learned)).out - teacher).square().mean()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert min(errors[-10:]) < 0.6 * errors[0]
