"""Who meets whom in attention through lists: sorted queries in tiles, each with a range of a list of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_ranges import Ranges


@dataclass(frozen=True)
class Lists:
    """Who meets whom: sorted queries in tiles, each with a range of a list of keys. Whole numbers are int32.

    Args:
        query_row: ``(p,)`` row of each sorted query.
        out_row: ``(p,)`` row of its results.
        start: ``(p,)`` first slot of its range, ascending.
        stop: ``(p,)`` one past the last.
        tile: ``(tiles + 1,)`` place of the first query of each tile.
        key_row: ``(slots,)`` row of the key in each slot.
        grad_row: ``(slots,)`` row of its gradients; no two slots of a list of one unit share one.
        units: Independent sets of keys.
        lists: Lists of a unit, one after another.
        bias: ``(slots,)`` float32 added to the scores, -inf for no key; ``None`` is zero.
    """

    query_row: Tensor
    out_row: Tensor
    start: Tensor
    stop: Tensor
    tile: Tensor
    key_row: Tensor
    grad_row: Tensor
    units: int
    lists: int
    bias: Tensor | None = None

    @property
    def length(self) -> int:
        """Slots of one list."""
        return self.key_row.numel() // max(1, self.units * self.lists)

    def reaching(self, level: int, columns: int) -> tuple[Tensor, Tensor]:
        """For tiles of ``columns`` slots of every unit's list: the stretch of queries whose ranges may meet it."""
        tiles = torch.arange(-(-self.length // columns), device=self.start.device) * columns
        begin = (torch.arange(self.units, device=self.start.device) * self.lists + level)[
            :, None
        ] * self.length
        low, high = (begin + tiles).flatten(), (begin + (tiles + columns).clamp(max=self.length)).flatten()
        first = torch.searchsorted(self.stop.cummax(0).values, low, right=True, out_int32=True)
        last = torch.searchsorted(self.start, high, out_int32=True)
        return first, torch.maximum(first, last)


def range_lists(ranges: Ranges, length: int, rows: int) -> Lists:
    """The lists of ``treeformer_ranges``, in tiles of at most ``rows`` queries of one node.

    Args:
        ranges: Ranges of lists of ``length`` keys.
        length: Keys.
        rows: Queries of a tile.
    """
    start, stop, node = (x.flatten() for x in (ranges.start, ranges.stop, ranges.node))
    beyond = ranges.order.numel()
    # Queries that meet nothing stand last.
    idle = stop <= start
    start, stop, node = (
        x.masked_fill(idle, fill) for x, fill in ((start, beyond), (stop, beyond), (node, 0))
    )
    row = torch.sort(start * (beyond + 1) + stop, stable=True).indices
    start, stop, node = start[row], stop[row], node[row]
    part = torch.div(start, length, rounding_mode="floor")
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (part[1:] != part[:-1]) | (node[1:] != node[:-1])
    key_row, lists = ranges.order.int(), len(ranges.levels)
    return Lists(
        row.int(), row.int(), start.int(), stop.int(), cut_tiles(first, rows), key_row, key_row,
        beyond // (lists * length), lists,
    )  # fmt: skip


def cut_tiles(first: Tensor, rows: int) -> Tensor:
    """Cuts runs into tiles of at most ``rows``.

    Args:
        first: ``(p,)`` boolean, true where a run begins; true at 0.
        rows: Items of a tile.

    Returns:
        ``(tiles + 1,)`` int32, where each tile begins, then ``p``.
    """
    place = torch.arange(first.numel(), device=first.device)
    origin = torch.where(first, place, 0).cummax(0).values
    begin = ((place - origin) % rows == 0).nonzero().flatten()
    return torch.cat([begin, begin.new_tensor([first.numel()])]).int()


def cluster_lists(token: Tensor, offset: Tensor, tokens: int, heads: int, group: int, rows: int) -> Lists:
    """Clusters whose members meet one another; queries and results are numbered by slot.

    Args:
        token: ``(tiles, slots)`` row, among ``tokens``, of the member in each slot.
        offset: ``(tiles, slots)`` added to the score of a key; -inf for an empty slot.
        tokens: Tokens of all sequences.
        heads: Key heads; rows of tokens are numbered head by head.
        group: Query heads that share a key head: the rows ``token * group .. token * group + group - 1``.
        rows: Queries of a tile.
    """
    tiles, slots = token.shape
    device = token.device
    key_row = (torch.arange(heads, device=device)[:, None, None] * tokens + token).int()
    query_row = key_row[..., None] * group + torch.arange(group, device=device, dtype=torch.int32)
    place = torch.arange(query_row.numel(), device=device, dtype=torch.int32)
    run = torch.div(place, slots * group, rounding_mode="floor")
    within = torch.arange(0, slots * group, rows, device=device)
    begin = (torch.arange(heads * tiles, device=device)[:, None] * (slots * group) + within).flatten()
    return Lists(
        query_row.flatten(), place, run * slots, (run + 1) * slots,
        torch.cat([begin, begin.new_tensor([place.numel()])]).int(), key_row.flatten(),
        torch.arange(key_row.numel(), device=device, dtype=torch.int32), heads * tiles, 1,
        offset.float().expand(heads, tiles, slots).flatten(),
    )  # fmt: skip
