"""Fast multipole attention on a grid as it is defined: one dense softmax over tokens and pooled rows of cells.

Who meets whom is written down from coordinates, token by token, and every pooled row is a weighted sum over all tokens;
nothing is shared with the lists and the recursion of the kernels (specification 1.9).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, masked_softmax, ungrouped
from fastattn_compile.operators.fma.config import FmaConfig
from fastattn_compile.operators.fma.grid_cells import grid_levels, grid_of, part_grid, side_of


def touching(a: Tensor, b: Tensor) -> Tensor:
    """Whether two cells are the same or neighbours, corners included; ``(..., 2)`` places of cells to ``(...)``."""
    return ((a - b).abs() <= 1).all(-1)


def coordinates(config: FmaConfig, device: torch.device) -> Tensor:
    """Row and column of every token of the grid, ``(n, 2)``."""
    height, width = grid_of(config)
    place = torch.arange(height * width, device=device)
    return torch.stack([place // width, place % width], -1)


def near_tokens(config: FmaConfig, rows: Tensor, device: torch.device) -> Tensor:
    """Which tokens some queries meet one by one, were nothing padded.

    Args:
        config: The configuration.
        rows: ``(r,)`` places of queries in the sequence, tokens in front of the grid included.
        device: Of the result.

    Returns:
        ``(r, p + n)`` boolean.
    """
    cell = coordinates(config, device) // side_of(config)
    front = config.prefix
    met = torch.ones(len(rows), front + len(cell), dtype=torch.bool, device=device)
    of_grid = rows >= front
    met[of_grid, front:] = touching(cell[rows[of_grid] - front, None], cell)
    return met


def far_cells(cell: Tensor, others: Tensor) -> Tensor:
    """Whether a query in a cell meets another cell of the level: below neighbouring parents, and not touching."""
    return touching(cell // 2, others // 2) & ~touching(cell, others)


def _rows_of_level(
    config: FmaConfig, level: int, weights: tuple[Tensor, ...], place: Tensor, tokens: Tensor, x: Tensor
) -> Tensor:
    """Pooled rows ``(..., cells, rank, c)`` of tokens ``(..., n, c)``.

    Args:
        config: The configuration.
        level: From 0.
        weights: For a learned basis weight ``(c, rank, width, width)`` and bias ``(c, rank)``, else empty.
        place: ``(n, 2)`` row and column of every token.
        tokens: ``(b, cells, rank, n)``, 1 where a token is one of those that a row stands for, or of its cell if learned.
        x: ``(b, g, 1, n, c)``, finite.
    """
    if not weights:
        shares = tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
        return torch.einsum("bmrn,bgunc->bgumrc", shares, x)
    width = side_of(config) << level
    weight, bias = (w.to(x.dtype) for w in weights)
    gain = width * width / tokens.sum(-1).clamp(min=1)
    at_tokens = weight[:, :, place[:, 0] % width, place[:, 1] % width]
    rows = torch.einsum("crn,bmrn,bgunc->bgumrc", at_tokens, tokens, x)
    return gain[:, None, None, :, :, None] * rows + bias.T


def grid_multipole_attention(
    config: FmaConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()
) -> AttentionOutput:
    """Dense fast multipole attention on a grid, differentiable; O(n^2) time and memory.

    Args:
        config: A configuration with a grid.
        inputs: The tensors, tokens in front of the grid first, then the grid row after row.
        parameters: For every level key weight ``(d, rank, width, width)``, key bias ``(d, rank)``, and those of values.
    """
    query, key, value = grouped(inputs)
    device, front, length = query.device, config.prefix, query.shape[3]
    place = coordinates(config, device)
    real = inputs.key_padding
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=device)
    key, value = (x.masked_fill(~real[:, None, None, :, None], 0) for x in (key, value))
    keys, values, bias = [key], [value], [real.new_zeros(len(real), length, dtype=torch.float64)]
    visible = [near_tokens(config, torch.arange(length, device=device), device) & real[:, None]]
    for level in range(grid_levels(config)):
        width = side_of(config) << level
        down, across = (-(-size // width) for size in grid_of(config))
        number = torch.arange(down * across, device=device)
        cells = torch.stack([number // across, number % across], -1)
        inside = (place // width == cells[:, None]).all(-1)
        rows, columns = part_grid(config)
        part = place % width // torch.tensor([width // rows, width // columns], device=device)
        mine = part[:, 0] * columns + part[:, 1] == torch.arange(config.rank, device=device)[:, None]
        learned = parameters[4 * level : 4 * level + 4]
        stands = inside[:, None] & (mine | bool(learned)) & real[:, None, None, front:]
        weights = stands.to(query.dtype)
        grid_key, grid_value = key[..., front:, :], value[..., front:, :]
        keys.append(_rows_of_level(config, level, learned[:2], place, weights, grid_key).flatten(3, 4))
        values.append(_rows_of_level(config, level, learned[2:], place, weights, grid_value).flatten(3, 4))
        count = stands.double().sum(-1) / (config.rank if learned else 1)
        bias.append(count.clamp(min=1e-9).log().flatten(1) * config.scale_attn)
        met = real.new_zeros(length, len(number))  # the tokens in front meet no pooled row
        met[front:] = far_cells(place[:, None] // width, cells)
        visible.append((met[None, :, :, None] & (count > 0)[:, None]).flatten(2))
    scores = inputs.scale * (query @ torch.cat(keys, -2).mT)
    scores = scores + torch.cat(bias, -1).to(query.dtype)[:, None, None, None]
    attention, log_sum_exp = masked_softmax(scores, torch.cat(visible, -1)[:, None, None])
    return ungrouped(inputs, attention @ torch.cat(values, -2), log_sum_exp)
