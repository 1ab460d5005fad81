"""CAST: golden numbers, worked tables, identities of the definition, starts, refusals, cost."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cast_cases import CASES, build, each_case, fitting
from oracle import (
    leaves,
    make_inputs,
    make_parameters,
    relative_error,
    run,
)

from fastattn_compile.kernels.aten import cast as cast_aten
from fastattn_compile.kernels.aten import cast_assign
from fastattn_compile.kernels.aten.cast_affinity import Affinities, Tokens
from fastattn_compile.kernels.aten.cast_kmeans import balanced_assignment
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.cast.config import CHOICES, CastConfig
from fastattn_compile.operators.cast.parameters import unpacked
from fastattn_compile.operators.cast.reference import clusters_of
from fastattn_compile.operators.exact.reference import exact_attention
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "cast_golden.json").read_text())


def golden_inputs(two_heads=False):
    def waves(length, heads, function):
        return torch.tensor(
            [[[function(i, h, c) for c in range(2)] for i in range(length)] for h in range(heads)],
            dtype=torch.float64,
        )[None]

    n, heads = (12, 2) if two_heads else (8, 1)
    q = waves(n, heads, lambda i, h, c: math.sin(0.7 * i + 1.1 * c + 0.5 * h))
    k = waves(n, heads, lambda i, h, c: math.cos(0.4 * i - 0.3 * c + 0.9 * h))
    v = waves(n, heads, lambda i, h, c: math.sin(0.9 * i - 0.5 * c + 0.2 * h) + 0.1 * i)
    return AttentionInputs(q, k, v, 2**-0.5)


def gated_queries(inputs, phi):
    """The same attention with one more channel, 0 in keys and surrogates, where the gate reads ``phi``."""
    gate = torch.as_tensor(phi, dtype=torch.float64)[None, None, :, None]
    extra = torch.cat([gate, torch.zeros_like(gate).expand(-1, inputs.query.shape[1] - 1, -1, -1)], 1)
    pad = torch.zeros_like(inputs.key[..., :1])
    return dataclasses.replace(
        inputs, query=torch.cat([inputs.query, extra], -1), key=torch.cat([inputs.key, pad], -1)
    )


def golden_parameters(surrogates):
    """Surrogates ``(c, h, 2)`` and a gate that reads the channel after them in the first head."""
    heads = surrogates.shape[1]
    gate = torch.zeros(1, heads, 3, dtype=torch.float64)
    gate[0, 0, 2] = 1
    padded = torch.cat([surrogates, torch.zeros_like(surrogates[..., :1])], -1)
    return padded, gate, torch.zeros(1, dtype=torch.float64)


SURROGATES = torch.tensor([[[1, 0.5]], [[-0.5, 1]]], dtype=torch.float64)
PHI = [0.5 * math.cos(1.3 * i) for i in range(8)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk_kappa3", {"cluster_size": 3}),
        ("topk_kappa5", {"cluster_size": 5}),
        ("sa_kappa4", {"cluster_size": 4, "clustering": "sa_topk"}),
    ],
)
@pytest.mark.parametrize("path", ["reference", "forward"])
def test_golden_numbers(name, options, path):
    golden = GOLDEN["cases"][name]
    operator = make_operator("cast", clusters=2, **options)
    inputs = gated_queries(golden_inputs(), PHI)
    given, parameters, sources = leaves(inputs, golden_parameters(SURROGATES))
    out = (
        operator.reference(given, parameters) if path == "reference" else run(operator, given, parameters)
    ).out
    assert torch.allclose(out[0, 0], torch.tensor(golden["out"], dtype=torch.float64).view(8, 2), atol=1e-12)
    slope = torch.tensor([1, -0.5], dtype=torch.float64).expand_as(out)
    q, k, v, s, _, _ = torch.autograd.grad(out, sources, slope)
    for got, wanted in ((q[0, 0, :, :2], "dq"), (k[0, 0, :, :2], "dk"), (v[0, 0], "dv"), (s[:, 0, :2], "dS")):
        assert torch.allclose(got, torch.tensor(golden[wanted], dtype=torch.float64).view_as(got), atol=1e-12)
    # The gate's own channel is the query's third: its gradient is that of phi.
    assert torch.allclose(q[0, 0, :, 2], torch.tensor(golden["dphi"], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "clustering"), [("2head_topk_kappa4", "topk"), ("2head_sa_kappa4", "sa_topk")]
)
def test_golden_numbers_of_two_heads(name, clustering):
    golden = GOLDEN["cases"][name]
    surrogates = torch.tensor(
        [
            [[math.sin(1.7 * s + 0.6 * c + 0.8 * h + 0.3) for c in range(2)] for h in range(2)]
            for s in range(3)
        ],
        dtype=torch.float64,
    )
    inputs = gated_queries(golden_inputs(two_heads=True), [0.5 * math.cos(1.3 * i) for i in range(12)])
    parameters = golden_parameters(surrogates)
    operator = make_operator("cast", clusters=3, cluster_size=4, clustering=clustering)
    tokens = Tokens.of(inputs.query, inputs.key, inputs.value, None)
    affinities = Affinities(tokens, unpacked(operator.config, parameters, 2), operator.rule(12), inputs.scale)
    assert torch.allclose(
        affinities.selection()[0][0], torch.tensor(golden["Ag"], dtype=torch.float64), atol=1e-12
    )
    assert [sorted(c) for c in cast_aten.cluster(affinities)[0].tolist()] == [
        sorted(c) for c in golden["idx"]
    ]
    out = torch.tensor(golden["out"], dtype=torch.float64).transpose(0, 1)
    assert torch.allclose(run(operator, inputs, parameters).out[0], out, atol=1e-12)
    assert torch.allclose(operator.reference(inputs, parameters).out[0], out, atol=1e-12)


def test_worked_index_tables():
    """Specification 6 A."""
    first = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.2, 0.45, 0.1], dtype=torch.float64)
    affinity = torch.stack([first, 1 - first], -1)[None]
    tie = torch.zeros_like(affinity)
    assert cast_assign.top_k(affinity, tie, 3)[0].tolist() == [[0, 1, 2], [7, 5, 6]]
    assert cast_assign.top_k(affinity, tie, 5)[0].tolist() == [[0, 1, 2, 3, 4], [7, 5, 6, 4, 3]]
    for size, wanted in ((4, [[0, 1, 2, 3], [4, 5, 6, 7]]), (5, [[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]])):
        assigned = cast_assign.single_assignment(affinity, tie, size)
        assert cast_assign.slots(assigned, 2, size)[0].tolist() == wanted


def test_the_two_greedy_orders_differ():
    """Specification 1.3."""
    affinity = torch.tensor(
        [[0.21, 0.32, 0.47], [0.05, 0.34, 0.61], [0.40, 0.52, 0.08],
         [0.03, 0.53, 0.44], [0.09, 0.50, 0.42], [0.48, 0.35, 0.17]]
    )[None]  # fmt: skip
    tie = torch.zeros_like(affinity)
    tables = [
        cast_assign.slots(cast_assign.single_assignment(affinity, tie, 2, by_pair=p), 3, 2)[0].tolist()
        for p in (False, True)
    ]
    assert tables == [[[0, 5], [2, 3], [1, 4]], [[4, 5], [2, 3], [0, 1]]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
def test_rounds_follow_the_greedy_order_exactly(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    length, clusters = 29, 4
    affinity = torch.rand(2, length, clusters, generator=generator)
    if ties:
        affinity = (affinity * 4).round() / 4
    tie = (torch.rand(affinity.shape, generator=generator) * 3).round()
    real = torch.rand(2, length, generator=generator) > 0.2
    for order in ("token", "pair"):
        for size in (8, 11):
            config = CastConfig(clusters=clusters, cluster_size=size, clustering="sa_topk", sa_order=order)
            assigned = cast_assign.single_assignment(affinity, tie, size, real, by_pair=order == "pair")
            for b in range(2):
                member = clusters_of(affinity[b], tie[b], config, real[b])
                wanted = torch.where(real[b], member.int().argmax(-1), -1)
                assert torch.equal(assigned[b], wanted)
                assert member.sum(0).max() <= size and torch.equal(member.sum(-1), real[b].long())


@pytest.mark.parametrize("case", ["topk", "topk-lse", "sa", "sa-lse"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_cluster_is_exact_attention(case, padded):
    options = {**CASES[case], "cluster_size": None}
    operator = make_operator("cast", clusters=1, **options)
    inputs = fitting(operator, padded, dtype=torch.float64)
    got, exact = run(operator, inputs, make_parameters(operator, inputs)), exact_attention(inputs)
    real = slice(None) if not padded else inputs.key_padding[:, None].expand(-1, 4, -1)
    assert torch.allclose(got.out[real], exact.out[real], atol=1e-12)
    if operator.config.combine == "lse":
        assert torch.allclose(got.log_sum_exp[real], exact.log_sum_exp[real], atol=1e-12)


@pytest.mark.parametrize("combine", CHOICES["combine"])
def test_one_causal_cluster_is_exact_attention(combine):
    operator = make_operator("cast", clusters=1, clustering="token_choice", cluster_size=41, combine=combine)
    inputs = fitting(operator, dtype=torch.float64)
    got = run(operator, inputs, make_parameters(operator, inputs))
    assert torch.allclose(got.out, exact_attention(inputs).out, atol=1e-12)


@pytest.mark.parametrize("combine", CHOICES["combine"])
def test_clusters_of_everything_are_exact_attention(combine):
    operator = make_operator("cast", clusters=3, cluster_size=41, combine=combine)
    inputs = fitting(operator, dtype=torch.float64)
    got = run(operator, inputs, make_parameters(operator, inputs))
    assert torch.allclose(got.out, exact_attention(inputs).out, atol=1e-12)


@each_case
def test_constant_values_stay_constant(case):
    operator = build(case)
    inputs = fitting(operator, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, value=torch.full_like(inputs.value, 3.0))
    out = run(operator, inputs, make_parameters(operator, inputs)).out
    if operator.config.own_summary == "included":
        assert (out > 3 + 1e-6).any()
    else:
        assert torch.allclose(out, torch.full_like(out, 3.0), atol=1e-12)


@pytest.mark.parametrize("case", ["causal-lse", "sa-lse", "topk-lse"])
def test_one_softmax_counts_every_token_once(case):
    """With equal keys all weights are equal, so the normaliser counts the tokens that the row meets."""
    operator = build(case)
    inputs = fitting(operator, dtype=torch.float64)
    parameters = make_parameters(operator, inputs)
    inputs = dataclasses.replace(inputs, key=inputs.key[:, :, :1].expand_as(inputs.key))
    score = inputs.scale * (inputs.query * inputs.key.repeat_interleave(2, 1)).sum(-1)
    counted = (run(operator, inputs, parameters).log_sum_exp - score).exp()
    covered = operator.exact_keys(inputs, torch.arange(41), parameters).any(2).sum(-1).double()
    wanted = torch.arange(1.0, 42.0, dtype=torch.float64) if operator.config.causal else covered[:, :, None]
    assert torch.allclose(counted, wanted.expand_as(counted), atol=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if "causal" not in name])
def test_order_of_tokens_does_not_matter(case):
    operator = build(case)
    inputs = fitting(operator, dtype=torch.float64)
    parameters = make_parameters(operator, inputs)
    order = torch.randperm(41)
    moved = dataclasses.replace(
        inputs, query=inputs.query[:, :, order], key=inputs.key[:, :, order], value=inputs.value[:, :, order]
    )
    got = run(operator, moved, parameters).out
    assert torch.allclose(got, run(operator, inputs, parameters).out[:, :, order], atol=1e-12)


def test_surrogates_of_zero_mix_uniformly():
    """Specification 6: mixing weights are uniform and summaries are means."""
    operator = make_operator("cast", clusters=3, cluster_size=6)
    inputs = fitting(operator, dtype=torch.float64, length=20, batch=1)
    zero = [torch.zeros_like(p) for p in make_parameters(operator, inputs)]
    out = run(operator, inputs, tuple(zero)).out
    # All affinities tie, so every cluster holds the first six tokens.
    mean = inputs.value[:, :, :6].mean(2, keepdim=True).repeat_interleave(2, 1)
    assert torch.allclose(out[:, :, 6:], mean.expand(-1, -1, 14, -1), atol=1e-12)


@pytest.mark.parametrize(("bias", "side"), [(60.0, "query"), (-60.0, "key")])
def test_the_gate_decides_between_query_and_key(bias, side):
    inputs = fitting(make_operator("cast"), dtype=torch.float64)
    mixed, one = (make_operator("cast", clusters=4, combine="lse", select=x) for x in ("mix", side))
    surrogates, gate, _ = make_parameters(mixed, inputs)
    parameters = (surrogates, torch.zeros_like(gate), torch.full((1,), bias, dtype=torch.float64))
    assert torch.equal(run(mixed, inputs, parameters).out, run(one, inputs, (surrogates,)).out)


def test_a_token_in_no_cluster_is_met_by_nobody():
    operator = make_operator("cast", clusters=2, cluster_size=5, select="query")
    inputs = fitting(operator, dtype=torch.float64, batch=1, length=20)
    parameters = make_parameters(operator, inputs)
    met = operator.exact_keys(inputs, torch.arange(20), parameters)[0, 0].any(0)
    assert 0 < int((~met).sum()) < 20
    loose = int((~met).nonzero()[0])
    key, value = inputs.key.clone(), inputs.value.clone()
    key[:, :, loose] += 3
    value[:, :, loose] += 3
    other = run(operator, dataclasses.replace(inputs, key=key, value=value), parameters).out
    assert torch.equal(other, run(operator, inputs, parameters).out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 0}, "clusters must be"),
        ({"cluster_size": 0}, "cluster_size must be"),
        ({"clustering": "kmeans"}, "sa_topk"),
        ({"combine": "sum"}, "paper, lse"),
        ({"clustering": "token_choice"}, "needs a cluster_size"),
        ({"combine": "lse", "own_summary": "included"}, "twice"),
        ({"combine": "lse", "tau": "learned"}, "paper"),
        ({"cluster": 3}, "unknown option cluster"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_operator("cast", **options)


def test_options_of_a_wrong_type_are_refused():
    for value in (2.0, "8", True):
        with pytest.raises(TypeError, match="cluster_size"):
            make_operator("cast", cluster_size=value)


@pytest.mark.parametrize(
    ("options", "mask", "length", "words"),
    [
        ({}, "causal", 40, "token_choice"),
        ({"clustering": "token_choice", "cluster_size": 4}, "none", 40, "not causal"),
        ({"clustering": "sa_topk", "clusters": 4, "cluster_size": 9}, "none", 40, "hold fewer than 40"),
        ({"cluster_size": 41}, "none", 40, "larger than the sequence"),
        ({}, "left(3) & right(3)", 40, "left"),
        ({}, "chunk(8)", 40, "chunk"),
        ({}, "none", 1, "single query"),
    ],
)
def test_sites_that_do_not_fit_are_refused(options, mask, length, words):
    operator = make_operator("cast", **options)
    spec = dataclasses.replace(make_inputs("none", length=length).spec(), mask=MaskStructure.parse(mask))
    assert words in operator.supports(spec).reason


def test_cross_attention_is_refused():
    inputs = make_inputs("none", length=20, key_len=30)
    assert "cross" in make_operator("cast").supports(inputs.spec()).reason


def test_too_little_capacity_is_an_error():
    with pytest.raises(ValueError, match="size of at least 4"):
        cast_assign.single_assignment(torch.rand(1, 10, 3), torch.zeros(1, 10, 3), 3)


def test_foreign_parameters_are_an_error():
    operator, inputs = make_operator("cast"), make_inputs("none")
    with pytest.raises(ValueError, match="initial_parameters"):
        run(operator, inputs, (torch.zeros(3, 2, 8),))


def test_surrogates_start_at_the_blobs_of_the_keys():
    centers = torch.nn.functional.one_hot(torch.arange(6), 8).float() * 10
    label = torch.arange(120) % 6
    key = (centers[label] + 0.1 * torch.randn(120, 8))[None, None]
    sample = AttentionInputs(key, key, key, 1.0)
    start = make_operator("cast", clusters=6).initial_parameters(sample.spec(), sample)
    nearest = torch.cdist(centers, start["surrogates"][:, 0])
    assert nearest.amin(-1).max() < 0.5
    assert not start["gate_weight"].any() and not start["gate_bias"].any()


def test_k_means_is_balanced_and_repeatable():
    points = torch.randn(103, 4)
    centroids, assigned = balanced_assignment(points, 10)
    count = torch.bincount(assigned, minlength=10)
    assert count.max() <= 11 and count.min() >= 1
    again, _ = balanced_assignment(points, 10)
    assert torch.equal(centroids, again)
    same, assigned = balanced_assignment(torch.zeros(7, 2), 3)
    assert torch.isfinite(same).all() and torch.bincount(assigned, minlength=3).min() >= 1


def test_start_from_a_sample_is_better_than_at_random():
    """Where keys and queries cluster, the surrogates of k-means find it and one softmax is close to exact."""
    centers = 6 * torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    label = torch.arange(256) % 8
    q, k = ((centers[label] + 0.3 * torch.randn(256, 32))[None, None] for _ in range(2))
    inputs = AttentionInputs(q, k, torch.randn(1, 1, 256, 32), 32**-0.5)
    exact = exact_attention(inputs).out
    operator = make_operator("cast", clusters=8, clustering="sa_topk", combine="lse", select="key")
    fitted = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
    drawn = tuple(operator.initial_parameters(inputs.spec()).values())
    errors = [relative_error(run(operator, inputs, p).out, exact) for p in (fitted, drawn)]
    assert errors[0] < 0.05 < 0.5 < errors[1]


def test_a_learned_temperature_starts_neutral():
    """Mixing at the site's scale and summaries as plain means, specification 5.1."""
    operator = make_operator("cast", clusters=4, cluster_size=8, tau="learned")
    inputs = fitting(operator, dtype=torch.float64)
    parameters = tuple(p.double() for p in operator.initial_parameters(inputs.spec(), inputs).values())
    tokens = Tokens.of(inputs.query, inputs.key, inputs.value, None)
    weights = unpacked(operator.config, parameters, 4)
    affinities = Affinities(tokens, weights, operator.rule(41), inputs.scale)
    assert torch.allclose(affinities.mixing_logits(), affinities.query * inputs.scale)
    assert not affinities.summary_logits().any()


def test_cost_counts_the_pairs():
    spec = make_inputs("none", batch=1, heads=1, kv_heads=1, length=1024, head_dim=64).spec()
    operator = make_operator("cast", clusters=16, cluster_size=64, clustering="sa_topk")
    cost = operator.cost(spec)
    # Specification 2: (2 size + 3 clusters) n d products, and n d each for the summaries and the gate.
    assert cost.flops == 2 * 1024 * 64 * (2 * 64 + 3 * 16 + 1 + 1)
    assert cost.keys_per_query == 64 + 16
    causal = make_operator("cast", clusters=16, cluster_size=64, clustering="token_choice")
    spec = dataclasses.replace(spec, mask=CAUSAL)
    assert causal.cost(spec).keys_per_query == pytest.approx(16 + 64 - 63 / 32)
    flops = []
    for n in (4096, 16384):
        clusters = round((2 * n / 3) ** 0.5)
        sized = dataclasses.replace(spec, mask=NO_MASK, query_len=n, key_len=n)
        flops.append(make_operator("cast", clusters=clusters).cost(sized).flops)
    # Four times the length at the best number of clusters costs n^1.5: eight times as much.
    assert flops[1] / flops[0] == pytest.approx(8, rel=0.05)
