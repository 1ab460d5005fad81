"""The start of the planes from data: every node splits the keys that reach it into halves (specification
section 13).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.treeformer.config import TreeConfig

_POWER_STEPS = 20
_KMEANS_STEPS = 8


def random_planes(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Normals with independent N(0, 1/d) elements, offsets 0 (specification section 2).

    Args:
        shape: ``(heads, trees, N, d)``.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5, torch.zeros(shape[:-1])


def grow(name: str, old: Tensor, new: Tensor, dim: int) -> Tensor:
    """``new`` with ``old`` as the beginning of dimension ``dim``.

    Raises:
        ValueError: ``old`` is not such a beginning.
    """
    at = dim % new.dim()
    same = old.dim() == new.dim() and all(
        a == b for i, (a, b) in enumerate(zip(old.shape, new.shape)) if i != at
    )
    if not same or old.shape[at] > new.shape[at]:
        raise ValueError(
            f"{name} of shape {tuple(old.shape)} cannot grow into {tuple(new.shape)}: heads, trees and "
            "channels must be the same and the trees not lower"
        )
    return torch.cat([old, new.narrow(at, old.shape[at], new.shape[at] - old.shape[at])], at)


def fit_planes(
    config: TreeConfig, key: Tensor, real: Tensor | None, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Planes of unit length that split the keys of every node in two, level by level.

    Args:
        config: The configuration; ``init`` says how.
        key: ``(b, g, m, d)``, float32, as routed.
        real: ``(b, m)`` boolean or ``None``.
        known: Planes and offsets of lower trees, ``(g, t, N', d)`` and ``(g, t, N')``, which are kept.

    Returns:
        Normals ``(g, t, N, d)`` and offsets ``(g, t, N)``.
    """
    generator = torch.Generator().manual_seed(config.seed)
    heads, channels = key.shape[1], key.shape[3]
    rows = key.transpose(0, 1).flatten(1, 2)
    if real is not None:
        rows = rows[:, real.flatten()]
    planes = torch.empty(heads, config.n_trees, config.leaves - 1, channels)
    offsets = torch.empty(heads, config.n_trees, config.leaves - 1)
    for tree in range(config.n_trees):
        channel = torch.ones(channels)
        if tree:
            channel[torch.randperm(channels, generator=generator)[: channels // 2]] = 0
        node = torch.zeros(rows.shape[:2], dtype=torch.int64)
        for level in range(config.height):
            nodes = 1 << level
            at = slice(nodes - 1, 2 * nodes - 1)
            if known is not None and known[0].shape[2] >= 2 * nodes - 1:
                weight, offset = known[0][:, tree, at].float(), known[1][:, tree, at].float()
            else:
                weight, offset = _split(config.init, rows, channel, node, nodes, generator)
            planes[:, tree, at], offsets[:, tree, at] = weight, offset
            score = (rows * _of(weight, node)).sum(-1) + offset.gather(1, node)
            node = 2 * node + (score > 0)
    return planes, offsets


def _of(table: Tensor, node: Tensor) -> Tensor:
    """Rows of ``(g, nodes, d)`` at ``(g, m)``."""
    return table.gather(1, node[..., None].expand(-1, -1, table.shape[-1]))


def _sum(rows: Tensor, node: Tensor, nodes: int) -> Tensor:
    """Sums of ``(g, m, d)`` by node, ``(g, nodes, d)``."""
    table = rows.new_zeros(rows.shape[0], nodes, rows.shape[2])
    return table.scatter_add_(1, node[..., None].expand_as(rows), rows)


def _unit(rows: Tensor, otherwise: Tensor) -> Tensor:
    size = rows.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-12, rows / size.clamp(min=1e-12), otherwise)


def _split(
    how: str, rows: Tensor, channel: Tensor, node: Tensor, nodes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    heads, _, channels = rows.shape
    start = torch.randn(heads, nodes, channels, generator=generator) * channel
    start = start / start.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if not rows.shape[1]:
        return start, start.new_zeros(heads, nodes)  # a sample of padding alone splits nowhere
    if how == "random":
        return start, _median_offset(rows, start, node, nodes)
    rows = rows * channel
    count = _sum(torch.ones_like(rows[..., :1]), node, nodes).clamp(min=1)
    centred = rows - _of(_sum(rows, node, nodes) / count, node)
    weight = start
    for _ in range(_POWER_STEPS):
        along = (centred * _of(weight, node)).sum(-1, keepdim=True)
        weight = _unit(_sum(along * centred, node, nodes), start)
    offset = _median_offset(rows, weight, node, nodes)
    if how == "pca":
        return weight, offset
    for _ in range(_KMEANS_STEPS):
        side = 2 * node + ((rows * _of(weight, node)).sum(-1) + offset.gather(1, node) > 0)
        counts = _sum(torch.ones_like(rows[..., :1]), side, 2 * nodes)
        means = (_sum(rows, side, 2 * nodes) / counts.clamp(min=1)).unflatten(1, (nodes, 2))
        apart, middle = means[:, :, 1] - means[:, :, 0], means.mean(2)
        both = (counts.unflatten(1, (nodes, 2)) > 0).all(2)
        moved = _unit(apart, start)
        weight = torch.where(both, moved, weight)
        offset = torch.where(both.squeeze(-1), -(moved * middle).sum(-1), offset)
    return weight, offset


def _median_offset(rows: Tensor, weight: Tensor, node: Tensor, nodes: int) -> Tensor:
    """Minus the middle between the two central keys of every node: no key of the sample lies on a plane."""
    along = (rows * _of(weight, node)).sum(-1)
    order = along.argsort(1)
    order = order.gather(1, node.gather(1, order).argsort(dim=1, stable=True))
    ordered = along.gather(1, order)
    count = torch.zeros(rows.shape[0], nodes, dtype=torch.int64).scatter_add_(1, node, torch.ones_like(node))
    begin = count.cumsum(1) - count
    last = max(0, rows.shape[1] - 1)
    lower = (begin + (count - 1).clamp(min=0) // 2).clamp(max=last)
    upper = (lower + 1).clamp(max=last)
    middle = (ordered.gather(1, lower) + ordered.gather(1, upper)) / 2
    # A node with one key sends it left; a node with none has its plane through the origin.
    alone = ordered.gather(1, lower) + 1
    return -torch.where(count > 1, middle, torch.where(count == 1, alone, 0.0))
