"""What surrounds tree attention: decoding, start and growth of planes, losses, costs, capacity, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from operators.test_treeformer import golden
from oracle import make_inputs, make_parameters, relative_error

from fastattn_compile.kernels.aten.treeformer_route import follow
from fastattn_compile.operators import treeformer
from fastattn_compile.operators.base import AttentionInputs, SiteSpec
from fastattn_compile.operators.exact.reference import exact_attention
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator


def spec(**changes):
    return dataclasses.replace(SiteSpec(1, 1, 1, 512, 512, 64, 64), **changes)


def decode(operator, inputs, parameters, prompt):
    """Outputs of a prefill of some tokens and of a step for each further one."""
    decoder = operator.decoder(inputs.scale, parameters)

    def cut(start, stop):
        return [x[:, :, start:stop] for x in (inputs.query, inputs.key, inputs.value)]

    padding = None if inputs.key_padding is None else inputs.key_padding[:, :prompt]
    mask = MaskStructure(right=0, key_padding=padding is not None)
    first = AttentionInputs(*cut(0, prompt), inputs.scale, mask, padding, bias=inputs.bias)
    outs = [decoder.prefill(first)]
    outs += [decoder.step(*cut(i, i + 1)) for i in range(prompt, inputs.query.shape[2])]
    return decoder, torch.cat([o.out for o in outs], 2), torch.cat([o.log_sum_exp for o in outs], 2)


@pytest.mark.parametrize("mask", ["causal", "causal & key_padding"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tc_attention", {}),
        ("tc_attention", {"n_trees": 2, "shared": False, "level_weights": "softmax", "include_root": False}),
        ("tf_attention", {}),
        (
            "tf_attention",
            {"n_trees": 2, "shared": False, "window": 4, "sinks": 2, "query_gradient": "sibling"},
        ),
        ("tc_attention", {"rotary_base": 50.0, "shared": False}),
        ("tf_attention", {"rotary_base": 50.0, "window": 4}),
        ("tf_attention", {"fallback": "zero"}),
        ("tf_attention", {"n_trees": 2, "combine": "mean", "fallback": "self+window", "fallback_window": 3}),
    ],
)
def test_decoding_equals_one_pass(mask, name, options):
    inputs = make_inputs(mask, length=60, dtype=torch.float64)
    if inputs.key_padding is not None:
        inputs.key_padding[:, 40:] = True
    operator = make_operator(name, height=3, **options)
    parameters = make_parameters(operator, inputs)
    wanted = operator.forward(inputs, parameters)
    decoder, out, log_sum_exp = decode(operator, inputs, parameters, 40)
    assert relative_error(out, wanted.out) < 1e-12
    finite = ~wanted.log_sum_exp.isnan()
    assert relative_error(log_sum_exp[finite], wanted.log_sum_exp[finite]) < 1e-12
    assert decoder.stored_rows() == (15 * operator.config.n_trees if name == "tc_attention" else 60)


@pytest.mark.parametrize("mask", ["causal + alibi", "causal & key_padding + bucketed"])
@pytest.mark.parametrize(
    "options", [{}, {"n_trees": 2, "window": 4, "sinks": 2, "query_gradient": "sibling"}]
)
def test_decoding_adds_the_bias_of_the_site(mask, options):
    inputs = make_inputs(mask, length=60, dtype=torch.float64)
    if inputs.key_padding is not None:
        inputs.key_padding[:, 40:] = True
    operator = make_operator("tf_attention", height=3, **options)
    parameters = make_parameters(operator, inputs)
    wanted = operator.forward(inputs, parameters)
    decoder, out, log_sum_exp = decode(operator, inputs, parameters, 40)
    assert relative_error(out, wanted.out) < 1e-12
    assert relative_error(log_sum_exp, wanted.log_sum_exp) < 1e-12
    if inputs.bias.dim() == 2:
        with pytest.raises(ValueError, match="distances of 60 tokens"):
            decoder.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])


def test_decoding_starts_from_a_prompt_shorter_than_the_leaves_and_refuses_other_masks():
    inputs = make_inputs("causal", length=20, dtype=torch.float64)
    operator = make_operator("tc_attention", height=3)
    parameters = make_parameters(operator, inputs)
    _, out, _ = decode(operator, inputs, parameters, 3)
    assert relative_error(out, operator.forward(inputs, parameters).out) < 1e-12
    with pytest.raises(ValueError, match="causal prefill"):
        operator.decoder(1.0, parameters).prefill(dataclasses.replace(inputs, mask=NO_MASK))
    assert make_operator("tf_attention", height=3, capacity=1.0).decoder(1.0, parameters) is None


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
@pytest.mark.parametrize("sampled", [True, False])
def test_trees_grow_from_their_first_planes(name, sampled):
    inputs = make_inputs("causal", dtype=torch.float64)
    low, high = (make_operator(name, height=h, shared=False) for h in (2, 4))
    old = dict(zip(low.parameter_shapes(inputs.spec()), make_parameters(low, inputs)))
    new = high.grown_parameters(inputs.spec(), old, inputs if sampled else None)
    assert {k: tuple(v.shape) for k, v in new.items()} == high.parameter_shapes(inputs.spec())
    for side in ("key", "query"):
        assert torch.equal(new[f"{side}_planes"][:, :, :3], old[f"{side}_planes"].float())
        assert torch.equal(new[f"{side}_offsets"][:, :, :3], old[f"{side}_offsets"].float())
    if name == "tc_attention":
        before = low.forward(inputs, tuple(p.float().double() for p in old.values())).out
        after = high.forward(inputs, tuple(p.double() for p in new.values())).out
        assert relative_error(after, before) < 1e-13
    with pytest.raises(ValueError, match="not lower"):
        low.grown_parameters(inputs.spec(), new)


@pytest.mark.parametrize("init", ["pca", "random"])
def test_calibration_splits_keys_in_halves(init):
    inputs = make_inputs("key_padding", length=128, kv_heads=2)
    operator = make_operator("tf_attention", height=3, n_trees=2, init=init)
    planes, offsets = operator.initial_parameters(inputs.spec(), inputs).values()
    assert torch.allclose(planes.norm(dim=-1), torch.ones(2, 2, 7), atol=1e-5)
    assert not torch.allclose(planes[:, 0], planes[:, 1])
    leaf, _ = follow(inputs.key, planes, offsets)
    real = inputs.key_padding[:, None, None].expand_as(leaf)
    counts = [int(((leaf == x) & real)[:, h, t].sum()) for h in (0, 1) for t in (0, 1) for x in range(8)]
    assert max(counts) - min(counts) <= 2
    again = operator.initial_parameters(inputs.spec(), inputs)["key_planes"]
    assert torch.equal(again, planes)


@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
@pytest.mark.parametrize("init", ["pca", "kmeans", "random"])
def test_a_sample_of_padding_alone_is_no_sample(name, init):
    inputs = make_inputs("key_padding", length=20)
    inputs.key_padding[:] = False
    operator = make_operator(name, height=2, n_trees=2, init=init)
    planes, offsets, *weights = operator.initial_parameters(inputs.spec(), inputs).values()
    assert torch.allclose(planes.norm(dim=-1), torch.ones(2, 2, 3)) and not offsets.any()
    assert all(torch.equal(w, torch.full((4, 2, 3), 1 / 6)) for w in weights)


def test_kmeans_finds_two_clusters_that_a_median_would_cut():
    inputs = make_inputs("none", batch=1, heads=1, kv_heads=1, length=60, head_dim=4)
    inputs.key.mul_(0.1)[:, :, :45, 2] += 5.0
    operator = make_operator("tf_attention", height=1, init="kmeans")
    planes, offsets = operator.initial_parameters(inputs.spec(), inputs).values()
    leaf = follow(inputs.key, planes, offsets)[0].squeeze()
    assert leaf[:45].unique().numel() == leaf[45:].unique().numel() == 1 and leaf[0] != leaf[-1]


def test_without_data_planes_are_random_and_repeatable():
    operator = make_operator("tc_attention", height=4, n_trees=2)
    start = operator.initial_parameters(spec(heads=4, kv_heads=2))
    assert 0.9 < float(start["key_planes"].std()) * 8 < 1.1 and not start["key_offsets"].any()
    assert torch.equal(start["level_weights"], torch.full((4, 2, 5), 0.1))
    other = make_operator("tc_attention", height=4, n_trees=2, seed=1)
    assert not torch.equal(
        other.initial_parameters(spec(heads=4, kv_heads=2))["key_planes"], start["key_planes"]
    )


def test_level_weights_start_at_the_least_squares_solution():
    inputs = make_inputs("causal", length=128, dtype=torch.float64)
    operator = make_operator("tc_attention", height=3)
    wanted = exact_attention(inputs).out
    errors = []
    for sample in (inputs, None):
        start = operator.initial_parameters(inputs.spec(), inputs)
        if sample is None:
            start["level_weights"] = torch.full_like(start["level_weights"], 0.25)
        out = operator.forward(inputs, tuple(p.double() for p in start.values())).out
        errors.append(relative_error(out, wanted))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("mask", ["causal", "causal & key_padding"])
def test_rotary_embeddings_are_undone_before_routing(mask):
    plain = make_inputs(mask, dtype=torch.float64)
    place = torch.arange(75)[None]
    if plain.key_padding is not None:
        place = (plain.key_padding.long().cumsum(1) - 1).clamp(min=0)
    angle = place[:, None, :, None] * 50.0 ** (-torch.arange(0, 8, 2).double() / 8)

    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    rotated = dataclasses.replace(plain, query=turned(plain.query), key=turned(plain.key))
    undoing = make_operator("tc_attention", height=3, rotary_base=50.0)
    taking = make_operator("tc_attention", height=3)
    parameters = make_parameters(taking, plain)
    got, wanted = undoing.forward(rotated, parameters).out, taking.forward(plain, parameters).out
    assert relative_error(got, wanted) < 1e-12
    assert relative_error(taking.forward(rotated, parameters).out, wanted) > 1e-2


def test_costs_are_those_of_the_specification():
    site = spec()
    assert make_operator("tf_attention", height=6).cost(site).flops == 4 * 512 * 6 * 64 + 4 * 512**2 * 64 / 64
    assert make_operator("tc_attention", height=6).cost(site).flops == 1_286_144
    exact = make_operator("exact").cost(site).flops
    assert exact / make_operator("tf_attention", height=6).cost(site).flops == pytest.approx(36.5, abs=0.5)
    assert exact / make_operator("tc_attention", height=6).cost(site).flops == pytest.approx(52, abs=0.5)
    longer = spec(query_len=4096, key_len=4096)
    exact = make_operator("exact").cost(longer).flops
    published = (("tf_attention", 8, 171), ("tf_attention", 10, 293), ("tc_attention", 8, 320))
    for name, height, ratio in published:
        assert exact / make_operator(name, height=height).cost(longer).flops == pytest.approx(ratio, abs=1)
    assert make_operator("tc_attention", height=6, n_trees=2).cost(site).keys_per_query == 14


@pytest.mark.parametrize("options", [{}, {"window": 20, "sinks": 4}, {"query_gradient": "sibling"}])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_counted_keys_are_near_the_keys_met_by_even_trees(options, mask):
    inputs = make_inputs(mask, batch=1, heads=4, kv_heads=4, length=512)
    operator = make_operator("tf_attention", height=3, **options)
    parameters = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
    met = operator.exact_keys(inputs, torch.arange(512), parameters).sum(-1).double().mean()
    assert operator.cost(inputs.spec()).keys_per_query == pytest.approx(float(met), rel=0.2)


def test_capacity_bounds_the_keys_and_accounts_for_what_it_drops():
    inputs = make_inputs("causal", batch=1, length=64, dtype=torch.float64)
    planes = torch.zeros(2, 1, 3, 8).double(), -torch.ones(2, 1, 3).double()
    everywhere = make_operator("tf_attention", height=2).routing_statistics(inputs, planes)
    assert everywhere.imbalance == pytest.approx(4) and everywhere.dropped == everywhere.fallback == 0
    operator = make_operator("tf_attention", height=2, capacity=0.5)
    met = operator.exact_keys(inputs, torch.arange(64), planes)
    assert operator.config.keys_of_leaf(64) == 8
    assert torch.equal(met, inputs.mask.visible(torch.arange(64)[:, None], torch.arange(64), 64, 64).expand_as(met)
                       & (torch.arange(64) > torch.arange(64)[:, None] - 8))  # fmt: skip
    kept = 8 * 64 - 28
    assert operator.routing_statistics(inputs, planes).dropped == pytest.approx(1 - kept / (64 * 65 / 2))


def test_statistics_count_queries_without_keys_in_their_leaf():
    operator, inputs, parameters = golden(NO_MASK, "tf_attention")
    assert operator.routing_statistics(inputs, parameters).fallback == pytest.approx(1 / 8)
    assert (
        make_operator("tf_attention", height=2, fallback="zero")
        .forward(inputs, parameters)
        .out[0, 0, 3]
        .eq(0)
        .all()
    )


def test_balance_loss_is_least_for_even_leaves_and_moves_planes_there():
    inputs = make_inputs("none", batch=1, length=128, kv_heads=2)
    operator = make_operator("tf_attention", height=2)
    planes, offsets = operator.initial_parameters(inputs.spec(), inputs).values()
    even = float(treeformer.balance_loss(operator.config, inputs, (planes, offsets)))
    offsets = (offsets + 1.5).requires_grad_()
    first = treeformer.balance_loss(operator.config, inputs, (planes, offsets))
    assert abs(even) < 0.01 < float(first.detach())
    optimizer = torch.optim.Adam([offsets], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        loss = treeformer.balance_loss(operator.config, inputs, (planes, offsets))
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * float(first.detach())


def test_mass_loss_brings_attention_into_the_leaves():
    inputs = make_inputs("causal", batch=1, length=64)
    inputs = dataclasses.replace(inputs, query=inputs.key.repeat_interleave(2, 1) * 2)
    operator = make_operator("tf_attention", height=2, shared=False)
    rows = torch.arange(64)
    parameters = tuple(p.requires_grad_() for p in operator.initial_parameters(inputs.spec()).values())
    weights = (inputs.scale * inputs.query @ inputs.key.repeat_interleave(2, 1).mT).masked_fill(
        ~inputs.visible(rows), -torch.inf
    ).softmax(-1)  # fmt: skip

    def recall():
        kept = operator.exact_keys(inputs, rows, tuple(p.detach() for p in parameters))
        return float((weights * kept).sum(-1).mean())

    before = recall()
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        treeformer.mass_loss(operator.config, inputs, parameters, rows).backward()
        assert all(p.grad.abs().sum() > 0 for p in parameters)
        optimizer.step()
    assert recall() > before + 0.1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tf_attention", {"height": -1}, "between 0 and 16"),
        ("tf_attention", {"height": 17}, "log2"),
        ("tf_attention", {"n_trees": 0}, "n_trees must be at least 1"),
        ("tf_attention", {"estimator": "hard"}, "soft, sum"),
        ("tf_attention", {"surrogate": "tanh"}, "clip, sigmoid"),
        ("tf_attention", {"beta": 0.0}, "beta must be a positive number"),
        ("tf_attention", {"init": "svd"}, "pca, kmeans, random"),
        ("tf_attention", {"rotary_base": 0.5}, "greater than 1"),
        ("tf_attention", {"fallback": "root"}, "ancestor, zero"),
        ("tf_attention", {"fallback_window": 0}, "fallback_window must be at least 1"),
        ("tf_attention", {"window": -1}, "window must be at least 0"),
        ("tf_attention", {"sinks": -1}, "sinks must be at least 0"),
        ("tf_attention", {"combine": "max"}, "union, mean"),
        ("tf_attention", {"query_gradient": "reinforce"}, "gate, sibling, none"),
        ("tf_attention", {"capacity": -1.0}, "capacity must be 0"),
        ("tf_attention", {"overflow": "newest"}, "oldest, margin"),
        ("tf_attention", {"query_gradient": "sibling", "height": 0}, "at least one decision"),
        ("tf_attention", {"query_gradient": "sibling", "capacity": 1.0}, "do not go together"),
        ("tc_attention", {"level_weights": "sigmoid"}, "free, softmax"),
        ("tc_attention", {"include_root": False, "height": 0}, "at least one decision"),
        ("tc_attention", {"window": 4}, "unknown option window"),
    ],
)
def test_bad_configurations_say_what_is_wrong(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_operator(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "change", "word"),
    [
        ("tf_attention", {"height": 10}, {}, "1024 leaves for 512 keys"),
        ("tf_attention", {}, {"query_len": 1}, "single query"),
        ("tf_attention", {}, {"mask": MaskStructure(left=4, right=0, prefix=3)}, "prefix"),
        ("tf_attention", {"capacity": 1.0, "overflow": "margin"}, {"mask": CAUSAL}, "oldest"),
        ("tf_attention", {}, {"mask": MaskStructure(segments=True), "query_len": 100}, "packed"),
        ("tf_attention", {"rotary_base": 10.0}, {"head_dim": 33}, "odd"),
        (
            "tf_attention",
            {"rotary_base": 10.0},
            {"mask": MaskStructure(segments=True)},
            "packed documents start",
        ),
        ("tf_attention", {"rotary_base": 10.0}, {"query_len": 100}, "positions"),
        ("tc_attention", {}, {"mask": MaskStructure(left=9, right=0)}, "sliding window"),
        ("tc_attention", {}, {"mask": MaskStructure(right=-1)}, "diagonal"),
        ("tc_attention", {}, {"mask": CAUSAL, "query_len": 100}, "decoder"),
        ("tc_attention", {}, {"bias": "alibi"}, "alibi"),
    ],
)
def test_sites_that_cannot_be_served_are_refused_with_the_reason(name, options, change, word):
    support = make_operator(name, **options).supports(spec(**change))
    assert not support and word in support.reason


def test_parameters_of_another_site_are_refused():
    operator, inputs, parameters = golden(NO_MASK, "tc_attention")
    for wrong in ((), parameters[:2], (parameters[0][:, :, :1], *parameters[1:])):
        with pytest.raises(ValueError, match="key_planes"):
            operator.forward(inputs, wrong)


def test_the_documentation_names_the_patent_application():
    for module in (treeformer, treeformer.tf, treeformer.tc):
        assert "patent application" in module.__doc__
    assert "US 2024/0005131 A1" in treeformer.__doc__
