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
    taken = _leading(affinity, tie, min(size, length))
    if real is not None:
        taken = taken.masked_fill(~real[:, None].expand(-1, clusters, -1).gather(2, taken), -1)
    if size > length:
        taken = torch.cat([taken, taken.new_full((batch, clusters, size - length), -1)], -1)
    return taken


def _leading(first: Tensor, second: Tensor, count: int) -> Tensor:
    """The first ``count`` of ``_descending``, ``(b, c, count)``, without sorting the rest."""
    batch, length, clusters = first.shape
    if count == length:
        return _descending(first, second).mT
    first, second = (x.mT.reshape(batch * clusters, length) for x in (first, second))
    # Two selections: by the first value, and where that leaves a tie at the end, by the second.
    bar = first.topk(count, -1).values[:, -1:]
    inside = second.masked_fill(first < bar, -torch.inf).masked_fill(first > bar, torch.inf)
    values, taken = inside.topk(count + 1, -1)
    taken = taken[:, :count].sort(-1).values
    columns = (x.gather(1, taken).mT[None] for x in (first, second))
    taken = taken.gather(1, _descending(*columns)[0].mT)
    equal = (values[:, count - 1] == values[:, count]).nonzero().squeeze(-1)
    if len(equal):  # equal in both values: the lower token counts
        taken[equal] = _descending(*(x[equal].mT[None] for x in (first, second)))[0, :count].mT
    return taken.unflatten(0, (batch, clusters))


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
    choice, value, tie_value = best_cluster(affinity, tie, (free > 0)[:, None])
    while bool(waiting.any()):
        if by_pair:
            order = _descending(value.masked_fill(~waiting, -torch.inf), tie_value)
        wanted, active = choice.gather(1, order), waiting.gather(1, order)
        wanted = wanted.masked_fill(~active, clusters)
        refused = active & (ranks(wanted, clusters + 1) >= free.gather(1, wanted.clamp(max=clusters - 1)))
        given = active & (refused.cumsum(1) == 0)
        free.scatter_add_(1, wanted.clamp(max=clusters - 1), -given.long())
        placed = torch.zeros_like(waiting).scatter(1, order, given)
        assigned = torch.where(placed, choice, assigned)
        waiting &= ~placed
        # Only who wanted a cluster that is full now has to choose again.
        sequence, token = (waiting & (free.gather(1, choice) <= 0)).nonzero(as_tuple=True)
        still = (free > 0)[sequence][:, None]
        again = best_cluster(affinity[sequence, token][:, None], tie[sequence, token][:, None], still)
        for kept, found in zip((choice, value, tie_value), again):
            kept[sequence, token] = found[:, 0]
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
    batch, length = assigned.shape
    order = assigned.sort(dim=1, stable=True).indices
    sorted_ = assigned.gather(1, order)
    names = torch.arange(clusters, device=assigned.device).expand(batch, -1).contiguous()
    start = torch.searchsorted(sorted_, names)
    place = torch.arange(length, device=assigned.device) - start.gather(1, sorted_.clamp(min=0))
    return torch.zeros_like(assigned).scatter(1, order, place.masked_fill(sorted_ < 0, 0))
