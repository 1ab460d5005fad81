"""Conv-basis attention in Triton: the profiles of the anchors, and the products between the transforms.

The transforms are ``torch.fft``'s. Around them stand ``conv_profile`` (columns of the scores, shifted, masked: one pass
over the queries), ``conv_weights`` (what is transformed of a profile) and ``conv_multiply`` (products of spectra summed
over terms, buckets or channels in one pass, where ATen writes each product). Words and sizes as in
``kernels/aten/conv_profiles.py`` and ``conv_sums.py``; a lane is a query head of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.conv_anchors import segment_of
from fastattn_compile.kernels.aten.conv_profiles import Side
from fastattn_compile.kernels.aten.conv_sums import ABOVE_TOP, Buckets, transform_length
from fastattn_compile.kernels.gpu.launch import LIGHT
from fastattn_compile.kernels.gpu.online import COUNTS

# Elements of the spectra of the terms that are transformed together.
_SPECTRA = 1 << 26
_ROWS, _TERMS, _ENTRIES = 64, 16, 256


@triton.jit(do_not_specialize=COUNTS)
def conv_profile(
    Q, K, BOUNDS, BIAS, PROFILE, group, n, terms, low, high, uncovered, scale,
    q_lane, q_n, q_d, k_unit, k_n, k_d, bounds_b, bounds_g, bounds_r, heads,
    D: tl.constexpr, FREE: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows with some anchors, each at its offset ``tau = row - anchor``, -inf where none is visible.

    Offsets below 0 stand for those past the last row, ``tau + n``: every place of ``(lanes, terms, n)`` is written once.
    With ``FREE`` the first term reads no key, its score is ``uncovered``.
    """
    row, term = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BT + tl.arange(0, BT)
    lane = tl.program_id(2).to(tl.int64)
    unit, here, used = lane // group, row < n, term < terms
    at = unit // heads * bounds_b + unit % heads * bounds_g + lane % group * bounds_r
    start = tl.load(BOUNDS + at + term, mask=used, other=0)
    anchor = tl.minimum(start, n - 1)
    acc = tl.zeros([BM, BT], PROFILE.dtype.element_ty)
    for d in range(D):
        q = tl.load(Q + lane * q_lane + row.to(tl.int64) * q_n + d * q_d, mask=here, other=0.0)
        k = tl.load(K + unit * k_unit + anchor.to(tl.int64) * k_n + d * k_d, mask=used, other=0.0)
        acc += q.to(acc.dtype)[:, None] * k.to(acc.dtype)[None, :]
    score = acc * scale
    if FREE:
        score = tl.where((term == 0)[None, :], uncovered, score)
    tau = row[:, None] - start[None, :]
    place = tl.where(tau < 0, tau + n, tau)
    mask = here[:, None] & used[None, :]
    if HAS_BIAS:
        score += tl.load(BIAS + lane % (heads * group) * n + place, mask=mask, other=0.0)
    seen = (tau >= 0) & (tau >= low) & (tau <= high)
    out = (lane * terms + term)[None, :] * n + place
    tl.store(PROFILE + out, tl.where(seen, score, float("-inf")).to(PROFILE.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def conv_weights(PROFILE, TOP, OUT, first, count, terms, n, size, limit, B: tl.constexpr):
    """``exp(profile - top)`` of some terms, 0 above the top, padded with 0: ``(lanes, count, size)``."""
    at, term, lane = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1), tl.program_id(2).to(tl.int64)
    profile = tl.load(PROFILE + (lane * terms + first + term) * n + at, mask=at < n, other=float("-inf"))
    shifted = profile - tl.load(TOP + lane)
    weight = tl.where(shifted > limit, 0.0, tl.exp(shifted))
    tl.store(OUT + (lane * count + term) * size + at, weight, mask=at < size)


@triton.jit(do_not_specialize=COUNTS)
def conv_multiply(
    X, Y, OUT, entries, channels, summed, group, x_lane, x_term, x_sum, x_channel, y_lane, y_term, y_sum, y_channel,
    CONJUGATE: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """``out[lane, term, channel] = sum x y`` (``x conj(y)``) over one more dimension, ``ADD`` to what is there.

    Spectra are complex numbers, their parts side by side; ``group`` lanes share one of ``x``. Strides count complex
    numbers, frequencies are contiguous.
    """
    term, f, lane = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B), tl.program_id(2).to(tl.int64)
    mask, channel = f < entries, term % channels
    x = X + 2 * (lane // group * x_lane + (term // channels).to(tl.int64) * x_term + channel * x_channel + f)
    y = Y + 2 * (lane * y_lane + (term // channels).to(tl.int64) * y_term + channel * y_channel + f)
    out = OUT + 2 * ((lane * tl.num_programs(0) + term) * entries + f)
    real = tl.zeros([B], OUT.dtype.element_ty)
    imaginary = tl.zeros([B], OUT.dtype.element_ty)
    if ADD:
        real += tl.load(out, mask=mask, other=0.0)
        imaginary += tl.load(out + 1, mask=mask, other=0.0)
    for _ in range(summed):
        a, b = tl.load(x, mask=mask, other=0.0), tl.load(x + 1, mask=mask, other=0.0)
        c, d = tl.load(y, mask=mask, other=0.0), tl.load(y + 1, mask=mask, other=0.0)
        if CONJUGATE:
            d = -d
        real += a * c - b * d
        imaginary += a * d + b * c
        x += 2 * x_sum
        y += 2 * y_sum
    tl.store(out, real, mask=mask)
    tl.store(out + 1, imaginary, mask=mask)


def obstacle(x: Tensor) -> str:
    """Why these kernels cannot serve the work in the type of ``x``; empty when they can."""
    return "" if x.dtype in (torch.float32, torch.float64) else f"transforms of {x.dtype}"


def make_side(
    query: Tensor, key: Tensor, scale: float, bounds: Tensor, band: tuple[int, int], flipped: bool,
    uncovered: float | None = None, offset_bias: Tensor | None = None,
) -> Side:  # fmt: skip
    """``conv_profiles.make_side`` in Triton; arguments as there."""
    lanes, (n, d) = query.shape[:3], query.shape[3:]
    terms, (batch, heads, group) = bounds.shape[-1] - 1, lanes
    query, key = query.flatten(0, 2), key.expand(batch, heads, 1, n, d).flatten(0, 2)
    profile = query.new_empty(*lanes, terms, n)
    bias = (
        None if offset_bias is None else offset_bias.to(query.dtype).expand(heads, group, 1, n).contiguous()
    )
    spread = bounds.expand(batch, heads, group, terms + 1)
    block = min(_TERMS, triton.next_power_of_2(terms))
    conv_profile[(-(-n // _ROWS), -(-terms // block), lanes.numel())](
        query, key, spread, bias, profile, group, n, terms, *band, 0.0 if uncovered is None else uncovered, scale,
        *query.stride(), *key.stride(), *spread.stride()[:3], heads,
        D=d, FREE=uncovered is not None, HAS_BIAS=bias is not None, BM=_ROWS, BT=block, **LIGHT,
    )  # fmt: skip
    return Side(bounds, segment_of(bounds, n), profile, flipped, int(uncovered is not None))


def _multiply(x: Tensor, y: Tensor, out: Tensor, conjugate: bool, add: bool, group: int) -> None:
    """``x (lanes / group, t or 1, s, c, f)`` and ``y (lanes, t or 1, s, c or 1, f)`` into ``out (lanes, t, c, f)``."""

    def strides(z: Tensor) -> tuple[int, ...]:
        return tuple(0 if size == 1 else step for size, step in zip(z.shape[:4], z.stride()[:4]))

    lanes, terms, channels, entries = out.shape
    parts = (torch.view_as_real(z) for z in (x, y, out))
    conv_multiply[(terms * channels, -(-entries // _ENTRIES), lanes)](
        *parts,
        entries,
        channels,
        x.shape[2],
        group,
        *strides(x),
        *strides(y),
        CONJUGATE=conjugate,
        ADD=add,
        B=_ENTRIES,
        **LIGHT,
    )


def _weights(side: Side, first: int, count: int, top: Tensor, size: int) -> Tensor:
    """Spectra of the weights of some terms, ``(lanes, count, f)``."""
    profile = side.profile.flatten(0, 2)
    lanes, terms, n = profile.shape
    out = profile.new_empty(lanes, count, size)
    tops = top.expand(*side.profile.shape[:3], 1).contiguous()
    conv_weights[(-(-size // _ENTRIES), count, lanes)](
        profile, tops, out, first, count, terms, n, size, ABOVE_TOP, B=_ENTRIES, **LIGHT
    )
    return torch.fft.rfft(out)


def _portions(side: Side, channels: int, size: int) -> list[tuple[int, Tensor]]:
    """Terms a few at a time: the first of each portion, and where their columns are, ``(b, g, r, t, n)``."""
    step = max(1, _SPECTRA // max(1, side.profile.shape[:3].numel() * channels * size))
    found = []
    for first in range(0, side.terms, step):
        term = torch.arange(first, min(first + step, side.terms), device=side.segment.device)
        found.append((first, side.segment.unsqueeze(-2) == term[:, None]))
    return found


def weighted_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.weighted_sums`` in Triton; arguments as there."""
    lanes, (c, n) = sides[0].profile.shape[:3], x.shape[3:]
    out = x.new_zeros(*lanes, c, n)
    for side in sides:
        size = transform_length(side)
        turned = side.turn(x)
        total: dict[int, Tensor] = {}
        for first, inside in _portions(side, c, size):
            wide = turned.unsqueeze(3) * inside.unsqueeze(4)
            spectrum = torch.fft.rfft(wide, size).flatten(0, 2)
            count, group = inside.shape[3], lanes.numel() // spectrum.shape[0]
            for level in buckets.live:
                weights = _weights(side, first, count, buckets.top(level), size)
                fresh = level not in total
                if fresh:
                    total[level] = spectrum.new_empty(lanes.numel(), 1, c, size // 2 + 1)
                _multiply(spectrum[:, None], weights[:, None, :, None], total[level], False, not fresh, group)
        for level, spectrum in total.items():
            rows = side.turn(torch.fft.irfft(spectrum[:, 0], size)[..., :n].unflatten(0, lanes))
            out += rows * (buckets.level == level).unsqueeze(-2)
    return out


def transposed_sums(sides: Sequence[Side], x: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.transposed_sums`` in Triton; arguments as there."""
    lanes, (c, n) = sides[0].profile.shape[:3], x.shape[3:]
    out = torch.zeros_like(x)
    for side in sides:
        size = transform_length(side)
        spectra = _bucket_spectra(side, x, buckets, size)
        for first, inside in _portions(side, c, size):
            count = inside.shape[3]
            weights = torch.stack(
                [_weights(side, first, count, buckets.top(a), size) for a in buckets.live], 2
            )
            total = spectra.new_empty(lanes.numel(), count, c, size // 2 + 1)
            _multiply(spectra[:, None], weights[:, :, :, None], total, True, False, 1)
            columns = torch.fft.irfft(total, size)[..., :n].unflatten(0, lanes)
            out += side.turn((columns * inside.unsqueeze(4)).sum(3))
    return out


def _bucket_spectra(side: Side, x: Tensor, buckets: Buckets, size: int) -> Tensor:
    """Spectra of the rows of every bucket, ``(lanes, buckets, c, f)``."""
    parts = [side.turn(x * (buckets.level == a).unsqueeze(-2)) for a in buckets.live]
    return torch.fft.rfft(torch.stack(parts, 3), size).flatten(0, 2)


def slopes(side: Side, x: Tensor, scaled: Tensor, buckets: Buckets) -> Tensor:
    """``conv_sums.slopes`` in Triton; arguments as there."""
    lanes, (c, n), size = side.profile.shape[:3], x.shape[3:], transform_length(side)
    turned, upstream = side.turn(x), _bucket_spectra(side, scaled, buckets, size)
    slope = torch.empty_like(side.profile)
    for first, inside in _portions(side, c, size):
        count = inside.shape[3]
        wide = (turned.unsqueeze(3) * inside.unsqueeze(4)).expand(*lanes, count, c, n)
        spectrum = torch.fft.rfft(wide, size).flatten(0, 2)
        found = side.profile.new_zeros(*lanes, count, n)
        for place, level in enumerate(buckets.live):
            total = spectrum.new_empty(lanes.numel(), count, 1, size // 2 + 1)
            _multiply(upstream[:, None, place, :, None], spectrum[:, :, :, None], total, True, False, 1)
            pairs = torch.fft.irfft(total[:, :, 0], size)[..., :n].unflatten(0, lanes)
            shifted = side.profile[..., first : first + count, :] - buckets.top(level).unsqueeze(-2)
            found += shifted.masked_fill(shifted > ABOVE_TOP, -torch.inf).exp() * pairs
        slope[..., first : first + count, :] = found
    return slope
