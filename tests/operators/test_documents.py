"""Packed documents: every one gives what it gives alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import gradients, leaves, make_inputs, make_parameters, relative_error, run
from packed import LENGTHS, alone, packed

from fastattn_compile.kernels.dispatch import recorded_kernels
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

OPERATORS = {
    "fma": ("fma", {"block": 8, "rank": 2, "sinks": 3}),
    "fma-depthwise": ("fma", {"block": 8, "rank": 2, "sinks": 3, "basis": "depthwise"}),
    "window": ("window", {"width": 12, "sinks": 3}),
    "barnes_hut": ("barnes_hut", {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 5, "beam": 4}),
    "barnes_hut-pool": (
        "barnes_hut",
        {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 5, "beam": 4, "rest": "pool"},
    ),
    "conv_basis": ("conv_basis", {"k": 16, "sinks": 3, "offset_bias": "alibi"}),
    "conv_basis-stride": ("conv_basis", {"k": 9, "sinks": 3, "stride": 7, "share_anchors": True}),
    "conv_basis-jumps": ("conv_basis", {"k": 16, "anchors": "jumps", "probe": 4}),
    "cast": (
        "cast",
        {"clusters": 5, "clustering": "token_choice", "cluster_size": 6, "combine": "lse", "select": "key"},
    ),
    "cast-paper": ("cast", {"clusters": 3, "clustering": "token_choice", "cluster_size": 6}),
    "tc": ("tc_attention", {"height": 3}),
    "tc-two-trees": (
        "tc_attention",
        {"height": 2, "n_trees": 2, "shared": False, "level_weights": "softmax"},
    ),
    "cast-sa": ("cast", {"clusters": 3, "clustering": "sa_topk", "combine": "lse"}),
}


@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(19)", "left(9)", "causal & key_padding"])
@pytest.mark.parametrize("case", OPERATORS)
def test_a_packed_batch_equals_its_documents(case, mask):
    name, options = OPERATORS[case]
    operator = make_operator(name, **options)
    inputs = packed(mask)
    if not operator.supports(inputs.spec()):
        pytest.skip(operator.supports(inputs.spec()).reason)
    given, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=torch.float64)
    together = run(operator, given, parameters)
    grads = gradients(together, sources, seeds)
    learned = [torch.zeros_like(p) for p in parameters]
    for sequence, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            span = slice(start, start := start + length)
            one, own, its = leaves(alone(inputs, sequence, span), parameters)
            single = operator.shortened(length) if name == "conv_basis" else operator
            # One token by itself is a decoding step to an operator, and few are not worth a tree: the definition says
            # what they mean.
            served = single.supports(one.spec())
            output = run(single, one, own) if served else single.reference(one, own)
            at = slice(sequence, sequence + 1)
            assert relative_error(together.out[at, :, span], output.out) < 1e-12
            assert relative_error(together.log_sum_exp[at, :, span], output.log_sum_exp) < 1e-12
            found = gradients(output, its, (seeds[0][at, :, span], seeds[1][at, :, span]))
            for whole, part in zip(grads[:3], found[:3]):
                assert torch.allclose(whole[at, :, span], part, atol=1e-11)
            for total, part in zip(learned, found[3:]):
                total += part
    for whole, total in zip(grads[3:], learned):
        assert torch.allclose(whole, total, atol=1e-10)


@pytest.mark.parametrize("case", OPERATORS)
def test_no_document_reads_another(case):
    name, options = OPERATORS[case]
    operator = make_operator(name, **options)
    inputs = packed("causal" if operator.supports(packed("causal").spec()) else "none")
    parameters = make_parameters(operator, inputs)
    before = run(operator, inputs, parameters)
    changed = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
    for x in changed:
        x[0, :, 5:76] = torch.nan
    after = run(
        operator,
        dataclasses.replace(inputs, query=changed[0], key=changed[1], value=changed[2]),
        parameters,
    )
    for a, b in ((before.out, after.out), (before.log_sum_exp, after.log_sum_exp)):
        assert torch.equal(a[:, :, :5], b[:, :, :5]) and torch.equal(a[:, :, 76:], b[:, :, 76:])
        assert b[0, :, 5:76].isnan().all() and torch.equal(a[1:], b[1:])


@pytest.mark.parametrize("case", OPERATORS)
def test_exact_keys_of_a_document(case):
    name, options = OPERATORS[case]
    operator, inputs = make_operator(name, **options), packed("causal")
    rows = torch.tensor([0, 70, 75, 100, 141])
    met = operator.exact_keys(inputs, rows).expand(3, 4, 5, 142)
    assert not (met & ~inputs.visible(rows)).any()
    one = alone(inputs, 0, slice(5, 76))
    alone_met = operator.exact_keys(one, torch.tensor([65, 70])).expand(1, 4, 2, 71)
    assert torch.equal(met[:1, :, 1:3, 5:76], alone_met)


def test_tokens_of_a_document_that_stand_apart():
    """They are a document, with positions of its own; but a window measures distances in the whole sequence."""
    inputs = packed("causal", torch.float64)
    inputs = dataclasses.replace(inputs, segments=torch.arange(142).expand(3, -1) % 2)
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    odd = alone(inputs, 1, slice(1, None, 2))
    out = run(operator, inputs).out
    assert relative_error(out[1:2, :, 1::2], run(operator, odd).out) < 1e-12
    assert relative_error(out, operator.reference(inputs).out) < 1e-12
    windowed = dataclasses.replace(inputs, mask=MaskStructure.parse("causal & window(9) & segments"))
    with pytest.raises(ValueError, match="stand side by side"):
        run(operator, windowed)


def test_fast_kernels_serve_packed_documents():
    inputs = packed("causal", torch.float32)
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    with recorded_kernels() as used:
        run(operator, inputs)
    with recorded_kernels() as used_alone:
        run(operator, alone(inputs, 0, slice(5, 76)))
    assert used == used_alone


@pytest.mark.parametrize("case", ["fma", "window", "barnes_hut", "conv_basis-stride"])
def test_decoding_begins_with_one_document(case):
    name, options = OPERATORS[case]
    with pytest.raises(ValueError, match="batch row of its own"):
        make_operator(name, **options).decoder(1.0).prefill(packed("causal"))


def test_the_unopened_mass_of_a_document():
    inputs = packed("causal")
    name, options = OPERATORS["barnes_hut"]
    operator = make_operator(name, **options)
    assert relative_error(
        operator.unopened_mass(inputs)[:1, :, 5:76], operator.unopened_mass(alone(inputs, 0, slice(5, 76)))
    ) < 1e-12  # fmt: skip


def test_queries_of_packed_documents_that_continue_a_cache():
    spec = make_inputs("causal & end_aligned & segments", length=20, key_len=33).spec()
    support = make_operator("window").supports(spec)
    assert not support and "packed documents" in support.reason
