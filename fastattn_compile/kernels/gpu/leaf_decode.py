"""One query of leaf attention over a cache of keys sorted by their leaves, in Triton.

The keys of a node stand side by side in the order of their leaves (``Sorted``), so that a step reads those of its own node,
and besides them the numbers of the tokens that came after the last sort. ``tf_level`` finds how deep the deepest node on the
query's path with a key in it lies; ``tf_decode`` attends the keys of the nodes, a key of two trees once, the window and the
sinks. Parts of a node run side by side; they are joined by their log-sum-exp, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import LIGHT, LOG2_E, channels
from fastattn_compile.kernels.gpu.online import COUNTS, blemish, finite, log2_sum
from fastattn_compile.kernels.sorting import stable_order

# Tokens after the last sort that a step may walk; programs that a step is cut into at most, and those that fill a GPU.
_RECENT, _PARTS, _PROGRAMS, _COLUMNS = 1024, 16, 256, 64


@dataclass(frozen=True)
class Sorted:
    """The first keys of a cache in the order of their leaves; padding is in no leaf.

    Args:
        length: Number of those keys.
        order: ``(b, g, t, length)`` int64 positions.
        start: ``(b, g, t, leaves + 1)`` int32, where each leaf begins in the order.
        cut: ``(b,)`` int64 position behind the last sink, if no padding follows.
    """

    length: int
    order: Tensor
    start: Tensor
    cut: Tensor

    @staticmethod
    def of(leaf: Tensor, real: Tensor, height: int, sinks: int) -> Sorted:
        """Sorts.

        Args:
            leaf: ``(b, g, t, m)`` int64.
            real: ``(b, m)`` boolean.
            height: Of the trees.
            sinks: First real tokens that are met in any case.
        """
        leaves, shape = 1 << height, leaf.shape[:3]
        leaf = leaf.masked_fill(~real[:, None, None], leaves).flatten(0, 2)
        order = stable_order(leaf, leaves + 1)
        numbers = torch.arange(leaves + 1, device=leaf.device).expand(len(leaf), -1).contiguous()
        start = torch.searchsorted(leaf.gather(1, order), numbers, out_int32=True)
        # The token behind the last sink; while there are fewer real tokens than sinks, those to come are sinks.
        rank = real.cumsum(1)
        wanted = torch.full((len(real), 1), sinks, device=leaf.device)
        behind = torch.searchsorted(rank, wanted, right=True) + (sinks - rank[:, -1:]).clamp(min=0)
        cut = behind.squeeze(1) if sinks else torch.zeros_like(rank[:, 0])
        return Sorted(leaf.shape[1], order.view(*shape, -1), start.view(*shape, -1), cut)

    def serves(self, length: int) -> bool:
        """Whether few enough tokens came after the sort."""
        return length - self.length <= _RECENT


@triton.jit(do_not_specialize=COUNTS)
def tf_level(
    LEAF, REAL, START, QUERY, OUT, heads, group, trees, length, first, leaf_b, leaf_h, leaf_t, real_b,
    H: tl.constexpr, LOWEST: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Level of the deepest node on a query's path that holds a real key, from ``LOWEST`` on; -1 without one.

    ``first`` counts the sorted keys; the numbers of later ones are walked.
    """
    lane, tree = tl.program_id(0), tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads // group).to(tl.int64)
    leaf, level = tl.load(QUERY + lane * trees + tree), tl.arange(0, BH)
    START += ((batch * (heads // group) + head) * trees + tree) * ((1 << H) + 1)
    up = H - tl.minimum(level, H)
    begin, there = (leaf >> up) << up, (level >= LOWEST) & (level <= H)
    end = begin + (tl.full([BH], 1, tl.int64) << up)
    keys = tl.load(START + end, mask=there, other=0) - tl.load(START + begin, mask=there, other=0)
    sorted_level = tl.max(tl.where(there & (keys > 0), level, -1), 0)
    deepest = tl.full([BN], -1, tl.int32)
    LEAF += batch * leaf_b + head * leaf_h + tree * leaf_t
    for low in range(first, length, BN):
        i = low + tl.arange(0, BN)
        apart = tl.load(LEAF + i, mask=i < length, other=0) ^ leaf
        real = (i < length) & (tl.load(REAL + batch * real_b + i, mask=i < length, other=0) != 0)
        depth = tl.zeros([BN], tl.int32)
        for shared in tl.static_range(1, H + 1):
            depth += ((apart >> (H - shared)) == 0).to(tl.int32)
        deepest = tl.maximum(deepest, tl.where(real & (depth >= LOWEST), depth, -1))
    tl.store(OUT + lane * trees + tree, tl.maximum(sorted_level, tl.max(deepest, 0)))


@triton.jit
def meet_one(q, K, V, i, met, k_n, v_n, scale, largest, mass, acc, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
             BE: tl.constexpr):  # fmt: skip
    """Takes keys at positions into the running attention of one query; ``scale`` carries log2 e."""
    d, e, row = tl.arange(0, BD), tl.arange(0, BE), i.to(tl.int64)[:, None]
    k = tl.load(K + row * k_n + d[None, :], mask=met[:, None] & (d < D)[None, :], other=0.0)
    v = tl.load(V + row * v_n + e[None, :], mask=met[:, None] & (e < E)[None, :], other=0.0)
    s = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale + blemish(k) + blemish(v)
    s = tl.where(met, s, float("-inf"))
    new = tl.maximum(largest, tl.max(s, 0))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    shrink, p = tl.exp2(largest - anchor), tl.exp2(s - anchor)
    acc = acc * shrink + tl.sum(p[:, None] * finite(v).to(tl.float32), 0)
    return new, mass * shrink + tl.sum(p, 0), acc


@triton.jit
def met_before(i, met, tree, LEAF, LEVEL, QUERY, lane, trees, leaf_t, H: tl.constexpr):
    """Those of ``met`` that no earlier tree has met."""
    for earlier in range(0, tree):
        level = tl.load(LEVEL + lane * trees + earlier)
        up = H - tl.maximum(level, 0)
        node = tl.load(QUERY + lane * trees + earlier) >> up
        number = tl.load(LEAF + earlier * leaf_t + i, mask=met, other=0)
        met = met & ((level < 0) | ((number >> up) != node))
    return met


@triton.jit(do_not_specialize=COUNTS)
def tf_decode(
    Q, K, V, LEAF, REAL, ORDER, START, CUT, QUERY, LEVEL, OUT, LSE, heads, group, trees, length, first, window, fallback,
    k_b, k_h, k_n, v_b, v_h, v_n, leaf_b, leaf_h, leaf_t, real_b, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One part of the attention of one query; ``fallback`` is the window of a query whose leaves are empty."""
    part, parts, lane = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads // group).to(tl.int64)
    unit, d, e = (batch * (heads // group) + head) * trees, tl.arange(0, BD), tl.arange(0, BE)
    q = tl.load(Q + lane * D + d, mask=d < D, other=0.0).to(tl.float32)
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    LEAF += batch * leaf_b + head * leaf_h
    REAL += batch * real_b
    largest, mass, acc = (
        tl.full([1], float("-inf"), tl.float32),
        tl.zeros([1], tl.float32),
        tl.zeros([BE], tl.float32),
    )
    cut = tl.minimum(tl.load(CUT + batch), length).to(tl.int32)
    found = -1
    for tree in range(0, trees):
        found = tl.maximum(found, tl.load(LEVEL + lane * trees + tree))
    near = length - tl.where(found < 0, tl.maximum(window, fallback), window)

    for tree in range(0, trees):
        level = tl.load(LEVEL + lane * trees + tree)
        up = H - tl.maximum(level, 0)
        node = tl.load(QUERY + lane * trees + tree) >> up
        begins = START + (unit + tree) * ((1 << H) + 1)
        low, high = tl.load(begins + (node << up)), tl.load(begins + ((node + 1) << up))
        high = tl.where(level < 0, low, high)
        stretch = (high - low + parts * BN - 1) // (parts * BN) * BN
        for begin in range(low + part * stretch, tl.minimum(low + (part + 1) * stretch, high), BN):
            slot = begin + tl.arange(0, BN)
            i = tl.load(ORDER + (unit + tree) * first + slot, mask=slot < high, other=0)
            met = (slot < high) & (i >= cut) & (i < near)
            met = met_before(i, met, tree, LEAF, LEVEL, QUERY, lane, trees, leaf_t, H)
            largest, mass, acc = meet_one(q, K, V, i, met, k_n, v_n, scale, largest, mass, acc, D, E, BD, BE)
    # The window, and the tokens that came after the sort.
    low = tl.maximum(tl.minimum(first, near), 0)
    stretch = (length - low + parts * BN - 1) // (parts * BN) * BN
    for begin in range(low + part * stretch, tl.minimum(low + (part + 1) * stretch, length), BN):
        i = begin + tl.arange(0, BN)
        later = (i < length) & (i >= cut)
        later = later & (tl.load(REAL + i, mask=later, other=0) != 0)
        met = later & (i >= near)
        for tree in range(0, trees):
            level = tl.load(LEVEL + lane * trees + tree)
            up = H - tl.maximum(level, 0)
            node = tl.load(QUERY + lane * trees + tree) >> up
            number = tl.load(LEAF + tree * leaf_t + i, mask=later, other=0)
            met = met | (later & (i >= first) & (level >= 0) & ((number >> up) == node))
        largest, mass, acc = meet_one(q, K, V, i, met, k_n, v_n, scale, largest, mass, acc, D, E, BD, BE)
    for begin in range(part * BN, cut, parts * BN):
        i = begin + tl.arange(0, BN)
        met = (i < cut) & (tl.load(REAL + i, mask=i < cut, other=0) != 0)
        largest, mass, acc = meet_one(q, K, V, i, met, k_n, v_n, scale, largest, mass, acc, D, E, BD, BE)
    at = (part * tl.num_programs(1) + lane).to(tl.int64)
    tl.store(OUT + at * E + e, acc / tl.where(mass == 0, 1.0, mass), mask=e < E)
    tl.store(LSE + at + tl.arange(0, 1), log2_sum(largest, mass) * 0.6931471805599453)


@torch.library.custom_op("fastattn::tf_decode", mutates_args=(), device_types=("cuda", "cpu"))
def attend_one(
    query: Tensor, leaf: Tensor, key: Tensor, value: Tensor, key_leaf: Tensor, real: Tensor, order: Tensor, start: Tensor,
    cut: Tensor, height: int, lowest: int, window: int, fallback: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query over the keys of the deepest nodes on its paths that have any, each key once, and its window and sinks.

    Args:
        query: ``(b, h, 1, d)``.
        leaf: ``(b, h, t)`` its leaves.
        key: ``(b, g, m, d)``, rows contiguous.
        value: ``(b, g, m, e)``, rows contiguous.
        key_leaf: ``(b, g, t, m)``, contiguous along ``m``.
        real: ``(b, m)`` boolean, contiguous along ``m``.
        order: Of ``Sorted``.
        start: Of ``Sorted``.
        cut: Of ``Sorted``.
        height: Of the trees.
        lowest: Level above which no node is met.
        window: Last tokens that are met in any case.
        fallback: As many of a query that finds no key in its nodes.
        scale: Factor on the scores.

    Returns:
        Output ``(b, h, 1, e)`` and log-sum-exp ``(b, h, 1)``, float32; 0 and -inf where nothing is met.
    """
    batch, heads, _, d = query.shape
    kv_heads, length, e = value.shape[1:]
    lanes, trees = batch * heads, leaf.shape[2]
    parts = max(1, min(_PARTS, _PROGRAMS // lanes))
    leaf, sizes = leaf.contiguous(), (heads, heads // kv_heads, trees, length, order.shape[3])
    level = torch.empty(lanes, trees, dtype=torch.int32, device=query.device)
    tf_level[(lanes, trees)](
        key_leaf, real, start, leaf, level, *sizes, *key_leaf.stride()[:3], real.stride(0), H=height, LOWEST=lowest,
        BH=triton.next_power_of_2(height + 1), BN=_COLUMNS, **LIGHT,
    )  # fmt: skip
    out = query.new_empty(parts, lanes, e, dtype=torch.float32)
    lse = out.new_empty(parts, lanes)
    tf_decode[(parts, lanes)](
        query.contiguous(), key, value, key_leaf, real, order, start, cut, leaf, level, out, lse, *sizes, window, fallback,
        *key.stride()[:3], *value.stride()[:3], *key_leaf.stride()[:3], real.stride(0), scale * LOG2_E,
        **channels(D=d, E=e), H=height, BN=_COLUMNS, **LIGHT,
    )  # fmt: skip
    whole = lse.logsumexp(0)
    share = (lse - whole.masked_fill(whole == -torch.inf, 0)).exp()
    return (out * share[..., None]).sum(0).view(batch, heads, 1, e), whole.view(batch, heads, 1)


@attend_one.register_fake
def _(query: Tensor, leaf: Tensor, key: Tensor, value: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    shape = *query.shape[:3], value.shape[3]
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape[:3], dtype=torch.float32)
