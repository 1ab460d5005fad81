"""Fast multipole attention in Triton, forward and backward: arguments and results are those of ``kernels.aten.fma``.

Forward: pool, then one kernel. Backward: queries, far slots, runs, keys, sinks; every gradient is summed in one order,
the same bits every time. Rows learned by channel are products of matrices, which ATen makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan, level_count, make_plan
from fastattn_compile.kernels.aten.fma_pool import combine_levels, combine_levels_backward
from fastattn_compile.kernels.gpu.fma_attend import fma_dq, fma_fwd
from fastattn_compile.kernels.gpu.fma_configs import chosen
from fastattn_compile.kernels.gpu.fma_gradients import fma_dkv, fma_far, fma_runs, fma_sinks
from fastattn_compile.kernels.gpu.fma_pool import pool_means, spread
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision, tensor_obstacle

# Blocks of queries of one walk of fma_far, as a power of two; positions of one program of fma_sinks.
_LOG2_WALK, _STRETCH = 4, 2048


@dataclass(frozen=True)
class _Tables:
    """What is pooled and what a row weighs, for every sequence or for all alike.

    Args:
        counts: ``(b or 1, rows)`` float32, tokens that a row stands for.
        mass: ``(b or 1, rows)`` float32, log2 of what a row weighs.
        fine: ``(b, n)`` uint8, tokens that are real; ``None`` for all.
        pooled: ``(b or 1, n)`` uint8, tokens that are pooled; ``None`` for all.
        sink: ``(b or 1, sinks)`` int32 positions of the sinks, -1 for none.
    """

    counts: Tensor
    mass: Tensor
    fine: Tensor | None
    pooled: Tensor | None
    sink: Tensor | None


def _make_tables(real: Tensor, all_real: bool, pattern: Pattern) -> _Tables:
    batch, length = real.shape
    levels, m = level_count(length, pattern.block), pattern.block
    sinks = min(pattern.sinks, length)
    sink, pooled = None, None if all_real else real
    if sinks:
        # Real tokens first, in order: the first of them are the sinks.
        place = torch.sort(~real, dim=1, stable=True).indices[:, :sinks]
        sink = torch.where(real.gather(1, place), place, -1).to(torch.int32)
        pooled = real.scatter(1, place, False)
    cells = pattern.rank << (levels + 1)
    taken = F.pad((real if pooled is None else pooled).float(), (0, (m << (levels + 1)) - length))
    by_level = [taken.view(batch, cells, -1).sum(-1)]
    for _ in range(levels - 1):
        by_level.append(by_level[-1].view(batch, -1, 2).sum(-1))
    counts = torch.cat(by_level, 1)
    if pattern.learned:
        counts = (
            counts.view(batch, -1, pattern.rank)
            .mean(-1, keepdim=True)
            .expand(-1, -1, pattern.rank)
            .flatten(1)
        )
    counts = counts.contiguous()
    mass = (counts if pattern.weighted else (counts > 0).float()).log2()
    # Bytes, one a token: a kernel reads no booleans.
    fine, pooled = (None if x is None else x.to(torch.uint8) for x in (None if all_real else real, pooled))
    return _Tables(counts, mass, fine, pooled, sink)


@lru_cache(maxsize=16)
def _tables_without_padding(length: int, pattern: Pattern, device: torch.device) -> _Tables:
    return _make_tables(torch.ones(1, length, dtype=torch.bool, device=device), True, pattern)


class _Call:
    """One attention: its sizes, tables, and the arguments that kernels share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        pattern: Pattern,
        key_padding: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.pattern, self.scale = query, key, value, pattern, scale
        self.batch, self.kv_heads, self.length = key.shape[:3]
        self.group = query.shape[1] // self.kv_heads
        self.units = self.batch * self.kv_heads
        self.levels = level_count(self.length, pattern.block)
        self.blocks, self.nb = -(-self.length // pattern.block), 2 << self.levels
        self.tables = (
            _tables_without_padding(self.length, pattern, query.device)
            if key_padding is None
            else _make_tables(key_padding, False, pattern)
        )
        self.window = (
            -1 if pattern.left is None else pattern.left,
            -1 if pattern.causal or pattern.right is None else pattern.right,
        )
        self.sizes = {
            **channels(D=query.shape[3], E=value.shape[3]), "G": self.group, "BLOCK": pattern.block,
            "CAUSAL": pattern.causal, "BANDED": pattern.banded, "PRECISION": precision(query.dtype),
        }  # fmt: skip
        self.of_rows = {"RANK": pattern.rank, "LEARNED": pattern.learned}
        sinks = 0 if self.tables.sink is None else self.tables.sink.shape[1]
        self.of_sinks = {"SINKS": sinks, "BS": padded(sinks)}
        self.padded = {"PADDED": key_padding is not None}

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of query, key and value."""
        return *self.query.stride(), *self.key.stride(), *self.value.stride()

    @property
    def steps(self) -> tuple[int, int, int]:
        """Steps between sequences of what rows weigh, of real tokens, of sinks."""
        tables = self.tables
        return _step(tables.mass), _step(tables.fine), _step(tables.sink)

    def tiles(self, rows: int) -> int:
        """Programs of ``rows`` packed queries that walk one unit."""
        pairs = -(-self.blocks // 2)
        return pairs * -(-2 * self.pattern.block * self.group // rows)

    def pool(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The pooled rows of keys or values."""
        if not self.pattern.learned:
            tables, pattern = self.tables, self.pattern
            return pool_means(
                x, tables.pooled, tables.counts, self.nb, self.levels, pattern.rank, pattern.block
            )
        made = x.new_empty(self.batch, self.kv_heads, self.tables.counts.shape[1], x.shape[3])
        for sequences, tokens, factor in self._learned(x):
            rows = torch.empty(tokens.shape[0], made.shape[2], made.shape[3], device=x.device)
            combine_levels(tokens, rows, factor, weights, self._plan, self.pattern)
            made[sequences] = rows.unflatten(0, (-1, self.kv_heads)).to(x.dtype)
        return made

    def learned_backward(
        self, x: Tensor, grad_rows: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the tokens ``(b, g, n, c)`` and of the weights, from those of learned rows; float32."""
        grads = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
        made = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for sequences, tokens, factor in self._learned(x):
            grad_tokens = torch.zeros_like(tokens)
            combine_levels_backward(
                tokens,
                grad_rows[sequences].flatten(0, 1),
                factor,
                weights,
                grad_tokens,
                grads,
                self._plan,
                self.pattern,
            )
            made[sequences] = grad_tokens[:, : self.length].unflatten(0, (-1, self.kv_heads))
        if self.tables.pooled is not None:
            made *= self.tables.pooled[:, None, :, None]
        return made, grads

    @property
    def _plan(self) -> Plan:
        return make_plan(self.length, self.pattern, self.query.device)

    def _learned(self, x: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        """Sequences of one table: which, their tokens as ``combine_levels`` takes them, what rows are multiplied by."""
        pattern, pooled, found = self.pattern, self.tables.pooled, []
        width = torch.cat([
            torch.full((pattern.rank * self.nb >> level,), pattern.block << level, device=x.device)
            for level in range(self.levels)
        ])  # fmt: skip
        each = self.batch if self.tables.counts.shape[0] == 1 else 1
        for first in range(0, self.batch, each):
            tokens = x[first : first + each].float()
            if pooled is not None:
                of_table = pooled[first % pooled.shape[0] :][:1, None, :, None]
                tokens = tokens.masked_fill(of_table == 0, 0)
            tokens = F.pad(tokens.flatten(0, 1), (0, 0, 0, self.blocks * pattern.block - self.length))
            counts = self.tables.counts[first % self.tables.counts.shape[0]]
            found.append((slice(first, first + each), tokens, width / (counts * pattern.rank).clamp(min=1)))
        return found


def _step(x: Tensor | None) -> int:
    """Stride between sequences, 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _of_keys(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 < 2]


def _of_values(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 >= 2]


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``kernels.aten.fma.forward`` in Triton.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, n, d)``, same type.
        value: ``(b, g, n, e)``, same type.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real.
        weights: Of a learned pattern.

    Returns:
        Output ``(b, h, n, e)``, 0 where a query sees no key; log-sum-exp ``(b, h, n)`` float32, -inf there.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    tables, config = call.tables, chosen("fma_fwd", query, value)
    rows_k, rows_v = call.pool(key, _of_keys(weights)), call.pool(value, _of_values(weights))
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(query.shape[:3], dtype=torch.float32)
    fma_fwd[(call.tiles(config.rows), call.units)](
        query, key, value, rows_k, rows_v, tables.mass, tables.fine, tables.sink, out, log_sum_exp, None, call.kv_heads,
        call.length, call.nb, call.levels, 0, *call.strides, *call.steps, *call.window, scale * LOG2_E, **call.sizes,
        **call.of_rows, **call.of_sinks, **call.padded, PACKED=False, **config.launch,
    )  # fmt: skip
    return out, log_sum_exp


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradients of ``forward``, deterministic.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
        key_padding: As in ``forward``.
        weights: As in ``forward``.

    Returns:
        Gradients of query, key, value and each of ``weights``.
    """
    call = _Call(query, key, value, scale, pattern, key_padding)
    tables, config = call.tables, chosen("fma_dq", query, value)
    rows_k, rows_v = call.pool(key, _of_keys(weights)), call.pool(value, _of_values(weights))
    out, log_sum_exp, grad = out.contiguous(), log_sum_exp.contiguous(), grad_out.to(query.dtype).contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    grad_query = query.new_empty(query.shape)
    delta = torch.empty_like(log_sum_exp)
    fma_dq[(call.tiles(config.rows), call.units)](
        query, key, value, rows_k, rows_v, tables.mass, tables.fine, tables.sink, out, log_sum_exp, grad, slope,
        grad_query, delta, call.kv_heads, call.length, call.nb, call.levels, *call.strides, *call.steps, *call.window,
        scale * LOG2_E, HAS_GRAD_LSE=slope is not None, **call.sizes, **call.of_rows, **call.of_sinks, **call.padded,
        **config.launch,
    )  # fmt: skip
    saved = log_sum_exp, delta, grad
    grad_rows = _far(call, rows_k, rows_v, *saved)
    cells = (
        []
        if pattern.learned
        else [spread(x, tables.counts, call.nb, call.levels, pattern.rank) for x in grad_rows]
    )
    grad_key, grad_value = _near(call, cells, *saved)
    learned: list[Tensor] = []
    if pattern.learned:
        grad_weights = []
        for x, total, rows, of_side in (
            (key, grad_key, grad_rows[0], _of_keys(weights)), (value, grad_value, grad_rows[1], _of_values(weights))
        ):  # fmt: skip
            more, of_weights = call.learned_backward(x, rows, of_side)
            total += more
            grad_weights.append(of_weights)
        learned = [
            grad_weights[at % 4 // 2][at // 4 * 2 + at % 2].to(w.dtype) for at, w in enumerate(weights)
        ]
    if tables.sink is not None:
        _sinks(call, grad_key, grad_value, *saved)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), tuple(learned)


def _far(call: _Call, rows_k: Tensor, rows_v: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the pooled rows, float32."""
    config, pattern = chosen("fma_far", call.query, call.value), call.pattern
    bits, slots = min(_LOG2_WALK, call.levels), (2 if pattern.causal else 4) * pattern.rank
    runs = call.nb - (call.nb >> (bits - 1)) + (call.levels - bits + 1) * (call.nb >> bits)
    kept = [x.new_empty(call.units, runs, slots, x.shape[3], dtype=torch.float32) for x in (rows_k, rows_v)]
    walks, tiles = -(-call.blocks // (1 << bits)), -(-call.levels * slots // config.far)
    for which in config.parts:
        fma_far[(walks, call.units, tiles)](
            call.query, rows_k, rows_v, call.tables.mass, *saved, *kept, call.kv_heads, call.length, call.nb,
            call.levels, call.blocks, runs, *call.query.stride(), call.steps[0], *call.window, call.scale * LOG2_E,
            LOG2S=bits, WHICH=which, **call.sizes, **call.of_rows, **config.launch,
        )  # fmt: skip
    made = []
    for x, factor in zip(kept, (call.scale, 1.0)):
        c, tile = x.shape[3], 16
        rows = x.new_empty(call.batch, call.kv_heads, call.tables.counts.shape[1], c)
        fma_runs[(-(-pattern.rank * call.nb // tile), call.units, call.levels)](
            x, rows, call.nb, call.levels, call.blocks, runs, factor, C=c, BC=padded(c), RANK=pattern.rank,
            CAUSAL=pattern.causal, LOG2S=bits, B=tile,
        )  # fmt: skip
        made.append(rows)
    return made[0], made[1]


def _near(call: _Call, cells: Sequence[Tensor], *saved: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values from the near field, and from the cells where there are any."""
    config, tables, pattern = chosen("fma_dkv", call.query, call.value), call.tables, call.pattern
    # What is added to later is kept in full.
    exact = pattern.learned or tables.sink is not None
    grads = [
        x.new_empty(x.shape, dtype=torch.float32 if exact else x.dtype) for x in (call.key, call.value)
    ]  # fmt: skip
    for which in config.parts:
        fma_dkv[(-(-call.length // config.columns), call.units)](
            call.query, call.key, call.value, tables.fine, tables.pooled, *(cells or (None, None)), *saved, *grads,
            call.kv_heads, call.length, pattern.rank * call.nb, *call.strides, _step(tables.fine), _step(tables.pooled),
            *call.window, call.scale * LOG2_E, CELL=pattern.block // pattern.rank, ALL=tables.pooled is None,
            SPREAD=bool(cells), WHICH=which, **call.sizes, **call.padded, **config.launch,
        )  # fmt: skip
    return grads[0], grads[1]


def _sinks(call: _Call, grad_key: Tensor, grad_value: Tensor, *saved: Tensor) -> None:
    """Adds what the sinks get from the queries beyond their near field, stretch after stretch."""
    config, sink = chosen("fma_sinks", call.query, call.value), call.tables.sink
    assert sink is not None
    parts = -(-call.length // _STRETCH)
    shape = call.batch, call.kv_heads, parts, sink.shape[1]
    grads = [x.new_empty(*shape, x.shape[3], dtype=torch.float32) for x in (call.key, call.value)]
    fma_sinks[(parts, call.units)](
        call.query, call.key, call.value, sink, *saved, *grads, call.kv_heads, call.length, 0, _STRETCH, *call.strides,
        _step(sink), *call.window, call.scale * LOG2_E, **call.sizes, **call.of_sinks, **config.launch,
    )  # fmt: skip
    place = sink.clamp(min=0).long().expand(call.batch, -1)[:, None, :, None]
    real = (sink >= 0).expand(call.batch, -1)[:, None, :, None]
    for total, x in zip((grad_key, grad_value), grads):
        at = place.expand(-1, call.kv_heads, -1, x.shape[4])
        # Sinks that do not exist bring 0, wherever they point.
        total.scatter_add_(2, at, x.sum(2).masked_fill(~real, 0))


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why these kernels cannot serve a call; empty when they can."""
    if level_count(key.shape[2], pattern.block) == 0:
        return "a sequence of at most two blocks has no pooled rows"
    if pattern.dense:
        return "learned rows that mix channels"
    if pattern.rotary is not None:
        return "it pools keys as they come, with their rotary embedding"
    if pattern.sinks > 64:
        return f"{pattern.sinks} sinks, a tile holds up to 64"
    return tensor_obstacle(query, key, value)
