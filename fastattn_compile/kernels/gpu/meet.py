"""A tile of queries meets a tile of keys: loads of rows, one step of an online softmax, one step of its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.online import blemish, finite, online_softmax


@triton.jit
def rows_of(X, row, stride_n, stride_d, real, C: tl.constexpr, BC: tl.constexpr):
    """``(rows, channels)`` of one head, 0 where a row is not real."""
    c = tl.arange(0, BC)
    at = X + row.to(tl.int64)[:, None] * stride_n + c[None, :] * stride_d
    return tl.load(at, mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def heads_of(
    X, batch, head, row, stride_b, stride_h, stride_n, stride_d, real, C: tl.constexpr, BC: tl.constexpr
):
    """``(rows, channels)`` of rows of several heads of a sequence."""
    c = tl.arange(0, BC)
    at = batch * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
    return tl.load(X + at[:, None] + c[None, :] * stride_d, mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def shown(place, key, left, right):
    """Whether the mask shows keys to queries by position; a bound below 0 is none."""
    return ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))


@triton.jit
def meet(q, k, v, weight, seen, scale, largest, mass, acc, PRECISION: tl.constexpr):
    """Takes a tile of keys into the running attention of a tile of queries.

    ``weight`` is log2 of how much a key counts, a number or one for each key, ``None`` for once; ``scale`` carries log2 e.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    bias = blemish(k) + blemish(v)
    if weight is not None:
        bias += weight
    s += bias[None, :]
    p, shrink, largest, mass = online_softmax(tl.where(seen, s, float("-inf")), largest, mass)
    acc = tl.dot(p.to(v.dtype), finite(v), acc * shrink[:, None], input_precision=PRECISION)
    return largest, mass, acc


@triton.jit
def meet_again(q, k, v, weight, grad, lse, delta, seen, scale, acc, PRECISION: tl.constexpr):
    """Adds to the gradient of a tile of queries, without its factor, what a tile of keys gives."""
    k = finite(k)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if weight is not None:
        s += weight
    p = tl.exp2(s - lse[:, None])
    ds = p * (tl.dot(grad, tl.trans(finite(v)), input_precision=PRECISION) - delta[:, None])
    return tl.dot(tl.where(seen, ds, 0.0).to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def give(q, k, v, weight, grad, lse, delta, seen, scale, dk, dv, PRECISION: tl.constexpr):
    """Adds to the gradients of a tile of finite keys and values, without factor, what a tile of queries gives."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    if weight is not None:
        s += weight
    p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(tl.where(seen, ds, 0.0).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
