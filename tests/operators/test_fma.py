"""Fast multipole attention: golden numbers, and the identities its definition implies (specification 6)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from oracle import leaves, make_inputs, make_parameters, relative_error, run
from torch import Tensor

from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.fma import FastMultipoleAttention, FmaConfig
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "fma_golden.json").read_text())


def golden_inputs(mask: MaskStructure) -> AttentionInputs:
    i, c = torch.arange(16.0, dtype=torch.float64)[:, None], torch.arange(2.0, dtype=torch.float64)
    q, k = torch.sin(0.7 * i + 1.1 * c), torch.cos(0.4 * i - 0.3 * c)
    v = torch.sin(0.9 * i - 0.5 * c) + 0.1 * i
    return AttentionInputs(q[None, None], k[None, None], v[None, None], 2**-0.5, mask)


def golden_weights() -> tuple[Tensor, ...]:
    made = []
    for level, width in ((1, 2), (2, 4)):
        for s in (level, level + 5):
            c, r, t = torch.arange(2.0), torch.arange(2.0), torch.arange(float(width))
            c, r, t = c.double()[:, None, None], r.double()[:, None], t.double()
            made += [(1 + 0.1 * torch.sin(c + 2 * r + 3 * t + s)) / width, 0.01 * (c - r + s)[..., 0]]
    return tuple(made)


def plain_fma(**options) -> FastMultipoleAttention:
    return make_operator("fma", **{"sinks": 0, **options})


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_golden_outputs(name, path):
    direction, boundary, basis, rank, scaled = name.split("_")
    inputs = golden_inputs(CAUSAL if direction == "causal" else NO_MASK)
    operator = plain_fma(
        block=2, rank=int(rank[1:]), scale_attn=scaled == "scaled",
        basis="depthwise" if basis == "learned" else "mean",
        boundary="zero_pad" if boundary == "phantom" else "clean",
    )  # fmt: skip
    parameters = golden_weights() if basis == "learned" else ()
    evaluate = run if path == "kernel" else lambda op, *given: op.reference(*given)
    got = evaluate(operator, inputs, parameters).out[0, 0]
    assert (got - torch.tensor(GOLDEN["cases"][name], dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_golden_outputs_of_pooled_queries(path):
    operator, inputs = plain_fma(block=2, rank=1, queries="pooled"), golden_inputs(NO_MASK)
    got = (run(operator, inputs) if path == "kernel" else operator.reference(inputs)).out[0, 0]
    wanted = torch.tensor(GOLDEN["linear_bidir_mean_p1"], dtype=torch.float64)
    assert (got - wanted).abs().max() < 1e-12


def test_pooled_queries_that_are_alike_in_a_block_are_all_queries():
    """At one level, where groups are blocks, the mean query of a group is each of its queries."""
    inputs = make_inputs("none", length=31, dtype=torch.float64)
    alike = inputs.query[:, :, torch.arange(31) // 8]
    inputs = dataclasses.replace(inputs, query=alike)
    got, wanted = (run(plain_fma(block=8, rank=2, queries=q), inputs) for q in ("pooled", "all"))
    assert relative_error(got.out, wanted.out) < 1e-13
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-13


def test_pooled_queries_do_not_decode_and_leave_no_choice_of_kernel():
    operator = plain_fma(block=8, rank=2, queries="pooled")
    assert operator.decoder(1.0) is None
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="no cpp implementation"):
        run(operator, make_inputs("none"))


def test_golden_gradients():
    inputs, parameters, sources = leaves(golden_inputs(CAUSAL), golden_weights())
    operator = plain_fma(block=2, rank=2, basis="depthwise")
    out = run(operator, inputs, parameters).out
    out.backward(torch.tensor([1.0, -0.5], dtype=torch.float64).expand_as(out))
    golden = GOLDEN["grad_causal_clean_learned_p2_scaled"]
    names = ["dq", "dk", "dv"] + [(name, level) for level in (1, 2) for name in ("dWk", "dbk", "dWv", "dbv")]
    for name, source in zip(names, sources, strict=True):
        wanted = golden[name] if isinstance(name, str) else golden[name[0]][name[1]]
        got = source.grad[0, 0] if isinstance(name, str) else source.grad
        assert (got - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 1e-12, name


@pytest.mark.parametrize("direction", ["causal", "bidir"])
def test_golden_exact_attention(direction):
    got = run(ExactAttention(), golden_inputs(CAUSAL if direction == "causal" else NO_MASK)).out[0, 0]
    assert (got - torch.tensor(GOLDEN[f"full_{direction}"], dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_equal_scores_give_the_mean_of_what_is_visible(mask, sinks):
    """Every token counts once: pooled rows weigh what they stand for, sinks are taken out of their groups."""
    inputs = make_inputs(mask, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    visible = inputs.visible(torch.arange(75)).double().unsqueeze(2)
    mean = (visible @ inputs.value.unsqueeze(2)) / visible.sum(-1, keepdim=True).clamp(min=1)
    output = run(make_operator("fma", block=8, rank=2, sinks=sinks), inputs)
    assert torch.allclose(output.out, mean.expand(-1, -1, 2, -1, -1).flatten(1, 2), atol=1e-12)
    count = visible.sum(-1).log().expand(2, 2, 2, 75).flatten(1, 2)
    assert torch.allclose(output.log_sum_exp, count, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "causal", "causal & window(9)", "causal & key_padding", "left(3)"])
@pytest.mark.parametrize("length", [1, 7, 31, 32])
@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
def test_two_blocks_are_attended_exactly(mask, length, basis):
    inputs = make_inputs(mask, length=length)
    operator = FastMultipoleAttention(FmaConfig(block=16, basis=basis))
    got, exact = operator.forward(inputs, make_parameters(operator, inputs)), ExactAttention().forward(inputs)
    assert torch.equal(got.out, exact.out) and torch.equal(got.log_sum_exp, exact.log_sum_exp)


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_constant_keys_in_the_largest_groups_make_it_exact(mask):
    inputs = make_inputs(mask, length=64, dtype=torch.float64)
    key = inputs.key[:, :, ::16].repeat_interleave(16, 2)
    inputs = dataclasses.replace(inputs, key=key)
    got, exact = run(plain_fma(block=4, rank=2), inputs), run(ExactAttention(), inputs)
    assert torch.allclose(got.out, exact.out, atol=1e-12)
    assert torch.allclose(got.log_sum_exp, exact.log_sum_exp, atol=1e-12)


def test_full_rank_makes_the_first_level_exact():
    """Four blocks have one level of groups, a block wide: with as many rows as tokens nothing is lost."""
    inputs = make_inputs("causal", length=32, dtype=torch.float64)
    assert torch.allclose(
        run(plain_fma(block=8, rank=8), inputs).out, run(ExactAttention(), inputs).out, atol=1e-12
    )


@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
def test_a_causal_output_does_not_depend_on_the_length(basis):
    inputs = make_inputs("causal", length=150)
    operator = make_operator("fma", block=8, rank=2, basis=basis)
    parameters = make_parameters(operator, inputs)
    whole = run(operator, inputs, parameters)
    for length in (2, 8, 17, 33, 64, 149):
        cut = dataclasses.replace(
            inputs,
            query=inputs.query[:, :, :length],
            key=inputs.key[:, :, :length],
            value=inputs.value[:, :, :length],
        )
        part = run(operator, cut, parameters)
        assert torch.allclose(part.out, whole.out[:, :, :length], atol=2e-6), length
        assert torch.allclose(part.log_sum_exp, whole.log_sum_exp[:, :, :length], atol=2e-6), length


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_constant_values_stay_constant(mask):
    """With weights that sum to 1 and no bias every pooled value is the constant, whatever the scores."""
    inputs = make_inputs(mask, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, value=torch.full_like(inputs.value, 3.0))
    operator = plain_fma(block=8, rank=2, basis="depthwise")
    weights = list(make_parameters(operator, inputs))
    for at in range(2, len(weights), 4):
        weights[at] = weights[at] / weights[at].sum(-1, keepdim=True)
        weights[at + 1] = torch.zeros_like(weights[at + 1])
    if mask == "none":
        inputs = dataclasses.replace(
            inputs, query=inputs.query[:, :, :64], key=inputs.key[:, :, :64], value=inputs.value[:, :, :64]
        )
    out = run(operator, inputs, tuple(weights)).out
    assert torch.allclose(out, torch.full_like(out, 3.0), atol=1e-12)


@pytest.mark.parametrize("basis", ["depthwise", "dense", "recursive"])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_learned_combinations_start_as_means(mask, basis):
    inputs = make_inputs(mask, length=128, dtype=torch.float64)
    learned, mean = plain_fma(block=8, rank=2, basis=basis), plain_fma(block=8, rank=2)
    start = tuple(p.double() for p in learned.initial_parameters(inputs.spec()).values())
    assert torch.allclose(run(learned, inputs, start).out, run(mean, inputs).out, atol=1e-12)


def test_sinks_are_met_exactly_from_everywhere():
    """When all weight lies on the first real tokens, nothing else matters: sinks make the result exact."""
    inputs = make_inputs("causal & key_padding", length=300, dtype=torch.float64)
    start = inputs.key_padding.int().argmax(-1)
    real_before = inputs.key_padding.cumsum(-1)
    loud = inputs.key_padding & (real_before <= 3)
    key = torch.where(loud[:, None, :, None], 1.0, -1.0) * torch.ones_like(inputs.key) * 4
    inputs = dataclasses.replace(inputs, key=key, query=inputs.query.abs() + 2)
    exact = run(ExactAttention(), inputs).out
    with_sinks = run(make_operator("fma", block=8, rank=2, sinks=3), inputs).out
    without = run(make_operator("fma", block=8, rank=2, sinks=0), inputs).out
    assert start[1] > 8, "the sinks of the second sequence stand after padding"
    assert (with_sinks - exact).norm() < 1e-6 * exact.norm()
    assert (without - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("mask", ["causal & window(30)", "right(13) & left(40)", "left(50)", "right(20)"])
@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
def test_nothing_outside_a_window_has_influence(mask, basis):
    inputs = make_inputs(mask, length=120, dtype=torch.float64)
    operator = make_operator("fma", block=8, rank=2, basis=basis)
    parameters = make_parameters(operator, inputs)
    before = run(operator, inputs, parameters)
    for row in (0, 37, 80, 119):
        hidden = ~inputs.mask.visible(torch.tensor([row]), torch.arange(120), 120, 120)
        changed = dataclasses.replace(
            inputs,
            key=inputs.key.masked_fill(hidden[:, None], 9.0),
            value=inputs.value.masked_fill(hidden[:, None], 9.0),
        )
        after = run(operator, changed, parameters)
        assert torch.equal(before.out[:, :, row], after.out[:, :, row])
        assert torch.equal(before.log_sum_exp[:, :, row], after.log_sum_exp[:, :, row])


@pytest.mark.parametrize(
    "mask", ["causal & window(9)", "right(8) & left(8)", "causal & window(5) & key_padding"]
)
def test_a_window_within_the_near_field_is_exact(mask):
    inputs = make_inputs(mask, dtype=torch.float64)
    got, exact = run(make_operator("fma", block=8, rank=2), inputs), run(ExactAttention(), inputs)
    assert torch.allclose(got.out, exact.out, atol=1e-12)


@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_the_kernel_in_many_passes(basis, monkeypatch):
    """Passes of one block, of several blocks and of several heads give the same numbers."""
    from fastattn_compile.kernels.aten import fma_tiles

    inputs = make_inputs("causal", length=203, heads=4, kv_heads=4)
    operator = make_operator("fma", block=8, rank=2, basis=basis)
    parameters = make_parameters(operator, inputs)
    results = []
    for size in (1, 1 << 11, 1 << 22):
        monkeypatch.setattr(fma_tiles, "SCORE_TILE", size)
        given, params, sources = leaves(inputs, parameters)
        output = run(operator, given, params)
        total = output.out.square().sum() + output.log_sum_exp.sum()
        results.append((output.out, output.log_sum_exp, *torch.autograd.grad(total, sources)))
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_keep_the_log_sum_exp_right():
    """The own key of a query may weigh nothing at all: the log-sum-exp must not be read off its weight."""
    inputs = make_inputs("causal", dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=inputs.query * 300)
    operator = make_operator("fma", block=8, rank=2)
    got, wanted = run(operator, inputs).log_sum_exp, operator.reference(inputs).log_sum_exp
    assert wanted.abs().max() > 500
    assert torch.allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("mask", ["none", "causal", "causal & window(21)", "right(13) & left(22)"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_reaches_exactly_the_queries_that_see_it(mask, side):
    inputs = make_inputs(mask, dtype=torch.float64)
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    for place in (1, 20, 40, 70):
        moved, broken = (getattr(inputs, side).clone() for _ in range(2))
        moved[:, :, place] += 1
        broken[:, :, place] = torch.nan
        plain = operator.reference(inputs).out
        sees = (plain != operator.reference(dataclasses.replace(inputs, **{side: moved})).out).any(-1)
        got = run(operator, dataclasses.replace(inputs, **{side: broken})).out
        assert torch.equal(got.isnan().any(-1), sees)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 0}, "block must be a positive number"),
        ({"block": 8, "rank": 3}, "ranks that fit: 1, 2, 4, 8"),
        ({"block": 8, "rank": 16}, r"between 1 and block \(8\), got 16"),
        ({"rank": 0}, "rank must be between 1"),
        ({"sinks": -1}, "sinks must be between 0"),
        ({"block": 8, "rank": 2, "sinks": 9}, r"between 0 and block \(8\), got 9"),
        ({"basis": "haar"}, "bases: mean, depthwise"),
        ({"boundary": "mirror"}, "boundaries: clean, zero_pad"),
        ({"boundary": "zero_pad"}, "has no sinks, got sinks=4"),
        ({"blocks": 64}, "valid options: version, block, rank, basis, scale_attn, sinks"),
    ],
)
def test_configurations_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        make_operator("fma", **options)


def test_a_configuration_of_the_wrong_type():
    with pytest.raises(TypeError, match="block of FmaConfig must be int"):
        make_operator("fma", block="64")


@pytest.mark.parametrize("block", [1, 3, 20, 48])
def test_any_block_size_serves(block):
    inputs = make_inputs("causal", dtype=torch.float64)
    operator = make_operator("fma", block=block, rank=1, sinks=1)
    assert torch.allclose(run(operator, inputs).out, operator.reference(inputs).out, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "cross", "query_len": 40}, "cross attention"),
        ({"query_len": 40}, "40 queries and 75 keys"),
        ({"query_len": 1, "key_len": 1}, "decoding"),
        ({"mask": MaskStructure.parse("causal & chunk(8)")}, "chunked attention"),
        ({"mask": MaskStructure.parse("causal & prefix(8)")}, "prefix"),
        ({"mask": MaskStructure.parse("right(-2)")}, "shifted by -2"),
        ({"mask": MaskStructure.parse("left(-2)")}, "own position"),
    ],
)
def test_sites_it_refuses(change, words):
    support = make_operator("fma").supports(dataclasses.replace(make_inputs("causal").spec(), **change))
    assert not support and words in support.reason


@pytest.mark.parametrize("mask", ["none", "causal & end_aligned", "right(5)", "left(9) & key_padding"])
def test_sites_it_serves(mask):
    assert make_operator("fma").supports(make_inputs(mask).spec())


def test_a_refused_site_says_so_when_called():
    inputs = make_inputs("causal & chunk(8)")
    with pytest.raises(ValueError, match=r"fma cannot serve this attention: chunked attention"):
        run(make_operator("fma"), inputs)


def test_parameters_follow_the_length():
    operator = make_operator("fma", block=8, rank=2, basis="depthwise")
    shapes = operator.parameter_shapes(make_inputs("causal", length=64, value_dim=6).spec())
    assert list(shapes.items()) == [
        ("key_weight_1", (8, 2, 8)),
        ("key_bias_1", (8, 2)),
        ("value_weight_1", (6, 2, 8)),
        ("value_bias_1", (6, 2)),
        ("key_weight_2", (8, 2, 16)),
        ("key_bias_2", (8, 2)),
        ("value_weight_2", (6, 2, 16)),
        ("value_bias_2", (6, 2)),
    ]
    initial = operator.initial_parameters(make_inputs("causal", length=64, value_dim=6).spec())
    assert {name: tuple(value.shape) for name, value in initial.items()} == shapes
    assert make_operator("fma", block=8, rank=2).parameter_shapes(make_inputs("causal").spec()) == {}


def test_shorter_sequences_use_the_first_levels_and_longer_ones_are_refused():
    operator = make_operator("fma", block=8, rank=2, basis="depthwise")
    parameters = make_parameters(operator, make_inputs("causal", length=64))
    inputs = make_inputs("causal", length=30)
    given, params, sources = leaves(inputs, parameters)
    output = run(operator, given, params)
    assert torch.equal(output.out, run(operator, inputs, parameters[:4]).out)
    grads = torch.autograd.grad(output.out.sum(), sources)
    assert grads[3].any() and not any(g.any() for g in grads[7:])
    with pytest.raises(ValueError, match=r"created for at most 64 tokens \(2 levels\).*has 65 \(3 levels\)"):
        run(operator, make_inputs("causal", length=65), parameters)


def test_parameters_of_another_shape_are_refused():
    operator = make_operator("fma", block=8, rank=2, basis="depthwise")
    inputs = make_inputs("causal", length=30)
    parameters = make_parameters(operator, inputs)
    with pytest.raises(ValueError, match=r"key_weight_1 of fma must have shape \(8, 2, 8\)"):
        run(operator, inputs, (parameters[0][:4], *parameters[1:]))
    with pytest.raises(ValueError, match="4 parameters a level, got 3"):
        run(operator, inputs, parameters[:3])
    with pytest.raises(ValueError, match="has no parameters, got 4"):
        run(make_operator("fma", block=8, rank=2), inputs, parameters)


def test_key_padding_turns_itself_on():
    inputs = make_inputs("causal & key_padding")
    operator = make_operator("fma", block=8, rank=2)
    out, _ = attend(
        inputs.query, inputs.key, inputs.value, operator, scale=inputs.scale, mask="causal",
        key_padding=inputs.key_padding,
    )  # fmt: skip
    assert torch.equal(out, run(operator, inputs).out)
