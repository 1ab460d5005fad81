"""Barnes-Hut attention in Triton, forward and backward: arguments and results are those of ``kernels.aten.barnes_hut``.

The tree and the choice (``barnes_hut_tree``), the rows of closed nodes where they are met (``barnes_hut_pool``), then one
kernel forward; backward queries, near keys, opened leaves and closed nodes (``barnes_hut_far``), sinks. Under a tolerance,
where the near field decides how many leaves are opened, ATen chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut import choices
from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.gpu.barnes_hut_attend import bh_dq, bh_fwd
from fastattn_compile.kernels.gpu.barnes_hut_far import add_leaves, add_nodes
from fastattn_compile.kernels.gpu.barnes_hut_gradients import bh_dkv
from fastattn_compile.kernels.gpu.barnes_hut_pool import NO_NODES, Pooled, pool_nodes
from fastattn_compile.kernels.gpu.barnes_hut_tree import Closed, build_tree, choose
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision, step, tensor_obstacle
from fastattn_compile.kernels.gpu.op_configs import chosen
from fastattn_compile.kernels.gpu.sinks import give_to_sinks

# Stretches of queries whose gradients of the sinks are summed apart.
_STRETCH = 1024


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: TreePattern) -> str:
    """Why these kernels cannot serve a call; empty when they can."""
    for name in ("leaf", "fanout"):
        width = getattr(pattern, name)
        if width & (width - 1):
            return f"{name} must be a power of two, got {width}"
    return tensor_obstacle(query, key, value)


class Call:
    """What forward and backward share: the tokens, the choice, the arguments of the kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: TreePattern, pool: bool,
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
        self.pooled: Pooled | None = None
        tree = build_tree(pattern, key, self.fine) if pool or not pattern.tolerance else None
        if pattern.tolerance or tree is None:
            self.leaves, rest = choices(query, key, scale, pattern, pool, key_padding)
            closed = None if rest is None else Closed.sorted(rest)
        else:
            self.leaves, closed = choose(tree, query, self.kv_heads, scale, pool)
        if closed is not None and tree is not None:
            self.pooled = pool_nodes(tree, key, value, self.fine, closed)
        left, right = (-1 if x is None else x for x in (pattern.left, pattern.right))
        self.sizes = heads, self.per_unit, length
        self.strides = *query.stride(), *key.stride(), *value.stride()
        self.fine_row, self.sink_row = step(self.fine), step(self.sink)
        self.bounds, self.scale = (left, right), scale * LOG2_E
        self.channels = {**channels(D=query.shape[3], E=value.shape[3]), "PRECISION": precision(query.dtype)}

    @property
    def of_group(self) -> dict[str, object]:
        """Constants of the kernels that own a group."""
        pattern = self.pattern
        return {
            **self.channels, "R": self.speakers, "GROUP": pattern.group, "BLOCK": pattern.block, "LEAF": pattern.leaf,
            "OPEN": pattern.open, "POOL": self.pooled is not None, "SINKS": pattern.sinks, "CAUSAL": pattern.causal,
            "BO": padded(pattern.open), "BS": padded(pattern.sinks),
        }  # fmt: skip

    @property
    def nodes(self) -> tuple[Tensor | int | None, ...]:
        """Of these kernels, what tells of closed nodes."""
        return NO_NODES if self.pooled is None else self.pooled.arguments

    def of_rows(
        self, kernel: str, query: Tensor, value: Tensor
    ) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid and configuration of a kernel that owns the queries of a group, or a tile of them."""
        rows = self.speakers * self.pattern.group
        name = f"{kernel}{'' if rows > 16 else '_few'}{'' if self.pooled is None else '_pool'}"
        launch = chosen(name, query, value).launch
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
        pool: Whether closed nodes are met as pooled rows, or not at all.
        key_padding: ``(b, n)`` boolean, true where a token is real.

    Returns:
        Output ``(b, h, n, e)``, contiguous; log-sum-exp ``(b, h, n)``, float32.
    """
    call = Call(query, key, value, scale, pattern, pool, key_padding)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    lse = value.new_empty(query.shape[:3], dtype=torch.float32)
    grid, launch = call.of_rows("bh_fwd", query, value)
    bh_fwd[grid](
        query, key, value, out, lse, call.fine, call.sink, call.leaves, *call.nodes, *call.sizes, call.groups, 0,
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
        pool: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        key_padding: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type.
    """
    call = Call(query, key, value, scale, pattern, pool, key_padding)
    grad_out, out, lse = grad_out.to(value.dtype).contiguous(), out.contiguous(), log_sum_exp.contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    dq, delta = query.new_empty(query.shape), torch.empty_like(lse)
    grid, launch = call.of_rows("bh_dq", query, value)
    bh_dq[grid](
        query, key, value, out, lse, grad_out, slope, dq, delta, call.fine, call.sink, call.leaves, *call.nodes,
        *call.sizes, call.groups, *call.strides, call.fine_row, call.sink_row, *call.bounds, call.scale,
        HAS_GRAD_LSE=slope is not None, **call.of_group,
        **launch,
    )  # fmt: skip
    return dq, *_of_keys(call, query, key, value, lse, grad_out, delta)


def _of_keys(
    call: Call, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values: near, then the far field's and the sinks' added."""
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
        add_leaves(call, given, dk, dv)
    if call.pooled is not None:
        add_nodes(call, given, dk, dv)
    if pattern.sinks:
        stretches = -(-length // _STRETCH)
        parts = [x.new_empty(units, stretches, pattern.sinks, x.shape[2]) for x in (dk, dv)]
        columns = padded(pattern.sinks)
        bh_dkv[(stretches, units)](
            *given, *parts, call.fine, call.sink, *call.sizes, _STRETCH, *tail, SINKS=pattern.sinks, **constants,
            **{**config.launch, "BN": columns},
        )  # fmt: skip
        give_to_sinks(
            [x.unflatten(0, (-1, call.kv_heads)) for x in (dk, dv)],
            [x.unflatten(0, (-1, call.kv_heads)) for x in parts],
            call.sink,
        )
    return dk.view(key.shape).to(key.dtype), dv.view(value.shape).to(value.dtype)
