"""Fast multipole attention in Triton, the walks of queries: output, and the gradient of queries.

A program owns ``BM`` rows of a pair of blocks of one key head: token by token, the ``G`` query heads that share the keys
beside each other, so that near keys and far rows are loaded once for all of them. Blocks ``2i`` and ``2i + 1`` meet the
same rows; only the lowest level is masked differently. Near field, far field and sinks share one online softmax.

Sizes: ``D`` channels of query and key, ``E`` of value, ``BD`` and ``BE`` the tiles that hold them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.fma_rows import beyond, covered, far_rows, near, whose
from fastattn_compile.kernels.gpu.meet import heads_of, meet, meet_again, rows_of, shown
from fastattn_compile.kernels.gpu.online import log2_sum


@triton.jit
def near_keys(begin, end, place, FINE, fine_at, left, right, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
              PADDED: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A tile of positions near queries at ``place``: positions, whether a key is there, who sees whom."""
    key = begin + tl.arange(0, BN)
    there = key < end
    if PADDED:
        there = there & (tl.load(FINE + fine_at + key, mask=there, other=0) != 0)
    seen = near(place[:, None], key[None, :], BLOCK, CAUSAL) & there[None, :]
    if BANDED:
        seen = seen & shown(place[:, None], key[None, :], left, right)
    return key, there, seen


@triton.jit
def far_keys(begin, first, last, place, MASS, length, nb, levels, left, right, BLOCK: tl.constexpr, RANK: tl.constexpr,
             CAUSAL: tl.constexpr, BANDED: tl.constexpr, LEARNED: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """A tile of far slots of two blocks of one pair: rows, whether one is there, what it weighs, who sees whom."""
    slot = begin + tl.arange(0, BF)
    row, of_first = far_rows(first, slot, nb, levels, RANK, CAUSAL)
    other, of_last = far_rows(last, slot, nb, levels, RANK, CAUSAL)
    row = tl.maximum(row, other)
    there = of_first | of_last
    weight = tl.load(MASS + row, mask=there, other=float("-inf"))
    there = there & (weight != float("-inf"))
    seen = tl.where((place // BLOCK == first)[:, None], of_first[None, :], of_last[None, :]) & there[None, :]
    if BANDED:
        low, high = covered(slot, row, length, nb, BLOCK, RANK, CAUSAL, LEARNED)
        seen = seen & ((left < 0) | (low[None, :] >= place[:, None] - left))
        seen = seen & ((right < 0) | (high[None, :] <= place[:, None] + right))
    return row, there, tl.where(there, weight, 0.0), seen


@triton.jit
def sink_keys(place, SINK, left, right, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
              SINKS: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """The sinks beyond the near field (anywhere, for a ``BLOCK`` of 0): positions, whether there is one, who sees whom."""
    i = tl.arange(0, BS)
    key = tl.load(SINK + i, mask=i < SINKS, other=-1)
    there = key >= 0
    seen = there[None, :] & (place >= 0)[:, None]
    if BLOCK > 0:
        seen = seen & beyond(place[:, None], key[None, :], BLOCK, CAUSAL)
    if BANDED:
        seen = seen & shown(place[:, None], key[None, :], left, right)
    return key, there, seen


@triton.jit
def packed_rows(pid, length, G: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr):
    """Positions and heads of the rows of a program, whether they are real, and the first and last block among them."""
    PER_PAIR: tl.constexpr = (2 * BLOCK * G + BM - 1) // BM
    pair, begin = pid // PER_PAIR, pid % PER_PAIR * BM
    r = begin + tl.arange(0, BM)
    place = pair * 2 * BLOCK + r // G
    first = 2 * pair + begin // G // BLOCK
    last = 2 * pair + tl.minimum(begin + BM - 1, 2 * BLOCK * G - 1) // G // BLOCK
    return place, r % G, (r < 2 * BLOCK * G) & (place < length), first, last


@triton.jit(do_not_specialize=["length", "nb", "levels", "all_rows"])
def fma_fwd(
    Q, K, V, ROWS_K, ROWS_V, MASS, FINE, SINK, OUT, LSE, DOCUMENT, heads, length, nb, levels, all_rows,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mass_b, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, PADDED: tl.constexpr,
    LEARNED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BF: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of a program's rows; ``scale`` carries log2 e, ``heads`` counts key heads.

    ``PACKED``, the documents of a table take the place of the sequences, and ``all_rows`` counts the rows of all of them.
    """
    unit, total = tl.program_id(1).to(tl.int64), length
    head = unit % heads
    number, batch, opening, length, nb, levels, base, rows = whose(
        DOCUMENT, unit, heads, length, nb, levels, all_rows, PACKED
    )
    Q += opening * q_n
    place, of_group, real, first, last = packed_rows(tl.program_id(0), length, G, BLOCK, BM)
    if PACKED:  # noqa: SIM102  known when it is compiled, the other is not
        if first * BLOCK >= length:
            return  # the grid is that of the longest document
    of_group = of_group + head * G
    q = heads_of(Q, batch, of_group, place, q_b, q_h, q_n, q_d, real, D, BD)
    K += batch * k_b + head * k_h + opening * k_n
    V += batch * v_b + head * v_h + opening * v_n
    ROWS_K += rows * D
    ROWS_V += rows * E
    MASS += number * mass_b + base
    largest, mass = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    end = (last + 1) * BLOCK if CAUSAL else (last + 2) * BLOCK
    end = tl.minimum(end, length)
    for begin in range(tl.maximum(first - 1, 0) * BLOCK, end, BN):
        key, there, seen = near_keys(
            begin, end, place, FINE, batch * fine_b, left, right, BLOCK, CAUSAL, BANDED, PADDED, BN
        )
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)
    for begin in range(0, levels * (2 * RANK if CAUSAL else 4 * RANK), BF):
        row, there, weight, seen = far_keys(
            begin, first, last, place, MASS, length, nb, levels, left, right, BLOCK, RANK, CAUSAL,
            BANDED, LEARNED, BF,
        )  # fmt: skip
        k, v = rows_of(ROWS_K, row, D, 1, there, D, BD), rows_of(ROWS_V, row, E, 1, there, E, BE)
        largest, mass, acc = meet(q, k, v, weight, seen, scale, largest, mass, acc, PRECISION)
    if SINKS > 0:
        key, there, seen = sink_keys(
            place, SINK + number * sink_b, left, right, BLOCK, CAUSAL, BANDED, SINKS, BS
        )
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        largest, mass, acc = meet(q, k, v, None, seen, scale, largest, mass, acc, PRECISION)
    e = tl.arange(0, BE)
    at = (batch * heads * G + of_group) * total + opening + place
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(
        OUT + at[:, None] * E + e[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=real[:, None] & (e < E)[None, :],
    )
    tl.store(LSE + at, log2_sum(largest, mass) * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=["length", "nb", "levels", "all_rows"])
def fma_dq(
    Q, K, V, ROWS_K, ROWS_V, MASS, FINE, SINK, OUT, LSE, GRAD, GRAD_LSE, DQ, DELTA, DOCUMENT, heads, length, nb, levels,
    all_rows,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mass_b, fine_b, sink_b, left, right, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, PADDED: tl.constexpr,
    LEARNED: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradient of a program's queries, and ``delta = <grad, out> - grad_lse`` for the kernels after it."""
    unit, total = tl.program_id(1).to(tl.int64), length
    head = unit % heads
    number, batch, opening, length, nb, levels, base, rows = whose(
        DOCUMENT, unit, heads, length, nb, levels, all_rows, PACKED
    )
    Q += opening * q_n
    place, of_group, real, first, last = packed_rows(tl.program_id(0), length, G, BLOCK, BM)
    if PACKED:  # noqa: SIM102  as in fma_fwd
        if first * BLOCK >= length:
            return
    of_group = of_group + head * G
    q = heads_of(Q, batch, of_group, place, q_b, q_h, q_n, q_d, real, D, BD)
    at = (batch * heads * G + of_group) * total + opening + place
    grad = rows_of(GRAD, at, E, 1, real, E, BE)
    out = rows_of(OUT, at, E, 1, real, E, BE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=real, other=0.0)
    tl.store(DELTA + at, delta, mask=real)
    lse = tl.load(LSE + at, mask=real, other=0.0) * 1.4426950408889634
    K += batch * k_b + head * k_h + opening * k_n
    V += batch * v_b + head * v_h + opening * v_n
    ROWS_K += rows * D
    ROWS_V += rows * E
    MASS += number * mass_b + base
    acc = tl.zeros([BM, BD], tl.float32)
    end = (last + 1) * BLOCK if CAUSAL else (last + 2) * BLOCK
    end = tl.minimum(end, length)
    for begin in range(tl.maximum(first - 1, 0) * BLOCK, end, BN):
        key, there, seen = near_keys(
            begin, end, place, FINE, batch * fine_b, left, right, BLOCK, CAUSAL, BANDED, PADDED, BN
        )
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        acc = meet_again(q, k, v, 0.0, grad, lse, delta, seen, scale, acc, PRECISION)
    for begin in range(0, levels * (2 * RANK if CAUSAL else 4 * RANK), BF):
        row, there, weight, seen = far_keys(
            begin, first, last, place, MASS, length, nb, levels, left, right, BLOCK, RANK, CAUSAL,
            BANDED, LEARNED, BF,
        )  # fmt: skip
        k, v = rows_of(ROWS_K, row, D, 1, there, D, BD), rows_of(ROWS_V, row, E, 1, there, E, BE)
        acc = meet_again(q, k, v, weight[None, :], grad, lse, delta, seen, scale, acc, PRECISION)
    if SINKS > 0:
        key, there, seen = sink_keys(
            place, SINK + number * sink_b, left, right, BLOCK, CAUSAL, BANDED, SINKS, BS
        )
        k, v = rows_of(K, key, k_n, k_d, there, D, BD), rows_of(V, key, v_n, v_d, there, E, BE)
        acc = meet_again(q, k, v, 0.0, grad, lse, delta, seen, scale, acc, PRECISION)
    d = tl.arange(0, BD)
    acc *= scale * 0.6931471805599453
    tl.store(
        DQ + at[:, None] * D + d[None, :], acc.to(DQ.dtype.element_ty), mask=real[:, None] & (d < D)[None, :]
    )
