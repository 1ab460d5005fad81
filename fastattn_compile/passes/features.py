"""Whether an axis counts positions or the features of a projection."""

from __future__ import annotations

from fastattn_compile.passes.axes import LAYOUT_KINDS, Atom, Axes, fresh, leaves
from fastattn_compile.passes.contraction import Operand, trace
from fastattn_compile.passes.graph import Node
from fastattn_compile.passes.scores import is_weight

# Farther back than this nothing is looked for.
_DEPTH = 32
_SAME_PLACE = frozenset({
    "cast", "identity", "dropout", "div", "mul", "add", "sub", "neg", "relu", "tanh", "sigmoid", "exp", "sqrt",
    "clamp", "maximum", "opaque",
})  # fmt: skip


def counts_features(operand: Operand, atoms: list[Atom]) -> bool:
    """Whether an axis of an operand is made by a projection: its output features, or some of them.

    Args:
        operand: An operand of a product.
        atoms: The axis.
    """
    node, axes, wanted = operand.origin, operand.origin_axes, set(leaves(atoms))
    for _ in range(_DEPTH):
        made = _features(node)
        if made is not None:
            return bool(set(leaves(axes[made])) & wanted)
        before = _before(node, axes, wanted)
        if before is None:
            return False
        node, axes = before
    return False


def _features(node: Node) -> int | None:
    """Which dimension of a projection's output holds its features."""
    if node.kind == "linear":
        return -1
    if node.kind == "matmul" and isinstance(node.inputs[1], Node) and is_weight(node.inputs[1]):
        return -1
    if node.kind == "opaque" and "conv" in str(node.attributes.get("target", "")).lower():
        return 1
    return None


def _before(node: Node, axes: Axes, wanted: set[Atom]) -> tuple[Node, Axes] | None:
    """The tensor before a node that keeps every element at its place or selects some, with axes that stand for its own."""
    if node.kind == "index" and isinstance(node.inputs[0], Node):
        return _selected(node, axes, wanted)
    if node.kind in LAYOUT_KINDS:
        traced = trace(node, axes)
        return None if traced.origin is node else (traced.origin, traced.origin_axes)
    if node.kind in _SAME_PLACE:
        for operand in node.operands:
            if operand.shape == node.shape:
                return operand, axes
    return None


def _selected(node: Node, axes: Axes, wanted: set[Atom]) -> tuple[Node, Axes] | None:
    source = node.inputs[0]
    result, remaining = fresh(source.shape or ()), iter(axes)
    at = 0
    for entry in node.attributes["index"]:
        if entry is None:
            next(remaining, None)
            continue
        if isinstance(entry, slice):
            _stand_for(result[at], next(remaining, []), wanted)
        elif not isinstance(entry, int):
            return None
        at += 1
    for target, axis in zip(result[at:], remaining):
        _stand_for(target, axis, wanted)
    return source, result


def _stand_for(target: list[Atom], axis: list[Atom], wanted: set[Atom]) -> None:
    """An axis of the source is wanted when what was selected of it is."""
    if set(leaves(axis)) & wanted:
        wanted.update(leaves(target))
