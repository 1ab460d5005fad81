"""Conv-basis attention as an ONNX body: a few columns of scores slid down the diagonal, summed by short transforms.

A segment of ``w`` columns copies its anchor's column, so what it adds to the output is the convolution of the anchor's
weights with the segment's values. Rows are taken in blocks of ``w``: the convolutions of a block are products at ``w + 1``
frequencies, summed over segments there, and transformed back once. The transforms are products with matrices of sines, in
float64: a row whose weights are small beside its block's would drown in the noise of a shorter type. Work is
``O(n k e + n w (k + e))``, ``w = n / k``: products of a pair of tokens become products of a token and a frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, highest, lowest, only
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

_DOUBLE = ir.DataType.DOUBLE
_NOTHING = -1e30
# Sums may be this many times smaller than the largest of their block before the noise of the transforms shows.
_RANGE = 1e8


def _supports(operator: Operator, spec: BodySpec) -> Support:
    config = operator.config
    if config.approximation != "conv" or config.offset_bias != "none" or config.key_bias:
        return no(
            "its ONNX body serves the convolutions alone: approximation='conv' and no learned or sloped bias"
        )
    if config.anchors not in ("strided", "sink_strided") or config.stride:
        return no(
            "its ONNX body serves anchors at even distances (strided or sink_strided, stride=0): what is looked for by "
            f"content, or leaves the last segment long, has no bound on its segments; got {config.anchors!r}"
        )
    if spec.dtype == _DOUBLE:
        return no("its ONNX body sums by transforms in float64, which keep less than float64 of the result")
    if spec.mask.left is not None or spec.mask.right not in (None, 0):
        return no(
            f"its ONNX body serves causal and bidirectional attention without a window, not {spec.mask}"
        )
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    return {"k": operator.config.k, "anchors": operator.config.anchors, "sinks": operator.config.sinks}


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    return _Writing(w, operator, spec, given).write()


class _Writing:
    """``v`` query heads of a key head, ``i`` blocks of rows, ``f = w + 1`` frequencies, ``e1`` channels of value and a 1."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        self.w, self.spec, self.config, self.padding = w, spec, operator.config, given.key_padding
        self.terms = operator.config.k
        self.alone = (
            min(operator.config.sinks, self.terms - 1) if operator.config.anchors == "sink_strided" else 0
        )
        self.length = w.shape(given.query, 2)
        self.query = w.op("Mul", w.cast(given.query, _DOUBLE), self._real(spec.scale))
        self.key, value = w.cast(given.key, _DOUBLE), w.cast(given.value, _DOUBLE)
        one = w.op("Expand", self._real(1.0), w.join([w.shape(given.key, 0), spec.kv_heads, self.length, 1]))
        self.value = w.op("Concat", value, one, axis=3)
        self.channels = spec.value_dim + 1
        if self.padding is not None:
            mine = w.op("Unsqueeze", self.padding, [1, 3])
            # Queries too: the weights of a column slide over the rows of padding.
            self.query, self.key, self.value = (
                w.op("Where", mine, x, self._real(0.0)) for x in (self.query, self.key, self.value)
            )
        even = self.terms - self.alone
        width = w.op("Div", w.op("Add", w.op("Sub", self.length, [self.alone]), [even - 1]), [even])
        self.width = w.op("Max", width, [1])
        self.blocks = w.op("Div", w.op("Add", self.length, w.op("Sub", self.width, [1])), self.width)
        self.double_width = w.op("Mul", self.width, [2])
        self.frequencies = w.op("Add", self.width, [1])
        self._transforms()

    def _real(self, x: float) -> ir.Value:
        return self.w.constant(np.array(x), _DOUBLE)

    def _transforms(self) -> None:
        """Cosines and sines of a real transform of ``2 w`` numbers, and of the way back to its second half."""
        w = self.w
        steps = w.range(self.double_width)
        turns = w.op(
            "Mod", w.op("Mul", w.op("Unsqueeze", w.range(self.frequencies), [1]), steps), self.double_width
        )
        size = w.cast(self.width, _DOUBLE)
        angle = w.op("Div", w.op("Mul", w.cast(turns, _DOUBLE), self._real(math.pi)), size)
        self.sine = w.op("Neg", w.op("Sin", angle))
        self.cosine = w.op("Sin", w.op("Add", angle, self._real(math.pi / 2)))
        both = w.op("Concat", self.cosine, self.sine, axis=0)
        back = w.op("Transpose", w.slice(both, self.width, self.double_width, 1), perm=[1, 0])
        edge = w.op(
            "Mod", w.op("Mod", w.range(w.op("Mul", self.frequencies, [2])), self.frequencies), self.width
        )
        share = w.op("Where", w.op("Equal", edge, 0), self._real(0.5), self._real(1.0))
        self.back = w.op("Div", w.op("Mul", back, share), size)

    def write(self) -> ir.Value:
        """The whole computation."""
        w, spec = self.w, self.spec
        first, stop = self._span()
        sums, scale, least = self._triangle(self.query, self.key, self.value, first, stop, strict=False)
        if not spec.mask.causal:
            query, key, value = (self._flipped(x) for x in (self.query, self.key, self.value))
            begin, end = w.op("Sub", self.length, stop), w.op("Sub", self.length, first)
            above = [self._flipped(x) for x in self._triangle(query, key, value, begin, end, strict=True)]
            most = w.op("Max", scale, above[1])
            lower, upper = (w.op("Exp", w.op("Sub", x, most)) for x in (scale, above[1]))
            sums = w.op("Add", w.op("Mul", sums, lower), w.op("Mul", above[0], upper))
            least = w.op("Add", w.op("Mul", least, lower), w.op("Mul", above[2], upper))
        out, total = w.op("Split", sums, [spec.value_dim, 1], outputs=2, axis=3)
        good = w.op("GreaterOrEqual", total, least)
        if self.padding is not None:
            seen = self._seen()
            good = w.op("Or", good, w.op("Not", seen))
            total = w.op("Where", seen, total, self._real(1.0))
            out = w.op("Where", seen, out, self._real(0.0))
        worst = lowest(w, w.op("Reshape", w.cast(good, ir.DataType.INT32), [-1]), spec)
        # Scores too far apart for the transforms stop the run with an index out of range.
        checked = w.op(
            "Gather",
            self.w.constant([1.0], _DOUBLE),
            w.op("Sub", w.constant(1, ir.DataType.INT32), worst),
            axis=0,
        )
        result: ir.Value = w.cast(w.op("Mul", w.op("Div", out, total), checked), spec.dtype)
        return result

    def _span(self) -> tuple[ir.Value, ir.Value]:
        """The first real column and the one after the last, ``(b or 1, 1)`` each."""
        w = self.w
        if self.padding is None:
            return w.constant([[0]]), w.op("Unsqueeze", self.length, [0])
        place = w.range(self.length)
        after = w.op("Where", self.padding, w.op("Add", place, 1), 0)
        stop = highest(w, after, self.spec)
        first = lowest(w, w.op("Where", self.padding, place, self.length), self.spec, keepdims=1)
        return w.op("Min", first, stop), stop

    def _seen(self) -> ir.Value:
        """Rows that see a key, ``(b, 1, n or 1, 1)``."""
        w = self.w
        real = w.cast(self.padding, ir.DataType.INT64)  # type: ignore[arg-type]
        if self.spec.mask.causal:
            count = w.op("CumSum", real, w.constant(1))
        else:
            count = w.op("ReduceSum", real, [1], keepdims=1)
        return w.op("Unsqueeze", w.op("Greater", count, 0), [1, 3])

    def _flipped(self, x: ir.Value) -> ir.Value:
        result: ir.Value = self.w.op("Slice", x, [-1], [-(1 << 62)], [2], [-1])
        return result

    def _rows_of(self, x: ir.Value, places: ir.Value, channels: int) -> ir.Value:
        """``(b, g, n, c)`` at ``(b or 1, ...)`` places: ``(b, g, ..., c)``."""
        w = self.w
        units = w.op("Mul", w.shape(self.key, 0), [self.spec.kv_heads])
        base = w.op("Reshape", w.op("Mul", w.range(units), self.length), [-1, self.spec.kv_heads, 1])
        flat = w.op("Add", w.op("Reshape", places, w.join([w.shape(places, 0), 1, -1])), base)
        result: ir.Value = w.op("Gather", w.op("Reshape", x, [-1, channels]), flat, axis=0)
        return result

    def _triangle(
        self, query: ir.Value, key: ir.Value, value: ir.Value, first: ir.Value, stop: ir.Value, strict: bool
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Sums over the keys up to a row's own, in units of ``exp(scale)``, and how small a sum may be.

        Returns:
            ``(b, h, n, e1)``, ``(b, h, n, 1)`` twice.
        """
        w, spec, terms = self.w, self.spec, self.terms
        even = terms - self.alone
        rest = w.op("Max", w.op("Sub", w.op("Sub", stop, first), self.alone), 0)
        steps = w.op("Div", w.op("Mul", rest, w.constant(np.arange(even))), even)
        bounds = w.op("Add", w.op("Add", first, self.alone), steps)
        if self.alone:
            bounds = w.op("Concat", w.op("Add", first, w.constant(np.arange(self.alone))), bounds, axis=1)
        bounds = w.op("Min", w.op("Concat", bounds, stop, axis=1), stop)
        anchors, ends = w.slice(bounds, 0, terms, 1), w.slice(bounds, 1, terms + 1, 1)
        last = w.op("Sub", self.length, [1])
        of_anchors = self._rows_of(key, w.op("Min", anchors, last), spec.head_dim)
        rows = w.op("Reshape", query, [0, spec.kv_heads, -1, spec.head_dim])
        scores = w.op("MatMul", rows, w.op("Transpose", of_anchors, perm=[0, 1, 3, 2]))
        scores = w.op("Reshape", scores, w.join([0, spec.kv_heads, spec.group, self.length, terms]))
        # A column begins at its anchor's row; a segment without columns has none.
        begin = w.op("Where", w.op("Less", anchors, ends), anchors, self.length)
        begin = w.op("Unsqueeze", w.op("Add", begin, 1) if strict else begin, [1, 2, 3])
        place = w.op("Unsqueeze", w.range(self.length), [1])
        scores = w.op("Where", w.op("GreaterOrEqual", place, begin), scores, self._real(_NOTHING))
        windows, scale = self._windows(scores)
        weights = self._transformed(windows, self.cosine, self.sine, 5)
        columns = w.op("Reshape", w.range(self.width), [1, 1, -1])
        wide = w.op("Unsqueeze", anchors, [2])
        values = self._rows_of(value, w.op("Min", w.op("Add", wide, columns), last), self.channels)
        values = w.op("Reshape", values, w.join([0, spec.kv_heads, terms, self.width, self.channels]))
        inside = w.op("Less", columns, w.op("Sub", w.op("Unsqueeze", ends, [2]), wide))
        values = w.op("Where", w.op("Unsqueeze", inside, [1, 4]), values, self._real(0.0))
        cosine, sine = (w.slice(x, 0, self.width, 1) for x in (self.cosine, self.sine))
        of_cosine, of_sine = (
            w.op("Transpose", w.op("MatMul", x, values), perm=[0, 1, 3, 2, 4]) for x in (cosine, sine)
        )
        # A product of complex numbers as one of real ones: rows of (real, imaginary) times ((r, i), (-i, r)).
        upper = w.op("Concat", of_cosine, of_sine, axis=4)
        lower = w.op("Concat", w.op("Neg", of_sine), of_cosine, axis=4)
        factor = w.op("Unsqueeze", w.op("Concat", upper, lower, axis=3), [2])
        summed = w.op("MatMul", w.op("Transpose", weights, perm=[0, 1, 2, 4, 3, 5]), factor)
        parts = w.op("Split", summed, [self.channels, self.channels], outputs=2, axis=5)
        spectrum = w.op("Transpose", w.op("Concat", *parts, axis=3), perm=[0, 1, 2, 4, 3, 5])
        sums = w.op("MatMul", self.back, spectrum)
        total = w.op("Squeeze", w.slice(sums, spec.value_dim, self.channels, 5), [5])
        least = w.op("Div", highest(w, total, spec), self._real(_RANGE))
        scale, least = (self._by_row(self._spread(x), 1) for x in (scale, least))
        return self._by_row(sums, self.channels), scale, least

    def _windows(self, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Weights of every block of rows and the one before, ``(b, g, v, i, 2 w, k)``; their scale ``(b, g, v, i, 1)``."""
        w, terms = self.w, self.terms
        after = w.op("Sub", w.op("Mul", self.blocks, self.width), self.length)
        pads = w.join([0, 0, 0, self.width, 0, 0, 0, 0, after, 0])
        padded = w.op("Pad", scores, pads, self._real(_NOTHING))
        split = w.op("Reshape", padded, w.join([0, 0, 0, w.op("Add", self.blocks, [1]), self.width, terms]))
        before, own = w.slice(split, 0, -1, 3), w.slice(split, 1, 1 << 62, 3)
        windows = w.op("Concat", before, own, axis=4)
        most = highest(w, w.op("Reshape", windows, w.join([0, 0, 0, self.blocks, -1])), self.spec)
        weights = w.op("Exp", w.op("Sub", windows, w.op("Unsqueeze", most, [5])))
        there = w.op("Greater", windows, self._real(_NOTHING / 2))
        return w.op("Where", there, weights, self._real(0.0)), most

    def _transformed(self, x: ir.Value, cosine: ir.Value, sine: ir.Value, axis: int) -> ir.Value:
        w = self.w
        result: ir.Value = w.op("Concat", w.op("MatMul", cosine, x), w.op("MatMul", sine, x), axis=axis)
        return result

    def _spread(self, x: ir.Value) -> ir.Value:
        """A number of a block of rows, ``(b, g, v, i, 1)``, for every one of them."""
        return self.w.op("Expand", x, self.w.join([1, 1, 1, 1, self.width]))

    def _by_row(self, x: ir.Value, channels: int) -> ir.Value:
        w = self.w
        whole = w.op("Reshape", x, w.join([w.shape(self.key, 0), self.spec.heads, -1, channels]))
        return w.slice(whole, 0, self.length, 2)


BODY = Body("ConvBasis", 1, _supports, _write, _attributes)
