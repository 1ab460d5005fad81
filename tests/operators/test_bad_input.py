"""What no operator takes: a clear error at construction, or a refusal of the site that says what to do; and the
degenerate inputs that all of them take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import cast, gradients, leaves, make_inputs, make_parameters, relative_error, run

from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL, MaskStructure
from fastattn_compile.operators.registry import make_operator, operator_names

SMALL = {
    "exact": {},
    "fma": {"block": 8, "rank": 2, "sinks": 3},
    "conv_basis": {"k": 9, "sinks": 3},
    "cast": {"clusters": 5},
    "linformer": {"rank": 7},
    "window": {"width": 12, "sinks": 3},
    "barnes_hut": {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 5, "beam": 4},
    "tf_attention": {"height": 3},
    "tc_attention": {"height": 3},
    "per_head": {"parts": [{"operator": "window", "options": {"width": 12}}, {"operator": "exact"}]},
}
each_operator = pytest.mark.parametrize("name", operator_names())


def fields_of(name):
    config = make_operator(name).config
    return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]


def test_no_operator_is_left_out():
    assert list(SMALL) == sorted(SMALL, key=operator_names().index) and set(SMALL) == set(operator_names())


@each_operator
def test_every_option_refuses_another_type_and_names_itself(name):
    wrong = {bool: (1, "yes", None), int: ("3", 2.5, None, True), float: ("x", None, True), str: (3, None)}
    for field, default in fields_of(name):
        for value in wrong.get(type(default), ("x", 2.5, True)):
            with pytest.raises(TypeError, match=rf"\b{field}\b"):
                make_operator(name, **{field: value})


@each_operator
def test_every_option_refuses_what_is_out_of_range_and_says_what_it_got(name):
    for field, default in fields_of(name):
        if field == "seed" or isinstance(default, bool):
            continue
        bad = {
            int: (-1,),
            float: (-1.0, float("nan"), float("inf")),
            str: ("nonsense", ""),
            tuple: (("nonsense",),),
        }
        for value in bad.get(type(default), (-1,)):
            with pytest.raises(ValueError, match=rf"\b{field}\b") as error:
                make_operator(name, **{field: value})
            assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fma", {"block": 64, "rank": 5}, "ranks that fit: 1, 2, 4, 8"),
        ("fma", {"block": 4, "rank": 8}, r"between 1 and block \(4\), got 8"),
        ("fma", {"block": 8, "sinks": 9}, r"between 0 and block \(8\), got 9"),
        ("fma", {"queries": "pooled"}, "has no sinks, got sinks=4"),
        ("fma", {"queries": "pooled", "sinks": 0, "basis": "dense"}, "basis 'mean' .* got 'dense'"),
        ("barnes_hut", {"block": 8, "leaf": 3}, "values that fit: 1, 2, 4, 8"),
        ("barnes_hut", {"block": 8, "group": 16}, "values that fit: 1, 2, 4, 8"),
        ("barnes_hut", {"fanout": 1}, "fanout must be 2 or more"),
        ("conv_basis", {"k": 0}, "positive number of terms, got 0"),
        ("conv_basis", {"anchors": "recover", "eps": 1.0}, "raise delta or lower probe"),
        ("cast", {"clustering": "token_choice"}, "needs a cluster_size"),
        ("linformer", {"rank": 64, "max_length": 32}, r"at least rank \(64\)"),
        ("tf_attention", {"height": 17}, "at most log2 of the number of keys"),
        ("tc_attention", {"height": 17}, "at most log2 of the number of keys"),
        ("window", {"version": 7}, "version of WindowConfig must be 1, got 7"),
        ("exact", {"block": 64}, "unknown option block of ExactConfig; valid options: version"),
        ("performer", {}, "unknown operator 'performer'; operators: exact, fma"),
    ],
)
def test_options_that_contradict_each_other(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_operator(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "mask", "length", "words"),
    [
        ("conv_basis", {"k": 64}, "causal", 20, "k=64 terms for 20 tokens"),
        ("linformer", {"rank": 64}, "none", 20, "more rows than the sequence has tokens"),
        ("linformer", {}, "causal", 200, "future would leak"),
        ("cast", {"clusters": 4}, "causal", 40, "set clustering='token_choice'"),
        ("cast", {"clusters": 4, "clustering": "sa_topk"}, "causal", 40, "set clustering='token_choice'"),
        ("cast", {"clustering": "token_choice", "cluster_size": 8}, "none", 40, "use topk or sa_topk"),
        ("cast", {"clusters": 4, "cluster_size": 9, "clustering": "sa_topk"}, "none", 40, "raise clusters"),
        ("cast", {"clusters": 4, "cluster_size": 50}, "none", 40, "larger than the sequence of 40"),
        ("tf_attention", {"height": 6}, "none", 63, "64 leaves for 63 keys"),
        ("tc_attention", {"height": 6}, "causal", 63, "64 leaves for 63 keys"),
        ("tf_attention", {"capacity": 1.0, "overflow": "margin"}, "causal", 100, "use 'oldest'"),
        ("fma", {}, "chunk(16)", 100, "chunked"),
        ("fma", {"queries": "pooled", "sinks": 0}, "causal", 600, "leaks the future; use queries 'all'"),
        ("fma", {"queries": "pooled", "sinks": 0}, "left(30)", 600, "without a window"),
        ("barnes_hut", {}, "chunk(16)", 100, "chunked"),
        ("window", {}, "causal & prefix(9)", 100, "prefix"),
    ],
)
def test_sites_that_do_not_fit(name, options, mask, length, words):
    spec = dataclasses.replace(make_inputs("none", length=length).spec(), mask=MaskStructure.parse(mask))
    operator = make_operator(name, **options)
    assert words in operator.supports(spec).reason
    inputs = make_inputs(mask, length=length)
    with pytest.raises(ValueError, match="cannot serve"):
        attend(inputs.query, inputs.key, inputs.value, operator, mask=inputs.mask,
               key_padding=inputs.key_padding, segments=inputs.segments)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in operator_names() if name not in ("exact", "tf_attention", "tc_attention")]
)
def test_cross_attention_is_refused_by_what_needs_shared_positions(name):
    spec = dataclasses.replace(make_inputs("none").spec(), kind="cross", query_len=9)
    support = make_operator(name, **SMALL[name]).supports(spec)
    assert not support and "cross attention" in support.reason


@each_operator
def test_three_types_at_once(name):
    plain = make_inputs("none")
    operator = make_operator(name, **SMALL[name])
    parameters = tuple(p.bfloat16() for p in make_parameters(operator, plain))
    mixed = dataclasses.replace(
        plain, query=plain.query.double(), key=plain.key.bfloat16(), value=plain.value.half()
    )
    given, params, sources = leaves(mixed, parameters)
    got = run(operator, given, params)
    oracle = operator.reference(cast(mixed, torch.float64), tuple(p.double() for p in parameters))
    assert got.out.dtype == torch.float16
    assert relative_error(got.out, oracle.out) <= torch.finfo(torch.float16).eps
    grads = gradients(got, sources, (torch.ones_like(got.out), torch.zeros_like(got.log_sum_exp)))
    assert [g.dtype for g in grads[:3]] == [torch.float64, torch.bfloat16, torch.float16]
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@each_operator
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}, {"batch": 0, "length": 0}])
def test_nothing_at_all_gives_nothing(name, sizes):
    inputs = make_inputs("none", **sizes)
    operator = make_operator(name, **SMALL[name])
    if not operator.supports(inputs.spec()):
        assert "length" in sizes
        return
    given, parameters, sources = leaves(inputs, make_parameters(operator, make_inputs("none")))
    if name == "linformer" and "length" in sizes:
        return
    out, log_sum_exp = attend(given.query, given.key, given.value, operator, parameters=parameters)
    assert out.shape == inputs.query.shape and log_sum_exp.shape == inputs.query.shape[:3]
    grads = torch.autograd.grad(out.sum() + log_sum_exp.sum(), sources, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_queries_without_any_key_see_nothing():
    inputs = make_inputs("none", length=5, key_len=0)
    out, log_sum_exp = attend(inputs.query, inputs.key, inputs.value, make_operator("exact"))
    assert not out.any() and (log_sum_exp == -torch.inf).all()


@each_operator
@pytest.mark.parametrize("mask", ["key_padding", "causal & key_padding"])
def test_a_sequence_of_padding_alone(name, mask):
    inputs = make_inputs(mask)
    operator = make_operator(name, **SMALL[name])
    if not operator.supports(inputs.spec()):
        assert name in ("cast", "linformer") and inputs.mask.causal
        return
    inputs.key_padding[0] = False
    given, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    got = run(operator, given, parameters)
    assert not got.out[0].any() and (got.log_sum_exp[0] == -torch.inf).all()
    seeds = torch.ones_like(got.out), torch.ones_like(got.log_sum_exp)
    for gradient in gradients(got, sources, seeds):
        assert bool(torch.isfinite(gradient).all())
    assert not any(g[0].any() for g in gradients(run(operator, given, parameters), sources[:3], seeds))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cast", {"clusters": 12, "clustering": "sa_topk", "cluster_size": 40}),
        ("cast", {"clusters": 12, "clustering": "sa_topk", "cluster_size": 40, "combine": "lse"}),
        ("tf_attention", {"height": 4}),
        ("tf_attention", {"height": 4, "fallback": "zero"}),
        ("tc_attention", {"height": 4}),
    ],
)
def test_empty_clusters_and_empty_leaves(name, options):
    """All tokens alike choose one cluster or one leaf; the others stay empty."""
    inputs = make_inputs("none", length=40, dtype=torch.float64)
    alike = [x[:, :, :1].expand(-1, -1, 40, -1).contiguous() for x in (inputs.query, inputs.key)]
    inputs = dataclasses.replace(inputs, query=alike[0], key=alike[1])
    operator = make_operator(name, **options)
    given, parameters, sources = leaves(inputs, make_parameters(operator, make_inputs("none", length=40)))
    parameters = tuple(p.detach().double().requires_grad_() for p in parameters)
    sources = (*sources[:3], *parameters)
    got, wanted = run(operator, given, parameters), operator.reference(given, parameters)
    assert relative_error(got.out, wanted.out) < 1e-12 and bool(torch.isfinite(got.out).all())
    seeds = torch.ones_like(got.out), torch.zeros_like(got.log_sum_exp)
    for found, right in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert bool(torch.isfinite(found).all())
        assert float((found - right).abs().max()) < 1e-10 * max(1.0, float(right.abs().max()))


@each_operator
def test_the_longest_options_on_the_shortest_sequences(name):
    """A sequence shorter than a block, a window or a budget is attended, or refused with the reason."""
    wide = {
        "fma": {}, "window": {}, "barnes_hut": {"open": 1000, "beam": 1000},
        "tf_attention": {"height": 1}, "tc_attention": {"height": 1}, "conv_basis": {"k": 2, "sinks": 9},
        "cast": {"clusters": 32}, "linformer": {"rank": 2},
    }  # fmt: skip
    operator = make_operator(name, **wide.get(name, {}))
    for length in (2, 3, 5):
        inputs = make_inputs("none", length=length, dtype=torch.float64)
        assert operator.supports(inputs.spec())
        parameters = tuple(p.double() for p in make_parameters(operator, inputs))
        got, wanted = run(operator, inputs, parameters), operator.reference(inputs, parameters)
        assert relative_error(got.out, wanted.out) < 1e-12
        if name in ("fma", "window", "barnes_hut"):
            exact = run(make_operator("exact"), inputs)
            assert relative_error(got.out, exact.out) < 1e-12


def test_a_causal_mask_still_means_itself_on_one_token():
    for name in ("exact", "window"):
        inputs = make_inputs("causal", length=1)
        out, _ = attend(inputs.query, inputs.key, inputs.value, make_operator(name), mask=CAUSAL)
        assert torch.equal(out, inputs.value.repeat_interleave(2, 1))
