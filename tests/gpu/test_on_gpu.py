"""On a real GPU: types, widths and ragged lengths that the interpreter is too slow for, and what it cannot show."""

import dataclasses

import pytest
import torch
from dense import NAMES, with_gradients
from oracle import gradients, leaves, make_inputs, make_parameters, relative_error, run

from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.registry import make_operator

pytestmark = pytest.mark.gpu

OPERATORS = {
    "fma": {"block": 64},
    "window": {"width": 100},
    "barnes_hut": {"group": 16},
    "barnes_hut-single": {"group": 1},
    "barnes_hut-pool": {"group": 16, "rest": "pool"},
    "tf_attention": {"height": 4},
    "tc_attention": {"height": 4},
    "cast": {"clusters": 8, "clustering": "topk"},
    "cast-causal": {"clusters": 8, "clustering": "token_choice", "cluster_size": 64},
    "conv_basis": {"k": 16, "form": "buckets"},
}


def inputs_on_gpu(mask, dtype, **sizes):
    inputs = make_inputs(mask, dtype=dtype, **sizes)
    moved = {name: x.cuda() for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(inputs, **moved)


def judge(operator, inputs, parameters, seeds, dtype, name):
    typed = dataclasses.replace(
        inputs, **{x: getattr(inputs, x).to(dtype) for x in ("query", "key", "value")}
    )
    typed, learned, sources = leaves(typed, tuple(p.to(dtype) for p in parameters))
    with use_kernels(name), recorded_kernels() as ran:
        output = run(operator, typed, learned)
        grads = gradients(output, sources, tuple(x.to("cuda", dtype) for x in seeds))
    return [output.out.detach(), output.log_sum_exp.detach(), *grads[:3]], ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_type_and_width(name, width, dtype):
    operator = make_operator(name.split("-")[0], **OPERATORS[name])
    mask = "none" if name == "cast" else "causal"
    inputs = inputs_on_gpu(mask, dtype, batch=1, length=1003, head_dim=width)
    parameters = tuple(p.cuda() for p in make_parameters(operator, inputs))
    seeds = torch.randn(*inputs.query.shape[:3], width), torch.randn(inputs.query.shape[:3])
    if name == "tc_attention":
        seeds = seeds[0], torch.zeros_like(seeds[1])
    got, ran = judge(operator, inputs, parameters, seeds, dtype, "auto")
    assert "triton" in ran.values(), ran
    wanted, _ = judge(operator, inputs, parameters, seeds, torch.float64, "aten")
    # What the type itself costs: softmax attention over all keys, by its formula in this type.
    visible = torch.ones(1, 1, 1003, 1003, dtype=torch.bool, device="cuda")
    visible = (visible if mask == "none" else visible.tril()).expand(1, inputs.query.shape[1], -1, -1)
    given = inputs.query, inputs.key, inputs.value, inputs.scale, visible, [x.cuda() for x in seeds]
    typical = [
        relative_error(formula, exact)
        for formula, exact in zip(
            with_gradients(*given, dtype), with_gradients(*given, torch.float64), strict=True
        )
    ]
    for part, x, exact, cost in zip(NAMES, got, wanted, typical, strict=True):
        assert relative_error(x, exact) <= 2 * cost + torch.finfo(x.dtype).eps, part


@pytest.mark.parametrize("name", ["barnes_hut", "tf_attention", "cast"])
def test_the_same_bits_every_time(name):
    operator = make_operator(name, **OPERATORS[name])
    inputs = inputs_on_gpu(
        "none" if name == "cast" else "causal", torch.bfloat16, batch=2, length=2001, head_dim=64
    )
    parameters = tuple(p.cuda() for p in make_parameters(operator, inputs))
    seeds = torch.randn(*inputs.query.shape[:3], 64), torch.randn(inputs.query.shape[:3])
    first, second = (judge(operator, inputs, parameters, seeds, torch.bfloat16, "auto")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
