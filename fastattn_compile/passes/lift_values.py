"""Formulas of created tensors, elementwise arithmetic and comparisons: rules of ``mask_lift.Lifter``.

A rule gets a node whose operands are lifted and returns the formula of its element, or ``None`` where the
element is better read than computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastattn_compile.passes.expression import (
    FALSE,
    TRUE,
    ZERO,
    Constant,
    Expression,
    Where,
    add,
    axis,
    binary,
    compare,
    constant,
    linear_parts,
    logical_and,
    logical_not,
    logical_or,
    mul,
    sub,
    substitute,
    truthy,
    unary,
    where,
)
from fastattn_compile.passes.graph import Node, Size, same_size

if TYPE_CHECKING:
    from fastattn_compile.passes.mask_lift import Lifter

# Constants with more elements than this are not read.
_READABLE = 1 << 24

# Key of the metadata of an FX node: the buffer it stands for is written to between calls.
WRITTEN = "fastattn_written"

Rule: TypeAlias = "Callable[[Lifter, Node], Expression | None]"
RULES: dict[str, Rule] = {}


class NotIndexArithmetic(Exception):
    """A rule met something that cannot be said as a formula."""


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some kinds of nodes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def dim(position: int, size: Size | None) -> Expression:
    """The index along a dimension of a tensor of this size, as ``Lifter.lift`` names it."""
    return axis(f"d{position}", size)


def typed(x: Expression, dtype: torch.dtype | None) -> Expression:
    """A formula as the value of a tensor of this type.

    Args:
        x: The formula before the cast.
        dtype: The type; ``None`` leaves the formula as it is.
    """
    if dtype is None:
        return x
    if dtype == torch.bool:
        return truthy(x)
    if isinstance(x, Constant) and not isinstance(x.value, sympy.Expr):
        return constant(_element(x.value, dtype))
    if x.domain == "bool":
        return where(x, typed(TRUE, dtype), typed(FALSE, dtype))
    if isinstance(x, Where):
        return where(x.condition, typed(x.a, dtype), typed(x.b, dtype))
    if not dtype.is_floating_point:
        return unary("trunc", x)
    return x


def _element(value: Any, dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return torch.tensor(value, dtype=torch.float64).to(dtype).item()
    return int(value) if math.isfinite(value) else value


@rule("full")
def _full(lifter: Lifter, node: Node) -> Expression | None:
    value = lifter.scalar(node.attributes.get("value"))
    return None if value is None else typed(value, node.dtype)


@rule("arange")
def _arange(lifter: Lifter, node: Node) -> Expression | None:
    start, step = (lifter.scalar(node.attributes.get(name)) for name in ("start", "step"))
    if start is None or step is None or not node.shape:
        return None
    return add(mul(dim(0, node.shape[0]), step), start)


@rule("constant")
def _constant(lifter: Lifter, node: Node) -> Expression | None:
    value = known_value(node)
    if node.shape is None:
        return lifter.scalar(value)
    if isinstance(value, (list, tuple)):
        value = torch.tensor(value, dtype=node.dtype)
    if isinstance(value, Tensor):
        found = pattern_of(value, node)
        if found is not None:
            lifter.held[node] = found
        return found
    return typed(constant(value), node.dtype) if isinstance(value, (bool, int, float)) else None


def known_value(node: Node) -> Any:
    """The value of a constant of the model: what the view says, else what Dynamo traced the graph with.

    A buffer is read while the graph is compiled, and must be looked at before every call (``Lifter.held``). One that is
    known to be written to between calls (``WRITTEN``) has no value.
    """
    value, meta = node.attributes.get("value"), getattr(node.origin, "meta", {})
    if meta.get(WRITTEN):
        return None
    if value is None:
        traced = meta.get("grapharg")
        try:
            value = getattr(traced, "example", None)
        except AssertionError:  # the tensor is gone
            return None
    return value


def pattern_of(value: Tensor, node: Node) -> Expression | None:
    """The formula of a uniform constant, or of one of two values that form a band. Every entry is checked.

    Args:
        value: What it holds.
        node: The constant.
    """
    if isinstance(value, FakeTensor) or value.is_meta or value.layout != torch.strided:
        return None
    if not 0 < value.numel() <= _READABLE or tuple(value.shape) != node.shape or value.is_complex():
        return None
    # numpy compares unaligned windows faster than torch by far; it has no bfloat16, which float32 holds.
    array = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    wide = [d for d, size in enumerate(array.shape) if size != 1]
    if len(wide) != 2:
        only = array.flat[0]
        return typed(constant(only.item()), node.dtype) if bool((array == only).all()) else None
    table = array.reshape([array.shape[d] for d in wide])
    if not np.array_equal(table[1:, 1:], table[:-1, :-1]):
        return None
    # Each diagonal holds one value, from the lower left corner to the upper right one.
    diagonals = np.concatenate([table[::-1, 0], table[0, 1:]])
    last = np.flatnonzero(diagonals[1:] != diagonals[:-1]).tolist()  # of each run but the last
    if not last:
        return typed(constant(diagonals[0].item()), node.dtype)
    if len(last) > 2 or (len(last) == 2 and diagonals[0] != diagonals[-1]):
        return None
    first = last[0] + 1 if len(last) == 2 else 0
    corner = table.shape[0] - 1
    distance = sub(dim(wide[1], table.shape[1]), dim(wide[0], table.shape[0]))
    held = logical_and(
        compare("ge", distance, constant(first - corner)),
        compare("le", distance, constant(last[-1] - corner)),
    )
    inside, outside = (typed(constant(diagonals[i].item()), node.dtype) for i in (first, -1))
    return where(held, inside, outside)


@rule("identity", "expand")
def _identity(lifter: Lifter, node: Node) -> Expression | None:
    return lifter.operand(node, 0)


@rule("dropout")
def _dropout(lifter: Lifter, node: Node) -> Expression | None:
    return lifter.operand(node, 0) if node.attributes.get("p", 1) == 0 else None


@rule("cast")
def _cast(lifter: Lifter, node: Node) -> Expression | None:
    return typed(lifter.operand(node, 0), node.dtype)


@rule("add", "sub", "mul", "div", "floordiv", "mod", "pow", "maximum", "minimum")
def _binary(lifter: Lifter, node: Node) -> Expression | None:
    a, b = lifter.operand(node, 0), lifter.operand(node, 1)
    if node.dtype == torch.bool:
        # On truth values + and maximum are "or", * and minimum are "and".
        joint = {"add": logical_or, "maximum": logical_or, "mul": logical_and, "minimum": logical_and}.get(
            node.kind
        )
        return None if joint is None else joint(truthy(a), truthy(b))
    return binary(node.kind, a, b)


@rule("abs", "exp", "log", "sqrt", "tanh", "sigmoid")
def _unary(lifter: Lifter, node: Node) -> Expression | None:
    return unary(node.kind, lifter.operand(node, 0))


@rule("neg")
def _neg(lifter: Lifter, node: Node) -> Expression | None:
    return mul(lifter.operand(node, 0), constant(-1))


@rule("relu")
def _relu(lifter: Lifter, node: Node) -> Expression | None:
    return binary("maximum", lifter.operand(node, 0), ZERO)


@rule("clamp")
def _clamp(lifter: Lifter, node: Node) -> Expression | None:
    x = lifter.operand(node, 0)
    for name, op in (("min", "maximum"), ("max", "minimum")):
        bound = node.attributes.get(name)
        if bound is not None:
            limit = lifter.scalar(bound)
            if limit is None:
                return None
            x = binary(op, x, limit)
    return x


@rule("le", "lt", "ge", "gt", "eq", "ne")
def _compare(lifter: Lifter, node: Node) -> Expression | None:
    return compare(node.kind, lifter.operand(node, 0), lifter.operand(node, 1))


@rule("and", "or", "not")
def _logic(lifter: Lifter, node: Node) -> Expression | None:
    if node.dtype != torch.bool:
        return None  # bitwise
    operands = [truthy(lifter.operand(node, i)) for i in range(len(node.inputs))]
    if node.kind == "not":
        return logical_not(operands[0])
    return logical_and(*operands) if node.kind == "and" else logical_or(*operands)


@rule("where")
def _where(lifter: Lifter, node: Node) -> Expression | None:
    condition, a, b = (lifter.operand(node, i) for i in range(3))
    return where(truthy(condition), typed(a, node.dtype), typed(b, node.dtype))


@rule("tril", "triu")
def _triangle(lifter: Lifter, node: Node) -> Expression | None:
    diagonal = lifter.scalar(node.attributes.get("diagonal", 0))
    if diagonal is None or node.shape is None or len(node.shape) < 2:
        return None
    last = len(node.shape) - 1
    distance = sub(dim(last, node.shape[last]), dim(last - 1, node.shape[last - 1]))
    kept = compare("le" if node.kind == "tril" else "ge", distance, diagonal)
    return where(kept, lifter.operand(node, 0), typed(ZERO, node.dtype))


@rule("cumsum")
def _cumsum(lifter: Lifter, node: Node) -> Expression | None:
    """Of a value that does not change along the dimension."""
    x, along = typed(lifter.operand(node, 0), node.dtype), node.attributes.get("dim")
    if node.shape is None or not isinstance(along, int) or not isinstance(x, Constant):
        return None
    return mul(add(dim(along, node.shape[along]), constant(1)), x)


@rule("diff")
def _diff(lifter: Lifter, node: Node) -> Expression | None:
    """Of a formula that is linear along the dimension, continued by what is put before it."""
    x, along = node.inputs[0], node.attributes.get("dim")
    before = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(x, Node) or not isinstance(along, int) or linear_parts(lifter.of(x)) is None:
        return None
    lifted = lifter.of(x)
    name, here = f"d{along}", dim(along, None)
    step = sub(substitute(lifted, {name: add(here, constant(1))}), substitute(lifted, {name: here}))
    if before is None:
        return step
    if not isinstance(before, Node) or before.shape is None or not same_size(before.shape[along], 1):
        return None
    first = sub(substitute(lifted, {name: ZERO}), lifter.of(before))
    return step if first == step else None
