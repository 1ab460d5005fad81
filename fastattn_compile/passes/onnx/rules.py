"""What ONNX operators mean: from a node to a kind of the view, one small function for a family of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from fastattn_compile.passes.fx_rules import Meaning
from fastattn_compile.passes.graph import Node, Size, same_size
from fastattn_compile.passes.onnx.sizes import SizeValues, attribute, axes_of

MICROSOFT = "com.microsoft"
# A constant of more integers is a weight, and what it stands for is not computed.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Call:
    """A node with its operands as the view has them.

    Args:
        node: The node.
        inputs: Operands; ``None`` where one is absent.
        values: Integer tensors that hold sizes.
        shape: Shape of a value.
        opset: Version of the standard operators.
    """

    node: ir.Node
    inputs: list[Any]
    values: SizeValues
    shape: Callable[[ir.Value], tuple[Size, ...] | None]
    opset: int

    def input(self, at: int) -> Any:
        """An operand, a number when it is known to be one, ``None`` when absent."""
        operand = self.inputs[at] if at < len(self.inputs) else None
        return _number(operand)

    def tensor(self, at: int) -> Node | None:
        """An operand as a node."""
        operand = self.inputs[at] if at < len(self.inputs) else None
        return operand if isinstance(operand, Node) else None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return attribute(self.node, name, default)

    def sizes(self, at: int) -> list[Any] | None:
        """The elements of an integer operand, where they are known."""
        if at >= len(self.node.inputs):
            return None
        read = self.values.of(self.node.inputs[at])
        return None if read is None else list(read.reshape(-1))

    def result(self, at: int = 0) -> tuple[Size, ...] | None:
        """The shape of an output."""
        return self.shape(self.node.outputs[at])

    @property
    def rank(self) -> int | None:
        """Dimensions of the first operand."""
        x = self.tensor(0)
        return None if x is None or x.shape is None else len(x.shape)


Rule = Callable[[Call, int], "Meaning | None"]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers the rule of some operators."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, name): function for name in names})
        return function

    return register


def _number(operand: Any) -> Any:
    """A scalar constant as the number it is."""
    if isinstance(operand, Node) and operand.kind in ("constant", "full") and operand.shape == ():
        value = operand.attributes.get("value")
        if isinstance(value, (int, float)):
            return value
    return operand


def like(kind: str, x: Any, *others: Any, **attributes: Any) -> Meaning:
    """A meaning of the shape and type of its first operand."""
    return Meaning(kind, (x, *others), attributes, x.shape, x.dtype)


# ---- elementwise

_BINARY: Mapping[str, str] = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Mod": "mod", "Equal": "eq",
    "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "And": "and", "Or": "or", "Xor": "ne",
}  # fmt: skip
_UNARY: Mapping[str, str] = {
    "Neg": "neg", "Abs": "abs", "Tanh": "tanh", "Log": "log", "Sqrt": "sqrt", "Sigmoid": "sigmoid", "Relu": "relu",
    "Exp": "exp", "Not": "not",
}  # fmt: skip


@rule(*_BINARY)
def _binary(call: Call, at: int) -> Meaning:
    a, b = call.input(0), call.input(1)
    kind = _BINARY[call.node.op_type]
    x = call.tensor(0)
    if kind == "sub" and (difference := _difference(a, b)) is not None:
        return difference
    if kind == "div" and x is not None and x.dtype is not None and not x.dtype.is_floating_point:
        kind = "floordiv"
    if kind == "mul" and isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return Meaning("full", (), {"value": a * b})
    return Meaning(kind, (a, b))


def _difference(a: Any, b: Any) -> Meaning | None:
    """What exporters write for ``torch.diff(x, prepend=first)``: of both joined, all but the first less all but the last."""
    if not all(isinstance(x, Node) and x.kind == "index" and len(x.inputs) == 1 for x in (a, b)):
        return None
    joined = a.inputs[0]
    if joined is not b.inputs[0] or joined.kind != "cat" or len(joined.inputs) != 2 or joined.shape is None:
        return None
    (first, x), along = joined.inputs, joined.attributes["dim"]
    if not isinstance(first, Node) or first.shape is None or not same_size(first.shape[along], 1):
        return None
    whole, to_last = [slice(None)] * len(joined.shape), joined.shape[along] - 1
    if a.attributes["index"] != _replaced(whole, along, slice(1, None)):
        return None
    if b.attributes["index"] != _replaced(whole, along, slice(None, to_last)):
        return None
    return Meaning("diff", (x, first), {"dim": along})


def _replaced(index: list[slice], at: int, entry: slice) -> tuple[slice, ...]:
    return (*index[:at], entry, *index[at + 1 :])


@rule(*_UNARY)
def _unary(call: Call, at: int) -> Meaning:
    x = call.tensor(0)
    if call.node.op_type == "Not" and x is not None and x.kind == "eq":
        return Meaning("ne", x.inputs)
    return Meaning(_UNARY[call.node.op_type], (call.inputs[0],))


@rule("Reciprocal")
def _reciprocal(call: Call, at: int) -> Meaning:
    return Meaning("div", (1, call.inputs[0]))


@rule("Max", "Min", "Sum")
def _several(call: Call, at: int) -> Meaning | None:
    kind = {"Max": "maximum", "Min": "minimum", "Sum": "add"}[call.node.op_type]
    if len(call.inputs) == 1:
        return Meaning("identity", (call.inputs[0],))
    if len(call.inputs) != 2:
        return None
    return Meaning(kind, (call.input(0), call.input(1)))


@rule("Where")
def _where(call: Call, at: int) -> Meaning:
    condition, yes, no = call.inputs[0], call.input(1), call.input(2)
    # What exporters write around a softmax whose row may be hidden whole: rows of NaN become 0. Ours are 0 already.
    if (
        isinstance(condition, Node)
        and condition.attributes.get("target") == "IsNaN"
        and condition.inputs[0] is no
    ):
        return Meaning("identity", (no,))
    return Meaning("where", (condition, yes, no))


@rule("Clip")
def _clip(call: Call, at: int) -> Meaning | None:
    low, high = (call.input(i) for i in (1, 2)) if call.opset >= 11 else (call.get("min"), call.get("max"))
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return Meaning("clamp", (call.inputs[0],), {"min": low, "max": high})


@rule("Cast", "CastLike")
def _cast(call: Call, at: int) -> Meaning:
    x = call.tensor(0)
    target = call.node.outputs[0].dtype
    same = x is not None and x.origin is not None and x.origin.dtype == target
    return Meaning("identity" if same else "cast", (call.inputs[0],))


@rule("Identity")
def _identity(call: Call, at: int) -> Meaning:
    return Meaning("identity", (call.inputs[0],))


@rule("Dropout")
def _dropout(call: Call, at: int) -> Meaning | None:
    if at:
        return None
    training = call.input(2)
    probability = call.input(1) if call.opset >= 12 else call.get("ratio", 0.5)
    active = training is True or training == 1
    return Meaning("dropout", (call.inputs[0],), {"p": probability if active else 0.0})


# ---- quantisation: the attention that is meant is that of the real numbers


@rule("QuantizeLinear")
@rule("QuantizeLinear", domain=MICROSOFT)
def _quantised(call: Call, at: int) -> Meaning:
    x = call.inputs[0]
    return Meaning("identity", (x,), {}, None, x.dtype)


@rule("DequantizeLinear")
@rule("DequantizeLinear", domain=MICROSOFT)
def _dequantised(call: Call, at: int) -> Meaning:
    return _real(call, 0, 1, 2)


def _real(call: Call, at: int, scale_at: int, zero_at: int) -> Any:
    """An operand that is stored as integers, as the real numbers they stand for."""
    x = call.tensor(at)
    if x is None or x.kind not in ("constant", "parameter", "full"):
        return Meaning("identity", (x,), {}, x.shape, x.dtype) if x is not None else None
    value, scale = x.attributes.get("value"), _scalar(call, scale_at)
    zero = _scalar(call, zero_at) if zero_at < len(call.inputs) and call.inputs[zero_at] is not None else 0
    if value is None or scale is None or zero is None or x.dtype is None or x.dtype.is_floating_point:
        return Meaning("parameter", (), {}, x.shape, torch.float32)
    if isinstance(value, torch.Tensor):
        if value.numel() > _LARGEST:
            return Meaning("parameter", (), {}, x.shape, torch.float32)
        value = value.float()
    return Meaning("constant", (), {"value": (value - zero) * scale}, x.shape, torch.float32)


def _scalar(call: Call, at: int) -> float | None:
    """The number an operand of one element is."""
    x = call.tensor(at)
    value = x.attributes.get("value") if x is not None and x.kind in ("constant", "full") else None
    return value if isinstance(value, (int, float)) else None


@rule("DynamicQuantizeLinear")
def _dynamically_quantised(call: Call, at: int) -> Meaning:
    x = call.inputs[0]
    if at == 0:
        return Meaning("identity", (x,), {}, None, x.dtype)
    return Meaning("full", (), {"value": 1.0 if at == 1 else 0})


@rule("MatMulInteger")
def _integer_product(call: Call, at: int) -> Meaning:
    a, b = call.inputs[:2]
    return Meaning("matmul", (a, b), {}, None, a.dtype if isinstance(a, Node) else None)


@rule("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=MICROSOFT)
def _product_of_quantised(call: Call, at: int) -> Meaning | None:
    a, b = call.tensor(0), call.tensor(1)
    if a is None or b is None:
        return None
    bias = call.tensor(6 if call.node.op_type == "MatMulIntegerToFloat" else 4)
    product = Meaning("matmul", (a, b), {}, call.result(), torch.float32)
    return product if bias is None else Meaning("add", (product, bias))


@rule("QLinearMatMul")
def _quantised_product(call: Call, at: int) -> Meaning:
    a, b = _real(call, 0, 1, 2), _real(call, 3, 4, 5)
    return Meaning("matmul", (a, b), {}, None, _type_of(a, b))


def _type_of(*operands: Any) -> Any:
    """The type of the real numbers: that of an operand that is no constant."""
    computed = (x.dtype for x in operands if x is not None and x.kind not in ("constant", "parameter"))
    return next((dtype for dtype in computed if dtype is not None), torch.float32)


@rule("QGemm", domain=MICROSOFT)
def _quantised_projection(call: Call, at: int) -> Meaning | None:
    if call.get("transA", 0):
        return None
    a, b = _real(call, 0, 1, 2), call.tensor(3)
    if b is None:
        return None
    weight: Any = b if not call.get("transB", 0) else _transposed(b)
    return Meaning("linear", (a, weight, None), {}, None, _type_of(a))


@rule("QLinearSoftmax", domain=MICROSOFT)
def _quantised_softmax(call: Call, at: int) -> Meaning | None:
    rank, x = call.rank, call.tensor(0)
    axis = int(call.get("axis", -1))
    if rank is None or x is None:
        return _unread(call)
    # Its own attribute says which opset's softmax it is.
    if int(call.get("opset", 13)) < 13 and axis % rank != rank - 1:
        return None
    return Meaning("softmax", (x,), {"dim": axis % rank}, None, x.dtype)


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def _quantised_binary(call: Call, at: int) -> Meaning:
    a, b = _real(call, 0, 1, 2), _real(call, 3, 4, 5)
    kind = "add" if call.node.op_type == "QLinearAdd" else "mul"
    return Meaning(kind, (a, b), {}, None, _type_of(a, b))


@rule("QLinearWhere", domain=MICROSOFT)
def _quantised_choice(call: Call, at: int) -> Meaning:
    yes, no = _real(call, 1, 2, 3), _real(call, 4, 5, 6)
    return Meaning("where", (call.inputs[0], yes, no), {}, None, _type_of(yes, no))


@rule("QLinearConcat", domain=MICROSOFT)
def _quantised_parts(call: Call, at: int) -> Meaning | None:
    shape = call.result()
    if shape is None:
        return None
    parts = tuple(_real(call, i, i + 1, i + 2) for i in range(2, len(call.inputs), 3))
    return Meaning("cat", parts, {"dim": int(call.get("axis", 0)) % len(shape)}, None, _type_of(*parts))


# ---- products and softmaxes


@rule("MatMul")
def _matmul(call: Call, at: int) -> Meaning:
    return Meaning("matmul", (call.inputs[0], call.inputs[1]))


@rule("Gemm")
def _gemm(call: Call, at: int) -> Meaning | None:
    a, b = call.tensor(0), call.tensor(1)
    if a is None or b is None:
        return None
    if call.get("transA", 0):
        a_meaning: Any = _transposed(a)
    else:
        a_meaning = a
    b_meaning: Any = b if not call.get("transB", 0) else _transposed(b)
    return Meaning("linear", (a_meaning, b_meaning, call.tensor(2)))


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def _fused_product(call: Call, at: int) -> Meaning | None:
    a, b = call.tensor(0), call.tensor(1)
    if a is None or b is None or call.get("transBatchA", 0) or call.get("transBatchB", 0):
        return None
    if any(x.shape is None and call.get(f"trans{side}", 0) for x, side in zip((a, b), "AB")):
        return None  # which dimensions are the last two is not known
    left = _transposed(a) if call.get("transA", 0) else a
    right = _transposed(b) if call.get("transB", 0) else b
    product = Meaning("matmul", (left, right), {}, call.result(), a.dtype)
    return Meaning("mul", (product, float(call.get("alpha", 1.0))))


def _transposed(x: Node) -> Meaning:
    shape = x.shape or ()
    rank = len(shape)
    dims = (*range(rank - 2), rank - 1, rank - 2)
    return Meaning("permute", (x,), {"dims": dims}, tuple(shape[d] for d in dims), x.dtype)


@rule("Einsum")
def _einsum(call: Call, at: int) -> Meaning:
    return Meaning("einsum", tuple(call.inputs), {"equation": str(call.get("equation"))})


@rule("Softmax", "LogSoftmax")
def _softmax(call: Call, at: int) -> Meaning | None:
    rank = call.rank
    if rank is None:
        return _unread(call)
    axis = int(call.get("axis", -1 if call.opset >= 13 else 1))
    axis = axis + rank if axis < 0 else axis
    # Before opset 13 all axes from this one on are one: only the last by itself is a softmax over one axis.
    if call.opset < 13 and axis != rank - 1:
        return None
    return Meaning(
        "softmax" if call.node.op_type != "LogSoftmax" else "log_softmax", (call.inputs[0],), {"dim": axis}
    )


def _unread(call: Call) -> Meaning:
    """A softmax that nothing can be said of but that it is there."""
    operands = tuple(x for x in call.inputs if isinstance(x, Node))
    return Meaning("mha", operands, {"reason": "the shape of what the softmax is taken of is not known"})


@rule("ReduceSum", "ReduceMax")
def _reduction(call: Call, at: int) -> Meaning | None:
    rank, axes = call.rank, axes_of(call.node, call.values)
    if rank is None or axes is None:
        return None
    dims = tuple(sorted(a + rank if a < 0 else a for a in axes))
    kind = "sum" if call.node.op_type == "ReduceSum" else "amax"
    return Meaning(kind, (call.inputs[0],), {"dims": dims, "keepdim": bool(call.get("keepdims", 1))})


# ---- new tensors


@rule("Range")
def _range(call: Call, at: int) -> Meaning | None:
    start, step = call.sizes(0), call.sizes(2)
    if not start or not step:
        return None
    stop = call.sizes(1)
    shape: tuple[Size, ...] | None = None
    if stop and step[0] == 1:
        shape = (stop[0] - start[0],)
    return Meaning("arange", (), {"start": start[0], "step": step[0]}, shape)


@rule("ConstantOfShape")
def _filled(call: Call, at: int) -> Meaning:
    fill = call.get("value")
    return Meaning("full", (), {"value": 0.0 if fill is None else fill.numpy().reshape(-1)[0].item()})


@rule("Trilu")
def _triangle(call: Call, at: int) -> Meaning:
    diagonal = call.sizes(1)
    kind = "triu" if call.get("upper", 1) else "tril"
    return Meaning(kind, (call.inputs[0],), {"diagonal": diagonal[0] if diagonal else 0})


@rule("CumSum")
def _cumsum(call: Call, at: int) -> Meaning | None:
    axis, rank = call.sizes(1), call.rank
    if not axis or rank is None or call.get("exclusive", 0) or call.get("reverse", 0):
        return None
    return Meaning("cumsum", (call.inputs[0],), {"dim": int(axis[0]) % rank})
