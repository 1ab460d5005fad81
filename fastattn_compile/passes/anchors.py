"""Where a softmax is: an operator, ``exp`` over its sum, ``exp`` of a log-softmax, or normalised after the values."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.passes.axes import LAYOUT_KINDS, Axes, leaves, step
from fastattn_compile.passes.contraction import Contraction, factors
from fastattn_compile.passes.graph import GraphView, Node


@dataclass(frozen=True)
class Anchor:
    """A softmax-like place.

    Args:
        weights: The node that holds the weights.
        scores: What the softmax is taken of.
        dim: The axis it runs over.
        division: Where the weights are normalised, when that is after their product with the values.
        divisor: The sum of the weights that it divides by.
    """

    weights: Node
    scores: Node
    dim: int
    division: Node | None = None
    divisor: Node | None = None


def anchor_of(node: Node) -> Anchor | None:
    """The softmax a node is, in one of its spellings, or ``None``."""
    if node.kind == "softmax":
        return Anchor(node, node.inputs[0], node.attributes["dim"])
    if node.kind == "exp":
        inner = _through(node.inputs[0], "identity", "cast")
        if inner is not None and inner.kind == "log_softmax" and isinstance(inner.inputs[0], Node):
            return Anchor(node, inner.inputs[0], inner.attributes["dim"])
    return written_out(node) if node.kind == "div" else None


def written_out(node: Node) -> Anchor | None:
    """Recognises ``e / e.sum(dim)`` and ``(e @ values) / e.sum(dim)`` with ``e = exp(scores)``."""
    numerator, denominator = node.inputs[0], _sum_of(node.inputs[1])
    if not isinstance(numerator, Node) or denominator is None:
        return None
    summed, dim = denominator.inputs[0], denominator.attributes["dims"][0]
    exponential = _through(summed, "identity", "cast")
    if exponential is None or exponential.kind != "exp" or not isinstance(exponential.inputs[0], Node):
        return None
    scores = exponential.inputs[0]
    if _through(numerator, "identity", "cast") is exponential:
        return Anchor(node, scores, dim)
    pair = factors(_through(numerator, "identity", "cast", "reshape", "permute") or numerator)
    if pair is None or not any(
        _through(x, "identity", "cast", "reshape", "permute") is exponential for x in pair
    ):
        return None
    return Anchor(exponential, scores, dim, node, denominator)


def _sum_of(denominator: object) -> Node | None:
    """The sum over one axis that a divisor is, kept from 0 or not."""
    found = _through(
        denominator, "add", "clamp", "identity", "cast", "expand", "maximum", "reshape", "permute", "index"
    )
    return (
        found
        if found is not None and found.kind == "sum" and len(found.attributes.get("dims") or ()) == 1
        else None
    )


def _through(node: object, *kinds: str) -> Node | None:
    """The first node that is of none of these kinds, behind the first operand of each."""
    while isinstance(node, Node) and node.kind in kinds:
        node = node.inputs[0]
    return node if isinstance(node, Node) else None


def normalised_axes(
    view: GraphView, live: set[Node], anchor: Anchor, product: Contraction, axes: Axes
) -> Axes | None:
    """The axes of a product with the values after its rows were divided by the sums of their weights.

    Args:
        view: The graph.
        live: Its live nodes.
        anchor: A softmax that is normalised after the values.
        product: The product of the weights with the values.
        axes: Of the weights.

    Returns:
        The axes of ``anchor.division``; ``None`` when it divides by something else, pairs other rows, or when the product or
        the sums are read elsewhere too.
    """
    division, divisor = anchor.division, anchor.divisor
    if division is None or divisor is None:
        return None
    rows = [axis for d, axis in enumerate(axes) if d != anchor.dim]
    kept = [[] if d == anchor.dim else axis for d, axis in enumerate(axes)]
    found = _followed(view, live, product.node, product.axes, division, 0)
    total = _followed(
        view, live, divisor, rows if len(divisor.shape or ()) < len(axes) else kept, division, 1
    )
    if found is None or total is None or division.shape is None or len(found) != len(division.shape):
        return None
    aligned: Axes = [[] for _ in range(len(found) - len(total))] + total
    if len(aligned) != len(found) or not all(not b or leaves(a) == leaves(b) for a, b in zip(found, aligned)):
        return None
    read = {atom for axis in aligned for atom in leaves(axis)}
    return found if read == {atom for axis in rows for atom in leaves(axis)} else None


def _followed(
    view: GraphView, live: set[Node], start: Node, axes: Axes, end: Node, position: int
) -> Axes | None:
    """The axes of an operand of ``end`` that is ``start`` in another layout, and read by nothing else."""
    path, node = [end], end.inputs[position]
    while isinstance(node, Node) and node is not start:
        path.append(node)
        node = node.inputs[0]
    current: Axes | None = axes
    for link in reversed(path):
        if node is not start or any(user is not link for user in view.users(node) if user in live):
            return None
        if link is not end and link.kind in LAYOUT_KINDS:
            current = step(link, current) if current is not None else None
        start = node = link
    return current
