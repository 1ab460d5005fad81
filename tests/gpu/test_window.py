"""Local attention in Triton against its definition in float64."""

import dataclasses

import pytest
import torch
from oracle import assert_as_good_as, cast, gradients, leaves, make_inputs

from fastattn_compile.kernels.aten.window import Local
from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.kernels.gpu import window
from fastattn_compile.operators.registry import make_operator

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 40, "head_dim": 16}
OPTIONS = {"width": 12, "sinks": 2}


def moved(inputs, device):
    """The same inputs on a device; tokens stand before heads, as models make them."""
    q, k, v = (
        x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
        for x in (inputs.query, inputs.key, inputs.value)
    )
    padding = None if inputs.key_padding is None else inputs.key_padding.to(device)
    return dataclasses.replace(inputs, query=q, key=k, value=v, key_padding=padding)


def judged(operator, inputs, seeds, dtype):
    given, _, sources = leaves(cast(inputs, dtype), ())
    made = operator.reference(given)
    grads = gradients(made, sources, tuple(x.to(dtype) for x in seeds))
    return [made.out.detach(), made.log_sum_exp.detach(), *grads]


def run(operator, inputs, seeds):
    given = inputs.query, inputs.key, inputs.value, inputs.scale, operator._local(inputs)
    assert window.obstacle(*given[:3], given[4]) == ""
    out, lse = window.forward(*given, inputs.key_padding)
    slope = seeds[1].masked_fill(lse == -torch.inf, 0)
    return [out, lse, *window.backward(*given, out, lse, seeds[0], slope, inputs.key_padding)]


def check(mask, device, options=None, **sizes):
    operator = make_operator("window", **{**OPTIONS, **(options or {})})
    inputs = moved(make_inputs(mask, **{**SMALL, **sizes}), device)
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    seeds = (
        torch.randn(shape, device=device).to(inputs.value.dtype), torch.randn(inputs.query.shape[:3], device=device)
    )  # fmt: skip
    oracle, formula = (judged(operator, inputs, seeds, kind) for kind in (torch.float64, inputs.value.dtype))
    for at, (got, exact, typical) in enumerate(
        zip(run(operator, inputs, seeds), oracle, formula, strict=True)
    ):
        assert_as_good_as(got, oracle=exact, formula=typical, name=f"result {at}")


CASES = {
    "causal": ("causal", {}, {"length": 55, "value_dim": 24}),
    "bidirectional": ("none", {}, {}),
    "band": ("left(5) & right(3)", {}, {}),
    "padded": ("causal & key_padding", {}, {"batch": 2}),
    "no-sinks": ("causal", {"sinks": 0}, {"heads": 3, "head_dim": 20}),
    "continued": ("causal & end_aligned", {}, {"length": 21, "key_len": 50}),
    "half": ("causal", {}, {"dtype": torch.float16}),
    "bfloat": ("none", {}, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_local_attention(case, device):
    mask, options, sizes = CASES[case]
    check(mask, device, options, **sizes)


def test_nan_reaches_exactly_the_queries_that_see_it(device):
    operator = make_operator("window", **OPTIONS)
    inputs = moved(make_inputs("causal", **SMALL), device)
    broken = inputs.value.clone()
    broken[:, :, 17] = torch.nan
    out, _ = window.forward(inputs.query, inputs.key, broken, inputs.scale, operator._local(inputs))
    sees = torch.zeros_like(out[..., 0], dtype=torch.bool)
    sees[:, :, 17 : 17 + OPTIONS["width"]] = True
    assert torch.equal(out.isnan().any(-1), sees)


def test_obstacles(device):
    inputs = moved(make_inputs("causal", **SMALL), device)
    given = inputs.query, inputs.key, inputs.value
    local = make_operator("window", **OPTIONS)._local(inputs)
    assert "float64" in window.obstacle(*(x.double() for x in given), local)
    assert "band" in window.obstacle(*given, Local(8, 8, 0, lambda place, keys: keys <= place, None, 0, 0))
    assert "own position" in window.obstacle(*given, dataclasses.replace(local, left=-1))
    if device == "cpu":
        with use_kernels("triton"), pytest.raises(RuntimeError, match="not on a GPU"):
            make_operator("window", **OPTIONS).forward(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "none"])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("length", [1024, 1999])
def test_on_a_gpu(length, width, mask, dtype, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    check(mask, device, {"width": 256, "sinks": 4}, batch=2, length=length, head_dim=width, dtype=dtype)
