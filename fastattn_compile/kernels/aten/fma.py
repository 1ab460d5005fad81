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
from dataclasses import replace

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_bias import Decay, FarBias, level_tables_backward, row_cover
from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.aten.fma_pool import combine_levels_backward, spread_levels
from fastattn_compile.kernels.aten.fma_tiles import Blocks, Part, Tile, Tiling, Workspace
from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import (
    normalise,
    of_key_heads,
    poison,
    probabilities_,
    statistics_dtype,
    without_nonfinite,
    work_dtype,
)


def of_keys(weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the weights of a learned pattern those that pool keys."""
    return [w for at, w in enumerate(weights) if at % 4 < 2]


def of_values(weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the weights of a learned pattern those that pool values."""
    return [w for at, w in enumerate(weights) if at % 4 >= 2]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    bias: Tensor | None = None,
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
        weights: For a learned pattern, for every level key weight ``(d, rank, width)`` (dense ``(d, rank, d, width)``), key
            bias ``(d, rank)``, value weight ``(e, rank, width)``, value bias ``(e, rank)``; further levels are not read.
        bias: Added by distance: ``(h,)`` slopes of ALiBi (not with a learned pattern), ``(h, 2 N - 1)`` numbers with
            ``N >= n``, or ``None``.

    Returns:
        Output ``(b, h, n, e)``, the values' type, 0 where a query sees no key; log-sum-exp ``(b, h, n)``,
        float32 (float64 for float64 values), -inf where a query sees no key.
    """
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(*query.shape[:3], 1, dtype=statistics_dtype(value))
    key, value, pattern = for_slopes(query, key, value, pattern, bias)
    tiling = Tiling(query, key, value, pattern, key_padding, bias)
    # Without padding and window every query meets itself at least.
    may_be_empty = key_padding is not None or pattern.banded

    def attend(space: Workspace, part: Part) -> None:
        bias_of = tiling.far_bias(part)
        keys = space.rows(key, part, of_keys(weights), bias_of, "keys", turned=True)
        values = space.rows(value, part, of_values(weights), bias_of, "values")
        queries, outs, lses = (Blocks(x, part, tiling) for x in (query, out, log_sum_exp))
        for blocks in tiling.passes():
            tile = space.tile(part, blocks)
            queries.load(blocks, tile.query_blocks)
            tile.gather(keys, values, part, blocks)
            k, v = tile.key, tile.value
            if not tiling.finite:
                k, v = without_nonfinite(k), without_nonfinite(v)
            visible = tile.score(k, scale, part, blocks, bias_of)
            lse = normalise(tile.scores, tile.attention, (tile.own_scores, tile.own_attention))
            torch.bmm(tile.attention, v, out=tile.out)
            if may_be_empty:
                tile.out.masked_fill_(lse == -torch.inf, 0)
            if visible is not None:
                poison(tile.out, lse, visible, tile.key, tile.value)
            outs.store(blocks, tile.out_blocks)
            lses.store(blocks, lse.view(*tile.blocked, 1))

    run_parts(attend, tiling.parts(), lambda: Workspace(tiling), query.device)
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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
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
        bias: As in ``forward``.

    Returns:
        Gradients of query, key, value and each of ``weights``, each of its input's shape and type; that of a bias by
        distance, ``None`` for slopes and without a bias.
    """
    given = key, value
    key, value, pattern = for_slopes(query, key, value, pattern, bias)
    tiling = Tiling(query, key, value, pattern, key_padding, bias)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    slope = (grad_out.to(tiling.dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    statistics = torch.stack([log_sum_exp.to(tiling.dtype), slope], -1)

    def differentiate(space: Workspace, part: Part) -> tuple[list[Tensor], slice, Tensor | None]:
        bias_of = tiling.far_bias(part)
        keys = space.rows(key, part, of_keys(weights), bias_of, "keys", turned=True)
        values = space.rows(value, part, of_values(weights), bias_of, "values")
        if not tiling.finite:
            keys, values = without_nonfinite(keys), without_nonfinite(values)
        to_keys = _Scatter(space, part, keys, bias_of, "key gradients", turned=True)
        to_values = _Scatter(space, part, values, bias_of, "value gradients")
        queries, grad_outs, stats = (Blocks(x, part, tiling) for x in (query, grad_out, statistics))
        grad_queries = Blocks(grad_query, part, tiling)
        for blocks in tiling.passes():
            tile = space.tile(part, blocks)
            assert isinstance(tile, _GradientTile)
            queries.load(blocks, tile.query_blocks)
            grad_outs.load(blocks, tile.out_blocks)
            stats.load(blocks, tile.statistics_blocks)
            tile.gather(keys, values, part, blocks)
            tile.score(tile.key, scale, part, blocks, bias_of)
            attention = probabilities_(tile.scores, tile.lse)
            if pattern.closed:
                tile.close(attention)
            torch.bmm(attention.mT, tile.out, out=tile.grad_value)
            to_values.add(tile.grad_value, blocks)
            grad_scores = torch.bmm(tile.out, tile.value.mT, out=tile.attention)
            grad_scores.sub_(tile.slope).mul_(attention)
            if bias_of is not None:
                bias_of.take(grad_scores.view(*tile.blocked, -1).transpose(1, 2), blocks)
            grad_scores.mul_(scale)
            torch.bmm(grad_scores.mT, tile.query, out=tile.grad_key)
            to_keys.add(tile.grad_key, blocks)
            torch.bmm(grad_scores, tile.key, out=tile.grad_query)
            grad_queries.store(blocks, tile.grad_query_blocks)
        grads = [torch.zeros(w.shape, dtype=tiling.dtype, device=w.device) for w in weights]
        grad_key[part.batch, part.heads] = to_keys.finish(of_keys(weights), of_keys(grads))
        grad_value[part.batch, part.heads] = to_values.finish(of_values(weights), of_values(grads))
        return grads, part.heads, None if bias_of is None else bias_of.gradient()

    # Weights are shared by all heads, biases by all sequences: their gradients are added in the order of the parts.
    grad_weights = [torch.zeros(w.shape, dtype=tiling.dtype, device=w.device) for w in weights]

    of_tables = None if tiling.tables is None else torch.zeros_like(tiling.tables)

    def add(found: tuple[list[Tensor], slice, Tensor | None]) -> None:
        grads, heads, of_bias = found
        for total, grad in zip(grad_weights, grads):
            total += grad
        if of_tables is not None and of_bias is not None:
            of_tables[heads.start * tiling.group : heads.stop * tiling.group] += of_bias.T

    run_parts(differentiate, tiling.parts(), lambda: Workspace(tiling, _GradientTile), query.device, add)
    grad_bias = None
    if of_tables is not None and tiling.tables is not None and bias is not None:
        grad_bias = level_tables_backward(tiling.tables, of_tables, row_cover(pattern), tiling.plan.levels)
        grad_bias = grad_bias.to(bias.dtype)
    grad_key, grad_value = (
        of_key_heads(grad, x.shape[1]).to(x.dtype) for grad, x in zip((grad_key, grad_value), given)
    )
    grads = tuple(g.to(w.dtype) for g, w in zip(grad_weights, weights))
    return grad_query, grad_key, grad_value, grads, grad_bias


def for_slopes(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, bias: Tensor | None
) -> tuple[Tensor, Tensor, Pattern]:
    """With slopes every query head pools keys and values its own way, and both sides of a query theirs.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: Who meets whom.
        bias: As for ``forward``.

    Returns:
        Keys and values, with as many heads as queries where there are slopes; the pattern, with its sides.
    """
    if bias is None or bias.dim() == 2:
        return key, value, pattern
    if pattern.learned:
        raise ValueError("a learned pattern takes a bias by distance, not slopes")
    group = query.shape[1] // key.shape[1]
    if group > 1:
        dtype = work_dtype(query, key, value)
        # In the work type, so that their gradients are not rounded before they are added.
        key, value = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    return key, value, replace(pattern, sides=1 if pattern.causal else 2)


class _GradientTile(Tile):
    """With the buffers of a backward pass; ``out`` holds the gradients of the outputs."""

    def __init__(self, tiling: Tiling, units: int, count: int) -> None:
        super().__init__(tiling, units, count)
        statistics, self.statistics_blocks = self.blocks_of(2)
        self.lse, self.slope = statistics.split(1, -1)
        self.grad_query, self.grad_query_blocks = self.blocks_of(tiling.head_dim)
        self.grad_key, self.grad_value = (self.slots_of(c) for c in (tiling.head_dim, tiling.value_dim))

    def close(self, attention: Tensor) -> None:
        """Takes back what rounding the log-sum-exp did to all weights of a query alike.

        A number of 4 to 8 is stored to 2e-7 in float32, several times what a softmax errs, and a learned bias of values
        collects it over all queries. Weights add up to 1; their sum divides what they are multiplied with.
        """
        total = attention.sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)  # a query without keys
        self.out.div_(total)
        self.slope.div_(total)


class _Scatter:
    """Gradients of gathered rows on their way back to the tokens, in a fixed order: no atomics, no index_add.

    Args:
        space: Of this thread.
        part: The part whose keys or values these are.
        array: Its array of rows, ``(u, plan.rows, c)``.
        bias: Of the part.
        name: Name of the buffers.
        turned: They are keys, which are pooled without their rotary embedding.
    """

    def __init__(
        self, space: Workspace, part: Part, array: Tensor, bias: FarBias | None, name: str, turned: bool = False
    ) -> None:  # fmt: skip
        self.tiling, self.part, self.array, self.bias = space.tiling, part, array, bias
        units, _, channels = array.shape
        plan, pattern = self.tiling.plan, self.tiling.pattern
        self.turned = turned and self.tiling.pattern.rotary is not None
        self.grads = space.array(name, *array.shape).zero_()
        self.sinks = array.new_zeros(units, pattern.sinks, channels)
        far = self.tiling.slots - pattern.near - pattern.sinks
        # As many blocks as the lowest level has places for, so that the blocks below a parent are a view.
        self.far = space.array(f"far {name}", units, 2 << plan.levels, far, channels)
        self.far[:, plan.blocks :] = 0

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
        target = tokens
        if self.turned:
            pooled.copy_(lists.centres.undo(pooled))
            target = torch.zeros_like(tokens)
        if pattern.learned:
            taken = tiling.tokens(self.array).clone()
            taken[:, lists.sinks] = 0
            if self.turned:
                taken = lists.tokens.undo(taken)
            combine_levels_backward(
                taken, pooled, tiling.gain(self.part), weights, target, grad_weights, plan, pattern
            )
        elif isinstance(self.bias, Decay):
            self.bias.spread(pooled, target)
        else:
            pooled.div_(lists.counts.clamp(min=1)[:, None])
            spread_levels(pooled, target, plan, pattern)
        if self.turned:
            tokens += lists.tokens.redo(target)
        tokens[:, lists.sinks] = sinks
        if lists.padding is not None:
            tokens[:, : plan.length].masked_fill_(lists.padding[:, None], 0)
        return tokens[:, : plan.length]

    def _sum_below_parents(self, pooled: Tensor) -> None:
        """All blocks below one parent met the same rows, those of the parent before (and after it)."""
        plan, pattern = self.tiling.plan, self.tiling.pattern
        slots = 2 * pattern.rank
        begin = 0
        of_later = plan.offsets[-1] * (plan.sides - 1)
        for level in range(plan.levels):
            below = self.far.unflatten(1, (plan.parents(level), -1))
            first, last = plan.offsets[level : level + 2]
            rows = pooled[:, first:last].unflatten(1, (-1, slots))
            rows[:, :-1] += below[:, 1:, :, begin : begin + slots].sum(2)
            begin += slots
            if not pattern.causal:
                rows = pooled[:, first + of_later : last + of_later].unflatten(1, (-1, slots))
                rows[:, 1:] += below[:, :-1, :, begin : begin + slots].sum(2)
                begin += slots
