"""Running summaries of clusters in Triton: what ``kernels/aten/cast_scan.py`` loops over, chunks side by side.

Each of the four functions is three launches. First every chunk of ``T`` tokens makes what it adds to each cluster, as
it stands at the chunk's end (``scan_given``), or asks of each cluster, as it stands before the chunk (``scan_asked``).
``scan_walk`` then goes through the chunks, forwards or backwards, and leaves at each what all others before it on that
way come to; only this walk is serial, and it is one multiplication and one addition for a number. Last every chunk
takes what was carried to it and adds what its own tokens mean to each other.

Every exponent is a difference of float64 masses of the past, rounded after the subtraction: at most 0, and what comes
later has no part in it. Every number has one writer, nothing is added atomically.

Layout as in ``kernels/aten/cast_affinity.py``: a lane is a key head of a sequence, with ``n`` tokens and ``R`` query heads,
so ``n R`` rows; ``C`` clusters, ``E`` channels. A chunk has ``T`` tokens and ``R`` tiles of ``T`` rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.cast_scan import ClusterScan
from fastattn_compile.kernels.gpu.launch import HEAVY, LIGHT, padded, precision
from fastattn_compile.kernels.gpu.online import COUNTS

# Tiles: tokens, clusters of what is carried and of what is mixed, channels; numbers of the walk. Larger ones do not
# leave registers enough for masses of float64 on an A100.
_CHUNK, _CARRIED, _MIXED, _CHANNELS, _ENTRIES = 64, 64, 32, 32, 256


@triton.jit
def chunk_of(A, MASS, OWN, lane, chunk, batch, n, C: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr):
    """Logits, masses and clusters of a chunk's tokens, its first token among those of all lanes, and how many it has.

    ``SHARED``: all heads have the same masses.
    """
    sequence, start = lane % batch, chunk * T
    first = (sequence if SHARED else lane) * n + start
    return A + first, MASS + first * C, OWN + sequence * n + start, lane * n + start, tl.minimum(n - start, T)


@triton.jit
def reaching(A, MASS, own, j, left, C: tl.constexpr):
    """``exp(a_j - z_t)`` at the cluster of ``j`` and the last token ``t`` of a chunk of ``left``: ``(j,)``."""
    a = tl.load(A + j, mask=own >= 0, other=0.0).to(tl.float64)
    z = tl.load(MASS + (left - 1) * C + own, mask=own >= 0, other=0.0)
    return tl.exp(tl.where(own >= 0, a - z, float("-inf")).to(tl.float32))


@triton.jit
def decayed(A, MASS, own, t, j, left, C: tl.constexpr):
    """``exp(a_j - z_t)`` at the cluster of ``j``, 0 unless ``j <= t``: ``(t, j)``, and where it is not 0."""
    met = (own >= 0)[None, :] & (j[None, :] <= t[:, None]) & (t < left)[:, None]
    a = tl.load(A + j, mask=own >= 0, other=0.0).to(tl.float64)
    z = tl.load(MASS + t[:, None] * C + own[None, :], mask=met, other=0.0)
    return tl.exp(tl.where(met, a[None, :] - z, float("-inf")).to(tl.float32)), met


@triton.jit
def carried(MASS, chunk, t, c, left, C: tl.constexpr):
    """What remains at ``t`` of a summary at the chunk's start: ``(t, c)``."""
    before = tl.load(MASS - C + c, mask=(c < C) & (chunk > 0), other=float("-inf"))
    real = (t < left)[:, None] & (before != float("-inf"))[None, :]
    now = tl.load(MASS + t[:, None] * C + c[None, :], mask=real, other=0.0)
    return tl.exp(tl.where(real, before[None, :] - now, float("-inf")).to(tl.float32))


@triton.jit
def matrix(X, row, rows, column, columns, WIDTH: tl.constexpr):
    """A tile of rows of ``WIDTH``; 0 where the row or the column is none."""
    return tl.load(
        X + row[:, None] * WIDTH + column[None, :], mask=rows[:, None] & columns[None, :], other=0.0
    )


@triton.jit
def products(X, i, left, Y, j, right, E: tl.constexpr, PRECISION: tl.constexpr, BE: tl.constexpr):
    """``x_i . y_j`` of the first ``left`` and ``right`` rows: ``(i, j)``."""
    made = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        x, y = matrix(X, i, i < left, e, e < E, E), matrix(Y, j, j < right, e, e < E, E)
        made = tl.dot(x, tl.trans(y), made, input_precision=PRECISION)
    return made


@triton.jit(do_not_specialize=COUNTS)
def scan_given(
    A, MASS, OWN, VALUE, STATE, batch, n,
    C: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to its clusters, ``(C, E)``, as it stands at its end."""
    chunk, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    blocks: tl.constexpr = (E + BE - 1) // BE
    c = tl.program_id(2) // blocks * BC + tl.arange(0, BC)
    e = tl.program_id(2) % blocks * BE + tl.arange(0, BE)
    j = tl.arange(0, T)
    own = tl.load(OWN + j, mask=j < left, other=-1)
    value = matrix(VALUE + first * E, j, j < left, e, e < E, E) * reaching(A, MASS, own, j, left, C)[:, None]
    member = tl.where(c[:, None] == own[None, :], 1.0, 0.0)
    given = tl.dot(member, value, input_precision=PRECISION)
    STATE += (lane * tl.num_programs(0) + chunk) * C * E
    tl.store(STATE + c[:, None] * E + e[None, :], given, mask=(c < C)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def scan_asked(
    A, MASS, OWN, WEIGHT, QUERY, SCORE, STATE, SCORED, batch, n,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, HAS_SCORE: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """What the rows of one chunk ask of the clusters before it, ``(C, E)``, and with it their scores ``(C,)``."""
    chunk, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    blocks: tl.constexpr = (E + BE - 1) // BE
    c = tl.program_id(2) // blocks * BC + tl.arange(0, BC)
    e = tl.program_id(2) % blocks * BE + tl.arange(0, BE)
    asked, scored = tl.zeros([BC, BE], tl.float32), tl.zeros([BC], tl.float32)
    for tile in range(R):
        i = tile * T + tl.arange(0, T)
        weight = matrix(WEIGHT + first * R * C, i, i < left * R, c, c < C, C)
        weight *= carried(MASS, chunk, i // R, c, left, C)
        query = matrix(QUERY + first * R * E, i, i < left * R, e, e < E, E)
        asked = tl.dot(tl.trans(weight), query, asked, input_precision=PRECISION)
        if HAS_SCORE:
            scored += tl.sum(weight * matrix(SCORE + first * R * C, i, i < left * R, c, c < C, C), 0)
    state = (lane * tl.num_programs(0) + chunk) * C
    at = STATE + state * E + c[:, None] * E + e[None, :]
    tl.store(at, asked, mask=(c < C)[:, None] & (e < E)[None, :])
    if HAS_SCORE:
        tl.store(SCORED + state + c, scored, mask=(c < C) & (tl.program_id(2) % blocks == 0))


@triton.jit(do_not_specialize=COUNTS)
def scan_walk(
    MASS, STATE, batch, n, chunks,
    C: tl.constexpr, W: tl.constexpr, SHARED: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Puts in place of what each chunk gives, ``(C, W)``, what those before it on the way come to."""
    lane, x = tl.program_id(1).to(tl.int64), tl.program_id(0) * B + tl.arange(0, B)
    MASS += (lane % batch if SHARED else lane) * n * C
    carry = tl.zeros([B], tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        at = STATE + (lane * chunks + chunk) * C * W + x
        given = tl.load(at, mask=x < C * W, other=0.0)
        tl.store(at, carry, mask=x < C * W)
        start = tl.cast(chunk, tl.int64) * T
        last = tl.minimum(n - chunk * T, T) - 1 + tl.arange(0, 1)
        carry = tl.sum(carried(MASS + start * C, chunk, last, x // W, T, C), 0) * carry + given


@triton.jit(do_not_specialize=COUNTS)
def scan_mix(
    A, MASS, OWN, WEIGHT, VALUE, STATE, OUT, batch, n, chunks,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``ClusterScan.mix`` of one tile of rows: tokens of its chunk, and summaries at the chunk's start."""
    chunk, lane = tl.program_id(0) // R, tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    WEIGHT += first * R * C
    STATE += (lane * chunks + chunk) * C * E
    i, j = tl.program_id(0) % R * T + tl.arange(0, T), tl.arange(0, T)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    own = tl.load(OWN + j, mask=j < left, other=-1)
    share, met = decayed(A, MASS, own, i // R, j, left, C)
    share *= tl.load(WEIGHT + i[:, None] * C + own[None, :], mask=met, other=0.0)
    out = tl.dot(share, matrix(VALUE + first * E, j, j < left, e, e < E, E), input_precision=PRECISION)
    for begin in range(0, C, BC):
        c = begin + tl.arange(0, BC)
        weight = matrix(WEIGHT, i, i < left * R, c, c < C, C) * carried(MASS, chunk, i // R, c, left, C)
        out = tl.dot(weight, matrix(STATE, c, c < C, e, e < E, E), out, input_precision=PRECISION)
    at = OUT + first * R * E + i[:, None] * E + e[None, :]
    tl.store(at, out, mask=(i < left * R)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def scan_score(
    A, MASS, OWN, QUERY, VALUE, STATE, OUT, batch, n, chunks,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``ClusterScan.score`` of one tile of rows: pairs of its chunk by cluster, and summaries at the chunk's start."""
    chunk, lane = tl.program_id(0) // R, tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    QUERY += first * R * E
    STATE += (lane * chunks + chunk) * C * E
    i, j = tl.program_id(0) % R * T + tl.arange(0, T), tl.arange(0, T)
    own = tl.load(OWN + j, mask=j < left, other=-1)
    pairs = products(VALUE + first * E, j, left, QUERY, i, left * R, E, PRECISION, BE)
    pairs *= tl.trans(decayed(A, MASS, own, i // R, j, left, C)[0])
    for begin in range(0, C, BC):
        c = begin + tl.arange(0, BC)
        out = products(STATE, c, C, QUERY, i, left * R, E, PRECISION, BE)
        out *= tl.trans(carried(MASS, chunk, i // R, c, left, C))
        member = tl.where(c[:, None] == own[None, :], 1.0, 0.0)
        out = tl.dot(member, pairs, out, input_precision=PRECISION)
        at = OUT + first * R * C + i[None, :] * C + c[:, None]
        tl.store(at, out, mask=(i < left * R)[None, :] & (c < C)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def scan_transposed(
    A, MASS, OWN, WEIGHT, QUERY, STATE, OUT, batch, n,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``ClusterScan.transposed`` of one chunk: what its rows ask of its tokens, and what later chunks do."""
    chunk, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    j, e = tl.arange(0, T), tl.program_id(2) * BE + tl.arange(0, BE)
    own = tl.load(OWN + j, mask=j < left, other=-1)
    later = matrix(STATE + (lane * tl.num_programs(0) + chunk) * C * E, own, own >= 0, e, e < E, E)
    out = reaching(A, MASS, own, j, left, C)[:, None] * later
    for tile in range(R):
        i = tile * T + tl.arange(0, T)
        share, met = decayed(A, MASS, own, i // R, j, left, C)
        share *= tl.load(WEIGHT + first * R * C + i[:, None] * C + own[None, :], mask=met, other=0.0)
        query = matrix(QUERY + first * R * E, i, i < left * R, e, e < E, E)
        out = tl.dot(tl.trans(share), query, out, input_precision=PRECISION)
    at = OUT + first * E + j[:, None] * E + e[None, :]
    tl.store(at, out, mask=(j < left)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def scan_logits(
    A, MASS, OWN, WEIGHT, QUERY, VALUE, SCORE, STATE, SCORED, OUT, batch, n,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``ClusterScan.logit_gradient`` of one chunk; pairs are subtracted before they are summed."""
    chunk, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, MASS, OWN, first, left = chunk_of(A, MASS, OWN, lane, chunk, batch, n, C, SHARED, T)
    VALUE += first * E
    j = tl.arange(0, T)
    own = tl.load(OWN + j, mask=j < left, other=-1)
    state = (lane * tl.num_programs(0) + chunk) * C
    later = -tl.load(SCORED + state + own, mask=own >= 0, other=0.0)
    for begin in range(0, E, BE):
        e = begin + tl.arange(0, BE)
        asked = matrix(STATE + state * E, own, own >= 0, e, e < E, E)
        later += tl.sum(asked * matrix(VALUE, j, j < left, e, e < E, E), 1)
    out = reaching(A, MASS, own, j, left, C) * later
    for tile in range(R):
        i = tile * T + tl.arange(0, T)
        # As in scan_score: where one token is all of a summary, its product minus its score is 0.
        pairs = products(VALUE, j, left, QUERY + first * R * E, i, left * R, E, PRECISION, BE)
        share, met = decayed(A, MASS, own, i // R, j, left, C)
        at = first * R * C + i[:, None] * C + own[None, :]
        share *= tl.load(WEIGHT + at, mask=met, other=0.0)
        out += tl.sum((tl.trans(pairs) - tl.load(SCORE + at, mask=met, other=0.0)) * share, 0)
    tl.store(OUT + first + j, out, mask=j < left)


class Scan(ClusterScan):
    """``ClusterScan`` in Triton; everything is float32 but the masses."""

    def __init__(self, log_weight: Tensor, log_mass: Tensor, assigned: Tensor) -> None:
        self.given = log_weight.contiguous(), log_mass.contiguous(), assigned.int().contiguous()
        self.batch, self.length = assigned.shape
        self.clusters, self.chunks = log_mass.shape[-1], -(-self.length // _CHUNK)
        self.carried, self.mixed = (min(most, padded(self.clusters)) for most in (_CARRIED, _MIXED))
        self.common = {"C": self.clusters, "SHARED": log_mass.shape[0] == 1, "T": _CHUNK}
        self.product = {"PRECISION": precision(log_weight.dtype), **HEAVY}

    def mix(self, weight: Tensor, value: Tensor) -> Tensor:
        """``ClusterScan.mix``."""
        weight, value = weight.contiguous(), value.contiguous()
        out = value.new_empty(*weight.shape[:4], value.shape[-1])
        group, lanes, channels, sizes = self._sizes(out)
        scan_mix[(self.chunks * group, lanes, channels)](
            *self.given, weight, value, self._given(value), out, self.batch, self.length, self.chunks, R=group,
            BC=self.mixed, **sizes,
        )  # fmt: skip
        return out

    def score(self, query: Tensor, value: Tensor) -> Tensor:
        """``ClusterScan.score``."""
        query, value = query.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:4], self.clusters)
        group, lanes, _, sizes = self._sizes(query)
        scan_score[(self.chunks * group, lanes)](
            *self.given, query, value, self._given(value), out, self.batch, self.length, self.chunks, R=group,
            BC=self.mixed, **sizes,
        )  # fmt: skip
        return out

    def transposed(self, weight: Tensor, query: Tensor) -> Tensor:
        """``ClusterScan.transposed``."""
        weight, query = weight.contiguous(), query.contiguous()
        out = query.new_empty(*query.shape[:3], query.shape[-1])
        group, lanes, channels, sizes = self._sizes(query)
        scan_transposed[(self.chunks, lanes, channels)](
            *self.given, weight, query, self._asked(weight, query, None)[0], out, self.batch, self.length, R=group,
            **sizes,
        )  # fmt: skip
        return out

    def logit_gradient(self, weight: Tensor, query: Tensor, value: Tensor, score: Tensor) -> Tensor:
        """``ClusterScan.logit_gradient``."""
        weight, query, value, score = (x.contiguous() for x in (weight, query, value, score))
        out = query.new_empty(query.shape[:3])
        group, lanes, _, sizes = self._sizes(query)
        scan_logits[(self.chunks, lanes)](
            *self.given, weight, query, value, score, *self._asked(weight, query, score), out, self.batch, self.length,
            R=group, **sizes,
        )  # fmt: skip
        return out

    def _sizes(self, x: Tensor) -> tuple[int, int, int, dict[str, object]]:
        """Query heads of a lane, lanes and tiles of channels of ``(g, b, n, r, e)``, and constants of its kernels."""
        block = min(_CHANNELS, padded(x.shape[-1]))
        sizes = {**self.common, **self.product, "E": x.shape[-1], "BE": block}
        return x.shape[3], x.shape[0] * x.shape[1], -(-x.shape[-1] // block), sizes

    def _given(self, value: Tensor) -> Tensor:
        """Summaries at the start of each chunk, ``(g, b, chunks, c, e)``, of values ``(g, b, n, e)``."""
        state = value.new_empty(*value.shape[:2], self.chunks, self.clusters, value.shape[-1])
        _, lanes, channels, sizes = self._sizes(value[..., None, :])
        scan_given[(self.chunks, lanes, -(-self.clusters // self.carried) * channels)](
            *self.given, value, state, self.batch, self.length, BC=self.carried, **sizes
        )
        return self._walked(state, reverse=False)

    def _asked(self, weight: Tensor, query: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What later chunks ask of each cluster as it reaches the end of each chunk, and the sums of their scores."""
        state = query.new_empty(*query.shape[:2], self.chunks, self.clusters, query.shape[-1])
        scored = None if score is None else query.new_empty(*state.shape[:4], 1)
        group, lanes, channels, sizes = self._sizes(query)
        scan_asked[(self.chunks, lanes, -(-self.clusters // self.carried) * channels)](
            *self.given, weight, query, score, state, scored, self.batch, self.length, R=group, BC=self.carried,
            HAS_SCORE=score is not None, **sizes,
        )  # fmt: skip
        if scored is not None:
            self._walked(scored, reverse=True)
        return self._walked(state, reverse=True), scored

    def _walked(self, state: Tensor, reverse: bool) -> Tensor:
        """What chunks give, in place what is carried to them."""
        lanes, width = state.shape[:2].numel(), state.shape[-1]
        scan_walk[(-(-self.clusters * width // _ENTRIES), lanes)](
            self.given[1], state, self.batch, self.length, self.chunks, W=width, REVERSE=reverse, B=_ENTRIES,
            **self.common, **LIGHT,
        )  # fmt: skip
        return state


def obstacle(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why these kernels cannot serve a call of ``kernels.aten.cast_causal``; empty when they can."""
    if any(x.dtype == torch.float64 for x in (query, key, value)):
        return "float64 is not computed on tensor cores"
    return ""
