"""Fast multipole attention as an ONNX body: one gather, one product, one softmax, one product, for any length.

All rows a block of queries may meet stand in one array: tokens, then the pooled parts of every level. A table of row
numbers, computed from the number of blocks, gathers what each block meets; a bias of the logarithms of how many tokens a
row stands for says which rows count. So the body has few nodes (a session loads in a time that grows with their square),
and pads nothing but the last block and the last pair of parts of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import (
    Body,
    BodyInputs,
    BodySpec,
    hidden,
    only,
)
from fastattn_compile.lowering.onnx.blocks import Blocks, Met
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
        scale_attn=operator.config.scale_attn,
    )  # fmt: skip
    if plain != operator.config:
        return no(f"its ONNX body serves none of the further options of {operator}")
    if spec.mask.left is not None or spec.mask.right not in (None, 0):
        return no(f"its ONNX body serves causal and bidirectional attention without a window, not {spec.mask}")
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "block": config.block, "rank": config.rank, "sinks": config.sinks, "scale_attn": int(config.scale_attn),
        "longest": spec.longest,
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    return _Writing(w, operator, spec, given).write()


class _Writing(Blocks):
    """One body. Besides what ``Blocks`` names: ``p`` rank."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        config = operator.config
        self.p, self.weighted, self.causal = config.rank, config.scale_attn, spec.mask.causal
        self.levels = level_count(spec.longest, config.block)
        self.near = (2 if self.causal else 3) * config.block
        super().__init__(w, spec, given, config.block, config.sinks, self.near + self._far_slots())

    def _checked(self, blocks: ir.Value) -> ir.Value:
        """The number of blocks; more than the levels can cover stop the run with an index out of range."""
        w = self.w
        over = w.cast(w.op("Greater", blocks, [1 << (self.levels + 1)]), ir.DataType.INT64)
        return w.op("Mul", blocks, w.op("Gather", [1], over, axis=0))

    def _meet(self, real: ir.Value, taken: ir.Value) -> Met:
        counts = self._levels(self.w.cast(taken, self.spec.dtype), 1)
        keys, values = (self._rows(x, taken, counts, c) for x, c in self._sides())
        table, met = self._table()
        return Met(keys, values, table, self._bias(real, counts, table, met))

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
    def _rows_of_levels(self) -> ir.Value:
        """Rows of every level: its groups stand in pairs, ``2 * ceil(k / 2^(level + 1))`` of them."""
        w = self.w
        widths = w.constant(2 << np.arange(self.levels))
        return w.op("Mul", w.op("Div", w.op("Sub", w.op("Add", self.blocks, widths), [1]), widths), [2 * self.p])

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

    def _levels(self, x: ir.Value, channels: int) -> list[ir.Value]:
        """Sums over the parts of the groups of every level, ``(b, g, rows, c)`` each.

        Args:
            x: ``(b, g, n', c)``, 0 where a token is not pooled.
            channels: ``c``.
        """
        w, sums = self.w, []
        for level in range(self.levels):
            width = 2 if level else self.m // self.p
            x = w.op("ReduceSum", w.op("Reshape", x, [0, 0, -1, width, channels]), [3], keepdims=0)
            x = w.op("Pad", x, self._pads[level])
            sums.append(x)
        return sums

    def _rows(self, x: ir.Value, taken: ir.Value, counts: list[ir.Value], channels: int) -> ir.Value:
        """All rows of keys or values, ``(b, g, rows, c)``: a block of nothing, tokens, (a block of nothing,) means."""
        w, m = self.w, self.m
        x = w.op("Pad", x, w.join([0, 0, m, 0, 0, 0, w.op("Add", self.missing, [0 if self.causal else m]), 0]))
        if not self.levels:
            return x
        tokens = w.slice(x, m, FAR if self.causal else -m, 2)
        if self.sinks or self.padding is not None:
            tokens = w.op("Mul", tokens, w.cast(taken, self.spec.dtype))
        sums = self._levels(tokens, channels)
        means = [w.op("Div", s, w.op("Max", count, 1.0)) for s, count in zip(sums, counts)]
        return w.op("Concat", x, *means, axis=2)

    def _table(self) -> tuple[ir.Value, ir.Value | None]:
        """Which row every slot of every block meets, ``(k, t)``, and whether a far slot is met at all, ``(k, far)``."""
        w, m, p = self.w, self.m, self.p
        block = w.op("Unsqueeze", w.range(self.blocks), [1])
        near = w.op("Add", w.op("Mul", block, [m]), w.constant(np.arange(self.near)))
        if not self.levels:
            return near, None
        sides = np.array([-1] if self.causal else [-1, 1])
        grid = np.meshgrid(np.arange(self.levels), sides, np.arange(2 * p), indexing="ij")
        level, side, row = (x.reshape(-1) for x in grid)
        child = row // p
        fine = w.op("Add", w.op("Mul", self.blocks, [m]), [m if self.causal else 2 * m])
        before = w.op("CumSum", self._rows_of_levels, w.constant(0), exclusive=1)
        start = w.op("Gather", w.op("Add", before, fine), w.constant(level), axis=0)
        parent = w.op("Add", w.op("Div", block, w.constant(2 << level)), w.constant(side))
        # The second child of the query's own parent is 1; the child beside the query's group belongs to a finer level.
        own = w.op("Mod", w.op("Div", block, w.constant(1 << level)), [2])
        allowed = w.op("Not", w.op("Less", w.op("Mul", w.op("Sub", w.constant(child), own), w.constant(side)), 0))
        first = w.op("Mul", w.op("Add", w.op("Mul", parent, [2]), w.constant(child)), w.constant(1 << level))
        inside = w.op("And", w.op("GreaterOrEqual", parent, 0), w.op("Less", first, self.blocks))
        met = w.op("And", allowed, inside)
        far = w.op("Add", w.op("Add", w.op("Mul", parent, [2 * p]), w.constant(row)), start)
        far = w.op("Where", met, far, 0)
        return w.op("Concat", near, far, axis=1), met

    def _bias(self, real: ir.Value, counts: list[ir.Value], table: ir.Value, met: ir.Value | None) -> ir.Value:
        """What is added to the scores, ``(b, 1, k, r or 1, t)``: logarithms of counts, hidden slots, the causal mask."""
        w, m, spec = self.w, self.m, self.spec
        fine = w.op("Pad", w.cast(real, spec.dtype), w.constant([0, 0, m, 0, 0, 0, 0 if self.causal else m, 0]))
        every = w.op("Squeeze", w.op("Concat", fine, *counts, axis=2) if counts else fine, [3])
        mass = w.op("Gather", every, table, axis=2)
        there = w.op("Greater", mass, 0.0)
        if met is not None:
            always = w.op("Expand", w.constant(np.array(True)), w.op("Concat", self.blocks, [self.near], axis=0))
            there = w.op("And", there, w.op("Concat", always, met, axis=1))
        weight = w.op("Log", w.op("Max", mass, 1.0)) if self.weighted else w.constant(0.0)
        bias = w.op("Unsqueeze", w.op("Where", there, weight, hidden(spec)), [3])
        if not self.causal:
            return bias
        rows, keys = np.arange(m)[:, None], np.arange(self.near)[None] - m
        future = np.where(keys <= rows, 0.0, hidden(spec))
        ahead = np.concatenate([future, np.zeros((m, self._far_slots()))], 1)
        return w.op("Add", bias, w.constant(np.tile(ahead, (spec.group, 1)), spec.dtype))


BODY = Body("FMA", 1, _supports, _write, _attributes)
