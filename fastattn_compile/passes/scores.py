"""From a softmax back to the product of queries and keys: what happens to the scores on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from fastattn_compile.passes.axes import LAYOUT_KINDS, Axes, step
from fastattn_compile.passes.contraction import Contraction, contraction, factors
from fastattn_compile.passes.graph import Node, Size, same_size

# Farther back than this lies another part of the model.
_DEPTH = 32
_UNARY = frozenset({"identity", "cast", "dropout", "tanh", "clamp", "neg"})
_BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum", "where"})


@dataclass(frozen=True)
class ScoreTerm:
    """A tensor that is added to the scores, or decides where they are replaced.

    Args:
        node: The tensor.
        role: ``"add"``, ``"keep"`` (true leaves the score), ``"fill"`` (true replaces it), or ``"gate"`` (the score is
            multiplied by it).
        fill: What replaced scores become.
        axes: Axes of the scores where the tensor meets them.
        factor: What an added tensor is multiplied by.
    """

    node: Node
    role: str
    fill: float
    axes: Axes
    factor: float = 1.0


@dataclass
class Scores:
    """The scores of an attention between the product and the softmax.

    Args:
        product: Queries times keys; ``None`` for a fused call.
        axes: Axes of the softmax input.
        scale: Product of the factors that are numbers.
        factors: Tensors the scores are multiplied by before anything is added to them, each with its power, 1 or -1.
        softcap: Bound of ``cap * tanh(scores / cap)``, 0 without one.
        terms: Masks and biases in order.
        sink: Logits concatenated to the scores.
        problem: Why the site must stay as it is, empty when it need not.
    """

    product: Contraction | None
    axes: Axes
    scale: float = 1.0
    softcap: float = 0.0
    factors: list[tuple[ScoreTerm, int]] = field(default_factory=list)
    terms: list[ScoreTerm] = field(default_factory=list)
    sink: Node | None = None
    problem: str = ""


def number(value: Any) -> float | None:
    """The number an operand stands for, when it does: a scalar, or a tensor filled with one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, sympy.Expr):
        return float(value) if value.is_number else None
    if isinstance(value, Node):
        if value.kind in ("full", "constant") and isinstance(value.attributes.get("value"), (int, float)):
            return float(value.attributes["value"])
        if value.kind in ("identity", "cast", "expand", "reshape"):
            return number(value.inputs[0])
    return None


def is_weight(node: Node) -> bool:
    """Whether a tensor is a parameter or buffer, or a view of one."""
    while node.kind in LAYOUT_KINDS | {"cast"} and isinstance(node.inputs[0], Node):
        node = node.inputs[0]
    return node.kind in ("parameter", "constant")


def read_scores(softmax_input: Node, dim: int) -> Scores | str:
    """Walks back from the input of a softmax.

    Args:
        softmax_input: What the softmax is taken of.
        dim: The axis it runs over, nonnegative.

    Returns:
        The scores, or a sentence that says why this is no attention.
    """
    if softmax_input.shape is None or len(softmax_input.shape) < 2:
        return "the softmax input has fewer than two dimensions"
    keys = softmax_input.shape[dim]
    path = _find_product(softmax_input, keys, _DEPTH)
    if path is None:
        path = _find_product(softmax_input, keys - 1, _DEPTH)  # one column may be a sink
    if path is None:
        return f"the scores are not a product of queries and keys: they come from {_beginning(softmax_input)}"
    product = contraction(path[0][0])
    if product is None:
        return "the scores are not a product of two tensors"
    scores = Scores(product, product.axes)
    if product.node.kind == "baddbmm":
        _read_baddbmm(scores, product.node)
    for node, source in path[1:]:
        _read_step(scores, node, source)
    return scores


def _beginning(node: Node) -> str:
    """Where the walk back from a softmax ends: the first node that is no step of scores."""
    for _ in range(_DEPTH):
        if node.kind not in _UNARY | _BINARY | LAYOUT_KINDS or not node.operands:
            break
        node = (
            next(_operands_of_interest(node), node.operands[0]) if node.kind in _BINARY else node.operands[0]
        )
    return node.located(node.operation if node.kind == "opaque" else f"{node.kind} {node.name}")


def _operands_of_interest(node: Node) -> Iterator[Node]:
    """The operands through which the scores may come, the one of full shape first."""
    if node.kind == "where":
        candidates = node.inputs[1:3]
    elif node.kind == "cat":
        candidates = node.inputs
    elif (
        node.kind == "sub" and isinstance(node.inputs[1], Node) and node.inputs[1].kind == "amax"
    ) or node.kind == "div":
        candidates = node.inputs[:1]
    else:
        candidates = node.inputs[:2]
    nodes = [x for x in candidates if isinstance(x, Node)]
    return iter(sorted(nodes, key=lambda x: x.shape != node.shape))


def _find_product(node: Node, keys: Size, depth: int) -> list[tuple[Node, Node | None]] | None:
    """The steps from the product of queries and keys (first) to ``node`` (last), each with the operand walked through."""
    if depth < 0 or node.shape is None:
        return None
    if (pair := factors(node)) is not None:
        if any(same_size(size, keys) for size in node.shape) and _two_activations(*pair):
            return [(node, None)]
        return None
    if node.kind in _UNARY or node.kind in LAYOUT_KINDS:
        operands = iter([node.inputs[0]] if isinstance(node.inputs[0], Node) else [])
    elif node.kind in _BINARY or node.kind == "cat":
        operands = _operands_of_interest(node)
    else:
        return None
    for operand in operands:
        path = _find_product(operand, keys, depth - 1)
        if path is not None:
            return [*path, (node, operand)]
    return None


def _two_activations(a: Node, b: Node) -> bool:
    """A product with a weight matrix is a projection: a router, a classifier, a codebook."""
    if is_weight(a) and is_weight(b):
        return False
    return not any(is_weight(x) and len(x.shape or ()) <= 2 for x in (a, b))


def _read_baddbmm(scores: Scores, node: Node) -> None:
    alpha, beta = number(node.attributes.get("alpha", 1)), number(node.attributes.get("beta", 1))
    if alpha is None or beta is None:
        scores.problem = "the scores are scaled by a tensor"
        return
    scores.scale *= alpha
    if beta != 0:
        scores.terms.append(ScoreTerm(node.inputs[0], "add", 0.0, scores.axes, beta))


def _read_step(scores: Scores, node: Node, source: Node | None) -> None:
    kind = node.kind
    if kind in LAYOUT_KINDS:
        if scores.sink is not None:
            scores.problem = scores.problem or "the scores change layout after a sink was concatenated"
            return
        axes = step(node, scores.axes)
        if axes is None:
            scores.problem = (
                scores.problem or f"the layout of the scores cannot be followed through {node.name}"
            )
        else:
            scores.axes = axes
        return
    if kind in ("identity", "cast"):
        return
    if kind == "dropout":
        if node.attributes.get("p", 0) != 0:
            scores.problem = scores.problem or "dropout acts on the scores before the softmax"
        return
    if kind == "tanh":
        if scores.terms or scores.softcap:
            scores.problem = scores.problem or "tanh acts on scores that are already masked"
        scores.softcap = 1.0
        return
    if kind == "cat":
        others = [x for x in node.operands if x is not source]
        scores.sink = others[0] if len(others) == 1 else node
        if len(others) != 1:
            scores.problem = scores.problem or "several tensors are concatenated to the scores"
        return
    if kind == "neg":
        _scale(scores, -1.0)
        return
    if kind == "where":
        _read_where(scores, node, source)
        return
    if kind == "clamp":
        low, high = node.attributes.get("min"), node.attributes.get("max")
        if high is not None or (low is not None and not _hides(number(low))):
            scores.problem = scores.problem or "the scores are clamped"
        return
    other = node.inputs[1] if node.inputs[0] is source else node.inputs[0]
    _read_binary(scores, kind, other, first=node.inputs[0] is source)


def _scale(scores: Scores, factor: float) -> None:
    """Multiplies the scores, and with them all that was added before; what was filled in keeps its sign."""
    scores.scale *= factor
    if scores.softcap and not scores.terms:
        scores.softcap *= factor
    if factor < 0 and any(term.role != "add" for term in scores.terms):
        scores.problem = scores.problem or "the scores change sign after they were masked"
    scores.terms = [
        replace(term, factor=term.factor * factor, fill=term.fill * abs(factor)) for term in scores.terms
    ]


def _scale_by_tensor(scores: Scores, kind: str, tensor: Node) -> None:
    """A factor of every score, as a temperature is; one behind a cap or mask may only change what a later mask hides."""
    if kind == "mul" and (scores.terms or scores.softcap or _varies_over_scores(tensor, scores)):
        scores.terms.append(ScoreTerm(tensor, "gate", 0.0, scores.axes))
    elif scores.terms or scores.softcap:
        scores.problem = scores.problem or "the scores are scaled by a tensor after a mask or a cap"
    else:
        power = 1 if kind == "mul" else -1
        scores.factors.append((ScoreTerm(tensor, "gate", 0.0, scores.axes), power))


def _varies_over_scores(tensor: Node, scores: Scores) -> bool:
    """Whether a tensor has both of the last axes of the scores."""
    shape = tensor.shape or ()
    return len(shape) >= 2 and all(size != 1 for size in shape[-2:]) and len(scores.axes) >= 2


def _hides(value: float | None) -> bool:
    return value is not None and value <= -1e4


def _read_binary(scores: Scores, kind: str, other: Any, first: bool) -> None:
    value = number(other)
    if kind in ("mul", "div"):
        if value is None and isinstance(other, Node) and (kind == "mul" or first):
            _scale_by_tensor(scores, kind, other)
            return
        if value is None or value == 0 or (kind == "div" and not first):
            scores.problem = scores.problem or "the scores are scaled by a tensor"
            return
        factor = value if kind == "mul" else 1.0 / value
        _scale(scores, factor)
    elif kind in ("add", "sub"):
        if isinstance(other, Node) and other.kind == "amax" and kind == "sub":
            return  # subtracting the row maximum changes nothing
        if value is not None:
            return  # neither does a constant
        if not isinstance(other, Node):
            scores.problem = scores.problem or "something that is no tensor is added to the scores"
            return
        if kind == "sub" and not first:
            _scale(scores, -1.0)
        scores.terms.append(
            ScoreTerm(other, "add", 0.0, scores.axes, -1.0 if kind == "sub" and first else 1.0)
        )
    elif kind == "maximum" and _hides(value):
        return  # a floor at the masking constant
    else:
        scores.problem = scores.problem or f"the scores pass through {kind}"


def _read_where(scores: Scores, node: Node, source: Node | None) -> None:
    condition, yes, no = node.inputs
    role, filled = ("keep", no) if yes is source else ("fill", yes)
    value = number(filled)
    if value is None or not isinstance(condition, Node):
        scores.problem = scores.problem or "masked scores are replaced by a tensor"
        return
    scores.terms.append(ScoreTerm(condition, role, value, scores.axes))
