"""Fast multipole attention as it is defined: one dense softmax over fine keys and pooled rows.

The definition of Kang, Tran and De Sterck (arXiv 2310.11960) without phantom keys: what does not exist is not
seen, so that a causal output never depends on what follows. Which group a query meets is written down pair by
pair and shares nothing with the block plans of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import grouped, masked_softmax, ungrouped
from fastattn_compile.operators.fma.config import FmaConfig, level_count
from fastattn_compile.operators.mask import MaskStructure


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
        key: ``(b, g, 1, groups * rank, d)``.
        value: ``(b, g, 1, groups * rank, e)``.
        count: ``(b or 1, groups * rank)`` float64, tokens a row stands for.
        visible: ``(b or 1, n, groups * rank)`` boolean.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    visible: Tensor


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
        weight: ``(c, rank, width)``.
        bias: ``(c, rank)``.

    Returns:
        ``(b, g, 1, groups * rank, c)``.
    """
    width = weight.shape[2]
    tokens = _split(x.masked_fill(~pooled[:, None, None, :, None], 0), width)
    gain = (width / _counts(pooled, width).clamp(min=1)).to(x.dtype)[:, None, None, :, None, None]
    rows = torch.einsum("bgumtc,crt->bgumrc", tokens, weight.to(x.dtype))
    return (gain * rows + bias.to(x.dtype).T).flatten(-3, -2)


def _counts(pooled: Tensor, width: int) -> Tensor:
    """How many tokens of every ``width`` are pooled: ``(b, n)`` boolean to ``(b, groups)`` float64."""
    return _split(pooled[..., None].double(), width).sum((-2, -1))


def _level(
    config: FmaConfig, width: int, weights: tuple[Tensor, ...], key: Tensor, value: Tensor, pooled: Tensor,
    mask: MaskStructure,
) -> Level:  # fmt: skip
    """Pools one level and finds who sees it: a row is visible where every position it covers is."""
    length, rank = key.shape[3], config.rank
    if config.basis == "mean":
        cover = width // rank
        pooled_key, pooled_value = (_mean_rows(x, pooled, cover) for x in (key, value))
        count = _counts(pooled, cover)
    else:
        cover = width
        pooled_key = _learned_rows(key, pooled, weights[0], weights[1])
        pooled_value = _learned_rows(value, pooled, weights[2], weights[3])
        count = _counts(pooled, cover).repeat_interleave(rank, -1) / rank

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
    return Level(pooled_key, pooled_value, count, seen & (count > 0)[:, None])


def multipole_attention(
    config: FmaConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()
) -> AttentionOutput:
    """Dense fast multipole attention, differentiable; O(n^2) time and memory.

    Args:
        config: The configuration.
        inputs: The tensors; queries and keys stand at the same positions.
        parameters: For the depthwise basis four tensors a level: weight and bias of keys, of values.
    """
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
    levels = [Level(key, value, torch.ones_like(real, dtype=torch.float64), fine)]
    for level in range(level_count(length, config.block)):
        weights = parameters[4 * level : 4 * level + 4]
        levels.append(_level(config, config.block << level, weights, key, value, real & ~sink, inputs.mask))

    batch = max(x.visible.shape[0] for x in levels)
    visible = torch.cat([x.visible.expand(batch, -1, -1) for x in levels], -1)
    count = torch.cat([x.count for x in levels], -1)
    mass = torch.where((count > 0) & config.scale_attn, count, 1)
    scores = inputs.scale * (query @ torch.cat([x.key for x in levels], -2).mT)
    scores = scores + mass.log().to(query.dtype)[:, None, None, None]
    attention, log_sum_exp = masked_softmax(scores, visible[:, None, None])
    return ungrouped(inputs, attention @ torch.cat([x.value for x in levels], -2), log_sum_exp)
