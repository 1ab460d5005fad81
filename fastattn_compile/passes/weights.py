"""From a softmax forward to the product with the values, and what else reads the attention weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastattn_compile.passes.axes import LAYOUT_KINDS, Atom, Axes, leaves, step, unify
from fastattn_compile.passes.contraction import Contraction, Operand, contraction, factors
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.scores import number


@dataclass
class Weights:
    """What becomes of attention weights.

    Args:
        products: Products with values: the contraction and its value operand.
        dropout: Probability of dropout on the way.
        used: Something else reads them.
        problem: Why the site must stay as it is, empty when it need not.
        lost: What else reads them, the first of it.
    """

    products: list[tuple[Contraction, Operand]] = field(default_factory=list)
    dropout: float = 0.0
    used: bool = False
    problem: str = ""
    lost: str = ""


def live_nodes(view: GraphView) -> set[Node]:
    """The nodes that something observable depends on: outputs, and nodes that may change state."""
    live: set[Node] = set()
    work = [n for n in view.nodes if n.kind == "output" or (n.kind == "opaque" and n.tainted)]
    while work:
        node = work.pop()
        if node not in live:
            live.add(node)
            work.extend(view.graph.predecessors(node))
    return live


def read_weights(
    view: GraphView,
    live: set[Node],
    softmax: Node,
    axes: Axes,
    keys: list[Atom],
    queries: set[Atom],
    sink: bool,
    divisor: Node | None = None,
) -> Weights:
    """Walks forward from a softmax.

    Args:
        view: The graph.
        live: Its live nodes.
        softmax: The attention weights.
        axes: Their axes.
        keys: Atoms of the key axis.
        queries: Atoms only queries have; values must not have them.
        sink: Whether a sink column is to be cut off.
        divisor: What the product with the values is divided by; that it reads the weights is no other use of them.
    """
    result = Weights()
    work = [(softmax, axes, sink)]
    while work:
        node, current, has_sink = work.pop()
        for user in view.users(node):
            if user not in live or user is divisor:
                continue
            if user.kind == "output":
                result.used = True
            elif user.kind in ("mul", "div") and user.inputs[0] is node and number(user.inputs[1]) == 1:
                work.append((user, current, has_sink))
            elif user.kind in ("identity", "cast", "dropout") and user.inputs[0] is node:
                if user.kind == "dropout":
                    result.dropout = max(result.dropout, float(user.attributes.get("p", 0)))
                work.append((user, current, has_sink))
            elif has_sink and _cuts_sink(user, node):
                work.append((user, current, False))
            elif user.kind in LAYOUT_KINDS and user.inputs[0] is node:
                moved = step(user, current)
                if moved is None:
                    result.used = True
                else:
                    work.append((user, moved, has_sink))
            elif (product_node := _product(view, live, user, node)) is not None and not has_sink:
                product = contraction(product_node)
                value = _value_operand(product, node, current, keys, queries) if product else None
                if product is None or value is None:
                    result.used = True
                else:
                    result.products.append((product, value))
            elif user.kind in ("mul", "where") and user.shape == node.shape:
                result.problem = "the attention weights are changed after the softmax"
                work.append((user, current, has_sink))
            else:
                result.used = True
                result.lost = result.lost or user.located(user.operation)
    return result


def _product(view: GraphView, live: set[Node], user: Node, weights: Node) -> Node | None:
    """The product of the weights with another tensor that a user of them is, or the sum that makes it one."""
    if user.kind == "mul":
        sums = [x for x in view.users(user) if x in live]
        user = sums[0] if len(sums) == 1 and sums[0].kind == "sum" else user
    pair = factors(user)
    return user if pair is not None and weights in pair else None


def _cuts_sink(user: Node, weights: Node) -> bool:
    if user.kind != "index" or user.inputs[0] is not weights or weights.shape is None or user.shape is None:
        return False
    index = user.attributes["index"]
    *others, last = index
    return (
        len(user.shape) == len(weights.shape)
        and user.shape[:-1] == weights.shape[:-1]
        and user.shape[-1] == weights.shape[-1] - 1
        and all(isinstance(i, slice) for i in others)
        and isinstance(last, slice)
        and last.start in (None, 0)
    )


def _value_operand(
    product: Contraction, weights: Node, axes: Axes, keys: list[Atom], queries: set[Atom]
) -> Operand | None:
    """The other side of a product over exactly the key axis, when it holds no query axis."""
    mine, other = (product.a, product.b) if product.a.node is weights else (product.b, product.a)
    if len(mine.axes) != len(axes) or not all(unify(x, y) for x, y in zip(mine.axes, axes)):
        return None
    if leaves(product.contracted) != leaves(keys):
        return None
    return None if other.atoms() & {leaf for atom in queries for leaf in atom.resolve()} else other
