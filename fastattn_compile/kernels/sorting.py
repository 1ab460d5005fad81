"""Stable sorts of small numbers: counted in Triton on a GPU and in C++ on a CPU, where the kernels allow it.

A sort is a step of a kernel, not one a user chooses: what cannot be counted is sorted by ATen whatever was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.cpu import trees
from fastattn_compile.kernels.dispatch import gpu_obstacle, takes_step


def stable_order(code: Tensor, bins: int) -> Tensor:
    """Positions of the items of each row, sorted by number.

    Args:
        code: ``(u, n)`` whole numbers from 0 to ``bins - 1``.
        bins: Number of numbers.

    Returns:
        ``(u, n)`` int64.
    """
    if takes_step("triton", lambda: gpu_obstacle(code)):
        from fastattn_compile.kernels.gpu import counting_sort

        if not counting_sort.obstacle(code, bins):
            return counting_sort.stable_order(code, bins)
    return torch.sort(code, dim=-1, stable=True).indices


@dataclass(frozen=True)
class Levels:
    """Keys sorted by the nodes of a tree, a list a level from the deepest on, and a range of one of them for every query.

    Args:
        order: ``(u, lists, m)`` rows of keys, counted through all units. A list that no query of a unit reads need not be
            sorted.
        start: ``(u, r, n)`` first place in the lists of the unit.
        stop: ``(u, r, n)`` one past the last.
        level: ``(u, r, n)`` level of the list.
        node: ``(u, r, n)`` node of the query there, with its segment before it.
    """

    order: Tensor
    start: Tensor
    stop: Tensor
    level: Tensor
    node: Tensor


@dataclass(frozen=True)
class Segments:
    """Parts of sequences that see nothing of each other.

    Args:
        count: Number of them.
        key: ``(b, m)`` from 0 to ``count - 1``.
        query: ``(b, n)`` likewise.
    """

    count: int
    key: Tensor
    query: Tensor


def climb(
    key_leaf: Tensor, query_leaf: Tensor, height: int, deepest: int, ancestors: bool, low: Tensor, high: Tensor,
    gone: Tensor | None = None, segments: Segments | None = None,
) -> Levels:  # fmt: skip
    """Where every query finds the keys of its node that it may see.

    Args:
        key_leaf: ``(u, m)`` int64, leaf of each key.
        query_leaf: ``(u, r, n)`` int64, leaf of each query.
        height: Of the tree.
        deepest: Level at which to look first.
        ancestors: Climb while a query finds no key.
        low: ``(n,)`` int64, first position that a query may see; never falls from query to query.
        high: ``(n,)`` int64, one past the last; likewise.
        gone: ``(u, m)`` boolean, keys that are in no node.
        segments: A node is one in each segment; units are those of one sequence after another.
    """
    given = key_leaf, query_leaf, height, deepest, ancestors, low, high, gone
    if takes_step("cpp", lambda: trees.climbing_obstacle(key_leaf)):
        named = (1, None, None) if segments is None else (segments.count, segments.key, segments.query)
        return Levels(*trees.climb(*given, *named))
    return _climb(*given, segments)


def _climb(
    key_leaf: Tensor, query_leaf: Tensor, height: int, deepest: int, ancestors: bool, low: Tensor, high: Tensor,
    gone: Tensor | None, segments: Segments | None,
) -> Levels:  # fmt: skip
    units, length = key_leaf.shape
    count = 1 if segments is None else segments.count
    orders: list[Tensor] = []
    start = torch.zeros_like(query_leaf)
    stop, level_of, node = (torch.zeros_like(start) for _ in range(3))
    waiting = torch.ones_like(start, dtype=torch.bool)
    for level in range(deepest, -1, -1):
        code, wanted = key_leaf >> (height - level), query_leaf >> (height - level)
        if segments is not None:
            each = units // len(segments.key)
            code = code + (segments.key << level).repeat_interleave(each, 0)
            wanted = wanted + (segments.query << level).repeat_interleave(each, 0)[:, None]
        if gone is not None:
            code = code.masked_fill(gone, count << level)
        order, first, last = ranked(code, (count << level) + 1, wanted, low, high)
        here = waiting & (last > first) if ancestors and level > 0 else waiting
        base = len(orders) * length
        start, stop = torch.where(here, first + base, start), torch.where(here, last + base, stop)
        level_of, node = level_of.masked_fill(here, level), torch.where(here, wanted, node)
        orders.append(order + length * torch.arange(units, device=order.device)[:, None])
        waiting = waiting & ~here
        if not ancestors or not bool(waiting.any()):
            break
    return Levels(torch.stack(orders, 1), start, stop, level_of, node)


def ranked(
    code: Tensor, bins: int, wanted: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Items sorted by number, and where in that order those of a wanted number between two positions stand.

    Args:
        code: ``(u, m)`` int64 from 0 to ``bins - 1``.
        bins: Number of numbers.
        wanted: ``(u, r, n)`` int64, a number for every query.
        low: int64 that broadcasts to ``wanted``, first position that a query asks for.
        high: Likewise, one past the last.

    Returns:
        ``(u, m)`` positions in order; ``(u, r, n)`` first place and one past the last.
    """
    order = stable_order(code, bins)
    ladder = code.gather(-1, order) * code.shape[1] + order
    at = wanted * code.shape[1]
    start, stop = (torch.searchsorted(ladder, (at + edge).flatten(1)).view_as(wanted) for edge in (low, high))
    return order, start, stop
