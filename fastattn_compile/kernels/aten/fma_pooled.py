"""Fast multipole attention with pooled queries on ATen, forward and backward: far scores once a pair of groups, O(n).

Far rows are met by the mean query of a group, at the group's own level (specification 1.8). Near field and every level
are the same thing, attention of blocks to themselves and the blocks beside them: blocks of tokens near, pairs of sister
groups far. Results of a level are partial, output and log-sum-exp; those of a parent are merged into its children
from the coarsest level down, at last into the tokens. The gradients walk the other way: what a level was merged into
hands its share up. Nothing is larger than the tokens; scores stand in the cache.

Sizes: ``b`` batch, ``h`` query heads, ``g`` key heads, ``n`` tokens, ``d`` channels of query and key, ``e`` of value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.parallel import run_parts
from fastattn_compile.kernels.tiles import (
    SCORE_TILE,
    all_finite,
    normalise,
    probabilities_,
    statistics_dtype,
    work_dtype,
)


@dataclass(frozen=True)
class PooledPattern:
    """Sizes of the groups.

    Args:
        block: Tokens of a finest group.
        rank: Rows a group is pooled to, divides ``block``.
        levels: Pooled levels of the sequence, at least 1.
        weighted: A row counts as many keys as it stands for.
    """

    block: int
    rank: int
    levels: int
    weighted: bool


@dataclass(frozen=True)
class _Side:
    """Rows of every level of one tensor: ``rows[l]`` is ``(b, heads, rows, c)``, ``counts[l]`` ``(b, rows)``."""

    rows: list[Tensor]
    counts: list[Tensor]


def _pool(x: Tensor, real: Tensor, part: int, together: int, levels: int) -> _Side:
    """Means of the real tokens of parts that double from level to level.

    Args:
        x: ``(b, heads, n, c)``, 0 where no token is.
        real: ``(b, n)``, 1 where a token is.
        part: Tokens of a part at the first level.
        together: Rows of two sister groups: every level gets a multiple of it.
        levels: How many.
    """
    sums, count = (_whole(t, part).unflatten(-2, (-1, part)).sum(-2) for t in (x, real[..., None]))
    side = _Side([], [])
    for level in range(levels):
        if level:
            sums, count = (t.unflatten(-2, (-1, 2)).sum(-2) for t in (sums, count))
        sums, count = _whole(sums, together), _whole(count, together)
        side.rows.append(sums / count.clamp(min=1)[:, None])
        side.counts.append(count.squeeze(-1))
    return side


def _pool_backward(grads: list[Tensor], counts: list[Tensor], part: int, grad: Tensor) -> None:
    """Adds the gradients of the tokens to ``grad``, ``(b, heads, n, c)``, from those of the rows of every level."""
    above: Tensor | None = None
    for rows, count in zip(reversed(grads), reversed(counts)):
        own = rows / count.clamp(min=1)[:, None, :, None]
        above = own if above is None else own + above.repeat_interleave(2, 2)[:, :, : own.shape[2]]
    assert above is not None
    length = grad.shape[2]
    whole = length // part
    grad[:, :, : whole * part].unflatten(2, (whole, part)).add_(above[:, :, :whole, None])
    if whole * part < length:
        grad[:, :, whole * part :] += above[:, :, whole : whole + 1]


def _whole(x: Tensor, size: int) -> Tensor:
    """``(..., rows, c)`` with rows of 0 up to a multiple of ``size``."""
    missing = -x.shape[-2] % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class _Neighbours:
    """Attention of every block of queries to the same block of keys and the two beside it.

    Args:
        query: ``(b, h, rows, d)``.
        key: ``(b, g, key rows, d)``.
        value: ``(b, g, key rows, e)``.
        mass: ``(b, key rows)``, logarithm of what a key weighs, -inf where none is.
        sizes: Rows of a block of queries and of one of keys.
        scale: Factor on the scores.
        hidden: ``(queries, 3 * keys)`` boolean, what the queries of a block do not see; ``None`` is nothing.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mass: Tensor, sizes: tuple[int, int], scale: float,
        hidden: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.length = query.shape[:3]
        self.kv_heads, self.key_length, self.scale = key.shape[1], key.shape[2], scale
        self.rows, self.keys = sizes
        self.query, self.finite = self.fold(query), all_finite(query, key)
        self.units, self.blocks, self.tile_rows, _ = self.query.shape
        self.key, self.value = (self._windows(x) for x in (key, value))
        beside = F.pad(mass, (self.keys, (self.blocks + 1) * self.keys - mass.shape[1]), value=-torch.inf)
        self.mass = beside.unflatten(1, (-1, self.keys)).repeat_interleave(self.kv_heads, 0)
        self.hidden = None if hidden is None else hidden.repeat(self.tile_rows // self.rows, 1)
        tiles = max(1, SCORE_TILE // (self.tile_rows * 3 * self.keys))
        self.blocks_at_once = min(self.blocks, tiles)
        share = -(-self.units // torch.get_num_threads())
        at_once = max(1, min(tiles // self.blocks, share))
        self.parts = [slice(u, min(u + at_once, self.units)) for u in range(0, self.units, at_once)]

    def fold(self, x: Tensor) -> Tensor:
        """``(b, h, rows, c)`` as ``(b * g, blocks, h / g * rows of a block, c)``."""
        blocked = _whole(x, self.rows).unflatten(2, (-1, self.rows)).unflatten(1, (self.kv_heads, -1))
        return blocked.transpose(2, 3).flatten(3, 4).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """The way back of ``fold``."""
        blocked = x.unflatten(0, (self.batch, -1)).unflatten(3, (-1, self.rows))
        return blocked.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, : self.length]

    def _windows(self, x: Tensor) -> Tensor:
        """Keys in blocks with one of 0 before and behind: ``(b * g, blocks + 2, keys, c)``."""
        behind = (self.blocks + 1) * self.keys - x.shape[2]
        return F.pad(x, (0, 0, self.keys, behind)).unflatten(2, (-1, self.keys)).flatten(0, 1)

    def _beside(self, x: Tensor, units: slice, blocks: slice) -> Tensor:
        """What some blocks meet, ``(tiles, 3 * keys, ...)``."""
        windows = [x[units, blocks.start + side : blocks.stop + side] for side in range(3)]
        return torch.cat(windows, 2).flatten(0, 1)

    def passes(self) -> Iterator[slice]:
        """Blocks, as many at a time as fit the cache."""
        for start in range(0, self.blocks, self.blocks_at_once):
            yield slice(start, min(start + self.blocks_at_once, self.blocks))

    def scores(self, units: slice, blocks: slice, query: Tensor, key: Tensor) -> Tensor:
        """``(tiles, rows, 3 * keys)``, -inf where a key is not seen."""
        scores = self._beside(self.mass, units, blocks)[:, None].repeat(1, self.tile_rows, 1)
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        # A query that is not a number stays alone with the keys it sees, of which a pooled one may have none.
        unseen = None if self.finite else scores == -torch.inf
        scores.baddbmm_(query, key.mT, alpha=self.scale)
        return scores if unseen is None else scores.masked_fill_(unseen, -torch.inf)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output ``(b, h, rows, e)`` and log-sum-exp ``(b, h, rows, 1)``; 0 and -inf where no key is seen."""
        outs = self.query.new_empty(*self.query.shape[:3], self.value.shape[3])
        lses = self.query.new_empty(*self.query.shape[:3], 1)

        def attend(_: None, units: slice) -> None:
            for blocks in self.passes():
                query = self.query[units, blocks].flatten(0, 1)
                key, value = (self._beside(x, units, blocks) for x in (self.key, self.value))
                scores = self.scores(units, blocks, query, key)
                attention = torch.empty_like(scores)
                lse = normalise(scores, attention)
                out = torch.bmm(attention, value).masked_fill_(lse == -torch.inf, 0)
                outs[units, blocks] = out.unflatten(0, (-1, blocks.stop - blocks.start))
                lses[units, blocks] = lse.unflatten(0, (-1, blocks.stop - blocks.start))

        run_parts(attend, self.parts, lambda: None, outs.device)
        return self.unfold(outs), self.unfold(lses)

    def backward(self, lse: Tensor, slope: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value as parts of a softmax with more in it.

        Args:
            lse: ``(b, h, rows, 1)``, log-sum-exp of the whole softmax.
            slope: ``(b, h, rows, 1)``, ``dO . o - dlse`` of the whole.
            grad_out: ``(b, h, rows, e)``, gradient of the output of the whole.
        """
        stats = self.fold(torch.cat([lse, slope], -1))
        grad_outs, grad_query = self.fold(grad_out), torch.empty_like(self.query)
        grad_key, grad_value = torch.zeros_like(self.key), torch.zeros_like(self.value)

        def differentiate(_: None, units: slice) -> None:
            for blocks in self.passes():
                query, grad = (x[units, blocks].flatten(0, 1) for x in (self.query, grad_outs))
                lse, slope = stats[units, blocks].flatten(0, 1).split(1, -1)
                key, value = (self._beside(x, units, blocks) for x in (self.key, self.value))
                attention = probabilities_(self.scores(units, blocks, query, key), lse)
                grad_scores = torch.bmm(grad, value.mT).sub_(slope).mul_(attention).mul_(self.scale)
                count = blocks.stop - blocks.start
                grad_query[units, blocks] = torch.bmm(grad_scores, key).unflatten(0, (-1, count))
                for total, part in (
                    (grad_key, torch.bmm(grad_scores.mT, query)),
                    (grad_value, torch.bmm(attention.mT, grad)),
                ):
                    sides = part.unflatten(0, (-1, count)).split(self.keys, 2)
                    for side, own in enumerate(sides):
                        total[units, blocks.start + side : blocks.stop + side] += own

        run_parts(differentiate, self.parts, lambda: None, lse.device)
        grad_keys, grad_values = (
            x[:, 1:-1].flatten(1, 2).unflatten(0, (self.batch, -1))[:, :, : self.key_length]
            for x in (grad_key, grad_value)
        )
        return self.unfold(grad_query), grad_keys, grad_values


class _Levels:
    """The pooled tensors, and the blocks that attend: ``near``, and one a level in ``far``."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: PooledPattern,
        key_padding: Tensor | None,
    ) -> None:  # fmt: skip
        dtype, m, p = work_dtype(query, key, value), pattern.block, pattern.rank
        self.pattern, self.dtype = pattern, dtype
        self.real = torch.ones(query.shape[0], query.shape[2], dtype=dtype, device=query.device)
        given = query.to(dtype)
        key, value, query = key.to(dtype), value.to(dtype), given
        if key_padding is not None:
            self.real = key_padding.to(dtype)
            key, value, query = (
                x.masked_fill(~key_padding[:, None, :, None], 0) for x in (key, value, query)
            )
        self.queries = _pool(query, self.real, m, 2, pattern.levels)
        self.keys, self.values = (_pool(x, self.real, m // p, 2 * p, pattern.levels) for x in (key, value))
        # A query before it was hidden: rows of padding attend too.
        self.near = _Neighbours(given, key, value, self.real.log(), (m, m), scale)
        group = torch.arange(6, device=query.device).repeat_interleave(p)
        own = torch.tensor([[2], [3]], device=query.device)
        adjacent = (group - own).abs() <= 1
        self.far = [
            _Neighbours(q, k, v, self._mass(count), (2, 2 * p), scale, adjacent)
            for q, k, v, count in zip(self.queries.rows, self.keys.rows, self.values.rows, self.keys.counts)
        ]

    def _mass(self, count: Tensor) -> Tensor:
        return (count if self.pattern.weighted else (count > 0).to(count.dtype)).log()

    def descend(self) -> list[tuple[Tensor, Tensor]]:
        """Output and log-sum-exp of all that the groups of a level meet there and above, finest first."""
        merged: list[tuple[Tensor, Tensor]] = []
        for level in reversed(self.far):
            own = level.forward()
            merged.insert(0, _merge(own, merged[0], 2) if merged else own)
        return merged


def _groups(x: Tensor, width: int) -> Tensor:
    """``(b, h, rows, c)`` as ``(b, h, groups, width, c)``."""
    return _whole(x, width).unflatten(2, (-1, width))


def _share(lse: Tensor, whole: Tensor) -> Tensor:
    """What a part with ``lse`` has of the whole; 0 where nothing is seen."""
    return (lse - whole.masked_fill(whole == -torch.inf, 0)).exp()


def _merge(own: tuple[Tensor, Tensor], above: tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Partial results of rows merged with those of the groups of ``width`` rows they stand in."""
    rows = own[0].shape[2]
    (out, lse), (far_out, far_lse) = (
        [_groups(x, width) for x in own],
        [x[:, :, : -(-rows // width), None] for x in above],
    )
    whole = torch.logaddexp(lse, far_lse)
    merged = out * _share(lse, whole) + far_out * _share(far_lse, whole)
    return merged.flatten(2, 3)[:, :, :rows], whole.flatten(2, 3)[:, :, :rows]


def _ascend(
    whole: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], above: tuple[Tensor, Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the output and log-sum-exp ``above`` that were merged into ``whole``.

    Args:
        whole: Merged output and log-sum-exp of the rows.
        grads: Their gradients.
        above: What was merged into groups of ``width`` rows.
        width: Rows of a group.
    """
    groups = above[0].shape[2]
    out, grad_out, grad_lse = (_groups(x, width) for x in (whole[0], *grads))
    # Rows that fill up the last group have no share.
    lse = F.pad(whole[1], (0, 0, 0, -whole[1].shape[2] % width), value=torch.inf).unflatten(2, (-1, width))
    far_out, far_lse = (x[:, :, : out.shape[2], None] for x in above)
    share = _share(far_lse, lse)
    of_out = (share * grad_out).sum(3)
    of_lse = (share * ((grad_out * (far_out - out)).sum(-1, keepdim=True) + grad_lse)).sum(3)
    missing = groups - out.shape[2]
    return F.pad(of_out, (0, 0, 0, missing)), F.pad(of_lse, (0, 0, 0, missing))


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: PooledPattern,
    key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bidirectional fast multipole attention with pooled queries.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides, more than two blocks of tokens.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Sizes of the groups.
        key_padding: ``(b, n)`` boolean, true where a token is real; others take no part in the mean of a query either.

    Returns:
        Output ``(b, h, n, e)``, the values' type, 0 where a query sees no key; log-sum-exp ``(b, h, n)``, float32
        (float64 for float64 values), -inf where a query sees no key.
    """
    levels = _Levels(query, key, value, scale, pattern, key_padding)
    out, lse = _merge(levels.near.forward(), levels.descend()[0], pattern.block)
    return out.to(value.dtype).contiguous(), lse.squeeze(3).to(statistics_dtype(value)).contiguous()


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: PooledPattern, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward``, of query, key and value, each of its input's shape and type.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
        key_padding: As in ``forward``.
    """
    levels = _Levels(query, key, value, scale, pattern, key_padding)
    dtype, m, p = levels.dtype, pattern.block, pattern.rank
    merged = levels.descend()
    whole = out.to(dtype), log_sum_exp.to(dtype)[..., None]
    of_lse = torch.zeros_like(whole[1]) if grad_log_sum_exp is None else grad_log_sum_exp.to(dtype)[..., None]
    grads = grad_out.to(dtype), of_lse
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for at, (attention, width) in enumerate(zip([levels.near, *levels.far], [m] + [2] * pattern.levels)):
        slope = (grads[0] * whole[0]).sum(-1, keepdim=True) - grads[1]
        found.append(attention.backward(whole[1], slope, grads[0]))
        if at < pattern.levels:
            grads = _ascend(whole, grads, merged[at], width)
            whole = merged[at]
    grad_query, grad_key, grad_value = (x.contiguous() for x in found[0])
    shares = [torch.zeros_like(x) for x in (grad_query, grad_key, grad_value)]
    sides = ((levels.queries, m), (levels.keys, m // p), (levels.values, m // p))
    for which, (side, part) in enumerate(sides):
        _pool_backward([level[which] for level in found[1:]], side.counts, part, shares[which])
    hidden = None if key_padding is None else ~key_padding[:, None, :, None]
    results = []
    for which, (near, far) in enumerate(zip((grad_query, grad_key, grad_value), shares)):
        if hidden is not None:
            far = far.masked_fill(hidden, 0)
            near = near if which == 0 else near.masked_fill(hidden, 0)
        results.append((near + far).to((query, key, value)[which].dtype))
    return results[0], results[1], results[2]
