"""Assigning tokens to clusters by affinity: expert choice, single assignment with capacity, token choice.

Sizes: ``b`` batch, ``n`` tokens, ``c`` clusters, ``s`` slots of a cluster. Ties of the affinity are broken by
a second tensor of its shape (affinities are softmaxed and reach exactly 1), then by the lower token, then by
the lower cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _descending(first: Tensor, second: Tensor) -> Tensor:
    """Indices that sort dimension 1 by ``first``, then ``second``, both descending, then by lower index."""
    order = second.sort(dim=1, descending=True, stable=True).indices
    refined = first.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, refined)


def best_cluster(affinity: Tensor, tie: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's best allowed cluster.

    Args:
        affinity: ``(b, n, c)``.
        tie: ``(b, n, c)``.
        allowed: Boolean, broadcastable to ``(b, n, c)``.

    Returns:
        Cluster, affinity and tie value of the best, each ``(b, n)``; -inf values where nothing is allowed.
    """
    affinity = affinity.masked_fill(~allowed, -torch.inf)
    value = affinity.amax(-1)
    leading = (affinity == value[..., None]) & allowed
    tie = tie.masked_fill(~leading, -torch.inf)
    tie_value = tie.amax(-1)
    leading = leading & (tie == tie_value[..., None])
    return leading.int().argmax(-1), value, tie_value


def top_k(affinity: Tensor, tie: Tensor, size: int, real: Tensor | None = None) -> Tensor:
    """Expert choice: every cluster takes the tokens of largest affinity; some may be in several or in none.

    Args:
        affinity: ``(b, n, c)``.
        tie: ``(b, n, c)``.
        size: Tokens of a cluster; slots beyond the real tokens stay empty.
        real: ``(b, n)`` boolean; others are never taken.

    Returns:
        ``(b, c, size)`` int64 token numbers, -1 in an empty slot.
    """
    batch, length, clusters = affinity.shape
    if real is not None:
        affinity = affinity.masked_fill(~real[..., None], -torch.inf)
    taken = _descending(affinity, tie)[:, :size].mT
    if real is not None:
        taken = taken.masked_fill(~real[:, None].expand(-1, clusters, -1).gather(2, taken), -1)
    if size > length:
        taken = torch.cat([taken, taken.new_full((batch, clusters, size - length), -1)], -1)
    return taken


def single_assignment(
    affinity: Tensor, tie: Tensor, size: int, real: Tensor | None = None, by_pair: bool = False
) -> Tensor:
    """Greedy assignment of every token to exactly one cluster that holds at most ``size``.

    The greedy order is followed exactly, in rounds: as long as no cluster is full, every token gets its first
    choice, so a round hands out tokens in order up to the first that finds its choice full. Each round fills
    a cluster, so there are at most ``c`` of them.

    Args:
        affinity: ``(b, n, c)``.
        tie: ``(b, n, c)``.
        size: Capacity of a cluster.
        real: ``(b, n)`` boolean; others get no cluster.
        by_pair: Visit (token, cluster) pairs by descending affinity, instead of tokens by their largest
            affinity.

    Returns:
        ``(b, n)`` int64 cluster numbers, -1 where the token is not real.

    Raises:
        ValueError: The clusters together hold fewer than ``n`` tokens.
    """
    batch, length, clusters = affinity.shape
    if clusters * size < length:
        raise ValueError(
            f"{clusters} clusters of {size} hold {clusters * size} tokens, fewer than {length} to assign; "
            f"the clusters need a size of at least {-(-length // clusters)}"
        )
    everything = affinity.new_ones((), dtype=torch.bool)
    waiting = affinity.new_ones((batch, length), dtype=torch.bool) if real is None else real.clone()
    free = torch.full((batch, clusters), size, device=affinity.device)
    assigned = torch.full((batch, length), -1, device=affinity.device)
    order = _descending(*best_cluster(affinity, tie, everything)[1:])
    while bool(waiting.any()):
        choice, value, tie_value = best_cluster(affinity, tie, (free > 0)[:, None])
        if by_pair:
            order = _descending(value.masked_fill(~waiting, -torch.inf), tie_value)
        wanted, active = choice.gather(1, order), waiting.gather(1, order)
        asked = torch.nn.functional.one_hot(wanted, clusters) * active[..., None]
        place = asked.cumsum(1).gather(2, wanted[..., None]).squeeze(-1)
        refused = active & (place > free.gather(1, wanted))
        given = active & (refused.cumsum(1) == 0)
        free -= (asked * given[..., None]).sum(1)
        placed = torch.zeros_like(waiting).scatter(1, order, given)
        assigned = torch.where(placed, choice, assigned)
        waiting &= ~placed
    return assigned


def slots(assigned: Tensor, clusters: int, size: int) -> Tensor:
    """The table of an assignment of each token to at most one cluster.

    Args:
        assigned: ``(b, n)`` cluster numbers, -1 for none.
        clusters: Number of clusters.
        size: Slots of a cluster; no cluster may have more members.

    Returns:
        ``(b, clusters, size)`` int64 token numbers in ascending order, -1 in an empty slot.
    """
    batch, length = assigned.shape
    place = ranks(assigned, clusters)
    # Tokens without a cluster are written to one slot past the end, which is cut off.
    flat = torch.where(assigned >= 0, assigned * size + place, clusters * size)
    table = torch.full((batch, clusters * size + 1), -1, device=assigned.device)
    tokens = torch.arange(length, device=assigned.device).expand(batch, -1)
    return table.scatter(1, flat, tokens)[:, :-1].unflatten(1, (clusters, size))


def ranks(assigned: Tensor, clusters: int) -> Tensor:
    """How many earlier tokens are in a token's cluster; 0 for tokens without one.

    Args:
        assigned: ``(b, n)`` cluster numbers, -1 for none.
        clusters: Number of clusters.
    """
    own = assigned.clamp(min=0)
    member = torch.nn.functional.one_hot(own, clusters) * (assigned >= 0)[..., None]
    return ((member.cumsum(1) - member).gather(2, own[..., None])).squeeze(-1)
