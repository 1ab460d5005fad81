"""An operator at a site as an ONNX function: the node's meaning for runtimes that do not know our domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import DOMAIN, Body, BodyInputs, BodySpec
from fastattn_compile.lowering.onnx.registry import body_of
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator


def function(operator: Operator, spec: BodySpec, overload: str = "") -> ir.Function:
    """Writes the function of an operator for sites like this.

    Args:
        operator: The operator.
        spec: The site; ``supported`` said yes to it.
        overload: Tells functions of one name apart (ONNX IR version 10).

    Returns:
        ``fastattn::<name>(query, key, value[, key_padding]) -> (output)``.
    """
    body = body_of(operator)
    if body is None:
        raise ValueError(f"{operator.name} has no ONNX body")
    names = ["query", "key", "value"] + (["key_padding"] if spec.mask.key_padding else [])
    inputs = [ir.Value(name=name) for name in names]
    writer = OnnxWriter(spec.dtype)
    query, key, value, *padding = inputs
    output = body.write(writer, operator, spec, BodyInputs(query, key, value, *padding))
    graph = ir.Graph(inputs, [output], nodes=writer.nodes, opset_imports={"": spec.opset}, name=body.op_type)
    declared = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in node_attributes(operator, spec, body)
    ]
    return ir.Function(DOMAIN, body.op_type, overload, graph=graph, attributes=declared)


def node_attributes(operator: Operator, spec: BodySpec, body: Body) -> Mapping[str, Any]:
    """What the node says of itself, for native kernels and for readers.

    ONNX has no attributes in double precision: where the tensors do, ``scale_exact`` says the scale as text.
    """
    exact = {"scale_exact": repr(float(spec.scale))} if spec.dtype == ir.DataType.DOUBLE else {}
    return {
        **body.attributes(operator, spec),
        "scale": float(spec.scale),
        **exact,
        "mask": str(spec.mask),
        "body_version": body.version,
    }
