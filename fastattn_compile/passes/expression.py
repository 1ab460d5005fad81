"""Scalar index functions: what one element of a tensor is, as a formula of its indices.

A mask is an n x n tensor; its element is a formula such as ``key <= query and real[batch, key]``. What is
certain is folded as a formula is built: constants, comparisons that extents decide, choices in arithmetic,
and folded axes: ``(batch * heads + head) // heads`` is ``batch``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy

from fastattn_compile.passes.formula import (
    ANY_AXIS,
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Axis,
    Binary,
    Compare,
    Constant,
    Expression,
    Linear,
    Load,
    Logic,
    Not,
    Unary,
    Where,
    axes_of,
    axis,
    bounds,
    children,
    constant,
    is_constant,
    join,
    linear_parts,
    nonnegative,
    plain_size,
    positive,
)
from fastattn_compile.passes.graph import Size

__all__ = [
    "FALSE", "ONE", "TRUE", "ZERO", "Binary", "Compare", "Constant", "Expression", "Linear", "Load",
    "Logic", "Not", "Unary", "Where", "add", "axes_of", "axis", "binary", "bounds", "children", "compare",
    "constant", "floordiv", "is_constant", "linear_parts", "logical_and", "logical_not", "logical_or",
    "mod", "mul", "nonnegative", "number", "rewrite", "sub", "substitute", "truthy", "unary", "where",
]  # fmt: skip

Branches = tuple[Expression, Expression, Expression]

# A comparison is pushed into sums of at most this many choices: each doubles the cases.
_MAX_CHOICES = 4
# Larger powers of integers are not written out.
_MAX_POWER = 64

# Comparisons and logic

_PYTHON: Mapping[str, Callable[[Any, Any], Any]] = {
    "le": operator.le, "lt": operator.lt, "eq": operator.eq, "add": operator.add, "sub": operator.sub,
    "mul": operator.mul, "div": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod,
    "pow": operator.pow, "minimum": min, "maximum": max,
}  # fmt: skip


def _choice(x: Expression) -> Branches | None:
    """A value that a condition decides: (condition, if true, if false). A truth value is 1 or 0."""
    if isinstance(x, Where):
        return x.condition, x.a, x.b
    if x.domain == "bool" and not isinstance(x, Constant):
        return x, ONE, ZERO
    return None


def _cases(x: Expression) -> Branches | None:
    """``_choice`` of a value, or of an operand of it when few enough choices stand in it."""
    if not isinstance(x, Binary) or _choices(x) > _MAX_CHOICES:
        return _choice(x)
    if chosen := _cases(x.a):
        return chosen[0], binary(x.op, chosen[1], x.b), binary(x.op, chosen[2], x.b)
    if chosen := _cases(x.b):
        return chosen[0], binary(x.op, x.a, chosen[1]), binary(x.op, x.a, chosen[2])
    return None


def _choices(x: Expression) -> int:
    return (
        sum(_choices(child) for child in children(x)) if isinstance(x, Binary) else int(isinstance(x, Where))
    )


def compare(op: str, a: Expression, b: Expression) -> Expression:
    """``a op b`` with op one of le, lt, ge, gt, eq, ne."""
    if op in ("ge", "gt"):
        return compare("le" if op == "ge" else "lt", b, a)
    if op == "ne":
        return logical_not(compare("eq", a, b))
    if a == b and a.domain != "real" and ANY_AXIS not in axes_of(a):
        return Constant(op != "lt")
    linear_a, linear_b = linear_parts(a) is not None, linear_parts(b) is not None
    if linear_a and linear_b:
        return _compare_linear(op, sub(a, b))
    if isinstance(b, Constant):
        if linear_a:
            return _compare_real(op, a, float(b.value), flipped=False)
        if isinstance(a, Constant) and not linear_b:
            return Constant(bool(_PYTHON[op](a.value, b.value)))
        if (chosen := _cases(a)) is not None:
            return where(chosen[0], compare(op, chosen[1], b), compare(op, chosen[2], b))
    if isinstance(a, Constant):
        if linear_b:
            return _compare_real(op, b, float(a.value), flipped=True)
        if (chosen := _cases(b)) is not None:
            return where(chosen[0], compare(op, a, chosen[1]), compare(op, a, chosen[2]))
    return _compare_equal(a, b) if op == "eq" else _compare_order(op, a, b)


def _compare_equal(a: Expression, b: Expression) -> Expression:
    if isinstance(a, Constant):
        a, b = b, a
    if is_constant(b, 0) and isinstance(a, Binary) and a.op == "mul" and a.domain == "int":
        return logical_or(compare("eq", a.a, b), compare("eq", a.b, b))
    return Compare("eq", a, b)


def _compare_order(op: str, a: Expression, b: Expression) -> Expression:
    (low_a, high_a), (low_b, high_b) = bounds(a), bounds(b)
    strict = op == "lt"
    if high_a is not None and low_b is not None:
        slack = low_b - high_a
        if positive(slack) if strict else nonnegative(slack):
            return TRUE
    if low_a is not None and high_b is not None:
        slack = low_a - high_b
        if nonnegative(slack) if strict else positive(slack):
            return FALSE
    if isinstance(a, Unary) and a.op == "abs":
        return logical_and(compare(op, a.x, b), compare(op, mul(b, Constant(-1)), a.x))
    if isinstance(b, Unary) and b.op == "abs":
        return logical_or(compare(op, a, b.x), compare(op, b.x, mul(a, Constant(-1))))
    return Compare(op, a, b)


def _compare_linear(op: str, form: Expression) -> Expression:
    """``form op 0`` for an integer linear form."""
    if op == "lt":
        op, form = "le", add(form, ONE)
    low, high = bounds(form)
    below, above = high is not None and nonnegative(-high), nonnegative(low)
    if below and (op == "le" or above):
        return TRUE
    if low is not None and positive(low):
        return FALSE
    if op == "eq" and high is not None and positive(-high):
        return FALSE
    if isinstance(form, Linear):
        if op == "eq" and form.terms[0][1] < 0:
            form = mul(form, Constant(-1))
        form = _reduce(op, form)  # type: ignore[arg-type]
        if isinstance(form, Constant):
            return FALSE
    return Compare(op, form, ZERO)


def _reduce(op: str, form: Linear) -> Expression:
    """Divides a comparison with 0 by the common divisor of its coefficients; 1 when it cannot hold."""
    divisor = math.gcd(*(c for _, c in form.terms))
    if divisor == 1 or not isinstance(form.offset, int):
        return form
    if op == "eq" and form.offset % divisor:
        return ONE
    return Linear(tuple((a, c // divisor) for a, c in form.terms), -(-form.offset // divisor))


def _compare_real(op: str, form: Expression, number: float, flipped: bool) -> Expression:
    """Compares an integer linear form with a real number, which is rounded to the integer that decides."""
    if math.isnan(number):
        return FALSE
    if math.isinf(number):
        return FALSE if op == "eq" else Constant((number > 0) != flipped)
    if op == "eq":
        return compare("eq", form, Constant(int(number))) if number == int(number) else FALSE
    if flipped:
        return compare("le", Constant(math.ceil(number) if op == "le" else math.floor(number) + 1), form)
    return compare("le", form, Constant(math.floor(number) if op == "le" else math.ceil(number) - 1))


def logical_not(x: Expression) -> Expression:
    """The negation of a truth value."""
    if isinstance(x, Constant):
        return Constant(not x.value)
    if isinstance(x, Not):
        return x.x
    if isinstance(x, Logic):
        return _logic("or" if x.op == "and" else "and", [logical_not(term) for term in x.terms])
    # A real may be NaN, for which neither a <= b nor b < a holds.
    if isinstance(x, Compare) and x.op != "eq" and join(x.a, x.b) != "real":
        return compare("lt" if x.op == "le" else "le", x.b, x.a)
    return Not(x)


def logical_and(*terms: Expression) -> Expression:
    """The conjunction of truth values."""
    return _logic("and", terms)


def logical_or(*terms: Expression) -> Expression:
    """The disjunction of truth values."""
    return _logic("or", terms)


def _logic(op: str, terms: Iterable[Expression]) -> Expression:
    neutral = constant(op == "and")
    kept: dict[Expression, None] = {}
    for term in terms:
        for part in term.terms if isinstance(term, Logic) and term.op == op else (term,):
            if isinstance(part, Constant):
                if bool(part.value) != neutral.value:
                    return Constant(not neutral.value)
            else:
                kept[part] = None
    if any(isinstance(part, Not) and part.x in kept and ANY_AXIS not in axes_of(part) for part in kept):
        return Constant(not neutral.value)
    return neutral if not kept else next(iter(kept)) if len(kept) == 1 else Logic(op, tuple(kept))


def truthy(x: Expression) -> Expression:
    """Whether a value is not 0."""
    return x if x.domain == "bool" else compare("ne", x, ZERO)


def where(condition: Expression, a: Expression, b: Expression) -> Expression:
    """``a`` where ``condition`` holds, else ``b``."""
    if isinstance(condition, Constant):
        return a if condition.value else b
    if isinstance(condition, Not) or (isinstance(condition, Logic) and condition.op == "or"):
        return where(logical_not(condition), b, a)
    if (
        isinstance(condition, Compare)
        and (condition.op, condition.a) == ("eq", a)
        and is_constant(condition.b)
    ):
        a = condition.b  # the condition says what the value is
    if a == b:
        return a
    if a.domain == b.domain == "bool":
        return _where_truth(condition, a, b)
    if isinstance(a, Where) and b in (a.a, a.b):
        inner, x = (a.condition, a.a) if a.b == b else (logical_not(a.condition), a.b)
        return where(logical_and(condition, inner), x, b)
    if isinstance(b, Where) and a in (b.a, b.b):
        inner, x = (b.condition, b.b) if b.a == a else (logical_not(b.condition), b.a)
        return where(logical_or(condition, inner), a, x)
    return Where(condition, a, b)


def _where_truth(condition: Expression, a: Expression, b: Expression) -> Expression:
    if isinstance(a, Constant):
        return logical_or(condition, b) if a.value else logical_and(logical_not(condition), b)
    if isinstance(b, Constant):
        return logical_or(logical_not(condition), a) if b.value else logical_and(condition, a)
    return logical_or(logical_and(condition, a), logical_and(logical_not(condition), b))


# Arithmetic


def _linear(coefficients: Mapping[Axis, int], offset: Size) -> Expression:
    terms = sorted(((a, c) for a, c in coefficients.items() if c), key=lambda term: term[0].name)
    return Linear(tuple(terms), plain_size(offset)) if terms else constant(plain_size(offset))


def _fold(op: str, a: Expression, b: Expression) -> Expression | None:
    """The result for two constants, or a choice between constants met by a constant or a like choice."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        if isinstance(a.value, sympy.Expr) or isinstance(b.value, sympy.Expr):
            return None
        try:
            if op == "pow" and abs(b.value) > _MAX_POWER:
                return None
            made = _PYTHON[op](a.value, b.value)
            return constant(made) if isinstance(made, (int, float)) else None
        except (ArithmeticError, ValueError):
            return None
    if isinstance(b, Constant) and (chosen := _choice(a)):
        return where(chosen[0], binary(op, chosen[1], b), binary(op, chosen[2], b))
    if isinstance(a, Constant) and (chosen := _choice(b)):
        return where(chosen[0], binary(op, a, chosen[1]), binary(op, a, chosen[2]))
    return None


def number(x: Expression) -> Expression:
    """A truth value as the integer 0 or 1; anything else as it is."""
    if x.domain != "bool":
        return x
    return Constant(int(bool(x.value))) if isinstance(x, Constant) else Where(x, ONE, ZERO)


def binary(op: str, a: Expression, b: Expression) -> Expression:
    """``op`` of two numbers: add sub mul div floordiv mod pow minimum maximum."""
    if (
        special := {"add": add, "sub": sub, "mul": mul, "floordiv": floordiv, "mod": mod}.get(op)
    ) is not None:
        return special(a, b)
    a, b = number(a), number(b)
    if op == "div" and is_constant(b, 1):
        return a
    if (folded := _fold(op, a, b)) is not None:
        return folded
    if op in ("minimum", "maximum"):
        if compare("le", a, b) == TRUE:
            return a if op == "minimum" else b
        if compare("le", b, a) == TRUE:
            return b if op == "minimum" else a
    return Binary(op, a, b)


def add(a: Expression, b: Expression) -> Expression:
    """``a + b``."""
    a, b = number(a), number(b)
    left, right = linear_parts(a), linear_parts(b)
    if left is not None and right is not None:
        total = dict(left[0])
        for place, c in right[0].items():
            total[place] = total.get(place, 0) + c
        return _linear(total, left[1] + right[1])
    if is_constant(a, 0):
        return b
    if is_constant(b, 0):
        return a
    return _fold("add", a, b) or Binary("add", a, b)


def sub(a: Expression, b: Expression) -> Expression:
    """``a - b``."""
    a, b = number(a), number(b)
    if is_constant(b, 0):
        return a
    if linear_parts(a) is not None and linear_parts(b) is not None:
        return add(a, mul(b, Constant(-1)))
    return _fold("sub", a, b) or Binary("sub", a, b)


def mul(a: Expression, b: Expression) -> Expression:
    """``a * b``. The product of two truth values is a choice between 1 and 0."""
    a, b = number(a), number(b)
    if isinstance(a, Constant):
        a, b = b, a
    left, right = linear_parts(a), linear_parts(b)
    if left is not None and right is not None and not right[0]:
        if isinstance(right[1], int):
            return _linear({place: c * right[1] for place, c in left[0].items()}, left[1] * right[1])
        if not left[0]:
            return constant(left[1] * right[1])
    if is_constant(b, 1):
        return a
    if (folded := _fold("mul", a, b)) is not None:
        return folded
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Where) and is_constant(x.a, 1) and is_constant(x.b, 0) and _finite(y):
            return where(x.condition, y, Constant(0.0) if y.domain == "real" else ZERO)
    if isinstance(a, Binary) and a.op == "mul" and isinstance(a.b, Constant) and isinstance(b, Constant):
        return mul(a.a, mul(a.b, b))
    return Binary("mul", a, b)


def _finite(x: Expression) -> bool:
    if isinstance(x, Where):
        return _finite(x.a) and _finite(x.b)
    return x.domain != "real" or (isinstance(x, Constant) and math.isfinite(x.value))


def _split_by(a: Expression, b: Expression) -> tuple[Expression, Expression] | None:
    """Quotient and rest of a linear ``a`` by a size ``b``, when ``0 <= rest < b`` is proven."""
    parts = linear_parts(a)
    if parts is None or not isinstance(b, Constant) or b.kind != "int" or not nonnegative(b.value - 1):
        return None
    coefficients, offset = parts
    if isinstance(b.value, int):
        whole = {place: c // b.value for place, c in coefficients.items() if c % b.value == 0}
        rest = _linear({p: c for p, c in coefficients.items() if p not in whole}, offset)
        quotient = _linear(whole, 0)
        if isinstance(rest, Constant) and isinstance(rest.value, int):
            return add(quotient, Constant(rest.value // b.value)), Constant(rest.value % b.value)
    else:
        quotient, rest = ZERO, a
    low, high = bounds(rest)
    inside = nonnegative(low) and high is not None and nonnegative(b.value - 1 - high)
    return (quotient, rest) if inside else None


def floordiv(a: Expression, b: Expression) -> Expression:
    """``floor(a / b)``."""
    a, b = number(a), number(b)
    if is_constant(b, 1) and a.domain == "int":
        return a
    if (parts := _split_by(a, b)) is not None:
        return parts[0]
    return _fold("floordiv", a, b) or Binary("floordiv", a, b)


def mod(a: Expression, b: Expression) -> Expression:
    """``a - b * floor(a / b)``, the sign of the divisor as in Python and ``torch.remainder``."""
    a, b = number(a), number(b)
    if is_constant(b, 1) and a.domain == "int":
        return ZERO
    if (parts := _split_by(a, b)) is not None:
        return parts[1]
    return _fold("mod", a, b) or Binary("mod", a, b)


_UNARY: Mapping[str, Callable[[Any], Any]] = {
    "abs": abs, "exp": math.exp, "sqrt": math.sqrt, "tanh": math.tanh, "trunc": math.trunc,
    "log": lambda x: math.log(x) if x else -math.inf,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}  # fmt: skip


def unary(op: str, x: Expression) -> Expression:
    """``op`` of a number: abs exp log sqrt tanh sigmoid trunc."""
    x = number(x)
    if isinstance(x, Constant) and not isinstance(x.value, sympy.Expr):
        try:
            return constant(_UNARY[op](x.value))
        except (ArithmeticError, ValueError):
            return Unary(op, x)
    if isinstance(x, Where):
        return where(x.condition, unary(op, x.a), unary(op, x.b))
    if op == "trunc" and x.domain == "int":
        return x
    if op == "abs":
        low, high = bounds(x)
        if nonnegative(low):
            return x
        if high is not None and nonnegative(-high):
            return mul(x, Constant(-1))
    return Unary(op, x)


# Rebuilding


def rewrite(expression: Expression, rule: Callable[[Expression], Expression | None]) -> Expression:
    """Rebuilds a formula from the top: what ``rule`` answers stands for a part, ``None`` descends into it."""
    memo: dict[int, Expression] = {}

    def visit(e: Expression) -> Expression:
        if id(e) in memo:
            return memo[id(e)]
        made = rule(e)
        if made is None:
            old = children(e)
            new = tuple(visit(child) for child in old)
            made = e if all(x is y for x, y in zip(old, new)) else _rebuild(e, new)
        memo[id(e)] = made
        return made

    return visit(expression)


def _rebuild(e: Expression, parts: tuple[Expression, ...]) -> Expression:
    if isinstance(e, Compare):
        return compare(e.op, *parts)
    if isinstance(e, Binary):
        return binary(e.op, *parts)
    if isinstance(e, Logic):
        return _logic(e.op, parts)
    if isinstance(e, Not):
        return logical_not(parts[0])
    if isinstance(e, Unary):
        return unary(e.op, parts[0])
    if isinstance(e, Where):
        return where(*parts)
    return Load(e.node, parts) if isinstance(e, Load) else e


def substitute(expression: Expression, places: Mapping[str, Expression]) -> Expression:
    """Puts a formula in the place of each named axis, all at once, and folds again."""

    def rule(e: Expression) -> Expression | None:
        if not isinstance(e, Linear):
            return None
        if not any(place.name in places for place, _ in e.terms):
            return e
        total: Expression = constant(e.offset)
        for place, c in e.terms:
            here = places.get(place.name, Linear(((place, 1),)))
            total = add(total, mul(here, Constant(c)))
        return total

    return rewrite(expression, rule)
