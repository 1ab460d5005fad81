"""Shapes of operators that ONNX Runtime's inference does not know, against what ONNX Runtime gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from fastattn_compile.passes.onnx.symbolic import infer
from fastattn_compile.passes.onnx.view import infer_shapes, view

SIZES = {"b": 3, "n": 5}
Dims = tuple[Any, ...]


def of(inputs: dict[str, Dims], *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A model of some nodes; the last gives the output ``y``."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    graph = helper.make_graph(
        list(nodes), "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor(f"number{i}", TensorProto.INT64, [1], [i]) for i in range(4)],
    )  # fmt: skip
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=9)


def shape_of(proto: onnx.ModelProto) -> list[Any]:
    (out,) = infer(proto).graph.output
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in out.type.tensor_type.shape.dim]


def check(inputs: dict[str, Dims], *nodes: onnx.NodeProto) -> list[Any]:
    """The symbolic shape, after its value was compared with what runs."""
    model = of(inputs, *nodes)
    feeds = {name: np.zeros([SIZES.get(d, d) for d in dims], np.float32) for name, dims in inputs.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (ran,) = session.run(None, feeds)
    found = shape_of(model)
    assert [eval(str(d), {}, dict(SIZES)) for d in found] == list(ran.shape)
    return found


@pytest.mark.parametrize(
    ("flags", "left", "right"),
    [
        ({}, ("b", 4, "n", 8), ("b", 4, 8, "n")),
        ({"transB": 1}, ("b", 4, "n", 8), ("b", 4, "n", 8)),
        ({"transA": 1}, ("b", 8, "n"), ("b", 8, 6)),
        ({"transA": 1, "transB": 1}, (8, "n"), (6, 8)),
        ({"transB": 1}, ("b", 4, "n", 8), (6, 8)),
        ({"transBatchA": 1}, ("n", "b", 8), ("b", 8, 6)),
        ({"transBatchB": 1, "transB": 1}, ("b", "n", 8), (6, "b", 8)),
    ],
    ids=str,
)  # fmt: skip
def test_products_that_read_transposed(flags: dict[str, int], left: Dims, right: Dims) -> None:
    node = helper.make_node("FusedMatMul", ["a", "b_"], ["y"], domain="com.microsoft", alpha=0.5, **flags)
    check({"a": left, "b_": right}, node)


def test_what_follows_a_fused_product_is_known() -> None:
    product = helper.make_node("FusedMatMul", ["q", "k"], ["s"], domain="com.microsoft", transB=1)
    softmax = helper.make_node("Softmax", ["s"], ["y"], axis=-1)
    assert check({"q": ("b", "n", 8), "k": ("b", "n", 8)}, product, softmax) == ["b", "n", "n"]


@pytest.mark.parametrize("sizes", [[], ["sizes"]])
def test_a_shape_that_was_split_expands(sizes: list[str]) -> None:
    """As the runtime writes several ``Gather`` of one shape."""
    nodes = (
        helper.make_node("Concat", ["number1", "number1"], ["sizes"], axis=0),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Split", ["shape", *sizes], ["first", "second"]),
        helper.make_node("Concat", ["second", "number3", "first"], ["target"], axis=0),
        helper.make_node("Expand", ["one", "target"], ["y"]),
    )
    assert check({"x": ("b", "n"), "one": (1, 1, 1)}, *nodes) == ["n", 3, "b"]


@pytest.mark.parametrize(
    ("axis", "wanted"), [(1, ["b", "4*n"]), (-1, ["b*n", 4]), (0, [1, "4*b*n"]), (3, ["4*b*n", 1])]
)
def test_flattened(axis: int, wanted: list[Any]) -> None:
    assert check({"x": ("b", "n", 4)}, helper.make_node("Flatten", ["x"], ["y"], axis=axis)) == wanted


def quantised(name: str) -> list[onnx.NodeProto]:
    """A value in 8 bits, with the scale and zero point of all."""
    return [helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}8"])]


def constants() -> list[onnx.NodeProto]:
    scale = helper.make_node("Constant", [], ["scale"], value_float=0.5)
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [3])
    return [scale, helper.make_node("Constant", [], ["zero"], value=zero)]


def test_a_quantised_concat() -> None:
    parts = [part for name in ("x", "z") for part in (f"{name}8", "scale", "zero")]
    nodes = (
        *constants(), *quantised("x"), *quantised("z"),
        helper.make_node("QLinearConcat", ["scale", "zero", *parts], ["w"], domain="com.microsoft", axis=-1),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["y"]),
    )  # fmt: skip
    assert check({"x": ("b", "n"), "z": ("b", 4)}, *nodes) == ["b", "n + 4"]


@pytest.mark.parametrize("eight", [True, False])
def test_a_quantised_projection(eight: bool) -> None:
    end = ["", "scale", "zero"] if eight else []
    nodes = [
        *constants(), *quantised("x"), *quantised("z"),
        helper.make_node(
            "QGemm", ["x8", "scale", "zero", "z8", "scale", "zero", *end], ["w" if eight else "y"],
            domain="com.microsoft", transB=1, alpha=1.0,
        ),
    ]  # fmt: skip
    if eight:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["y"]))
    assert check({"x": ("n", 4), "z": (6, 4)}, *nodes) == ["n", 6]


def test_names_made_up_by_the_runtime_give_way_to_what_is_inferred() -> None:
    node = helper.make_node("Flatten", ["x"], ["w"], axis=2)
    model = of({"x": ("b", "n", 4)}, node, helper.make_node("Softmax", ["w"], ["y"]))
    for made_up in ("unk__7", "Flatten_3_o0__d0"):
        del model.graph.value_info[:]
        model.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [made_up, 4]))
        read = ir.from_proto(model)
        infer_shapes(read)
        assert [str(d) for d in read.graph[0].outputs[0].shape] == ["b*n", "4"]


def test_an_unknown_operator_leaves_its_shape_open() -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], domain="com.microsoft")
    assert shape_of(of({"x": ("b", "n")}, node)) == []


def test_what_a_reshape_leaves_is_one_size_however_it_was_written() -> None:
    """Encoder and decoder have batches of their own names: a quotient of them, which exporters write rounded down."""
    constant = onnx.numpy_helper.from_array(np.array([-1, 4, 16]))
    nodes = (
        helper.make_node("Shape", ["z"], ["batch"], start=0, end=1),
        helper.make_node("Constant", [], ["rest"], value=constant),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["w"], perm=[0, 2, 1, 3]),
        helper.make_node("Softmax", ["w"], ["y"]),
    )
    model = of({"x": ("s", 32, 64), "z": ("b", 8)}, *nodes)
    declared = ["b", 4, "((32*s)//b)", 16]
    model.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, declared))
    read = ir.from_proto(model)
    infer_shapes(read)
    shapes = {node.origin.name: node.shape for node in view(read).nodes if node.origin is not None}
    assert shapes["heads"][1] == shapes["w"][2] == shapes["y"][2]
