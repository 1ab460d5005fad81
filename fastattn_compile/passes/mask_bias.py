"""What is added to scores: the part that hides keys, and the part that is a bias.

A number at or below ``HIDDEN`` hides a key. Scores would have to differ by 9,000 for such a key to weigh even
exp(-1000), which is 0 in float64, and libraries write their masks there (-1e4, -1e9, the least number of the
type, -inf). A larger constant, such as Swin's -100, is a bias.

Data that is multiplied by such a number is taken to be 0 or 1, as in ``(1 - mask) * -1e9``.
"""

from __future__ import annotations

from fastattn_compile.passes.expression import (
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Constant,
    Expression,
    Linear,
    Load,
    Logic,
    Unary,
    Where,
    add,
    axes_of,
    binary,
    bounds,
    children,
    constant,
    is_constant,
    logical_and,
    logical_not,
    logical_or,
    mul,
    nonnegative,
    sub,
    truthy,
    where,
)
from fastattn_compile.passes.formula import ANY_AXIS, Unknown, leaves
from fastattn_compile.passes.graph import Node

HIDDEN = -1e4


def is_hiding(x: Expression) -> bool:
    """Whether a formula is a constant that hides a key."""
    return isinstance(x, Constant) and isinstance(x.value, (int, float)) and x.value <= HIDDEN


def read_additive(x: Expression) -> tuple[Expression, Expression]:
    """Splits what is added to scores.

    Args:
        x: The formula of the added tensor.

    Returns:
        Which keys stay visible, and the bias of those.
    """
    if is_hiding(x):
        return FALSE, ZERO
    if isinstance(x, Where):
        visible_a, bias_a = read_additive(x.a)
        visible_b, bias_b = read_additive(x.b)
        bias = (
            bias_a
            if visible_b == FALSE
            else bias_b
            if visible_a == FALSE
            else where(x.condition, bias_a, bias_b)
        )
        return where(x.condition, visible_a, visible_b), bias
    if isinstance(x, Binary):
        return _read_binary(x)
    if (
        isinstance(x, Unary)
        and x.op == "log"
        and x.x.domain != "real"
        and (held := indicator(x.x)) is not None
    ):
        return held, ZERO
    return TRUE, x


def _read_binary(x: Binary) -> tuple[Expression, Expression]:
    if x.op in ("add", "sub"):
        visible_a, bias_a = read_additive(x.a)
        visible_b, bias_b = read_additive(x.b if x.op == "add" else mul(x.b, constant(-1)))
        return logical_and(visible_a, visible_b), add(bias_a, bias_b)
    if x.op == "div" and isinstance(x.b, Constant) and x.b.value:
        return read_additive(mul(x.a, constant(1 / x.b.value)))
    if x.op == "mul" and isinstance(x.b, Constant):
        return _read_product(x, x.a, x.b.value)
    if x.op == "maximum":
        for y, floor in ((x.a, x.b), (x.b, x.a)):
            if is_hiding(floor):
                visible, bias = read_additive(y)
                return visible, bias if bias == ZERO else binary("maximum", bias, floor)
    if x.op == "minimum":
        (visible_a, bias_a), (visible_b, bias_b) = read_additive(x.a), read_additive(x.b)
        if is_constant(bias_a, 0) and is_constant(bias_b, 0):
            return logical_and(visible_a, visible_b), ZERO
    return TRUE, x


def _read_product(whole: Expression, x: Expression, factor: float) -> tuple[Expression, Expression]:
    if abs(factor) >= -HIDDEN:
        if factor > 0:
            x, factor = (
                (sub(x.b, x.a) if isinstance(x, Binary) and x.op == "sub" else mul(x, constant(-1))),
                -factor,
            )
        hidden = indicator(x)
        if hidden is not None:
            return logical_not(hidden), ZERO
    if isinstance(x, Binary) and x.op in ("add", "sub"):
        return read_additive(binary(x.op, mul(x.a, constant(factor)), mul(x.b, constant(factor))))
    return TRUE, whole


def indicator(x: Expression) -> Expression | None:
    """Whether a value that is 0 or 1 is 1.

    Args:
        x: The formula. Data (``Load``) in it is taken to be 0 or 1.

    Returns:
        A truth value; ``None`` when the formula can have other values.
    """
    if x.domain == "bool":
        return x
    if isinstance(x, Constant):
        return constant(bool(x.value)) if x.value in (0, 1) else None
    if isinstance(x, Load):
        return truthy(x)
    if isinstance(x, Where):
        a, b = indicator(x.a), indicator(x.b)
        return None if a is None or b is None else where(x.condition, a, b)
    if isinstance(x, Binary):
        if x.op == "sub" and is_constant(x.a, 1):
            inner = indicator(x.b)
            return None if inner is None else logical_not(inner)
        joint = {"mul": logical_and, "minimum": logical_and, "maximum": logical_or}.get(x.op)
        a, b = indicator(x.a), indicator(x.b)
        return None if joint is None or a is None or b is None else joint(a, b)
    if x.domain == "int" and nonnegative(bounds(x)[0]):
        return truthy(x)
    return None


def classify_bias(
    bias: Expression, offset: object, causal: bool
) -> tuple[str, Expression, Expression | None]:
    """Names the kind of a bias.

    Args:
        bias: The formula of what is added to the scores of visible keys, in batch, head, query and key.
        offset: Keys before the first query, ``key_len - query_len``; ``None`` when unknown.
        causal: Whether no query sees a later key.

    Returns:
        ``"none"``, ``"alibi"``, ``"bucketed"`` or ``"dense"``; the bias without constants of a row, which
        softmax ignores; and the slope of a linear bias, a formula of the head: ``-slope * |key - query|`` when
        ``"alibi"``, else ``slope * (key - query)``.
    """
    parts = [part for part in summands(bias) if not _constant_in_rows(part)]
    if not parts:
        return "none", ZERO, None
    kept = parts[0]
    for part in parts[1:]:
        kept = add(kept, part)
    if len(parts) == 1 and (found := _slope(kept, offset)) is not None:
        slope, symmetric = found
        if symmetric:
            return "alibi", kept, mul(slope, constant(-1))
        # All keys that a causal mask shows stand before the query. Without one, later keys get more.
        return "alibi" if causal else "bucketed", kept, slope
    return ("bucketed" if of_distance(kept) else "dense"), kept, None


def counted_slope(bias: Expression, key_padding: Expression) -> Expression | None:
    """The slope of ALiBi whose positions are counted over real tokens, ``slope(head) * (cumsum(mask) - 1) * mask``.

    BLOOM and Falcon write it so when they are given an attention mask, which is taken to be 0 or 1. Where real tokens
    stand side by side the number is their place, up to a constant of the sequence.

    Args:
        bias: The formula of what is added to the scores of visible keys.
        key_padding: Which keys are real: the mask must be among its conditions.

    Returns:
        A formula of the head; ``None`` for any other bias.
    """
    parts = [part for part in summands(bias) if not _constant_in_rows(part)]
    if len(parts) != 1:
        return None
    slope: Expression = constant(1)
    rest: list[Expression] = []
    for factor in _factors(parts[0]):
        if axes_of(factor) <= {"head"}:
            slope = mul(slope, factor)
        else:
            rest.append(factor)
    masks = [x for x in rest if isinstance(x, Load)]
    numbers = [x for x in rest if not isinstance(x, Load)]
    if len(masks) != 1 or len(numbers) != 1 or masks[0].domain == "real":
        return None
    mask, number = masks[0], numbers[0]
    if isinstance(number, Binary) and number.op in ("add", "sub") and isinstance(number.b, Constant):
        number = number.a
    if not isinstance(number, Load) or number.node.kind != "cumsum" or number.indices != mask.indices:
        return None
    counted = number.node.inputs[0]
    while isinstance(counted, Node) and counted.kind in ("cast", "identity") and not counted.tainted:
        counted = counted.inputs[0]
    along = number.node.attributes.get("dim")
    if number.node.tainted or counted is not mask.node or not isinstance(along, int):
        return None
    required = (
        key_padding.terms if isinstance(key_padding, Logic) and key_padding.op == "and" else (key_padding,)
    )
    by_key = axes_of(mask.indices[along]) == {"key"} and axes_of(mask) <= {"batch", "key"}
    return slope if by_key and truthy(mask) in required else None


def summands(x: Expression) -> list[Expression]:
    """What a sum is made of."""
    if isinstance(x, Binary) and x.op == "add":
        return summands(x.a) + summands(x.b)
    return [x]


def _constant_in_rows(x: Expression) -> bool:
    """Whether a summand is finite for certain and the same for every key of a row."""
    if axes_of(x) & {"key", ANY_AXIS}:
        return False
    if isinstance(x, Constant):
        return abs(x.value) < -HIDDEN if isinstance(x.value, (int, float)) else True
    return x.domain == "int" and all(isinstance(leaf, Load) for leaf in leaves(x))


def _slope(x: Expression, offset: object) -> tuple[Expression, bool] | None:
    """The factor of ``slope(head) * (key - query)`` or ``slope(head) * |key - query|``, and whether it is the second."""
    slope: Expression = constant(1)
    positions: list[Expression] = []
    for factor in _factors(x):
        if axes_of(factor) <= {"head"}:
            slope = mul(slope, factor)
        else:
            positions.append(factor)
    if len(positions) != 1:
        return None
    place = positions[0]
    if isinstance(place, Linear) and axes_of(place) <= {"query", "key"} and place.coefficient("key"):
        # Whatever it says of the query is constant in the row.
        return mul(slope, constant(place.coefficient("key"))), False
    if isinstance(place, Unary) and place.op == "abs" and isinstance(place.x, Linear):
        step, start = place.x.coefficient("key"), place.x.offset
        if step and place.x.coefficient("query") == -step and len(place.x.terms) == 2:
            aligned = start == 0 or (offset is not None and start == -step * offset)  # type: ignore[operator]
            return (mul(slope, constant(abs(step))), True) if aligned else None
    return None


def _factors(x: Expression) -> list[Expression]:
    if isinstance(x, Binary) and x.op == "mul":
        return _factors(x.a) + _factors(x.b)
    if isinstance(x, Binary) and x.op == "div" and isinstance(x.b, Constant) and x.b.value:
        return [*_factors(x.a), constant(1 / x.b.value)]
    return [x]


def of_distance(x: Expression) -> bool:
    """Whether a formula knows of queries and keys only their distance, and nothing of the batch."""
    if isinstance(x, Linear):
        return x.coefficient("query") == -x.coefficient("key") and x.coefficient("batch") == 0
    return not isinstance(x, Unknown) and all(of_distance(child) for child in children(x))
