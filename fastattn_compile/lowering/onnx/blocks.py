"""Bodies of attention by blocks of queries: each block meets rows that a table names, and sinks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import BodyInputs, BodySpec, hidden, highest, with_mass
from fastattn_compile.lowering.onnx.writer import OnnxWriter


@dataclass(frozen=True)
class Pooled:
    """Rows that stand for several tokens.

    Args:
        keys: ``(b, g, rows, d)``.
        values: ``(b, g, rows, e)``.
        table: Row of every slot of a block, ``(k, t)``.
    """

    keys: ir.Value
    values: ir.Value
    table: ir.Value


@dataclass(frozen=True)
class Met:
    """What the blocks meet besides sinks.

    Args:
        table: Token of every slot of a block, ``(k, t)``.
        bias: Added to the scores, ``(b, 1, k, r or 1, t)``, pooled rows behind tokens.
        pooled: Pooled rows, where there are any.
    """

    table: ir.Value
    bias: ir.Value
    pooled: Pooled | None = None


class Blocks:
    """One body.

    ``m`` block, ``b`` batch (1 where nothing depends on it), ``g`` key heads, ``k`` blocks, ``c`` channels,
    ``r = group * m`` rows of a tile, ``t`` slots of a block, ``s`` sinks.
    """

    def __init__(
        self, w: OnnxWriter, spec: BodySpec, given: BodyInputs, block: int, sinks: int, slots: int
    ) -> None:
        self.w, self.spec, self.padding = w, spec, given.key_padding
        self.m, self.sinks, self.slots = block, sinks, slots
        self.length = w.shape(given.key, 2)
        self.blocks = self._checked(w.op("Div", w.op("Add", self.length, [self.m - 1]), [self.m]))
        self.missing = w.op("Sub", w.op("Mul", self.blocks, [self.m]), self.length)
        self.query, self.key, self.value = given.query, given.key, given.value
        if self.padding is not None:
            # What stands at padding may be NaN, and NaN times 0 still is.
            mine = w.op("Unsqueeze", self.padding, [1, 3])
            self.key, self.value = (w.op("Where", mine, x, 0.0) for x in (given.key, given.value))

    def _checked(self, blocks: ir.Value) -> ir.Value:
        return blocks

    def _meet(self, taken: ir.Value) -> Met:
        """The rows; ``taken``: which tokens are there and no sinks, ``(b, 1, n', 1)`` boolean."""
        raise NotImplementedError

    def _sink_bias(self) -> ir.Value:
        """Which sinks are met through their slots, as a bias ``(b, 1, k, r or 1, s)``."""
        raise NotImplementedError

    def write(self) -> ir.Value:
        """The whole computation, ``(b, h, n, e)``."""
        out, biases = self._attend(mass=False)
        return self._ungrouped(self._zeroed(out, *biases), self.spec.value_dim)

    def write_with_mass(self) -> tuple[ir.Value, ir.Value]:
        """The output where a key is seen, and the log-sum-exp, hidden where none is: ``(b, h, n, e)``, ``(b, h, n, 1)``."""
        w, channels = self.w, self.spec.value_dim
        both = self._ungrouped(self._attend(mass=True)[0], channels + 1)
        out, mass = w.op("Split", both, [channels, 1], outputs=2, axis=3)
        return out, mass

    def _attend(self, mass: bool) -> tuple[ir.Value, list[ir.Value]]:
        """A loop over blocks, so that no more than one block's rows are gathered at a time; with the biases it added.

        Args:
            mass: The log-sum-exp stands behind the channels.
        """
        w, spec, m = self.w, self.spec, self.m
        _, taken = self._tokens()
        met = self._meet(taken)
        (keys, values), table = self._rows(met)
        biases = [met.bias]
        sinks: list[ir.Value] = []
        if self.sinks:
            biases.append(self._sink_bias())
            if self.padding is None:
                table, biases = self._with_sinks(table, *biases)
            else:  # each sequence has others
                sinks = [self._at_sinks(x) for x, _ in self._sides()]
        last = w.op("Sub", self.length, [1])

        def step(w: OnnxWriter, number: ir.Value) -> ir.Value:
            # Queries beyond the end are the last one again.
            rows = w.op("Min", w.op("Add", w.op("Mul", number, m), w.constant(np.arange(m))), last)
            own = w.op("Mul", w.op("Gather", self.query, rows, axis=2), spec.scale)
            if spec.group > 1:
                own = w.op("Reshape", own, [0, spec.kv_heads, spec.group * m, spec.head_dim])
            slots = w.op("Gather", table, number, axis=0)
            met_keys, met_values = (w.op("Gather", x, slots, axis=2) for x in (keys, values))
            bias, *sink_bias = (w.op("Gather", x, number, axis=2) for x in biases)
            scores = w.op("Add", self._product(w, own, met_keys), bias)
            if sinks:
                of_sinks = w.op("Add", self._product(w, own, sinks[0]), sink_bias[0])
                scores = w.op("Concat", scores, of_sinks, axis=-1)
                met_values = w.op("Concat", met_values, sinks[1], axis=2)
            if mass:
                return with_mass(w, scores, met_values, spec)
            result: ir.Value = w.op("MatMul", w.op("Softmax", scores, axis=-1), met_values)
            return result

        rows, channels = self.spec.group * self.m, self.spec.value_dim + mass
        out = w.loop(self.blocks, step, ["batch", self.spec.kv_heads, rows, channels])
        # onnx.reference puts what steps give one after another where ONNX stacks it: this is right for both.
        out = w.op("Reshape", out, w.join([self.blocks, -1, self.spec.kv_heads, rows, channels]))
        return w.op("Transpose", out, perm=[1, 2, 0, 3, 4]), biases

    def _rows(self, met: Met) -> tuple[tuple[ir.Value, ir.Value], ir.Value]:
        """Keys and values, pooled ones behind the tokens, and the table of both: one gather a block and side."""
        w, pooled = self.w, met.pooled
        if pooled is None:
            return (self.key, self.value), met.table
        keys = w.op("Concat", self.key, pooled.keys, axis=2)
        values = w.op("Concat", self.value, pooled.values, axis=2)
        return (keys, values), w.op("Concat", met.table, w.op("Add", pooled.table, self.length), axis=1)

    def _with_sinks(
        self, table: ir.Value, bias: ir.Value, sink_bias: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Sinks that stand at the same places everywhere as further slots of the table."""
        w = self.w
        places = w.op("Expand", self._places, w.join([self.blocks, self.sinks]))
        # Both may be told once for all rows of a tile.
        rows = w.op("Mul", w.slice(bias, 0, 1, 4), 0.0)
        every = w.op("Concat", bias, w.op("Add", sink_bias, rows), axis=4)
        return w.op("Concat", table, places, axis=1), [every]

    def _sides(self) -> tuple[tuple[ir.Value, int], tuple[ir.Value, int]]:
        return (self.key, self.spec.head_dim), (self.value, self.spec.value_dim)

    def _product(self, w: OnnxWriter, query: ir.Value, keys: ir.Value) -> ir.Value:
        result: ir.Value = w.op("MatMul", query, w.op("Transpose", keys, perm=[0, 1, 3, 2]))
        return result

    def _stretch(self, first: int, slots: int) -> tuple[ir.Value, ir.Value]:
        """Tokens of every block from ``first`` after its own first one on.

        Returns:
            Their numbers ``(k, slots)``, another token's where there is none; which are there, ``(b or 1, 1, k, slots)``.
        """
        w = self.w
        start = w.op("Mul", w.op("Unsqueeze", w.range(self.blocks), [1]), self.m)
        place = w.op("Add", start, w.constant(np.arange(first, first + slots)))
        inside = w.op("And", w.op("GreaterOrEqual", place, 0), w.op("Less", place, self.length))
        table = w.op("Max", w.op("Min", place, w.op("Sub", self.length, [1])), 0)
        there = w.op("Unsqueeze", inside, [0])
        if self.padding is not None:
            there = w.op("And", there, w.op("Gather", self.padding, table, axis=1))
        return table, w.op("Unsqueeze", there, [1])

    # Tiles of queries.

    def _ungrouped(self, out: ir.Value, channels: int) -> ir.Value:
        """``(b, g, k, r, c)`` as ``(b, h, n, c)``."""
        w, spec = self.w, self.spec
        if spec.group > 1:
            split = w.op("Reshape", out, [0, 0, 0, spec.group, self.m * channels])
            out = w.op("Transpose", split, perm=[0, 1, 3, 2, 4])
        whole = w.op("Reshape", out, [0, spec.heads, -1, channels])
        return w.slice(whole, 0, self.length, 2)

    def _zeroed(self, out: ir.Value, *biases: ir.Value) -> ir.Value:
        """Only padding can hide every key of a query."""
        if self.padding is None:
            return out
        w = self.w
        best = [highest(w, bias, self.spec) for bias in biases]
        most = best[0] if len(best) == 1 else w.op("Max", *best)
        seen = w.op("Greater", most, hidden(self.spec) / 2)
        return w.op("Mul", out, w.cast(seen, self.spec.dtype))

    # Tokens and sinks.

    def _tokens(self) -> tuple[ir.Value, ir.Value]:
        """Which tokens are there, and which are pooled (not the sinks), both ``(b, 1, n', 1)`` boolean."""
        w, sinks = self.w, self.sinks
        if self.padding is None:
            places = w.op("Reshape", w.range(w.op("Mul", self.blocks, [self.m])), [1, 1, -1, 1])
            real = w.op("Less", places, self.length)
            if not sinks:
                return real, real
            # Short of tokens the last one stands for the sinks that do not exist; their bias hides them.
            numbers = w.constant(np.arange(sinks))
            self._places = w.op("Unsqueeze", w.op("Min", numbers, w.op("Sub", self.length, [1])), [0])
            self._exists = w.op("Unsqueeze", w.op("Less", numbers, self.length), [0])
            return real, w.op("And", real, w.op("GreaterOrEqual", places, [sinks]))
        found = w.op("Pad", w.cast(self.padding, ir.DataType.INT32), w.join([0, 0, 0, self.missing]))
        real = w.cast(w.op("Unsqueeze", found, [1, 3]), ir.DataType.BOOL)
        if not sinks:
            return real, real
        rank = w.op("Mul", w.op("CumSum", found, w.constant(1)), found)  # the first real token is number 1
        int32 = ir.DataType.INT32
        wanted = w.constant(np.arange(1, sinks + 1).reshape(1, -1, 1), int32)
        same = w.op("Equal", w.op("Unsqueeze", rank, [1]), wanted)
        self._places = w.op("ArgMax", w.cast(same, int32), axis=2, keepdims=0)
        total = w.op("ReduceSum", found, [1], keepdims=1)
        self._exists = w.op("Less", w.constant(np.arange(sinks).reshape(1, -1), int32), total)
        late = w.op("Greater", rank, w.constant(sinks, int32))
        return real, w.op("Unsqueeze", late, [1, 3])

    def _at_sinks(self, x: ir.Value) -> ir.Value:
        """The tokens that are sinks, ``(b, g, s, c)``."""
        w = self.w
        if self.padding is None:
            return w.op("Gather", x, w.op("Squeeze", self._places, [0]), axis=2)
        target = w.join([w.shape(x, 0), w.shape(x, 1), self.sinks, w.shape(x, 3)])
        places = w.op("Expand", w.op("Unsqueeze", self._places, [1, 3]), target)
        return w.op("GatherElements", x, places, axis=2)
