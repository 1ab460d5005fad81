"""Tree attention without scores: every query reads the means of the values below the nodes of its path; on
ATen.

Bidirectional, the sums of all nodes are made once. Causal, tokens are cut into chunks: a query reads the sums
of the chunks before its own and adds what its own chunk shows it, so that nothing is subtracted and no digits
are lost. Forward, one table of all nodes runs along the sequence: O(n height) work for any height. Backward,
chunks are as long as there are leaves and passed a few at a time: O(n 2^height), which the gradient of the
trees costs in any case.

Sizes: ``u`` units (a key head of a sequence), ``r`` query heads that share it, ``c`` chunks, ``t`` tokens of
a chunk, ``e`` channels, ``L = 2^height`` leaves. One tree at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Levels = list[Tensor]
# Tokens of a chunk at least; a chunk is never shorter than the leaves, so that the sums of all chunks stay
# O(n).
_CHUNK = 64
# Tokens that the running table takes at a time.
_STRETCH = 128
# Elements of the largest temporary.
_WORKING_SET = 1 << 22


@dataclass(frozen=True)
class Weighting:
    """How the levels of a path are weighted.

    Args:
        learned: ``(u, r, height + 1)`` learned number of each level.
        softmax: Weights are the softmax of the learned numbers plus the logarithm of the nodes' counts.
        root: The root takes part.
        share: Factor on the softmax.
    """

    learned: Tensor
    softmax: bool = False
    root: bool = True
    share: float = 1.0

    def weights(self, counts: Tensor) -> Tensor:
        """Weights of the levels, ``(u, r, c, t, height + 1)``, given the counts of the nodes."""
        learned = self.learned[:, :, None, None].to(counts.dtype)
        levels = torch.arange(counts.shape[-1], device=counts.device)
        used = (levels >= (0 if self.root else 1)).expand_as(counts)
        if not self.softmax:
            return learned * used
        used = used & (counts > 0)
        logits = (learned + counts.clamp(min=1).log()).masked_fill(~used, -torch.inf)
        return logits.softmax(-1).masked_fill(~used.any(-1, keepdim=True), 0) * self.share

    def backward(self, weights: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the learned numbers, given those of the weights; counts are constants."""
        if self.softmax:
            grad = weights * (grad - (weights * grad).sum(-1, keepdim=True) / self.share)
        return grad.sum((2, 3))


@dataclass(frozen=True)
class Cut:
    """Tokens of one tree in chunks.

    Args:
        height: Of the tree.
        causal: Queries see keys up to their own position; queries and keys then have the same chunks.
        key_leaf: ``(u, c, t)``.
        query_leaf: ``(u, r, c, t)``.
        real: ``(u, c, t)`` 1 where a key takes part, else 0, floating point.
    """

    height: int
    causal: bool
    key_leaf: Tensor
    query_leaf: Tensor
    real: Tensor


def chunk_length(length: int, height: int) -> int:
    """Tokens of a chunk."""
    return min(max(1, length), max(_CHUNK, 1 << height))


def chunked(x: Tensor, dim: int, size: int) -> Tensor:
    """Splits a dimension into chunks of ``size``, padded at the end with 0."""
    missing = -x.shape[dim] % size
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x.unflatten(dim, (-1, size))


def _spread(leaf: Tensor, rows: Tensor, leaves: int) -> Tensor:
    """Sums rows by leaf: ``(u, c, t)`` and ``(u, c, t, e)`` to ``(u, c, leaves, e)``."""
    units, chunks, _ = leaf.shape
    base = torch.arange(units * chunks, device=leaf.device).view(units, chunks, 1) * leaves
    table = rows.new_zeros(units * chunks * leaves, rows.shape[-1])
    table.index_add_(0, (base + leaf).flatten(), rows.flatten(0, 2))
    return table.view(units, chunks, leaves, -1)


def _parents(leaves: Tensor, dim: int) -> Levels:
    """Sums of all levels, root first, from those of the leaves."""
    levels = [leaves]
    while levels[0].shape[dim] > 1:
        levels.insert(0, levels[0].unflatten(dim, (-1, 2)).sum(dim + 1 if dim >= 0 else dim))
    return levels


def _before(sums: Tensor, causal: bool) -> Tensor:
    """Sums of the chunks before each chunk; of all chunks when not causal."""
    if not causal:
        return sums.sum(1, keepdim=True)
    # Shifted, not less its own chunk: a difference would keep the rounding of what came later.
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1).cumsum(1)


def _after(sums: Tensor, causal: bool) -> Tensor:
    """Sums of the chunks after each chunk; of all chunks when not causal."""
    return _before(sums.flip(1), causal).flip(1)


def _pick(table: Tensor, node: Tensor) -> Tensor:
    """Reads ``(u, c or 1, nodes, e)`` at ``node`` ``(u, ..., c, t)``: ``(u, ..., c, t, e)``."""
    units, chunks, nodes, channels = table.shape
    step = node.shape[-2] if chunks > 1 else 1
    unit = torch.arange(units, device=node.device).view(units, *[1] * (node.dim() - 1)) * chunks
    chunk = torch.arange(step, device=node.device)[:, None]
    at = (unit + chunk) * nodes + node
    return table.reshape(-1, channels).index_select(0, at.flatten()).view(*node.shape, channels)


def key_sums(cut: Cut, value: Tensor) -> tuple[Levels, Levels]:
    """Sums and counts of the keys that every chunk finds in each node.

    Args:
        cut: The tokens.
        value: ``(u, c, t, e)``, 0 where ``cut.real`` is.

    Returns:
        For each level sums ``(u, c or 1, 2^l, e)`` and counts ``(u, c or 1, 2^l, 1)``.
    """
    leaves = 1 << cut.height
    sums = _before(_spread(cut.key_leaf, value, leaves), cut.causal)
    counts = _before(_spread(cut.key_leaf, cut.real[..., None], leaves), cut.causal)
    return _parents(sums, 2), _parents(counts, 2)


@dataclass(frozen=True)
class _Own:
    """What queries see inside their own chunk. ``depth`` is the number of levels a pair shares, 0 for a
    hidden key.
    """

    depth: Tensor

    @staticmethod
    def of(cut: Cut) -> _Own:
        apart = cut.query_leaf[..., :, None] ^ cut.key_leaf[:, None, :, None, :]
        # The exponent of x is the length of x in bits: how many levels above the leaves the paths part.
        depth = cut.height + 1 - torch.frexp(apart.float()).exponent
        length = depth.shape[-1]
        place = torch.arange(length, device=depth.device)
        seen = (place[:, None] >= place) & (cut.real[:, None, :, None, :] > 0)
        return _Own(torch.where(seen, depth, 0).long())

    def by_level(self, pairs: Tensor, height: int) -> Tensor:
        """Sums ``(u, r, c, t, t)`` over the keys that share the query's node, for each level ``(u, r, c, t,
        height + 1)``.
        """
        sums = pairs.new_zeros(*pairs.shape[:-1], height + 2).scatter_add_(-1, self.depth, pairs)
        return sums.flip(-1).cumsum(-1).flip(-1)[..., 1:]

    def of_levels(self, levels: Tensor) -> Tensor:
        """For each pair the sum of ``(u, r, c, t, height + 1)`` over the levels it shares: ``(u, r, c, t,
        t)``.
        """
        sums = torch.cat([torch.zeros_like(levels[..., :1]), levels.cumsum(-1)], -1)
        return sums.gather(-1, self.depth)


def _nodes(cut: Cut, leaf: Tensor, level: int) -> Tensor:
    return leaf >> (cut.height - level)


def _path_counts(cut: Cut, counts: Levels, own: _Own | None) -> Tensor:
    read = [_pick(table, _nodes(cut, cut.query_leaf, level)) for level, table in enumerate(counts)]
    total = torch.cat(read, -1)
    if own is not None:
        total = total + own.by_level((own.depth > 0).to(total.dtype), cut.height)
    return total


def forward(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Weighted means along the paths.

    Args:
        cut: The tokens.
        value: ``(u, c, t, e)`` in the work type, 0 where ``cut.real`` is.
        weighting: Weights of the levels.

    Returns:
        Output ``(u, r, c, t, e)``; number of keys that each query sees, ``(u, r, c, t)``.
    """
    if cut.causal:
        return _running(cut, value, weighting)
    sums, counts = key_sums(cut, value)
    seen = _path_counts(cut, counts, None)
    factor = weighting.weights(seen) / seen.clamp(min=1) * (seen > 0)
    out = torch.zeros(*cut.query_leaf.shape, value.shape[-1], dtype=value.dtype, device=value.device)
    for level, table in enumerate(sums):
        out += factor[..., level, None] * _pick(table, _nodes(cut, cut.query_leaf, level))
    return out, seen[..., 0]


def _running(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Causal ``forward``: one table of sums and counts of all nodes, which every stretch of queries reads and
    its keys are then added to.
    """
    key_leaf, query_leaf = cut.key_leaf.flatten(1), cut.query_leaf.flatten(2)
    real, rows = cut.real.flatten(1), value.flatten(1, 2)
    units, group, length = query_leaf.shape
    channels = rows.shape[-1]
    nodes = (2 << cut.height) - 1
    table = rows.new_zeros(units * nodes, channels + 1, dtype=torch.float64)  # no sum of many keeps its noise
    base = torch.arange(units, device=rows.device)[:, None, None] * nodes
    levels = torch.arange(cut.height + 1, device=rows.device)

    def path(leaf: Tensor) -> Tensor:
        """Places of the nodes of a path in the table, root first: ``(..., height + 1)``."""
        return (leaf[..., None] >> (cut.height - levels)) + (1 << levels) - 1

    out, seen = rows.new_empty(units, group, length, channels), rows.new_empty(units, group, length)
    for start in range(0, length, _STRETCH):
        span = slice(start, start + _STRETCH)
        part = Cut(
            cut.height, True, key_leaf[:, None, span], query_leaf[:, :, None, span], real[:, None, span]
        )
        own = _Own.of(part)
        read = table[path(part.query_leaf[:, :, 0]) + base[..., None]].to(rows.dtype)[:, :, None]
        counts = read[..., -1] + own.by_level((own.depth > 0).to(rows.dtype), cut.height)
        factor = weighting.weights(counts) / counts.clamp(min=1) * (counts > 0)
        found = torch.matmul(factor[..., None, :], read[..., :-1])[..., 0, :]
        found += torch.matmul(own.of_levels(factor), rows[:, None, None, span])
        out[:, :, span], seen[:, :, span] = found[:, :, 0], counts[:, :, 0, :, 0]
        keys = torch.cat([rows[:, span], real[:, span, None]], -1).double()
        spread = keys[:, :, None].expand(-1, -1, cut.height + 1, -1).reshape(-1, channels + 1)
        table.index_add_(0, (path(key_leaf[:, span]) + base).flatten(), spread)
    return out.view(*cut.query_leaf.shape, channels), seen.view(cut.query_leaf.shape)


@dataclass(frozen=True)
class TreeGradients:
    """Gradients of ``forward``.

    Args:
        value: ``(u, c, t, e)``.
        learned: ``(u, r, height + 1)``, of ``Weighting.learned``.
    """

    value: Tensor
    learned: Tensor


Members = Callable[[slice, Levels], None]


def backward(
    cut: Cut, value: Tensor, weighting: Weighting, grad_out: Tensor, of_queries: Members, of_keys: Members
) -> TreeGradients:
    """Gradients of ``forward``; the trees' come in pieces.

    Args:
        cut: As in ``forward``.
        value: As in ``forward``.
        weighting: As in ``forward``.
        grad_out: ``(u, r, c, t, e)``, 0 where there is no query.
        of_queries: Receives some chunks and, for each level, the gradient of the queries' membership in its
            nodes, ``(u, r, chunks, t, 2^l)``.
        of_keys: Receives the same of the keys, ``(u, chunks, t, 2^l)``.
    """
    sums, counts = key_sums(cut, value)
    own = _Own.of(cut) if cut.causal else None
    seen = _path_counts(cut, counts, own)
    weights = weighting.weights(seen)
    factor = weights / seen.clamp(min=1) * (seen > 0)
    pairs = torch.matmul(grad_out, value[:, None].mT) if own is not None else None
    grad_value = torch.zeros_like(value)
    dots, from_later = [], []
    for level in range(cut.height + 1):
        node = _nodes(cut, cut.query_leaf, level)
        dots.append((grad_out * _pick(sums[level], node)).sum(-1))
        table = _after(_spread_queries(node, factor[..., level, None] * grad_out, 1 << level), cut.causal)
        grad_value += _pick(table, _nodes(cut, cut.key_leaf, level))
        from_later.append(table)
    dot = torch.stack(dots, -1)
    if own is not None and pairs is not None:
        dot = dot + own.by_level(pairs, cut.height)
        grad_value += torch.matmul(own.of_levels(factor).mT, grad_out).sum(1)
    mean_dot = dot / seen.clamp(min=1)
    if cut.height:
        query_members(cut, sums[-1], counts[-1], weights, grad_out, pairs, of_queries)
        later_dots = []
        for level in range(cut.height + 1):
            rows = (factor[..., level] * mean_dot[..., level])[..., None]
            table = _spread_queries(_nodes(cut, cut.query_leaf, level), rows, 1 << level)
            later_dots.append(_after(table, cut.causal))
        key_members(cut, value, from_later, later_dots, factor, mean_dot, pairs, of_keys)
    learned = weighting.backward(weights, mean_dot)
    if not weighting.root:
        learned[..., 0] = 0
    return TreeGradients(grad_value * cut.real[..., None], learned)


def _spread_queries(node: Tensor, rows: Tensor, nodes: int) -> Tensor:
    """``_spread`` of all query heads of a unit together."""
    units, group, chunks, length = node.shape
    node = node.transpose(1, 2).reshape(units, chunks, group * length)
    return _spread(node, rows.transpose(1, 2).reshape(units, chunks, group * length, -1), nodes)


def _steps(cut: Cut, tokens: Tensor) -> list[slice]:
    """Chunks to take at a time so that a tensor of all leaves stays small."""
    chunks, length = tokens.shape[-2:]
    rows = tokens.numel() // max(1, chunks)
    together = max(1, _WORKING_SET // max(1, rows * max(length, 2 << cut.height)))
    return [slice(start, min(start + together, chunks)) for start in range(0, chunks, together)]


def _of_chunks(table: Tensor, chunks: slice) -> Tensor:
    return table if table.shape[1] == 1 else table[:, chunks]


def _one_hot(node: Tensor, nodes: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*node.shape, nodes, dtype=dtype, device=node.device).scatter_(-1, node[..., None], 1)


def query_members(
    cut: Cut,
    sums: Tensor,
    counts: Tensor,
    weights: Tensor,
    grad_out: Tensor,
    pairs: Tensor | None,
    send: Members,
) -> None:
    """``dS_q[i, j] = weight_l(i) <G_i, mean of node j as query i sees it>``."""
    leaves = 1 << cut.height
    for chunks in _steps(cut, cut.query_leaf):
        g = grad_out[:, :, chunks]
        dot = torch.matmul(g, _of_chunks(sums, chunks)[:, None].mT)
        count = _of_chunks(counts, chunks)[:, None].mT.expand_as(dot)
        if pairs is not None:
            keys = _one_hot(cut.key_leaf[:, chunks], leaves, g.dtype) * cut.real[:, chunks, :, None]
            dot = dot + torch.matmul(pairs[:, :, chunks].tril(), keys[:, None])
            count = count + keys.cumsum(-2)[:, None]
        per_level = zip(_parents(dot, -1), _parents(count, -1))
        share = weights[:, :, chunks]
        found = [share[..., level, None] * d / c.clamp(min=1) for level, (d, c) in enumerate(per_level)]
        send(chunks, found)


def key_members(
    cut: Cut,
    value: Tensor,
    from_later: Levels,
    later_dots: Levels,
    factor: Tensor,
    mean_dot: Tensor,
    pairs: Tensor | None,
    send: Members,
) -> None:
    """``dS_k[t, j] = sum over queries of j that see t of weight / count * (<G, v_t> - <G, mean of j>)``."""
    for chunks in _steps(cut, cut.key_leaf):
        v, real = value[:, chunks], cut.real[:, chunks, :, None]
        found = []
        for level in range(cut.height + 1):
            grad = torch.matmul(v, _of_chunks(from_later[level], chunks).mT)
            grad = grad - _of_chunks(later_dots[level], chunks).mT
            if pairs is not None:
                node = _nodes(cut, cut.query_leaf[:, :, chunks], level)
                member = _one_hot(node, 1 << level, v.dtype) * factor[:, :, chunks, :, level, None]
                grad = grad + torch.matmul(pairs[:, :, chunks].tril().mT, member).sum(1)
                mean = (member * mean_dot[:, :, chunks, :, level, None]).sum(1)
                grad = grad - mean.flip(-2).cumsum(-2).flip(-2)
            found.append(grad * real)
        send(chunks, found)
