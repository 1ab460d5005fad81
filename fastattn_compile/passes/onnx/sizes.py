"""Sizes in an ONNX graph: symbolic shapes, and the small integer tensors that shapes are computed with.

ONNX computes shapes with tensors (``Shape``, ``Gather``, ``Concat``, ``Reshape``). Their values are followed as sympy
expressions of the named dimensions of the inputs, so that a reshape to ``(batch, length, heads, d)`` is seen as that.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
from numpy.typing import NDArray

from fastattn_compile.passes.graph import Size

_unknown = itertools.count()
# Larger integer tensors hold data, not sizes.
_LARGEST = 256
# No tensor has more dimensions whose product a size could be.
_HIGHEST = 8
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: lambda a, b: _power(a, b),
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "floor": sympy.floor, "ceiling": sympy.ceiling, "Max": sympy.Max, "Min": sympy.Min, "Mod": operator.mod,
}  # fmt: skip


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a named dimension: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


def parse_size(text: str) -> Size:
    """Reads a dimension: a number, a name, or arithmetic of both. What is none of these is a name as a whole.

    Args:
        text: As it stands in the file. Nothing of it is executed.
    """

    def read(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return symbol(node.id)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](read(node.left), read(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -read(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return _FUNCTIONS[node.func.id](*(read(x) for x in node.args))
        raise ValueError

    try:
        return plain(read(ast.parse(text.strip(), mode="eval").body))
    except (ValueError, SyntaxError, RecursionError, MemoryError, ZeroDivisionError, TypeError):
        return symbol(text)


def _power(base: Any, exponent: Any) -> Any:
    """A power that is a size; text of a file may ask for a number that no machine can hold.

    Exporters write powers of named dimensions, too: ``(n**2)//n`` stands for a size that was divided out again.
    """
    largest = 62 if isinstance(base, int) else _HIGHEST
    if not isinstance(exponent, int) or not 0 <= exponent <= largest:
        raise ValueError
    if isinstance(base, int) and abs(base) > 1 << 31:
        raise ValueError
    return base**exponent


def plain(size: Any) -> Size:
    """A size as ``int`` when it is a number; a truth value stays one."""
    if isinstance(size, (bool, np.bool_)):
        return bool(size)
    expression = sympy.sympify(size)
    return int(expression) if expression.is_Integer else expression


Values = NDArray[np.object_]


class SizeValues:
    """Follows integer tensors that hold sizes.

    Args:
        shape_of: The shape of a value, ``None`` when unknown.
        constant_of: The numpy value of a constant, ``None`` when it is none.
    """

    def __init__(
        self,
        shape_of: Callable[[ir.Value], tuple[Size, ...] | None],
        constant_of: Callable[[ir.Value], NDArray[Any] | None],
    ) -> None:
        self.shape_of, self.constant_of = shape_of, constant_of
        self.known: dict[ir.Value, Values] = {}

    def of(self, value: ir.Value | None) -> Values | None:
        """The elements of a value as numbers and sympy expressions, ``None`` when they are not known."""
        if value is None:
            return None
        if value in self.known:
            return self.known[value]
        constant = self.constant_of(value)
        if constant is None or constant.size > _LARGEST or constant.dtype.kind not in "iub":
            return None
        return constant.astype(object)

    def follow(self, node: ir.Node) -> None:
        """Computes the outputs of a node from what is known of its inputs."""
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            return
        try:
            found = rule(self, node)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, AttributeError):
            return
        if found is None:
            return
        array = np.asarray(found, dtype=object)
        if array.size <= _LARGEST:
            self.known[node.outputs[0]] = np.asarray(
                np.vectorize(plain, otypes=[object])(array) if array.size else array
            )


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute of a node, as plain Python."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def axes_of(node: ir.Node, values: SizeValues) -> list[int] | None:
    """Axes of a reduction, squeeze or unsqueeze: an attribute in old opsets, an input in newer ones."""
    given = attribute(node, "axes")
    if given is not None:
        return [int(x) for x in given]
    read = values.of(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if read is None else [int(x) for x in read.reshape(-1)]


def _shape(values: SizeValues, node: ir.Node) -> Values | None:
    shape = values.shape_of(node.inputs[0]) if node.inputs[0] is not None else None
    if shape is None:
        return None
    start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
    return np.array(list(shape)[slice(start, end)], dtype=object)


def _elementwise(function: Callable[..., Any]) -> Callable[[SizeValues, ir.Node], Values | None]:
    def rule(values: SizeValues, node: ir.Node) -> Values | None:
        read = [values.of(x) for x in node.inputs]
        if any(x is None for x in read):
            return None
        result: Any = read[0]
        for other in read[1:]:
            result = np.frompyfunc(function, 2, 1)(result, other)
        if len(read) == 1:
            result = np.frompyfunc(function, 1, 1)(result)
        return np.asarray(result, dtype=object)

    return rule


def _divide(a: Any, b: Any) -> Any:
    quotient = sympy.sympify(a) / sympy.sympify(b)
    return quotient if quotient.is_integer else sympy.floor(quotient)


def _equal(a: Any, b: Any) -> Any:
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
    if difference == 0:
        return True
    # Named dimensions are positive: they never equal a negative number, which is how exporters write "as it was".
    if difference.is_positive or difference.is_negative or difference.is_nonzero:
        return False
    raise ValueError("not known")


def _gather(values: SizeValues, node: ir.Node) -> Values | None:
    data, indices = values.of(node.inputs[0]), values.of(node.inputs[1])
    if data is None or indices is None:
        return None
    return np.take(data, indices.astype(int), axis=attribute(node, "axis", 0))


def _slice(values: SizeValues, node: ir.Node) -> Values | None:
    data = values.of(node.inputs[0])
    given = [values.of(x) for x in node.inputs[1:]]
    if data is None or len(given) < 2 or any(x is None for x in given[:2]) or data.ndim != 1:
        return None
    start, stop = (int(np.clip(int(x[0]), -(1 << 31), 1 << 31)) for x in given[:2])  # type: ignore[index]
    step = int(given[3][0]) if len(given) > 3 and given[3] is not None else 1
    return data[start:stop:step]


def _concat(values: SizeValues, node: ir.Node) -> Values | None:
    parts = [part for part in map(values.of, node.inputs) if part is not None]
    return np.concatenate(parts, axis=attribute(node, "axis", 0)) if len(parts) == len(node.inputs) else None


def _reshape(values: SizeValues, node: ir.Node) -> Values | None:
    data = values.of(node.inputs[0])
    shape = values.shape_of(node.outputs[0])
    if data is None or shape is None or any(not isinstance(x, int) for x in shape):
        return None
    return data.reshape([int(x) for x in shape])


def _full(values: SizeValues, node: ir.Node) -> Values | None:
    shape = values.of(node.inputs[0])
    if shape is None or any(not isinstance(x, int) for x in shape.reshape(-1)):
        return None
    fill = attribute(node, "value")
    if math.prod(shape.reshape(-1)) > _LARGEST:
        return None
    number = fill.numpy().reshape(-1)[0].item() if fill is not None else 0
    return np.full([int(x) for x in shape], number, dtype=object) if isinstance(number, int) else None


def _range(values: SizeValues, node: ir.Node) -> Values | None:
    ends = [values.of(x) for x in node.inputs]
    if any(x is None or not isinstance(x.reshape(-1)[0], int) for x in ends):
        return None
    numbers = range(*(x.reshape(-1)[0] for x in ends))  # type: ignore[union-attr]
    return np.array(numbers, dtype=object) if len(numbers) <= _LARGEST else None


def _where(values: SizeValues, node: ir.Node) -> Values | None:
    condition, a, b = (values.of(x) for x in node.inputs)
    if condition is None or a is None or b is None:
        return None
    return np.where(condition.astype(bool), a, b)


def _product(values: SizeValues, node: ir.Node) -> Values | None:
    data = values.of(node.inputs[0])
    if data is None or axes_of(node, values) not in (None, [0], [-1]):
        return None
    total = np.prod(data)
    return np.array([total] if attribute(node, "keepdims", 1) else total, dtype=object)


def _expand(values: SizeValues, node: ir.Node) -> Values | None:
    data, shape = values.of(node.inputs[0]), values.of(node.inputs[1])
    if data is None or shape is None:
        return None
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(int(x) for x in shape)))


def _first(values: SizeValues, node: ir.Node) -> Values | None:
    return values.of(node.inputs[0])


_RULES: Mapping[str, Callable[[SizeValues, ir.Node], Values | None]] = {
    "Shape": _shape, "Gather": _gather, "Slice": _slice, "Concat": _concat, "Reshape": _reshape, "Squeeze": _reshape,
    "Unsqueeze": _reshape, "Flatten": _reshape, "ConstantOfShape": _full, "Range": _range,
    "Where": _where, "ReduceProd": _product,
    "Expand": _expand, "Identity": _first, "Cast": _first, "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub), "Mul": _elementwise(operator.mul), "Div": _elementwise(_divide),
    "Mod": _elementwise(operator.mod), "Neg": _elementwise(operator.neg), "Equal": _elementwise(_equal),
    "Max": _elementwise(sympy.Max), "Min": _elementwise(sympy.Min),
}  # fmt: skip


def shapes_of(shape: ir.Shape | None) -> tuple[Size, ...] | None:
    """The shape of an onnx_ir value as sizes; ``None`` when the rank is unknown. Unknown sizes are equal to no other."""
    if shape is None:
        return None
    return tuple(
        d if isinstance(d, int) else parse_size(d.value) if d.value else symbol(f"?{next(_unknown)}")
        for d in shape
    )
