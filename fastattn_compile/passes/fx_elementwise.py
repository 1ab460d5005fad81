"""What calls that keep the layout mean: elementwise functions, softmaxes, reductions, new tensors. Rules as
in ``fx_rules``."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from fastattn_compile.passes.fx_rules import (
    Meaning,
    Result,
    dimension,
    is_boolean,
    is_number,
    rank,
    rule,
    scalar,
)
from fastattn_compile.passes.fx_vocabulary import Call
from fastattn_compile.passes.graph import Node

# ---- elementwise


@rule(
    "add",
    "sub",
    "mul",
    "div",
    "floordiv",
    "mod",
    "pow",
    "maximum",
    "minimum",
    "le",
    "lt",
    "ge",
    "gt",
    "eq",
    "ne",
)
def _binary(call: Call, result: Result) -> Meaning | None:
    a, b = scalar(call.get("x")), scalar(call.get("y"))
    if call.swapped:
        a, b = b, a
    if call.name == "div" and call.get("rounding_mode") is not None:
        return Meaning("floordiv", (a, b)) if call.get("rounding_mode") == "floor" else None
    alpha = call.get("alpha", 1)
    if call.name in ("add", "sub") and alpha != 1:
        # torch.rsub(a, b, alpha) is b - alpha * a: the factor is on what is added or taken off.
        b = b * alpha if is_number(b) else Meaning("mul", (b, alpha), {}, b.shape, b.dtype)
    if result.dtype == torch.bool and call.name in ("add", "mul"):
        return Meaning("or" if call.name == "add" else "and", (a, b))
    return Meaning(call.name, (a, b))


@rule("neg", "abs", "tanh", "log", "sqrt", "sigmoid", "relu", "exp")
def _unary(call: Call, result: Result) -> Meaning | None:
    return Meaning(call.name, (call.get("x"),))


@rule("square", "reciprocal", "exp2")
def _as_binary(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    return {
        "square": Meaning("pow", (x, 2)),
        "reciprocal": Meaning("div", (1, x)),
        "exp2": Meaning("pow", (2, x)),
    }[call.name]


def truth(value: Any) -> Any:
    """An operand as a boolean: itself, or whether it differs from zero."""
    if is_boolean(value) or not isinstance(value, Node):
        return value
    return Meaning("ne", (value, 0), {}, value.shape, torch.bool)


@rule("and", "or", "xor", "invert")
def _bitwise(call: Call, result: Result) -> Meaning | None:
    if result.dtype != torch.bool:
        return None
    if call.name == "invert":
        return Meaning("not", (call.get("x"),))
    operands = (scalar(call.get("x")), scalar(call.get("y")))
    return Meaning("ne" if call.name == "xor" else call.name, operands)


@rule("logical_and", "logical_or", "logical_xor", "logical_not")
def _logical(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    if call.name == "logical_not":
        return Meaning("not", (x,)) if is_boolean(x) else Meaning("eq", (x, 0))
    kind = {"logical_and": "and", "logical_or": "or", "logical_xor": "ne"}[call.name]
    return Meaning(kind, (truth(x), truth(call.get("y"))))


@rule("where")
def _where(call: Call, result: Result) -> Meaning | None:
    if "x" not in call.arguments or "y" not in call.arguments:
        return None
    condition = call.get("condition")
    return Meaning("where", (truth(condition), scalar(call.get("x")), scalar(call.get("y"))))


@rule("masked_fill")
def _masked_fill(call: Call, result: Result) -> Meaning | None:
    return Meaning("where", (truth(call.get("mask")), scalar(call.get("value")), call.get("x")))


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(call: Call, result: Result) -> Meaning | None:
    low, high = scalar(call.get("min")), scalar(call.get("max"))
    if call.spelled == "hardtanh":
        low, high = call.get("min", -1.0), call.get("max", 1.0)
    x = call.get("x")
    if isinstance(low, Node) and high is None:
        return Meaning("maximum", (x, low))
    if isinstance(high, Node) and low is None:
        return Meaning("minimum", (x, high))
    if isinstance(low, Node) or isinstance(high, Node):
        return Meaning("minimum", (Meaning("maximum", (x, low), {}, result.shape, result.dtype), high))
    return Meaning("clamp", (x,), {"min": low, "max": high})


@rule("cast")
def _cast(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    same = isinstance(x, Node) and x.dtype is not None and x.dtype == result.dtype
    return Meaning("identity" if same else "cast", (x,))


@rule("identity")
def _identity(call: Call, result: Result) -> Meaning | None:
    return Meaning("identity", (call.get("x"),))


@rule("_assert_tensor_metadata", "_assert_async", "_functional_assert_async", "_assert_scalar", "_assert")
def _assertion(call: Call, result: Result) -> Meaning | None:
    return Meaning("identity", tuple(v for v in call.arguments.values() if isinstance(v, Node))[:1])


@rule(
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
)
def _dropout(call: Call, result: Result) -> Meaning | None:
    # F.dropout's defaults; every other spelling names both.
    p, training = call.get("p", 0.5), call.get("training", True)
    if training is False or (is_number(p) and p == 0):
        return Meaning("dropout", (call.get("x"),), {"p": 0.0})
    return Meaning("dropout", (call.get("x"),), {"p": p}) if call.name == "dropout" else None


# ---- softmaxes and reductions


@rule("softmax", "log_softmax")
def _softmax(call: Call, result: Result) -> Meaning | None:
    x, dim = call.get("x"), call.get("dim")
    of = rank(x)
    if dim is None and of is not None:
        # The deprecated default of torch.nn.functional.softmax.
        dim = 0 if of in (0, 1, 3) else 1
    dim = dimension(dim, of)
    return None if dim is None else Meaning(call.name, (x,), {"dim": dim})


@rule("softmin")
def _softmin(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    dim = dimension(call.get("dim"), rank(x))
    return (
        None
        if dim is None
        else Meaning("softmax", (Meaning("neg", (x,), {}, x.shape, x.dtype),), {"dim": dim})
    )


@rule("_masked_softmax")
def _masked_softmax(call: Call, result: Result) -> Meaning | None:
    x, mask = call.get("x"), call.get("mask")
    dim = dimension(call.get("dim", -1), rank(x))
    if dim is None or not isinstance(mask, Node) or mask.shape is None:
        return None
    hidden: Any = truth(mask)
    if call.get("mask_type") == 1 and len(mask.shape) == 2:
        # A padding mask: (batch, keys) against scores (batch, heads, queries, keys).
        shape = (mask.shape[0], 1, 1, mask.shape[1])
        hidden = Meaning("reshape", (hidden,), {}, shape, torch.bool)
    filled = Meaning("where", (hidden, -math.inf, x), {}, x.shape, x.dtype)
    return Meaning("softmax", (filled,), {"dim": dim})


def _dims(call: Call, of: int | None) -> tuple[int, ...] | None:
    """The dimensions a reduction runs over, in increasing order."""
    if of is None:
        return None
    dim = call.get("dim")
    chosen = (
        range(of)
        if dim is None or dim == () or dim == []
        else dim
        if isinstance(dim, (tuple, list))
        else (dim,)
    )
    dims = [dimension(d, of) for d in chosen]
    return None if any(d is None for d in dims) else tuple(sorted(d for d in dims if d is not None))


@rule("sum", "amax")
def _reduction(call: Call, result: Result) -> Meaning | None:
    x = call.get("x")
    dims = _dims(call, rank(x))
    keepdim = bool(call.get("keepdim", False))
    return None if dims is None else Meaning(call.name, (x,), {"dims": dims, "keepdim": keepdim})


@rule("max", "min")
def _extremum(call: Call, result: Result) -> Meaning | None:
    """``max`` has three meanings: of two tensors, of a whole tensor, and along a dimension (values and
    indices)."""
    other = call.get("y", call.get("dim"))
    if isinstance(other, Node):
        return Meaning(f"{call.name}imum", (call.get("x"), other))
    if result.shape is None and other is not None:
        return Meaning("identity", (call.get("x"),))  # its elements are read by _pick
    return _reduction(Call("amax", "amax", call.arguments), result) if call.name == "max" else None


@rule("cumsum")
def _cumsum(call: Call, result: Result) -> Meaning | None:
    dim = dimension(call.get("dim"), rank(call.get("x")))
    return None if dim is None else Meaning("cumsum", (call.get("x"),), {"dim": dim})


@rule("diff")
def _diff(call: Call, result: Result) -> Meaning | None:
    x, prepend = call.get("x"), call.get("prepend")
    dim = dimension(call.get("dim", -1), rank(x))
    if dim is None or call.get("n", 1) != 1 or call.get("append") is not None:
        return None
    return Meaning("diff", (x, prepend), {"dim": dim})


@rule("tril", "triu")
def _triangle(call: Call, result: Result) -> Meaning | None:
    return Meaning(call.name, (call.get("x"),), {"diagonal": call.get("diagonal", 0)})


# ---- creation


@rule("zeros", "ones", "full")
def _full(call: Call, result: Result) -> Meaning | None:
    value = {"zeros": 0, "ones": 1}.get(call.name)
    if value is None:
        value = scalar(call.get("fill_value"))
    if not is_number(value):
        return None
    return Meaning("full", (), {"value": typed(value, result.dtype)})


def typed(value: Any, dtype: torch.dtype | None) -> Any:
    """A number as an element of a tensor of this type."""
    if isinstance(value, sympy.Basic) or dtype is None or isinstance(value, complex):
        return value
    return bool(value) if dtype == torch.bool else float(value) if dtype.is_floating_point else int(value)


@rule("tensor")
def _tensor(call: Call, result: Result) -> Meaning | None:
    data = call.get("data")
    if isinstance(data, Node):
        return Meaning("identity" if data.dtype == result.dtype else "cast", (data,))
    if is_number(data):
        return Meaning("full", (), {"value": typed(data, result.dtype)})
    literal = isinstance(data, (tuple, list)) and not any(isinstance(x, Node) for x in data)
    return Meaning("constant", (), {"value": data}) if literal else None


@rule("arange")
def _arange(call: Call, result: Result) -> Meaning | None:
    positional = [call.arguments[k] for k in ("x", "y", "arg2") if k in call.arguments]
    start = call.get("start", positional[0] if len(positional) > 1 else 0)
    step = call.get("step", positional[2] if len(positional) > 2 else 1)
    known = is_number(start) and is_number(step)
    return Meaning("arange", (), {"start": start, "step": step}) if known else None


@rule("iota")
def _iota(call: Call, result: Result) -> Meaning | None:
    return Meaning("arange", (), {"start": call.get("start", 0), "step": call.get("step", 1)})
