"""An operator at a site as an ONNX function: the node's meaning for runtimes that do not know our domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import DOMAIN, Body, BodyInputs, BodySpec, computed
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
        ``fastattn::<name>(query, key, value[, key_padding[, parameters...]]) -> (output)``. A node without padding but
        with parameters leaves the fourth input out, as ONNX does: by an empty name.
    """
    body = body_of(operator)
    if body is None:
        raise ValueError(f"{operator.name} has no ONNX body")
    learned = operator.parameter_shapes(spec.site())
    padded = spec.mask.key_padding or bool(learned)
    names = ["query", "key", "value", *(["key_padding"] if padded else []), *learned]
    inputs = [ir.Value(name=name) for name in names]
    inner = computed(spec)
    writer = OnnxWriter(inner.dtype)
    cast = spec.dtype != inner.dtype
    tensors, further = inputs[:3], inputs[3:]
    padding, parameters = further[0] if spec.mask.key_padding else None, further[1:]
    if cast:
        tensors, parameters = ([writer.cast(x, inner.dtype) for x in xs] for xs in (tensors, parameters))
    query, key, value = tensors
    given = BodyInputs(query, key, value, padding, tuple(parameters))
    output = body.write(writer, operator, inner, given)
    if cast:
        output = writer.cast(output, spec.dtype)
    graph = ir.Graph(inputs, [output], nodes=writer.nodes, opset_imports={"": spec.opset}, name=body.op_type)
    declared = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in node_attributes(operator, spec, body)
    ]
    return ir.Function(DOMAIN, body.op_type, overload, graph=graph, attributes=declared)


def node_inputs(
    tensors: Sequence[ir.Value | None], padding: ir.Value | None, parameters: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """The inputs of a node in the order of its function."""
    between = [padding] if padding is not None or parameters else []
    return [*tensors, *between, *parameters]


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
