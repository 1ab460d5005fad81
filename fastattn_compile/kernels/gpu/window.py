"""Local attention in Triton, forward and backward: a band of keys and a few sinks in one online softmax. No atomics.

A program owns ``BM`` rows of one key head: token by token, the ``G`` query heads that share the keys beside each other.
Sizes: ``length`` queries that begin at position ``start``, ``keys`` keys; ``D`` channels of query and key, ``E`` of value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.window import Band, Local
from fastattn_compile.kernels.gpu.fma_attend import sink_keys
from fastattn_compile.kernels.gpu.fma_configs import chosen
from fastattn_compile.kernels.gpu.fma_gradients import fma_sinks, give_part
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision, tensor_obstacle
from fastattn_compile.kernels.gpu.meet import heads_of, meet, meet_again, rows_of
from fastattn_compile.kernels.gpu.online import finite, log2_sum
from fastattn_compile.kernels.gpu.sinks import give_to_sinks

# Positions of one program of fma_sinks.
_STRETCH = 2048


@triton.jit
def banded_keys(begin, end, place, FINE, fine_at, before, after, ALL: tl.constexpr, BN: tl.constexpr):
    """A tile of positions near queries at ``place``: positions, whether a key is there, who sees whom."""
    key = begin + tl.arange(0, BN)
    there = key < end
    if not ALL:
        there = there & (tl.load(FINE + fine_at + key, mask=there, other=0) != 0)
    distance = key[None, :] - place[:, None]
    return key, there, there[None, :] & (distance >= -before) & (distance <= after)


@triton.jit(do_not_specialize=["length", "keys", "start", "before", "after"])
def window_fwd(
    Q, K, V, FINE, SINK, OUT, LSE, heads, length, keys, start, before, after,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, SINKS: tl.constexpr,
    BANDED: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of a program's rows; ``scale`` carries log2 e, ``heads`` counts key heads."""
    unit = tl.program_id(1).to(tl.int64)
    batch, head = unit // heads, unit % heads
    first = tl.program_id(0) * BM
    r = first + tl.arange(0, BM)
    row, of_group = r // G, head * G + r % G
    real, place = row < length, start + row
    q = heads_of(Q, batch, of_group, row, q_b, q_h, q_n, q_d, real, D, BD)
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    largest, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    end = tl.minimum(start + tl.minimum((first + BM - 1) // G, length - 1) + after + 1, keys)
    for begin in range(tl.maximum(start + first // G - before, 0), end, BN):
        key, there, seen = banded_keys(begin, end, place, FINE, batch * fine_b, before, after, ALL, BN)
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)
    if SINKS > 0:
        key, there, seen = sink_keys(place, SINK + batch * sink_b, left, right, 0, False, BANDED, SINKS, BS)
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)
    e = tl.arange(0, BE)
    at = (batch * heads * G + of_group) * length + row
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(
        OUT + at[:, None] * E + e[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    tl.store(LSE + at, log2_sum(largest, mass) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=["length", "keys", "start", "before", "after"])
def window_dq(
    Q, K, V, FINE, SINK, OUT, LSE, GRAD, GRAD_LSE, DQ, DELTA, heads, length, keys, start, before, after,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, SINKS: tl.constexpr,
    BANDED: tl.constexpr, ALL: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradient of a program's queries, and ``delta = <grad, out> - grad_lse`` for the kernels after it."""
    unit = tl.program_id(1).to(tl.int64)
    batch, head = unit // heads, unit % heads
    first = tl.program_id(0) * BM
    r = first + tl.arange(0, BM)
    row, of_group = r // G, head * G + r % G
    real, place = row < length, start + row
    at = (batch * heads * G + of_group) * length + row
    q = heads_of(Q, batch, of_group, row, q_b, q_h, q_n, q_d, real, D, BD)
    grad, out = rows_of(GRAD, at, E, 1, real, E, BE), rows_of(OUT, at, E, 1, real, E, BE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=real, other=0.0)
    tl.store(DELTA + at, delta, mask=real)
    lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    acc = tl.zeros([BM, BD], tl.float32)
    end = tl.minimum(start + tl.minimum((first + BM - 1) // G, length - 1) + after + 1, keys)
    for begin in range(tl.maximum(start + first // G - before, 0), end, BN):
        key, there, seen = banded_keys(begin, end, place, FINE, batch * fine_b, before, after, ALL, BN)
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        acc = meet_again(q, k, v, 0.0, grad, lse, delta, seen, scale, acc, PRECISION)
    if SINKS > 0:
        key, there, seen = sink_keys(place, SINK + batch * sink_b, left, right, 0, False, BANDED, SINKS, BS)
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        acc = meet_again(q, k, v, 0.0, grad, lse, delta, seen, scale, acc, PRECISION)
    d = tl.arange(0, BD)
    acc *= scale * 0.6931471805599453
    tl.store(
        DQ + at[:, None] * D + d[None, :], acc.to(DQ.dtype.element_ty), mask=real[:, None] & (d < D)[None, :]
    )


@triton.jit(do_not_specialize=["length", "keys", "start", "before", "after"])
def window_dkv(
    Q, K, V, FINE, LSE, DELTA, GRAD, DK, DV, heads, length, keys, start, before, after,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, fine_b, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, ALL: tl.constexpr,
    WHICH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys from the queries near them; ``WHICH`` as in ``fma_dkv``."""
    unit = tl.program_id(1).to(tl.int64)
    batch, head = unit // heads, unit % heads
    begin = tl.program_id(0) * BN
    key = begin + tl.arange(0, BN)
    inside = key < keys
    there = inside
    if not ALL:
        there = there & (tl.load(FINE + batch * fine_b + key, mask=inside, other=0) != 0)
    k = finite(rows_of(K + batch * k_b + head * k_h, key, k_n, k_d, there, D, BD))
    v = finite(rows_of(V + batch * v_b + head * v_h, key, v_n, v_d, there, E, BE))
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BE], tl.float32)
    low = tl.maximum(begin - after - start, 0)
    high = tl.minimum(tl.minimum(begin + BN, keys) + before - start, length)
    for first in range(low * G, high * G, BM):
        r = first + tl.arange(0, BM)
        row, of_group = r // G, head * G + r % G
        real = row < high
        at = (batch * heads * G + of_group) * length + row
        q = heads_of(Q, batch, of_group, row, q_b, q_h, q_n, q_d, real, D, BD)
        grad = rows_of(GRAD, at, E, 1, real, E, BE)
        lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + at, mask=real, other=0.0)
        distance = key[:, None] - (start + row)[None, :]
        seen = there[:, None] & real[None, :] & (distance >= -before) & (distance <= after)
        dk, dv = give_part(q, k, v, 0.0, grad, lse, delta, seen, scale, dk, dv, WHICH, PRECISION)
    dk *= scale * 0.6931471805599453
    at, d, e = unit * keys + key, tl.arange(0, BD), tl.arange(0, BE)
    if WHICH & 1:
        tl.store(
            DK + at[:, None] * D + d[None, :],
            dk.to(DK.dtype.element_ty),
            mask=inside[:, None] & (d < D)[None, :],
        )
    if WHICH & 2:
        tl.store(
            DV + at[:, None] * E + e[None, :],
            dv.to(DV.dtype.element_ty),
            mask=inside[:, None] & (e < E)[None, :],
        )


class _Call:
    """One attention: its sizes, its sinks, and the arguments that kernels share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, local: Local, key_padding: Tensor | None
    ) -> None:
        assert isinstance(local.near, Band)
        self.batch, self.kv_heads, self.keys = key.shape[:3]
        self.length, self.units = query.shape[2], self.batch * self.kv_heads
        self.group = query.shape[1] // self.kv_heads
        real = key_padding
        if real is None:
            real = torch.ones(1, self.keys, dtype=torch.bool, device=key.device)
        sinks, self.sink, fine = min(local.sinks, self.keys), None, real
        if sinks:
            # Real tokens first, in order: the first of them are the sinks.
            place = torch.sort(~real, dim=1, stable=True).indices[:, :sinks]
            self.sink = torch.where(real.gather(1, place), place, -1).to(torch.int32)
            fine = real.scatter(1, place, False)
        every = key_padding is None and not sinks
        self.fine = None if every else fine.to(torch.uint8)
        near = local.near
        before = near.left if local.left is None else min(near.left, local.left)
        after = near.right if local.right is None else min(near.right, local.right)
        self.band = self.length, self.keys, local.offset, before, after
        self.strides = *query.stride(), *key.stride(), *value.stride()
        self.window = tuple(-1 if x is None else x for x in (local.left, local.right))
        self.steps = tuple(0 if x is None or x.shape[0] == 1 else x.stride(0) for x in (self.fine, self.sink))
        self.sizes = {
            **channels(D=query.shape[3], E=value.shape[3]),
            "G": self.group,
            "PRECISION": precision(query.dtype),
        }
        self.all = {"ALL": every}
        self.of_sinks = {"SINKS": sinks, "BS": padded(sinks), "BANDED": self.window != (-1, -1)}

    def grid(self, rows: int) -> tuple[int, int]:
        """Programs of ``rows`` packed queries."""
        return -(-self.length * self.group // rows), self.units


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, key_padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.window.forward`` in Triton.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, m, d)``, same type.
        value: ``(b, g, m, e)``, same type.
        scale: Factor on the scores.
        local: What is near: a ``Band``.
        key_padding: ``(b, m)`` boolean, true where a token is real.

    Returns:
        Output ``(b, h, n, e)``, 0 where a query sees no key; log-sum-exp ``(b, h, n)`` float32, -inf there.
    """
    call, config = _Call(query, key, value, local, key_padding), chosen("window_fwd", query, value)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(query.shape[:3], dtype=torch.float32)
    window_fwd[call.grid(config.rows)](
        query, key, value, call.fine, call.sink, out, log_sum_exp, call.kv_heads, *call.band, *call.strides, *call.steps,
        *call.window, scale * LOG2_E, **call.sizes, **call.all, **call.of_sinks, **config.launch,
    )  # fmt: skip
    return out, log_sum_exp


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward``, deterministic.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        local: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
        key_padding: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type.
    """
    call, config = _Call(query, key, value, local, key_padding), chosen("window_dq", query, value)
    out, log_sum_exp, grad = out.contiguous(), log_sum_exp.contiguous(), grad_out.to(query.dtype).contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    grad_query, delta = query.new_empty(query.shape), torch.empty_like(log_sum_exp)
    window_dq[call.grid(config.rows)](
        query, key, value, call.fine, call.sink, out, log_sum_exp, grad, slope, grad_query, delta, call.kv_heads,
        *call.band, *call.strides, *call.steps, *call.window, scale * LOG2_E, HAS_GRAD_LSE=slope is not None,
        **call.sizes, **call.all, **call.of_sinks, **config.launch,
    )  # fmt: skip
    saved, config = (log_sum_exp, delta, grad), chosen("window_dkv", query, value)
    grads = [x.new_empty(x.shape) for x in (key, value)]
    for which in config.parts:
        window_dkv[(-(-call.keys // config.columns), call.units)](
            query, key, value, call.fine, *saved, *grads, call.kv_heads, *call.band, *call.strides, call.steps[0],
            scale * LOG2_E, WHICH=which, **call.sizes, **call.all, **config.launch,
        )  # fmt: skip
    if call.sink is not None:
        _sinks(call, query, key, value, scale, grads, *saved)
    return grad_query, grads[0], grads[1]


def _sinks(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, scale: float, grads: list[Tensor], *saved: Tensor
) -> None:
    """Adds what the sinks get from all queries, stretch after stretch; from near queries they got nothing."""
    config, sink = chosen("fma_sinks", query, value), call.sink
    assert sink is not None
    parts = -(-call.length // _STRETCH)
    made = [
        x.new_empty(call.batch, call.kv_heads, parts, sink.shape[1], x.shape[3], dtype=torch.float32)
        for x in (key, value)
    ]
    fma_sinks[(parts, call.units)](
        query, key, value, sink, *saved, *made, None, call.kv_heads, call.length, call.band[2], _STRETCH, *call.strides,
        call.steps[1], *call.window, scale * LOG2_E, BLOCK=0, CAUSAL=False, **call.sizes, **call.of_sinks, PACKED=False,
        **config.launch,
    )  # fmt: skip
    give_to_sinks(grads, made, sink)


def obstacle(query: Tensor, key: Tensor, value: Tensor, local: Local) -> str:
    """Why these kernels cannot serve a call; empty when they can."""
    if not isinstance(local.near, Band):
        return "what is near is no band of positions"
    if any(x is not None and x < 0 for x in (local.left, local.right)):
        return "the mask hides a query's own position"
    if local.sinks > 64:
        return f"{local.sinks} sinks, a tile holds up to 64"
    return tensor_obstacle(query, key, value)
