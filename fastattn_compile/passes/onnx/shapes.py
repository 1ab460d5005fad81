"""Shapes of results from shapes of operands, for the operators between projections, scores and masks.

General shape inference gives up at a shape that was computed with tensors and marks all that follows as unknown. With the
values of those tensors at hand the shapes behind them follow by plain rules; only they are used where it gave up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import sympy

from fastattn_compile.passes.graph import Size, same_size
from fastattn_compile.passes.onnx.sizes import SizeValues, attribute, axes_of, plain

Shape = tuple[Size, ...]


def is_known(shape: Shape | None) -> bool:
    """Whether every size means something; inference names those it gave up ``unk__...``."""
    return shape is not None and not any(
        str(s).startswith(("unk__", "?"))
        for size in shape
        if isinstance(size, sympy.Expr)
        for s in size.free_symbols
    )


def result_shape(node: ir.Node, values: SizeValues) -> Shape | None:
    """The shape of a node's first output, ``None`` where no rule says it.

    Args:
        node: The node.
        values: Shapes of operands and values of those that hold sizes.
    """
    name = node.op_type
    if node.domain == "com.microsoft":
        own = _MICROSOFT.get(name)
        return own(node, values) if own is not None else None
    if node.domain not in ("", "ai.onnx"):
        return None
    rule = _RULES.get(name) or (_broadcast if name in _ELEMENTWISE else _same if name in _SAME else None)
    return rule(node, values) if rule is not None else None


_ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Mod",
        "And",
        "Or",
        "Xor",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Where",
        "Max",
        "Min",
    ]
)
_SAME = frozenset(
    [
        "Cast",
        "Identity",
        "Softmax",
        "LogSoftmax",
        "Neg",
        "Abs",
        "Exp",
        "Log",
        "Sqrt",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Erf",
        "Not",
        "Clip",
        "IsNaN",
        "IsInf",
        "Trilu",
        "CumSum",
        "Dropout",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "LayerNormalization",
        "Reciprocal",
        "CastLike",
        "Gelu",
    ]
)


def _operand(node: ir.Node, values: SizeValues, at: int) -> Shape | None:
    if at >= len(node.inputs):
        return None
    value = node.inputs[at]
    return None if value is None else values.shape_of(value)


def _same(node: ir.Node, values: SizeValues) -> Shape | None:
    return _operand(node, values, 0)


def broadcast(shapes: list[Shape]) -> Shape | None:
    """The shape that tensors of these shapes broadcast to."""
    rank = max(len(s) for s in shapes)
    result: list[Size] = []
    for dim in range(rank):
        sizes = [s[dim - rank + len(s)] for s in shapes if dim - rank + len(s) >= 0]
        wide = [s for s in sizes if s != 1]
        if wide and not all(same_size(wide[0], other) for other in wide[1:]):
            # Two names for one size: the first is kept, as every run of the model would show them equal.
            numbers = [s for s in wide if isinstance(s, int)]
            wide = numbers or wide
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _broadcast(node: ir.Node, values: SizeValues) -> Shape | None:
    shapes = [_operand(node, values, at) for at in range(len(node.inputs))]
    known = [s for s in shapes if s is not None]
    return broadcast(known) if known and len(known) == len(shapes) else None


def _matmul(node: ir.Node, values: SizeValues) -> Shape | None:
    return _product(_operand(node, values, 0), _operand(node, values, 1))


def _fused_matmul(node: ir.Node, values: SizeValues) -> Shape | None:
    """The runtime's product, which transposes its operands on the way."""
    a, b = _operand(node, values, 0), _operand(node, values, 1)
    if a is None or b is None or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    a, b = (
        (*x[:-2], x[-1], x[-2]) if attribute(node, name, 0) and len(x) > 1 else x
        for x, name in ((a, "transA"), (b, "transB"))
    )
    return _product(a, b)


def _quantised_product(node: ir.Node, values: SizeValues) -> Shape | None:
    return _product(_operand(node, values, 0), _operand(node, values, 3))


def _quantised_broadcast(node: ir.Node, values: SizeValues) -> Shape | None:
    a, b = _operand(node, values, 0), _operand(node, values, 3)
    return None if a is None or b is None else broadcast([a, b])


def _product(a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    batch = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return None if batch is None else (*batch, a[-2], b[-1])


def _transpose(node: ir.Node, values: SizeValues) -> Shape | None:
    shape = _operand(node, values, 0)
    return (
        None
        if shape is None
        else tuple(shape[d] for d in attribute(node, "perm") or reversed(range(len(shape))))
    )


def _reshape(node: ir.Node, values: SizeValues) -> Shape | None:
    """0 keeps a size, one -1 takes what is left."""
    before, target = _operand(node, values, 0), values.of(node.inputs[1])
    if target is None or target.ndim != 1:
        return None
    sizes: list[Any] = []
    for at, size in enumerate(target):
        if size == 0 and not attribute(node, "allowzero", 0):
            if before is None or at >= len(before):
                return None
            size = before[at]
        sizes.append(size)
    if -1 in sizes:
        if before is None:
            return None
        whole, rest = sympy.prod(before), sympy.prod(s for s in sizes if s != -1)
        if rest == 0:
            return None
        # What is left is a whole number, whatever its divisor: written as inference writes it, so that both are one size.
        left = sympy.cancel(sympy.sympify(whole) / rest)
        sizes[sizes.index(-1)] = plain(left if sympy.denom(left).is_number else sympy.floor(left))
    return tuple(sizes)


def _expand(node: ir.Node, values: SizeValues) -> Shape | None:
    before, target = _operand(node, values, 0), values.of(node.inputs[1])
    return None if before is None or target is None else broadcast([before, tuple(target)])


def _full(node: ir.Node, values: SizeValues) -> Shape | None:
    target = values.of(node.inputs[0])
    return None if target is None else tuple(target)


def _unsqueeze(node: ir.Node, values: SizeValues) -> Shape | None:
    shape, axes = _operand(node, values, 0), axes_of(node, values)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(shape)
    return tuple(1 if d in new else next(rest) for d in range(rank))


def _squeeze(node: ir.Node, values: SizeValues) -> Shape | None:
    shape, axes = _operand(node, values, 0), axes_of(node, values)
    if shape is None or axes is None:
        return None
    gone = {a % len(shape) for a in axes}
    return tuple(size for d, size in enumerate(shape) if d not in gone)


def _concat(node: ir.Node, values: SizeValues) -> Shape | None:
    shapes = [_operand(node, values, at) for at in range(len(node.inputs))]
    known = [s for s in shapes if s is not None]
    if not known or len(known) != len(shapes) or len({len(s) for s in known}) != 1:
        return None
    axis = attribute(node, "axis", 0) % len(known[0])
    total: Any = 0
    for shape in known:
        total = total + shape[axis]
    return tuple(plain(total) if d == axis else size for d, size in enumerate(known[0]))


def _gather(node: ir.Node, values: SizeValues) -> Shape | None:
    shape, indices = _operand(node, values, 0), _operand(node, values, 1)
    if shape is None or indices is None:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    return (*shape[:axis], *indices, *shape[axis + 1 :])


def _gather_nd(node: ir.Node, values: SizeValues) -> Shape | None:
    shape, indices = _operand(node, values, 0), _operand(node, values, 1)
    if shape is None or not indices or not isinstance(indices[-1], int) or attribute(node, "batch_dims", 0):
        return None
    return (*indices[:-1], *shape[indices[-1] :])


def split_shapes(node: ir.Node, values: SizeValues) -> list[Shape]:
    """The shapes of the parts of a ``Split``; none where they are not known."""
    shape = _operand(node, values, 0)
    if shape is None:
        return []
    axis = attribute(node, "axis", 0) % len(shape)
    given = values.of(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = attribute(node, "split") if given is None else list(given.reshape(-1))
    if sizes is None:
        if not isinstance(shape[axis], int) or shape[axis] % len(node.outputs):
            return []
        sizes = [shape[axis] // len(node.outputs)] * len(node.outputs)
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def _quantised_projection(node: ir.Node, values: SizeValues) -> Shape | None:
    a, b = _operand(node, values, 0), _operand(node, values, 3)
    if a is None or b is None or attribute(node, "transA", 0):
        return None
    return (a[0], b[0 if attribute(node, "transB", 0) else 1])


def _gemm(node: ir.Node, values: SizeValues) -> Shape | None:
    a, b = _operand(node, values, 0), _operand(node, values, 1)
    if a is None or b is None:
        return None
    return (a[1 if attribute(node, "transA", 0) else 0], b[0 if attribute(node, "transB", 0) else 1])


def _range(node: ir.Node, values: SizeValues) -> Shape | None:
    ends = [values.of(x) for x in node.inputs]
    if any(x is None or x.size != 1 for x in ends):
        return None
    start, stop, step = (x.reshape(-1)[0] for x in ends if x is not None)
    return (plain(stop - start),) if step == 1 else None


_RULES: Mapping[str, Callable[[ir.Node, SizeValues], Shape | None]] = {
    "MatMul": _matmul, "MatMulInteger": _matmul, "Transpose": _transpose, "Reshape": _reshape, "Expand": _expand,
    "ConstantOfShape": _full, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Concat": _concat, "Gather": _gather,
    "GatherND": _gather_nd, "Range": _range, "QLinearMatMul": _quantised_product, "Gemm": _gemm,
}  # fmt: skip
_MICROSOFT: Mapping[str, Callable[[ir.Node, SizeValues], Shape | None]] = {
    "QGemm": _quantised_projection, "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul, "QLinearAdd": _quantised_broadcast,
    "QLinearMul": _quantised_broadcast, "MatMulIntegerToFloat": _matmul, "DynamicQuantizeMatMul": _matmul,
} | dict.fromkeys(
    (
        "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization", "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization", "QuantizeLinear", "DequantizeLinear", "QLinearSoftmax", "QLinearSigmoid",
        "QLinearLeakyRelu", "RotaryEmbedding",
    ),
    _same,
)  # fmt: skip
