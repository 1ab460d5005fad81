"""CAST: clusters, their mixture, and what comes home to tokens."""

import dataclasses

import pytest
import torch
from oracle import assert_as_good_as

from fastattn_compile.kernels.aten import cast as aten
from fastattn_compile.kernels.aten.cast_affinity import Rule, Weights
from fastattn_compile.kernels.aten.cast_bucket import Buckets
from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.kernels.gpu import cast, leaf

CASES = {
    "paper": {"pad": True, "batch": 2},
    "overlapping": {"size": 20, "own_summary": True, "group": 1},
    "one-softmax": {"lse": True, "pad": True},
    "single": {"clustering": "sa_topk"},
}


@pytest.mark.parametrize("case", CASES)
def test_cast(case, device):
    sizes = {
        "batch": 1,
        "heads": 2,
        "group": 2,
        "length": 41,
        "clusters": 4,
        "size": 13,
        "pad": False,
        **CASES[case],
    }
    options = {k: v for k, v in sizes.items() if k in ("clustering", "own_summary", "lse")}
    rule = Rule(sizes["clusters"], sizes["size"], **options)
    heads, clusters, d, e = sizes["heads"], sizes["clusters"], 16, 24
    query = torch.randn(sizes["batch"], heads * sizes["group"], sizes["length"], d, device=device)
    key, value = (torch.randn(sizes["batch"], heads, sizes["length"], c, device=device) for c in (d, e))
    real = torch.rand(sizes["batch"], sizes["length"], device=device) > 0.2 if sizes["pad"] else None
    weights = Weights(
        torch.randn(clusters, query.shape[1], d, device=device), torch.randn(clusters, heads, d, device=device),
        torch.randn(1, query.shape[1], d, device=device), torch.randn(1, device=device),
    )  # fmt: skip
    seeds = torch.randn(*query.shape[:3], e, device=device), torch.randn(query.shape[:3], device=device)

    def judge(module, dtype):
        given = *(x.to(dtype) for x in (query, key, value)), 0.3, rule, weights.to(dtype)
        out, lse = module.forward(*given, real)
        *grads, learned = module.backward(*given, *(x.to(dtype) for x in seeds), real)
        if learned is not None and learned.gate_bias is not None:
            # One number, a sum that may cancel: it is judged with the weights of its layer.
            gate = torch.cat([learned.gate.flatten(), learned.gate_bias])
            learned = dataclasses.replace(learned, gate=gate, gate_bias=None)
        parts = [] if learned is None else [getattr(learned, x.name) for x in dataclasses.fields(learned)]
        return [out, lse, *grads, *(x for x in parts if x is not None)]

    judged = judge(cast, torch.float32), judge(aten, torch.float64), judge(aten, torch.float32)
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got, oracle=oracle, formula=formula, name=f"tensor of {tuple(got.shape)}")


@pytest.mark.parametrize("group", [1, 2])
def test_buckets_of_causal_cast(group, device):
    batch, heads, length, clusters, size = 2, 2, 45, 3, 6
    query = torch.randn(batch, heads * group, length, 16, device=device)
    key, value = (torch.randn(batch, heads, length, c, device=device) for c in (16, 24))
    buckets = Buckets(torch.randint(-1, clusters, (batch, length), device=device), clusters, size)
    part = buckets.part(heads * group, heads)
    seeds = torch.randn(*query.shape[:3], 24, device=device), torch.randn(query.shape[:3], device=device)
    out, lse = leaf.attend(query, key, value, 0.3, [part])
    grads = leaf.backward(query, key, value, 0.3, [part], out, lse, *seeds)[:3]

    def judge(dtype):
        given = *(x.to(dtype) for x in (query, key, value)), 0.3
        found = buckets.attend(*given)
        return *found, *buckets.attend_backward(*given, *found, *(x.to(dtype) for x in seeds))

    with use_kernels("aten"):
        judged = (out, lse.squeeze(-1), *grads), judge(torch.float64), judge(torch.float32)
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got, oracle=oracle, formula=formula)


def test_obstacles():
    x = torch.ones(1, 1, 4, 8)
    assert cast.obstacle(x, x, x, Rule(4, 2)) == ""
    assert "clusters" in cast.obstacle(x, x, x, Rule(1000, 2))
    assert "float64" in cast.obstacle(x.double(), x, x, Rule(4, 2))
