"""One step of decoding by Barnes-Hut attention in Triton: the last query over a cache of keys and what its group opened.

The choice itself is made once a group of queries, by ``barnes_hut_tree.descend``. A program owns the query heads of a key
head that share it, so that a step reads two blocks, the opened leaves and the sinks once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.gpu.barnes_hut_attend import bh_fwd
from fastattn_compile.kernels.gpu.barnes_hut_pool import NO_NODES
from fastattn_compile.kernels.gpu.barnes_hut_tree import Closed
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision
from fastattn_compile.kernels.gpu.op_configs import chosen


def rows_of_nodes(
    keys: Tensor, values: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed nodes as ``attend_one`` takes them.

    Args:
        keys: ``(u, c, k, d)`` mean keys of the nodes that each chooser meets.
        values: ``(u, c, k, e)`` mean values.
        bias: ``(u, c, k)`` log of their tokens, -inf for no node.
        dtype: Type of the keys of the cache.
    """
    numbers = torch.arange(bias[0].numel(), dtype=torch.int32, device=bias.device).view(bias.shape[1:])
    met = Closed.sorted(numbers.masked_fill(bias == -torch.inf, -1).flatten(0, 1)[:, None])
    key, value = (x.to(dtype).flatten(1, 2).contiguous() for x in (keys, values))
    return key, value, (bias * LOG2_E).float().flatten(1, 2), met.nodes, met.count


@torch.library.custom_op("fastattn::barnes_hut_decode", mutates_args=(), device_types=("cuda", "cpu"))
def attend_one(
    query: Tensor, key: Tensor, value: Tensor, fine: Tensor, sink: Tensor, leaves: Tensor | None,
    node_key: Tensor | None, node_value: Tensor | None, node_weight: Tensor | None, closed: Tensor | None,
    closed_count: Tensor | None, scale: float, block: int, leaf: int, share: bool, left: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The last query over the near field, the sinks, opened leaves of the keys of a cache, and closed nodes.

    Args:
        query: ``(b, h, 1, d)``, of the last position, float16, bfloat16 or float32.
        key: ``(u, n, d)``, all keys so far, any strides, same type.
        value: ``(u, n, e)`` likewise.
        fine: ``(u, n)`` boolean, real tokens that are no sinks, rows of any stride.
        sink: ``(u, sinks)`` int32 positions, -1 for none.
        leaves: ``(u * c, 1, open)`` int32 as ``choose`` gives them; ``None`` for none.
        node_key: ``(u, k, d)`` mean keys of closed nodes, same type, contiguous; ``None`` where no node is met.
        node_value: ``(u, k, e)`` mean values likewise.
        node_weight: ``(u, k)`` float32, log2 of their tokens.
        closed: ``(u * c, 1, room)`` int32, which of them a chooser meets.
        closed_count: ``(u * c, 1)`` int32, how many.
        scale: Factor on the scores.
        block: Tokens of a block.
        leaf: Tokens of a leaf.
        share: Whether the query heads of a key head make one choice.
        left: Largest distance that is visible, below 0 for any.

    Returns:
        Output ``(b, h, 1, e)`` in the type of ``value``; log-sum-exp ``(b, h, 1)`` float32.
    """
    batch, heads, _, width = query.shape
    units, length = key.shape[:2]
    per_unit = batch * heads // units
    speakers, sinks, opened = (
        per_unit if share else 1,
        sink.shape[1],
        0 if leaves is None else leaves.shape[2],
    )
    nodes: tuple[Tensor | int | None, ...] = NO_NODES
    if node_key is not None and node_weight is not None and closed is not None:
        sizes = closed.shape[2], node_key.shape[1], node_weight.stride(0)
        nodes = node_key, node_value, node_weight, closed, closed_count, *sizes
    pool = node_key is not None
    launch = chosen("bh_fwd_few_pool" if pool else "bh_fwd_few", key[None], value[None]).launch
    out = value.new_empty(batch, heads, 1, value.shape[2])
    lse = value.new_empty(batch, heads, 1, dtype=torch.float32)
    # A unit stands for a sequence with one key head: padding and sinks are then its own.
    bh_fwd[(1, units * per_unit // speakers, 1)](
        query.contiguous(), key, value, out, lse, fine, sink, leaves, *nodes, per_unit, per_unit, length, 1, length - 1,
        per_unit * width, width, width, 1, key.stride(0), 0, *key.stride()[1:], value.stride(0), 0,
        *value.stride()[1:], fine.stride(0), sink.stride(0), left, 0, scale * LOG2_E,
        **channels(D=width, E=value.shape[2]), R=speakers, GROUP=1, BLOCK=block, LEAF=leaf, OPEN=opened, POOL=pool,
        SINKS=sinks, CAUSAL=True, PRECISION=precision(key.dtype), BO=padded(opened), BS=padded(sinks),
        **{**launch, "BM": padded(speakers)},
    )  # fmt: skip
    return out, lse


@attend_one.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    shape = *query.shape[:3], value.shape[2]
    return value.new_empty(shape), value.new_empty(shape[:3], dtype=torch.float32)
