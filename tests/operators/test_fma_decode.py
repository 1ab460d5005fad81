"""Decoding by fast multipole attention: a prefill and its steps give what one pass over all tokens gives."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from oracle import make_inputs, make_parameters

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator

ROTARY = {"rotary_base": 50.0}


def prefix(inputs: AttentionInputs, length: int) -> AttentionInputs:
    q, k, v = (x[:, :, :length] for x in (inputs.query, inputs.key, inputs.value))
    padding = None if inputs.key_padding is None else inputs.key_padding[:, :length]
    return dataclasses.replace(inputs, query=q, key=k, value=v, key_padding=padding)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sinks": 0},
        {"scale_attn": False},
        {"rank": 8},
        {"basis": "depthwise"},
        {"basis": "dense"},
        {"basis": "recursive"},
        ROTARY,
        {**ROTARY, "sinks": 0},
        {**ROTARY, "rotary_interleaved": True, "rotary_dim": 4},
        {**ROTARY, "basis": "depthwise"},
        {**ROTARY, "basis": "recursive"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "mask",
    ["causal", "causal & window(50)", "causal & key_padding", "causal + alibi", "causal & key_padding + alibi",
     "causal & window(50) + bucketed"],
)  # fmt: skip
@pytest.mark.parametrize("prefilled", [1, 16, 37, 96])
def test_decoding_equals_one_pass(prefilled: int, mask: str, options: dict[str, object]) -> None:
    operator = make_operator("fma", **{"block": 8, "rank": 2, "sinks": 3, **options})
    inputs = make_inputs(mask, length=140, value_dim=6, dtype=torch.float64)
    if not (support := operator.supports(inputs.spec())):
        pytest.skip(support.reason)
    if inputs.key_padding is not None:
        inputs.key_padding[:, prefilled:] = True  # decoded tokens are real
    parameters = make_parameters(operator, inputs)
    wanted = operator.reference(inputs, parameters)
    decoder = operator.decoder(inputs.scale, parameters)
    outputs = [decoder.prefill(prefix(inputs, prefilled))]
    for t in range(prefilled, 140):
        outputs.append(decoder.step(*(x[:, :, t : t + 1] for x in (inputs.query, inputs.key, inputs.value))))
    torch.testing.assert_close(torch.cat([o.out for o in outputs], 2), wanted.out)
    torch.testing.assert_close(torch.cat([o.log_sum_exp for o in outputs], 2), wanted.log_sum_exp)


def test_the_state_grows_with_the_logarithm_of_the_length() -> None:
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    rows = []
    for length in (64, 128, 256, 512):
        decoder = operator.decoder(1.0)
        decoder.prefill(make_inputs("causal", length=length))
        rows.append(decoder.stored_rows())
    assert [b - a for a, b in pairwise(rows)] == [8, 8, 8]
    assert rows[0] < 64


def test_a_bias_that_ends_before_the_sequence() -> None:
    operator = make_operator("fma", block=8, rank=2)
    inputs = make_inputs("causal + bucketed", length=32)
    decoder = operator.decoder(1.0)
    decoder.prefill(inputs)
    with pytest.raises(ValueError, match="distances of 32 tokens"):
        decoder.step(*(x[:, :, :1] for x in (inputs.query, inputs.key, inputs.value)))


def test_what_cannot_be_decoded_is_refused() -> None:
    operator = make_operator("fma", block=8, rank=2)
    with pytest.raises(ValueError, match="needs a causal mask"):
        operator.decoder(1.0).prefill(make_inputs("none"))
    with pytest.raises(RuntimeError, match="prefill before step"):
        operator.decoder(1.0).step(*(torch.zeros(1, 1, 1, 2),) * 3)
    learned = make_operator("fma", block=8, rank=2, basis="depthwise")
    inputs = make_inputs("causal", length=32, dtype=torch.float32)
    decoder = learned.decoder(1.0, make_parameters(learned, inputs))
    decoder.prefill(inputs)
    with pytest.raises(ValueError, match="created for at most 32 tokens"):
        decoder.step(inputs.query[:, :, :1], inputs.key[:, :, :1], inputs.value[:, :, :1])
