"""The tiles of fast multipole attention on ATen: arrays of rows, gathered lists, scores of a few blocks.

``u`` counts the key heads of a part, ``c`` channels. A tile holds the queries of one block of all heads that share
a key head, ``group * block`` rows, and the slots its list names. A kernel of many small calls spends a good part
of its time on making views, so buffers keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_bias import ByDistance, Decay, FarBias, level_tables, row_cover
from fastattn_compile.kernels.aten.fma_lists import Lists, lists_without_padding, make_lists
from fastattn_compile.kernels.aten.fma_plan import Pattern, make_plan
from fastattn_compile.kernels.aten.fma_pool import combine_levels, row_gains, sum_levels
from fastattn_compile.kernels.tiles import SCORE_TILE, all_finite, work_dtype


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
    """How one attention is cut into parts for threads and into passes of a few blocks.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real.
        bias: ``(h,)`` slopes, with as many key heads as query heads; ``(h, 2 N - 1)`` by distance; or ``None``.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, key_padding: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.pattern, self.key_padding, self.device = pattern, key_padding, query.device
        self.batch, self.kv_heads, self.group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
        self.head_dim, self.value_dim = key.shape[3], value.shape[3]
        self.dtype = work_dtype(query, key, value)
        self.finite = all_finite(key, value)
        self.plan = make_plan(query.shape[2], pattern, query.device)
        self.slots = self.plan.index.shape[1]
        tiles = max(1, SCORE_TILE // (self.group * pattern.block * self.slots))
        self.blocks_at_once = min(self.plan.blocks, tiles)
        # Short sequences are taken a few heads at a time, but every thread gets its share of them.
        share = -(-self.batch * self.kv_heads // torch.get_num_threads())
        self.heads_at_once = max(1, min(self.kv_heads, tiles // self.plan.blocks, share))
        self.bias = None if bias is None else bias.to(self.dtype)
        self.tables: Tensor | None = None
        if self.bias is not None and self.bias.dim() == 2:
            self.tables = level_tables(self.bias, row_cover(pattern), self.plan.levels)
        self.future = self.empty(pattern.block, pattern.block).fill_(-torch.inf).triu_(1)

    def empty(self, *shape: int) -> Tensor:
        """A tensor of the work type."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def parts(self) -> list[Part]:
        """Sequences and key heads, a few heads at a time when sequences are short."""
        parts = []
        for batch in range(self.batch):
            if self.key_padding is None:
                lists = lists_without_padding(self.plan.length, self.pattern, self.device, self.dtype)
            else:
                lists = make_lists(self.plan, self.pattern, ~self.key_padding[batch], self.dtype)
            for head in range(0, self.kv_heads, self.heads_at_once):
                parts.append(Part(batch, slice(head, min(head + self.heads_at_once, self.kv_heads)), lists))
        return parts

    def passes(self) -> Iterator[slice]:
        """Blocks, as many at a time as fit the cache."""
        for start in range(0, self.plan.blocks, self.blocks_at_once):
            yield slice(start, min(start + self.blocks_at_once, self.plan.blocks))

    def far_bias(self, part: Part) -> FarBias | None:
        """The bias of a part."""
        if self.tables is not None:
            tables = self.tables.unflatten(0, (self.kv_heads, -1))[part.heads]
            return ByDistance(tables, part.lists, self.plan, self.pattern)
        if self.bias is not None:
            return Decay(self.bias[part.heads], part.lists, self.plan, self.pattern)
        return None

    def gain(self, part: Part) -> Tensor:
        """``(pooled rows,)``: tokens of a row's group over those of it that are pooled."""
        return row_gains(part.lists.counts, self.plan, self.pattern)

    def tokens(self, array: Tensor) -> Tensor:
        """The tokens of an array of rows, up to a whole number of blocks: ``(u, blocks * block, c)``."""
        return array[:, self.pattern.block : self.plan.fine_rows - self.pattern.block]

    def fill_rows(
        self, array: Tensor, x: Tensor, part: Part, weights: Sequence[Tensor], bias: FarBias | None, turned: bool
    ) -> None:  # fmt: skip
        """Fills ``(u, plan.rows, c)`` with the keys or values of a part: tokens and pooled rows.

        Args:
            array: The array.
            x: Keys or values, ``(b, g, n, c)``.
            part: Which of them.
            weights: For a learned pattern, weight and bias of every level.
            bias: Of the part.
            turned: They have a rotary embedding, without which they are pooled.
        """
        plan, m = self.plan, self.pattern.block
        given = array[:, m : m + plan.length]
        array[:, :m] = 0
        array[:, m + plan.length : plan.fine_rows] = 0
        given.copy_(x[part.batch, part.heads])
        if part.lists.padding is not None:
            given.masked_fill_(part.lists.padding[:, None], 0)
        tokens, pooled = self.tokens(array), array[:, plan.fine_rows :]
        sinks = tokens[:, part.lists.sinks]
        tokens[:, part.lists.sinks] = 0
        taken = part.lists.tokens.undo(tokens) if turned else tokens
        if self.pattern.learned:
            combine_levels(taken, pooled, self.gain(part), weights, plan, self.pattern)
        elif isinstance(bias, Decay):
            bias.pool(taken, pooled)
        else:
            sum_levels(taken, pooled, plan, self.pattern)
            pooled.div_(part.lists.counts.clamp(min=1)[:, None])
        if turned and self.pattern.rotary is not None:
            pooled.copy_(part.lists.centres.redo(pooled))
        tokens[:, part.lists.sinks] = sinks

    def row_index(self, part: Part, blocks: slice) -> Tensor:
        """``(u * blocks * slots,)``: where the rows that some blocks meet stand in the array of all heads."""
        index = part.lists.index[blocks]
        if part.units > 1:
            head = torch.arange(part.units, dtype=index.dtype, device=self.device)[:, None, None]
            index = index + self.plan.rows * head
        return index.view(-1)

    def outside(self, part: Part, blocks: slice) -> Tensor:
        """``(blocks, 1, block, slots)``: where a slot covers a position the window hides from the query."""
        m, lists = self.pattern.block, part.lists
        place = torch.arange(blocks.start * m, blocks.stop * m, dtype=torch.int32, device=self.device)
        place = place.view(-1, 1, m, 1)
        hidden = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.pattern.left is not None:
            hidden = lists.first[blocks, None, None] < place - self.pattern.left
        if self.pattern.right is not None:
            hidden = hidden | (lists.last[blocks, None, None] > place + self.pattern.right)
        return hidden


class Blocks:
    """Rows ``(b, h, n, c)`` of a part, seen as blocks ``(u, blocks, group, block, c)``; the last may be short."""

    def __init__(self, x: Tensor, part: Part, tiling: Tiling) -> None:
        m = tiling.pattern.block
        heads = x[part.batch].unflatten(0, (-1, tiling.group))[part.heads]
        self.count, self.short = divmod(x.shape[2], m)
        self.whole = heads[:, :, : self.count * m].unflatten(2, (self.count, m)).transpose(1, 2)
        self.rest = heads[:, :, self.count * m :]

    def load(self, blocks: slice, tile: Tensor) -> None:
        """Copies some blocks into ``(u, count, group, block, c)``, with 0 past the end."""
        if blocks.stop <= self.count:
            tile.copy_(self.whole[:, blocks])
            return
        tile[:, :-1] = self.whole[:, blocks]
        tile[:, -1] = 0
        tile[:, -1, :, : self.short] = self.rest

    def store(self, blocks: slice, tile: Tensor) -> None:
        """The way back of ``load``."""
        if blocks.stop <= self.count:
            self.whole[:, blocks].copy_(tile)
            return
        self.whole[:, blocks].copy_(tile[:, :-1])
        self.rest.copy_(tile[:, -1, :, : self.short])


class Tile:
    """Buffers of a pass over ``count`` blocks of ``units`` key heads, and the views of them that the pass needs.

    Args:
        tiling: The tiling.
        units: Key heads.
        count: Blocks.
    """

    def __init__(self, tiling: Tiling, units: int, count: int) -> None:
        m, slots = tiling.pattern.block, tiling.slots
        self.tiling = tiling
        self.blocked = (units, count, tiling.group, m)
        self.tiles, self.rows = units * count, tiling.group * m
        self.query, self.query_blocks = self.blocks_of(tiling.head_dim)
        self.out, self.out_blocks = self.blocks_of(tiling.value_dim)
        self.key, self.value = (self.slots_of(c) for c in (tiling.head_dim, tiling.value_dim))
        self.scores, self.scores_blocks = self.blocks_of(slots)
        self.attention, attention_blocks = self.blocks_of(slots)
        self.own_block = self.scores_blocks[..., m : 2 * m]
        # Of every query the entry for its own key.
        self.own_scores = self.own_block.diagonal(dim1=-2, dim2=-1)
        self.own_attention = attention_blocks[..., m : 2 * m].diagonal(dim1=-2, dim2=-1)

    def blocks_of(self, channels: int) -> tuple[Tensor, Tensor]:
        """A buffer ``(tiles, rows, channels)``, and the same as ``(u, count, group, block, channels)``."""
        buffer = self.tiling.empty(self.tiles, self.rows, channels)
        return buffer, buffer.view(*self.blocked, channels)

    def slots_of(self, channels: int) -> Tensor:
        """A buffer ``(tiles, slots, channels)``."""
        return self.tiling.empty(self.tiles, self.tiling.slots, channels)

    def gather(self, keys: Tensor, values: Tensor, part: Part, blocks: slice) -> None:
        """Puts the rows that some blocks meet side by side, from arrays ``(u, plan.rows, c)``."""
        index = self.tiling.row_index(part, blocks)
        for array, found in ((keys, self.key), (values, self.value)):
            torch.index_select(array.flatten(0, 1), 0, index, out=found.view(-1, array.shape[2]))

    def score(
        self, key: Tensor, scale: float, part: Part, blocks: slice, bias: FarBias | None
    ) -> Tensor | None:
        """Fills the scores, with what the slots weigh, -inf where a query does not see a slot.

        Args:
            key: Gathered keys, finite.
            scale: Factor on the scores.
            part: Where they come from.
            blocks: Where they come from.
            bias: Of the part.

        Returns:
            Where slots are seen, shape of the scores; ``None`` when all keys and values are finite.
        """
        tiling = self.tiling
        self.scores_blocks.copy_(part.lists.bias[blocks, None, None])
        if bias is not None:
            bias.add(self.scores_blocks.transpose(1, 2), blocks)
        if tiling.pattern.causal:
            self.own_block.add_(tiling.future)
        if tiling.pattern.banded:
            self.scores_blocks.masked_fill_(tiling.outside(part, blocks), -torch.inf)
        visible = None if tiling.finite else self.scores > -torch.inf
        self.scores.baddbmm_(self.query, key.mT, alpha=scale)
        return visible


class Workspace:
    """What one thread keeps from part to part.

    Args:
        tiling: The tiling.
        tile_type: ``Tile``, or the one with the buffers of a backward pass.
    """

    def __init__(self, tiling: Tiling, tile_type: type[Tile] = Tile) -> None:
        self.tiling, self._tile_type = tiling, tile_type
        self._tiles: dict[tuple[int, int], Tile] = {}
        self._arrays: dict[tuple[object, ...], Tensor] = {}

    def tile(self, part: Part, blocks: slice) -> Tile:
        """The tile for a pass."""
        shape = part.units, blocks.stop - blocks.start
        if shape not in self._tiles:
            self._tiles[shape] = self._tile_type(self.tiling, *shape)
        return self._tiles[shape]

    def array(self, name: str, *shape: int) -> Tensor:
        """A tensor of the work type; the next request of this name and shape gets the same."""
        asked = (name, *shape)
        if asked not in self._arrays:
            self._arrays[asked] = self.tiling.empty(*shape)
        return self._arrays[asked]

    def rows(
        self, x: Tensor, part: Part, weights: Sequence[Tensor], bias: FarBias | None, name: str, turned: bool = False
    ) -> Tensor:  # fmt: skip
        """The array of keys (``turned``) or values of a part, filled: ``(u, plan.rows, c)``."""
        array = self.array(name, part.units, self.tiling.plan.rows, x.shape[3])
        self.tiling.fill_rows(array, x, part, weights, bias, turned)
        return array
