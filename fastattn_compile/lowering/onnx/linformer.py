"""Linformer as an ONNX body: keys and values projected, then exact attention over the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, hidden, highest, merged, only
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support


def _supports(operator: Operator, spec: BodySpec) -> Support:
    return only(spec.mask, "key_padding", "end_aligned")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    return {"rank": operator.config.rank, "sharing": operator.config.sharing, "longest": spec.longest}


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    """A sequence longer than the projections stops the run: the product with the keys does not fit."""
    key, value, real = given.key, given.value, None
    if given.key_padding is not None:
        real = w.op("Unsqueeze", given.key_padding, [1, 3])
        # What stands at padding may be NaN, and NaN times 0 still is.
        key, value = (w.op("Where", real, x, 0.0) for x in (key, value))
    length = w.shape(given.key, 2)
    learned = [w.slice(w.cast(p, spec.dtype), 0, length, 2) for p in given.parameters]
    for_keys, for_values = learned[0], learned[-1]
    rows = w.op("MatMul", for_keys, key)
    query = w.op("Mul", merged(w, given.query, spec), spec.scale)
    scores = w.op("MatMul", query, w.op("Transpose", rows, perm=[0, 1, 3, 2]))
    bias = w.op("Where", _used(w, spec, for_keys, real), 0.0, hidden(spec))
    attention = w.op("Softmax", w.op("Add", scores, bias), axis=-1)
    out = w.op("MatMul", attention, w.op("MatMul", for_values, value))
    if real is not None:
        some = w.op("Greater", highest(w, bias, spec), hidden(spec) / 2)
        out = w.op("Mul", out, w.cast(some, spec.dtype))
    return out if spec.group == 1 else w.op("Reshape", out, [0, spec.heads, -1, spec.value_dim])


def _used(w: OnnxWriter, spec: BodySpec, for_keys: ir.Value, real: ir.Value | None) -> ir.Value:
    """Rows that weigh a real token, ``(b or 1, p, 1, r)``."""
    size = w.op("Abs", for_keys)
    if real is not None:
        # A token that is there makes the largest weight of a row positive.
        size = w.op("Mul", size, w.op("Transpose", w.cast(real, spec.dtype), perm=[0, 1, 3, 2]))
    most = highest(w, size, spec)
    order = [0, 1, 3, 2] if real is not None else [0, 2, 1]
    return w.op("Greater", w.op("Transpose", most, perm=order), 0.0)


BODY = Body("Linformer", 1, _supports, _write, _attributes)
