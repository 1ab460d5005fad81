"""Operators through their torch ops on Triton: the way from the operator to its kernels, and what says no."""

import pytest
import torch
from oracle import assert_as_good_as, cast, gradients, leaves, make_inputs, make_parameters, run

from fastattn_compile.kernels import (
    barnes_hut,
    cast_causal,
    conv_basis,
    sorting,
    treeformer_tc,
    treeformer_tf,
)
from fastattn_compile.kernels import cast as cast_kernels
from fastattn_compile.kernels.aten import cast_bucket
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.registry import make_operator

FACES = barnes_hut, cast_bucket, cast_causal, cast_kernels, conv_basis, sorting, treeformer_tc, treeformer_tf

# Operator, its configuration, a mask, sizes, and the kernels that must have run on Triton.
CASES = {
    "barnes_hut": (
        {"block": 16, "leaf": 2, "fanout": 2, "group": 16, "open": 4, "beam": 4}, "causal & key_padding", {"length": 60},
        {"barnes_hut forward", "barnes_hut backward"},
    ),
    "barnes_hut-pool": (
        {"block": 16, "leaf": 2, "fanout": 2, "group": 16, "open": 4, "beam": 4, "rest": "pool"}, "causal", {"length": 75},
        {"barnes_hut forward", "barnes_hut backward"},
    ),
    "tf_attention": (
        {"height": 2}, "causal & key_padding", {}, {"tf_attention forward", "tf_attention backward"}
    ),
    "tf_attention-window": (
        {"height": 2, "window": 5, "sinks": 2}, "causal & key_padding", {"heads": 2, "kv_heads": 1},
        {"tf_attention forward", "tf_attention backward"},
    ),
    "tc_attention": ({"height": 2}, "causal", {}, {"tc_attention forward", "tc_attention backward"}),
    "cast": (
        {"clusters": 4, "clustering": "topk"}, "key_padding", {}, {"cast forward", "cast backward"}
    ),
    "cast-causal": (
        {"clusters": 4, "clustering": "token_choice", "cluster_size": 5}, "causal", {},
        {"cast buckets forward", "cast buckets backward", "cast scan forward", "cast scan backward"},
    ),
    "conv_basis": (
        {"k": 4, "anchors": "strided", "form": "buckets"}, "causal", {}, {"conv_basis profiles", "conv_basis sums"}
    ),
}  # fmt: skip


@pytest.fixture
def on_gpu(device, monkeypatch):
    """On a machine without a GPU the interpreter stands in for one."""
    if device == "cuda":
        return
    for face in FACES:
        monkeypatch.setattr(face, "gpu_obstacle", lambda *tensors: "")


@pytest.mark.parametrize("case", CASES)
def test_an_operator_on_triton(case, device, on_gpu):
    options, mask, sizes, kernels = CASES[case]
    operator = make_operator(case.split("-")[0], **options)
    inputs = make_inputs(mask, **{"batch": 1, "length": 40, "head_dim": 16, **sizes})
    inputs = type(inputs)(
        *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(inputs).values())
    )
    parameters = tuple(p.to(device) for p in make_parameters(operator, inputs))
    seeds = torch.randn(*inputs.query.shape[:3], inputs.value.shape[3]), torch.randn(inputs.query.shape[:3])
    if case == "tc_attention":
        seeds = seeds[0], torch.zeros_like(seeds[1])

    def judge(dtype, name):
        typed, learned, sources = leaves(cast(inputs, dtype), tuple(p.to(dtype) for p in parameters))
        with use_kernels(name), recorded_kernels() as ran:
            output = run(operator, typed, learned)
            grads = gradients(output, sources, tuple(x.to(device, dtype) for x in seeds))
        return [output.out.detach(), output.log_sum_exp.detach(), *grads], ran

    got, ran = judge(torch.float32, "auto")
    assert {kernel for kernel, name in ran.items() if name == "triton"} >= kernels, ran
    for x, oracle, formula in zip(
        got, judge(torch.float64, "aten")[0], judge(torch.float32, "aten")[0], strict=True
    ):
        assert_as_good_as(x, oracle=oracle, formula=formula)


def test_triton_by_name_never_falls_back(device, on_gpu):
    operator = make_operator("barnes_hut", block=16, leaf=2, fanout=3)
    inputs = make_inputs("causal", batch=1, length=60, head_dim=16)
    inputs = type(inputs)(
        *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(inputs).values())
    )
    with use_kernels("triton"), pytest.raises(RuntimeError, match="power of two"):
        run(operator, inputs)
