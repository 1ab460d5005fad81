"""The tiles of fast multipole attention on ATen: arrays of rows, gathered lists, scores of a few blocks.

``u`` counts the key heads of a part, ``c`` channels. A tile holds the queries of one block of all heads that
share a key head, ``group * block`` rows, and the slots its list names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.kernels.fma_plan import Pattern, Plan, make_plan, sink_slots_met
from fastattn_compile.kernels.fma_pool import combine_levels, row_counts, sum_levels
from fastattn_compile.kernels.tiles import SCORE_TILE, all_finite, work_dtype


@dataclass(frozen=True)
class Lists:
    """What the blocks of one sequence meet, padding and sinks taken into account.

    Args:
        index: ``(blocks, slots)`` int32, rows of a head's array.
        bias: ``(blocks, slots)`` logarithm of what a slot weighs, -inf where it is not met.
        first: ``(blocks, slots)`` int32, first position a slot covers.
        last: ``(blocks, slots)`` int32, last position a slot covers.
        counts: ``(pooled rows,)`` tokens a pooled row stands for.
        sinks: ``(s,)`` positions of the sinks.
        padding: ``(n,)`` boolean, true where no token is; ``None`` when every token is real.
    """

    index: Tensor
    bias: Tensor
    first: Tensor
    last: Tensor
    counts: Tensor
    sinks: Tensor
    padding: Tensor | None


def make_lists(plan: Plan, pattern: Pattern, padding: Tensor | None, dtype: torch.dtype) -> Lists:
    """The lists of one sequence.

    Args:
        plan: The plan of its length.
        pattern: The pattern.
        padding: ``(n,)`` boolean, true where no token is.
        dtype: The work type.
    """
    device, m = plan.index.device, pattern.block
    index, met, first, last = plan.index, plan.met, plan.first, plan.last
    sinks = torch.arange(pattern.sinks, device=device)
    taken = torch.zeros(plan.blocks * m, dtype=dtype, device=device)
    taken[: plan.length] = 1
    if padding is not None:
        taken[: plan.length].masked_fill_(padding, 0)
        # Real tokens first, in order: the first of them are the sinks.
        sinks = torch.sort(padding, stable=True).indices[: pattern.sinks]
        slots = slice(pattern.near, pattern.near + pattern.sinks)
        index, met, first, last = (x.clone() for x in (index, met, first, last))
        met[:, slots] = sink_slots_met(sinks, torch.arange(plan.blocks, device=device)[:, None], pattern)
        index[:, slots] = torch.where(met[:, slots], sinks + m, 0).to(index.dtype)
        first[:, slots] = last[:, slots] = sinks.to(first.dtype)
    fine = torch.full((plan.fine_rows,), -torch.inf, dtype=dtype, device=device)
    fine[m : m + taken.shape[0]] = taken.log()
    taken[sinks] = 0
    counts = row_counts(taken, plan, pattern)
    mass = counts if pattern.weighted else (counts > 0).to(dtype)
    bias = torch.where(met, torch.cat([fine, mass.log()])[index], -torch.inf)
    return Lists(index, bias, first, last, counts, sinks, padding)


@lru_cache(maxsize=16)
def _lists_without_padding(length: int, pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Lists:
    return make_lists(make_plan(length, pattern, device), pattern, None, dtype)


@dataclass(frozen=True)
class Part:
    """Key heads ``heads`` of one sequence, with the lists of that sequence."""

    batch: int
    heads: slice
    lists: Lists

    @property
    def units(self) -> int:
        """Number of key heads."""
        return int(self.heads.stop - self.heads.start)


class Tiling:
    """How one attention is cut into tiles, and the buffers that one thread uses again in every pass.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        pattern: Pattern,
        key_padding: Tensor | None,
    ) -> None:
        self.pattern, self.scale, self.key_padding = pattern, scale, key_padding
        self.batch, self.kv_heads, self.device = query.shape[0], key.shape[1], query.device
        self.dtype = work_dtype(query, key, value)
        self.finite = all_finite(key, value)
        self.plan = make_plan(query.shape[2], pattern, query.device)
        self.group = query.shape[1] // key.shape[1]
        self.slots = self.plan.index.shape[1]
        tiles = max(1, SCORE_TILE // (self.group * pattern.block * self.slots))
        self.blocks_at_once = min(self.plan.blocks, tiles)
        # Short sequences are taken a few heads at a time, but every thread gets its share of them.
        share = -(-self.batch * self.kv_heads // torch.get_num_threads())
        self.heads_at_once = max(1, min(self.kv_heads, tiles // self.plan.blocks, share))
        self._buffers: dict[str, Tensor] = {}
        block = torch.full((pattern.block, pattern.block), -torch.inf, dtype=self.dtype, device=self.device)
        self._future = block.triu_(1)

    def another(self) -> Tiling:
        """The same with buffers of its own, for another thread."""
        twin = copy.copy(self)
        twin._buffers = {}
        return twin

    def buffer(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of the work type whose memory is kept for the next request of this name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][:size].view(shape)

    def parts(self) -> list[Part]:
        """Sequences and key heads, a few heads at a time when sequences are short."""
        parts = []
        for batch in range(self.batch):
            if self.key_padding is None:
                lists = _lists_without_padding(self.plan.length, self.pattern, self.device, self.dtype)
            else:
                lists = make_lists(self.plan, self.pattern, ~self.key_padding[batch], self.dtype)
            for head in range(0, self.kv_heads, self.heads_at_once):
                parts.append(Part(batch, slice(head, min(head + self.heads_at_once, self.kv_heads)), lists))
        return parts

    def passes(self) -> Iterator[slice]:
        """Blocks, as many at a time as fit the cache."""
        for start in range(0, self.plan.blocks, self.blocks_at_once):
            yield slice(start, min(start + self.blocks_at_once, self.plan.blocks))

    def gain(self, part: Part) -> Tensor:
        """``(pooled rows,)``: tokens of a row's group over those of it that are pooled."""
        offsets = self.plan.offsets
        width = torch.empty_like(part.lists.counts)
        for level in range(self.plan.levels):
            width[offsets[level] : offsets[level + 1]] = self.pattern.block << level
        return width / (part.lists.counts * self.pattern.rank).clamp(min=1)

    def tokens(self, array: Tensor) -> Tensor:
        """The tokens of an array of rows, up to a whole number of blocks: ``(u, blocks * block, c)``."""
        return array[:, self.pattern.block : self.plan.fine_rows - self.pattern.block]

    def rows(self, x: Tensor, part: Part, weights: Sequence[Tensor], name: str) -> Tensor:
        """The array of keys or values, tokens and pooled rows: ``(u, plan.rows, c)`` in the work type."""
        plan, m = self.plan, self.pattern.block
        array = self.buffer(name, part.units, plan.rows, x.shape[3])
        given = array[:, m : m + plan.length]
        array[:, :m] = 0
        array[:, m + plan.length : plan.fine_rows] = 0
        given.copy_(x[part.batch, part.heads])
        if part.lists.padding is not None:
            given.masked_fill_(part.lists.padding[:, None], 0)
        tokens, pooled = self.tokens(array), array[:, plan.fine_rows :]
        sinks = tokens[:, part.lists.sinks]
        tokens[:, part.lists.sinks] = 0
        if self.pattern.learned:
            combine_levels(tokens, pooled, self.gain(part), weights, plan, self.pattern)
        else:
            sum_levels(tokens, pooled, plan, self.pattern)
            pooled.div_(part.lists.counts.clamp(min=1)[:, None])
        tokens[:, part.lists.sinks] = sinks
        return array

    def gather(self, array: Tensor, part: Part, blocks: slice, name: str) -> Tensor:
        """The rows that some blocks meet, side by side: ``(u * blocks, slots, c)``."""
        units, rows, channels = array.shape
        index = part.lists.index[blocks]
        if units > 1:
            index = index + rows * torch.arange(units, dtype=index.dtype, device=self.device)[:, None, None]
        found = self.buffer(name, units * (blocks.stop - blocks.start), self.slots, channels)
        torch.index_select(array.view(-1, channels), 0, index.reshape(-1), out=found.view(-1, channels))
        return found

    def load(self, x: Tensor, part: Part, blocks: slice, name: str) -> Tensor:
        """Rows ``(b, h, n, c)`` of some blocks as tiles ``(u * blocks, rows, c)``, 0 past the end."""
        m, count = self.pattern.block, blocks.stop - blocks.start
        source = self._of_blocks(x, part, blocks)
        tile = self.buffer(name, part.units, count, self.group, m, x.shape[3])
        whole, rest = divmod(source.shape[2], m)
        tile[:, :whole] = source[:, :, : whole * m].unflatten(2, (whole, m)).transpose(1, 2)
        if rest:
            tile[:, whole] = 0
            tile[:, whole, :, :rest] = source[:, :, whole * m :]
        return tile.flatten(2, 3).flatten(0, 1)

    def store(self, x: Tensor, part: Part, blocks: slice, tiles: Tensor) -> None:
        """The way back of ``load``: writes tiles into ``(b, h, n, c)``."""
        m = self.pattern.block
        target = self._of_blocks(x, part, blocks)
        tile = tiles.view(part.units, -1, self.group, m, x.shape[3])
        whole, rest = divmod(target.shape[2], m)
        blockwise = target[:, :, : whole * m].unflatten(2, (whole, m)).transpose(1, 2)
        blockwise.copy_(tile[:, :whole])
        if rest:
            target[:, :, whole * m :] = tile[:, whole, :, :rest]

    def _of_blocks(self, x: Tensor, part: Part, blocks: slice) -> Tensor:
        m = self.pattern.block
        heads = x[part.batch].unflatten(0, (-1, self.group))[part.heads]
        return heads[:, :, blocks.start * m : blocks.stop * m]

    def scores(self, query: Tensor, key: Tensor, part: Part, blocks: slice) -> tuple[Tensor, Tensor | None]:
        """Scores with what the slots weigh, -inf where a query does not see a slot.

        Args:
            query: Tiles of queries.
            key: Gathered keys, finite.
            part: Where they come from.
            blocks: Where they come from.

        Returns:
            Scores ``(tiles, group * block, slots)``; where slots are seen, ``None`` when all keys and values
            are finite.
        """
        m, count = self.pattern.block, blocks.stop - blocks.start
        scores = self.buffer("scores", key.shape[0], self.group * m, self.slots)
        split = scores.view(-1, count, self.group, m, self.slots)
        split.copy_(part.lists.bias[blocks, None, None])
        if self.pattern.causal:
            split[..., m : 2 * m].add_(self._future)
        if self.pattern.banded:
            split.masked_fill_(self._outside(part, blocks)[:, None], -torch.inf)
        visible = None if self.finite else scores > -torch.inf
        scores.baddbmm_(query, key.mT, alpha=self.scale)
        return scores, visible

    def _outside(self, part: Part, blocks: slice) -> Tensor:
        """``(blocks, block, slots)``: where a slot covers a position that the window hides from the query."""
        m = self.pattern.block
        place = torch.arange(blocks.start * m, blocks.stop * m, dtype=torch.int32, device=self.device).view(
            -1, m, 1
        )
        hidden = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.pattern.left is not None:
            hidden = part.lists.first[blocks, None] < place - self.pattern.left
        if self.pattern.right is not None:
            hidden = hidden | (part.lists.last[blocks, None] > place + self.pattern.right)
        return hidden

    def own_key(self, x: Tensor) -> Tensor:
        """The entry of every query for its own key: ``(tiles, rows, slots)`` to ``(tiles, rows, 1)``."""
        m = self.pattern.block
        own = x.unflatten(1, (self.group, m))[..., m : 2 * m].diagonal(dim1=-2, dim2=-1)
        return own.reshape(x.shape[0], -1, 1)
