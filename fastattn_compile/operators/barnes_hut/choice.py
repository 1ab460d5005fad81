"""Which leaves a query opens, as it is defined: dense, over all nodes at once, in boolean masks.

Specification, section Definition. It shares its words with the kernels' descent by lists and none of its
code. The choice is made in float32 (float64 for float64 inputs) and carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.operators.barnes_hut.config import SAMPLES, BarnesHutConfig
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact.reference import compute_dtype
from fastattn_compile.operators.mask import MaskStructure

LEAST_KEPT = 8


@dataclass(frozen=True)
class NodeLevel:
    """The nodes of one level. ``c`` choosers of a key head: 1 when its query heads share a choice, else each
    its own.

    Args:
        width: Tokens a node covers.
        begin: ``(N,)`` first position of a node.
        scores: ``(b, g, c, v, groups, N)`` estimated log mass for every voice.
        opened: ``(b, g, c, groups, N)`` boolean: leaves that are opened; nodes that are expanded.
        closed: The same shape, boolean: candidates that stay closed.
    """

    width: int
    begin: Tensor
    scores: Tensor
    opened: Tensor
    closed: Tensor


def near_blocks(rows: Tensor, keys: Tensor, block: int) -> Tensor:
    """Whether a key stands in the query's block or one beside it."""
    return (rows // block - keys // block).abs() <= 1


def taken_tokens(inputs: AttentionInputs, sinks: int) -> tuple[Tensor, Tensor]:
    """The sinks, and the real tokens that are none: ``(b or 1, n)`` boolean each."""
    real = inputs.key_padding
    if real is None:
        real = torch.ones(1, inputs.key.shape[2], dtype=torch.bool, device=inputs.key.device)
    first = real.cumsum(-1) <= sinks
    return real & first, real & ~first


def _split(x: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """``(..., n, c)`` as ``(..., N, width, c)``."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % width), value=fill).unflatten(-2, (-1, width))


def group_voices(config: BarnesHutConfig, query: Tensor, causal: bool) -> Tensor:
    """The queries that speak for every group.

    Causal: of the ``group`` queries up to the group's first one. Else: of the group itself.

    Args:
        config: The configuration.
        query: ``(b, g, r, n, d)``.
        causal: Which of the two.

    Returns:
        ``(b, g, c, v, groups, d)``.
    """
    length, groups = query.shape[3], -(-query.shape[3] // config.group)
    spoken = []
    for number in range(groups):
        first = number * config.group
        members = range(first, first - config.group, -1) if causal else range(first, first + config.group)
        if config.select == "sampled":
            count = min(SAMPLES, config.group)
            members = members[:: config.group // count][:count]
            spoken.append(query[..., [min(max(i, 0), length - 1) for i in members], :])
        else:
            spoken.append(query[..., [i for i in members if 0 <= i < length], :].mean(-2, keepdim=True))
    voices = torch.stack(spoken, -3).movedim(-2, 3)
    return voices.flatten(2, 3).unsqueeze(2) if config.share_group else voices


def node_scores(
    config: BarnesHutConfig, voices: Tensor, key: Tensor, taken: Tensor, width: int, scale: float
) -> Tensor:
    """Estimated log mass of every node of a level for every voice.

    Args:
        config: The configuration.
        voices: ``(b, g, c, v, groups, d)``.
        key: ``(b, g, n, d)``.
        taken: ``(b or 1, n)`` boolean, the tokens that belong to nodes.
        width: Tokens a node covers.
        scale: Factor on the scores.

    Returns:
        ``(b, g, c, v, groups, N)``, -inf for a node without tokens, +inf for one whose estimate is not
        finite.
    """
    chosen = taken[:, None, :, None]
    count = _split(chosen.to(key.dtype), width).sum(-2)

    def product(x: Tensor, nodes: Tensor) -> Tensor:
        return x @ nodes[:, :, None, None].mT

    parts = _split(key.masked_fill(~chosen, 0), width)
    mean = parts.sum(-2) / count.clamp(min=1)
    scaled = voices * scale
    if config.select == "cumulant":
        spread = _split(chosen.to(key.dtype), width) * (parts - mean[..., None, :]) ** 2
        variance = spread.sum(-2) / count.clamp(min=1)
        scores = product(scaled, mean) + 0.5 * product(scaled**2, variance)
    elif config.select == "bound":
        high = (
            _split(key.masked_fill(~chosen, -torch.inf), width, -torch.inf)
            .amax(-2)
            .masked_fill(count == 0, 0)
        )
        low = (
            _split(key.masked_fill(~chosen, torch.inf), width, torch.inf).amin(-2).masked_fill(count == 0, 0)
        )
        scores = product(scaled.clamp(min=0), high) + product(scaled.clamp(max=0), low)
    else:
        scores = product(scaled, mean)
    scores = torch.where(torch.isfinite(scores), scores, torch.inf)
    number = count[:, :, None, None, None, :, 0]
    return torch.where(number > 0, scores + number.clamp(min=1).log(), -torch.inf)


def far_nodes(
    config: BarnesHutConfig, mask: MaskStructure, first: Tensor, width: int, nodes: int, length: int
) -> Tensor:
    """Whether a node lies wholly in the far field of a group of queries and is visible to all of it.

    Args:
        config: The configuration.
        mask: The mask.
        first: ``(groups,)`` position of each group's first query.
        width: Tokens a node covers.
        nodes: Number of nodes.
        length: Tokens of the sequence.

    Returns:
        ``(groups, nodes)`` boolean.
    """
    begin = torch.arange(nodes, device=first.device) * width
    end, row, last_row = begin + width, first[:, None], first[:, None] + config.group - 1
    block = row // config.block
    far = end <= (block - 1) * config.block
    if not mask.causal:
        far = far | (begin >= (block + 2) * config.block)
    # A node counts only if every query of the group sees every one of its tokens: what is hidden has no
    # influence.
    if mask.left is not None:
        far = far & (begin >= last_row - mask.left)
    if mask.right is not None:
        far = far & (end.clamp(max=length) - 1 <= row + mask.right)
    return far


def _merged(scores: Tensor) -> Tensor:
    """Voices ``(..., v, groups, N)`` to one ranking: the sum of the shares of mass they give to a node."""
    if scores.shape[-3] == 1:
        return scores.squeeze(-3)
    must = (scores == torch.inf).any(-3)
    shares = scores.masked_fill(scores == torch.inf, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.where(must, torch.inf, shares.sum(-3).log())


def _best(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` largest of the last dimension, none that is -inf."""
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return (rank < count) & (scores > -torch.inf)


@torch.no_grad()
def choose_nodes(config: BarnesHutConfig, inputs: AttentionInputs) -> list[NodeLevel]:
    """The descent, from the leaves (first in the list) up to a single root.

    Args:
        config: The configuration.
        inputs: The tensors.
    """
    dtype = torch.promote_types(compute_dtype(inputs), torch.float32)
    length, mask = inputs.key.shape[2], inputs.mask
    key = inputs.key.to(dtype)
    if inputs.key_padding is not None:
        key = key.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    query = inputs.query.to(dtype).unflatten(1, (inputs.key.shape[1], -1))
    query = torch.where(torch.isfinite(query), query, 0)
    voices = group_voices(config, query, mask.causal)
    _, taken = taken_tokens(inputs, config.sinks)
    first = torch.arange(0, inputs.query.shape[2], config.group, device=key.device)
    heights = 1
    while config.leaf * config.fanout ** (heights - 1) < length:
        heights += 1
    found: list[NodeLevel] = []
    for level in range(heights - 1, -1, -1):
        width = config.leaf * config.fanout**level
        nodes = -(-length // width)
        begin = torch.arange(nodes, device=key.device) * width
        seen = far_nodes(config, mask, first, width, nodes, length)
        if found:
            parent = torch.arange(nodes, device=key.device) // config.fanout
            whole = far_nodes(config, mask, first, found[-1].width, found[-1].begin.numel(), length)[
                :, parent
            ]
            candidate = seen & (found[-1].opened[..., parent] | ~whole)
        else:
            candidate = seen
        scores = node_scores(config, voices, key, taken, width, inputs.scale)
        candidate = candidate if candidate.dim() == 2 else candidate[..., None, :, :]
        scores = scores.masked_fill(~candidate, -torch.inf)
        merged = _merged(scores)
        keep = (
            config.most_open if level == 0 else max(min(config.beam, LEAST_KEPT), config.beam >> (level - 1))
        )
        opened = _best(merged, keep)
        found.append(NodeLevel(width, begin, scores, opened, (merged > -torch.inf) & ~opened))
    found.reverse()
    return _tolerated(config, inputs, voices, key, first, found) if config.tolerance else found


def _tolerated(
    config: BarnesHutConfig, inputs: AttentionInputs, voices: Tensor, key: Tensor, first: Tensor,
    found: list[NodeLevel],
) -> list[NodeLevel]:  # fmt: skip
    """Closes the last of the opened leaves while the estimated unopened share of every voice stays
    tolerated."""
    positions = torch.arange(key.shape[2], device=key.device)
    sink, _ = taken_tokens(inputs, config.sinks)
    near = near_blocks(first[:, None], positions, config.block)
    seen = inputs.visible(first) & (near | sink[:, None, None])
    near_scores = inputs.scale * (voices @ torch.where(torch.isfinite(key), key, 0)[:, :, None, None].mT)
    near_mass = near_scores.masked_fill(~seen[:, :, None, None], -torch.inf).logsumexp(-1)
    closed = torch.cat(
        [x.scores.masked_fill(~x.closed[..., None, :, :], -torch.inf) for x in found], -1
    ).logsumexp(-1)
    leaves = found[0]
    candidates = leaves.scores.masked_fill(~leaves.opened[..., None, :, :], -torch.inf)
    whole = torch.cat([candidates, closed[..., None], near_mass[..., None]], -1).logsumexp(-1, keepdim=True)
    whole = whole.masked_fill(whole == -torch.inf, 0)
    order = _merged(leaves.scores).masked_fill(~leaves.opened, -torch.inf).argsort(-1, descending=True)
    sorted_shares = (candidates - whole).exp().gather(-1, order[..., None, :, :].expand_as(candidates))
    after = sorted_shares.flip(-1).cumsum(-1).flip(-1) + (closed[..., None] - whole).exp()
    enough = (after <= config.tolerance).all(-3)
    needed = torch.zeros_like(leaves.opened).scatter(-1, order, ~enough)
    opened = leaves.opened & needed
    kept = NodeLevel(
        leaves.width, leaves.begin, leaves.scores, opened, leaves.closed | (leaves.opened & ~needed)
    )
    return [kept, *found[1:]]
