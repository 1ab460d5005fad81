"""Writing ONNX nodes by calls, with numbers where ONNX wants tensors. Only operators unchanged from opset 13 to 25."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

Operand: TypeAlias = "ir.Value | int | float | bool | Sequence[int] | None"

FAR = (1 << 62) - 1  # "to the end" of a slice


class OnnxWriter:
    """Collects nodes in order.

    A Python number among the operands of ``op`` becomes a constant: an integer (or a sequence of them) an int64 tensor, a
    real number a scalar of the writer's type. Equal constants are written once.

    Args:
        dtype: Type of real constants.
        prefix: Put before the names of values and nodes; unique in the graph that the nodes go to.
        outer: Writer of the graph around this one, which then holds the constants.
    """

    def __init__(
        self, dtype: ir.DataType = ir.DataType.FLOAT, prefix: str = "", outer: OnnxWriter | None = None
    ) -> None:
        self.dtype, self.prefix, self.outer = dtype, prefix, outer
        self.nodes: list[ir.Node] = []
        self._constants: dict[Any, ir.Value] = {}

    def op(
        self, op_type: str, *operands: Operand, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Appends a node.

        Args:
            op_type: The operator.
            operands: Values, numbers, sequences of integers; ``None`` for an operand that is left out.
            outputs: How many values it gives.
            domain: Of the operator.
            attributes: Integers, reals, texts, or sequences of integers.

        Returns:
            Its value, or a tuple of them when there are several.
        """
        inputs = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in operands]
        name = f"{self.prefix}{op_type.lower()}_{len(self.nodes)}"
        given = [attribute(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, op_type, inputs, given, num_outputs=outputs, name=name)
        for at, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}_{at}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, value: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant tensor.

        Args:
            value: A number, a sequence of integers, or a numpy array.
            dtype: Its type; int64 for integers, boolean for truth values, the writer's type for reals when ``None``.
        """
        if self.outer is not None:
            return self.outer.constant(value, dtype)
        array = np.asarray(value)
        kind = array.dtype.kind
        if dtype is None:
            dtype = {"b": ir.DataType.BOOL, "i": ir.DataType.INT64}.get(kind, self.dtype)
        key = (array.tobytes(), array.shape, kind, dtype)
        if key not in self._constants:
            tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)
            node = ir.Node(
                "", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"{self.prefix}c{len(self.nodes)}"
            )
            node.outputs[0].name = node.name
            self.nodes.append(node)
            self._constants[key] = node.outputs[0]
        return self._constants[key]

    def loop(
        self, trips: ir.Value, step: Callable[[OnnxWriter, ir.Value], ir.Value], shape: Sequence[Any]
    ) -> ir.Value:
        """What a step gives for 0, 1, ... ``trips - 1``, stacked.

        Args:
            trips: int64 tensor of one element.
            step: Writes one step, given its number (a scalar); it may read every value that is there before the loop.
            shape: Of what a step gives, in the writer's type; names stand for free dimensions.
        """
        number = ir.Value(
            name=f"{self.prefix}step_{len(self.nodes)}",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([]),
        )
        going = ir.Value(
            name=f"{self.prefix}going_{len(self.nodes)}",
            type=ir.TensorType(ir.DataType.BOOL),
            shape=ir.Shape([]),
        )
        inner = OnnxWriter(self.dtype, f"{self.prefix}loop_{len(self.nodes)}_", self.outer or self)
        result = step(inner, number)
        result.type, result.shape = ir.TensorType(self.dtype), ir.Shape(shape)
        on = inner.op("Identity", going)
        on.type, on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        graph = ir.Graph([number, going], [on, result], nodes=inner.nodes, name=f"{inner.prefix}body")
        stacked: ir.Value = self.op("Loop", trips, self.constant(np.array(True)), body=graph)
        return stacked

    # What is used again and again.

    def shape(self, x: ir.Value, dim: int) -> ir.Value:
        """The length of a dimension, as an int64 tensor of one element."""
        return self.op("Slice", self.op("Shape", x), [dim], [dim + 1], [0])

    def slice(self, x: ir.Value, start: Operand, stop: Operand, axis: int) -> ir.Value:
        """Part of a dimension; the ends are numbers or int64 tensors of one element."""
        start, stop = ([v] if isinstance(v, int) else v for v in (start, stop))
        return self.op("Slice", x, start, stop, [axis])

    def join(self, parts: Sequence[Operand]) -> ir.Value:
        """One int64 vector of numbers and one-element tensors: a target shape, pads."""
        merged: list[Any] = []
        for part in parts:
            if isinstance(part, int) and merged and isinstance(merged[-1], list):
                merged[-1].append(part)
            else:
                merged.append([part] if isinstance(part, int) else part)
        if len(merged) == 1:
            return self.constant(merged[0]) if isinstance(merged[0], list) else merged[0]
        return self.op("Concat", *merged, axis=0)

    def range(self, stop: Operand) -> ir.Value:
        """``0, 1, ... stop - 1`` as int64."""
        end = self.op("Squeeze", stop, [0]) if isinstance(stop, ir.Value) else stop
        return self.op("Range", 0, end, 1)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The tensor in another type."""
        return self.op("Cast", x, to=int(dtype))

    # The interface of ``passes.relayout``.

    def size(self, tensor: ir.Value, dim: int) -> ir.Value:
        """The length of a dimension."""
        return self.shape(tensor, dim)

    def multiply(self, a: Operand, b: Operand) -> ir.Value:
        """A product of two lengths."""
        return self.op("Mul", *([x] if isinstance(x, int) else x for x in (a, b)))

    def divide(self, a: Operand, b: int) -> ir.Value:
        """A length divided by a number."""
        return self.op("Div", a, [b])

    def reshape(self, tensor: ir.Value, sizes: Sequence[Operand]) -> ir.Value:
        """The tensor in another shape."""
        return self.op("Reshape", tensor, self.join(sizes))

    def expand(self, tensor: ir.Value, sizes: Sequence[Operand]) -> ir.Value:
        """The tensor repeated along dimensions of size 1."""
        return self.op("Expand", tensor, self.join(sizes))

    def permute(self, tensor: ir.Value, dims: Sequence[int]) -> ir.Value:
        """The tensor with its dimensions in another order."""
        return self.op("Transpose", tensor, perm=list(dims))


def attribute(name: str, value: Any) -> ir.Attr:
    """An attribute of the ONNX type that fits a Python value."""
    if isinstance(value, (bool, int)):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    return ir.AttrInt64s(name, [int(x) for x in value])
