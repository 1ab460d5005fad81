"""Exact attention as an ONNX body: what proves that the rewiring around an operator is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import (
    Body,
    BodyInputs,
    BodySpec,
    grouped,
    hidden,
    highest,
    only,
)
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support


def _supports(operator: Operator, spec: BodySpec) -> Support:
    return only(spec.mask, "left", "right", "key_padding", "end_aligned")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    return {}


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    query = w.op("Mul", grouped(w, given.query, spec), spec.scale)
    key = w.op("Unsqueeze", given.key, [2])
    value = w.op("Unsqueeze", given.value, [2])
    scores = w.op("MatMul", query, w.op("Transpose", key, perm=[0, 1, 2, 4, 3]))
    seen = _visible(w, spec, given)
    if seen is not None:
        bias = w.op("Where", seen, 0.0, hidden(spec))
        scores = w.op("Add", scores, bias)
    out = w.op("MatMul", w.op("Softmax", scores, axis=-1), value)
    if seen is not None:
        # Rows that see no key give 0, where a softmax gives the mean of what is hidden.
        some = w.op("Greater", highest(w, bias, spec), hidden(spec) / 2)
        out = w.op("Mul", out, w.cast(some, spec.dtype))
    return w.op("Reshape", out, [0, spec.heads, -1, spec.value_dim])


def _visible(w: OnnxWriter, spec: BodySpec, given: BodyInputs) -> ir.Value | None:
    """Which keys are seen, broadcast against ``(b, g, group, n, keys)``."""
    mask, terms = spec.mask, []
    if mask.left is not None or mask.right is not None:
        query_len, key_len = w.shape(given.query, 2), w.shape(given.key, 2)
        rows = w.op("Reshape", w.range(query_len), [-1, 1])
        if mask.end_aligned:
            rows = w.op("Add", rows, w.op("Sub", key_len, query_len))
        distance = w.op("Sub", w.range(key_len), rows)
        if mask.right is not None:
            terms.append(w.op("LessOrEqual", distance, mask.right))
        if mask.left is not None:
            terms.append(w.op("GreaterOrEqual", distance, -mask.left))
    if given.key_padding is not None:
        terms.append(w.op("Unsqueeze", given.key_padding, [1, 2, 3]))
    seen = terms[0] if terms else None
    for term in terms[1:]:
        seen = w.op("And", seen, term)
    return seen


BODY = Body("Exact", 1, _supports, _write, _attributes)
