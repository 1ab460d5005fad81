"""Fast multipole attention as an ONNX body: one gather, one product, one softmax, one product, for any length.

The pooled parts of every level stand in one array. A table of row numbers, computed from the number of blocks, says which
of them each block meets; a bias of the logarithms of how many tokens a row stands for says which rows count. So the body
has few nodes (a session loads in a time that grows with their square), and pads nothing but the last block and the last
pair of parts of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.blocks import Blocks, Met, Pooled
from fastattn_compile.lowering.onnx.body import (
    Body,
    BodyInputs,
    BodySpec,
    hidden,
    only,
)
from fastattn_compile.lowering.onnx.rotary import turned
from fastattn_compile.lowering.onnx.writer import FAR, OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no
from fastattn_compile.operators.fma.config import level_count


def _supports(operator: Operator, spec: BodySpec) -> Support:
    if operator.config.basis != "mean":
        return no(f"its ONNX body serves the mean basis only, not {operator.config.basis!r}")
    if operator.config.boundary != "clean":
        return no(f"its ONNX body serves the clean boundary only, not {operator.config.boundary!r}")
    plain = type(operator.config)(
        block=operator.config.block, rank=operator.config.rank, sinks=operator.config.sinks,
        scale_attn=operator.config.scale_attn, rotary_base=operator.config.rotary_base,
        rotary_dim=operator.config.rotary_dim, rotary_interleaved=operator.config.rotary_interleaved,
    )  # fmt: skip
    if plain != operator.config:
        given = [f.name for f in fields(plain) if getattr(plain, f.name) != getattr(operator.config, f.name)]
        told = ", ".join(f"{name}={getattr(operator.config, name)!r}" for name in given)
        return no(f"its ONNX body does not serve {told}")
    if spec.mask.left is not None or spec.mask.right not in (None, 0):
        return no(
            f"its ONNX body serves causal and bidirectional attention without a window, not {spec.mask}"
        )
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "block": config.block, "rank": config.rank, "sinks": config.sinks, "scale_attn": int(config.scale_attn),
        "longest": spec.longest,
    }  # fmt: skip


def _rotary_attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        **_attributes(operator, spec), "rotary_base": float(config.rotary_base),
        "rotary_dim": config.rotary_dim or spec.head_dim, "rotary_interleaved": int(config.rotary_interleaved),
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    return _Writing(w, operator, spec, given).write()


class _Writing(Blocks):
    """One body. Besides what ``Blocks`` names: ``p`` rank."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        config = operator.config
        self.p, self.weighted, self.causal = config.rank, config.scale_attn, spec.mask.causal
        self.levels = level_count(spec.longest, config.block)
        self.rotary = config.rotary(spec.head_dim)
        self.near = (2 if self.causal else 3) * config.block
        super().__init__(w, spec, given, config.block, config.sinks, self.near + self._far_slots())

    def _checked(self, blocks: ir.Value) -> ir.Value:
        """The number of blocks; more than the levels can cover stop the run with an index out of range."""
        w = self.w
        over = w.cast(w.op("Greater", blocks, [1 << (self.levels + 1)]), ir.DataType.INT64)
        return w.op("Mul", blocks, w.op("Gather", [1], over, axis=0))

    def _meet(self, taken: ir.Value) -> Met:
        near, there = self._stretch(-self.m, self.near)
        bias = self.w.op("Where", there, 0.0, hidden(self.spec))
        if not self.levels:
            return Met(near, self._masked(bias))
        counts = self._levels(self.w.cast(taken, self.spec.dtype), 1)
        table, met = self._table()
        (key, head_dim), (value, value_dim) = self._sides()
        if self.rotary is not None:
            key = turned(self.w, key, self._positions, self.rotary, back=True)
        keys, values = (self._means(x, taken, counts, c) for x, c in ((key, head_dim), (value, value_dim)))
        if self.rotary is not None:
            keys = turned(self.w, keys, self._centres(taken), self.rotary)
        bias = self.w.op("Concat", bias, self._far_bias(counts, table, met), axis=3)
        return Met(near, self._masked(bias), Pooled(keys, values, table))

    def _sink_bias(self) -> ir.Value:
        """The sink slots serve blocks apart from the sink's own; nearer ones meet it as a token: ``(b, 1, k, 1, s)``."""
        w = self.w
        block = w.op("Reshape", w.range(self.blocks), [1, -1, 1])
        distance = w.op("Sub", block, w.op("Unsqueeze", w.op("Div", self._places, [self.m]), [1]))
        apart = w.op("Greater", distance if self.causal else w.op("Abs", distance), 1)
        seen = w.op("And", apart, w.op("Unsqueeze", self._exists, [1]))
        return w.op("Unsqueeze", w.op("Where", seen, 0.0, hidden(self.spec)), [1, 3])

    # Rows: tokens, then the parts of groups, level by level.

    def _far_slots(self) -> int:
        return self.levels * (2 if self.causal else 4) * self.p

    @cached_property
    def _live_slots(self) -> ir.Value:
        """Far slots of the levels that blocks of this length meet; the others cost nothing."""
        w = self.w
        met = w.cast(w.op("Greater", self.blocks, w.constant(2 << np.arange(self.levels))), ir.DataType.INT64)
        return w.op("Mul", w.op("ReduceSum", met, [0], keepdims=1), [self._far_slots() // self.levels])

    @cached_property
    def _rows_of_levels(self) -> ir.Value:
        """Rows of every level: its groups stand in pairs, ``2 * ceil(k / 2^(level + 1))`` of them."""
        w = self.w
        widths = w.constant(2 << np.arange(self.levels))
        return w.op(
            "Mul", w.op("Div", w.op("Sub", w.op("Add", self.blocks, widths), [1]), widths), [2 * self.p]
        )

    @cached_property
    def _pads(self) -> list[ir.Value]:
        """What fills the rows of every level up to whole pairs of groups, the same for keys, values and counts."""
        w, rows = self.w, self._rows_of_levels
        made = w.op("Mul", self.blocks, [self.p])
        if self.levels > 1:
            made = w.op("Concat", made, w.op("Div", w.slice(rows, 0, -1, 0), [2]), axis=0)
        missing = w.op("Sub", rows, made)
        each = w.op("Split", missing, [1] * self.levels, outputs=self.levels, axis=0)
        return [w.join([0, 0, 0, 0, 0, 0, x, 0]) for x in (each if self.levels > 1 else (each,))]

    def _levels(self, x: ir.Value, channels: int, taken: ir.Value | None = None) -> list[ir.Value]:
        """Sums over the parts of the groups of every level, ``(b, g, rows, c)`` each.

        Args:
            x: ``(b, g, n', c)``, 0 where a token is not pooled.
            channels: ``c``.
            taken: ``(1, 1, n', 1)``: which of the first block's tokens are pooled, where ``x`` does not say so.
        """
        w, sums, width = self.w, [], self.m // self.p
        given = w.slice(x, 0, self.m, 2) if taken is not None else x
        for level in range(self.levels):
            x = self._summed(x, 2 if level else width, channels)
            if taken is not None and not level:
                # The first block again, without the sinks: cheaper than to write all tokens anew.
                first = w.op("Mul", given, w.cast(w.slice(taken, 0, self.m, 2), self.spec.dtype))
                x = w.op("Concat", self._summed(first, width, channels), w.slice(x, self.p, FAR, 2), axis=2)
            x = w.op("Pad", x, self._pads[level])
            sums.append(x)
        return sums

    def _summed(self, x: ir.Value, width: int, channels: int) -> ir.Value:
        """Sums of ``width`` rows each."""
        split = self.w.op("Reshape", x, [0, 0, -1, width, channels])
        result: ir.Value = self.w.op("ReduceSum", split, [3], keepdims=0)
        return result

    def _means(self, x: ir.Value, taken: ir.Value, counts: list[ir.Value], channels: int) -> ir.Value:
        """Means of the parts of all levels, ``(b, g, rows, c)``."""
        w = self.w
        x = w.op("Pad", x, w.join([0, 0, 0, 0, 0, 0, self.missing, 0]))
        if self.padding is not None:
            x = w.op("Mul", x, w.cast(taken, self.spec.dtype))
        sums = self._levels(x, channels, taken if self.padding is None and self.sinks else None)
        means = [w.op("Div", s, w.op("Max", count, 1.0)) for s, count in zip(sums, counts)]
        result: ir.Value = w.op("Concat", *means, axis=2) if len(means) > 1 else means[0]
        return result

    @cached_property
    def _positions(self) -> ir.Value:
        """Positions of the tokens, counted over real ones, ``(b or 1, 1, n, 1)`` in float64."""
        w = self.w
        if self.padding is None:
            places = w.op("Reshape", w.range(self.length), [1, 1, -1, 1])
        else:
            number = w.op("CumSum", w.cast(self.padding, ir.DataType.INT64), w.constant(1))
            places = w.op("Unsqueeze", w.op("Max", w.op("Sub", number, 1), 0), [1, 3])
        return w.cast(places, ir.DataType.DOUBLE)

    def _centres(self, taken: ir.Value) -> ir.Value:
        """Mean positions of what the rows of all levels stand for, ``(b or 1, 1, rows, 1)`` in float64."""
        w, double = self.w, ir.DataType.DOUBLE
        pooled = w.cast(taken, double)
        place = w.op("Pad", self._positions, w.join([0, 0, 0, 0, 0, 0, self.missing, 0]))
        sums, counts = (self._levels(x, 1) for x in (w.op("Mul", place, pooled), pooled))
        one = w.constant(1.0, double)
        means = [w.op("Div", s, w.op("Max", count, one)) for s, count in zip(sums, counts)]
        result: ir.Value = w.op("Concat", *means, axis=2) if len(means) > 1 else means[0]
        return result

    def _table(self) -> tuple[ir.Value, ir.Value]:
        """Which part every far slot of every block meets, ``(k, far)``, and whether it does."""
        w, p = self.w, self.p
        block = w.op("Unsqueeze", w.range(self.blocks), [1])
        sides = np.array([-1] if self.causal else [-1, 1])
        grid = np.meshgrid(np.arange(self.levels), sides, np.arange(2 * p), indexing="ij")
        level, side, row = (x.reshape(-1) for x in grid)
        child = row // p
        before = w.op("CumSum", self._rows_of_levels, w.constant(0), exclusive=1)
        start = w.op("Gather", before, w.constant(level), axis=0)
        parent = w.op("Add", w.op("Div", block, w.constant(2 << level)), w.constant(side))
        # The second child of the query's own parent is 1; the child beside the query's group belongs to a finer level.
        own = w.op("Mod", w.op("Div", block, w.constant(1 << level)), [2])
        allowed = w.op(
            "Not", w.op("Less", w.op("Mul", w.op("Sub", w.constant(child), own), w.constant(side)), 0)
        )
        first = w.op("Mul", w.op("Add", w.op("Mul", parent, [2]), w.constant(child)), w.constant(1 << level))
        inside = w.op("And", w.op("GreaterOrEqual", parent, 0), w.op("Less", first, self.blocks))
        met = w.op("And", allowed, inside)
        far = w.op("Add", w.op("Add", w.op("Mul", parent, [2 * p]), w.constant(row)), start)
        table = w.op("Where", met, far, 0)
        return w.slice(table, 0, self._live_slots, 1), w.slice(met, 0, self._live_slots, 1)

    def _far_bias(self, counts: list[ir.Value], table: ir.Value, met: ir.Value) -> ir.Value:
        """Logarithms of how many tokens a part stands for, hidden where it is not met, ``(b, 1, k, far)``."""
        w = self.w
        every = w.op("Squeeze", w.op("Concat", *counts, axis=2) if len(counts) > 1 else counts[0], [3])
        mass = w.op("Gather", every, table, axis=2)
        there = w.op("And", w.op("Greater", mass, 0.0), met)
        weight = w.op("Log", w.op("Max", mass, 1.0)) if self.weighted else w.constant(0.0)
        result: ir.Value = w.op("Where", there, weight, hidden(self.spec))
        return result

    def _masked(self, bias: ir.Value) -> ir.Value:
        """``(b, 1, k, t)`` with the causal mask, ``(b, 1, k, r or 1, t)``."""
        w, m, spec = self.w, self.m, self.spec
        bias = w.op("Unsqueeze", bias, [3])
        if not self.causal:
            return bias
        rows, keys = np.arange(m)[:, None], np.arange(self.near)[None] - m
        future = np.where(keys <= rows, 0.0, hidden(spec))
        ahead = np.concatenate([future, np.zeros((m, self._far_slots()))], 1)
        every = w.constant(np.tile(ahead, (spec.group, 1)), spec.dtype)
        if self.levels:
            every = w.slice(every, 0, w.op("Add", self._live_slots, [self.near]), 1)
        return w.op("Add", bias, every)


BODY = Body("FMA", 1, _supports, _write, _attributes)
# A node by another name: native kernels know the first alone.
ROTARY_BODY = Body("FMARotary", 1, _supports, _write, _rotary_attributes)
