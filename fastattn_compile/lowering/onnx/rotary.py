"""Rotary embeddings of keys in ONNX: taken off before keys are pooled, and put on again at the rows' mean positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fastattn_compile.kernels.rotary import Rotary
from fastattn_compile.lowering.onnx.writer import FAR, OnnxWriter


def turned(w: OnnxWriter, x: ir.Value, place: ir.Value, rotary: Rotary, back: bool = False) -> ir.Value:
    """Keys as the embedding turns them.

    Args:
        w: Takes the nodes.
        x: ``(b, g, n, d)`` in the writer's type.
        place: Positions ``(b or 1, 1, n, 1)`` in float64: in a narrower type large ones lose the angle.
        rotary: The embedding.
        back: Take it off instead.
    """
    even = np.arange(0, rotary.channels, 2, dtype=np.float64)
    frequencies = w.constant(rotary.base ** (-even / rotary.channels), ir.DataType.DOUBLE)
    angles = w.op("Mul", place, frequencies)
    cos, sin = (w.cast(w.op(function, angles), w.dtype) for function in ("Cos", "Sin"))
    half = rotary.channels // 2
    if rotary.interleaved:
        head = w.slice(x, 0, rotary.channels, 3)
        pairs = w.op("Reshape", head, [0, 0, -1, half, 2])
        first, second = (w.op("Gather", pairs, at, axis=4) for at in (0, 1))
    else:
        first, second = w.slice(x, 0, half, 3), w.slice(x, half, rotary.channels, 3)
    plus, minus = ("Sub", "Add") if not back else ("Add", "Sub")
    made: tuple[ir.Value, ...] = (
        w.op(plus, w.op("Mul", first, cos), w.op("Mul", second, sin)),
        w.op(minus, w.op("Mul", second, cos), w.op("Mul", first, sin)),
    )
    rest = [w.slice(x, rotary.channels, FAR, 3)]
    if rotary.interleaved:
        wide = w.op("Concat", *(w.op("Unsqueeze", part, [4]) for part in made), axis=4)
        made = (w.op("Reshape", wide, [0, 0, -1, rotary.channels]),)
    result: ir.Value = w.op("Concat", *made, *rest, axis=3)
    return result
