"""Local window attention: its definition, its reach, and its decoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import make_inputs, relative_error, run

from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator


def test_a_wide_window_is_exact_attention():
    for mask in ("causal", "none", "causal & key_padding"):
        inputs = make_inputs(mask, dtype=torch.float64)
        got, exact = run(make_operator("window", width=400), inputs), run(make_operator("exact"), inputs)
        assert relative_error(got.out, exact.out) < 1e-13
        assert relative_error(got.log_sum_exp, exact.log_sum_exp) < 1e-13


def test_a_causal_window_without_sinks_is_a_sliding_window_mask():
    inputs = make_inputs("causal", dtype=torch.float64)
    windowed = dataclasses.replace(inputs, mask=MaskStructure.parse("causal & window(10)"))
    got = run(make_operator("window", width=10, sinks=0), inputs)
    assert relative_error(got.out, run(make_operator("exact"), windowed).out) < 1e-13


def test_only_window_and_sinks_have_influence():
    inputs = make_inputs("causal")
    operator = make_operator("window", width=10, sinks=3)
    before = run(operator, inputs).out
    changed = inputs.value.clone()
    changed[:, :, 3:31] += 1
    moved = (run(operator, dataclasses.replace(inputs, value=changed)).out != before).any(-1)
    rows = torch.arange(75)
    assert torch.equal(moved, ((rows >= 3) & (rows < 40)).expand_as(moved))


@pytest.mark.parametrize("width", [1, 7, 32, 100])
@pytest.mark.parametrize("length", [1, 33, 130])
def test_every_width_and_length_equals_the_definition(width, length):
    for mask in ("causal", "none"):
        inputs = make_inputs(mask, length=length, dtype=torch.float64)
        operator = make_operator("window", width=width, sinks=2)
        got, wanted = run(operator, inputs), operator.reference(inputs)
        assert relative_error(got.out, wanted.out) < 1e-13


def test_queries_that_continue_a_cache():
    operator = make_operator("window", width=12, sinks=3)
    whole = make_inputs("causal", dtype=torch.float64)
    wanted = run(operator, whole).out[:, :, 58:]
    got, _ = attend(
        whole.query[:, :, 58:],
        whole.key,
        whole.value,
        operator,
        scale=whole.scale,
        mask="causal & end_aligned",
    )
    assert relative_error(got, wanted) < 1e-13


@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(9)", "left(20)"])
def test_the_cost_counts_the_keys_that_are_met(mask):
    inputs = make_inputs(mask)
    operator = make_operator("window", width=14, sinks=3)
    met = operator.exact_keys(inputs, torch.arange(75)).expand(2, 4, 75, 75)
    assert operator.cost(inputs.spec()).keys_per_query == pytest.approx(
        float(met[0, 0].sum(-1).double().mean())
    )


@pytest.mark.parametrize(
    "mask",
    [
        "causal",
        "causal & window(9)",
        "causal & key_padding",
        "causal & key_padding + alibi",
        "causal + bucketed",
    ],
)
@pytest.mark.parametrize("prefilled", [1, 2, 30])
def test_decoding_equals_one_pass(mask, prefilled):
    inputs = make_inputs(mask, dtype=torch.float64)
    if inputs.key_padding is not None:
        padding = inputs.key_padding.clone()
        padding[:, prefilled:] = True
        inputs = dataclasses.replace(inputs, key_padding=padding)
    operator = make_operator("window", width=12, sinks=3)
    wanted = run(operator, inputs)
    decoder = operator.decoder(inputs.scale)

    def part(x, span):
        return x[:, :, span]

    first = slice(0, prefilled)
    start = dataclasses.replace(
        inputs, query=part(inputs.query, first), key=part(inputs.key, first), value=part(inputs.value, first),
        key_padding=None if inputs.key_padding is None else inputs.key_padding[:, first],
    )  # fmt: skip
    outputs = [decoder.prefill(start)]
    for now in range(prefilled, 75):
        at = slice(now, now + 1)
        outputs.append(decoder.step(part(inputs.query, at), part(inputs.key, at), part(inputs.value, at)))
    assert decoder.stored_rows() <= 12 + 3
    assert relative_error(torch.cat([x.out for x in outputs], 2), wanted.out) < 1e-13
    assert relative_error(torch.cat([x.log_sum_exp for x in outputs], 2), wanted.log_sum_exp) < 1e-13


def test_decoding_needs_a_causal_prefill():
    decoder = make_operator("window").decoder(1.0)
    with pytest.raises(ValueError, match="causal"):
        decoder.prefill(make_inputs("none"))
    with pytest.raises(RuntimeError, match="prefill"):
        make_operator("window").decoder(1.0).step(*(torch.zeros(1, 1, 1, 2),) * 3)


def test_no_tensor_grows_with_the_square_of_the_length():
    inputs = make_inputs("causal", batch=1, heads=1, kv_heads=1, length=4096, head_dim=4)
    operator = make_operator("window", width=64)
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
    assert largest < 4096 * 4096


@pytest.mark.parametrize("options", [{"width": 0}, {"sinks": -1}, {"block": 3}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_operator("window", **options)


@pytest.mark.parametrize(("mask", "word"), [("chunk(16)", "chunk"), ("causal & prefix(9)", "prefix")])
def test_masks_it_cannot_honour(mask, word):
    support = make_operator("window").supports(make_inputs(mask).spec())
    assert not support and word in support.reason
