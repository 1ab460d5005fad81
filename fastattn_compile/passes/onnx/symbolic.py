"""Symbolic shapes by ONNX Runtime's inference, which is told of fused operators that it does not know."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import sympy


def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model with the shapes that can be inferred.

    Args:
        proto: The model; ONNX Runtime's inference changes it.

    Returns:
        ONNX Runtime's symbolic inference where it can be imported and knows all operators, ONNX's own otherwise.
    """
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        with contextlib.redirect_stdout(io.StringIO()):
            # Its own loop, and not its entry point: that one writes files into the working directory when a shape is
            # left open, and throws away what it found.
            inference = SymbolicShapeInference((1 << 31) - 1, True, 0, 0)
            ours, mended = (
                {name: functools.partial(rule, inference) for name, rule in rules.items()}
                for rules in (_RULES, _MENDED)
            )
            inference.dispatcher_ = ours | inference.dispatcher_ | mended
            inference._preprocess(proto)
            while inference.run_:
                inference._infer_impl()
            inference._update_output_from_vi()
            found: onnx.ModelProto = inference.out_mp_
            return found
    except Exception:  # it stops at operators it does not know, in many ways
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), 0)


def _fused_product(inference: Any, node: onnx.NodeProto) -> None:
    """A product of matrices of which either may be read transposed, by its last two dimensions or its batch."""
    shapes = [list(inference._get_shape(node, at)) for at in range(2)]
    for shape, side in zip(shapes, "AB"):
        if _attribute(node, f"transBatch{side}"):
            shape[:-1] = [*shape[1:-1], shape[0]]
        if _attribute(node, f"trans{side}"):
            shape[-2:] = shape[:-3:-1]
    left, right = shapes
    batch = inference._broadcast_shapes(left[:-2], right[:-2])
    dtype = inference.known_vi_[node.input[0]].type.tensor_type.elem_type
    info = onnx.helper.make_tensor_value_info(node.output[0], dtype, [*batch, left[-2], right[-1]])
    inference.known_vi_[node.output[0]].CopyFrom(info)


def _constant(inference: Any, node: onnx.NodeProto) -> None:
    """A constant may be written as a number or numbers, of which the inference knows only tensors."""
    (given,) = node.attribute
    types = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if given.name in types:
        value = np.asarray(onnx.helper.get_attribute_value(given), types[given.name])
        node = onnx.helper.make_node("Constant", [], node.output, value=onnx.numpy_helper.from_array(value))
    inference._infer_Constant(node)


def _split(inference: Any, node: onnx.NodeProto) -> None:
    """Sizes that are taken apart stay known: the runtime makes of several ``Gather`` of a shape one ``Split``."""
    inference._infer_Split(node)
    values = inference._try_get_value(node, 0)
    if not isinstance(values, list):
        return
    sizes = inference._try_get_value(node, 1) if len(node.input) > 1 else None
    if sizes is None:  # of older operator sets, or parts of one size
        equal = [-(-len(values) // len(node.output))] * len(node.output)
        sizes = next((a.ints for a in node.attribute if a.name == "split"), equal)
    ends = list(itertools.accumulate(int(size) for size in sizes))
    for name, start, end in zip(node.output, [0, *ends], ends):
        inference.sympy_data_[name] = values[start:end]


def _flatten(inference: Any, node: onnx.NodeProto) -> None:
    """Two dimensions, the products of those before an axis and of those from it on."""
    shape = inference._get_sympy_shape(node, 0)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    axis += len(shape) if axis < 0 else 0
    _put(inference, node, [sympy.prod(part) for part in (shape[:axis], shape[axis:])], 0)


def _quantised_concat(inference: Any, node: onnx.NodeProto) -> None:
    """Every part comes with a scale and a zero point; those of the result come first."""
    shapes = [inference._get_sympy_shape(node, at) for at in range(2, len(node.input), 3)]
    axis = _attribute(node, "axis") % len(shapes[0])
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    _put(inference, node, whole, 2)


def _quantised_projection(inference: Any, node: onnx.NodeProto) -> None:
    """``QGemm``: its second matrix is the fourth input; without a zero point the result is a number."""
    a, b = inference._get_sympy_shape(node, 0), inference._get_sympy_shape(node, 3)
    rows, columns = a[_attribute(node, "transA")], b[1 - _attribute(node, "transB")]
    zero_point = node.input[8] if len(node.input) > 8 else ""
    _put(inference, node, [rows, columns], 8 if zero_point else 1)


def _put(inference: Any, node: onnx.NodeProto, sizes: list[Any], like: int) -> None:
    """Notes the sizes of a node's result, which is of the type of one of its inputs."""
    inference._update_computed_dims(sizes)
    dtype = inference.known_vi_[node.input[like]].type.tensor_type.elem_type
    dims = [int(size) if sympy.sympify(size).is_number else str(size) for size in sizes]
    info = onnx.helper.make_tensor_value_info(node.output[0], dtype, dims)
    inference.known_vi_[node.output[0]].CopyFrom(info)


def _float_product(inference: Any, node: onnx.NodeProto) -> None:
    inference._compute_matmul_shape(node, onnx.TensorProto.FLOAT)


def _alike(inference: Any, node: onnx.NodeProto) -> None:
    inference._propagate_shape_and_type(node)


_RULES: dict[str, Callable[[Any, onnx.NodeProto], None]] = {
    "FusedMatMul": _fused_product, "TransposeMatMul": _fused_product, "MatMulIntegerToFloat": _float_product,
    "DynamicQuantizeMatMul": _float_product, "BiasSoftmax": _alike, "QLinearSoftmax": _alike,
    "QLinearSigmoid": _alike, "QLinearLeakyRelu": _alike, "Flatten": _flatten,
    "QLinearConcat": _quantised_concat, "QGemm": _quantised_projection,
}  # fmt: skip
# Of those that it knows, for what it leaves out.
_MENDED: dict[str, Callable[[Any, onnx.NodeProto], None]] = {"Constant": _constant, "Split": _split}
