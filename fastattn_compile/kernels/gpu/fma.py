"""Fast multipole attention in Triton, forward and backward: arguments and results are those of ``kernels.aten.fma``.

Forward: pool, then one kernel. Backward: queries, far slots, runs, keys, sinks; every gradient is summed in one order,
the same bits every time. Rows learned by channel are products of matrices, which ATen makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern, level_count
from fastattn_compile.kernels.gpu.fma_attend import fma_dq, fma_fwd
from fastattn_compile.kernels.gpu.fma_call import Call
from fastattn_compile.kernels.gpu.fma_configs import Config, chosen
from fastattn_compile.kernels.gpu.fma_gradients import fma_dkv, fma_far, fma_runs, fma_sinks
from fastattn_compile.kernels.gpu.fma_pool import spread
from fastattn_compile.kernels.gpu.launch import LOG2_E, padded, step, tensor_obstacle
from fastattn_compile.kernels.gpu.sinks import give_to_sinks

# Positions of one program of fma_sinks; programs that keep a GPU busy.
_STRETCH, _PROGRAMS = 2048, 512


def _of_keys(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 < 2]


def _of_values(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 >= 2]


def _config(kernel: str, call: Call) -> Config:
    return chosen(kernel, call.query, call.value, packed=call.table is not None)


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
    return attend(Call(query, key, value, scale, pattern, key_padding), weights)


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
    call = Call(query, key, value, scale, pattern, key_padding)
    return differentiate(call, out, log_sum_exp, grad_out, grad_log_sum_exp, weights)


def attend(call: Call, weights: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """``forward`` of a call, of sequences or of documents."""
    query, key, value, tables = call.query, call.key, call.value, call.tables
    config = _config("fma_fwd", call)
    rows_k, rows_v = call.pool(key, _of_keys(weights)), call.pool(value, _of_values(weights))
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(query.shape[:3], dtype=torch.float32)
    fma_fwd[(call.tiles(config.rows), call.units)](
        query, key, value, rows_k, rows_v, tables.mass, tables.fine, tables.sink, out, log_sum_exp, call.table,
        call.kv_heads, call.length, call.nb, call.levels, rows_k.shape[2], *call.strides, *call.steps, *call.window,
        call.scale * LOG2_E, **call.sizes, **call.of_rows, **call.of_sinks, **call.padded, **call.packed, **config.launch,
    )  # fmt: skip
    return out, log_sum_exp


def differentiate(
    call: Call, out: Tensor, log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """``backward`` of a call, of sequences or of documents."""
    query, key, value, tables, pattern = call.query, call.key, call.value, call.tables, call.pattern
    config = _config("fma_dq", call)
    rows_k, rows_v = call.pool(key, _of_keys(weights)), call.pool(value, _of_values(weights))
    out, log_sum_exp, grad = out.contiguous(), log_sum_exp.contiguous(), grad_out.to(query.dtype).contiguous()
    slope = None if grad_log_sum_exp is None else grad_log_sum_exp.float().contiguous()
    grad_query = query.new_empty(query.shape)
    delta = torch.empty_like(log_sum_exp)
    fma_dq[(call.tiles(config.rows), call.units)](
        query, key, value, rows_k, rows_v, tables.mass, tables.fine, tables.sink, out, log_sum_exp, grad, slope,
        grad_query, delta, call.table, call.kv_heads, call.length, call.nb, call.levels, rows_k.shape[2], *call.strides,
        *call.steps, *call.window, call.scale * LOG2_E, HAS_GRAD_LSE=slope is not None, **call.sizes, **call.of_rows,
        **call.of_sinks, **call.padded, **call.packed, **config.launch,
    )  # fmt: skip
    saved = log_sum_exp, delta, grad
    # Documents of at most two blocks have no rows.
    grad_rows: tuple[Tensor, ...] = _far(call, rows_k, rows_v, *saved) if call.levels else ()
    if not pattern.learned:
        for x in grad_rows:
            spread(x, tables.counts, call.nb, call.levels, pattern.rank, call.table)
    grad_key, grad_value = _near(call, () if pattern.learned else grad_rows, *saved)
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


def _far(call: Call, rows_k: Tensor, rows_v: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the pooled rows, float32."""
    config, pattern = _config("fma_far", call), call.pattern
    slots, all_rows = (2 if pattern.causal else 4) * pattern.rank, rows_k.shape[2]
    kept = [
        x.new_empty(*x.shape[:2], call.runs, slots, x.shape[3], dtype=torch.float32) for x in (rows_k, rows_v)
    ]
    walks, tiles = -(-call.blocks // (1 << call.log2_walk)), -(-call.levels * slots // config.far)
    for which in config.parts:
        fma_far[(walks, call.units, tiles)](
            call.query, rows_k, rows_v, call.tables.mass, *saved, *kept, call.table, call.kv_heads, call.length, call.nb,
            call.levels, all_rows, call.runs, *call.query.stride(), call.steps[0], *call.window, call.scale * LOG2_E,
            WHICH=which, **call.sizes, **call.of_far, **call.packed, **config.launch,
        )  # fmt: skip
    made = []
    for x, of_runs, factor in zip((rows_k, rows_v), kept, (call.scale, 1.0)):
        c, tile, rows = x.shape[3], 16, torch.empty_like(x, dtype=torch.float32)
        fma_runs[(-(-pattern.rank * call.nb // tile), call.units, call.levels)](
            of_runs, rows, call.table, call.kv_heads, call.length, call.nb, call.levels, all_rows, call.runs, factor, C=c,
            BC=padded(c), BLOCK=pattern.block, RANK=pattern.rank, CAUSAL=pattern.causal, LOG2S=call.log2_walk,
            **call.packed, B=tile,
        )  # fmt: skip
        made.append(rows)
    return made[0], made[1]


def _near(call: Call, cells: Sequence[Tensor], *saved: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values from the near field, and from the cells where there are any."""
    config, tables, pattern = _config("fma_dkv", call), call.tables, call.pattern
    # What all tokens get more of later is kept in full.
    grads = [
        x.new_empty(x.shape, dtype=torch.float32 if pattern.learned else x.dtype)
        for x in (call.key, call.value)
    ]
    for which in config.parts:
        fma_dkv[(-(-call.longest // config.columns), call.units)](
            call.query, call.key, call.value, tables.fine, tables.pooled, *(cells or (None, None)), *saved, *grads,
            call.table, call.kv_heads, call.length, call.levels, cells[0].shape[2] if cells else 0, *call.strides,
            step(tables.fine), step(tables.pooled), *call.window, call.scale * LOG2_E, CELL=pattern.block // pattern.rank,
            ALL=tables.pooled is None, SPREAD=bool(cells), WHICH=which, **call.sizes, **call.padded, **call.packed,
            **config.launch,
        )  # fmt: skip
    return grads[0], grads[1]


def _sinks(call: Call, grad_key: Tensor, grad_value: Tensor, *saved: Tensor) -> None:
    """Adds what the sinks get from the queries beyond their near field, stretch after stretch."""
    config, sink = _config("fma_sinks", call), call.tables.sink
    assert sink is not None
    parts, stretch = -(-call.longest // _STRETCH), _STRETCH
    number = call.units // call.kv_heads
    if call.table is not None:
        # A long document among many short ones: not more stretches of each than keep a GPU busy.
        parts = min(parts, -(-_PROGRAMS // call.units))
        stretch = -(-call.longest // parts)
    shape = number, call.kv_heads, parts, sink.shape[1]
    grads = [x.new_empty(*shape, x.shape[3], dtype=torch.float32) for x in (call.key, call.value)]
    fma_sinks[(parts, call.units)](
        call.query, call.key, call.value, sink, *saved, *grads, call.table, call.kv_heads, call.length, 0, stretch,
        *call.strides, step(sink), *call.window, call.scale * LOG2_E, **call.sizes, **call.of_sinks, **call.packed,
        **config.launch,
    )  # fmt: skip
    give_to_sinks((grad_key, grad_value), grads, sink, call.table)


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
