"""Where the segments of conv-basis attention begin: strided, by binary search (Recover), or at column jumps.

Sizes: ``b`` batch, ``g`` key heads, ``r`` query heads of a key head, ``n`` tokens, ``d`` channels. Every
(batch, query head) is a lane; all lanes are searched in lock-step. Boundaries are ``(b, g, r, count + 1)``
integers that do not decrease: segment ``t`` holds the columns ``boundaries[t]`` to ``boundaries[t + 1]``, its
anchor is the first of them, an empty segment has no anchor. A dimension is 1 where all lanes agree. Only
columns ``first`` to ``stop`` hold real keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def anchor_offsets(count: int, sinks: int, stride: int) -> list[int]:
    """Places of anchors at a fixed distance, counted from the first real column: those do not depend on the length.

    Args:
        count: Number of anchors.
        sinks: Leading columns with one of their own; at most ``count - 1`` are given one.
        stride: Distance of the others.
    """
    alone = min(sinks, count - 1)
    return [*range(alone), *(alone + step * stride for step in range(count - alone))]


def strided(first: Tensor, stop: Tensor, count: int, sinks: int = 0, stride: int = 0) -> Tensor:
    """Segments of equal length, after ``sinks`` columns that are segments of their own; reads no content.

    Args:
        first: ``(b,)`` first real column.
        stop: ``(b,)`` column after the last real one.
        count: Number of segments.
        sinks: Leading single columns; at most ``count - 1`` are given one.
        stride: Columns of a segment, the last one takes the rest; 0 divides the sequence evenly.

    Returns:
        ``(b, 1, 1, count + 1)``.
    """
    if stride:
        offsets = torch.tensor(anchor_offsets(count, sinks, stride), device=first.device)
        bounds = torch.cat([first[:, None] + offsets, stop[:, None]], 1)
        return torch.minimum(bounds, stop[:, None])[:, None, None]
    alone = min(sinks, count - 1)
    step = torch.arange(count - alone, device=first.device)
    rest = (stop - first - alone).clamp(min=0)[:, None]
    even = first[:, None] + alone + torch.div(step * rest, count - alone, rounding_mode="floor")
    head = first[:, None] + torch.arange(alone, device=first.device)
    bounds = torch.cat([head, even, stop[:, None]], 1)
    return torch.minimum(bounds, stop[:, None])[:, None, None]


def _columns(query: Tensor, key: Tensor, scale: float, column: Tensor, length: int, stop: Tensor) -> Tensor:
    """First ``length`` scores down one column of every lane, 0 below the last real row.

    Args:
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        scale: Factor on the scores.
        column: ``(b, g, r)``.
        length: Scores to compute.
        stop: ``(b, 1, 1)``.

    Returns:
        ``(b, g, r, length)``.
    """
    lanes, (n, d) = query.shape[:3], query.shape[3:]
    rows = column[..., None] + torch.arange(length, device=query.device)
    place = rows.clamp(0, n - 1)[..., None].expand(*lanes, length, d)
    at = column.clamp(0, n - 1)[..., None, None].expand(*lanes, 1, d)
    anchor = key.expand(*lanes, n, d).gather(3, at)
    scores = scale * (query.gather(3, place) * anchor).sum(-1)
    return scores.masked_fill(rows >= stop[..., None], 0)


def recover(
    query: Tensor,
    key: Tensor,
    scale: float,
    first: Tensor,
    stop: Tensor,
    count: int,
    probe: int,
    delta: float,
    eps: float,
    *,
    force_first: bool = True,
    share: bool = False,
) -> Tensor:
    """Recover with binary search (Conv-Basis, arXiv 2405.05219; specification section 3), lanes in lock-step.

    The next anchor is the first column whose first ``probe`` scores differ from those of the last anchor by
    at least ``delta - 2 * probe * eps`` in the 1-norm, looked for as if that were monotone in the column. On
    scores that are not piecewise Toeplitz it is not, and the boundaries are arbitrary. Probes read later
    queries: the positions are not causal.

    Args:
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        scale: Factor on the scores.
        first: ``(b,)`` first real column.
        stop: ``(b,)`` column after the last real one.
        count: Largest number of anchors.
        probe: Scores of a column that are compared, ``T`` of the paper.
        delta: Separation of anchors.
        eps: Noise of a score.
        force_first: The first real column is an anchor without a search.
        share: The lanes of a key head decide together, by their mean distance.

    Returns:
        ``(b, g, r or 1, count + 1)``. Columns before the first boundary belong to no segment.
    """
    lanes = query.shape[:3]
    begin, end = (x[:, None, None].expand(lanes) for x in (first, stop))
    limit = end - probe
    last_prefix = query.new_zeros(*lanes, probe)
    last = begin - 1
    found = []
    for term in range(count):
        # Nothing is emitted once the last anchor has reached the end of the search range.
        done = last >= limit if term else torch.zeros(lanes, dtype=torch.bool, device=query.device)
        low = last + 1
        high = low if term == 0 and force_first else torch.maximum(limit, low)
        active = (low < high) & ~done
        while bool(active.any()):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            distance = (
                (_columns(query, key, scale, middle, probe, stop[:, None, None]) - last_prefix).abs().sum(-1)
            )
            if share:
                distance = distance.mean(2, keepdim=True).expand(lanes)
            separated = distance >= delta - 2 * probe * eps
            high = torch.where(active & separated, middle, high)
            low = torch.where(active & ~separated, middle + 1, low)
            active = (low < high) & ~done
        found.append(torch.where(done, end, torch.minimum(low, end)))
        last = torch.where(done, last, low)
        last_prefix = _columns(query, key, scale, last, probe, stop[:, None, None])
    bounds = torch.stack([*found, end], -1)
    return bounds[:, :, :1] if share else bounds


def signature_offsets(probe: int, length: int) -> list[int]:
    """Offsets that tell columns apart: half of them small, the rest powers of two (section 14).

    Args:
        probe: How many.
        length: Tokens of the sequence; all offsets are smaller.
    """
    near = (probe + 1) // 2
    power = (near - 1).bit_length()
    far = [1 << (power + i) for i in range(probe - near)]
    return [offset for offset in (*range(near), *far) if offset < length]


def column_jumps(
    query: Tensor,
    key: Tensor,
    scale: float,
    first: Tensor,
    stop: Tensor,
    count: int,
    probe: int,
    *,
    sinks: int = 0,
    share: bool = False,
) -> Tensor:
    """Anchors at the first column and the ``count - 1`` that differ most from the one before (section 14.2).

    Columns are compared by the mean absolute difference of a few scores of the same offset. Needs later
    queries: the positions are not causal.

    Args:
        query: ``(b, g, r, n, d)``.
        key: ``(b, g, 1, n, d)``.
        scale: Factor on the scores.
        first: ``(b,)`` first real column.
        stop: ``(b,)`` column after the last real one.
        count: Number of anchors.
        probe: Scores of a column that are compared.
        sinks: Leading columns that are anchors whatever they hold.
        share: The lanes of a key head decide together, by their mean jump.

    Returns:
        ``(b, g, r or 1, count + 1)``.
    """
    n = query.shape[3]
    place = torch.arange(n, device=query.device)
    begin, end = first[:, None, None, None], stop[:, None, None, None]
    total = query.new_zeros(*query.shape[:3], n)
    compared = query.new_zeros(query.shape[0], 1, 1, n)
    for offset in signature_offsets(probe, n):
        scores = scale * (query[..., offset:, :] * key[..., : n - offset, :]).sum(-1)
        usable = (place[1 : n - offset] + offset < end).to(query.dtype)
        total[..., 1 : n - offset] += (scores[..., 1:] - scores[..., :-1]).abs() * usable
        compared[..., 1 : n - offset] += usable
    jump = total / compared.clamp(min=1)
    # NaN would stand above the infinity of the columns that are anchors in any case.
    jump = torch.where(torch.isfinite(jump), jump, 0)
    if share:
        jump = jump.mean(2, keepdim=True)
    always = min(max(1, sinks), count)
    jump = jump.masked_fill((place >= begin) & (place < begin + always), torch.inf)
    jump = jump.masked_fill((place < begin) | (place >= end), -torch.inf)
    best, columns = jump.topk(count, -1)
    chosen = torch.where(best == -torch.inf, end, columns).sort(-1).values
    return torch.cat([chosen, end.expand(*chosen.shape[:3], 1)], -1)


def segment_of(bounds: Tensor, length: int) -> Tensor:
    """Segment of every column: ``(b, g, r, length)``, -1 for columns of no segment.

    Args:
        bounds: ``(b, g, r, count + 1)``.
        length: Tokens of the sequence.
    """
    place = torch.arange(length, device=bounds.device).expand(*bounds.shape[:3], length).contiguous()
    # The number of boundaries at or before a column; of empty segments that begin there the last one counts.
    segment = torch.searchsorted(bounds[..., :-1].contiguous(), place, right=True) - 1
    return segment.masked_fill(place >= bounds[..., -1:], -1)
