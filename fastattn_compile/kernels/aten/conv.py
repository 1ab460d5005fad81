"""Conv-basis attention on ATen, forward and backward: anchors, profiles, and the form of the sums.

Works on the heads of one sequence at a time, as many as fit a bounded working set: memory is O(k n + n d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import conv_fft, conv_gather
from fastattn_compile.kernels.aten.conv_pattern import Pattern, make_sides, triangles
from fastattn_compile.kernels.aten.conv_profiles import Side, profile_gradients, row_maxima
from fastattn_compile.kernels.aten.conv_sums import Buckets, fast_length
from fastattn_compile.kernels.tiles import statistics_dtype, work_dtype

# Elements of the profiles of the heads that are worked on together.
_PROFILE_BUDGET = 1 << 24

# An operation of a transform takes as long as this many of a gathered tile (2.5 to 6 measured on CPU, n 512
# to 4096).
FFT_PENALTY = 4.0


class RangeError(ArithmeticError):
    """The scores span more orders of magnitude than the named form of the sums can tell apart."""


@dataclass(frozen=True)
class Lanes:
    """Some key heads of one sequence, in the type of the work; shapes as in ``conv_anchors``, ``b`` is 1."""

    batch: int
    heads: slice
    query: Tensor
    key: Tensor
    value: Tensor
    log_weight: Tensor
    top_weight: Tensor
    sides: tuple[Side, ...]
    seen: Tensor
    hidden: Tensor

    @property
    def weight(self) -> Tensor:
        """Factor of every key, the largest of a lane 1; 0 for hidden keys."""
        return (self.log_weight - self.top_weight).exp()


def _seen(pattern: Pattern, hidden: Tensor) -> Tensor:
    """Rows that see a key: ``(b, 1, 1, n)``, from running counts of the keys that are not hidden."""
    n = hidden.shape[1]
    place = torch.arange(n, device=hidden.device)
    low = torch.zeros_like(place) if pattern.left is None else (place - pattern.left).clamp(0, n)
    high = torch.full_like(place, n) if pattern.right is None else (place + pattern.right + 1).clamp(0, n)
    count = torch.nn.functional.pad((~hidden).long().cumsum(1), (1, 0))
    return (count[:, high] - count[:, torch.minimum(low, high)] > 0)[:, None, None]


def make_lanes(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden: Tensor | None,
    offset_bias: Tensor | None,
    key_bias: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[Lanes]:
    """The work, portion by portion, with anchors and profiles made; arguments as of ``forward``.

    Args:
        pattern: Anchors, band and arithmetic.
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        hidden: ``(b, n)`` keys nobody sees.
        offset_bias: ``(h, 2 n - 1)``.
        key_bias: ``(b or 1, h or 1, n)``.
        dtype: Type of the work.
    """
    batch, kv_heads, n, _ = key.shape
    group = query.shape[1] // kv_heads
    together = max(1, _PROFILE_BUDGET // max(1, group * pattern.terms * n))
    for b in range(batch):
        gone = torch.zeros(1, n, dtype=torch.bool, device=key.device) if hidden is None else hidden[b : b + 1]
        for head in range(0, kv_heads, together):
            chosen = slice(head, min(head + together, kv_heads))
            q = query[b : b + 1].unflatten(1, (kv_heads, group))[:, chosen].to(dtype)
            k, v = (x[b : b + 1, chosen, None].to(dtype) for x in (key, value))
            log_weight = torch.zeros(1, 1, 1, n, dtype=dtype, device=key.device)
            if key_bias is not None:
                rows = key_bias[b : b + 1] if key_bias.shape[0] > 1 else key_bias
                spread = rows.to(dtype).expand(1, kv_heads * group, n)
                log_weight = spread.unflatten(1, (kv_heads, group))[:, chosen]
                gone = gone | (rows == -torch.inf).all(1)
            if bool(gone.any()):
                q, k, v = (x.masked_fill(gone[:, None, None, :, None], 0) for x in (q, k, v))
                log_weight = log_weight.masked_fill(gone[:, None, None], -torch.inf)
            bias = None
            if offset_bias is not None:
                bias = offset_bias.to(dtype).unflatten(0, (kv_heads, group))[chosen]
            top = log_weight.amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)
            sides = make_sides(pattern, q, k, scale, gone, bias)
            seen = _seen(pattern, gone)
            if pattern.uncovered == "zeros":
                seen = magnitudes(sides, seen) > -torch.inf
            yield Lanes(b, chosen, q, k, v, log_weight, top, sides, seen, gone)


def _place(into: Tensor, part: Tensor, lanes: Lanes) -> None:
    """Writes ``(1, g, r, ...)`` of some heads into ``(b, h, ...)``."""
    group = part.shape[2]
    into[lanes.batch].unflatten(0, (-1, group))[lanes.heads] = part[0].to(into.dtype)


def _part(x: Tensor, lanes: Lanes, group: int, dtype: torch.dtype) -> Tensor:
    """The heads' part of a ``(b, h, ...)`` tensor as ``(1, g, r, ...)``."""
    return x[lanes.batch].unflatten(0, (-1, group))[lanes.heads][None].to(dtype)


def magnitudes(sides: Sequence[Side], seen: Tensor) -> Tensor:
    """At least the largest score of every row: ``(b, g, r, n)``, -inf where a row sees no key."""
    best = row_maxima(sides[0])
    for side in sides[1:]:
        best = torch.maximum(best, row_maxima(side))
    return best.masked_fill(~seen, -torch.inf)


def _single(sides: Sequence[Side], seen: Tensor) -> Buckets:
    """One bucket for all rows, its top the largest score of the lane."""
    top = torch.stack([side.profile.amax((-2, -1)) for side in sides]).amax(0)[..., None]
    return Buckets(top.expand(*top.shape[:3], seen.shape[-1]).masked_fill(~seen, -torch.inf), float("inf"))


def fft_flops(
    n: int, terms: int, value_dim: int, sides: int, buckets: int = 1, sharing: int = 1, longest: int = 0
) -> float:
    """Floating-point operations of one query head by transforms (specification section 10).

    Args:
        n: Tokens.
        terms: Segments of a triangle.
        value_dim: Channels of the values.
        sides: Triangles.
        buckets: Buckets of rows.
        sharing: Query heads that share the transforms of the values, because their segments are the same.
        longest: Columns of the longest segment; 0 when the segments are of one length.
    """
    size = fast_length(n + (longest or -(-n // terms)))
    one = 2.5 * size * math.log2(max(2, size))
    transforms = terms * (value_dim + 1) / sharing + buckets * (terms + value_dim + 1)
    return sides * (one * transforms + 4.0 * size * terms * (value_dim + 1) * buckets)


def gather_flops(n: int, value_dim: int) -> float:
    """Floating-point operations of one query head by gathered tiles: the product with the values."""
    return 2.0 * n * n * (value_dim + 1)


def prefers_gather(pattern: Pattern, n: int, value_dim: int, buckets: int = 1) -> bool:
    """Whether gathered tiles are predicted cheaper than transforms at this length."""
    sides = len(triangles(pattern, n))
    return gather_flops(n, value_dim) <= FFT_PENALTY * fft_flops(n, pattern.terms, value_dim, sides, buckets)


def _by_tiles(pattern: Pattern, value: Tensor) -> bool:
    """Whether gathered tiles are the form of choice whatever the values."""
    return pattern.form == "gather" or (pattern.form == "auto" and prefers_gather(pattern, *value.shape[2:]))


def work_type(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    """The type of the work: the wider of transforms and inputs; that of the inputs for tiles."""
    inputs = work_dtype(query, key, value)
    return inputs if _by_tiles(pattern, value) else torch.promote_types(pattern.transform, inputs)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    hidden: Tensor | None = None,
    offset_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Conv-basis attention.

    Args:
        query: ``(b, h, n, d)``, floating point, any strides.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Anchors, band and arithmetic.
        hidden: ``(b, n)`` keys nobody sees; what stands there is never read.
        offset_bias: ``(h, 2 n - 1)`` added score of ``i - j = -(n - 1) .. n - 1``.
        key_bias: ``(b or 1, h or 1, n)`` added score of every key.

    Returns:
        Output ``(b, h, n, e)``, the values' type; log-sum-exp ``(b, h, n)``, float32 (float64 for float64
        values).

    Raises:
        RangeError: The form ``"fft"`` or ``"buckets"`` is named and the range of the scores does not allow
        it.
    """
    batch, heads, n, _ = query.shape
    out = value.new_empty(batch, heads, n, value.shape[3])
    log_sum_exp = value.new_empty(batch, heads, n, dtype=statistics_dtype(value))
    given = query, key, value, scale, hidden, offset_bias, key_bias
    for lanes in make_lanes(pattern, *given, work_type(pattern, query, key, value)):
        part, lse = _forward(pattern, lanes)
        _place(out, part, lanes)
        _place(log_sum_exp, lse, lanes)
    return out, log_sum_exp


def _forward(pattern: Pattern, lanes: Lanes) -> tuple[Tensor, Tensor]:
    n, value_dim = lanes.value.shape[3:]
    auto = pattern.form == "auto"
    if _by_tiles(pattern, lanes.value[:, 0]):
        return conv_gather.forward(lanes.sides, lanes.value, lanes.log_weight)
    problem = "the largest scores of the rows lie too far apart for one transform"
    for form in ("fft", "buckets"):
        if pattern.form not in ("auto", form):
            continue
        if form == "fft":
            buckets = _single(lanes.sides, lanes.seen)
        else:
            buckets = Buckets(magnitudes(lanes.sides, lanes.seen), pattern.width)
            problem = "within a bucket the transforms lose a row (key weights or hidden keys shrink it)"
            if auto and prefers_gather(pattern, n, value_dim, len(buckets.live)):
                break
        out, lse, trusted = conv_fft.forward(lanes.sides, lanes.value, lanes.weight, lanes.seen, buckets)
        if trusted:
            return out, lse + lanes.top_weight
    if not auto:
        raise RangeError(
            f"form {pattern.form!r}: {problem}, or an input is not finite; use form 'auto' or 'gather'"
        )
    return conv_gather.forward(lanes.sides, lanes.value, lanes.log_weight)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    pattern: Pattern,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None = None,
    hidden: Tensor | None = None,
    offset_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``forward``, positions of the anchors held constant.

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
        hidden: As in ``forward``.
        offset_bias: As in ``forward``.
        key_bias: As in ``forward``.

    Returns:
        Gradients of query, key, value, and of the two biases where they are given; shapes and types of the
        inputs.
    """
    dtype = work_type(pattern, query, key, value)
    group = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    grad_offset = None if offset_bias is None else torch.zeros_like(offset_bias, dtype=dtype)
    heads_bias = None if key_bias is None else key_bias.new_zeros(*query.shape[:3], dtype=dtype)
    given = query, key, value, scale, hidden, offset_bias, key_bias
    for lanes in make_lanes(pattern, *given, dtype):
        b = lanes.batch
        o, g, lse = (_part(x, lanes, group, dtype) for x in (out, grad_out, log_sum_exp))
        rho = (o * g).sum(-1)
        if grad_log_sum_exp is not None:
            rho = rho - _part(grad_log_sum_exp, lanes, group, dtype)
        slopes, dv, dweight, dq, dk = _backward(pattern, lanes, scale, lse, g, rho, grad_offset is not None)
        dq, dk = (x.masked_fill(lanes.hidden[:, None, None, :, None], 0) for x in (dq, dk))
        _place(grad_query, dq, lanes)
        grad_key[b, lanes.heads], grad_value[b, lanes.heads] = (
            dk[0, :, 0].to(key.dtype),
            dv[0, :, 0].to(value.dtype),
        )
        if heads_bias is not None:
            _place(heads_bias, dweight, lanes)
        if grad_offset is not None:
            n = key.shape[2]
            into = grad_offset.unflatten(0, (-1, group))[lanes.heads]
            for side, slope in zip(lanes.sides, slopes):
                by_offset = slope[0].sum(-2)
                if side.flipped:
                    into[..., :n] += by_offset.flip(-1)
                else:
                    into[..., n - 1 :] += by_offset
    if grad_offset is not None and offset_bias is not None:
        grad_offset = grad_offset.to(offset_bias.dtype)
    if heads_bias is not None and key_bias is not None:
        shared = [dim for dim in (0, 1) if key_bias.shape[dim] == 1]
        heads_bias = (heads_bias.sum(shared, keepdim=True) if shared else heads_bias).to(key_bias.dtype)
    return grad_query, grad_key, grad_value, grad_offset, heads_bias


def _backward(
    pattern: Pattern,
    lanes: Lanes,
    scale: float,
    lse: Tensor,
    grad_out: Tensor,
    rho: Tensor,
    want_slopes: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Slopes of the profiles, then the gradients of value, log weight, query and key."""
    n, value_dim = lanes.value.shape[3:]
    slopes_needed = want_slopes or not pattern.formula
    gather = _by_tiles(pattern, lanes.value[:, 0])
    buckets = None
    if not gather:
        magnitude = magnitudes(lanes.sides, lanes.seen)
        buckets = Buckets(magnitude, pattern.width)
        if pattern.form == "auto":
            # The formula sends d channels through the operator for every value channel.
            channels = value_dim * (lanes.query.shape[-1] if pattern.formula else 1)
            transforms = fft_flops(n, pattern.terms, channels, len(lanes.sides), len(buckets.live))
            gather = gather_flops(n, 2 * value_dim) <= 2 * FFT_PENALTY * transforms
            # Rows far below their largest score (its key is hidden or light), or not finite, take the tiles.
            depth = magnitude - (lse - lanes.top_weight)
            gather = gather or not bool(((depth < pattern.width) | ~lanes.seen).all())
    formula = (lanes.query, lanes.key, scale) if pattern.formula else None
    direct: tuple[Tensor, Tensor] | None
    if gather or buckets is None:
        slopes, dv, dweight, direct = conv_gather.backward(
            lanes.sides, lanes.value, lanes.log_weight, lse, grad_out, rho, slopes_needed, formula
        )
    else:
        shifted = lse - lanes.top_weight
        slopes, dv, dweight = conv_fft.backward(
            lanes.sides, lanes.value, lanes.weight, shifted, grad_out, rho, buckets, slopes_needed
        )
        direct = None
        if formula is not None:
            direct = conv_fft.formula_gradients(
                lanes.sides,
                lanes.query,
                lanes.key,
                lanes.value,
                scale,
                lanes.weight,
                shifted,
                grad_out,
                rho,
                buckets,
            )
    if direct is None:
        dq, dk = torch.zeros_like(lanes.query), torch.zeros_like(lanes.key)
        for side, slope in zip(lanes.sides, slopes):
            q, k = side.turn(lanes.query, 3), side.turn(lanes.key, 3)
            side_q, side_k = profile_gradients(q, k, scale, side, slope)
            dq += side.turn(side_q, 3)
            dk += side.turn(side_k, 3)
    else:
        dq, dk = direct
    return slopes, dv, dweight, dq, dk
