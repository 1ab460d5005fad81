"""Tree attention without scores, in Triton: sums of values below the nodes of trees, and the means along a path.

Rows come in chunks as in ``kernels/aten/treeformer_tc.py``, whose functions these are. All nodes of a tree stand in one
table in heap order: node ``j`` of level ``l`` at ``2^l - 1 + j``. ``tc_spread`` sums the rows of a chunk by node, all
levels in one product with a matrix that index comparisons make; ``tc_prefix`` turns the sums of chunks into those of
the chunks before (or after) each; ``tc_counts``, ``tc_read`` and ``tc_dots`` own a tile of queries, ``tc_give`` a tile
of keys. Inside its own chunk a causal query meets keys pair by pair: two rows share the node of a level where their
leaf numbers agree but for the last bits. No atomics.

Sizes: ``u`` units, ``r`` query heads of a unit, ``c`` chunks, ``t`` rows of a chunk, ``E`` channels, ``H`` height, ``L``
its leaves, ``N = 2 L - 1`` nodes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_tc import (
    Cut,
    Levels,
    Members,
    TreeGradients,
    Weighting,
    key_members,
    query_members,
)
from fastattn_compile.kernels.gpu.launch import HEAVY, LIGHT, padded, precision
from fastattn_compile.kernels.gpu.online import COUNTS

# Heights up to which the product with all nodes of a tree is cheaper than sorting rows by node.
_MOST_HEIGHT = 8
_NODES, _ROWS, _CHANNELS, _ENTRIES = 64, 64, 32, 256


@triton.jit(do_not_specialize=COUNTS)
def tc_spread(
    X, LEAF, WEIGHT, SCALAR, OUT, SUM, group, chunks, rows, E: tl.constexpr, H: tl.constexpr, BY_LEVEL: tl.constexpr,
    HAS_SUM: tl.constexpr, PRECISION: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Weighted sums of one chunk's rows for some nodes, ``(u, c, N, E)``; with ``HAS_SUM`` of ``SCALAR`` too.

    Weights and scalars are one of a row, or with ``BY_LEVEL`` one for each level, ``(u, group, c, t, H + 1)``.
    """
    chunk, unit, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (E + BE - 1) // BE
    node, e = part // blocks * BJ + tl.arange(0, BJ), part % blocks * BE + tl.arange(0, BE)
    level = tl.zeros([BJ], tl.int32)
    for depth in tl.static_range(1, H + 1):
        level += (node >= (1 << depth) - 1).to(tl.int32)
    number, acc, total = node + 1 - (1 << level), tl.zeros([BJ, BE], tl.float32), tl.zeros([BJ], tl.float32)
    for member in range(group):
        base = ((unit.to(tl.int64) * group + member) * chunks + chunk) * rows
        for begin in range(0, rows, BT):
            t = begin + tl.arange(0, BT)
            leaf = tl.load(LEAF + base + t, mask=t < rows, other=0)
            inside = ((leaf[None, :] >> (H - level)[:, None]) == number[:, None]) & (t < rows)[None, :]
            at = (
                (base + t)[None, :] * (H + 1) + level[:, None]
                if BY_LEVEL
                else (base + t)[None, :] + level[:, None] * 0
            )
            weight = tl.load(WEIGHT + at, mask=inside, other=0.0)
            x = tl.load(
                X + (base + t)[:, None] * E + e[None, :],
                mask=(t < rows)[:, None] & (e < E)[None, :],
                other=0.0,
            )
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
            if HAS_SUM:
                total += tl.sum(tl.load(SCALAR + at, mask=inside, other=0.0), 1)
    nodes: tl.constexpr = 2 * (1 << H) - 1
    at = (unit.to(tl.int64) * chunks + chunk) * nodes + node
    tl.store(OUT + at[:, None] * E + e[None, :], acc, mask=(node < nodes)[:, None] & (e < E)[None, :])
    if HAS_SUM:
        tl.store(SUM + at, total, mask=(node < nodes) & (part % blocks == 0))


@triton.jit(do_not_specialize=COUNTS)
def tc_prefix(X, OUT, chunks, entries, REVERSE: tl.constexpr, TOTAL: tl.constexpr, B: tl.constexpr):
    """Sums over the chunks before each (after each, ``REVERSE``) of ``(u, c, entries)``; ``TOTAL``: over all chunks."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    unit, mask, acc = tl.program_id(1).to(tl.int64), at < entries, tl.zeros([B], tl.float32)
    for step in range(chunks):
        row = (unit * chunks + (chunks - 1 - step if REVERSE else step)) * entries
        if not TOTAL:
            tl.store(OUT + row + at, acc, mask=mask)
        acc += tl.load(X + row + at, mask=mask, other=0.0)
    if TOTAL:
        tl.store(OUT + unit * entries + at, acc, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def tc_counts(
    COUNT, QUERY_LEAF, KEY_LEAF, REAL, OUT, group, chunks, rows, tiles, H: tl.constexpr, CAUSAL: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Keys that one tile of queries finds in the nodes of its paths, ``(u, r, c, t, H + 1)``."""
    chunk, part, lane = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    unit, nodes = lane // group, 2 * (1 << H) - 1
    i = part * BT + tl.arange(0, BT)
    row = (lane * chunks + chunk) * rows + i
    leaf = tl.load(QUERY_LEAF + row, mask=i < rows, other=0)
    table = COUNT + (unit * chunks + chunk if CAUSAL else unit) * nodes
    for level in range(H + 1):
        node = leaf >> (H - level)
        count = tl.load(table + (1 << level) - 1 + node)
        if CAUSAL:
            for begin in range(0, part * BT + BT, BT):
                j = begin + tl.arange(0, BT)
                key = (unit * chunks + chunk) * rows + j
                other = tl.load(KEY_LEAF + key, mask=j < rows, other=0) >> (H - level)
                real = tl.load(REAL + key, mask=j < rows, other=0.0)
                seen = (node[:, None] == other[None, :]) & (j[None, :] <= i[:, None])
                count += tl.sum(tl.where(seen, real[None, :], 0.0), 1)
        tl.store(OUT + row * (H + 1) + level, count, mask=i < rows)


@triton.jit
def shared_weights(
    FACTOR, query, key, i, j, row, real, rows, H: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """``(queries, keys)`` sums of the queries' factors over the levels whose nodes a pair shares, 0 for a hidden key."""
    total = tl.zeros([BT, BN], tl.float32)
    for level in range(H + 1):
        factor = tl.load(FACTOR + row * (H + 1) + level, mask=i < rows, other=0.0)
        same = (query >> (H - level))[:, None] == (key >> (H - level))[None, :]
        total += tl.where(same, factor[:, None], 0.0)
    return tl.where((j[None, :] <= i[:, None]) & (real > 0)[None, :], total, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def tc_read(
    TABLE, FACTOR, VALUE, QUERY_LEAF, KEY_LEAF, REAL, OUT, group, chunks, rows, tiles, E: tl.constexpr, H: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Output of one tile of queries: the sums of its paths, times its factors."""
    chunk, part, lane = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    unit, nodes = lane // group, 2 * (1 << H) - 1
    i, e = part * BT + tl.arange(0, BT), tl.program_id(2) * BE + tl.arange(0, BE)
    row = (lane * chunks + chunk) * rows + i
    leaf = tl.load(QUERY_LEAF + row, mask=i < rows, other=0)
    table = TABLE + (unit * chunks + chunk if CAUSAL else unit) * nodes * E
    acc = tl.zeros([BT, BE], tl.float32)
    for level in range(H + 1):
        at = ((1 << level) - 1 + (leaf >> (H - level))) * E
        factor = tl.load(FACTOR + row * (H + 1) + level, mask=i < rows, other=0.0)
        acc += factor[:, None] * tl.load(table + at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
    if CAUSAL:
        for begin in range(0, part * BT + BT, BT):
            j = begin + tl.arange(0, BT)
            key = (unit * chunks + chunk) * rows + j
            other, real = (
                tl.load(KEY_LEAF + key, mask=j < rows, other=0),
                tl.load(REAL + key, mask=j < rows, other=0.0),
            )
            weight = shared_weights(FACTOR, leaf, other, i, j, row, real, rows, H, BT, BT)
            v = tl.load(
                VALUE + key[:, None] * E + e[None, :], mask=(j < rows)[:, None] & (e < E)[None, :], other=0.0
            )
            acc = tl.dot(weight, v, acc, input_precision=PRECISION)
    tl.store(OUT + row[:, None] * E + e[None, :], acc, mask=(i < rows)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def tc_dots(
    TABLE, GRAD, VALUE, QUERY_LEAF, KEY_LEAF, REAL, OUT, group, chunks, rows, tiles, E: tl.constexpr, H: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Products of one tile of gradients with the sums of their paths, ``(u, r, c, t, H + 1)``."""
    chunk, part, lane = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    unit, nodes = lane // group, 2 * (1 << H) - 1
    i, h = part * BT + tl.arange(0, BT), tl.arange(0, BH)
    row = (lane * chunks + chunk) * rows + i
    leaf = tl.load(QUERY_LEAF + row, mask=i < rows, other=0)
    table = TABLE + (unit * chunks + chunk if CAUSAL else unit) * nodes * E
    total = tl.zeros([BT, BH], tl.float32)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        grad = tl.load(
            GRAD + row[:, None] * E + e[None, :], mask=(i < rows)[:, None] & (e < E)[None, :], other=0.0
        )
        for level in range(H + 1):
            at = ((1 << level) - 1 + (leaf >> (H - level))) * E
            x = tl.load(table + at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
            total += tl.where((h == level)[None, :], tl.sum(grad * x, 1)[:, None], 0.0)
        if CAUSAL:
            for begin in range(0, part * BT + BT, BT):
                j = begin + tl.arange(0, BT)
                key = (unit * chunks + chunk) * rows + j
                other = tl.load(KEY_LEAF + key, mask=j < rows, other=0)
                real = tl.load(REAL + key, mask=j < rows, other=0.0)
                v = tl.load(
                    VALUE + key[:, None] * E + e[None, :],
                    mask=(j < rows)[:, None] & (e < E)[None, :],
                    other=0.0,
                )
                pair = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                pair = tl.where((j[None, :] <= i[:, None]) & (real > 0)[None, :], pair, 0.0)
                for level in range(H + 1):
                    same = (leaf >> (H - level))[:, None] == (other >> (H - level))[None, :]
                    total += tl.where(
                        (h == level)[None, :], tl.sum(tl.where(same, pair, 0.0), 1)[:, None], 0.0
                    )
    tl.store(OUT + row[:, None] * (H + 1) + h[None, :], total, mask=(i < rows)[:, None] & (h <= H)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def tc_give(
    TABLE, FACTOR, GRAD, QUERY_LEAF, KEY_LEAF, REAL, OUT, group, chunks, rows, tiles, E: tl.constexpr, H: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of values: what the queries of later chunks left at its nodes, and its own chunk's."""
    chunk, part, unit = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    nodes = 2 * (1 << H) - 1
    j, e = part * BT + tl.arange(0, BT), tl.program_id(2) * BE + tl.arange(0, BE)
    key = (unit * chunks + chunk) * rows + j
    leaf, real = (
        tl.load(KEY_LEAF + key, mask=j < rows, other=0),
        tl.load(REAL + key, mask=j < rows, other=0.0),
    )
    table = TABLE + (unit * chunks + chunk if CAUSAL else unit) * nodes * E
    acc = tl.zeros([BT, BE], tl.float32)
    for level in range(H + 1):
        at = ((1 << level) - 1 + (leaf >> (H - level))) * E
        acc += tl.load(table + at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
    if CAUSAL:
        for member in range(group):
            base = ((unit * group + member) * chunks + chunk) * rows
            for begin in range(part * BT, rows, BT):
                i = begin + tl.arange(0, BT)
                query = tl.load(QUERY_LEAF + base + i, mask=i < rows, other=0)
                weight = shared_weights(FACTOR, query, leaf, i, j, base + i, real, rows, H, BT, BT)
                grad = tl.load(
                    GRAD + (base + i)[:, None] * E + e[None, :],
                    mask=(i < rows)[:, None] & (e < E)[None, :],
                    other=0.0,
                )
                acc = tl.dot(tl.trans(weight), grad, acc, input_precision=PRECISION)
    acc = tl.where((real > 0)[:, None], acc, 0.0)
    tl.store(OUT + key[:, None] * E + e[None, :], acc, mask=(j < rows)[:, None] & (e < E)[None, :])


def obstacle(cut: Cut, value: Tensor) -> str:
    """Why these kernels cannot serve a call of ``treeformer_tc``; empty when they can."""
    if value.dtype != torch.float32:
        return f"sums are made in float32, got {value.dtype}"
    if cut.height > _MOST_HEIGHT:
        return f"a tree of height {cut.height}: beyond {_MOST_HEIGHT} the sums of all nodes by products do not pay"
    return ""


class _Launches:
    """Launches the kernels for one cut, and reads their tables."""

    def __init__(self, cut: Cut, value: Tensor) -> None:
        self.cut, self.value, self.channels = cut, value.contiguous(), value.shape[-1]
        self.units, self.chunks, self.rows = cut.key_leaf.shape
        self.group, self.query_chunks, self.query_rows = cut.query_leaf.shape[1:]
        self.query_leaf, self.key_leaf = cut.query_leaf.int().contiguous(), cut.key_leaf.int().contiguous()
        self.real = cut.real.float().contiguous()
        self.nodes = (2 << cut.height) - 1
        self.block = min(_CHANNELS, padded(self.channels))
        self.blocks = -(-self.channels // self.block)
        self.common = {"H": cut.height, "CAUSAL": cut.causal, "BT": _ROWS, **HEAVY}
        self.products = {
            **self.common,
            "E": self.channels,
            "PRECISION": precision(torch.float32),
            "BE": self.block,
        }

    def spread(self, x: Tensor, of_keys: bool, weight: Tensor, scalar: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of what each chunk meets: sums of the chunks before (keys) or after (queries) it."""
        group, chunks, rows = (
            (1, self.chunks, self.rows) if of_keys else (self.group, self.query_chunks, self.query_rows)
        )
        sums = x.new_empty(self.units, chunks, self.nodes, self.channels)
        scalars = x.new_empty(self.units, chunks, self.nodes)
        nodes = min(_NODES, padded(self.nodes))
        tc_spread[(chunks, self.units, -(-self.nodes // nodes) * self.blocks)](
            x, self.key_leaf if of_keys else self.query_leaf, weight, scalar, sums, scalars, group, chunks, rows,
            E=self.channels, H=self.cut.height, BY_LEVEL=not of_keys, HAS_SUM=True, PRECISION=precision(torch.float32),
            BJ=nodes, BT=_ROWS, BE=self.block, **HEAVY,
        )  # fmt: skip
        return self._prefix(sums, not of_keys), self._prefix(scalars, not of_keys)

    def _prefix(self, x: Tensor, reverse: bool) -> Tensor:
        causal, entries = self.cut.causal, x[0, 0].numel()
        out = torch.empty_like(x) if causal else x.new_empty(x.shape[0], 1, *x.shape[2:])
        tc_prefix[(-(-entries // _ENTRIES), self.units)](
            x, out, x.shape[1], entries, REVERSE=reverse and causal, TOTAL=not causal, B=_ENTRIES, **LIGHT
        )
        return out

    def counts(self, count: Tensor) -> Tensor:
        """Keys along the paths, ``(u, r, c, t, H + 1)``."""
        out = count.new_empty(*self.cut.query_leaf.shape, self.cut.height + 1)
        tc_counts[self._of_queries()](
            count, self.query_leaf, self.key_leaf, self.real, out, *self._query_sizes(), **self.common
        )
        return out

    def read(self, table: Tensor, factor: Tensor) -> Tensor:
        """Sums of the paths times their factors, ``(u, r, c, t, e)``."""
        out = table.new_empty(*self.cut.query_leaf.shape, self.channels)
        tiles, lanes = self._of_queries()
        tc_read[(tiles, lanes, self.blocks)](
            table, factor, self.value, self.query_leaf, self.key_leaf, self.real, out, *self._query_sizes(),
            **self.products,
        )  # fmt: skip
        return out

    def dots(self, table: Tensor, grad: Tensor) -> Tensor:
        """Gradients times the sums of the paths, ``(u, r, c, t, H + 1)``."""
        out = table.new_empty(*self.cut.query_leaf.shape, self.cut.height + 1)
        tc_dots[self._of_queries()](
            table, grad, self.value, self.query_leaf, self.key_leaf, self.real, out, *self._query_sizes(),
            BH=max(2, triton.next_power_of_2(self.cut.height + 1)), **self.products,
        )  # fmt: skip
        return out

    def give(self, table: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
        """Gradients of the values, ``(u, c, t, e)``."""
        out = torch.empty_like(self.value)
        tiles = -(-self.rows // _ROWS)
        tc_give[(self.chunks * tiles, self.units, self.blocks)](
            table, factor, grad, self.query_leaf, self.key_leaf, self.real, out, self.group, self.chunks, self.rows,
            tiles, **self.products,
        )  # fmt: skip
        return out

    def levels(self, table: Tensor) -> Levels:
        """A table in heap order level by level, root first."""
        return [table[:, :, (1 << level) - 1 : (2 << level) - 1] for level in range(self.cut.height + 1)]

    def _of_queries(self) -> tuple[int, int]:
        return self.query_chunks * -(-self.query_rows // _ROWS), self.units * self.group

    def _query_sizes(self) -> tuple[int, int, int, int]:
        return self.group, self.query_chunks, self.query_rows, -(-self.query_rows // _ROWS)


def forward(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """``treeformer_tc.forward`` in Triton.

    Args:
        cut: The tokens.
        value: ``(u, c, t, e)`` float32, 0 where ``cut.real`` is.
        weighting: Weights of the levels.

    Returns:
        Output ``(u, r, c, t, e)``; number of keys that each query sees, ``(u, r, c, t)``.
    """
    launch = _Launches(cut, value)
    sums, counts = launch.spread(launch.value, True, launch.real, launch.real)
    seen = launch.counts(counts)
    return launch.read(sums, weighting.weights(seen) / seen.clamp(min=1) * (seen > 0)), seen[..., 0]


def backward(
    cut: Cut, value: Tensor, weighting: Weighting, grad_out: Tensor, of_queries: Members, of_keys: Members
) -> TreeGradients:
    """``treeformer_tc.backward`` in Triton; the gradients of memberships are made on ATen from its tables.

    Args:
        cut: As in ``forward``.
        value: As in ``forward``.
        weighting: As in ``forward``.
        grad_out: ``(u, r, c, t, e)``, 0 where there is no query.
        of_queries: As in ``treeformer_tc.backward``.
        of_keys: As in ``treeformer_tc.backward``.
    """
    launch = _Launches(cut, value)
    grad_out = grad_out.contiguous()
    sums, counts = launch.spread(launch.value, True, launch.real, launch.real)
    seen = launch.counts(counts)
    weights = weighting.weights(seen)
    factor = (weights / seen.clamp(min=1) * (seen > 0)).contiguous()
    mean_dot = launch.dots(sums, grad_out) / seen.clamp(min=1)
    later, later_dots = launch.spread(grad_out, False, factor, (factor * mean_dot).contiguous())
    grad_value = launch.give(later, factor, grad_out)
    if cut.height:
        pairs = torch.matmul(grad_out, value[:, None].mT) if cut.causal else None
        leaf_sums, leaf_counts = launch.levels(sums)[-1], launch.levels(counts[..., None])[-1]
        query_members(cut, leaf_sums, leaf_counts, weights, grad_out, pairs, of_queries)
        tables = launch.levels(later), launch.levels(later_dots[..., None])
        key_members(cut, value, *tables, factor, mean_dot, pairs, of_keys)
    learned = weighting.backward(weights, mean_dot)
    if not weighting.root:
        learned[..., 0] = 0
    return TreeGradients(grad_value, learned)
