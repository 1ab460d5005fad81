"""Heads served by different operators as an ONNX body: the bodies of the parts, each on its heads, put together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no
from fastattn_compile.operators.per_head import PerHeadAttention
from fastattn_compile.operators.per_head.served import Served


def _parts(operator: Operator, spec: BodySpec) -> list[tuple[Served, BodySpec]]:
    if not isinstance(operator, PerHeadAttention):
        raise TypeError(f"expected per_head, got {operator}")
    return [
        (part, dataclasses.replace(spec, heads=len(part.query_heads), kv_heads=len(part.key_heads)))
        for part in operator.served(spec.heads, spec.kv_heads)
    ]


def _supports(operator: Operator, spec: BodySpec) -> Support:
    # The registry lists this body among those it is made of.
    from fastattn_compile.lowering.onnx.registry import supported

    for part, own in _parts(operator, spec):
        support = supported(part.operator, own)
        if not support:
            return no(f"{part.operator.name}, which serves some heads: {support.reason}")
    return Support()


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    values = operator.config.to_dict()
    heads = values["heads"] or [0] * spec.kv_heads
    return {"parts": json.dumps(values["parts"], sort_keys=True), "heads": heads}


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    from fastattn_compile.lowering.onnx.registry import body_of

    names = list(operator.parameter_shapes(spec.site()))
    outputs, order = [], []
    for part, own in _parts(operator, spec):
        body = body_of(part.operator)
        if body is None:
            raise ValueError(f"{part.operator.name} has no ONNX body")
        learned = [p for n, p in zip(names, given.parameters) if n.startswith(f"part{part.number}_")]
        heads = w.constant(part.key_heads)
        inputs = BodyInputs(
            w.op("Gather", given.query, w.constant(part.query_heads), axis=1), w.op("Gather", given.key, heads, axis=1),
            w.op("Gather", given.value, heads, axis=1), given.key_padding, tuple(learned),
        )  # fmt: skip
        outputs.append(body.write(w, part.operator, own, inputs))
        order += part.query_heads
    out: ir.Value = outputs[0] if len(outputs) == 1 else w.op("Concat", *outputs, axis=1)
    if order == sorted(order):
        return out
    back = sorted(range(len(order)), key=order.__getitem__)
    return w.op("Gather", out, w.constant(back), axis=1)


BODY = Body("PerHead", 1, _supports, _write, _attributes)
