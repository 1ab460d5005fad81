"""Attention with a polynomial in place of the exponential, as products of features, under simple masks.

The low-rank extension of Conv-Basis (arXiv 2405.05219; specification section 8). With ``p(x) = sum_t x^t /
t!`` up to an even degree, which is positive everywhere, ``p(scale * <q, k>) = <left(q), right(k)>`` over all
monomials. A mask whose rows are ranges of keys costs sums of ``right(k_j) x_j`` over blocks of keys: a
running sum when every range starts at the first key, a tree of partial sums otherwise (differences of prefix
sums would cancel). Pairs in blocks on a boundary of the mask are met one by one. Documents are classes of
columns: one sum for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

BLOCK = 64


def feature_count(channels: int, degree: int) -> int:
    """Monomials of at most ``degree`` in ``channels`` variables."""
    return math.comb(channels + degree, degree)


@lru_cache(maxsize=64)
def _monomials(channels: int, degree: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Variables of every monomial, ``channels`` standing for 1, and its factor ``1 / sqrt(alpha!)``."""
    chosen, factors = [], []
    for total in range(degree + 1):
        for variables in combinations_with_replacement(range(channels), total):
            repeats = math.prod(math.factorial(variables.count(c)) for c in set(variables))
            chosen.append((*variables, *[channels] * (degree - total)))
            factors.append(repeats**-0.5)
    return tuple(chosen), tuple(factors)


def features(x: Tensor, degree: int) -> Tensor:
    """All monomials of the channels: ``(..., d)`` to ``(..., feature_count(d, degree))``."""
    chosen, factors = _monomials(x.shape[-1], degree)
    result = torch.tensor(factors, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1)
    if degree == 0:
        return result
    padded = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    index = torch.tensor(chosen, device=x.device)
    for position in range(degree):
        result = result * padded[..., index[:, position]]
    return result


def polynomial(x: Tensor, degree: int) -> Tensor:
    """``sum_{t <= degree} x^t / t!``; 0 for a negative degree."""
    result = torch.zeros_like(x)
    for t in range(degree, -1, -1):
        result = result * x / (t + 1) + 1
    return result


@dataclass(frozen=True)
class Ranges:
    """A mask whose rows are ranges: row ``i`` sees the keys ``first[i]`` to ``last[i]``; neither ever falls.

    Args:
        first: ``(n,)`` first key of every row.
        last: ``(n,)`` key after the last; at most ``first`` when a row sees none.
    """

    first: Tensor
    last: Tensor

    def transposed(self) -> Ranges:
        """The rows that see every key, which are ranges as well."""
        keys = torch.arange(len(self.first), device=self.first.device)
        return Ranges(
            torch.searchsorted(self.last, keys, right=True), torch.searchsorted(self.first, keys, right=True)
        )


@dataclass(frozen=True)
class Documents:
    """A mask of documents: row and key see each other within one document.

    Args:
        places: Of every document, its tokens.
    """

    places: tuple[Tensor, ...]

    def transposed(self) -> Documents:
        """The same mask."""
        return self


def _tree(states: Tensor) -> list[Tensor]:
    """Sums of ``2^level`` neighbouring blocks; ``states`` is ``(blocks, lanes, features, channels)``."""
    levels = [states]
    while levels[-1].shape[0] > 1:
        lower = levels[-1]
        pairs = lower.shape[0] // 2
        levels.append(lower[: 2 * pairs : 2] + lower[1 : 2 * pairs : 2])
    return levels


def _range_sum(levels: Sequence[Tensor], first: int, last: int) -> Tensor | None:
    """Sum of the blocks ``first`` to ``last``, at most two nodes of every level; ``None`` of no block."""
    total: Tensor | None = None
    level = 0
    while first < last:
        for take, node in ((first % 2, first), (last % 2, last - 1)):
            if take and first < last:
                part = levels[level][node]
                total = part if total is None else total + part
        first, last, level = (first + 1) // 2, last // 2, level + 1
    return total


def masked_sums(left: Tensor, right: Tensor, x: Tensor, degree: int, mask: Ranges | Documents) -> Tensor:
    """``sum_j W_ij p(<left_i, right_j>) x_j`` without the n x n matrix.

    Args:
        left: ``(lanes, n, d)``.
        right: ``(lanes, n, d)``.
        x: ``(lanes, n, c)``.
        degree: Of the polynomial ``p``; a negative one is the polynomial 0.
        mask: ``W``.

    Returns:
        ``(lanes, n, c)``.
    """
    out = torch.zeros_like(x)
    if degree < 0:
        return out
    if isinstance(mask, Documents):
        for place in mask.places:
            state = features(right[:, place], degree).mT @ x[:, place]
            out[:, place] = features(left[:, place], degree) @ state
        return out
    n = x.shape[1]
    firsts, lasts = mask.first.tolist(), mask.last.tolist()
    running = not any(firsts)

    def state_of(block: int) -> Tensor:
        keys = slice(block * BLOCK, (block + 1) * BLOCK)
        return features(right[:, keys], degree).mT @ x[:, keys]

    levels = (
        [] if running else _tree(torch.stack([state_of(b) for b in range(n // BLOCK)])) if n >= BLOCK else []
    )
    total: Tensor | None = None
    added = 0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        # Both ends never fall, so the rows' common range is from the last row's first key to the first row's
        # last.
        inner, outer = -(-firsts[stop - 1] // BLOCK), lasts[start] // BLOCK
        far: Tensor | None = None
        if running:
            for block in range(added, outer):
                part = state_of(block)
                total = part if total is None else total + part
            added = max(added, outer)
            far = total
        elif inner < outer:
            far = _range_sum(levels, inner, outer)
        whole = (inner, outer) if inner < outer else (firsts[start] // BLOCK, firsts[start] // BLOCK)
        rows = left[:, start:stop]
        if far is not None:
            out[:, start:stop] = features(rows, degree) @ far
        for low, high in ((firsts[start], whole[0] * BLOCK), (whole[1] * BLOCK, lasts[stop - 1])):
            begin = max(low, firsts[start])
            if begin < high:
                place = torch.arange(begin, high, device=x.device)
                seen = (place >= mask.first[start:stop, None]) & (place < mask.last[start:stop, None])
                weights = polynomial(rows @ right[:, begin:high].mT, degree).masked_fill(~seen, 0)
                out[:, start:stop] += weights @ x[:, begin:high]
    return out


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    weight: Tensor,
    degree: int,
    mask: Ranges | Documents,
) -> tuple[Tensor, Tensor]:
    """Output and normaliser.

    Args:
        query: ``(lanes, n, d)``.
        key: ``(lanes, n, d)``.
        value: ``(lanes, n, e)``.
        scale: Factor on the scores.
        weight: ``(lanes, n)`` factor of every key, 0 for hidden ones.
        degree: Of the polynomial, even.
        mask: Who sees whom.

    Returns:
        ``(lanes, n, e)`` and ``(lanes, n)``; 0 for rows that see no key.
    """
    x = torch.cat([value, torch.ones_like(value[..., :1])], -1) * weight[..., None]
    sums = masked_sums(scale * query, key, x, degree, mask)
    mass = sums[..., -1:].clamp(min=0)
    return (sums[..., :-1] / mass).masked_fill(mass == 0, 0), mass[..., 0]


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    weight: Tensor,
    degree: int,
    mask: Ranges | Documents,
    mass: Tensor,
    grad_out: Tensor,
    rho: Tensor,
    channels: int = 1024,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the logarithms of the key weights.

    The derivative of the polynomial is the polynomial of one degree less, so the gradients of queries and
    keys are the same sums of fewer features with ``(e + 1) d`` channels, in portions.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        weight: As in ``forward``.
        degree: As in ``forward``.
        mask: As in ``forward``.
        mass: Normaliser that ``forward`` gave.
        grad_out: ``(lanes, n, e)``.
        rho: ``(lanes, n)``, ``<grad_out, out> - grad_log_sum_exp``.
        channels: Channels of a portion.
    """
    x = torch.cat([value, torch.ones_like(value[..., :1])], -1) * weight[..., None]
    upstream = torch.cat([grad_out, -rho[..., None]], -1) / mass[..., None]
    upstream = upstream.masked_fill((mass == 0)[..., None], 0)
    left, turned = scale * query, mask.transposed()
    grad_x = masked_sums(key, left, upstream, degree, turned)
    grad_value = grad_x[..., :-1] * weight[..., None]
    grad_weight = (grad_x * x).sum(-1)
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    d = query.shape[-1]
    portion = max(1, channels // d)
    for begin in range(0, x.shape[-1], portion):
        some_x, some_up = (y[..., begin : begin + portion, None] for y in (x, upstream))
        met = masked_sums(left, key, (some_x * key[..., None, :]).flatten(-2), degree - 1, mask)
        grad_query += scale * (some_up * met.unflatten(-1, (-1, d))).sum(-2)
        met = masked_sums(key, left, (some_up * query[..., None, :]).flatten(-2), degree - 1, turned)
        grad_key += scale * (some_x * met.unflatten(-1, (-1, d))).sum(-2)
    return grad_query, grad_key, grad_value, grad_weight
