"""Local window attention as an ONNX body: each block of queries meets one stretch of keys, and the sinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.blocks import Blocks, Met
from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, hidden, only
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

# Queries of a block: more repeat the stretch less often, and meet more keys that the window hides.
_BLOCK = 64


def _supports(operator: Operator, spec: BodySpec) -> Support:
    if spec.mask.right is not None and spec.mask.right < 0:
        return no(f"its ONNX body serves no mask that hides the token itself ({spec.mask})")
    return only(spec.mask, "left", "right", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    return {"width": operator.config.width, "sinks": operator.config.sinks}


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    back, ahead = operator.config.reach(spec.mask.causal)
    return Window(w, spec, given, back, ahead, operator.config.sinks).write()


class Window(Blocks):
    """Attention to the tokens from ``back`` before a query to ``ahead`` after it, and to sinks, as far as the mask shows."""

    def __init__(
        self, w: OnnxWriter, spec: BodySpec, given: BodyInputs, back: int, ahead: int, sinks: int
    ) -> None:
        left, right = spec.mask.left, spec.mask.right
        self.back = back if left is None else min(back, left)
        self.ahead = ahead if right is None else min(ahead, right)
        # A sink has a slot of its own where the site shows it and the window does not.
        behind = left is None or left > self.back
        beyond = right is None or right > self.ahead
        sinks = sinks if behind or beyond else 0
        super().__init__(w, spec, given, _BLOCK, sinks, self.back + _BLOCK + self.ahead)

    def _meet(self, taken: ir.Value) -> Met:
        w, spec = self.w, self.spec
        table, there = self._stretch(-self.back, self.slots)
        offset = np.arange(self.slots)[None] - np.arange(self.m)[:, None]
        band = np.tile((offset >= 0) & (offset <= self.back + self.ahead), (spec.group, 1))
        seen = w.op("And", w.op("Unsqueeze", there, [3]), w.constant(band))
        return Met(table, w.op("Where", seen, 0.0, hidden(spec)))

    def _sink_bias(self) -> ir.Value:
        w, spec = self.w, self.spec
        rows = w.op("Reshape", w.range(w.op("Mul", self.blocks, [self.m])), [1, -1, 1])
        apart = w.op("Sub", rows, w.op("Unsqueeze", self._places, [1]))
        left, right = spec.mask.left, spec.mask.right
        seen = w.op("Greater", apart, self.back)
        if left is not None:
            seen = w.op("And", seen, w.op("LessOrEqual", apart, left))
        if right is None or right > self.ahead:
            beyond = w.op("Less", apart, -self.ahead)
            if right is not None:
                beyond = w.op("And", beyond, w.op("GreaterOrEqual", apart, -right))
            seen = w.op("Or", seen, beyond)
        seen = w.op("And", seen, w.op("Unsqueeze", self._exists, [1]))
        bias = w.op("Where", seen, 0.0, hidden(spec))
        tiled = w.op("Unsqueeze", w.op("Reshape", bias, w.join([-1, self.blocks, self.m, self.sinks])), [1])
        return tiled if spec.group == 1 else w.op("Tile", tiled, [1, 1, 1, spec.group, 1])


BODY = Body("Window", 1, _supports, _write, _attributes)
