"""Fast multipole attention as it is defined: one dense softmax over fine keys and pooled rows.

The definition of Kang, Tran and De Sterck (arXiv 2310.11960) without phantom keys: what does not exist is not
seen, so that a causal output never depends on what follows. Which group a query meets is written down pair by
pair and shares nothing with the block plans of the kernels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, grouped_bias, masked_softmax, ungrouped
from fastattn_compile.operators.fma.config import FmaConfig, level_count


def near_field(rows: Tensor, keys: Tensor, block: int) -> Tensor:
    """Whether a key stands in the query's block or one beside it; the mask decides what of that is seen."""
    return (rows // block - keys // block).abs() <= 1


def far_field(rows: Tensor, groups: Tensor, width: int, causal: bool) -> Tensor:
    """Whether a query meets a group of ``width`` tokens at that group's level (specification 1.3).

    Causal: of the parent before the query's own, the first child, and the second as well if the query stands
    in a second child. Bidirectional: the children of the query's own and the neighbouring parents that are
    not adjacent to the query's group.

    Args:
        rows: Query positions, any shape that broadcasts with ``groups``.
        groups: Group numbers of the level.
        width: Tokens of a group of the level.
        causal: Which of the two rules.
    """
    own = rows // width
    if causal:
        return (groups // 2 == own // 2 - 1) & (groups % 2 <= own % 2)
    return ((groups // 2 - own // 2).abs() <= 1) & ((groups - own).abs() > 1)


def sink_tokens(real: Tensor, sinks: int) -> Tensor:
    """Marks the first ``sinks`` real tokens of every sequence, ``(batch, n)`` boolean like ``real``."""
    return real & (real.cumsum(-1) <= sinks)


@dataclass(frozen=True)
class Level:
    """The pooled rows of one level.

    Args:
        key: ``(b, g, 1 or r, groups * rank, d)``.
        value: ``(b, g, 1 or r, groups * rank, e)``.
        count: ``(b or 1, groups * rank)`` float64, tokens a row stands for.
        visible: ``(b or 1, n, groups * rank)`` boolean.
        added: ``(b or 1, g or 1, r or 1, n or 1, groups * rank or 1)``, ``log mean_j exp(bias_ij)`` over a row's tokens.
        query: ``(b, g, r, n, d)``, what meets these rows; ``None``, the queries themselves.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    visible: Tensor
    added: Tensor
    query: Tensor | None = None


def _split(x: Tensor, width: int) -> Tensor:
    """``(..., n, c)`` as ``(..., groups, width, c)``, the last group filled up with 0."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % width)).unflatten(-2, (-1, width))


def _mean_rows(x: Tensor, pooled: Tensor, part: int) -> Tensor:
    """Means of the pooled tokens of every ``part``: ``(b, g, 1, n, c)`` to ``(b, g, 1, rows, c)``."""
    sums = _split(x.masked_fill(~pooled[:, None, None, :, None], 0), part).sum(-2)
    return sums / _counts(pooled, part).clamp(min=1).to(x.dtype)[:, None, None, :, None]


def _learned_rows(x: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Learned combinations of the tokens of a group, channel by channel (specification 1.2).

    ``row[r, c] = bias[c, r] + width / count * sum_t weight[c, r, t] x[t, c]``; the factor replaces tokens
    that do not take part by the average of those that do.

    Args:
        x: ``(b, g, 1, n, c)``.
        pooled: ``(b, n)`` boolean, the tokens that take part.
        weight: ``(c, rank, width)``, or over all channels ``(c, rank, c, width)``.
        bias: ``(c, rank)``.

    Returns:
        ``(b, g, 1, groups * rank, c)``.
    """
    width = weight.shape[-1]
    tokens = _split(x.masked_fill(~pooled[:, None, None, :, None], 0), width)
    gain = (width / _counts(pooled, width).clamp(min=1)).to(x.dtype)[:, None, None, :, None, None]
    if weight.dim() == 4:
        rows = torch.einsum("bgumtc,xrct->bgumrx", tokens, weight.to(x.dtype))
    else:
        rows = torch.einsum("bgumtc,crt->bgumrc", tokens, weight.to(x.dtype))
    return (gain * rows + bias.to(x.dtype).T).flatten(-3, -2)


def _merged_rows(
    x: Tensor, pooled: Tensor, width: int, weight: Tensor, bias: Tensor, merge: Tensor
) -> Tensor:
    """Rows of the recursive basis: those of the finest groups, merged two by two up to groups of ``width``.

    Args:
        x: ``(b, g, 1, n, c)``.
        pooled: ``(b, n)`` boolean, the tokens that take part.
        width: Tokens of a group.
        weight: ``(c, rank, block)``.
        bias: ``(c, rank)``, added at every level.
        merge: ``(c, rank, 2 * rank)``.

    Returns:
        ``(b, g, 1, groups * rank, c)``.
    """
    weight, bias, merge = (w.to(x.dtype) for w in (weight, bias, merge))
    tokens = _split(x.masked_fill(~pooled[:, None, None, :, None], 0), width)
    rows = torch.einsum("bgumatc,crt->bgumarc", tokens.unflatten(-2, (-1, weight.shape[2])), weight)
    while rows.shape[-3] > 1:
        rows = torch.einsum("bgumasc,crs->bgumarc", rows.unflatten(-3, (-1, 2)).flatten(-3, -2), merge)
    gain = (width / _counts(pooled, width).clamp(min=1)).to(x.dtype)[:, None, None, :, None, None]
    return (gain * rows.squeeze(-3) + bias.T).flatten(-3, -2)


def _counts(pooled: Tensor, width: int) -> Tensor:
    """How many tokens of every ``width`` are pooled: ``(b, n)`` boolean to ``(b, groups)`` float64."""
    return _split(pooled[..., None].double(), width).sum((-2, -1))


def _centres(config: FmaConfig, width: int, position: Tensor, pooled: Tensor) -> Tensor:
    """Mean positions of what the rows of a level stand for, ``(b, 1, 1, groups * rank)``."""
    if config.basis == "mean":
        return _mean_rows(position[..., None], pooled, width // config.rank).squeeze(-1)
    return _mean_rows(position[..., None], pooled, width).squeeze(-1).repeat_interleave(config.rank, -1)


def bias_of_rows(config: FmaConfig, inputs: AttentionInputs) -> Tensor | None:
    """The bias as pooled rows take it: learned combinations have no place for slopes, but for a number by distance.

    Args:
        config: The configuration.
        inputs: The tensors.
    """
    bias, length = inputs.bias, inputs.key.shape[2]
    if bias is None or bias.dim() == 2 or config.basis == "mean":
        return bias
    # The last group may reach beyond the sequence, by less than its length.
    return -bias[:, None] * torch.arange(1 - 2 * length, 2 * length, device=bias.device).abs()


def _mean_bias(inputs: AttentionInputs, rows: int, cover: int) -> Tensor:
    """``log mean_j exp(bias_ij)`` over all positions that rows of ``cover`` tokens span, ``(1, g, r, n, rows)``."""
    place = torch.arange(inputs.query.shape[2], device=inputs.query.device)
    added = inputs.added(place, torch.arange(rows * cover, device=place.device))
    if inputs.bias is None:
        return grouped_bias(inputs, added)
    return grouped_bias(inputs, added.unflatten(-1, (rows, cover)).logsumexp(-1) - math.log(cover))


def _decayed(
    inputs: AttentionInputs, x: Tensor, pooled: Tensor, cover: int, behind: bool
) -> tuple[Tensor, Tensor]:
    """Means under ALiBi: a row's tokens weigh as much as a query at its near end gives them (specification 5.3).

    Args:
        inputs: The tensors.
        x: ``(b, g, 1, n, c)``.
        pooled: ``(b or 1, n)`` boolean, the tokens that take part.
        cover: Tokens a row spans.
        behind: The queries stand before the row: its first token is the nearest.

    Returns:
        ``(b, g, r, rows, c)``; the weights before they were divided by their sum, logarithms, ``(b, g, r, rows, cover)``.
    """
    place = torch.arange(x.shape[3], device=x.device) % cover
    away = place if behind else cover - 1 - place
    slopes = grouped_bias(inputs, inputs.bias.view(1, -1, 1))  # type: ignore[union-attr]
    weights = (-slopes * away).masked_fill(~pooled[:, None, None], -torch.inf)[..., None]
    missing = -x.shape[3] % cover
    parts = F.pad(weights, (0, 0, 0, missing), value=-torch.inf).unflatten(-2, (-1, cover))
    shares = parts.softmax(-2).nan_to_num(0)
    rows = (shares * _split(x.masked_fill(~pooled[:, None, None, :, None], 0), cover)).sum(-2)
    return rows, parts.squeeze(-1)


def _level(
    config: FmaConfig, width: int, weights: tuple[Tensor, ...], inputs: AttentionInputs, key: Tensor, value: Tensor,
    pooled: Tensor,
) -> list[Level]:  # fmt: skip
    """Pools one level and finds who sees it: a row is visible where every position it covers is."""
    length, rank, mask = key.shape[3], config.rank, inputs.mask
    cover = width // rank if config.basis == "mean" else width
    count = _counts(pooled, cover)
    if config.basis != "mean":
        count = count.repeat_interleave(rank, -1) / rank

    rows = torch.arange(length, device=key.device)[:, None]
    # Rows of a mean stand part by part; learned rows of one group all cover the whole of it.
    place = torch.arange(count.shape[1], device=key.device)
    first = place * cover if config.basis == "mean" else place // rank * cover
    last = (first + cover).clamp(max=length) - 1
    seen = far_field(rows, first // width, width, mask.causal)
    if mask.left is not None:
        seen = seen & (first >= rows - mask.left)
    if mask.right is not None:
        seen = seen & (last <= rows + mask.right)
    seen = seen & (count > 0)[:, None]

    if config.basis != "mean":
        if config.basis == "recursive":
            pooled_key = _merged_rows(key, pooled, width, *weights[:3])
            pooled_value = _merged_rows(value, pooled, width, *weights[3:])
        else:
            pooled_key = _learned_rows(key, pooled, *weights[:2])
            pooled_value = _learned_rows(value, pooled, *weights[2:])
        added = _mean_bias(inputs, count.shape[1] // rank, cover)
        if inputs.bias is not None:
            added = added.repeat_interleave(rank, -1)
        return [Level(pooled_key, pooled_value, count, seen, added)]
    if inputs.bias is None or inputs.bias.dim() == 2:
        pooled_key, pooled_value = (_mean_rows(x, pooled, cover) for x in (key, value))
        return [Level(pooled_key, pooled_value, count, seen, _mean_bias(inputs, count.shape[1], cover))]

    levels: list[Level] = []
    share = count.clamp(min=1).log().to(key.dtype)[:, None, None, None]
    slopes = grouped_bias(inputs, inputs.bias.view(1, -1, 1, 1))
    for behind in (False, True):
        (pooled_key, mass), (pooled_value, _) = (
            _decayed(inputs, x, pooled, cover, behind) for x in (key, value)
        )
        distance = first - rows if behind else rows - (first + cover - 1)
        added = mass.logsumexp(-1)[..., None, :] - slopes * distance - share
        levels.append(Level(pooled_key, pooled_value, count, seen & (distance > 0), added))
    return levels


def multipole_attention(
    config: FmaConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()
) -> AttentionOutput:
    """Dense fast multipole attention, differentiable; O(n^2) time and memory.

    Args:
        config: The configuration.
        inputs: The tensors; queries and keys stand at the same positions.
        parameters: As ``basis.parameter_layout`` lists them.
    """
    inputs = dataclasses.replace(inputs, bias=bias_of_rows(config, inputs))
    query, key, value = grouped(inputs)
    length = query.shape[3]
    place = torch.arange(length, device=query.device)
    real = inputs.key_padding
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=query.device)
    key, value = (x.masked_fill(~real[:, None, None, :, None], 0) for x in (key, value))
    sink = sink_tokens(real, config.sinks)
    met = near_field(place[:, None], place, config.block) | sink[:, None, :]
    fine = inputs.visible(place)[:, 0] & met
    levels = [
        Level(
            key,
            value,
            torch.ones_like(real, dtype=torch.float64),
            fine,
            grouped_bias(inputs, inputs.added(place)),
        )
    ]
    rotary = config.rotary(key.shape[-1])
    position = (real.cumsum(-1) - 1).clamp(min=0).double()[:, None, None]
    free = key if rotary is None else rotary.at(position, key.dtype).undo(key)
    for level in range(level_count(length, config.block)):
        weights = parameters if config.basis == "recursive" else parameters[4 * level : 4 * level + 4]
        width = config.block << level
        found = _level(config, width, weights, inputs, free, value, real & ~sink)
        if rotary is not None:
            centre = _centres(config, width, position, real & ~sink)
            found = [dataclasses.replace(x, key=rotary.at(centre, key.dtype).redo(x.key)) for x in found]
        if config.queries == "pooled":
            means = _mean_rows(query.masked_fill(~real[:, None, None, :, None], 0), real, width)
            spread = means.repeat_interleave(width, -2)[..., :length, :]
            found = [dataclasses.replace(x, query=spread) for x in found]
        levels += found

    batch = max(x.visible.shape[0] for x in levels)
    visible = torch.cat([x.visible.expand(batch, -1, -1) for x in levels], -1)
    heads = query.shape[:3] if inputs.bias is not None else key.shape[:3]
    values = torch.cat([x.value.expand(*heads, -1, -1) for x in levels], -2)
    products = [(query if x.query is None else x.query) @ x.key.mT for x in levels]
    count = torch.cat([x.count for x in levels], -1)
    mass = torch.where((count > 0) & config.scale_attn, count, 1)
    scores = inputs.scale * torch.cat(products, -1) + mass.log().to(query.dtype)[:, None, None, None]
    if inputs.bias is not None:
        added = [x.added.masked_fill(x.added == -torch.inf, 0) for x in levels]
        scores = scores + torch.cat([x.expand(*heads, -1, -1) for x in added], -1)
    attention, log_sum_exp = masked_softmax(scores, visible[:, None, None])
    return ungrouped(inputs, attention @ values, log_sum_exp)
