"""The pooled rows of fast multipole attention: all levels from the tokens, and their gradients back.

``u`` counts heads, ``c`` channels. Pooled rows stand level by level as ``make_plan`` lays them out: row ``r``
of group ``g`` of a level at ``offset + rank * g + r``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan


def sum_levels(tokens: Tensor, pooled: Tensor, plan: Plan, pattern: Pattern) -> None:
    """Sums tokens part by part of each group; a level's parts are pairs of parts of the level below.

    Args:
        tokens: ``(u, blocks * block, c)``.
        pooled: ``(u, plan.offsets[-1], c)``, receives the sums.
        plan: The plan.
        pattern: The pattern.
    """
    finest = pattern.rank * plan.blocks
    for level in range(plan.levels):
        rows = pooled[:, plan.offsets[level] : plan.offsets[level + 1]]
        if level == 0:
            torch.sum(tokens.unflatten(1, (finest, -1)), 2, out=rows[:, :finest])
            rows[:, finest:] = 0
        else:
            below = pooled[:, plan.offsets[level - 1] : plan.offsets[level]]
            torch.add(below[:, 0::2], below[:, 1::2], out=rows)


def spread_levels(pooled: Tensor, tokens: Tensor, plan: Plan, pattern: Pattern) -> None:
    """The transpose of ``sum_levels``: adds to each token the gradients of all rows it was summed into.

    Args:
        pooled: ``(u, plan.offsets[-1], c)`` gradients of the sums; overwritten.
        tokens: ``(u, blocks * block, c)``, added to.
        plan: The plan.
        pattern: The pattern.
    """
    for level in reversed(range(plan.levels)):
        rows = pooled[:, plan.offsets[level] : plan.offsets[level + 1]]
        if level > 0:
            below = pooled[:, plan.offsets[level - 1] : plan.offsets[level]]
            below.unflatten(1, (-1, 2)).add_(rows.unsqueeze(2))
        else:
            finest = pattern.rank * plan.blocks
            tokens.unflatten(1, (finest, -1)).add_(rows[:, :finest].unsqueeze(2))


def row_counts(taken: Tensor, plan: Plan, pattern: Pattern) -> Tensor:
    """Tokens that each pooled row stands for.

    Args:
        taken: ``(blocks * block,)`` in the work type, 1 for a token that is pooled.
        plan: The plan.
        pattern: The pattern.

    Returns:
        ``(plan.offsets[-1],)``; a learned row stands for an equal share of its group.
    """
    counts = taken.new_empty(1, plan.offsets[-1], 1)
    sum_levels(taken[None, :, None], counts, plan, pattern)
    if pattern.learned:
        counts = (
            counts.unflatten(1, (-1, pattern.rank)).mean(2, keepdim=True).expand(-1, -1, pattern.rank, -1)
        )
    return counts.flatten()


def row_gains(counts: Tensor, plan: Plan, pattern: Pattern) -> Tensor:
    """Tokens of each row's group over those of it that are pooled, ``(plan.offsets[-1],)``, from its ``row_counts``."""
    widths = [
        torch.full((end - begin,), pattern.block << level, dtype=counts.dtype, device=counts.device)
        for level, (begin, end) in enumerate(zip(plan.offsets, plan.offsets[1:]))
    ]
    width = torch.cat(widths) if widths else torch.empty_like(counts)
    return width / (counts * pattern.rank).clamp(min=1)


def _by_channel(tokens: Tensor, multiple: int) -> Tensor:
    """``(u, n, c)`` as ``(c, u, n')``, filled up with 0 to a multiple."""
    missing = -tokens.shape[1] % multiple
    return torch.nn.functional.pad(tokens.permute(2, 0, 1), (0, missing)).contiguous()


def _by_group(tokens: Tensor, width: int) -> Tensor:
    """``(u, n, c)`` as ``(u, groups, width * c)``, filled up with 0."""
    missing = -tokens.shape[1] % width
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)).unflatten(1, (-1, width)).flatten(2)


def _dense_matrix(weight: Tensor) -> Tensor:
    """Weight ``(c, rank, c', width)`` as the matrix ``(width * c', rank * c)`` that pools a flattened group."""
    return weight.permute(3, 2, 1, 0).reshape(weight.shape[3] * weight.shape[2], -1)


def used_rows(level: int, plan: Plan, pattern: Pattern) -> slice:
    """The pooled rows of the groups of a level that hold tokens."""
    groups = -(-plan.blocks // (1 << level))
    return slice(plan.offsets[level], plan.offsets[level] + groups * pattern.rank)


def combine_levels(
    tokens: Tensor, pooled: Tensor, factor: Tensor, weights: Sequence[Tensor], plan: Plan, pattern: Pattern
) -> None:
    """Learned rows of every level, ``bias + factor * sum_t weight[c, r, t] x[t, c]``, or over all channels if dense.

    Args:
        tokens: ``(u, blocks * block, c)``, 0 where a token is not pooled.
        pooled: ``(u, plan.offsets[-1], c)``, receives the rows.
        factor: ``(plan.offsets[-1],)``, tokens of a group over those that are pooled.
        weights: For every level weight ``(c, rank, width)``, dense ``(c, rank, c, width)``, and bias ``(c, rank)``.
        plan: The plan.
        pattern: The pattern.
    """
    pooled.zero_()
    units, channels = tokens.shape[0], tokens.shape[2]
    if pattern.dense:
        for level in range(plan.levels):
            used = used_rows(level, plan, pattern)
            weight, bias = (x.to(tokens.dtype) for x in weights[2 * level : 2 * level + 2])
            x = _by_group(tokens, pattern.block << level)
            rows = (x @ _dense_matrix(weight)).unflatten(2, (pattern.rank, channels))
            scaled = rows * factor[used].view(-1, pattern.rank, 1) + bias.T
            pooled[:, used] = scaled.flatten(1, 2)
        return
    by_channel = _by_channel(tokens, pattern.block << max(0, plan.levels - 1))
    for level in range(plan.levels):
        width, used = pattern.block << level, used_rows(level, plan, pattern)
        weight, bias = (x.to(tokens.dtype) for x in weights[2 * level : 2 * level + 2])
        groups = (used.stop - used.start) // pattern.rank
        x = by_channel[:, :, : groups * width].reshape(channels, units * groups, width)
        rows = torch.bmm(x, weight.mT).unflatten(1, (units, groups)).permute(1, 2, 3, 0)
        scaled = rows * factor[used].view(groups, pattern.rank, 1) + bias.T
        pooled[:, used] = scaled.flatten(1, 2)


def combine_levels_backward(
    tokens: Tensor, grad_pooled: Tensor, factor: Tensor, weights: Sequence[Tensor],
    grad_tokens: Tensor, grad_weights: Sequence[Tensor], plan: Plan, pattern: Pattern,
) -> None:  # fmt: skip
    """Gradients of ``combine_levels``, added to what is there.

    Args:
        tokens: As in ``combine_levels``.
        grad_pooled: ``(u, plan.offsets[-1], c)`` gradients of the rows.
        factor: As in ``combine_levels``.
        weights: As in ``combine_levels``.
        grad_tokens: ``(u, blocks * block, c)``, added to.
        grad_weights: One for each of ``weights``, in the work type, added to.
        plan: The plan.
        pattern: The pattern.
    """
    units, channels = tokens.shape[0], tokens.shape[2]
    if pattern.dense:
        for level in range(plan.levels):
            used, width = used_rows(level, plan, pattern), pattern.block << level
            grad = grad_pooled[:, used].unflatten(1, (-1, pattern.rank))
            grad_weights[2 * level + 1].add_(grad.sum((0, 1)).T)
            scaled = (grad * factor[used].view(-1, pattern.rank, 1)).flatten(2)
            x = _by_group(tokens, width)
            of_matrix = x.flatten(0, 1).mT @ scaled.flatten(0, 1)
            grad_weights[2 * level].add_(
                of_matrix.view(width, channels, pattern.rank, channels).permute(3, 2, 1, 0)
            )
            spread = scaled @ _dense_matrix(weights[2 * level].to(tokens.dtype)).mT
            grad_tokens += spread.view(units, -1, channels)[:, : tokens.shape[1]]
        return
    by_channel = _by_channel(tokens, pattern.block << max(0, plan.levels - 1))
    grad_by_channel = torch.zeros_like(by_channel)
    for level in range(plan.levels):
        width, used = pattern.block << level, used_rows(level, plan, pattern)
        groups = (used.stop - used.start) // pattern.rank
        grad = grad_pooled[:, used].unflatten(1, (groups, pattern.rank))
        grad_weights[2 * level + 1].add_(grad.sum((0, 1)).T)
        scaled = (grad * factor[used].view(groups, pattern.rank, 1)).permute(3, 0, 1, 2)
        scaled = scaled.reshape(channels, units * groups, pattern.rank)
        x = by_channel[:, :, : groups * width].reshape(channels, units * groups, width)
        grad_weights[2 * level].add_(torch.bmm(scaled.mT, x))
        spread = torch.bmm(scaled, weights[2 * level].to(tokens.dtype))
        grad_by_channel[:, :, : groups * width] += spread.view(channels, units, groups * width)
    grad_tokens += grad_by_channel[:, :, : tokens.shape[1]].permute(1, 2, 0)
