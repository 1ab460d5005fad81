"""Conv-basis attention in tiles of query rows, scores gathered from the profiles: exact in any numeric range.

No product of queries and keys is formed: the score of a pair is read from the one-dimensional profile of the
column's segment, then softmax and product with the values go as in any tiled attention. O(n^2) work, O(n)
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv_profiles import Side
from fastattn_compile.kernels.tiles import SCORE_TILE, without_nonfinite


def _tiles(lanes: int, n: int) -> Iterator[slice]:
    rows = max(1, min(n, 4 * SCORE_TILE // max(1, lanes * n)))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _places(side: Side, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Where in the flattened profiles the scores of some rows stand, and which of them are of this side.

    Returns:
        ``(b, g, r, rows * n)`` indices, and ``(b, g, r, rows, n)`` boolean.
    """
    offset = rows[:, None] - torch.arange(n, device=rows.device)
    if side.flipped:
        offset = -offset
    segment = side.turn(side.segment).unsqueeze(-2)
    valid = (offset >= (1 if side.flipped else 0)) & (segment >= 0)
    index = segment.clamp(min=0) * n + offset.clamp(min=0)
    lanes = side.profile.shape[:3]
    return index.flatten(-2).expand(*lanes, -1), valid.expand(*lanes, *offset.shape)


def row_scores(sides: Sequence[Side], log_weight: Tensor, rows: Tensor) -> Tensor:
    """Scores of some rows.

    Args:
        sides: The triangles of the scores.
        log_weight: ``(b, g or 1, r or 1, n)`` added to the scores of every key, -inf for hidden ones.
        rows: ``(m,)`` row numbers.

    Returns:
        ``(b, g, r, m, n)``, -inf where a key is not visible.
    """
    n = sides[0].profile.shape[-1]
    total = log_weight.new_full((*sides[0].profile.shape[:3], len(rows), n), -torch.inf)
    for side in sides:
        index, valid = _places(side, rows, n)
        scores = side.profile.flatten(-2).gather(-1, index).view(valid.shape)
        total = torch.where(valid, scores, total)
    hidden = (log_weight == -torch.inf).unsqueeze(-2)
    return (total + log_weight.unsqueeze(-2)).masked_fill_(hidden, -torch.inf)


def forward(sides: Sequence[Side], value: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp.

    A value that is not finite makes NaN exactly the rows that see it, a score that is not finite the rows
    that read it.

    Args:
        sides: The triangles of the scores.
        value: ``(b, g, 1, n, e)``.
        log_weight: ``(b, g or 1, r or 1, n)`` added to the scores of every key, -inf for hidden ones.

    Returns:
        ``(b, g, r, n, e)`` and ``(b, g, r, n)``; 0 and -inf for rows that see no key.
    """
    lanes, n = sides[0].profile.shape[:3], value.shape[3]
    out = value.new_empty(*lanes, n, value.shape[4])
    log_sum_exp = value.new_empty(*lanes, n)
    bad = ~torch.isfinite(value)
    finite = not bool(bad.any())
    clean = value if finite else without_nonfinite(value)
    for rows in _tiles(lanes.numel(), n):
        scores = row_scores(sides, log_weight, torch.arange(rows.start, rows.stop, device=value.device))
        lse = scores.logsumexp(-1)
        empty = (lse == -torch.inf)[..., None]
        tile = scores.softmax(-1).masked_fill(empty, 0) @ clean
        if not finite:
            tile = tile.masked_fill(
                (scores != -torch.inf).to(value.dtype) @ bad.to(value.dtype) > 0, torch.nan
            )
        out[..., rows, :], log_sum_exp[..., rows] = tile, lse
    return out, log_sum_exp


def backward(
    sides: Sequence[Side],
    value: Tensor,
    log_weight: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    rho: Tensor,
    slopes: bool = True,
    formula: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Gradients from tiles of the weights, computed again.

    Args:
        sides: The triangles of the scores.
        value: ``(b, g, 1, n, e)``.
        log_weight: ``(b, g or 1, r or 1, n)``.
        log_sum_exp: ``(b, g, r, n)``.
        grad_out: ``(b, g, r, n, e)``.
        rho: ``(b, g, r, n)``, ``<grad_out, out> - grad_log_sum_exp``.
        slopes: Whether the gradients of the profiles are wanted.
        formula: Query ``(b, g, r, n, d)``, key ``(b, g, 1, n, d)`` and scale, when the gradient formula of
            softmax attention is wanted (specification 7A).

    Returns:
        Gradients of the profiles of every side, ``(b, g, r, k, n)``; of the values, ``(b, g, 1, n, e)``; of
        the ``log_weight``, ``(b, g, r, n)``; of query and key when ``formula`` is given.
    """
    value = without_nonfinite(value)
    grad_value = torch.zeros_like(value)
    grad_weight = torch.zeros_like(log_sum_exp)
    slope = [torch.zeros_like(side.profile).flatten(-2) for side in sides] if slopes else []
    grad_query = torch.zeros_like(formula[0]) if formula else None
    grad_key = torch.zeros_like(formula[1]) if formula else None
    n = value.shape[3]
    shift = log_sum_exp.masked_fill(log_sum_exp == -torch.inf, torch.inf).unsqueeze(-1)
    for rows in _tiles(log_sum_exp.shape[:3].numel(), n):
        place = torch.arange(rows.start, rows.stop, device=value.device)
        weights = (row_scores(sides, log_weight, place) - shift[..., rows, :]).exp_()
        upstream = grad_out[..., rows, :]
        grad_value += (weights.mT @ upstream).sum(2, keepdim=True)
        grad_scores = weights * (upstream @ value.mT - rho[..., rows, None])
        grad_weight += grad_scores.sum(-2)
        for side, into in zip(sides, slope):
            index, valid = _places(side, place, n)
            into.scatter_add_(-1, index, (grad_scores * valid).flatten(-2))
        if formula is not None and grad_query is not None and grad_key is not None:
            query, key, scale = formula
            grad_query[..., rows, :] = scale * (grad_scores @ key)
            grad_key += scale * (grad_scores.mT @ query[..., rows, :]).sum(2, keepdim=True)
    shaped = [x.view(side.profile.shape) for side, x in zip(sides, slope)]
    return shaped, grad_value, grad_weight, (grad_query, grad_key) if formula else None  # type: ignore[return-value]
