"""Causal CAST: running summaries chunk by chunk, and all of it with them."""

import dataclasses

import pytest
import torch
from oracle import assert_as_good_as

from fastattn_compile.kernels import cast_causal as face
from fastattn_compile.kernels.aten import cast_causal as aten
from fastattn_compile.kernels.aten.cast_affinity import Rule, Weights
from fastattn_compile.kernels.aten.cast_causal import running_mass
from fastattn_compile.kernels.aten.cast_scan import ClusterScan
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.kernels.gpu.cast_scan import Scan

# Three chunks, the last one ragged; one that ends with its chunk; one token.
SCANS = {
    "grouped": {"heads": 2, "group": 2, "clusters": 5, "channels": 24},
    "shared": {"batch": 2, "heads": 2, "shared": True},
    "whole-chunks": {"length": 128, "clusters": 1, "channels": 40, "group": 3},
    "tiles": {"length": 70, "clusters": 70, "channels": 72},
    "one": {"length": 1},
    "nobody": {"length": 66, "nobody": True},
    "steep": {"length": 130, "group": 2, "steepness": 30},
}
CASES = {
    "paper": {"pad": True, "batch": 2},
    "own-summary": {"own_summary": True, "group": 1, "clusters": 4},
    "one-softmax": {"lse": True, "pad": True, "select": "query"},
}


@pytest.mark.parametrize("case", SCANS)
def test_functions_of_the_scan(case, device):
    sizes = {
        "batch": 1, "heads": 1, "group": 1, "length": 150, "clusters": 3, "channels": 16, "shared": False, "nobody": False,
        "steepness": 3, **SCANS[case],
    }  # fmt: skip
    heads, batch, length, group, clusters, channels = (
        sizes[x] for x in ("heads", "batch", "length", "group", "clusters", "channels")
    )
    assigned = torch.randint(-1, clusters, (batch, length), device=device)
    if sizes["nobody"]:
        assigned[:] = -1
    log_weight = sizes["steepness"] * torch.randn(
        1 if sizes["shared"] else heads, batch, length, device=device
    )
    filled = torch.isfinite(running_mass(log_weight, assigned, clusters))[:, :, :, None]
    weight = torch.rand(heads, batch, length, group, clusters, device=device) * filled
    query = torch.randn(heads, batch, length, group, channels, device=device)
    value = torch.randn(heads, batch, length, channels, device=device)

    def judge(kind, dtype):
        a, w, q, v = (x.to(dtype) for x in (log_weight, weight, query, value))
        scan = kind(a, running_mass(a, assigned, clusters), assigned)
        score = scan.score(q, v)
        return {
            "mix": scan.mix(w, v), "score": score, "transposed": scan.transposed(w, q),
            "logit_gradient": scan.logit_gradient(w, q, v, score),
        }  # fmt: skip

    got = judge(Scan, torch.float32)
    oracle, formula = judge(ClusterScan, torch.float64), judge(ClusterScan, torch.float32)
    for name, x in got.items():
        assert x.is_contiguous() and torch.isfinite(x).all()
        if case == "steep" and name == "logit_gradient":
            continue  # differences of numbers that are equal but for their rounding
        assert_as_good_as(x, oracle=oracle[name], formula=formula[name], name=name)


def test_the_future_does_not_move_the_past_of_a_scan(device):
    assigned = torch.randint(0, 4, (1, 140), device=device)
    log_weight = 3 * torch.randn(1, 1, 140, device=device)
    weight, query = torch.rand(1, 1, 140, 1, 4, device=device), torch.randn(1, 1, 140, 1, 16, device=device)
    value = torch.randn(1, 1, 140, 16, device=device)
    for now in (1, 64, 100):
        rest = slice(now, None)
        later = [x.clone() for x in (assigned, log_weight, weight, query, value)]
        later[0][:, rest] = 3 - later[0][:, rest]
        for x in later[1:]:
            x[:, :, rest] = 50 * torch.randn_like(x[:, :, rest])
        for before, after in zip(
            *(_mixed_and_scored(*x) for x in ((assigned, log_weight, weight, query, value), later))
        ):
            assert torch.equal(before[:, :, :now], after[:, :, :now])


def _mixed_and_scored(assigned, log_weight, weight, query, value):
    mass = running_mass(log_weight, assigned, 4)
    scan = Scan(log_weight, mass, assigned)
    return scan.mix(weight * torch.isfinite(mass)[:, :, :, None], value), scan.score(query, value)


def given(case, device, length=135):
    """Tensors, scale, rule, learned tensors and padding of a call, and gradients of its results."""
    sizes = {"batch": 1, "group": 2, "clusters": 5, "pad": False, **CASES[case]}
    options = {k: v for k, v in sizes.items() if k in ("own_summary", "lse", "select")}
    rule = Rule(sizes["clusters"], 6, "token_choice", **options)
    heads, d, e = 2, 16, 24
    query = torch.randn(sizes["batch"], heads * sizes["group"], length, d, device=device)
    key, value = (torch.randn(sizes["batch"], heads, length, c, device=device) for c in (d, e))
    real = torch.rand(sizes["batch"], length, device=device) > 0.2 if sizes["pad"] else None
    weights = Weights(
        torch.randn(rule.clusters, query.shape[1], d, device=device),
        torch.randn(rule.clusters, heads, d, device=device),
        torch.randn(1, query.shape[1], d, device=device), torch.randn(1, device=device),
    )  # fmt: skip
    seeds = torch.randn(*query.shape[:3], e, device=device), torch.randn(query.shape[:3], device=device)
    return (query, key, value, 0.3, rule, weights, real), seeds


def results(kind, call, seeds, dtype):
    query, key, value, scale, rule, weights, real = call
    typed = *(x.to(dtype) for x in (query, key, value)), scale, rule, weights.to(dtype)
    seen = torch.ones_like(query[:, :1, :, 0]) if real is None else real[:, None].to(query.dtype)
    seeds = [seeds[0].to(dtype), (seeds[1] * seen).to(dtype)]
    out, lse = aten.forward(*typed, real, kind)
    *grads, learned = aten.backward(*typed, *seeds, real, kind)
    if learned is not None and learned.gate_bias is not None:
        # One number, a sum that may cancel: it is judged with the weights of its layer.
        gate = torch.cat([learned.gate.flatten(), learned.gate_bias])
        learned = dataclasses.replace(learned, gate=gate, gate_bias=None)
    parts = [] if learned is None else [getattr(learned, x.name) for x in dataclasses.fields(learned)]
    return [out, lse.masked_fill(lse == -torch.inf, 0), *grads, *(x for x in parts if x is not None)]


@pytest.mark.parametrize("case", CASES)
def test_causal_cast(case, device):
    call, seeds = given(case, device)
    judged = (
        results(kind, call, seeds, dtype)
        for kind, dtype in (
            (Scan, torch.float32),
            (ClusterScan, torch.float64),
            (ClusterScan, torch.float32),
        )
    )
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got, oracle=oracle, formula=formula, name=f"tensor of {tuple(got.shape)}")


@pytest.mark.parametrize("case", ["paper", "one-softmax"])
def test_the_same_gradients_twice(case, device):
    call, seeds = given(case, device, length=70)
    first, second = (results(Scan, call, seeds, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", ["paper", "one-softmax"])
def test_the_future_does_not_move_the_past(case, device):
    (query, key, value, scale, rule, weights, real), _ = given(case, device, length=100)
    before = aten.forward(query, key, value, scale, rule, weights, real, Scan)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 70:] = 50 * torch.randn_like(x[:, :, 70:])
    after = aten.forward(*changed, scale, rule, weights, real, Scan)
    for a, b in zip(before, after):
        assert torch.equal(a[:, :, :70], b[:, :, :70])


def test_the_face_says_who_serves(device, monkeypatch):
    (query, key, value, *rest), _ = given("paper", device, length=20)
    monkeypatch.setattr(face, "gpu_obstacle", lambda *tensors: "")
    with recorded_kernels() as ran:
        face.forward(query, key, value, *rest)
        assert ran["cast scan forward"] == "triton"
        face.forward(query.double(), key, value, *rest)
        assert ran["cast scan forward"] == "aten"
    with use_kernels("triton"), pytest.raises(RuntimeError, match="float64"):
        face.forward(query, key.double(), value, *rest)
    with use_kernels("cpp"), pytest.raises(RuntimeError, match="no cpp"):
        face.backward(query, key, value, *rest[:-1], torch.ones_like(value), None, rest[-1])
