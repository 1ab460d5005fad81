"""Leaf attention as an ONNX body: queries sorted by node, tiles of them against the stretch of sorted keys they read.

Keys stand in the order of their leaves, and before every leaf a row that is no key, so that the row numbers of these
marks are the ends of all nodes. A query reads the deepest node of its path that shows it a key. Queries are sorted by that
node; a tile of them then reads one stretch of keys, as long as it needs to be, in one step of a loop: nothing is padded
to the largest leaf, and no step holds more than its own scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import (
    Body,
    BodyInputs,
    BodySpec,
    hidden,
    highest,
    lowest,
    merged,
    only,
    with_mass,
)
from fastattn_compile.lowering.onnx.trees import Leaves, Routing, supports_trees
from fastattn_compile.lowering.onnx.window import Window
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

# Queries of a tile.
_TILE = 64


def _supports(operator: Operator, spec: BodySpec) -> Support:
    config = operator.config
    support = supports_trees(operator, spec)
    if not support:
        return support
    if config.fallback == "self+window":
        return no(
            "its ONNX body has no window of its own for empty leaves; use fallback='ancestor' or 'zero'"
        )
    if config.sinks and not config.window:
        return no("its ONNX body meets sinks beside a window alone: window=1 is the token itself")
    if config.window and spec.mask.right not in (None, 0):
        return no(f"its ONNX body serves a window under causal masks and none, not {spec.mask}")
    if config.capacity or config.query_gradient == "sibling":
        return no("its ONNX body has no capacity of leaves and no siblings")
    if config.n_trees > 1 and config.combine == "union":
        return no(
            "its ONNX body takes the mean of several trees (combine='mean'), not one softmax over all of them"
        )
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "height": config.height, "n_trees": config.n_trees, "shared": int(config.shared), "fallback": config.fallback,
        "combine": config.combine, "window": config.window, "sinks": config.sinks,
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    writing = _Writing(w, operator, spec, given)
    outs = [writing.tree(tree) for tree in range(operator.config.n_trees)]
    total = outs[0]
    for out in outs[1:]:
        total = w.op("Add", total, out)
    if len(outs) > 1:
        total = w.op("Mul", total, 1 / len(outs))
    return total


@dataclass(frozen=True)
class _Reads:
    """What every query reads: rows ``first`` to ``stop - 1`` of the sorted keys, ``(b, g, q)`` each.

    Args:
        first: First row, a mark.
        stop: One past the last.
        seen: Whether any of them is visible.
        order: Sorted like this, queries that read the same node stand together.
    """

    first: ir.Value
    stop: ir.Value
    seen: ir.Value
    order: ir.Value


class _Writing:
    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        self.w, self.spec, self.config, self.given = w, spec, operator.config, given
        self.leaves = 1 << self.config.height
        self.routing = Routing(w, operator, spec, given)
        self.keys, length = w.shape(given.key, 2), w.shape(given.query, 2)
        self.rows = w.op("Add", self.keys, [self.leaves + 1])
        self.queries = w.op("Mul", length, [spec.group])
        place = w.range(length)
        last = w.op("Sub", self.keys, [1])
        if spec.mask.right is None:
            limit = w.op("Add", w.op("Mul", place, 0), last)
        else:
            if spec.mask.end_aligned:
                place = w.op("Add", place, w.op("Sub", self.keys, length))
            limit = w.op("Min", w.op("Add", place, spec.mask.right), last)
        # The last key that a query may see, ``(q,)``.
        self.limit = limit if spec.group == 1 else w.op("Tile", limit, [spec.group])
        self.units = w.op("Mul", w.shape(given.key, 0), [spec.kv_heads])
        self.value = given.value
        if given.key_padding is not None:
            self.value = w.op("Where", w.op("Unsqueeze", given.key_padding, [1, 3]), given.value, 0.0)
        self.window, self.place = self.config.window, place
        self.near = self._near() if self.window else None

    def _near(self) -> tuple[ir.Value, ir.Value]:
        """What window and sinks give, ``(b, h, n, e)``, and its log-sum-exp."""
        reach = self.window - 1
        ahead = 0 if self.spec.mask.causal else reach
        return Window(self.w, self.spec, self.given, reach, ahead, self.config.sinks).write_with_mass()

    def _last_sink(self) -> ir.Value:
        """Position of the last sink of the sequence of every unit, ``(u)``."""
        w, sinks = self.w, self.config.sinks
        if self.given.key_padding is None:
            return w.op("Expand", w.constant(sinks - 1), self.units)
        int64 = ir.DataType.INT64
        rank = w.op("CumSum", w.cast(self.given.key_padding, int64), w.constant(1))
        early = w.op("And", self.given.key_padding, w.op("LessOrEqual", rank, sinks))
        last = highest(w, w.op("Where", early, w.range(self.keys), -1), self.spec)
        shape = w.join([w.shape(last, 0), self.spec.kv_heads])
        return w.op("Reshape", w.op("Expand", last, shape), [-1])

    def tree(self, number: int) -> ir.Value:
        """The output of one tree, ``(b, h, n, e)``."""
        w, spec = self.w, self.spec
        found = self.routing.leaves(number)
        sorted_keys = self._sorted(found.key)
        reads = self._reads(found, sorted_keys)
        sorting = w.op("Add", w.op("Mul", reads.order, self.queries), w.range(self.queries))
        _, order = w.op("TopK", sorting, self.queries, outputs=2, axis=-1, largest=0)
        out = self._attend(sorted_keys, reads, order)
        back = self._flat(self._inverse(order, self.queries), self.queries)
        rows = w.op("Gather", out, back, axis=0)
        channels = spec.value_dim + bool(self.near)
        rows = w.op("Reshape", rows, w.join([w.shape(self.given.key, 0), spec.heads, -1, channels]))
        seen = w.op("Reshape", reads.seen, [0, spec.heads, -1, 1])
        if self.near is None:
            return w.op("Where", seen, rows, 0.0)
        out, mass = w.op("Split", rows, [spec.value_dim, 1], outputs=2, axis=3)
        mass = w.op("Where", seen, mass, hidden(spec))
        near, near_mass = self.near
        share = w.op("Sigmoid", w.op("Sub", mass, near_mass))
        together = w.op("Add", near, w.op("Mul", share, w.op("Sub", out, near)))
        some = w.op("Greater", w.op("Max", mass, near_mass), hidden(spec) / 2)
        result: ir.Value = w.op("Where", some, together, 0.0)
        return result

    def _sorted(self, leaf: ir.Value) -> ir.Value:
        """Key numbers in the order of leaves, ``(b, g, rows)``; the mark before leaf ``i`` has number ``m + i``."""
        w = self.w
        if self.given.key_padding is not None:
            leaf = w.op("Where", w.op("Unsqueeze", self.given.key_padding, [1]), leaf, self.leaves)
        after = w.op("Add", self.keys, 1)
        place = w.op("Add", w.op("Mul", leaf, after), w.op("Add", w.range(self.keys), 1))
        marks = w.op("Mul", w.constant(np.arange(self.leaves + 1)), after)
        target = w.join([w.shape(leaf, 0), self.spec.kv_heads, self.leaves + 1])
        every = w.op("Concat", place, w.op("Expand", marks, target), axis=2)
        _, order = w.op("TopK", every, self.rows, outputs=2, axis=-1, largest=0)
        result: ir.Value = order
        return result

    def _reads(self, found: Leaves, order: ir.Value) -> _Reads:
        w, height = self.w, self.config.height
        placed = self._inverse(order, self.rows)
        marks = w.op("Slice", placed, w.op("Neg", w.constant([self.leaves + 1])), w.constant([1 << 62]), [2])
        # What follows a mark is the first key of the leaf, or another mark: a number that no query may see.
        level = w.op("GatherElements", order, w.op("Add", w.slice(marks, 0, -1, 2), 1), axis=2)
        levels = [level]
        for _ in range(height if self.config.fallback == "ancestor" else 0):
            level = lowest(w, w.op("Reshape", level, [0, 0, -1, 2]), self.spec)
            levels.insert(0, level)
        top = height + 1 - len(levels)
        first = w.op("Concat", *levels, axis=2) if len(levels) > 1 else level
        depths = np.arange(top, height + 1)
        widths = w.constant(1 << (height - depths))
        table = w.constant((1 << depths) - (1 << top))
        path = w.op("Add", w.op("Div", w.op("Unsqueeze", found.query, [3]), widths), table)
        read = w.op("GatherElements", first, w.op("Reshape", path, [0, 0, -1]), axis=2)
        read = w.op("Reshape", read, w.op("Shape", path))
        seen = w.op("LessOrEqual", read, w.op("Unsqueeze", self.limit, [1]))
        count = w.op("ReduceSum", w.cast(seen, ir.DataType.INT64), [3], keepdims=0)
        depth = w.op("Max", w.op("Sub", count, 1), 0)
        width = w.op("Gather", widths, depth, axis=0)
        begin = w.op("Sub", found.query, w.op("Mod", found.query, width))
        start, stop = (w.op("GatherElements", marks, x, axis=2) for x in (begin, w.op("Add", begin, width)))
        return _Reads(
            start, stop, w.op("Greater", count, 0), w.op("Add", w.op("Mul", depth, self.leaves), begin)
        )

    def _inverse(self, order: ir.Value, length: ir.Value) -> ir.Value:
        """Where in an order the items stand."""
        w = self.w
        here = w.op("Add", w.op("Mul", order, 0), w.range(length))
        result: ir.Value = w.op("ScatterElements", order, order, here, axis=-1)
        return result

    def _flat(self, places: ir.Value, length: ir.Value) -> ir.Value:
        """Numbers inside a unit as numbers of rows of all units, one after another."""
        w = self.w
        base = w.op("Mul", w.op("Unsqueeze", w.range(self.units), [1]), length)
        return w.op("Reshape", w.op("Add", w.op("Reshape", places, w.join([self.units, -1])), base), [-1])

    def _attend(self, keys: ir.Value, reads: _Reads, order: ir.Value) -> ir.Value:
        """Outputs of the sorted queries, ``(u * q, e)``."""
        w, spec = self.w, self.spec
        tiles = w.op("Div", w.op("Add", self.queries, [_TILE - 1]), [_TILE])
        filled = w.op("Min", w.range(w.op("Mul", tiles, [_TILE])), w.op("Sub", self.queries, [1]))
        order = w.op("Gather", order, filled, axis=2)
        rows = self._flat(order, self.queries)
        query = w.op("Mul", merged(w, self.given.query, spec), spec.scale)
        query = w.op("Gather", w.op("Reshape", query, [-1, spec.head_dim]), rows, axis=0)
        query = w.op("Reshape", query, [-1, _TILE, spec.head_dim])
        limit = w.op("Reshape", w.op("Gather", self.limit, order, axis=0), [-1, _TILE, 1])
        ends = []
        for end in (reads.first, reads.stop):
            sorted_ends = w.op(
                "Reshape", w.op("GatherElements", end, order, axis=2), w.join([self.units, -1])
            )
            base = w.op("Mul", w.op("Unsqueeze", w.range(self.units), [1]), self.rows)
            ends.append(w.op("Reshape", w.op("Add", sorted_ends, base), [-1, _TILE, 1]))
        begin = lowest(w, w.op("Squeeze", ends[0], [2]), spec, keepdims=1)
        stop = w.op("Neg", lowest(w, w.op("Neg", w.op("Squeeze", ends[1], [2])), spec, keepdims=1))
        numbers = w.op("Reshape", keys, [-1])
        taken = self._flat(w.op("Min", keys, w.op("Sub", self.keys, [1])), self.keys)
        key, value = (
            w.op("Gather", w.op("Reshape", x, [-1, c]), taken, axis=0)
            for x, c in ((self.given.key, spec.head_dim), (self.value, spec.value_dim))
        )
        everywhere = w.range(w.op("Mul", self.units, self.rows))
        facts = [query, limit, *ends, begin, stop]
        if self.near is not None:
            place = self.place if spec.group == 1 else w.op("Tile", self.place, [spec.group])
            facts.append(w.op("Reshape", w.op("Gather", place, order, axis=0), [-1, _TILE, 1]))
            if self.config.sinks:
                of_tiles = w.op("Div", w.range(w.op("Mul", self.units, tiles)), tiles)
                facts.append(w.op("Gather", self._last_sink(), of_tiles, axis=0))

        def step(w: OnnxWriter, number: ir.Value) -> ir.Value:
            mine = [w.op("Gather", x, number, axis=0) for x in facts]
            own, last, from_row, to_row, start, end, *near = mine
            k, v, at, row = (w.op("Slice", x, start, end, [0]) for x in (key, value, numbers, everywhere))
            inside = w.op("And", w.op("GreaterOrEqual", row, from_row), w.op("Less", row, to_row))
            seen = w.op("And", inside, w.op("LessOrEqual", at, last))
            scores = w.op("MatMul", own, w.op("Transpose", k, perm=[1, 0]))
            if near:
                apart = w.op("GreaterOrEqual", w.op("Abs", w.op("Sub", at, near[0])), self.window)
                if len(near) > 1:
                    apart = w.op("And", apart, w.op("Greater", at, near[1]))
                scores = w.op("Where", w.op("And", seen, apart), scores, hidden(spec))
                return with_mass(w, scores, v, spec)
            weights = w.op("Softmax", w.op("Where", seen, scores, hidden(spec)), axis=-1)
            result: ir.Value = w.op("MatMul", weights, v)
            return result

        channels = spec.value_dim + bool(self.near)
        out = w.loop(w.op("Mul", self.units, tiles), step, [_TILE, channels])
        per_unit = w.op("Reshape", out, w.join([self.units, -1, channels]))
        return w.op("Reshape", w.slice(per_unit, 0, self.queries, 1), [-1, channels])


BODY = Body("TreeLeaf", 1, _supports, _write, _attributes)
