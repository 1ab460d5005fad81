"""Biases by distance in fast multipole attention: what their definition implies, against exact attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import gradients, leaves, make_inputs, make_parameters, relative_error, run
from packed import alone, packed

from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.registry import make_operator


def as_table(inputs: AttentionInputs) -> AttentionInputs:
    """The slopes of an ALiBi bias as numbers by distance."""
    n = inputs.key.shape[2]
    distance = torch.arange(1 - n, n, dtype=inputs.bias.dtype).abs()
    return dataclasses.replace(inputs, bias=-inputs.bias[:, None] * distance)


@pytest.mark.parametrize("mask", ["causal + alibi", "none + alibi"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_alibi_is_exact_where_keys_agree(mask, kv_heads):
    """Values may be anything: the tokens of a row weigh among each other what ALiBi gives them."""
    inputs = make_inputs(mask, length=64, kv_heads=kv_heads, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, key=inputs.key[:, :, ::16].repeat_interleave(16, 2))
    operator, exact = make_operator("fma", block=4, rank=2, sinks=0), make_operator("exact")
    got, wanted = run(operator, inputs), run(exact, inputs)
    assert relative_error(got.out, wanted.out) < 1e-12
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-12
    # Means of equal weights are not.
    assert relative_error(run(operator, as_table(inputs)).out, wanted.out) > 1e-3


@pytest.mark.parametrize("mask", ["causal + alibi", "none + alibi", "key_padding + alibi", "none + bucketed"])
def test_the_mass_of_equal_scores_is_exact(mask):
    inputs = make_inputs(mask, length=80, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    for sinks in (0, 3) if "alibi" in mask else (0,):
        got = run(make_operator("fma", block=8, rank=2, sinks=sinks), inputs)
        assert relative_error(got.log_sum_exp, run(make_operator("exact"), inputs).log_sum_exp) < 1e-12


def test_a_constant_bias_changes_nothing():
    inputs = make_inputs("causal", dtype=torch.float64)
    operator = make_operator("fma", block=8, rank=2)
    flat = dataclasses.replace(inputs, bias=torch.full((4, 149), 2.5, dtype=torch.float64))
    plain, moved = run(operator, inputs), run(operator, flat)
    assert relative_error(moved.out, plain.out) < 1e-13
    assert relative_error(moved.log_sum_exp, plain.log_sum_exp + 2.5) < 1e-13
    none = dataclasses.replace(inputs, bias=torch.zeros(4, dtype=torch.float64))
    assert relative_error(run(operator, none).out, plain.out) < 1e-13


def test_steep_and_growing_slopes_stay_finite():
    """In float32, far beyond what exponentials of the distance hold."""
    inputs = make_inputs("causal", length=3000, batch=1, head_dim=4)
    for slope in (30.0, -0.5):
        given = dataclasses.replace(inputs, bias=torch.full((4,), slope))
        operator = make_operator("fma", block=16, rank=4)
        output = run(operator, given)
        exact = run(make_operator("exact"), given)
        assert torch.isfinite(output.out).all()
        # A query meets the tokens that weigh most exactly, or the row they are in.
        assert relative_error(output.log_sum_exp, exact.log_sum_exp) < 2e-3


@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_more_distances_than_tokens(basis):
    inputs = make_inputs("causal + bucketed", dtype=torch.float64)
    operator = make_operator("fma", block=8, rank=2, basis=basis)
    parameters = make_parameters(operator, inputs)
    wider = torch.nn.functional.pad(inputs.bias, (20, 20), value=3.0)
    longer = dataclasses.replace(inputs, bias=wider)
    assert (
        relative_error(run(operator, longer, parameters).out, run(operator, inputs, parameters).out) < 1e-12
    )


@pytest.mark.parametrize("kind", ["alibi", "bucketed"])
@pytest.mark.parametrize("basis", ["mean", "depthwise"])
def test_packed_documents_with_a_bias(kind, basis):
    inputs = packed("causal")
    inputs = dataclasses.replace(inputs, bias=make_inputs(f"causal + {kind}", length=142).bias.double())
    operator = make_operator("fma", block=8, rank=2, sinks=3, basis=basis)
    given, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=torch.float64)
    got, wanted = run(operator, given, parameters), operator.reference(given, parameters)
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert torch.allclose(g, w, atol=1e-10)
    part = run(operator, alone(inputs, 0, slice(5, 76)), parameters)
    assert relative_error(got.out[:1, :, 5:76], part.out) < 1e-12


def test_kernels_without_biases_say_so():
    inputs = make_inputs("causal + alibi")
    operator = make_operator("fma", block=8, rank=2)
    with use_kernels("triton"), pytest.raises(RuntimeError, match="no bias by distance"):
        run(operator, inputs)
    wanted = "aten" if build.obstacle() else "cpp"
    with recorded_kernels() as used:
        run(operator, inputs)
    assert used == {"fma forward": wanted}


@pytest.mark.parametrize("name", ["exact", "fma"])
def test_slopes_get_no_gradient_and_say_so(name):
    inputs = make_inputs("causal + alibi")
    trained = dataclasses.replace(inputs, bias=inputs.bias.requires_grad_())
    with pytest.raises(ValueError, match="slopes of ALiBi get no gradient"):
        run(make_operator(name), trained)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.zeros(3), r"slopes of shape \(heads,\) = \(4,\)"),
        (torch.zeros(4, 148), r"at least \(4, 149\); got \(4, 148\)"),
        (torch.zeros(4, 147), "at least"),
        (torch.zeros(1, 4, 75, 75), "by distance"),
    ],
)
def test_biases_of_another_shape_are_refused(bias, words):
    inputs = make_inputs("causal")
    with pytest.raises(ValueError, match=words if bias.dim() < 4 else "dense"):
        attend(inputs.query, inputs.key, inputs.value, make_operator("fma"), mask="causal", bias=bias)
    if bias.dim() == 4:
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(inputs, bias=bias).validated()


@pytest.mark.parametrize("mask", ["causal + alibi", "none + alibi", "none + bucketed"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_in_many_passes_and_threads(mask, threads, monkeypatch):
    from fastattn_compile.kernels.aten import fma_tiles

    inputs = make_inputs(mask, length=203, heads=4, kv_heads=2)
    operator = make_operator("fma", block=8, rank=2)
    results = []
    try:
        torch.set_num_threads(threads)
        for size in (1, 1 << 13, 1 << 22):
            monkeypatch.setattr(fma_tiles, "SCORE_TILE", size)
            given, _, sources = leaves(inputs, ())
            output = run(operator, given)
            total = output.out.square().sum() + output.log_sum_exp.sum()
            results.append((output.out, output.log_sum_exp, *torch.autograd.grad(total, sources)))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert torch.allclose(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", ["none + alibi", "causal + alibi", "none + bucketed"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_reaches_exactly_the_queries_that_see_it(mask, side):
    inputs = make_inputs(mask, dtype=torch.float64)
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    for place in (1, 20, 70):
        moved, broken = (getattr(inputs, side).clone() for _ in range(2))
        moved[:, :, place] += 1
        broken[:, :, place] = torch.nan
        plain = operator.reference(inputs).out
        sees = (plain != operator.reference(dataclasses.replace(inputs, **{side: moved})).out).any(-1)
        got = run(operator, dataclasses.replace(inputs, **{side: broken})).out
        assert torch.equal(got.isnan().any(-1), sees)


@pytest.mark.parametrize("name", ["fma", "window", "exact"])
@pytest.mark.parametrize("kind", ["alibi", "bucketed"])
def test_no_tensor_grows_with_the_square_of_the_length(name, kind):
    n = 4096
    inputs = make_inputs(f"causal + {kind}", batch=1, heads=2, kv_heads=1, length=n, head_dim=4)
    options = {"fma": {"block": 16, "rank": 2}, "window": {"width": 32}, "exact": {}}[name]
    operator = make_operator(name, **options)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    with Watch():
        output = operator.forward(inputs)
        operator.backward(inputs, (), output, torch.ones_like(output.out), None)
    # A third of what the scores of one head would take.
    assert largest < 4 * n * n / 3


@pytest.mark.parametrize("kind", ["alibi", "bucketed"])
def test_the_bias_of_documents_whose_tokens_stand_apart(kind):
    """Distances are counted in the document's own tokens, by operators, by their definition and by reports."""
    inputs = make_inputs(f"causal & segments + {kind}", dtype=torch.float64)
    inputs = dataclasses.replace(inputs, segments=torch.arange(75).expand(2, -1) % 3 // 2)
    exact, rows = make_operator("exact"), torch.arange(75)
    keys, values = (x.repeat_interleave(2, 1) for x in (inputs.key, inputs.value))
    scores = inputs.scale * inputs.query @ keys.mT + inputs.added(rows)
    dense = scores.masked_fill(~inputs.visible(rows), -torch.inf).softmax(-1) @ values
    assert relative_error(run(exact, inputs).out, dense) < 1e-13
    assert relative_error(exact.reference(inputs).out, dense) < 1e-13
    near = make_operator("fma", block=64, rank=2)
    assert relative_error(run(near, inputs).out, dense) < 1e-13
    apart = dataclasses.replace(inputs, segments=torch.zeros_like(inputs.segments))
    assert relative_error(run(exact, apart).out, dense) > 1e-3
