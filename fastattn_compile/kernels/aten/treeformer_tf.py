"""Softmax attention of every query to a range of a list of keys, on ATen, forward and backward, in O(n)
memory.

The queries of a node stand together: they are sorted by range and cut into tiles, a tile meets the union of
its ranges a block of keys at a time, and results of blocks are joined by log-sum-exp. Leaf attention, windows
and sinks are all such ranges (``treeformer_ranges``). Query heads that share a key head share tiles. Tiles
begin with their node and have sizes that do not depend on the data, so that later tokens do not change the
order of a query's sums.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` queries, ``m`` keys, ``d`` channels of query and
key, ``e`` of value. A key is named by its row in ``key.flatten(0, 2)``, a query by its row in
``query.flatten(0, 2)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_bias import PairBias
from fastattn_compile.kernels.aten.treeformer_ranges import Ranges
from fastattn_compile.kernels.tiles import (
    SCORE_TILE,
    all_finite,
    normalise,
    poison,
    probabilities_,
    work_dtype,
)
from fastattn_compile.kernels.tiles import without_nonfinite as clean

Hidden = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """A term added to the scores by which of two children of a node a query and a key are in.

    Args:
        same: ``(b * h * n,)`` added where they share the child.
        other: ``(b * h * n,)`` added where they do not.
        query_leaf: ``(b * h * n,)`` leaf numbers.
        key_leaf: ``(b * g * m,)`` leaf numbers.
    """

    same: Tensor
    other: Tensor
    query_leaf: Tensor
    key_leaf: Tensor

    def together(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether they share the child: rows ``(t, r)`` and ``(t, c)`` to ``(t, r, c)``."""
        return self.query_leaf[queries][:, :, None] == self.key_leaf[keys][:, None]

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The term, ``(t, r, c)``."""
        same, other = self.same[queries][:, :, None], self.other[queries][:, :, None]
        return torch.where(self.together(queries, keys), same, other)


@dataclass(frozen=True)
class NearPairs:
    """Pairs of a query and a key that are met by position, or because the key is a sink: a ``Hidden``.

    Args:
        low: ``(b, h, n)`` int64, first position that a query meets.
        high: ``(b, h, n)`` int64, one past the last.
        keys: Number of keys.
        kv_heads: Key heads.
        sinks: ``(b, keys)`` boolean, keys that every query meets; none when ``None``.
    """

    low: Tensor
    high: Tensor
    keys: int
    kv_heads: int
    sinks: Tensor | None = None

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether rows of queries ``(t, r)`` meet rows of keys ``(t, c)``, ``(t, r, c)``."""
        place = (keys % self.keys)[:, None]
        low, high = self.low.flatten()[queries], self.high.flatten()[queries]
        found = (place >= low[:, :, None]) & (place < high[:, :, None])
        if self.sinks is None:
            return found
        batch = torch.div(keys, self.keys * self.kv_heads, rounding_mode="floor")
        return found | self.sinks[batch, keys % self.keys][:, None]


@dataclass(frozen=True)
class Part:
    """One range for every query.

    Args:
        ranges: The ranges.
        keys: Keys that a range is expected to have; sizes the tiles.
        queries: Queries that are expected to share a range.
        hidden: Which of the pairs of query rows ``(t, r)`` and key rows ``(t, c)`` are met elsewhere, ``(t,
            r, c)``.
        gate: Terms on the scores by the children of a node.
        bias: Terms on the scores by distance.
    """

    ranges: Ranges
    keys: int
    queries: int
    hidden: Hidden | None = None
    gate: Gate | None = None
    bias: PairBias | None = None


@dataclass(frozen=True)
class PartGradients:
    """What a part says of the membership of queries and keys in the nodes they met in.

    Args:
        query: ``(b * h * n,)`` sum of the gradients of a query's scores.
        key: ``(b * g * m, levels)`` likewise for keys, by the level of the node, in the order of
            ``Ranges.levels``.
        same: ``(b * h * n,)`` gradient of ``Gate.same``; ``None`` without a gate.
        other: Of ``Gate.other``.
        bias: Of ``PairBias.bias``; ``None`` when that gets none.
    """

    query: Tensor
    key: Tensor
    same: Tensor | None
    other: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Block:
    """Tiles of queries against a block of their keys.

    Args:
        tiles: How many of the pass's tiles are still active.
        keys: ``(tiles, c)`` key rows.
        visible: ``(tiles, r, c)``.
    """

    tiles: int
    keys: Tensor
    visible: Tensor


@dataclass(frozen=True)
class _Pass:
    """Some tiles, those with more keys first.

    Args:
        queries: ``(tiles, r)`` query rows.
        valid: ``(tiles, r)`` false where a tile is not full.
        level: ``(tiles,)`` index of the level in ``Ranges.levels``.
        blocks: Their blocks of keys; a block of index ``i`` holds the tiles that have more than ``i``.
    """

    queries: Tensor
    valid: Tensor
    level: Tensor
    blocks: Callable[[], Iterator[_Block]]


def _tile_side(expected: int) -> int:
    """Rows or columns of a tile, a power of two."""
    return min(128, max(16, 1 << max(0, expected - 1).bit_length()))


def _passes(part: Part, keys: int) -> Iterator[_Pass]:
    ranges = part.ranges
    start, stop = ranges.start.flatten(), ranges.stop.flatten()
    lists = len(ranges.levels)
    busy = torch.nonzero(stop > start).squeeze(1)
    if busy.numel() == 0:
        return
    # Two keys of a sort in one number: by start, then by stop, so that the queries of a causal node stand in
    # order.
    busy = busy[torch.argsort(start[busy] * (ranges.order.numel() + 1) + stop[busy], stable=True)]
    low, high = start[busy], stop[busy]
    rows, columns = _tile_side(part.queries), _tile_side(part.keys)
    # Ranges of different nodes share no key; under a capacity those of one node differ.
    node = ranges.node.flatten()
    group = torch.div(low, keys, rounding_mode="floor") * (node.amax() + 1) + node[busy]
    _, counts = torch.unique_consecutive(group, return_counts=True)
    tiles_of = torch.div(counts + rows - 1, rows, rounding_mode="floor")
    tile_list = torch.repeat_interleave(tiles_of)
    within = torch.arange(tile_list.numel(), device=low.device) - (tiles_of.cumsum(0) - tiles_of)[tile_list]
    begin = (counts.cumsum(0) - counts)[tile_list] + within * rows
    end = torch.minimum(begin + rows, counts.cumsum(0)[tile_list])
    place = begin[:, None] + torch.arange(rows, device=low.device)
    valid = place < end[:, None]
    place = torch.minimum(place, end[:, None] - 1)
    tile_low = low[begin]
    tile_high = torch.where(valid, high[place], 0).amax(1)
    blocks = torch.div(tile_high - tile_low + columns - 1, columns, rounding_mode="floor")
    by_size = torch.argsort(blocks, descending=True, stable=True)
    together = max(1, SCORE_TILE // (rows * columns))
    for chosen in by_size.split(together):
        at, real = place[chosen], valid[chosen]
        queries, first, last = busy[at], low[at], torch.where(real, high[at], 0)
        counted, lows, highs = blocks[chosen], tile_low[chosen], tile_high[chosen]

        def walk(
            queries: Tensor = queries, first: Tensor = first, last: Tensor = last,
            counted: Tensor = counted, lows: Tensor = lows, highs: Tensor = highs,
        ) -> Iterator[_Block]:  # fmt: skip
            active = [
                int(x) for x in (counted[:, None] > torch.arange(int(counted[0]))[None].to(counted)).sum(0)
            ]
            for index, tiles in enumerate(active):
                slot = lows[:tiles, None] + index * columns + torch.arange(columns, device=lows.device)
                rows_of_keys = ranges.order[torch.minimum(slot, highs[:tiles, None] - 1)]
                seen = (slot[:, None] >= first[:tiles, :, None]) & (slot[:, None] < last[:tiles, :, None])
                if part.hidden is not None:
                    seen &= ~part.hidden(queries[:tiles], rows_of_keys)
                yield _Block(tiles, rows_of_keys, seen)

        yield _Pass(queries, real, torch.div(lows, keys, rounding_mode="floor") % lists, walk)


def join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each.

    Args:
        out: ``(..., e)``, 0 where nothing is met.
        lse: ``(..., 1)``, -inf where nothing is met.
        other_out: As ``out``.
        other_lse: As ``lse``.
    """
    both = torch.logaddexp(lse, other_lse)
    anchor = both.masked_fill(both == -torch.inf, 0)
    return out * (lse - anchor).exp() + other_out * (other_lse - anchor).exp(), both


def _rows(x: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, at.flatten()).to(dtype).view(*at.shape, x.shape[1])


def _scores(part: Part, q: Tensor, k: Tensor, queries: Tensor, block: _Block) -> Tensor:
    scores = torch.bmm(q[: block.tiles], k.mT)
    if part.gate is not None:
        scores += part.gate.bias(queries[: block.tiles], block.keys)
    if part.bias is not None:
        scores += part.bias(queries[: block.tiles], block.keys)
    return scores.masked_fill_(~block.visible, -torch.inf)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part) -> tuple[Tensor, Tensor]:
    """Attention over one part.

    Args:
        query: ``(b, h, n, d)``, floating point.
        key: ``(b, g, m, d)``; types may differ between the three, the work is done in float32 or float64.
        value: ``(b, g, m, e)``.
        scale: Factor on the scores.
        part: Who meets whom.

    Returns:
        Output ``(b, h, n, e)`` and log-sum-exp ``(b, h, n, 1)`` in the work type; 0 and -inf where a query
        meets nothing.
    """
    dtype = work_dtype(query, key, value)
    finite = all_finite(key, value)
    flat_q, flat_k, flat_v = (x.flatten(0, 2) for x in (query, key, value))
    out = torch.zeros(flat_q.shape[0], value.shape[3], dtype=dtype, device=query.device)
    lse = torch.full((flat_q.shape[0], 1), -torch.inf, dtype=dtype, device=query.device)
    for tiles in _passes(part, key.shape[2]):
        q = _rows(flat_q, tiles.queries, dtype).mul_(scale)
        tile_out, tile_lse = q.new_zeros(0), q.new_zeros(0)
        for index, block in enumerate(tiles.blocks()):
            k, v = _rows(flat_k, block.keys, dtype), _rows(flat_v, block.keys, dtype)
            given = k, v
            if not finite:
                k, v = clean(k), clean(v)
            scores = _scores(part, q, k, tiles.queries, block)
            weights = torch.empty_like(scores)
            block_lse = normalise(scores, weights)
            block_out = torch.bmm(weights, v).masked_fill_(block_lse == -torch.inf, 0)
            if not finite:
                poison(block_out, block_lse, block.visible, *given)
            if index == 0:
                tile_out, tile_lse = block_out, block_lse
            else:
                head = slice(0, block.tiles)
                tile_out[head], tile_lse[head] = join(tile_out[head], tile_lse[head], block_out, block_lse)
        at = tiles.queries[tiles.valid]
        out[at], lse[at] = tile_out[tiles.valid], tile_lse[tiles.valid]
    return out.view(*query.shape[:3], -1), lse.view(*query.shape[:3], 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all parts together; arguments and results as in ``forward``."""
    out, lse = forward(query, key, value, scale, parts[0])
    for part in parts[1:]:
        out, lse = join(out, lse, *forward(query, key, value, scale, part))
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    parts: Sequence[Part],
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[PartGradients]]:
    """Gradients of ``attend``; with P the weights, ``dS = P * (dO . v - dO . o + dlse)``.

    Args:
        query: As in ``attend``.
        key: As in ``attend``.
        value: As in ``attend``.
        scale: As in ``attend``.
        parts: As in ``attend``.
        out: Output of ``attend``.
        log_sum_exp: ``(b, h, n, 1)``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: ``(b, h, n)``, gradient of the log-sum-exp; ``None`` is zero.

    Returns:
        Gradients of query, key and value in the work type, and what each part says of memberships.
    """
    dtype = work_dtype(query, key, value)
    finite = all_finite(key, value)
    flat_q, flat_k, flat_v, flat_grad = (x.flatten(0, 2) for x in (query, key, value, grad_out))
    grad_q, grad_k, grad_v = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (flat_q, flat_k, flat_v)
    )
    slope = (grad_out.to(dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp
    statistics = torch.stack([log_sum_exp.to(dtype).flatten(), slope.flatten()], -1)
    said = []
    for part in parts:
        depth = len(part.ranges.levels)
        of_query = grad_q.new_zeros(grad_q.shape[0])
        of_key = grad_k.new_zeros(grad_k.shape[0], depth)
        of_gate = None if part.gate is None else grad_q.new_zeros(2, grad_q.shape[0])
        of_bias = None if part.bias is None else part.bias.new_gradient()
        for tiles in _passes(part, key.shape[2]):
            q, grad_o = _rows(flat_q, tiles.queries, dtype), _rows(flat_grad, tiles.queries, dtype)
            scaled = q * scale
            lse, slopes = _rows(statistics, tiles.queries, dtype).split(1, -1)
            tile_grad = torch.zeros_like(q)
            sums = q.new_zeros(3, *q.shape[:2])
            for block in tiles.blocks():
                head = slice(0, block.tiles)
                k, v = _rows(flat_k, block.keys, dtype), _rows(flat_v, block.keys, dtype)
                if not finite:
                    k, v = clean(k), clean(v)
                weights = probabilities_(_scores(part, scaled, k, tiles.queries, block), lse[head])
                at = block.keys.flatten()
                grad_v.index_add_(0, at, torch.bmm(weights.mT, grad_o[head]).flatten(0, 1))
                grad_s = torch.bmm(grad_o[head], v.mT).sub_(slopes[head]).mul_(weights)
                tile_grad[head] += torch.bmm(grad_s, k)
                grad_k.index_add_(0, at, torch.bmm(grad_s.mT, q[head]).flatten(0, 1), alpha=scale)
                sums[0, head] += grad_s.sum(2)
                of_key.view(-1).index_add_(
                    0, (block.keys * depth + tiles.level[head, None]).flatten(), grad_s.sum(1).flatten()
                )
                if part.bias is not None:
                    part.bias.add_gradient(of_bias, tiles.queries[head], block.keys, grad_s)
                if part.gate is not None:
                    same = part.gate.together(tiles.queries[head], block.keys)
                    sums[1, head] += (grad_s * same).sum(2)
                    sums[2, head] += (grad_s * ~same).sum(2)
            at = tiles.queries[tiles.valid]
            # A query is in one tile of a part, so additions of a pass never meet.
            grad_q[at] += tile_grad[tiles.valid] * scale
            of_query[at] = sums[0][tiles.valid]
            if of_gate is not None:
                of_gate[:, at] = sums[1:][:, tiles.valid]
        of_same, of_other = (None, None) if of_gate is None else (of_gate[0], of_gate[1])
        said.append(PartGradients(of_query, of_key, of_same, of_other, of_bias))
    return grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(value.shape), said
