"""Fast multipole attention in Triton against its definition in float64."""

import dataclasses

import pytest
import torch
from oracle import AttentionOutput, assert_as_good_as, cast, gradients, leaves, make_inputs, make_parameters

from fastattn_compile.kernels import fma as face
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.kernels.gpu import fma
from fastattn_compile.operators.registry import make_operator

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 50, "head_dim": 16}
OPTIONS = {"block": 8, "rank": 2, "sinks": 2}


def moved(inputs, device):
    """The same inputs on a device; tokens stand before heads, as models make them."""
    q, k, v = (
        x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
        for x in (inputs.query, inputs.key, inputs.value)
    )
    padding = None if inputs.key_padding is None else inputs.key_padding.to(device)
    segments = None if inputs.segments is None else inputs.segments.to(device)
    return dataclasses.replace(inputs, query=q, key=k, value=v, key_padding=padding, segments=segments)


def judged(operator, inputs, parameters, seeds, dtype):
    """Output, log-sum-exp and gradients of the definition in one type."""
    given, learned, sources = leaves(cast(inputs, dtype), tuple(p.to(dtype) for p in parameters))
    made = operator.reference(given, learned)
    grads = gradients(made, sources, tuple(x.to(dtype) for x in seeds))
    return [made.out.detach(), made.log_sum_exp.detach(), *grads]


def run(operator, inputs, parameters, seeds):
    """The same of the kernels."""
    given = inputs.query, inputs.key, inputs.value, inputs.scale, operator._pattern(inputs)
    used = operator._used(inputs, parameters)
    assert fma.obstacle(*given[:3], given[4]) == ""
    out, lse = fma.forward(*given, inputs.key_padding, used)
    slope = seeds[1].masked_fill(lse == -torch.inf, 0)
    *grads, learned = fma.backward(*given, out, lse, seeds[0], slope, inputs.key_padding, used)
    return [out, lse, *grads, *learned]


def check(mask, device, options=None, **sizes):
    operator = make_operator("fma", **{**OPTIONS, **(options or {})})
    inputs = moved(make_inputs(mask, **{**SMALL, **sizes}), device)
    parameters = tuple(p.to(device) for p in make_parameters(operator, inputs))
    seeds = torch.randn_like(inputs.query[..., :1].expand(-1, -1, -1, inputs.value.shape[3]).contiguous())
    given = operator, inputs, parameters, (seeds, torch.randn(inputs.query.shape[:3], device=device))
    oracle, formula = judged(*given, torch.float64), judged(*given, inputs.value.dtype)
    for at, (got, exact, typical) in enumerate(zip(run(*given), oracle, formula, strict=True)):
        assert_as_good_as(got, oracle=exact, formula=typical, name=f"result {at}")


@pytest.mark.parametrize(
    "mask", ["causal", "none", "causal & key_padding", "left(20) & right(9) & key_padding"]
)
def test_masks(mask, device):
    sizes = {"batch": 2, "length": 35} if "padding" in mask else {"length": 75 if mask == "causal" else 50}
    check(mask, device, **sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype, device):
    check("causal", device, dtype=dtype, value_dim=24)


CASES = {
    "blocks-no-power-of-two": ({"block": 12, "rank": 3, "sinks": 0}, {"heads": 3}),
    "unweighted-rank-1": ({"scale_attn": False, "rank": 1}, {"value_dim": 5, "head_dim": 20}),
    "rank-of-a-block": ({"rank": 8}, {"kv_heads": 2, "length": 48}),
    "learned": ({"basis": "depthwise"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_options(case, device):
    options, sizes = CASES[case]
    check("causal", device, options, **sizes)


PACKED = {
    "causal": ("causal & segments", {"block": 4}, {}),
    "bidirectional": ("segments", {"block": 4}, {"dtype": torch.float16}),
    "window": (
        "causal & window(20) & segments",
        {"block": 4, "sinks": 0},
        {"batch": 2, "dtype": torch.bfloat16},
    ),
    "many-levels": (
        "causal & segments",
        {"block": 2, "rank": 1, "scale_attn": False},
        {"heads": 1, "length": 140},
    ),
    "band-with-sinks": ("left(20) & right(9) & segments", {"block": 4}, {"heads": 3, "length": 60}),
    "short": ("causal & segments", {"block": 32, "rank": 4}, {}),
}


def packed(case, device, monkeypatch):
    """Operator and inputs of a case: documents from one token to eleven blocks, others in each sequence."""
    mask, options, sizes = PACKED[case]
    operator = make_operator("fma", **{**OPTIONS, **options})
    inputs = moved(make_inputs(mask, **{**SMALL, "length": 85, "value_dim": 24, **sizes}), device)
    length = inputs.query.shape[2]
    edges = torch.tensor([[1, 4, 17, 61], [44, 53, 75, 84]], device=device)[: len(inputs.query)]
    segments = (torch.arange(length, device=device) >= edges[:, :, None]).sum(1)
    if device == "cpu":
        monkeypatch.setattr(face, "gpu_obstacle", lambda *tensors: "")
    return operator, dataclasses.replace(inputs, segments=segments)


@pytest.mark.parametrize("case", PACKED)
def test_packed_documents(case, device, monkeypatch):
    operator, inputs = packed(case, device, monkeypatch)
    # Sinks get their gradients in several stretches.
    monkeypatch.setattr(fma, "_STRETCH", 16)
    seeds = torch.randn_like(inputs.value[:, :1].expand(*inputs.query.shape[:2], -1, -1).contiguous())
    seeds = seeds, torch.randn(inputs.query.shape[:3], device=device)
    with recorded_kernels() as ran:
        made = operator.forward(inputs)
        grads = operator.backward(inputs, (), made, *seeds)
    assert ran == {"fma packed forward": "triton", "fma packed backward": "triton"}
    got = made.out, made.log_sum_exp, grads.query, grads.key, grads.value
    oracle, formula = (
        judged(operator, inputs, (), seeds, dtype) for dtype in (torch.float64, inputs.value.dtype)
    )
    for at, (x, exact, typical) in enumerate(zip(got, oracle, formula, strict=True)):
        assert_as_good_as(x, oracle=exact, formula=typical, name=f"result {at}")
    with use_kernels("aten"):
        laid_out = operator.backward(inputs, (), made, *seeds)
    for x, other, exact, typical in zip(
        got[2:], (laid_out.query, laid_out.key, laid_out.value), oracle[2:], formula[2:], strict=True
    ):
        assert x.shape == other.shape and x.dtype == other.dtype
        assert_as_good_as(other, oracle=exact, formula=typical, name="laid out")


def test_packed_gradients_are_the_same_every_time_and_those_of_each_document(device, monkeypatch):
    operator, inputs = packed("causal", device, monkeypatch)
    grad = torch.randn_like(inputs.value[:, :1].expand(*inputs.query.shape[:2], -1, -1).contiguous())
    made = operator.forward(inputs)
    first, second = (operator.backward(inputs, (), made, grad, None) for _ in range(2))
    assert all(torch.equal(getattr(first, x), getattr(second, x)) for x in ("query", "key", "value"))
    # What stands in another document does not reach a gradient, not even as NaN.
    key = inputs.key.clone()
    key[:, :, 17:61] = torch.nan
    broken = operator.backward(dataclasses.replace(inputs, key=key), (), made, grad, None)
    for x in ("query", "key", "value"):
        a, b = getattr(first, x), getattr(broken, x)
        assert torch.equal(a[:, :, :17], b[:, :, :17]) and torch.equal(a[:, :, 61:], b[:, :, 61:])


def test_documents_that_stand_apart_are_laid_out(device, monkeypatch):
    operator = make_operator("fma", **OPTIONS)
    inputs = moved(make_inputs("causal & segments", **SMALL), device)
    if device == "cpu":
        monkeypatch.setattr(face, "gpu_obstacle", lambda *tensors: "")
    given = inputs.query, inputs.key, inputs.value, inputs.scale, operator._pattern(inputs)
    apart = torch.arange(50, device=device).flip(0)[None]
    assert face.forward_packed(*given, apart) is None
    saved = inputs.query, inputs.query[..., 0], inputs.query
    assert face.backward_packed(*given, apart, *saved) is None


def test_learned_with_padding(device):
    check("key_padding", device, {"basis": "depthwise"}, batch=2, length=40)


def test_many_levels_take_several_launches_of_the_pool(device):
    operator = make_operator("fma", block=2, rank=1, sinks=1)
    inputs = moved(make_inputs("causal & key_padding", **{**SMALL, "heads": 1, "length": 150}), device)
    call = fma.Call(
        inputs.query, inputs.key, inputs.value, inputs.scale, operator._pattern(inputs), inputs.key_padding
    )
    pooled = call.pool(inputs.key, ())
    taken = call.tables.pooled[:, None, :, None]
    padded = torch.nn.functional.pad(inputs.key.double() * taken, (0, 0, 0, 256 - 150))
    sums = [padded.unflatten(2, (-1, 2 << level)).sum(3) for level in range(call.levels)]
    wanted = torch.cat(sums, 2) / call.tables.counts.clamp(min=1)[:, None, :, None]
    assert call.levels == 6 and call.nb > 32
    torch.testing.assert_close(pooled.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["causal", "none"])
def test_nan_reaches_exactly_the_queries_that_see_it(mask, device):
    operator = make_operator("fma", **OPTIONS)
    inputs = moved(make_inputs(mask, **SMALL), device)
    for side in ("key", "value"):
        broken = getattr(inputs, side).clone()
        broken[:, :, 37] = torch.nan
        given = dataclasses.replace(inputs, **{side: broken})
        out, _ = fma.forward(given.query, given.key, given.value, given.scale, operator._pattern(given))
        wanted = operator.forward(given).out
        assert torch.equal(out.isnan().any(-1), wanted.isnan().any(-1))


def test_the_same_gradients_every_time(device):
    operator = make_operator("fma", **OPTIONS)
    inputs = moved(make_inputs("causal", **{**SMALL, "length": 40}), device)
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], device=device)
    first, second = (run(operator, inputs, (), seeds) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_obstacles(device):
    operator = make_operator("fma", **OPTIONS)
    inputs = moved(make_inputs("causal", **SMALL), device)
    given = inputs.query, inputs.key, inputs.value
    pattern = operator._pattern(inputs)
    assert "float64" in fma.obstacle(*(x.double() for x in given), pattern)
    assert "two blocks" in fma.obstacle(*(x[:, :, :16] for x in given), pattern)
    assert "sinks" in fma.obstacle(*given, dataclasses.replace(pattern, sinks=100))
    if device == "cpu":
        with use_kernels("triton"), pytest.raises(RuntimeError, match="not on a GPU"):
            operator.forward(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "none"])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("length", [1024, 1999])
def test_on_a_gpu(length, width, mask, dtype, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "length": length, "head_dim": width, "dtype": dtype}
    check(mask, device, {"block": 64, "rank": 4, "sinks": 4}, **sizes)
    operator = make_operator("fma", block=64, rank=4)
    inputs = moved(make_inputs(mask, **sizes), device)
    with recorded_kernels() as ran:
        assert isinstance(operator.forward(inputs), AttentionOutput)
    assert ran == {"fma forward": "triton"}
