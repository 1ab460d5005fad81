"""Who meets whom in leaf attention: for every query a range in a list of keys that is sorted by tree node.

Keys are sorted, stably, by their node at a level: the visible keys of a node are then one range of the list,
in order of position. Nothing here grows faster than the tokens times the height.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` queries, ``m`` keys. Query head ``i`` reads key
head ``i // (h // g)``. A key is named by its row in ``key.flatten(0, 2)``, a query by its row in
``query.flatten(0, 2)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn_compile.kernels.sorting import Segments, climb, ranked


@dataclass(frozen=True)
class Sight:
    """Which keys the mask shows each query: an interval of positions, of the query's segment, that are real.

    Args:
        low: ``(n,)`` first visible position; never falls from query to query.
        high: ``(n,)`` one past the last; at least ``low``, never falls either.
        length: Number of keys.
        real: ``(b, m)`` boolean or ``None``.
        key_segment: ``(b, m)`` segment numbers from 0 on, or ``None``.
        query_segment: ``(b, n)`` likewise.
    """

    low: Tensor
    high: Tensor
    length: int
    real: Tensor | None = None
    key_segment: Tensor | None = None
    query_segment: Tensor | None = None

    @property
    def segments(self) -> int:
        """Number of segments."""
        return 1 if self.key_segment is None else int(self.key_segment.max()) + 1


@dataclass(frozen=True)
class Ranges:
    """A range of a key list for every query.

    Args:
        order: Rows of keys, the lists of all units and levels one after another; each list is ``m`` long.
        start: ``(b, h, n)`` index into ``order``.
        stop: ``(b, h, n)``; equal to ``start`` where a query meets nothing.
        level: ``(b, h, n)`` level of the node the query reads.
        levels: Level of each list of one unit, in order.
        node: ``(b, h, n)`` that node, with the segment before it.
        uncut: ``(b, h, n)``, ``start`` before a capacity cut the range; ``None`` where none did.
    """

    order: Tensor
    start: Tensor
    stop: Tensor
    level: Tensor
    levels: tuple[int, ...]
    node: Tensor
    uncut: Tensor | None = None

    def found(self) -> int:
        """Keys in the ranges before a capacity cut them."""
        return int((self.stop - (self.start if self.uncut is None else self.uncut)).sum())

    def first(self, length: int) -> Tensor:
        """Position of the first key of each range, among ``length`` keys; ``(b, h, n)``."""
        return self.order[self.start.clamp(max=self.order.numel() - 1)] % length


def node_ranges(
    key_leaf: Tensor,
    query_leaf: Tensor,
    height: int,
    sight: Sight,
    deepest: int,
    ancestors: bool,
    capacity: int = 0,
    dropped: Tensor | None = None,
) -> Ranges:
    """The visible keys of every query's node; of its deepest ancestor that has any, if asked.

    Args:
        key_leaf: ``(b, g, m)`` leaf of each key.
        query_leaf: ``(b, h, n)`` leaf of each query.
        height: Of the tree.
        sight: The mask.
        deepest: Level at which to look first.
        ancestors: Climb while a query finds no visible key.
        capacity: Most keys a query meets, the newest are kept; 0 is no limit.
        dropped: ``(b, g, m)`` boolean, keys that are in no node.
    """
    batch, kv_heads, length = key_leaf.shape
    heads, queries = query_leaf.shape[1:]
    units, group = batch * kv_heads, heads // kv_heads
    gone = dropped
    if sight.real is not None:
        padding = ~sight.real[:, None].expand_as(key_leaf)
        gone = padding if gone is None else gone | padding
    segments = None
    if sight.key_segment is not None and sight.query_segment is not None:
        segments = Segments(sight.segments, sight.key_segment, sight.query_segment)
    found = climb(
        key_leaf.flatten(0, 1), query_leaf.reshape(units, group, queries), height, deepest, ancestors,
        sight.low, sight.high, None if gone is None else gone.flatten(0, 1), segments,
    )  # fmt: skip
    lists = found.order.shape[1]
    base = torch.arange(units, device=key_leaf.device).view(-1, 1, 1) * (lists * length)
    start, stop, level, node = (
        x.view(batch, heads, queries)
        for x in (found.start + base, found.stop + base, found.level, found.node)
    )
    levels = tuple(range(deepest, deepest - lists, -1))
    whole = Ranges(found.order.flatten(), start, stop, level, levels, node)
    return replace(whole, start=torch.maximum(start, stop - capacity), uncut=start) if capacity else whole


def near_ranges(
    heads: int, kv_heads: int, batch: int, sight: Sight, low: Tensor, high: Tensor, only: Tensor | None = None
) -> Ranges:
    """The visible keys between two positions.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        batch: Number of sequences.
        sight: The mask.
        low: ``(b or 1, h or 1, n)`` first position wanted.
        high: Likewise, one past the last.
        only: ``(b, g or 1, m)`` boolean, keys that take part; all when ``None``.
    """
    queries = low.shape[-1]
    code = torch.zeros(batch, kv_heads, sight.length, dtype=torch.int64, device=low.device)
    wanted = torch.zeros(batch, heads, queries, dtype=torch.int64, device=low.device)
    if sight.key_segment is not None and sight.query_segment is not None:
        code = code + sight.key_segment[:, None]
        wanted = wanted + sight.query_segment[:, None]
    if sight.real is not None:
        code = code.masked_fill(~sight.real[:, None], sight.segments)
    if only is not None:
        code = code.masked_fill(~only, sight.segments)
    low = torch.maximum(low, sight.low)
    high = torch.maximum(torch.minimum(high, sight.high), low)
    units = batch * kv_heads
    by_unit = units, heads // kv_heads, queries
    edges = (edge.expand_as(wanted).reshape(by_unit) for edge in (low, high))
    order, *found = ranked(code.flatten(0, 1), sight.segments + 1, wanted.view(by_unit), *edges)
    rows = sight.length * torch.arange(units, device=low.device)
    start, stop = ((x + rows[:, None, None]).view_as(wanted) for x in found)
    zero = torch.zeros_like(start)
    return Ranges((order + rows[:, None]).flatten(), start, stop, zero, (0,), zero)


def sink_keys(sight: Sight, batch: int, sinks: int) -> Tensor:
    """Which keys are the first ``sinks`` real ones of their segment, ``(b, m)``."""
    real = sight.real
    if real is None:
        real = torch.ones(batch, sight.length, dtype=torch.bool, device=sight.low.device)
    if sight.key_segment is None:
        return real & (real.cumsum(1) <= sinks)
    code = sight.key_segment.masked_fill(~real, sight.segments)
    ordered, order = torch.sort(code, dim=1, stable=True)
    begin = torch.searchsorted(ordered, ordered.contiguous())
    place = torch.arange(sight.length, device=code.device) - begin
    early = torch.zeros_like(real).scatter(1, order, place < sinks)
    return real & early
