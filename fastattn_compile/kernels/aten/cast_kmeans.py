"""Balanced k-means: centroids of groups of about equal size."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.cast_assign import single_assignment

_ROUNDS = 8


def balanced_assignment(points: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's rounds with a capacity: no cluster holds more than ``ceil(points / clusters)`` points.

    Points are handed out by ascending distance to a centroid that has room. Starts from k-means++ (Arthur and
    Vassilvitskii 2007) with a generator of its own, so that a result depends on its arguments alone.

    Args:
        points: ``(n, w)`` floating point, ``n >= clusters``; ``n`` may be 0.
        clusters: Number of clusters.
        seed: Seed of the start.

    Returns:
        Centroids ``(clusters, w)`` and the cluster of every point ``(n,)``. No cluster is empty.
    """
    if clusters == 0:
        return points[:0], torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    centroids = _spread_start(points, clusters, seed)
    capacity = -(-points.shape[0] // clusters)
    assigned = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    for _ in range(_ROUNDS):
        distance = torch.cdist(points, centroids)
        closeness = -distance[None]
        assigned = single_assignment(closeness, torch.zeros_like(closeness), capacity, by_pair=True)[0]
        assigned = _without_empty(assigned, distance, clusters)
        member = torch.nn.functional.one_hot(assigned, clusters).to(points.dtype)
        centroids = (member.T @ points) / member.sum(0)[:, None]
    return centroids, assigned


def balanced_centroids(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """The centroids of ``balanced_assignment``."""
    return balanced_assignment(points, clusters, seed)[0]


def _spread_start(points: Tensor, clusters: int, seed: int) -> Tensor:
    generator = torch.Generator(points.device).manual_seed(seed)
    chosen = [int(torch.randint(points.shape[0], (1,), generator=generator, device=points.device))]
    nearest = torch.full((points.shape[0],), torch.inf, dtype=points.dtype, device=points.device)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
        # Where all points coincide with a centroid any of them will do.
        weight = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return points[chosen]


def _without_empty(assigned: Tensor, distance: Tensor, clusters: int) -> Tensor:
    """Moves to each empty cluster the nearest point of a cluster that keeps another."""
    count = torch.bincount(assigned, minlength=clusters)
    for empty in (count == 0).nonzero().flatten().tolist():
        movable = count[assigned] > 1
        point = int(distance[:, empty].masked_fill(~movable, torch.inf).argmin())
        count[assigned[point]] -= 1
        count[empty] += 1
        assigned = assigned.clone()
        assigned[point] = empty
    return assigned
