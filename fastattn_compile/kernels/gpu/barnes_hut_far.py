"""Gradients of what groups met in the far field in Triton: keys of opened leaves, and rows of closed nodes.

Pairs of a group and what it met are sorted by what was met, and summed in that order: the same bits every time. One unit
after another: what a unit needs for it is as large as its choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.gpu.barnes_hut_gradients import bh_far_dkv, bh_far_sum
from fastattn_compile.kernels.gpu.barnes_hut_pool import Pooled
from fastattn_compile.kernels.gpu.launch import LIGHT, padded, step
from fastattn_compile.kernels.gpu.leaf_lists import cut_tiles
from fastattn_compile.kernels.gpu.op_configs import chosen

if TYPE_CHECKING:
    from fastattn_compile.kernels.gpu.barnes_hut import Call

# Pairs of one program, and nodes that are dealt with together: as many rows as a product has at least.
_PAIRS, _TOGETHER = 256, 16


def add_leaves(call: Call, given: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    """Adds the gradients of opened leaves.

    Args:
        call: The call.
        given: Query, key, value, log-sum-exp, gradient of the output and delta.
        dk: ``(u, n, d)`` float32.
        dv: ``(u, n, e)`` float32.
    """
    leaves = -(-dk.shape[1] // call.pattern.leaf)
    for unit, opened in enumerate(call.leaves.view(dk.shape[0], -1)):
        of_leaf, pair = torch.sort(opened.masked_fill(opened < 0, leaves), stable=True)
        _add(call, given, (dk, dv), unit, of_leaf, pair)


def add_nodes(call: Call, given: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    """Adds the gradients of closed nodes; arguments as of ``add_leaves``."""
    pooled = call.pooled
    assert pooled is not None
    units = dk.shape[0]
    key, value = (x.unflatten(0, (-1, call.kv_heads)) for x in (pooled.key, pooled.value))
    rows = given[0], key, value, *given[3:]
    totals = (
        dk.new_zeros(units, pooled.tree.nodes, dk.shape[2]),
        dv.new_zeros(units, pooled.tree.nodes, dv.shape[2]),
    )
    nodes, count = pooled.closed.nodes, pooled.closed.count.view(units, -1)
    for unit, (listed, many) in enumerate(zip(nodes.view(units, -1, pooled.room), count)):
        of_block, pair, met = _blocks(listed, many)
        if len(pair):
            _add(call, rows, totals, unit, of_block, pair, pooled, met)
    for total, grads in zip((dk, dv), totals):
        total += pooled.to_tokens(grads, call.fine)


def _blocks(nodes: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who met which nodes of each block of ``_TOGETHER`` consecutive ones; siblings are in one block as a rule.

    Args:
        nodes: ``(choices, room)`` int32, the nodes of a choice first.
        count: ``(choices,)`` int32.

    Returns:
        Blocks, ascending, int32; numbers of choices, int64; bits of the nodes that were met, int32; ``(pairs,)`` each.
    """
    choices, room = nodes.shape
    choice, slot = (torch.arange(room, device=nodes.device) < count[:, None]).nonzero(as_tuple=True)
    node = nodes[choice, slot].long()
    block = torch.div(node, _TOGETHER, rounding_mode="floor")
    code = ((block * choices + choice) * _TOGETHER + node % _TOGETHER).sort().values
    place = torch.div(code, _TOGETHER, rounding_mode="floor")
    begin = _first(place).nonzero().flatten()
    end = torch.cat([begin[1:], begin.new_tensor([place.numel()])])
    # The nodes of a pair differ, so that the sum of their bits is their union.
    bits = F.pad((1 << code % _TOGETHER).cumsum(0), (1, 0))
    place = place[begin]
    return (
        torch.div(place, choices, rounding_mode="floor").int(),
        place % choices,
        (bits[end] - bits[begin]).int(),
    )


def _first(x: Tensor) -> Tensor:
    """Whether each of ``(p,)`` sorted numbers is the first of its kind."""
    first = torch.ones_like(x, dtype=torch.bool)
    first[1:] = x[1:] != x[:-1]
    return first


def _add(
    call: Call, given: tuple[Tensor, ...], totals: tuple[Tensor, Tensor], unit: int, of_leaf: Tensor, pair: Tensor,
    pooled: Pooled | None = None, met: Tensor | None = None,
) -> None:  # fmt: skip
    """Adds one unit's gradients to ``(u, rows, *)``, from its pairs sorted by leaf, or by block of nodes."""
    query, key, value, *_ = given
    pattern, rows = call.pattern, totals[0].shape[1]
    width, slots = (pattern.leaf, pattern.open) if pooled is None else (_TOGETHER, 1)
    leaves = -(-rows // width)
    config = chosen("bh_far_dkv" if pooled is None else "bh_far_dkv_pool", query, value)
    tile = cut_tiles(_first(of_leaf), _PAIRS)
    tiles = tile.numel() - 1
    parts = [x.new_empty(tiles, width, x.shape[2]) for x in totals]
    bh_far_dkv[(tiles,)](
        *given, *parts, call.fine, pair, tile, of_leaf,
        *((None,) * 4 if pooled is None else (pooled.weight, met, rows, step(pooled.weight))), unit, leaves,
        *call.sizes, call.groups, *query.stride(), *key.stride(), *value.stride(), call.fine_row, call.scale,
        **call.channels, R=call.speakers, GROUP=pattern.group, LEAF=width, OPEN=slots, POOL=pooled is not None,
        BL=padded(width), **config.launch,
    )  # fmt: skip
    numbers = torch.arange(leaves + 1, device=of_leaf.device)
    begin = torch.searchsorted(of_leaf[tile[:-1].long()], numbers, out_int32=True)
    for part, total in zip(parts, totals):
        block = min(64, padded(total.shape[2]))
        bh_far_sum[(leaves, -(-total.shape[2] // block))](
            part, total, begin, unit, rows, C=total.shape[2], LEAF=width, BC=block, BL=triton.next_power_of_2(width),
            **LIGHT,
        )  # fmt: skip
