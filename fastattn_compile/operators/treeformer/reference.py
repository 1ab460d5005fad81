"""Tree attention as the specification defines it: dense, readable, differentiable, planes included; O(n^2)
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.exact.reference import compute_dtype, masked_softmax
from fastattn_compile.operators.treeformer.config import TcConfig, TfConfig, TreeConfig
from fastattn_compile.operators.treeformer.trees import Trees, real_keys, routing_dtype, turns


class Members:
    """Straight-through membership of vectors in the nodes of one tree.

    Args:
        config: The configuration.
        x: ``(b, h, n, d)``.
        weight: ``(h, N, d)``.
        offset: ``(h, N)``.
    """

    def __init__(self, config: TreeConfig, x: Tensor, weight: Tensor, offset: Tensor) -> None:
        self.config, height = config, config.height
        self.scores = torch.einsum("bhnd,hNd->bhnN", x, weight) + offset[:, None]
        node = torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
        self.nodes, path = [node], []
        for level in range(height):
            here = self.scores.gather(-1, ((1 << level) - 1 + node)[..., None]).squeeze(-1)
            node = 2 * node + (here > 0)
            self.nodes.append(node)
            path.append(here)
        # Scores of the decisions taken, ``(b, h, n, height)``.
        self.path = torch.stack(path, -1) if path else self.scores[..., :0]

    @property
    def leaf(self) -> Tensor:
        """Leaf numbers, ``(b, h, n)``."""
        return self.nodes[-1]

    def mass(self) -> list[Tensor]:
        """Soft mass of all nodes, for each level ``(b, h, n, 2^l)``: products of sigmoids (specification
        6a).
        """
        chance = torch.sigmoid(self.config.beta * self.scores)
        mass = [
            torch.ones_like(self.path[..., :1])
            if self.config.height
            else self.scores.new_ones(*self.leaf.shape, 1)
        ]
        for level in range(self.config.height):
            here = chance[..., (1 << level) - 1 : (2 << level) - 1]
            mass.append(torch.stack([mass[-1] * (1 - here), mass[-1] * here], -1).flatten(-2))
        return mass

    def _surrogate(self) -> list[Tensor]:
        """What carries the gradient of the memberships in all nodes, for each level ``(b, h, n, 2^l)``."""
        if self.config.estimator == "soft":
            return self.mass()
        beta = self.config.beta
        clip = self.config.surrogate == "clip"
        agree = self.scores.clamp(-1, 1) if clip else torch.sigmoid(beta * self.scores)
        sums = [self.scores.new_zeros(*self.leaf.shape, 1)]
        for level in range(self.config.height):
            here = agree[..., (1 << level) - 1 : (2 << level) - 1]
            sums.append(torch.stack([sums[-1] - here, sums[-1] + here], -1).flatten(-2))
        return sums

    def one_hot(self) -> list[Tensor]:
        """Membership in all nodes: hard values, straight-through gradients; for each level ``(b, h, n,
        2^l)``.
        """
        soft = self._surrogate()
        hard = [torch.nn.functional.one_hot(n, 1 << level) for level, n in enumerate(self.nodes)]
        return [h + s - s.detach() for h, s in zip(hard, soft)]

    def own(self) -> Tensor:
        """Membership, less 1, in the nodes of the own path: zeros with gradients, ``(b, h, n, height +
        1)``.
        """
        soft = [s.gather(-1, n[..., None]) for s, n in zip(self._surrogate(), self.nodes)]
        stacked = torch.cat(soft, -1)
        return stacked - stacked.detach()

    def log_mass(self) -> Tensor:
        """Logarithm of the soft mass of the nodes of the own path, ``(b, h, n, height + 1)``."""
        chances = torch.nn.functional.logsigmoid(self.config.beta * self.path.abs())
        # The sign of a score is a constant: abs() has the gradient of the decision that was taken.
        return (
            torch.cat([torch.zeros_like(chances[..., :1]), chances.cumsum(-1)], -1)
            if self.config.height
            else (self.scores.new_zeros(*self.leaf.shape, 1))
        )


def members(config: TreeConfig, inputs: AttentionInputs, trees: Trees) -> list[tuple[Members, Members]]:
    """Queries and keys in every tree; keys once for each query head that reads them."""
    dtype = routing_dtype(inputs)
    of_query, of_key = turns(config, inputs, dtype)
    query, key = of_query.undo(inputs.query.to(dtype)), of_key.undo(real_keys(inputs).to(dtype))
    key = key.repeat_interleave(inputs.group, 1)
    planes, offsets = (x.repeat_interleave(inputs.group, 0) for x in (trees.key_planes, trees.key_offsets))
    return [
        (
            Members(config, query, trees.query_planes[:, t], trees.query_offsets[:, t]),
            Members(config, key, planes[:, t], offsets[:, t]),
        )
        for t in range(config.n_trees)
    ]


def _per_head(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(inputs)
    key, value = (x.to(dtype).repeat_interleave(inputs.group, 1) for x in (inputs.key, inputs.value))
    if inputs.key_padding is not None:
        value = value.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    return inputs.query.to(dtype), key, value


def near_keys(config: TfConfig, inputs: AttentionInputs, rows: Tensor, empty: Tensor) -> Tensor:
    """Keys that queries meet whatever their leaf: window, sinks, and the window that stands for an empty
    leaf.

    Args:
        config: The configuration.
        inputs: The tensors.
        rows: ``(r,)`` query positions.
        empty: ``(b, h, r)`` boolean, queries with an empty leaf.

    Returns:
        ``(b, h, r, m)`` boolean.
    """
    length = inputs.key.shape[2]
    offset = length - inputs.query.shape[2] if inputs.mask.end_aligned else 0
    keys = torch.arange(length, device=rows.device)
    distance = (keys - (rows + offset)[:, None]).abs()
    near = (distance < config.window).expand(*empty.shape, length)
    if config.fallback == "self+window":
        near = near | (empty[..., None] & (distance < config.fallback_window))
    return inputs.visible(rows) & (near | _sinks(config.sinks, inputs)[:, None, None])


def _sinks(count: int, inputs: AttentionInputs) -> Tensor:
    """The first real tokens of every sequence or document, ``(b, m)``."""
    batch, length = inputs.key.shape[0], inputs.key.shape[2]
    real = inputs.key_padding
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=inputs.key.device)
    same = real[:, None] & real[:, :, None]
    if inputs.segments is not None:
        same = same & (inputs.segments[:, None] == inputs.segments[:, :, None])
    return real & (same.tril().sum(-1) <= count)


def kept_keys(config: TfConfig, inputs: AttentionInputs, key: Members) -> Tensor:
    """Keys that a full leaf does not drop by margin, ``(b, h, m)``."""
    real = torch.ones_like(key.leaf, dtype=torch.bool)
    if inputs.key_padding is not None:
        real = real & inputs.key_padding[:, None]
    capacity = config.keys_of_leaf(real.shape[-1])
    if not capacity or config.overflow != "margin" or not config.height:
        return real
    margin = key.path.detach().abs().amin(-1)
    place = torch.arange(real.shape[-1], device=real.device)
    before = (margin[..., None] > margin[..., None, :]) | (
        (margin[..., None] == margin[..., None, :]) & (place[:, None] < place)
    )
    same = (key.leaf[..., None] == key.leaf[..., None, :]) & real[..., None]
    if inputs.segments is not None:
        same = same & (inputs.segments[:, None, :, None] == inputs.segments[:, None, None])
    return real & ((before & same).sum(-2) < capacity)


def leaf_keys(
    config: TfConfig, inputs: AttentionInputs, rows: Tensor, query: Members, key: Members
) -> tuple[Tensor, Tensor]:
    """Keys that queries meet through one tree, and the level of the node in which they do.

    Args:
        config: The configuration.
        inputs: The tensors.
        rows: ``(r,)`` query positions.
        query: Queries in the tree.
        key: Keys in the tree.

    Returns:
        ``(b, h, r, m)`` boolean, and ``(b, h, r)``.
    """
    seen = inputs.visible(rows) & kept_keys(config, inputs, key)[:, :, None]
    deepest = config.height - (config.query_gradient == "sibling")
    lowest = 0 if config.fallback == "ancestor" else deepest
    level = torch.full(query.leaf[..., rows].shape, lowest, device=rows.device)
    met = torch.zeros_like(seen)
    for depth in range(lowest, deepest + 1):
        same = seen & (query.nodes[depth][..., rows, None] == key.nodes[depth][:, :, None])
        found = same.any(-1)
        level, met = level.masked_fill(found, depth), torch.where(found[..., None], same, met)
    capacity = config.keys_of_leaf(seen.shape[-1])
    if capacity:
        met = met & (met.flip(-1).cumsum(-1).flip(-1) <= capacity)
    return met, level


def leaf_attention(config: TfConfig, inputs: AttentionInputs, trees: Trees) -> AttentionOutput:
    """TF-Attention (specification sections 4 and 6): softmax over the keys of the query's leaf, of every
    tree.

    The membership of queries and keys in the node where they meet multiplies the weight of the pair; its
    value is 1.
    """
    query, key, value = _per_head(inputs)
    rows = torch.arange(query.shape[2], device=query.device)
    scores = inputs.scale * (query @ key.mT) + inputs.added(rows).to(query.dtype)
    both = members(config, inputs, trees)
    met = [leaf_keys(config, inputs, rows, *pair) for pair in both]
    if config.combine == "mean" and config.n_trees > 1:
        each = [_one_softmax(config, inputs, scores, value, [b], [m]) for b, m in zip(both, met)]
        out = torch.stack([o for o, _ in each]).mean(0)
        blind = torch.stack([lse == -torch.inf for _, lse in each]).all(0)
        lse = torch.full_like(each[0][1].detach(), torch.nan).masked_fill(blind, -torch.inf)
    else:
        out, lse = _one_softmax(config, inputs, scores, value, both, met)
    wide = torch.float64 if inputs.value.dtype == torch.float64 else torch.float32
    return AttentionOutput(out.to(inputs.value.dtype), lse.to(wide))


def _one_softmax(
    config: TfConfig, inputs: AttentionInputs, scores: Tensor, value: Tensor,
    both: list[tuple[Members, Members]], met: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = torch.arange(scores.shape[2], device=scores.device)
    empty = torch.stack([~found.any(-1) for found, _ in met]).any(0)
    seen = near_keys(config, inputs, rows, empty)
    log_gate: Tensor | float = 0.0
    for (query, key), (found, level) in zip(both, met):
        new = found & ~seen
        seen = seen | found
        at = level[..., None]
        sibling = (config.query_gradient == "sibling") & (level == config.height - 1)
        term = query.own().gather(-1, at)
        of_key = key.own()[:, :, None].expand(*level.shape, -1, -1)
        key_level = torch.where(sibling, config.height, level)[..., None, None].expand(*found.shape, 1)
        term = term + of_key.gather(-1, key_level).squeeze(-1)
        if config.query_gradient == "sibling":
            sure = config.beta * query.path[..., -1:].abs()
            together = query.leaf[..., None] == key.leaf[:, :, None]
            gate = torch.where(
                together, torch.nn.functional.logsigmoid(sure), torch.nn.functional.logsigmoid(-sure)
            )
            term = term + torch.where(sibling[..., None], gate, 0.0)
        if config.query_gradient == "gate":
            mass = query.log_mass().gather(-1, at)
            log_gate = log_gate + mass - mass.detach()
        scores = scores + torch.where(new, term, 0.0).to(scores.dtype)
    weights, lse = masked_softmax(scores, seen)
    out = weights @ value
    if not isinstance(log_gate, float):
        out = out * log_gate.exp().to(out.dtype)
    return out, lse


def coarse_attention(config: TcConfig, inputs: AttentionInputs, trees: Trees) -> AttentionOutput:
    """TC-Attention (specification sections 5 and 7): weighted means of values along the query's path, of
    every tree.

    There are no scores; the log-sum-exp is that of scores of 0, the logarithm of the number of visible keys.
    """
    _, _, value = _per_head(inputs)
    seen = inputs.visible(torch.arange(inputs.query.shape[2], device=value.device)).to(value.dtype)
    out = value.new_zeros(*inputs.query.shape[:3], value.shape[-1])
    if trees.level_weights is None:
        raise ValueError("tc_attention has weights of the levels among its parameters; none were given")
    for tree, (query, key) in enumerate(members(config, inputs, trees)):
        learned = trees.level_weights[:, tree].to(value.dtype)
        means, counts = [], []
        for of_query, of_key in zip(query.one_hot(), key.one_hot()):
            pairs = (of_query.to(value.dtype) @ of_key.to(value.dtype).mT) * seen
            # Sums of all nodes as each query sees them, so that memberships of 0 carry gradients too.
            count = torch.einsum("bhij,bhjk->bhik", seen.expand_as(pairs), of_key.to(value.dtype))
            total = torch.einsum(
                "bhij,bhjk,bhje->bhike", seen.expand_as(pairs), of_key.to(value.dtype), value
            )
            mean = torch.where(count.detach()[..., None] > 0, total / count.clamp(min=0.5)[..., None], 0.0)
            means.append(torch.einsum("bhik,bhike->bhie", of_query.to(value.dtype), mean))
            counts.append(pairs.detach().sum(-1))
        count = torch.stack(counts, -1)
        used = torch.ones_like(count, dtype=torch.bool)
        used[..., 0] = config.include_root
        if config.level_weights == "softmax":
            logits = (learned[:, None] + count.clamp(min=1).log()).masked_fill(
                ~used | (count == 0), -torch.inf
            )
            none = torch.isinf(logits).all(-1, keepdim=True)
            weights = logits.masked_fill(none, 0).softmax(-1).masked_fill(none, 0) / config.n_trees
        else:
            weights = learned[:, None] * used
        out = out + torch.einsum("bhil,lbhie->bhie", weights, torch.stack(means))
    wide = torch.float64 if inputs.value.dtype == torch.float64 else torch.float32
    lse = seen.to(wide).sum(-1).log().expand(out.shape[:-1])
    return AttentionOutput(out.to(inputs.value.dtype), lse)
