"""Formulas of masks written as ONNX nodes: the torch functions ``mask_structure.emit`` calls, one by one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from fastattn_compile.lowering.onnx.writer import FAR, OnnxWriter

_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_BINARY: Mapping[Any, str] = {
    operator.le: "LessOrEqual", operator.lt: "Less", operator.eq: "Equal", operator.add: "Add", operator.sub: "Sub",
    operator.mul: "Mul", operator.truediv: "Div", operator.floordiv: "Div", operator.mod: "Mod", operator.pow: "Pow",
    operator.and_: "And", operator.or_: "Or", torch.minimum: "Min", torch.maximum: "Max",
}  # fmt: skip
_UNARY: Mapping[Any, str] = {
    torch.abs: "Abs", torch.exp: "Exp", torch.log: "Log", torch.sqrt: "Sqrt", torch.tanh: "Tanh",
    torch.sigmoid: "Sigmoid", torch.logical_not: "Not",
}  # fmt: skip


class FactWriter:
    """Calls of torch functions as ONNX nodes.

    Types are followed, because ONNX converts none: numbers take the type of the tensor they meet.

    Args:
        writer: Takes the nodes.
    """

    def __init__(self, writer: OnnxWriter) -> None:
        self.w = writer
        self.types: dict[ir.Value, ir.DataType] = {}

    def type_of(self, value: ir.Value) -> ir.DataType:
        """The type of a value that was written here, or that the graph has."""
        found = self.types.get(value) or value.dtype
        if found is None and value.producer() in self.w.nodes:
            return _INT64  # what was written elsewhere without a type is a size
        if found is None:
            raise ValueError(f"the type of {value.name} is not known")
        return found

    def load(self, value: ir.Value) -> ir.Value:
        """A tensor of the graph; integers of any width as int64, so that they compare with positions."""
        if value.dtype in (ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16):
            return self._typed(self.w.cast(value, _INT64), _INT64)
        return value

    def __call__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The handle of ``function(*args, **kwargs)``.

        Raises:
            ValueError: The function cannot be said in ONNX here.
        """
        if function in _BINARY:
            return self._binary(function, *args)
        if function is operator.ne:
            return self._typed(self.w.op("Not", self._binary(operator.eq, *args)), _BOOL)
        if function in _UNARY:
            out = _BOOL if function is torch.logical_not else self.type_of(args[0])
            return self._typed(self.w.op(_UNARY[function], args[0]), out)
        special: Callable[..., Any] | None = _special(self).get(function)
        if special is None:
            raise ValueError(f"{getattr(function, '__name__', function)} cannot be written in ONNX")
        return special(*args, **kwargs)

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        self.types[value] = dtype
        return value

    def _operand(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A tensor of a type, from a number or a tensor."""
        if isinstance(value, sympy.Expr):
            raise ValueError(f"the size {value} cannot be written")
        if not isinstance(value, ir.Value):
            return self._typed(self.w.constant(np.array(value), dtype), dtype)
        if self.type_of(value) == dtype:
            return value
        return self._typed(self.w.cast(value, dtype), dtype)

    def _binary(self, function: Any, a: Any, b: Any) -> ir.Value:
        types = [self.type_of(x) for x in (a, b) if isinstance(x, ir.Value)]
        real = [t for t in types if t not in (_INT64, _BOOL)]
        number = next((x for x in (a, b) if isinstance(x, float) and x != int(x)), None)
        common = real[0] if real else ir.DataType.FLOAT if number is not None else types[0]
        if function in (operator.and_, operator.or_):
            common = _BOOL
        elif common == _BOOL and function is not operator.eq:
            common = _INT64
        left, right = self._operand(a, common), self._operand(b, common)
        truth = function in (operator.le, operator.lt, operator.eq, operator.and_, operator.or_)
        # Division of int64 in ONNX rounds to 0: positions and sizes are not negative.
        return self._typed(self.w.op(_BINARY[function], left, right), _BOOL if truth else common)

    def _arange(self, stop: Any, device: Any = None) -> ir.Value:
        return self._typed(self.w.range(stop), _INT64)

    def _full(self, sizes: Sequence[Any], value: Any, device: Any = None) -> ir.Value:
        scalar = self.w.constant(np.array(value))
        dtype = _BOOL if isinstance(value, bool) else _INT64 if isinstance(value, int) else self.w.dtype
        return self._typed(self.w.expand(scalar, sizes) if sizes else scalar, dtype)

    def _broadcast(self, x: ir.Value, sizes: Sequence[Any]) -> ir.Value:
        return self._typed(self.w.expand(x, sizes), self.type_of(x))

    def _where(self, condition: ir.Value, a: Any, b: Any) -> ir.Value:
        types = [self.type_of(x) for x in (a, b) if isinstance(x, ir.Value)]
        dtype = types[0] if types else self.type_of(self.w.constant(np.array(a)))
        return self._typed(
            self.w.op("Where", condition, self._operand(a, dtype), self._operand(b, dtype)), dtype
        )

    def _clamp(self, x: ir.Value, min: Any = None, max: Any = None) -> ir.Value:
        for bound, op_type in ((min, "Max"), (max, "Min")):
            if bound is not None:
                x = self._typed(self.w.op(op_type, x, self._operand(bound, self.type_of(x))), self.type_of(x))
        return x

    def _to(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self._operand(x, _INT64)

    def _getitem(self, x: ir.Value, index: Any) -> ir.Value:
        """Numbers, slices and new axes, or one index tensor a dimension."""
        dtype, entries = self.type_of(x), index if isinstance(index, tuple) else (index,)
        if any(isinstance(e, ir.Value) for e in entries):
            return self._typed(self._gathered(x, entries), dtype)
        axis, numbers, news, place = 0, [], [], 0
        for entry in entries:
            if entry is None:
                news.append(place)
                place += 1
                continue
            if isinstance(entry, slice):
                if entry != slice(None):
                    x = self.w.slice(x, entry.start or 0, FAR if entry.stop is None else entry.stop, axis)
                place += 1
            else:
                x = self.w.slice(x, entry, FAR if entry == -1 else entry + 1, axis)
                numbers.append(axis)
            axis += 1
        if numbers:
            x = self.w.op("Squeeze", x, numbers)
        if news:
            x = self.w.op("Unsqueeze", x, news)
        return self._typed(x, dtype)

    def _gathered(self, x: ir.Value, entries: Sequence[Any]) -> ir.Value:
        """``x[i, j, ...]`` with index tensors that broadcast against each other."""
        indices = [self._operand(e, _INT64) for e in entries]
        if len(indices) == 1:
            return self.w.op("Gather", x, indices[0], axis=0)
        whole = indices[0]
        for other in indices[1:]:
            whole = self.w.op("Add", whole, other)
        shape = self.w.op("Shape", whole)
        columns = [self.w.op("Unsqueeze", self.w.op("Expand", i, shape), [-1]) for i in indices]
        return self.w.op("GatherND", x, self.w.op("Concat", *columns, axis=-1))


def _special(facts: FactWriter) -> Mapping[Any, Callable[..., Any]]:
    """Functions that are more than one node."""
    return {
        torch.arange: facts._arange, operator.getitem: facts._getitem, torch.where: facts._where,
        torch.full: facts._full, torch.broadcast_to: facts._broadcast, torch.clamp: facts._clamp,
        torch.Tensor.to: facts._to,
    }  # fmt: skip
