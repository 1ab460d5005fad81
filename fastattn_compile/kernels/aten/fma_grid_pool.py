"""Pooled rows of the cells of a grid, level by level, and the way of their gradients back to the tokens.

Tokens stand as ``(u, n, c)``, row after row of the grid. Pooled rows stand as ``(u, cells, rank, c)``, cells of all levels
one after the other; the rows of a mean are its parts, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.fma_grid_plan import GridPattern, level_offsets


def _padded(x: Tensor, down: int, across: int) -> Tensor:
    """``(u, y, x, c)`` filled up with 0 to ``down`` and ``across``."""
    return F.pad(x, (0, 0, 0, across - x.shape[2], 0, down - x.shape[1]))


def _cut(x: Tensor, down: int, across: int) -> Tensor:
    """``(u, cells down * down, cells across * across, c)`` as ``(u, cells, down * across, c)``."""
    return x.unflatten(2, (-1, across)).unflatten(1, (-1, down)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _joined(cells: Tensor, number: tuple[int, int], down: int, across: int) -> Tensor:
    """The way back of ``_cut``."""
    x = cells.unflatten(2, (down, across)).unflatten(1, number)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def to_cells(x: Tensor, pattern: GridPattern) -> Tensor:
    """Tokens ``(u, n, c)`` by finest cells, ``(u, cells, block, c)``, 0 outside the grid."""
    (down, across), side = pattern.cells(0), pattern.side
    plane = x.unflatten(1, (pattern.height, pattern.width))
    return _cut(_padded(plane, down * side, across * side), side, side)


def from_cells(cells: Tensor, pattern: GridPattern) -> Tensor:
    """The way back of ``to_cells``."""
    plane = _joined(cells, pattern.cells(0), pattern.side, pattern.side)
    return plane[:, : pattern.height, : pattern.width].flatten(1, 2)


def part_sums(x: Tensor, pattern: GridPattern) -> Tensor:
    """Sums over the parts of every cell.

    Args:
        x: ``(u, n, c)``.
        pattern: The pattern.

    Returns:
        ``(u, cells, rank, c)``.
    """
    py, px = pattern.parts
    (down, across), side = pattern.cells(0), pattern.side
    plane = _padded(x.unflatten(1, (pattern.height, pattern.width)), down * side, across * side)
    plane = plane.unflatten(2, (across * px, -1)).sum(3).unflatten(1, (down * py, -1)).sum(2)
    rows = [_cut(plane, py, px)]
    for level in range(1, pattern.levels):
        down, across = pattern.cells(level)
        plane = _padded(plane, 2 * down * py, 2 * across * px)
        plane = plane.unflatten(2, (-1, 2)).sum(3).unflatten(1, (-1, 2)).sum(2)
        rows.append(_cut(plane, py, px))
    return torch.cat(rows, 1)


def part_sums_backward(grad: Tensor, pattern: GridPattern) -> Tensor:
    """Gradients of the tokens, ``(u, n, c)``, from those of ``part_sums``."""
    py, px = pattern.parts
    offsets = level_offsets(pattern)
    plane: Tensor | None = None
    for level in reversed(range(pattern.levels)):
        down, across = pattern.cells(level)
        own = _joined(grad[:, offsets[level] : offsets[level + 1]], (down, across), py, px)
        if plane is not None:
            own = own + _repeated(plane, 2, 2)[:, : own.shape[1], : own.shape[2]]
        plane = own
    assert plane is not None
    tokens = _repeated(plane, pattern.side // py, pattern.side // px)
    return tokens[:, : pattern.height, : pattern.width].flatten(1, 2)


def _repeated(plane: Tensor, down: int, across: int) -> Tensor:
    return plane.repeat_interleave(down, 1).repeat_interleave(across, 2)


def row_counts(taken: Tensor, pattern: GridPattern) -> Tensor:
    """Tokens that each pooled row stands for; a learned row stands for an equal share of its cell.

    Args:
        taken: ``(n,)`` in the work type, 1 for a token that is pooled.
        pattern: The pattern.

    Returns:
        ``(cells, rank)``.
    """
    counts = part_sums(taken[None, :, None], pattern)[0, ..., 0]
    return counts.mean(1, keepdim=True).expand_as(counts).contiguous() if pattern.learned else counts


def gains(counts: Tensor, pattern: GridPattern) -> Tensor:
    """Tokens of a cell over those that are pooled, ``(cells,)``: the missing ones count as the mean of the others.

    Args:
        counts: Of ``row_counts``.
        pattern: A learned pattern.
    """
    offsets, gain = level_offsets(pattern), counts.sum(1).clamp(min=1).reciprocal()
    for level in range(pattern.levels):
        gain[offsets[level] : offsets[level + 1]] *= pattern.block << (2 * level)
    return gain


def _by_channel(x: Tensor, level: int, pattern: GridPattern) -> tuple[Tensor, int, int]:
    """Tokens as ``(c, u * cells, t)``, and rows and columns of a cell: no more than the grid has if it is the only one."""
    number, width = pattern.cells(level), pattern.side << level
    down, across = (
        min(width, size) if cells == 1 else width
        for cells, size in zip(number, (pattern.height, pattern.width))
    )
    plane = x.unflatten(1, (pattern.height, pattern.width))
    cells = _cut(_padded(plane, number[0] * down, number[1] * across), down, across)
    return cells.flatten(0, 1).permute(2, 0, 1).contiguous(), down, across


def learned_rows(x: Tensor, gain: Tensor, weights: Sequence[Tensor], pattern: GridPattern) -> Tensor:
    """``bias + gain * sum_t weight[c, r, t] x[t, c]`` for every cell: a depthwise convolution a level, stride its width.

    Args:
        x: ``(u, n, c)``, 0 where a token is not pooled.
        gain: ``(cells,)``.
        weights: For every level weight ``(c, rank, width, width)`` and bias ``(c, rank)``.
        pattern: The pattern.

    Returns:
        ``(u, cells, rank, c)``.
    """
    offsets, found = level_offsets(pattern), []
    for level in range(pattern.levels):
        weight, bias = (w.to(x.dtype) for w in weights[2 * level : 2 * level + 2])
        tokens, down, across = _by_channel(x, level, pattern)
        rows = torch.bmm(tokens, weight[:, :, :down, :across].flatten(2).mT)
        rows = rows.permute(1, 2, 0).unflatten(0, (x.shape[0], -1))
        found.append(rows * gain[offsets[level] : offsets[level + 1], None, None] + bias.T)
    return torch.cat(found, 1)


def learned_rows_backward(
    x: Tensor, gain: Tensor, weights: Sequence[Tensor], pattern: GridPattern, grad: Tensor,
    grad_weights: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Gradients of ``learned_rows``: of the tokens, returned; of the weights, added to ``grad_weights``."""
    offsets, total = level_offsets(pattern), torch.zeros_like(x)
    for level in range(pattern.levels):
        weight, number = weights[2 * level].to(x.dtype), pattern.cells(level)
        cells = slice(offsets[level], offsets[level + 1])
        tokens, down, across = _by_channel(x, level, pattern)
        grad_weights[2 * level + 1].add_(grad[:, cells].sum((0, 1)).T)
        scaled = (grad[:, cells] * gain[cells, None, None]).flatten(0, 1).permute(2, 0, 1)
        of_weight = torch.bmm(scaled.mT, tokens).unflatten(2, (down, across))
        grad_weights[2 * level][:, :, :down, :across] += of_weight
        spread = torch.bmm(scaled, weight[:, :, :down, :across].flatten(2))
        spread = spread.permute(1, 2, 0).unflatten(0, (x.shape[0], -1))
        plane = _joined(spread, number, down, across)[:, : pattern.height, : pattern.width]
        total += plane.flatten(1, 2)
    return total
