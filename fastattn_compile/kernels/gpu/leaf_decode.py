"""One query of leaf attention over a cache of keys with their leaf numbers, in Triton.

``tf_depth`` finds how deep the deepest node on the query's path with a key in it lies; ``tf_decode`` attends the keys of
the node. Both walk the leaf numbers, which are small, in stretches that run side by side; rows of keys and values are
read only where a number agrees. The results of stretches are joined by their log-sum-exp, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import LIGHT, LOG2_E, channels
from fastattn_compile.kernels.gpu.online import COUNTS, blemish, finite, log2_sum

_STRETCH, _COLUMNS = 4096, 64


@triton.jit(do_not_specialize=COUNTS)
def tf_depth(
    LEAF, REAL, QUERY, OUT, heads, group, length, leaf_b, leaf_h, real_b, stretch,
    H: tl.constexpr, DEEPEST: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Levels that the query's path shares with that of a real key at most, in one stretch; -1 without one."""
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads // group).to(tl.int64)
    leaf = tl.load(QUERY + lane)
    deepest = tl.full([BN], -1, tl.int32)
    for begin in range(part * stretch, tl.minimum((part + 1) * stretch, length), BN):
        i = begin + tl.arange(0, BN)
        number = tl.load(LEAF + batch * leaf_b + head * leaf_h + i, mask=i < length, other=0)
        real = (i < length) & (tl.load(REAL + batch * real_b + i, mask=i < length, other=0) != 0)
        depth = tl.zeros([BN], tl.int32)
        for level in tl.static_range(1, DEEPEST + 1):
            depth += ((number >> (H - level)) == (leaf >> (H - level))).to(tl.int32)
        deepest = tl.maximum(deepest, tl.where(real, depth, -1))
    tl.store(OUT + part * tl.num_programs(1) + lane, tl.max(deepest, 0))


@triton.jit(do_not_specialize=COUNTS)
def tf_decode(
    Q, K, V, LEAF, REAL, QUERY, LEVEL, OUT, LSE, heads, group, length, k_b, k_h, k_n, v_b, v_h, v_n,
    leaf_b, leaf_h, real_b, stretch, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention of one query over the keys of its node in one stretch; ``scale`` carries log2 e."""
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads // group).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q = tl.load(Q + lane * D + d, mask=d < D, other=0.0).to(tl.float32)
    shift = H - tl.load(LEVEL + lane)
    node = tl.load(QUERY + lane) >> shift
    largest, mass = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([BE], tl.float32)
    for begin in range(part * stretch, tl.minimum((part + 1) * stretch, length), BN):
        i = begin + tl.arange(0, BN)
        number = tl.load(LEAF + batch * leaf_b + head * leaf_h + i, mask=i < length, other=0)
        met = (i < length) & (tl.load(REAL + batch * real_b + i, mask=i < length, other=0) != 0)
        met = met & ((number >> shift) == node)
        if tl.max(met.to(tl.int32), 0) > 0:
            row = i.to(tl.int64)[:, None]
            k = tl.load(K + batch * k_b + head * k_h + row * k_n + d[None, :], mask=met[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load(V + batch * v_b + head * v_h + row * v_n + e[None, :], mask=met[:, None] & (e < E)[None, :], other=0.0)
            s = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale + blemish(k) + blemish(v)
            s = tl.where(met, s, float("-inf"))
            new = tl.maximum(largest, tl.max(s, 0))
            shrink, p = tl.exp2(largest - new), tl.exp2(s - new)
            largest, mass = new, mass * shrink + tl.sum(p, 0)
            acc = acc * shrink + tl.sum(p[:, None] * finite(v).to(tl.float32), 0)
    at = (part * tl.num_programs(1) + lane).to(tl.int64)
    tl.store(OUT + at * E + e, acc / tl.where(mass == 0, 1.0, mass), mask=e < E)
    tl.store(LSE + at + tl.arange(0, 1), log2_sum(largest, mass) * 0.6931471805599453)


def attend_one(
    query: Tensor, leaf: Tensor, key: Tensor, value: Tensor, key_leaf: Tensor, real: Tensor, height: int, lowest: int,
    deepest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query over the keys of the deepest node on its path that has any.

    Args:
        query: ``(b, h, 1, d)``.
        leaf: ``(b, h)`` its leaf.
        key: ``(b, g, m, d)``, rows contiguous.
        value: ``(b, g, m, e)``, rows contiguous.
        key_leaf: ``(b, g, m)``, contiguous along ``m``.
        real: ``(b, m)`` boolean, contiguous along ``m``.
        height: Of the tree.
        lowest: Level above which no node is met.
        deepest: Level of the deepest node.
        scale: Factor on the scores.

    Returns:
        Output ``(b, h, 1, e)`` and log-sum-exp ``(b, h, 1)``, float32; 0 and -inf where nothing is met.
    """
    batch, heads, _, d = query.shape
    kv_heads, length, e = value.shape[1:]
    lanes, group, parts = batch * heads, heads // kv_heads, -(-length // _STRETCH)
    leaf = leaf.contiguous()
    level = torch.full((lanes,), deepest, dtype=torch.int32, device=query.device)
    if lowest < deepest:
        depth = level.new_empty(parts, lanes)
        tf_depth[(parts, lanes)](
            key_leaf, real, leaf, depth, heads, group, length, *key_leaf.stride()[:2], real.stride(0), _STRETCH,
            H=height, DEEPEST=deepest, BN=_COLUMNS, **LIGHT,
        )  # fmt: skip
        level = depth.amax(0).clamp(min=lowest)
    out = query.new_empty(parts, lanes, e, dtype=torch.float32)
    lse = out.new_empty(parts, lanes)
    tf_decode[(parts, lanes)](
        query.contiguous(), key, value, key_leaf, real, leaf, level, out, lse, heads, group, length, *key.stride()[:3],
        *value.stride()[:3], *key_leaf.stride()[:2], real.stride(0), _STRETCH, scale * LOG2_E,
        **channels(D=d, E=e), H=height, BN=_COLUMNS, **LIGHT,
    )  # fmt: skip
    whole = lse.logsumexp(0)
    share = (lse - whole.masked_fill(whole == -torch.inf, 0)).exp()
    return (out * share[..., None]).sum(0).view(batch, heads, 1, e), whole.view(batch, heads, 1)
