"""Barnes-Hut attention in Triton, forward and backward: arguments and results are those of ``kernels.aten.barnes_hut``.

The tree and the choice (``barnes_hut_tree``), then one kernel forward; backward queries, near keys, opened leaves, sinks.
Under a tolerance, where the near field decides how many leaves are opened, ATen chooses.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut import opened_leaves
from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.gpu.barnes_hut_attend import bh_dq, bh_fwd
from fastattn_compile.kernels.gpu.barnes_hut_gradients import bh_dkv, bh_far_dkv, bh_far_sum
from fastattn_compile.kernels.gpu.barnes_hut_tree import build_tree, choose
from fastattn_compile.kernels.gpu.launch import LIGHT, LOG2_E, channels, padded, precision, tensor_obstacle
from fastattn_compile.kernels.gpu.leaf_lists import cut_tiles
from fastattn_compile.kernels.gpu.op_configs import chosen

# Stretches of queries whose gradients of the sinks are summed apart, and pairs of a group and a leaf of one program.
_STRETCH, _PAIRS = 1024, 256


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern, pool: bool) -> str:
    """Why these kernels cannot serve a call; empty when they can."""
    if pool:
        return "closed nodes are met as pooled rows (rest='pool')"
    for name in ("leaf", "fanout"):
        width = getattr(pattern, name)
        if width & (width - 1):
            return f"{name} must be a power of two, got {width}"
    return tensor_obstacle(query, key, value)


class _Call:
    """What forward and backward share: the tokens, the choice, the arguments of the kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern,
        key_padding: Tensor | None,
    ) -> None:  # fmt: skip
        batch, heads, length, _ = query.shape
        self.pattern, self.kv_heads = pattern, key.shape[1]
        self.per_unit = heads // self.kv_heads
        self.speakers = self.per_unit if pattern.share else 1
        self.groups = -(-length // pattern.group)
        self.choosers = batch * heads // self.speakers
        real = (
            torch.ones(1, length, dtype=torch.bool, device=key.device) if key_padding is None else key_padding
        )
        rank = real.cumsum(1)
        self.fine = real & (rank > pattern.sinks)
        wanted = torch.arange(1, pattern.sinks + 1, device=key.device).expand(real.shape[0], -1).contiguous()
        self.sink = torch.searchsorted(rank, wanted, out_int32=True)
        self.sink = self.sink.masked_fill(self.sink >= length, -1)
        if pattern.tolerance:
            self.leaves = opened_leaves(query, key, scale, pattern, key_padding)
        else:
            self.leaves = choose(build_tree(pattern, key, self.fine), query, self.kv_heads, scale)
        left, right = (-1 if x is None else x for x in (pattern.left, pattern.right))
        padded = real.shape[0] > 1
        self.sizes = heads, self.per_unit, length
        self.strides = *query.stride(), *key.stride(), *value.stride()
        self.fine_row, self.sink_row = (x.stride(0) if padded else 0 for x in (self.fine, self.sink))
        self.bounds, self.scale = (left, right), scale * LOG2_E
        self.channels = {**channels(D=query.shape[3], E=value.shape[3]), "PRECISION": precision(query.dtype)}

    @property
    def of_group(self) -> dict[str, object]:
        """Constants of the kernels that own a group."""
        pattern = self.pattern
        return {
            **self.channels, "R": self.speakers, "GROUP": pattern.group, "BLOCK": pattern.block, "LEAF": pattern.leaf,
            "OPEN": pattern.open, "SINKS": pattern.sinks, "CAUSAL": pattern.causal,
            "BO": padded(pattern.open), "BS": padded(pattern.sinks),
        }  # fmt: skip

    def of_rows(
        self, kernel: str, query: Tensor, value: Tensor
    ) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid and configuration of a kernel that owns the queries of a group, or a tile of them."""
        rows = self.speakers * self.pattern.group
        launch = chosen(kernel if rows > 16 else f"{kernel}_few", query, value).launch
        launch["BM"] = min(launch["BM"], padded(rows))
        return (self.groups, self.choosers, -(-rows // launch["BM"])), launch


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.barnes_hut.forward`` in Triton.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, n, d)``, same type.
        value: ``(b, g, n, e)``, same type.
        scale: Factor on the scores.
        pattern: The pattern.
        pool: Must be false.
        key_padding: ``(b, n)`` boolean, true where a token is real.

    Returns:
        Output ``(b, h, n, e)``, contiguous; log-sum-exp ``(b, h, n)``, float32.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    lse = value.new_empty(query.shape[:3], dtype=torch.float32)
    grid, launch = call.of_rows("bh_fwd", query, value)
    bh_fwd[grid](
        query, key, value, out, lse, call.fine, call.sink, call.leaves, *call.sizes, call.groups, 0,
        *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale, **call.of_group,
        **launch,
    )  # fmt: skip
    return out, lse


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
    out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward`` for the choice it made, deterministic.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        pool: Must be false.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        key_padding: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    grad_out, out, lse = grad_out.to(value.dtype).contiguous(), out.contiguous(), log_sum_exp.contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    dq, delta = query.new_empty(query.shape), torch.empty_like(lse)
    grid, launch = call.of_rows("bh_dq", query, value)
    bh_dq[grid](
        query, key, value, out, lse, grad_out, slope, dq, delta, call.fine, call.sink, call.leaves, *call.sizes,
        call.groups, *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale,
        HAS_GRAD_LSE=slope is not None, **call.of_group,
        **launch,
    )  # fmt: skip
    return dq, *_of_keys(call, query, key, value, lse, grad_out, delta)


def _of_keys(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values: near, then the leaves' and the sinks' added."""
    pattern, length = call.pattern, query.shape[2]
    units = key.shape[0] * call.kv_heads
    given = query, key, value, lse, grad_out, delta
    dk, dv = (x.new_empty(units, length, x.shape[3], dtype=torch.float32) for x in (key, value))
    tail = *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale
    config = chosen("bh_dkv", query, value)
    constants = {**call.channels, "BLOCK": pattern.block, "CAUSAL": pattern.causal}
    bh_dkv[(-(-length // config.columns), units)](
        *given, dk, dv, call.fine, call.sink, *call.sizes, 0, *tail, SINKS=0, **constants, **config.launch
    )
    if pattern.open:
        _add_leaves(call, given, dk, dv)
    if pattern.sinks:
        stretches = -(-length // _STRETCH)
        parts = [x.new_empty(units, stretches, pattern.sinks, x.shape[2]) for x in (dk, dv)]
        columns = padded(pattern.sinks)
        bh_dkv[(stretches, units)](
            *given, *parts, call.fine, call.sink, *call.sizes, _STRETCH, *tail, SINKS=pattern.sinks, **constants,
            **{**config.launch, "BN": columns},
        )  # fmt: skip
        # Sinks stand at different places; those that do not exist bring 0 to the first token.
        place = call.sink.clamp(min=0).long().expand(key.shape[0], -1).repeat_interleave(call.kv_heads, 0)
        for total, part in zip((dk, dv), parts):
            total.scatter_add_(1, place[..., None].expand(-1, -1, total.shape[2]), part.sum(1))
    return dk.view(key.shape).to(key.dtype), dv.view(value.shape).to(value.dtype)


def _add_leaves(call: _Call, given: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    """Adds the gradients of opened leaves, unit by unit: what a unit needs for it is as large as its choice."""
    pattern, length = call.pattern, dk.shape[1]
    leaves = -(-length // pattern.leaf)
    config = chosen("bh_far_dkv", given[0], given[2])
    rows = padded(pattern.leaf)
    numbers = torch.arange(leaves + 1, device=dk.device)
    for unit, opened in enumerate(call.leaves.view(dk.shape[0], -1)):
        of_leaf, pair = torch.sort(opened.masked_fill(opened < 0, leaves), stable=True)
        first = torch.ones_like(pair, dtype=torch.bool)
        first[1:] = of_leaf[1:] != of_leaf[:-1]
        tile = cut_tiles(first, _PAIRS)
        tiles = tile.numel() - 1
        parts = [x.new_empty(tiles, pattern.leaf, x.shape[2]) for x in (dk, dv)]
        bh_far_dkv[(tiles,)](
            *given, *parts, call.fine, pair, tile, of_leaf, unit, leaves, *call.sizes, call.groups, *call.strides,
            call.fine_row, call.scale, **call.channels, R=call.speakers, GROUP=pattern.group, LEAF=pattern.leaf,
            OPEN=pattern.open, BL=rows, **config.launch,
        )  # fmt: skip
        begin = torch.searchsorted(of_leaf[tile[:-1].long()], numbers, out_int32=True)
        for part, total in zip(parts, (dk, dv)):
            block = min(64, padded(total.shape[2]))
            bh_far_sum[(leaves, -(-total.shape[2] // block))](
                part, total, begin, unit, length, C=total.shape[2], LEAF=pattern.leaf, BC=block,
                BL=triton.next_power_of_2(pattern.leaf), **LIGHT,
            )  # fmt: skip
