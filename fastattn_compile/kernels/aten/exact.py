"""Exact softmax attention on ATen, forward and backward, in tiles of query rows: never an n x n tensor.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` queries, ``m`` keys, ``d`` channels of query and
key, ``e`` of value. Query head ``i`` reads key head ``i // (h // g)``; keys are never repeated, the query
heads that share a key head stand as further rows of one tile.

A mask arrives as two functions: ``visible(batch, rows, keys)`` gives a ``(r, c)`` boolean tensor,
``span(start, stop)`` the range of keys outside of which the query rows ``start`` to ``stop`` see nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.score_bias import ScoreBias, score_bias
from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import (
    SCORE_TILE,
    all_finite,
    normalise,
    poison,
    probabilities_,
    statistics_dtype,
    without_nonfinite,
    work_dtype,
)

Visible = Callable[[int, Tensor, Tensor], Tensor]
Span = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class _Tile:
    """Some query rows of some key heads of one sequence, and the range of keys they may see."""

    batch: int
    heads: slice
    rows: slice
    keys: slice
    visible: Tensor | None


@dataclass(frozen=True)
class _Part:
    """Some key heads of one sequence."""

    batch: int
    heads: range


def _parts(batch: int, kv_heads: int) -> list[_Part]:
    """Sequences, their heads divided so that every thread has something to do."""
    each = -(-kv_heads // max(1, torch.get_num_threads() // max(1, batch)))
    return [
        _Part(b, range(head, min(head + each, kv_heads)))
        for b in range(batch)
        for head in range(0, kv_heads, each)
    ]


def _tiles(
    query: Tensor, key: Tensor, part: _Part, visible: Visible | None, span: Span | None
) -> Iterator[_Tile]:
    query_len, key_len = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows = max(1, min(query_len, max(32, 4 * SCORE_TILE // max(1, group * key_len))))
    for start in range(0, query_len, rows):
        stop = min(start + rows, query_len)
        first, last = span(start, stop) if span is not None else (0, key_len)
        seen = None
        if visible is not None and first < last:
            place = torch.arange(start, stop, device=query.device)
            seen = visible(part.batch, place, torch.arange(first, last, device=query.device))
        size = max(1, group * (stop - start) * (last - first))
        together = max(1, 4 * SCORE_TILE // size)
        for head in range(part.heads.start, part.heads.stop, together):
            heads = slice(head, min(head + together, part.heads.stop))
            yield _Tile(part.batch, heads, slice(start, stop), slice(first, max(first, last)), seen)


def _queries(x: Tensor, tile: _Tile, group: int, dtype: torch.dtype) -> Tensor:
    """The tile's part of a ``(b, h, n, d)`` tensor as ``(heads, group * rows, d)``."""
    part = x[tile.batch].unflatten(0, (-1, group))[tile.heads, :, tile.rows]
    return part.to(dtype).flatten(1, 2)


def _keys(x: Tensor, tile: _Tile, dtype: torch.dtype) -> Tensor:
    """The tile's part of a ``(b, g, m, d)`` tensor as ``(heads, keys, d)``."""
    return x[tile.batch, tile.heads, tile.keys].to(dtype)


def _put(x: Tensor, tile: _Tile, group: int, part: Tensor) -> None:
    """The way back of ``_queries``: writes ``(heads, group * rows, d)`` into ``(b, h, n, d)``."""
    target = x[tile.batch].unflatten(0, (-1, group))[tile.heads, :, tile.rows]
    target.copy_(part.unflatten(1, (group, -1)))


def _distance(tile: _Tile, offset: int, device: torch.device) -> Tensor:
    """Key less query position, ``(rows, keys)``."""
    rows = torch.arange(tile.rows.start + offset, tile.rows.stop + offset, device=device)
    return torch.arange(tile.keys.start, tile.keys.stop, device=device) - rows[:, None]


def _scores(
    query: Tensor, key: Tensor, tile: _Tile, group: int, scale: float, bias: ScoreBias | None, offset: int
) -> Tensor:
    scores = torch.bmm(query * scale, key.mT)
    if bias is not None:
        scores.unflatten(1, (group, -1)).add_(bias.at(tile.heads, _distance(tile, offset, query.device)))
    if tile.visible is not None:
        scores.unflatten(1, (group, -1)).masked_fill_(~tile.visible, -torch.inf)
    return scores


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visible: Visible | None = None,
    span: Span | None = None,
    bias: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Exact attention.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides.
        key: ``(b, g, m, d)``; types may differ between the three (autocast), the work is done in float32 or
            float64.
        value: ``(b, g, m, e)``.
        scale: Factor on the scores.
        visible: The mask; ``None`` when every query sees every key.
        span: The keys that matter to a range of query rows; all of them when ``None``.
        bias: Added by distance: ``(h,)`` slopes, ``(h, 2 N - 1)``, or ``None`` (``score_bias``).
        offset: Position of the first query, for the bias.

    Returns:
        Output ``(b, h, n, e)``, the values' type, contiguous, 0 where a query sees no key; log-sum-exp ``(b,
        h, n)``, float32 (float64 for float64 values), -inf where a query sees no key.
    """
    batch, heads, query_len, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    dtype = work_dtype(query, key, value)
    out = value.new_empty(batch, heads, query_len, value.shape[3])
    log_sum_exp = value.new_empty(batch, heads, query_len, dtype=statistics_dtype(value))
    finite = all_finite(key, value)
    added = score_bias(bias, kv_heads, dtype)

    def attend(_: None, part: _Part) -> None:
        for tile in _tiles(query, key, part, visible, span):
            q = _queries(query, tile, group, dtype)
            k, v = (_keys(x, tile, dtype) for x in (key, value))
            if k.shape[1] == 0:
                tile_out = q.new_zeros(*q.shape[:2], v.shape[2])
                tile_lse = q.new_full((*q.shape[:2], 1), -torch.inf)
            else:
                clean_k, clean_v = (k, v) if finite else (without_nonfinite(k), without_nonfinite(v))
                scores = _scores(q, clean_k, tile, group, scale, added, offset)
                weights = torch.empty_like(scores)
                tile_lse = normalise(scores, weights)
                tile_out = torch.bmm(weights, clean_v).masked_fill_(tile_lse == -torch.inf, 0)
                if not finite:
                    poison(tile_out, tile_lse, _repeated(tile, scores, group), k, v)
            _put(out, tile, group, tile_out)
            _put(log_sum_exp[..., None], tile, group, tile_lse)

    run_parts(attend, _parts(batch, kv_heads), lambda: None, query.device)
    return out, log_sum_exp


def _repeated(tile: _Tile, scores: Tensor, group: int) -> Tensor:
    """The tile's mask for every head and member of the query group, shape of ``scores``."""
    if tile.visible is None:
        return torch.ones_like(scores, dtype=torch.bool)
    return tile.visible.repeat(group, 1).expand(scores.shape)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
    visible: Visible | None = None,
    span: Span | None = None,
    bias: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``forward``; with P the weights, ``dS = P * (dO . v - dO . o + dlse)``.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output, its shape.
        grad_log_sum_exp: Gradient of the log-sum-exp, its shape; ``None`` is zero.
        visible: As in ``forward``.
        span: As in ``forward``.
        bias: As in ``forward``.
        offset: As in ``forward``.

    Returns:
        Gradients of query, key and value, each of its input's shape and type, contiguous; that of a bias by distance,
        ``None`` for slopes and without a bias.
    """
    group = query.shape[1] // key.shape[1]
    dtype = work_dtype(query, key, value)
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    finite = all_finite(key, value)
    slope = (grad_out.to(dtype) * out).sum(-1)
    if grad_log_sum_exp is not None:
        slope = slope - grad_log_sum_exp

    added = score_bias(bias, key.shape[1], dtype)
    of_bias = None if added is None else added.new_gradient(slice(None))

    def differentiate(_: None, part: _Part) -> tuple[slice, Tensor | None]:
        heads = slice(part.heads.start, part.heads.stop)
        own = None if added is None else added.new_gradient(heads)
        for tile in _tiles(query, key, part, visible, span):
            k, v = (_keys(x, tile, dtype) for x in (key, value))
            if k.shape[1] == 0:
                continue
            if not finite:
                k, v = without_nonfinite(k), without_nonfinite(v)
            q, grad_o = (_queries(x, tile, group, dtype) for x in (query, grad_out))
            lse, slopes = (_queries(x[..., None], tile, group, dtype) for x in (log_sum_exp, slope))
            weights = probabilities_(_scores(q, k, tile, group, scale, added, offset), lse)
            grad_value[tile.batch, tile.heads, tile.keys] += torch.bmm(weights.mT, grad_o)
            grad_scores = torch.bmm(grad_o, v.mT).sub_(slopes).mul_(weights)
            if added is not None and own is not None:
                columns = slice(
                    (tile.heads.start - heads.start) * group, (tile.heads.stop - heads.start) * group
                )
                distance = _distance(tile, offset, query.device)
                added.take(own[:, columns], grad_scores.unflatten(1, (group, -1)), distance)
            _put(grad_query, tile, group, torch.bmm(grad_scores, k).mul_(scale))
            grad_key[tile.batch, tile.heads, tile.keys] += torch.bmm(grad_scores.mT, q).mul_(scale)
        return heads, own

    def take(found: tuple[slice, Tensor | None]) -> None:
        heads, own = found
        if of_bias is not None and own is not None:
            of_bias[:, heads.start * group : heads.stop * group] += own

    run_parts(differentiate, _parts(query.shape[0], key.shape[1]), lambda: None, query.device, take)
    if of_bias is not None and bias is not None:
        of_bias = of_bias.T.contiguous().to(bias.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), of_bias
