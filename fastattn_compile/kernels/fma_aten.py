"""Fast multipole attention on ATen, forward and backward, in O(n) memory on any device.

Every block of queries meets a short list of rows (``fma_plan``): near tokens, sinks, pooled rows. For a few
blocks at a time the listed rows are gathered side by side, and a few batched products and one softmax do the
rest. The scores of a pass fit the cache; nothing grows faster than the keys themselves. Bitwise repeatable on
a CPU.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` tokens, ``d`` channels of query and key, ``e``
of value. The query heads that share a key head stand as further rows of one tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.fma_plan import Pattern
from fastattn_compile.kernels.fma_pool import combine_levels_backward, spread_levels
from fastattn_compile.kernels.fma_tiles import Part, Tiling
from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import (
    normalise,
    poison,
    probabilities_,
    statistics_dtype,
    without_nonfinite,
)


def _of_keys(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 < 2]


def _of_values(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for at, w in enumerate(weights) if at % 4 >= 2]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Fast multipole attention.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides, ``n`` at least 1.
        key: ``(b, g, n, d)``; types may differ between the three (autocast), the work is done in float32 or
            float64.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real.
        weights: For a learned pattern, for every level key weight ``(d, rank, width)``, key bias ``(d,
            rank)``, value weight ``(e, rank, width)``, value bias ``(e, rank)``; further levels are not read.

    Returns:
        Output ``(b, h, n, e)``, the values' type, 0 where a query sees no key; log-sum-exp ``(b, h, n)``,
        float32 (float64 for float64 values), -inf where a query sees no key.
    """
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(*query.shape[:3], 1, dtype=statistics_dtype(value))
    # Without padding and window every query meets itself at least.
    may_be_empty = key_padding is not None or pattern.banded

    def attend(tiling: Tiling, part: Part) -> None:
        keys = tiling.rows(key, part, _of_keys(weights), "key rows")
        values = tiling.rows(value, part, _of_values(weights), "value rows")
        for blocks in tiling.passes():
            q = tiling.load(query, part, blocks, "query")
            k = tiling.gather(keys, part, blocks, "key")
            v = tiling.gather(values, part, blocks, "value")
            clean_k, clean_v = (k, v) if tiling.finite else (without_nonfinite(k), without_nonfinite(v))
            scores, visible = tiling.scores(q, clean_k, part, blocks)
            attention = tiling.buffer("attention", *scores.shape)
            lse = normalise(scores, attention, tiling.own_key if scores.device.type == "cpu" else None)
            tile = torch.bmm(attention, clean_v, out=tiling.buffer("out", *q.shape[:2], v.shape[2]))
            if may_be_empty:
                tile.masked_fill_(lse == -torch.inf, 0)
            if visible is not None:
                poison(tile, lse, visible, k, v)
            tiling.store(out, part, blocks, tile)
            tiling.store(log_sum_exp, part, blocks, lse)

    tiling = Tiling(query, key, value, scale, pattern, key_padding)
    run_parts(attend, tiling.parts(), tiling.another, query.device)
    return out, log_sum_exp.squeeze(3)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
    key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of ``forward``: ``dS = P * (dO . v - dO . o + dlse)`` with P the weights (specification 1.6).

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
        Gradients of query, key, value and each of ``weights``, each of its input's shape and type.
    """
    tiling = Tiling(query, key, value, scale, pattern, key_padding)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    slope = (grad_out.to(tiling.dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    statistics = torch.stack([log_sum_exp.to(tiling.dtype), slope], -1)

    def differentiate(tiling: Tiling, part: Part) -> list[Tensor]:
        keys = tiling.rows(key, part, _of_keys(weights), "key rows")
        values = tiling.rows(value, part, _of_values(weights), "value rows")
        if not tiling.finite:
            keys, values = without_nonfinite(keys), without_nonfinite(values)
        to_keys = _Scatter(tiling, part, keys, "key gradients")
        to_values = _Scatter(tiling, part, values, "value gradients")
        for blocks in tiling.passes():
            q = tiling.load(query, part, blocks, "query")
            grad_o = tiling.load(grad_out, part, blocks, "grad out")
            lse, slopes = tiling.load(statistics, part, blocks, "statistics").split(1, -1)
            k = tiling.gather(keys, part, blocks, "key")
            v = tiling.gather(values, part, blocks, "value")
            scores, _ = tiling.scores(q, k, part, blocks)
            attention = probabilities_(scores, lse)
            to_values.add(torch.bmm(attention.mT, grad_o, out=tiling.buffer("grad value", *v.shape)), blocks)
            grad_scores = torch.bmm(grad_o, v.mT, out=tiling.buffer("grad scores", *scores.shape))
            grad_scores.sub_(slopes).mul_(attention).mul_(scale)
            to_keys.add(torch.bmm(grad_scores.mT, q, out=tiling.buffer("grad key", *k.shape)), blocks)
            tile = torch.bmm(grad_scores, k, out=tiling.buffer("grad query", *q.shape))
            tiling.store(grad_query, part, blocks, tile)
        grads = [torch.zeros(w.shape, dtype=tiling.dtype, device=w.device) for w in weights]
        grad_key[part.batch, part.heads] = to_keys.finish(_of_keys(weights), _of_keys(grads))
        grad_value[part.batch, part.heads] = to_values.finish(_of_values(weights), _of_values(grads))
        return grads

    # Weights are shared by all heads: their gradients are added in the order of the parts.
    grad_weights = [torch.zeros(w.shape, dtype=tiling.dtype, device=w.device) for w in weights]

    def add(grads: list[Tensor]) -> None:
        for total, grad in zip(grad_weights, grads):
            total += grad

    run_parts(differentiate, tiling.parts(), tiling.another, query.device, add)
    return grad_query, grad_key, grad_value, tuple(g.to(w.dtype) for g, w in zip(grad_weights, weights))


class _Scatter:
    """Gradients of gathered rows on their way back to the tokens, in a fixed order: no atomics, no index_add.

    Args:
        tiling: The tiling.
        part: The part whose keys or values these are.
        array: Its array of rows, ``(u, plan.rows, c)``.
        name: Name of the buffers.
    """

    def __init__(self, tiling: Tiling, part: Part, array: Tensor, name: str) -> None:
        self.tiling, self.part, self.array = tiling, part, array
        self.grads = tiling.buffer(name, *array.shape).zero_()
        self.sinks = array.new_zeros(array.shape[0], tiling.pattern.sinks, array.shape[2])
        far = tiling.slots - tiling.pattern.near - tiling.pattern.sinks
        # As many blocks as the lowest level has places for, so that the blocks below a parent are a view.
        self.far = tiling.buffer(f"far {name}", array.shape[0], 2 << tiling.plan.levels, far, array.shape[2])
        self.far[:, tiling.plan.blocks :] = 0

    def add(self, rows: Tensor, blocks: slice) -> None:
        """Takes the gradients of what some blocks met, ``(u * blocks, slots, c)``."""
        m, near, sinks = self.tiling.pattern.block, self.tiling.pattern.near, self.tiling.pattern.sinks
        split = rows.unflatten(0, (self.part.units, -1))
        for side in range(near // m):
            target = self.grads[:, (blocks.start + side) * m : (blocks.stop + side) * m]
            target.unflatten(1, (-1, m)).add_(split[:, :, side * m : (side + 1) * m])
        self.sinks += split[:, :, near : near + sinks].sum(1)
        self.far[:, blocks] = split[:, :, near + sinks :]

    def finish(self, weights: Sequence[Tensor], grad_weights: Sequence[Tensor]) -> Tensor:
        """The gradients of the tokens, ``(u, n, c)``; adds those of learned weights to ``grad_weights``."""
        tiling, plan, pattern, lists = self.tiling, self.tiling.plan, self.tiling.pattern, self.part.lists
        pooled = self.grads[:, plan.fine_rows :]
        self._sum_below_parents(pooled)
        tokens = tiling.tokens(self.grads)
        sinks = tokens[:, lists.sinks] + self.sinks
        if pattern.learned:
            taken = tiling.tokens(self.array).clone()
            taken[:, lists.sinks] = 0
            combine_levels_backward(
                taken, pooled, tiling.gain(self.part), weights, tokens, grad_weights, plan, pattern
            )
        else:
            pooled.div_(lists.counts.clamp(min=1)[:, None])
            spread_levels(pooled, tokens, plan, pattern)
        tokens[:, lists.sinks] = sinks
        if lists.padding is not None:
            tokens[:, : plan.length].masked_fill_(lists.padding[:, None], 0)
        return tokens[:, : plan.length]

    def _sum_below_parents(self, pooled: Tensor) -> None:
        """All blocks below one parent met the same rows, those of the parent before (and after it)."""
        plan, pattern = self.tiling.plan, self.tiling.pattern
        slots = 2 * pattern.rank
        begin = 0
        for level in range(plan.levels):
            below = self.far.unflatten(1, (plan.parents(level), -1))
            rows = pooled[:, plan.offsets[level] : plan.offsets[level + 1]].unflatten(1, (-1, slots))
            rows[:, :-1] += below[:, 1:, :, begin : begin + slots].sum(2)
            begin += slots
            if not pattern.causal:
                rows[:, 1:] += below[:, :-1, :, begin : begin + slots].sum(2)
                begin += slots
