"""The view that all matching works on: a networkx DiGraph of normalised nodes, the same for FX and for ONNX.

A view says what a node computes in one vocabulary, whatever spelling the source graph used, so that the finder and the
mask analysis are written once. ``KINDS`` is that vocabulary. What is not in it is ``"opaque"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import networkx as nx
import sympy
import torch

Size = Union[int, sympy.Expr]  # noqa: UP007  an alias of a type that has no annotations

# kind -> (tensor operands in order, attributes). A number stands in ``Node.inputs`` where an operand is a scalar.
KINDS: Mapping[str, tuple[str, str]] = {
    "input": ("", "a graph input; 'symbol' when it is a size"),
    "parameter": ("", "a learned weight"),
    "constant": ("", "a buffer or literal; 'value' when known"),
    "full": ("", "value: every element (zeros, ones, full, new_*)"),
    "arange": ("", "start, step"),
    "matmul": ("a, b", "matmul, bmm, mm, linear without its bias is not one"),
    "linear": ("x, weight, bias?", "a projection"),
    "baddbmm": ("base, a, b", "beta, alpha"),
    "einsum": ("a, b", "equation"),
    "softmax": ("x", "dim"),
    "log_softmax": ("x", "dim"),
    "exp": ("x", ""),
    "sum": ("x", "dims, keepdim"),
    "amax": ("x", "dims, keepdim"),
    "sdpa": ("query, key, value, mask?", "dropout, is_causal, scale, enable_gqa"),
    "mha": ("...", "an opaque multi_head_attention_forward or encoder layer, before expansion"),
    "flex_attention": ("...", "the higher-order operator"),
    "add sub mul div maximum minimum pow floordiv mod": ("a, b", ""),
    "neg abs tanh log sqrt sigmoid relu": ("x", ""),
    "clamp": ("x", "min, max"),
    "le lt ge gt eq ne": ("a, b", ""),
    "and or": ("a, b", ""),
    "not": ("x", ""),
    "where": ("condition, a, b", "masked_fill(x, m, c) is where(m, c, x)"),
    "tril triu": ("x", "diagonal"),
    "cumsum": ("x", "dim"),
    "diff": ("x, prepend?", "dim"),
    "cast": ("x", "to the node's dtype"),
    "identity": ("x", "contiguous, clone, detach, device moves, asserts"),
    "dropout": ("x", "p: 0 when not training"),
    "reshape": ("x", "to the node's shape: view, reshape, flatten, unflatten, squeeze, unsqueeze"),
    "permute": ("x", "dims: tuple; transpose, t, mT, movedim"),
    "expand": ("x", "to the node's shape"),
    "repeat_interleave": ("x", "repeats, dim"),
    "repeat": ("x", "repeats: tuple, tiling"),
    "index": ("x, index tensors...", "index: tuple of int | slice | None | Ellipsis | Node"),
    "cat": ("tensors...", "dim"),
    "embedding": ("indices, table", ""),
    "output": ("...", ""),
    "opaque": ("...", "target: what was called"),
}


@dataclass(eq=False)
class Node:
    """One normalised node. Compared and hashed by identity.

    Args:
        name: Unique in its graph.
        kind: A word of ``KINDS``.
        inputs: Operands in the order of ``KINDS``; a number where the operand is a scalar, ``None`` where it is absent.
        attributes: What else the kind needs, see ``KINDS``.
        shape: Sizes, ``int`` or a sympy expression; ``None`` when the node gives no tensor or its shape is unknown.
        dtype: Type of the result, ``None`` when unknown.
        module: Path of the module that made it, ``""`` at the root.
        source: ``file:line`` of the statement that made it, ``""`` when unknown.
        tainted: Its storage may be changed in place by something else in the graph: believe nothing about its value.
        origin: The node of the source graph.
    """

    name: str
    kind: str
    inputs: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    shape: tuple[Size, ...] | None = None
    dtype: torch.dtype | None = None
    module: str = ""
    source: str = ""
    tainted: bool = False
    origin: Any = None

    def __repr__(self) -> str:
        operands = ", ".join(x.name if isinstance(x, Node) else repr(x) for x in self.inputs)
        return f"{self.name} = {self.kind}({operands})"

    @property
    def operands(self) -> list[Node]:
        """The inputs that are nodes."""
        return [x for x in self.inputs if isinstance(x, Node)]

    @property
    def operation(self) -> str:
        """What it computes: its kind, and of an opaque node what is called."""
        return str(self.attributes.get("target", self.kind)) if self.kind == "opaque" else self.kind

    def located(self, text: str) -> str:
        """A text about the node with the line that made it, for a reader."""
        return f"{text} ({self.source})" if self.source else text


class GraphView:
    """Normalised nodes in execution order, with a networkx DiGraph from operand to user.

    Args:
        nodes: In execution order; operands come before their users.
    """

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.graph: nx.DiGraph = nx.DiGraph()
        self.order = {node: position for position, node in enumerate(nodes)}
        self.graph.add_nodes_from(nodes)
        for node in nodes:
            for operand in dependencies(node):
                self.graph.add_edge(operand, node)

    def users(self, node: Node) -> list[Node]:
        """The nodes that read ``node``, in execution order."""
        return sorted(self.graph.successors(node), key=self.order.__getitem__)

    def of_kind(self, *kinds: str) -> Iterator[Node]:
        """The nodes of these kinds, in execution order."""
        return (node for node in self.nodes if node.kind in kinds)

    def depends_on(self, node: Node, other: Node) -> bool:
        """Whether ``node`` is computed from ``other``."""
        return node is other or nx.has_path(self.graph, other, node)


def dependencies(node: Node) -> list[Node]:
    """All nodes a node reads: its operands and those inside its attributes (index tensors, sizes)."""
    found: list[Node] = []

    def collect(value: Any) -> None:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                collect(item)
        elif isinstance(value, slice):
            collect((value.start, value.stop, value.step))

    collect(node.inputs)
    collect(tuple(node.attributes.values()))
    return found


def as_size(value: Any) -> Size:
    """A size as ``int`` or sympy expression, from ``int`` or ``torch.SymInt``."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_number else expression
    return value if isinstance(value, sympy.Expr) else int(value)


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return bool(a == b)
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
    # An expanded polynomial shows whether it is 0; only rounding and division need more thought.
    return bool(difference == 0) or (not difference.is_polynomial() and bool(sympy.simplify(difference) == 0))
