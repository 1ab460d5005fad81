"""Keys pooled without their rotary embedding: what that means, with which configurations, and in decoding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import assert_as_good_as, cast, gradients, leaves, make_inputs, make_parameters, run
from torch import Tensor

from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.kernels.rotary import Rotary, Turn
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.fma import FastMultipoleAttention
from fastattn_compile.operators.registry import make_operator

SMALL = {"block": 8, "rank": 2, "sinks": 3, "rotary_base": 50.0}
LENGTH = 75


def rotary(**options: object) -> FastMultipoleAttention:
    return make_operator("fma", **{**SMALL, **options})


def embedded(
    x: Tensor, place: Tensor, base: float, interleaved: bool = False, dims: int | None = None
) -> Tensor:
    """The rotary embedding as models write it, as complex numbers, of vectors ``(..., n, c)``."""
    dims = x.shape[-1] if dims is None else dims
    head = x[..., :dims]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
    numbers = torch.view_as_complex(pairs.double().contiguous())
    angles = place[:, None] * base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    made = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles))
    made = made.flatten(-2) if interleaved else made.mT.flatten(-2)
    return torch.cat([made, x[..., dims:].double()], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [8, 4])
def test_the_rotation_is_that_of_models(interleaved: bool, dims: int) -> None:
    x = make_inputs("causal", dtype=torch.float64).key
    place = torch.arange(LENGTH, dtype=torch.float64) + 1000
    turn = Rotary(50.0, dims, interleaved).at(place, torch.float64)
    wanted = embedded(x, place, 50.0, interleaved, dims)
    torch.testing.assert_close(turn.redo(x), wanted)
    torch.testing.assert_close(turn.undo(wanted), x)
    assert Turn().undo(x) is x


def test_the_half_split_embedding_is_that_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = make_inputs("causal", dtype=torch.float64).key
    place = torch.arange(LENGTH, dtype=torch.float64)
    angles = place[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.cat([angles, angles], -1)[None]
    wanted, _ = llama.apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(Rotary(10000.0, 8).at(place, torch.float64).redo(x), wanted)


FORMS = [{}, {"rotary_interleaved": True}, {"rotary_dim": 4}, {"rank": 1}, {"rank": 8}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_one_vector_at_all_positions_stands_at_the_centres_of_its_rows(options: dict[str, object]) -> None:
    """Keys ``R(t) c`` make rows ``R(centre) c``, exactly: this fixes which way keys are turned, and back."""
    operator = rotary(sinks=0, **options)
    inputs = make_inputs("causal", heads=2, kv_heads=2, length=32, dtype=torch.float64)
    form = bool(options.get("rotary_interleaved")), int(options.get("rotary_dim", 8))
    same = inputs.key[:, :, :1]

    def key_at(place: Tensor) -> Tensor:
        return embedded(same.expand(-1, -1, len(place), -1), place, 50.0, *form)

    inputs = dataclasses.replace(inputs, key=key_at(torch.arange(32.0)))
    # The last block meets two blocks exactly, and two groups of the only level: 16 tokens in rows of ``part``.
    part = 8 // operator.config.rank
    centres = torch.arange(16.0).unflatten(0, (-1, part)).mean(1)
    keys = torch.cat([key_at(centres), inputs.key[:, :, 16:]], 2)
    rows = inputs.value[:, :, :16].unflatten(2, (-1, part)).mean(3)
    values = torch.cat([rows, inputs.value[:, :, 16:]], 2)
    count = torch.cat([torch.full((len(centres),), float(part)), torch.ones(16)])
    scores = inputs.scale * inputs.query[:, :, -1:] @ keys.mT + count.double().log()
    for got in (run(operator, inputs), operator.reference(inputs)):
        torch.testing.assert_close(got.out[:, :, -1:], scores.softmax(-1) @ values)
        torch.testing.assert_close(got.log_sum_exp[:, :, -1:], scores.logsumexp(-1))
    plain = run(
        make_operator("fma", **{**SMALL, "sinks": 0, "rotary_base": 0.0, "rank": operator.config.rank}),
        inputs,
    )
    moved = (plain.out - run(operator, inputs).out).abs().amax()
    assert moved > 1e-3 or part == 1


@pytest.mark.parametrize("mask", ["causal", "none", "causal & segments"])
def test_with_means_it_does_not_matter_where_positions_begin(mask: str) -> None:
    """A model may count positions anew in every document or not: only differences inside a group count."""
    inputs, results = make_inputs(mask, dtype=torch.float64), []
    for start in (0.0, 1000.0):
        q, k = (embedded(x, torch.arange(75.0) + start, 50.0) for x in (inputs.query, inputs.key))
        results.append(run(rotary(), dataclasses.replace(inputs, query=q, key=k)))
    torch.testing.assert_close(results[0].out, results[1].out)
    torch.testing.assert_close(results[0].log_sum_exp, results[1].log_sum_exp)


def test_positions_are_counted_over_real_tokens() -> None:
    """Tokens that are padding in the middle of a group leave no gap between those beside them."""
    inputs = make_inputs("none", batch=1, heads=2, kv_heads=2, length=64, dtype=torch.float64)
    real = torch.ones(1, 64, dtype=torch.bool)
    real[0, [2, 35, 36, 51]] = False
    place = (real[0].cumsum(0) - 1).double()
    key = embedded(inputs.key[:, :, :1].expand_as(inputs.key), place, 50.0)
    mask = dataclasses.replace(inputs.mask, key_padding=True)
    got = run(rotary(sinks=0, rank=1), dataclasses.replace(inputs, key=key, key_padding=real, mask=mask))
    # The first block meets block 1 exactly, and groups of 8, 16 ... at their centres.
    scores, length = [], 0
    for first, last in [*((t, t + 1) for t in range(16)), (16, 24), (24, 32), (32, 48), (48, 64)]:
        count = real[0, first:last].sum()
        if not count:
            continue
        centre = place[first:last][real[0, first:last]].mean()
        row = embedded(inputs.key[:, :, :1], centre[None], 50.0)
        scores.append(inputs.scale * (inputs.query[:, :, 0] * row[:, :, 0]).sum(-1) + count.log())
        length += int(count)
    assert length == 60
    torch.testing.assert_close(got.log_sum_exp[:, :, 0], torch.stack(scores, -1).logsumexp(-1))


@pytest.mark.parametrize(
    "options", [{"basis": b} for b in ("mean", "depthwise", "dense", "recursive")] + FORMS[1:3], ids=str
)
@pytest.mark.parametrize(
    "mask",
    ["none", "causal", "causal & window(21)", "causal & key_padding", "key_padding", "causal & segments"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_follow_the_definition(
    dtype: torch.dtype, mask: str, options: dict[str, object]
) -> None:
    operator = rotary(**options)
    inputs = make_inputs(mask, dtype=dtype)
    if not operator.supports(inputs.spec()):
        assert operator.learned and inputs.mask.segments
        return
    parameters = make_parameters(operator, inputs)
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=dtype)

    def of(evaluate, given: AttentionInputs, params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given, params, sources = leaves(given, params)
        output = evaluate(given, params)
        found = gradients(output, sources, tuple(s.to(given.value.dtype) for s in seeds))
        return output.out, output.log_sum_exp, *found

    got = of(lambda i, p: run(operator, i, p), inputs, parameters)
    formula = of(operator.reference, inputs, parameters)
    oracle = of(operator.reference, cast(inputs, torch.float64), tuple(p.double() for p in parameters))
    for at, (g, f, o) in enumerate(zip(got, formula, oracle)):
        assert_as_good_as(g, oracle=o, formula=f, name=f"result {at}")


@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
@pytest.mark.parametrize("mask", ["causal", "none"])
def test_gradcheck(mask: str, basis: str) -> None:
    operator = rotary(basis=basis)
    inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, length=35, head_dim=4, dtype=torch.float64)
    inputs, _, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q: Tensor, k: Tensor, v: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        output = run(operator, dataclasses.replace(inputs, query=q, key=k, value=v), params)
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


def test_who_serves_it_and_a_choice_of_other_kernels_is_told_so() -> None:
    inputs = make_inputs("causal")
    with recorded_kernels() as served:
        run(rotary(), inputs)
    assert served == {"fma forward": "aten" if build.obstacle() else "cpp"}
    with use_kernels("triton"), pytest.raises(RuntimeError, match="cannot serve this call"):
        run(rotary(), inputs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rotary_base": 1.0}, "greater than 1"),
        ({"rotary_base": float("inf")}, "finite number"),
        ({"rotary_dim": 3}, "even number of channels"),
        ({"rotary_dim": -2}, "even number of channels"),
        ({"rotary_base": 0.0, "rotary_dim": 4}, "give its rotary_base"),
        ({"rotary_base": 0.0, "rotary_interleaved": True}, "give its rotary_base"),
        ({"queries": "pooled", "sinks": 0}, "not defined with rotary_base"),
        ({"grid": (8, 8), "block": 16}, "not defined on a grid: rotary_base"),
    ],
    ids=str,
)
def test_configurations_that_mean_nothing(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rotary(**{**options, "sinks": 0} if "grid" in options else options)


@pytest.mark.parametrize(
    ("options", "mask", "head_dim", "text"),
    [
        ({}, "causal", 7, "head_dim 7 is odd"),
        ({"rotary_dim": 16}, "causal", 8, "more than the 8 channels"),
        ({"basis": "dense"}, "causal & segments", 8, "positions of packed documents"),
        ({}, "causal + alibi", 8, "bias by distance"),
        ({}, "causal + bucketed", 8, "bias by distance"),
    ],
    ids=str,
)
def test_sites_that_are_refused(options: dict[str, object], mask: str, head_dim: int, text: str) -> None:
    assert text in rotary(**options).supports(make_inputs(mask, head_dim=head_dim).spec()).reason
