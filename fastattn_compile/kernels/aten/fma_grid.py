"""Fast multipole attention on the grid of an image, on ATen: forward and backward in O(n log n) time and O(n) memory.

All queries of a finest cell meet the same rows (``fma_grid_plan``): the tokens of nine cells, pooled rows of far ones, the
tokens in front of the grid. For some cells at a time the rows are gathered side by side, and a few batched products and
one softmax do the rest. Bitwise repeatable on a CPU.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` tokens of the grid, ``p`` tokens in front of it, ``d`` channels
of query and key, ``e`` of value. ``u`` key heads are served at once; the query heads that share one stand as further rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_grid_plan import (
    FAR_CELLS,
    NEAR_CELLS,
    GridPattern,
    level_offsets,
    met_cells,
)
from fastattn_compile.kernels.aten.fma_grid_pool import (
    from_cells,
    gains,
    learned_rows,
    learned_rows_backward,
    part_sums,
    part_sums_backward,
    row_counts,
    to_cells,
)
from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import SCORE_TILE, normalise, probabilities_, statistics_dtype, work_dtype

# Elements of the keys and values that a pass on a CPU gathers: they stay in the cache between products.
GATHERED = 1 << 20
# Cells for which lists are made at once.
LISTED = 256
# A GPU wants few large products.
GPU_PASS = 1 << 26


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: GridPattern,
    key_padding: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Fast multipole attention of the queries of a grid.

    Args:
        query: ``(b, h, n, d)``, floating point, of the tokens of the grid, row after row.
        key: ``(b, g, p + n, d)``; types may differ between the three (autocast), the work is done in float32 or float64.
        value: ``(b, g, p + n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, p + n)`` boolean, true where a token is real.
        weights: For a learned pattern, for every level key weight ``(d, rank, width, width)``, key bias ``(d, rank)``,
            value weight ``(e, rank, width, width)``, value bias ``(e, rank)``.

    Returns:
        Output ``(b, h, n, e)``, the values' type, 0 where a query sees no key; log-sum-exp ``(b, h, n)``, float32 (float64
        for float64 values), -inf where a query sees no key.
    """
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(*query.shape[:3], dtype=statistics_dtype(value))
    call = _Call(query, key, value, pattern, key_padding)

    def attend(_: None, part: _Part) -> None:
        facts = _Facts(call, part)
        keys = facts.rows(key, weights[0::4], weights[1::4])
        values = facts.rows(value, weights[2::4], weights[3::4])
        queries = call.query_cells(query, part)
        outs, lses = (queries.new_empty(*queries.shape[:3], c) for c in (value.shape[3], 1))
        for cells, met in facts.passes():
            scores = met.score(queries[:, cells].flatten(0, 1), met.gather(keys), scale)
            attention = torch.empty_like(scores)
            lse = normalise(scores, attention, (call.own_keys(scores), call.own_keys(attention)))
            found = torch.bmm(attention, met.gather(values))
            if key_padding is not None:
                found.masked_fill_(lse == -torch.inf, 0)
            outs[:, cells] = found.unflatten(0, (len(part), -1))
            lses[:, cells] = lse.unflatten(0, (len(part), -1))
        out[part.batch, part.of_queries] = call.query_tokens(outs, part)
        log_sum_exp[part.batch, part.of_queries] = call.query_tokens(lses, part).squeeze(-1)

    run_parts(attend, call.parts(), lambda: None, query.device)
    return out, log_sum_exp


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: GridPattern,
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
        Gradients of query, key, value and each of ``weights``, of their shapes; those of keys and values in the work type,
        so that further ones can be added.
    """
    call = _Call(query, key, value, pattern, key_padding)
    dtype = call.dtype
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key, grad_value = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    slope = (grad_out.to(dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    saved = torch.cat([grad_out.to(dtype), log_sum_exp.to(dtype)[..., None], slope[..., None]], -1)

    def differentiate(_: None, part: _Part) -> list[Tensor]:
        facts = _Facts(call, part)
        keys = facts.rows(key, weights[0::4], weights[1::4])
        values = facts.rows(value, weights[2::4], weights[3::4])
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        queries, stats = call.query_cells(query, part), call.query_cells(saved, part)
        grad_queries = torch.empty_like(queries)
        for cells, met in facts.passes():
            q = queries[:, cells].flatten(0, 1)
            grad, lse, shift = stats[:, cells].flatten(0, 1).split([value.shape[3], 1, 1], -1)
            k, v = met.gather(keys), met.gather(values)
            attention = probabilities_(met.score(q, k, scale), lse)
            met.scatter(attention, grad, to_values)
            grad_scores = torch.bmm(grad, v.mT).sub_(shift).mul_(attention).mul_(scale)
            met.scatter(grad_scores, q, to_keys)
            grad_queries[:, cells] = torch.bmm(grad_scores, k).unflatten(0, (len(part), -1))
        grads = [torch.zeros(w.shape, dtype=dtype, device=w.device) for w in weights]
        place = part.batch, part.of_keys
        grad_query[part.batch, part.of_queries] = call.query_tokens(grad_queries, part).to(query.dtype)
        grad_key[place] = facts.spread(to_keys, key, weights[0::4], (grads[0::4], grads[1::4]))
        grad_value[place] = facts.spread(to_values, value, weights[2::4], (grads[2::4], grads[3::4]))
        return grads

    # Weights are shared by all heads: their gradients are added in the order of the parts.
    grad_weights = [torch.zeros(w.shape, dtype=dtype, device=w.device) for w in weights]

    def add(grads: list[Tensor]) -> None:
        for total, grad in zip(grad_weights, grads):
            total += grad

    run_parts(differentiate, call.parts(), lambda: None, query.device, add)
    return grad_query, grad_key, grad_value, tuple(g.to(w.dtype) for g, w in zip(grad_weights, weights))


@dataclass(frozen=True)
class _Part:
    """Some key heads of one sequence.

    Args:
        batch: The sequence.
        of_keys: The key heads.
        of_queries: The query heads that read them.
    """

    batch: int
    of_keys: slice
    of_queries: slice

    def __len__(self) -> int:
        return self.of_keys.stop - self.of_keys.start


class _Call:
    """The sizes of a call, and how it is cut into parts and passes."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: GridPattern, key_padding: Tensor | None
    ) -> None:
        self.pattern, self.key_padding = pattern, key_padding
        self.dtype = work_dtype(query, key, value)
        self.device = query.device
        self.batch, self.key_heads = key.shape[:2]
        self.group = query.shape[1] // key.shape[1]
        down, across = pattern.cells(0)
        self.cells = down * across
        slots = NEAR_CELLS * pattern.block + FAR_CELLS * pattern.levels * pattern.rank + pattern.prefix
        scores, gathered = self.group * pattern.block * slots, slots * (key.shape[3] + value.shape[3])
        if self.device.type == "cpu":
            self.at_once = max(1, min(SCORE_TILE // scores, GATHERED // gathered))
        else:
            self.at_once = max(1, GPU_PASS // (scores + gathered))

    def parts(self) -> list[_Part]:
        """One key head at a time, or as many as a pass holds."""
        size = max(1, min(self.key_heads, self.at_once // self.cells))
        return [
            _Part(batch, slice(first, last), slice(first * self.group, last * self.group))
            for batch in range(self.batch)
            for first in range(0, self.key_heads, size)
            for last in [min(first + size, self.key_heads)]
        ]

    def own_keys(self, scores: Tensor) -> Tensor:
        """Of a tile of scores, those of every query and its own key."""
        first = NEAR_CELLS // 2 * self.pattern.block
        of_cell = scores[..., first : first + self.pattern.block].unflatten(1, (self.group, -1))
        return of_cell.diagonal(dim1=2, dim2=3)

    def query_cells(self, x: Tensor, part: _Part) -> Tensor:
        """``(b, h, n, c)`` as ``(u, cells, group * block, c)``, in the work type."""
        cells = to_cells(x[part.batch, part.of_queries].to(self.dtype), self.pattern)
        return cells.unflatten(0, (-1, self.group)).transpose(1, 2).flatten(2, 3)

    def query_tokens(self, cells: Tensor, part: _Part) -> Tensor:
        """The way back of ``query_cells``, ``(u * group, n, c)``."""
        split = cells.unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1)
        return from_cells(split, self.pattern)


class _Facts:
    """Which tokens of a part are real, what its pooled rows stand for, and where they are in one array of rows.

    The array holds the tokens of all finest cells and of one that is empty, the pooled rows of all cells and of one that is
    empty, and the tokens in front of the grid.
    """

    def __init__(self, call: _Call, part: _Part) -> None:
        self.call, self.part, self.pattern = call, part, call.pattern
        pattern, device = call.pattern, call.device
        self.real = None if call.key_padding is None else call.key_padding[part.batch]
        seen = torch.ones(pattern.prefix + pattern.tokens, dtype=call.dtype, device=device)
        if self.real is not None:
            seen = self.real.to(call.dtype)
        taken = seen[pattern.prefix :]
        self.counts = row_counts(taken, pattern)
        self.gain = gains(self.counts, pattern) if pattern.learned else None
        mass = self.counts if pattern.scale_attn else (self.counts > 0).to(call.dtype)
        fine = to_cells(taken[None, :, None], pattern).flatten()
        empty = [seen.new_zeros(pattern.block), seen.new_zeros(pattern.rank)]
        # log 0 is -inf: what is not there is not seen.
        self.bias = torch.cat([fine, empty[0], mass.flatten(), empty[1], seen[: pattern.prefix]]).log()
        self.far_begin = fine.numel() + pattern.block
        self.empty_cell = level_offsets(pattern)[-1]
        self.prefix_begin = self.far_begin + mass.numel() + pattern.rank

    def rows(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """Keys or values of the part with their pooled rows, ``(u, rows, c)``."""
        pattern, tokens = self.pattern, self._tokens(x)
        grid = tokens[:, pattern.prefix :]
        if self.gain is None:
            pooled = part_sums(grid, pattern) / self.counts.clamp(min=1)[..., None]
        else:
            pooled = learned_rows(grid, self.gain, _paired(weights, biases), pattern)
        rows = tokens.new_zeros(len(self.part), self.bias.numel(), x.shape[3])
        fine = self.far_begin - pattern.block
        rows[:, :fine] = to_cells(grid, pattern).flatten(1, 2)
        rows[:, self.far_begin : self.prefix_begin - pattern.rank] = pooled.flatten(1, 2)
        rows[:, self.prefix_begin :] = tokens[:, : pattern.prefix]
        return rows

    def spread(
        self, grads: Tensor, x: Tensor, weights: Sequence[Tensor], grad_weights: tuple[Sequence[Tensor], ...]
    ) -> Tensor:
        """Gradients of the rows back to the tokens, ``(u, p + n, c)``; adds those of learned weights."""
        pattern = self.pattern
        fine = grads[:, : self.far_begin - pattern.block].unflatten(1, (-1, pattern.block))
        pooled = grads[:, self.far_begin : self.prefix_begin - pattern.rank]
        pooled = pooled.unflatten(1, (-1, pattern.rank))
        if self.gain is None:
            found = part_sums_backward(pooled / self.counts.clamp(min=1)[..., None], pattern)
        else:
            grid = self._tokens(x)[:, pattern.prefix :]
            pairs = _paired(weights, weights), _paired(*grad_weights)
            found = learned_rows_backward(grid, self.gain, pairs[0], pattern, pooled, pairs[1])
        tokens = torch.cat([grads[:, self.prefix_begin :], found + from_cells(fine, pattern)], 1)
        return tokens if self.real is None else tokens.masked_fill_(~self.real[:, None], 0)

    def passes(self) -> Iterator[tuple[slice, _Met]]:
        """Cells whose queries are served together, and what they meet: lists are made for many passes at once."""
        size = max(1, self.call.at_once // len(self.part))
        strip = size * max(1, LISTED // size)
        for begin in range(0, self.call.cells, strip):
            listed = _Met(
                self,
                *met_cells(self.pattern, slice(begin, min(begin + strip, self.call.cells)), self.call.device),
            )
            for first in range(0, len(listed.near), size):
                some = listed.of(slice(first, first + size))
                yield slice(begin + first, begin + first + len(some.near)), some

    def _tokens(self, x: Tensor) -> Tensor:
        tokens = x[self.part.batch, self.part.of_keys].to(self.call.dtype)
        return tokens if self.real is None else tokens.masked_fill(~self.real[:, None], 0)


def _paired(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x for pair in zip(weights, biases) for x in pair]


class _Met:
    """The rows that the queries of some cells meet: near cells, the tokens in front of the grid, far cells.

    Args:
        facts: Of the part.
        near: ``(cells, 9)`` finest cells.
        far: ``(cells, f)`` pooled cells.
    """

    def __init__(self, facts: _Facts, near: Tensor, far: Tensor) -> None:
        self.facts, self.near, self.far = facts, near, far
        pattern, device = facts.pattern, near.device
        fine = near[..., None] * pattern.block + torch.arange(pattern.block, device=device)
        pooled = far[..., None] * pattern.rank + torch.arange(pattern.rank, device=device) + facts.far_begin
        front = facts.prefix_begin + torch.arange(pattern.prefix, device=device)
        self.rows = torch.cat([fine.flatten(1), front.expand(len(near), -1), pooled.flatten(1)], 1)
        self.bias = facts.bias[self.rows]
        # On a GPU the question how many there are would wait for the device.
        some = (
            far < facts.empty_cell
            if device.type == "cpu"
            else torch.ones_like(far, dtype=torch.bool, device="cpu")
        )
        self.most = some.sum(1).tolist()

    def of(self, cells: slice) -> _Met:
        """Of some of the cells, without far cells that are empty for all."""
        made = copy(self)
        made.most = self.most[cells]
        far = max(made.most)
        made.near, made.far = self.near[cells], self.far[cells, :far]
        slots = self.rows.shape[1] - (self.far.shape[1] - far) * self.facts.pattern.rank
        made.rows, made.bias = self.rows[cells, :slots], self.bias[cells, :slots]
        return made

    def gather(self, rows: Tensor) -> Tensor:
        """``(u, rows, c)`` as ``(u * cells, slots, c)``."""
        return rows.index_select(1, self.rows.flatten()).view(-1, self.rows.shape[1], rows.shape[2])

    def score(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Scaled products and the logarithm of what a row counts, -inf where there is none."""
        bias = self.bias[:, None].repeat(len(self.facts.part), 1, 1)
        return torch.baddbmm(bias, query, key.mT, alpha=scale)

    def scatter(self, left: Tensor, right: Tensor, target: Tensor) -> None:
        """Adds ``left^T right`` to the rows it belongs to, a cell at a time, in a fixed order.

        Args:
            left: ``(u * cells, queries, slots)``.
            right: ``(u * cells, queries, c)``.
            target: ``(u, rows, c)``.
        """
        facts, pattern, units = self.facts, self.facts.pattern, len(self.facts.part)
        near = NEAR_CELLS * pattern.block
        front = near + pattern.prefix
        for cells, some, rows, size in (
            (self.near, left[..., :near], slice(0, facts.far_begin), pattern.block),
            (self.far, left[..., front:], slice(facts.far_begin, facts.prefix_begin), pattern.rank),
        ):
            found = torch.bmm(some.mT, right).view(units, cells.numel(), size * right.shape[2])
            target[:, rows].unflatten(1, (-1, size)).flatten(2).index_add_(1, cells.flatten(), found)
        if pattern.prefix:
            found = torch.bmm(left[..., near:front].mT, right)
            target[:, facts.prefix_begin :] += found.unflatten(0, (units, -1)).sum(1)
