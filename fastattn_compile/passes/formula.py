"""The formulas of ``expression``: their parts, what they range over, walking through them.

Formulas are immutable trees, equal when they are written alike. The functions of ``expression`` build them
and fold what follows from the extents of the axes; an axis without a known extent is unbounded. Values are
exact integers and reals: boolean data counts as 0 and 1 in arithmetic, and whoever turns a tensor into a
formula sees to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch

from fastattn_compile.passes.graph import Node, Size

Scalar: TypeAlias = bool | int | float | sympy.Expr
Bound: TypeAlias = int | float | sympy.Expr | None

ANY_AXIS = "?"
"""What an unknown value is said to vary over: every test for a subset of axes fails on it."""


class Expression:
    """Base of the formulas."""

    @property
    def domain(self) -> str:
        """``"bool"``, ``"int"`` or ``"real"``: which values the formula can take."""
        if isinstance(self, Constant):
            return self.kind
        if isinstance(self, (Compare, Logic, Not)):
            return "bool"
        if isinstance(self, Linear):
            return "int"
        if isinstance(self, Where):
            return join(self.a, self.b)
        if isinstance(self, Load):
            return _domain_of(self.node.dtype)
        if isinstance(self, Binary):
            return "real" if self.op in ("div", "pow") or join(self.a, self.b) == "real" else "int"
        if isinstance(self, Unary):
            whole = self.op == "trunc" or (self.op == "abs" and self.x.domain != "real")
            return "int" if whole else "real"
        return "real"


def _domain_of(dtype: torch.dtype | None) -> str:
    if dtype is None or dtype.is_floating_point or dtype.is_complex:
        return "real"
    return "bool" if dtype == torch.bool else "int"


def join(a: Expression, b: Expression) -> str:
    """The smallest domain that holds the values of both."""
    domains = (a.domain, b.domain)
    return next(d for d in ("real", "int", "bool") if d in domains)


@dataclass(frozen=True)
class Axis:
    """An index from 0 to ``extent - 1``. With an unknown extent (``None``) it is unbounded."""

    name: str
    extent: Size | None = None


@dataclass(frozen=True)
class Constant(Expression):
    """A number, a truth value or a symbolic size."""

    value: Any  # a Scalar
    kind: str = field(init=False, repr=False)  # part of equality: to Python, True, 1 and 1.0 are equal

    def __post_init__(self) -> None:
        kind = "bool" if isinstance(self.value, bool) else "real" if isinstance(self.value, float) else "int"
        object.__setattr__(self, "kind", kind)


@dataclass(frozen=True)
class Linear(Expression):
    """``offset + sum(coefficient * axis)``. Terms are sorted by axis; there is at least one and none is 0."""

    terms: tuple[tuple[Axis, int], ...]
    offset: Size = 0

    def coefficient(self, name: str) -> int:
        """The coefficient of the axis with this name, 0 when it is absent."""
        return next((c for axis, c in self.terms if axis.name == name), 0)


@dataclass(frozen=True)
class Compare(Expression):
    """``a op b``, op being le, lt or eq. Linear forms are compared as ``form le 0`` or ``form eq 0``."""

    op: str
    a: Expression
    b: Expression


@dataclass(frozen=True)
class Logic(Expression):
    """``and`` or ``or`` of two or more different truth values, none of them of the same ``op``."""

    op: str
    terms: tuple[Expression, ...]


@dataclass(frozen=True)
class Not(Expression):
    """The negation of a truth value."""

    x: Expression


@dataclass(frozen=True)
class Where(Expression):
    """``a`` where ``condition`` holds, else ``b``."""

    condition: Expression
    a: Expression
    b: Expression


@dataclass(frozen=True)
class Load(Expression):
    """The element of a tensor of the graph; negative indices count from the end, as in torch."""

    node: Node
    indices: tuple[Expression, ...]


@dataclass(frozen=True)
class Binary(Expression):
    """Arithmetic that did not fold: add sub mul div floordiv mod pow minimum maximum."""

    op: str
    a: Expression
    b: Expression


@dataclass(frozen=True)
class Unary(Expression):
    """Arithmetic that did not fold: abs exp log sqrt tanh sigmoid trunc."""

    op: str
    x: Expression


@dataclass(frozen=True)
class Unknown(Expression):
    """A value about which nothing may be believed, not even that it is the same twice."""

    node: Node
    why: str


TRUE, FALSE = Constant(True), Constant(False)
ZERO, ONE = Constant(0), Constant(1)


# Leaves


def constant(value: Scalar) -> Constant:
    """A constant; sympy numbers become Python integers."""
    return Constant(plain_size(value) if isinstance(value, sympy.Expr) else value)


def axis(name: str, extent: Size | None = None) -> Expression:
    """The index along an axis. An axis of extent 1 is the constant 0."""
    return ZERO if isinstance(extent, int) and extent == 1 else Linear(((Axis(name, extent), 1),))


def load(node: Node, indices: Iterable[Expression]) -> Expression:
    """The element of ``node`` at ``indices``."""
    return Load(node, tuple(indices))


def is_constant(expression: Expression, value: Scalar | None = None) -> bool:
    """Whether the expression is a constant, and equal to ``value`` when one is given."""
    return isinstance(expression, Constant) and (value is None or bool(expression.value == value))


def plain_size(value: Size) -> Size:
    """A sympy integer as an ``int``; any other size as it is."""
    return int(value) if isinstance(value, sympy.Integer) else value


def linear_parts(expression: Expression) -> tuple[dict[Axis, int], Size] | None:
    """Coefficients and offset of an integer linear form or integer constant, else ``None``."""
    if isinstance(expression, Linear):
        return dict(expression.terms), expression.offset
    if isinstance(expression, Constant) and not isinstance(expression.value, float):
        return {}, int(expression.value) if isinstance(expression.value, bool) else expression.value
    return None


# Bounds


@lru_cache(maxsize=4096)
def _symbol_sign(value: sympy.Expr) -> bool:
    return bool(value.is_nonnegative)


def nonnegative(value: Bound) -> bool:
    """Whether a bound is proven to be at least 0."""
    if value is None:
        return False
    return _symbol_sign(value) if isinstance(value, sympy.Expr) else value >= 0


def positive(value: Bound) -> bool:
    """Whether a bound is proven to be greater than 0. A symbolic bound is an integer."""
    return nonnegative(value - 1) if isinstance(value, sympy.Expr) else value is not None and value > 0


def bounds(expression: Expression) -> tuple[Bound, Bound]:
    """Least and greatest value, ``None`` where there is no proven bound."""
    if isinstance(expression, Constant):
        value = int(expression.value) if isinstance(expression.value, bool) else expression.value
        return value, value
    if isinstance(expression, Linear):
        low: Any = expression.offset
        high: Any = expression.offset
        for place, c in expression.terms:
            if place.extent is None:
                return None, None
            reach = c * (place.extent - 1)
            low, high = (low + reach, high) if c < 0 else (low, high + reach)
        return low, high
    if expression.domain == "bool":
        return 0, 1
    if isinstance(expression, Where):
        (low_a, high_a), (low_b, high_b) = bounds(expression.a), bounds(expression.b)
        plain = (int, float)
        low = min(low_a, low_b) if isinstance(low_a, plain) and isinstance(low_b, plain) else None
        high = max(high_a, high_b) if isinstance(high_a, plain) and isinstance(high_b, plain) else None
        return low, high
    if isinstance(expression, Binary) and expression.op == "mod" and isinstance(expression.b, Constant):
        divisor = expression.b.value
        return (0, divisor - 1) if expression.domain == "int" and nonnegative(divisor - 1) else (None, None)
    if isinstance(expression, Binary) and expression.op == "floordiv" and isinstance(expression.b, Constant):
        (low, high), divisor = bounds(expression.a), expression.b.value
        if isinstance(divisor, int) and divisor > 0:
            return tuple(x // divisor if isinstance(x, int) else None for x in (low, high))  # type: ignore
    if isinstance(expression, Unary) and expression.op in ("abs", "exp", "sigmoid", "sqrt"):
        return 0, None
    return None, None


# Walking


def children(expression: Expression) -> tuple[Expression, ...]:
    """The formulas a formula is made of."""
    if isinstance(expression, (Compare, Binary)):
        return expression.a, expression.b
    if isinstance(expression, Logic):
        return expression.terms
    if isinstance(expression, (Not, Unary)):
        return (expression.x,)
    if isinstance(expression, Where):
        return expression.condition, expression.a, expression.b
    return expression.indices if isinstance(expression, Load) else ()


def axes_of(expression: Expression) -> frozenset[str]:
    """Names of the axes a formula varies over; an unknown value adds ``ANY_AXIS``."""
    if isinstance(expression, Linear):
        return frozenset(place.name for place, _ in expression.terms)
    if isinstance(expression, Unknown):
        return frozenset((ANY_AXIS,))
    return frozenset().union(*(axes_of(child) for child in children(expression)))


def places_of(expression: Expression) -> frozenset[Axis]:
    """The axes a formula names, with their extents."""
    if isinstance(expression, Linear):
        return frozenset(place for place, _ in expression.terms)
    return frozenset().union(*(places_of(child) for child in children(expression)))


def leaves(expression: Expression) -> list[Load | Unknown]:
    """The tensor elements and unknown values a formula reads, outermost first."""
    own: list[Load | Unknown] = [expression] if isinstance(expression, (Load, Unknown)) else []
    return own + [leaf for child in children(expression) for leaf in leaves(child)]


def larger_than(expression: Expression, limit: int) -> bool:
    """Whether a formula, written out, has more than ``limit`` parts. Costs no more than ``limit`` steps."""
    stack, count = [expression], 0
    while stack and count <= limit:
        count += 1
        stack.extend(children(stack.pop()))
    return count > limit
