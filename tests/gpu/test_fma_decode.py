"""Decoding by fast multipole attention in Triton against the torch form of the same state in float64."""

import pytest
import torch
from oracle import assert_as_good_as, make_inputs, make_parameters

from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.kernels.gpu import fma_decode
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.fma import decode as fma_state
from fastattn_compile.operators.registry import make_operator

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "value_dim": 24}

# Mask, tokens of the prompt, steps, configuration, sizes.
CASES = {
    "from-one-token": ("causal", 1, 36, {"block": 4}, {}),
    "padded": ("causal & key_padding", 45, 5, {}, {"batch": 2, "heads": 4, "kv_heads": 2}),
    "window": ("causal & window(30)", 62, 4, {"sinks": 0}, {}),
    "window-over-sinks": ("causal & window(20)", 2, 9, {"block": 4}, {}),
    "unweighted": ("causal", 47, 3, {"scale_attn": False, "rank": 8}, {"heads": 20}),
    "no-power-of-two": ("causal", 70, 4, {"block": 12, "rank": 3}, {"head_dim": 20}),
    "learned": ("causal & key_padding", 46, 3, {"basis": "depthwise"}, {"batch": 2}),
    "learned-from-one-token": ("causal & window(20)", 1, 17, {"basis": "depthwise", "block": 4}, {}),
    "float16": ("causal", 46, 4, {}, {"dtype": torch.float16}),
    "bfloat16": ("causal", 46, 4, {}, {"dtype": torch.bfloat16}),
}


@pytest.fixture
def on_gpu(device, monkeypatch):
    """On a machine without a GPU the interpreter stands in for one."""
    if device == "cpu":
        monkeypatch.setattr(fma_state, "gpu_obstacle", lambda *tensors: "")


def decode(operator, inputs, length, kernels, dtype, parameters=()):
    """Outputs of the steps after a prompt, and the decoder at its end."""
    tensors = [x.to(dtype) for x in (inputs.query, inputs.key, inputs.value)]
    padding = None if inputs.key_padding is None else inputs.key_padding[:, :length]
    decoder = operator.decoder(inputs.scale, tuple(p.to(dtype) for p in parameters))
    with use_kernels("aten"):
        prompt = [x[:, :, :length] for x in tensors]
        decoder.prefill(AttentionInputs(*prompt, inputs.scale, inputs.mask, padding))
    with use_kernels(kernels), recorded_kernels() as ran:
        steps = [
            decoder.step(*(x[:, :, i : i + 1] for x in tensors)) for i in range(length, tensors[0].shape[2])
        ]
    assert ran == {"fma decode": kernels}
    return steps, decoder


@pytest.mark.parametrize("case", CASES)
def test_steps(case, device, on_gpu):
    mask, length, steps, options, sizes = CASES[case]
    operator = make_operator("fma", **{"block": 8, "rank": 2, "sinks": 3, **options})
    inputs = make_inputs(mask, length=length + steps, **{**SMALL, **sizes})
    inputs = type(inputs)(
        *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(inputs).values())
    )
    dtype, parameters = inputs.query.dtype, tuple(p.to(device) for p in make_parameters(operator, inputs))
    got, state = decode(operator, inputs, length, "triton", dtype, parameters)
    exact, wanted = decode(operator, inputs, length, "aten", torch.float64, parameters)
    formula, _ = decode(operator, inputs, length, "aten", dtype, parameters)
    for made, oracle, typical in zip(got, exact, formula, strict=True):
        assert_as_good_as(made.out, oracle=oracle.out, formula=typical.out)
        assert_as_good_as(made.log_sum_exp, oracle=oracle.log_sum_exp, formula=typical.log_sum_exp)
    for name in ("_ring_place", "_sink_place"):
        assert torch.equal(getattr(state, name), getattr(wanted, name)), name
    for name in ("_rings", "_sinks", "_sums"):
        for x, y in zip(getattr(state, name), getattr(wanted, name), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(state._counts.double(), wanted._counts)


def test_the_operator_keeps_its_contract(device, on_gpu):
    operator = make_operator("fma", block=8, rank=2, sinks=3)
    inputs = make_inputs("causal", length=20, **SMALL)
    inputs = type(inputs)(
        *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(inputs).values())
    )
    _, state = decode(operator, inputs, 19, "triton", torch.float32)
    token = (x[:, :, :1].contiguous() for x in (inputs.query, inputs.key, inputs.value))
    tensors = (
        *state._rings,
        state._ring_place,
        *state._sinks,
        state._sink_place,
        state._found,
        *state._sums,
        state._counts,
        [],
    )
    given = *token, *tensors, 20, 19, -1, inputs.scale, True
    torch.library.opcheck(fma_decode.step, given, test_utils=["test_schema", "test_faketensor"])


def test_obstacles(device, on_gpu):
    inputs = make_inputs("causal", length=20, **SMALL)
    query, key, value = (x[:, :, :1] for x in (inputs.query, inputs.key, inputs.value))
    assert "sinks" in fma_decode.obstacle(query, key, value, 65)
    assert "float64" in fma_decode.obstacle(query.double(), key.double(), value.double(), 4)
    decoder = make_operator("fma", block=8, rank=2).decoder(1.0)
    decoder.prefill(make_inputs("causal + alibi", length=20, **SMALL))
    with use_kernels("triton"), pytest.raises(RuntimeError, match="bias"):
        decoder.step(query, key, value)
