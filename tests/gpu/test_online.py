"""The pieces that kernels share, in every type: what the stage that runs kernels itself is worth."""

import pytest
import torch
import triton
import triton.language as tl
from oracle import assert_as_good_as

from fastattn_compile.kernels.gpu.launch import LOG2_E, precision
from fastattn_compile.kernels.gpu.online import log2_sum, online_softmax


@triton.jit
def attend(
    Q, K, V, OUT, LSE, scale, N: tl.constexpr, D: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr
):
    row, d = tl.arange(0, N), tl.arange(0, D)
    q = tl.load(Q + row[:, None] * D + d[None, :])
    largest, mass = tl.full([N], float("-inf"), tl.float32), tl.zeros([N], tl.float32)
    acc = tl.zeros([N, D], tl.float32)
    for begin in range(0, N, B):
        key = begin + tl.arange(0, B)
        k = tl.load(K + key[:, None] * D + d[None, :])
        v = tl.load(V + key[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p, shrink, largest, mass = online_softmax(s, largest, mass)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    tl.store(OUT + row[:, None] * D + d[None, :], (acc / mass[:, None]).to(OUT.dtype.element_ty))
    tl.store(LSE + row, log2_sum(largest, mass) / 1.4426950408889634)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_online_softmax(dtype, device):
    q, k, v = (torch.randn(64, 32).to(device, dtype) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(64, device=device)
    attend[(1,)](q, k, v, out, lse, 0.3 * LOG2_E, N=64, D=32, B=16, PRECISION=precision(dtype))

    def formula(kind):
        scores = q.to(kind) @ k.to(kind).mT * 0.3
        return scores.softmax(-1) @ v.to(kind), scores.logsumexp(-1)

    for got, exact, typical in zip((out, lse), formula(torch.float64), formula(dtype), strict=True):
        assert_as_good_as(got, oracle=exact, formula=typical)
