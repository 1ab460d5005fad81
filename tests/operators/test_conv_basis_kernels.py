"""Every way conv-basis attention is computed, against its dense definition."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_as_good_as,
    cast,
    gradients,
    leaves,
    make_inputs,
    make_parameters,
    relative_error,
    run,
)

from fastattn_compile.errors import NumericError
from fastattn_compile.kernels.aten import conv as conv_aten
from fastattn_compile.kernels.aten.conv_pattern import Pattern, make_sides
from fastattn_compile.kernels.aten.conv_profiles import row_maxima
from fastattn_compile.kernels.aten.conv_sums import fast_length, transform_length
from fastattn_compile.operators.registry import make_operator

MASKS = [
    "causal", "none", "causal & window(9)", "left(4) & right(6)", "left(7) & right(-2)", "key_padding",
    "causal & key_padding", "causal & window(9) & key_padding",
]  # fmt: skip
ANCHORS = ["sink_strided", "strided", "recover", "jumps"]
FORMS = ["fft", "buckets", "gather"]


def compare(operator, inputs, parameters=()):
    """Largest difference from the definition in outputs and all gradients, relative to the largest number."""
    given, params, sources = leaves(inputs, parameters)
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    seeds = torch.randn(shape, dtype=torch.float64), torch.randn(shape[:3], dtype=torch.float64)
    got, wanted = run(operator, given, params), operator.reference(given, params)
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-10
    pairs = [(got.out, wanted.out)]
    pairs += zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds))
    differences = [(g - w).abs().max() / w.abs().max().clamp(min=1) for g, w in pairs]
    return float(torch.stack(differences).max().detach())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_both_gradients_equal_the_definition(mask, anchors, form):
    inputs = make_inputs(mask, length=37, head_dim=5, value_dim=3, dtype=torch.float64)
    for gradient, share in itertools.product(["implemented", "softmax_formula"], [False, True]):
        operator = make_operator(
            "conv_basis",
            k=5,
            anchors=anchors,
            delta=2.0,
            probe=3,
            form=form,
            gradient=gradient,
            share_anchors=share,
        )
        assert compare(operator, inputs) < 1e-9


@pytest.mark.parametrize("uncovered", ["ones", "zeros"])
@pytest.mark.parametrize("mask", ["causal", "none", "key_padding"])
@pytest.mark.parametrize("form", FORMS)
def test_columns_before_the_first_anchor(uncovered, mask, form):
    """First columns with small scores are no anchors; the three treatments of them differ."""
    inputs = make_inputs(mask, length=37, dtype=torch.float64)
    inputs.key[:, :, :5] *= 1e-3
    inputs.key[:, :, -5:] *= 1e-3
    options = {"k": 4, "anchors": "recover", "delta": 1.0, "probe": 3, "form": form}
    operator = make_operator("conv_basis", uncovered=uncovered, **options)
    assert compare(operator, inputs) < 1e-9
    anchored = run(make_operator("conv_basis", **options), inputs)
    assert relative_error(run(operator, inputs).out, anchored.out) > 1e-3


@pytest.mark.parametrize(
    "mask", ["causal", "causal & window(9)", "none", "left(4) & right(6)", "causal & key_padding"]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["implemented", "softmax_formula"])
def test_learned_biases_and_their_gradients(mask, form, gradient):
    inputs = make_inputs(mask, length=29, dtype=torch.float64)
    operator = make_operator(
        "conv_basis", k=4, form=form, gradient=gradient, offset_bias="learned", key_bias=True
    )
    assert operator.learned
    parameters = tuple(10 * p for p in make_parameters(operator, inputs))
    assert [p.shape for p in parameters] == [(4, 29 if inputs.mask.causal else 57), (1, 4, 29)]
    assert compare(operator, inputs, parameters) < 1e-9
    # A bias of one sequence, shared by the heads, longer than the sequence, with keys that it hides.
    by_key = torch.randn(2, 1, 33, dtype=torch.float64)
    by_key[0, 0, 3:6], by_key[1, 0, 20:] = -torch.inf, -torch.inf
    assert compare(operator, inputs, (parameters[0], by_key)) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"offset_bias": "learned", "key_bias": True}, {"anchors": "recover", "delta": 2.0}]
)
def test_finite_differences(form, options):
    inputs = make_inputs("causal", batch=1, heads=2, kv_heads=1, length=19, head_dim=3, dtype=torch.float64)
    operator = make_operator("conv_basis", k=4, form=form, **options)
    inputs, _, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q, k, v, *parameters):
        output = run(operator, dataclasses.replace(inputs, query=q, key=k, value=v), parameters)
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


def test_the_two_gradients_differ():
    inputs = make_inputs("causal", length=40, dtype=torch.float64)
    found = []
    for gradient in ("implemented", "softmax_formula"):
        given, _, sources = leaves(inputs, ())
        out = run(make_operator("conv_basis", k=5, gradient=gradient), given).out
        found.append(torch.autograd.grad((out * torch.arange(8)).sum(), sources))
    assert torch.equal(found[0][2], found[1][2])
    assert (found[0][1] == 0).all(-1).sum(-1).eq(35).all(), "only anchors have a gradient"
    assert (found[1][1] != 0).any(-1).all(), "every key has one"


@pytest.mark.parametrize("form", ["fft", "buckets"])
@pytest.mark.parametrize("mask", ["causal", "none"])
def test_transforms_are_as_accurate_as_float32(form, mask):
    """Transforms in float64 of float32 inputs: as good as the definition in float32, forward and backward."""
    inputs = make_inputs(mask, length=200, dtype=torch.float32)
    operator = make_operator("conv_basis", k=9, form=form)
    seeds = torch.randn(2, 4, 200, 8), torch.randn(2, 4, 200)
    found = []
    for evaluate, tensors in (
        (lambda i: run(operator, i), inputs),
        (operator.reference, cast(inputs, torch.float64)),
        (operator.reference, inputs),
    ):
        tensors, _, sources = leaves(tensors, ())
        output = evaluate(tensors)
        found.append([output.out, output.log_sum_exp, *gradients(output, sources, seeds)])
    for got, oracle, formula in zip(*found):
        assert_as_good_as(got, oracle=oracle, formula=formula)


# Scores of a standard deviation of 1 to 15, where the plain transform loses rows (specification 15)


def stressed(spread: float, mask: str = "causal", length: int = 300):
    inputs = make_inputs(mask, batch=1, heads=2, kv_heads=1, length=length, head_dim=16, dtype=torch.float64)
    return dataclasses.replace(inputs, scale=spread / 4.0)


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0, 10.0, 15.0])
@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(50)"])
@pytest.mark.parametrize("form", ["buckets", "gather", "auto"])
def test_any_range_of_scores(spread, mask, form):
    operator = make_operator("conv_basis", k=4, anchors="strided", form=form)
    assert compare(operator, stressed(spread, mask)) < 1e-9


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_plain_transforms_refuse_a_range_they_cannot_tell_apart(spread):
    operator = make_operator("conv_basis", k=4, anchors="strided", form="fft")
    if spread == 1.0:
        assert compare(operator, stressed(spread)) < 1e-9
    else:
        with pytest.raises(NumericError, match="largest scores of the rows lie too far apart"):
            run(operator, stressed(spread))


@pytest.mark.parametrize("spread", [6.0, 10.0])
def test_narrow_buckets_keep_half_the_digits_of_float32(spread):
    inputs = cast(stressed(spread), torch.float32)
    operator = make_operator("conv_basis", k=4, anchors="strided", form="buckets", transform="float32")
    oracle = operator.reference(cast(inputs, torch.float64))
    assert relative_error(run(operator, inputs).out, oracle.out) < torch.finfo(torch.float32).eps ** 0.5


def test_transforms_in_float32_refuse_when_the_first_rows_drown():
    """A row of one key is small beside rows of many, however alike the scores are."""
    operator = make_operator("conv_basis", k=4, anchors="strided", form="buckets", transform="float32")
    with pytest.raises(NumericError, match="lose a row"):
        run(operator, cast(stressed(1.0, length=1000), torch.float32))


def test_auto_takes_the_cheapest_form_that_is_safe(monkeypatch):
    used = []
    for module, name in ((conv_aten.conv_fft, "forward"), (conv_aten.conv_gather, "forward")):
        original = getattr(module, name)

        def spy(*args, original=original, module=module):
            used.append((module.__name__.rsplit("_", 1)[1], len(args[-1].live) if len(args) == 5 else 0))
            return original(*args)

        monkeypatch.setattr(module, name, spy)
    operator = make_operator("conv_basis", k=4, anchors="strided")
    for inputs in (stressed(1.0, length=100), stressed(1.0, length=2048), stressed(8.0, length=2048)):
        used.clear()
        run(operator, inputs)
        if inputs.key.shape[2] == 100:
            assert used == [("gather", 0)]
        elif inputs.scale < 1:
            assert used == [("fft", 1)]
        else:
            assert used[0] == ("fft", 1) and used[1][0] == "fft" and used[1][1] > 1


@pytest.mark.parametrize("gap", [10.0, 60.0])
def test_rows_whose_largest_scores_weigh_nothing_take_the_tiles(gap):
    """Buckets go by scores; where key weights leave only small ones, transforms would lose the row."""
    inputs = stressed(1.0, length=700)
    operator = make_operator("conv_basis", k=2, anchors="strided", key_bias=True)
    assert not conv_aten.prefers_gather(operator._pattern(inputs), 700, 16)
    bias = torch.zeros(1, 1, 700, dtype=torch.float64)
    bias[:, :, ::7] = gap
    bias[:, :, 0] = 0
    inputs = dataclasses.replace(inputs, query=inputs.query.abs())
    assert compare(operator, inputs, (bias,)) < 1e-9


def test_an_input_that_is_not_finite_takes_the_tiles():
    inputs = make_inputs("causal", batch=1, heads=1, kv_heads=1, length=2048, dtype=torch.float64)
    inputs.value[0, 0, 1500, 0] = torch.nan
    got = run(make_operator("conv_basis", k=3, anchors="strided"), inputs)
    assert got.out[0, 0, 1500:, 0].isnan().all() and torch.isfinite(got.out[0, 0, :1500]).all()
    with pytest.raises(NumericError, match="not finite"):
        run(make_operator("conv_basis", k=3, form="fft"), inputs)


@pytest.mark.parametrize("anchors", ["sink_strided", "strided"])
@pytest.mark.parametrize("form", FORMS)
def test_the_future_does_not_move_the_past(anchors, form):
    """Bit by bit in tiles; a transform mixes rows, so there up to its rounding."""
    inputs = make_inputs("causal", length=130, dtype=torch.float64)
    operator = make_operator("conv_basis", k=8, anchors=anchors, form=form)
    before = run(operator, inputs)
    for now in (1, 40, 129):
        tensors = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
        for x in tensors:
            x[:, :, now:] = torch.randn_like(x[:, :, now:])
        after = run(operator, dataclasses.replace(inputs, query=tensors[0], key=tensors[1], value=tensors[2]))
        moved = (before.out - after.out)[:, :, :now].abs().max()
        assert moved == 0 if form == "gather" else moved < 1e-11
        assert not torch.equal(before.out[:, :, now:], after.out[:, :, now:])


def test_recover_places_anchors_by_later_tokens():
    """The leak that the documentation names: the reason why Recover is not the default."""
    inputs = make_inputs("causal", length=60, dtype=torch.float64)
    operator = make_operator("conv_basis", k=6, anchors="recover", delta=6.0)
    changed = inputs.query.clone()
    changed[:, :, 30:] = torch.randn_like(changed[:, :, 30:])
    after = run(operator, dataclasses.replace(inputs, query=changed)).out
    assert not torch.allclose(run(operator, inputs).out[:, :, :30], after[:, :, :30])


def test_no_wrap_around_at_the_shortest_transform():
    inputs = make_inputs("causal", length=243, batch=1, dtype=torch.float64)
    for k in (1, 2, 7):
        pattern = Pattern(k, anchors="strided")
        query, key = inputs.query.unflatten(1, (2, 2)), inputs.key.unsqueeze(2)
        (side,) = make_sides(
            dataclasses.replace(pattern, right=0), query, key, 1.0, torch.zeros(1, 243, dtype=torch.bool)
        )
        assert transform_length(side) == fast_length(243 + -(-243 // k))
        assert compare(make_operator("conv_basis", k=k, anchors="strided", form="fft"), inputs) < 1e-11


@pytest.mark.parametrize("anchors", ANCHORS)
def test_a_sequence_of_nan_gives_nan(anchors):
    inputs = make_inputs("causal", length=30)
    inputs.query[:], inputs.key[:] = torch.nan, torch.nan
    assert run(make_operator("conv_basis", k=8, anchors=anchors, probe=4), inputs).out.isnan().all()


def test_fast_lengths_have_small_factors_and_are_the_smallest():
    small = sorted(2**a * 3**b * 5**c for a in range(11) for b in range(7) for c in range(5))
    for least in (1, 2, 7, 11, 121, 487, 1025):
        assert fast_length(least) == next(x for x in small if x >= least)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_row_maxima_are_the_largest_scores(window):
    inputs = make_inputs(f"causal & window({window})", length=40, batch=1, dtype=torch.float64)
    pattern = Pattern(6, anchors="jumps", left=window - 1, right=0)
    query, key = inputs.query.unflatten(1, (2, 2)), inputs.key.unsqueeze(2)
    sides = make_sides(pattern, query, key, 1.0, torch.zeros(1, 40, dtype=torch.bool))
    scores = conv_aten.conv_gather.row_scores(
        sides, torch.zeros(1, 1, 1, 40, dtype=torch.float64), torch.arange(40)
    )
    assert torch.equal(row_maxima(sides[0]), scores.amax(-1))


def test_work_is_split_by_heads_without_a_trace(monkeypatch):
    inputs = make_inputs("causal & key_padding", heads=6, kv_heads=3, length=50)
    operator = make_operator("conv_basis", k=5, key_bias=True)
    parameters = make_parameters(operator, inputs)
    whole = run(operator, inputs, parameters)
    monkeypatch.setattr(conv_aten, "_PROFILE_BUDGET", 1)
    parts = run(operator, inputs, parameters)
    assert torch.allclose(whole.out, parts.out, atol=1e-6)


def test_memory_grows_with_n_not_with_its_square():
    """The largest tensor of a forward pass by transforms: profiles and spectra, O(k n + n d)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                    self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
            return result

    operator = make_operator("conv_basis", k=4, form="buckets")
    sizes = []
    for n in (512, 2048):
        inputs = make_inputs("causal", batch=1, heads=1, kv_heads=1, length=n)
        with Largest() as watch:
            output = operator.forward(inputs)
            operator.backward(inputs, (), output, torch.ones_like(output.out), None)
        sizes.append(watch.size)
    assert sizes[1] < 4.5 * sizes[0]
    assert sizes[1] < 2048 * 64


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_definition(data):
    group, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    length = data.draw(st.integers(1, 60))
    inputs = make_inputs(
        data.draw(st.sampled_from(MASKS)), batch=data.draw(st.integers(1, 2)), heads=group * kv_heads,
        kv_heads=kv_heads, length=length, head_dim=data.draw(st.integers(1, 5)),
        value_dim=data.draw(st.integers(1, 5)), dtype=torch.float64, seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    operator = make_operator(
        "conv_basis", k=data.draw(st.integers(1, length)), anchors=data.draw(st.sampled_from(ANCHORS)),
        form=data.draw(st.sampled_from(["auto", "buckets", "gather"])), sinks=data.draw(st.integers(0, 5)),
        gradient=data.draw(st.sampled_from(["implemented", "softmax_formula"])),
        share_anchors=data.draw(st.booleans()), probe=data.draw(st.integers(1, 9)), delta=1.5,
        uncovered=data.draw(st.sampled_from(["anchor", "ones", "zeros"])),
    )  # fmt: skip
    assert compare(operator, inputs) < 1e-9
