"""Tensors that are stored as 8-bit integers: the real numbers they stand for, and back.

In the QOperator form there is no float tensor to read queries, keys and values from. Scale and zero point of an integer
tensor are operands of the node that made it, and moving its elements keeps them.

Source: the operator specifications of ONNX and of ONNX Runtime's domain ``com.microsoft``.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from fastattn_compile.lowering.onnx.writer import OnnxWriter

INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
# Operators whose result is quantised: where scale and zero point of the result stand among their operands.
_AT: Mapping[str, tuple[int, int]] = {
    "QuantizeLinear": (1, 2), "QLinearMatMul": (6, 7), "QLinearConv": (6, 7), "QLinearAdd": (6, 7), "QLinearMul": (6, 7),
    "QGemm": (7, 8), "QLinearSoftmax": (3, 4), "QLinearSigmoid": (3, 4), "QLinearLeakyRelu": (3, 4), "QLinearConcat": (0, 1),
    "QLinearAveragePool": (3, 4), "QLinearGlobalAveragePool": (3, 4), "QLinearReduceMean": (3, 4), "QLinearWhere": (7, 8),
}  # fmt: skip
_MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "GatherElements", "GatherND", "Split",
    "Expand", "Tile", "Identity", "DepthToSpace", "SpaceToDepth",
})  # fmt: skip
_FARTHEST = 64
Parameters = tuple["ir.Value", "ir.Value | None"]


def parameters(value: ir.Value) -> Parameters | None:
    """Scale and zero point of a tensor of integers, ``None`` where they cannot be found."""
    for _ in range(_FARTHEST):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "DynamicQuantizeLinear":
            return (node.outputs[1], node.outputs[2]) if value is node.outputs[0] else None
        if node.op_type in _AT:
            scale, zero = (node.inputs[at] if at < len(node.inputs) else None for at in _AT[node.op_type])
            return None if scale is None else (scale, zero)
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return None


def is_quantised(value: ir.Value) -> bool:
    """Whether a tensor holds 8-bit integers."""
    if value.dtype is None:  # inference does not know the operators that quantise
        return parameters(value) is not None
    return value.dtype in INTEGERS


def real_type(value: ir.Value) -> ir.DataType | None:
    """The type of the real numbers a tensor stands for."""
    found = parameters(value) if value.dtype is None or value.dtype in INTEGERS else None
    return value.dtype if found is None else found[0].dtype


def real(writer: OnnxWriter, value: ir.Value) -> ir.Value:
    """The real numbers of a tensor; the tensor itself where it holds such."""
    if not is_quantised(value):
        return value
    found: ir.Value = writer.op("DequantizeLinear", value, *_known(value))
    found.type, found.shape = ir.TensorType(writer.dtype), value.shape
    return found


def stored(writer: OnnxWriter, value: ir.Value, like: ir.Value) -> ir.Value:
    """Real numbers in the form in which another tensor is stored.

    Args:
        writer: Takes the node.
        value: Real numbers.
        like: The tensor that ``value`` is to stand for.
    """
    if not is_quantised(like):
        return value
    found: ir.Value = writer.op("QuantizeLinear", value, *_known(like))
    return found


def real_output(value: ir.Value) -> ir.Value | None:
    """Where a product stands as real numbers, or as integers whose scale is known; ``None`` where it does nowhere.

    ``MatMulInteger`` gives 32-bit integers; what follows it casts them and multiplies by the scales of both operands.
    """
    node = value.producer()
    if node is None or node.op_type != "MatMulInteger":
        return None if is_quantised(value) and parameters(value) is None else value
    cast = _only_user(value, "Cast")
    scaled = _only_user(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or scaled is None:
        return None
    scale = next((x for x in scaled.inputs if x is not cast.outputs[0]), None)
    product = scale.producer() if scale is not None else None
    if product is None or product.op_type != "Mul":
        return None
    dynamic = [x.producer() if x is not None else None for x in node.inputs[:2]]
    scales = [x.outputs[1] for x in dynamic if x is not None and x.op_type == "DynamicQuantizeLinear"]
    return scaled.outputs[0] if len(scales) == 2 and set(scales) == set(product.inputs) else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, when it is of this kind."""
    users = [use.node for use in value.uses()]
    return (
        users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None
    )


def _known(value: ir.Value) -> Parameters:
    found = parameters(value)
    if found is None:
        raise ValueError(f"nothing says what the integers of {value.name} stand for; ask can_replace first")
    return found
