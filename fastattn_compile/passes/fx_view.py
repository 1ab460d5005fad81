"""An FX graph as a view: every node in the vocabulary of ``graph.KINDS``, whatever it was called.

Serves Dynamo graphs (torch functions, operators, methods), ATen graphs of exported programs, and the bodies
of higher-order operators. Shapes come from ``meta["example_value"]`` or ``meta["val"]`` and stay symbolic.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import sympy
import torch
import torch.fx

from fastattn_compile.passes import fx_elementwise, fx_products  # noqa: F401  they register their rules
from fastattn_compile.passes.fx_layout import pick
from fastattn_compile.passes.fx_meta import example
from fastattn_compile.passes.fx_rules import RULES, Meaning, Result
from fastattn_compile.passes.fx_vocabulary import Call, canonical_name, is_in_place, read_call, words
from fastattn_compile.passes.graph import GraphView, Node, as_size
from fastattn_compile.passes.names import module_path, role, source_line

# These read elements, not sizes, though they give plain numbers.
_READS = words("item _local_scalar_dense tolist __bool__ equal allclose is_nonzero")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (bool, int, float, str, sympy.Basic, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ELEMENTWISE = words(
    "identity cast dropout add sub mul div neg tanh clamp maximum minimum where reshape permute expand index "
    "cat"
)


def view(gm: torch.fx.GraphModule, tainted: AbstractSet[torch.fx.Node] = frozenset()) -> GraphView:
    """Normalises a graph.

    A symbolic float that scales the scores of an attention, or is the probability of a dropout, is made a
    number: that installs a guard, as reading any symbolic value does. Sizes are left symbolic.

    Args:
        gm: A Dynamo-level graph, best after ``functionalize``; or an ATen-level one.
        tainted: Nodes whose storage something in the graph may change in place. An in-place call among them
            is ``"opaque"``: what it changes is not its result alone.

    Returns:
        One node for each node of the graph, its ``origin``, in order. A call that only has a meaning in
        several kinds (``stack``, ``add`` with ``alpha``) is preceded by nodes without an origin.
    """
    builder = _Builder(gm, tainted)
    if _specialise(gm, builder.nodes):
        builder = _Builder(gm, tainted)
    return GraphView(builder.nodes)


def has_meaning(node: torch.fx.Node) -> bool:
    """Whether the view knows what a node calls, whatever its arguments."""
    return canonical_name(node) in RULES


def number(value: Any) -> Any:
    """A symbolic number as a sympy expression, or as a plain number when it is one."""
    if isinstance(value, torch.SymInt):
        return as_size(value)
    if isinstance(value, _SYMBOLIC):
        expression = value.node.expr
        if isinstance(value, torch.SymBool):
            return bool(expression) if expression in (sympy.true, sympy.false) else expression
        return float(expression) if expression.is_number else expression
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers alone (or of types and devices): sizes, not data."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (*_PLAIN, *_SYMBOLIC))


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, (tuple, list)) else number(value)


def _shape(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, torch.Tensor) or value.is_nested:
        return None
    return tuple(as_size(size) for size in value.shape)


def _dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, torch.Tensor) else None


class _Builder:
    """Reads the nodes of one graph in order."""

    def __init__(self, gm: torch.fx.GraphModule, tainted: AbstractSet[torch.fx.Node]) -> None:
        self.gm = gm
        self.tainted = tainted
        self.nodes: list[Node] = []
        self.of: dict[torch.fx.Node, Node] = {}
        # Nodes that give tuples: their calls and the shapes of the elements.
        self.tuples: dict[Node, tuple[Call, list[Any]]] = {}
        for node in gm.graph.nodes:
            self._read(node)

    def _read(self, node: torch.fx.Node) -> None:
        value = example(node)
        call: Call | None = None
        if node.op == "placeholder":
            symbolic = isinstance(value, _SYMBOLIC)
            meaning = (
                Meaning("input", (), {"symbol": number(value)}) if symbolic else Meaning(role(node, value))
            )
        elif node.op == "get_attr":
            meaning = self._attribute(node)
        elif node.op == "output":
            meaning = Meaning("output", tuple(_leaves(self._convert(node.args))))
        elif value is not None and _is_plain(value) and node.target not in _READS:
            # Arithmetic on sizes. It has no operands: reading the shape of a tensor is not reading the
            # tensor.
            meaning = Meaning("constant", (), {"value": _plain(value)})
        else:
            call = read_call(node, self._convert)
            meaning = self._meaning(node, call, value)
        self._append(node, meaning, value)
        if call is not None and isinstance(value, (tuple, list)):
            self.tuples[self.of[node]] = call, [_shape(item) for item in value]

    def _meaning(self, node: torch.fx.Node, call: Call, value: Any) -> Meaning:
        result = Result(_shape(value), _dtype(value))
        meaning: Meaning | None = None
        source, position = self._element(call)
        if node in self.tainted and is_in_place(node):
            pass
        elif source is not None:
            made, shapes = self.tuples[source]
            meaning = pick(made, source, shapes, position, result)
        elif call.name in RULES:
            meaning = RULES[call.name](call, result)
        if meaning is None:
            operands = [x for x in _leaves(tuple(call.arguments.values())) if isinstance(x, Node)]
            meaning = Meaning("opaque", tuple(operands), {"target": call.spelled})
        return meaning

    def _element(self, call: Call) -> tuple[Node | None, Any]:
        """The tuple a call takes an element of, and which."""
        source = call.get("x")
        if not isinstance(source, Node) or source not in self.tuples:
            return None, None
        if call.name == "getitem":
            return source, call.arguments.get("index")
        return (source, call.name) if call.name in ("values", "indices") else (None, None)

    def _append(self, node: torch.fx.Node, meaning: Meaning, value: Any) -> None:
        if meaning.kind in ("sdpa", "mha", "dropout", "flex_attention") and isinstance(value, (tuple, list)):
            value = value[0] if value else None  # what they are known for
        inputs = self._materialise(meaning.inputs, node)
        self.of[node] = Node(
            node.name, meaning.kind, inputs, meaning.attributes, _shape(value), _dtype(value),
            module_path(node), source_line(node), node in self.tainted, node,
        )  # fmt: skip
        self.nodes.append(self.of[node])

    def _materialise(self, inputs: tuple[Any, ...], node: torch.fx.Node) -> tuple[Any, ...]:
        """Turns meanings among operands into nodes."""
        made = []
        for operand in inputs:
            if isinstance(operand, Meaning):
                inner = self._materialise(operand.inputs, node)
                operand = Node(
                    f"{node.name}.{len(self.nodes)}", operand.kind, inner, operand.attributes, operand.shape,
                    operand.dtype, module_path(node), source_line(node), node in self.tainted,
                )  # fmt: skip
                self.nodes.append(operand)
            made.append(operand)
        return tuple(made)

    def _convert(self, value: Any) -> Any:
        """An argument as the rules want it: nodes of the view, numbers, sympy expressions, nested."""
        if isinstance(value, torch.fx.Node):
            known = example(value)
            return _plain(known) if known is not None and _is_plain(known) else self.of[value]
        if isinstance(value, slice):
            return slice(*(self._convert(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            items = [self._convert(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return number(value)

    def _attribute(self, node: torch.fx.Node) -> Meaning:
        target: Any = self.gm
        for part in str(node.target).split("."):
            target = getattr(target, part, None)
        if isinstance(target, torch.nn.Parameter):
            return Meaning("parameter")
        return Meaning("constant", (), {} if target is None else {"value": target})


def _leaves(value: Any) -> Iterator[Any]:
    """The items of nested tuples, lists, slices and dictionaries."""
    if isinstance(value, dict):
        value = tuple(value.values())
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _factors(nodes: list[Node]) -> Iterator[Any]:
    """Numbers that decide what an attention is: factors of scores, probabilities of dropout."""
    work: list[tuple[Node, int]] = []
    for node in nodes:
        if node.kind in ("softmax", "log_softmax", "exp"):
            work += [(operand, 0) for operand in node.operands]
        elif node.kind in ("sdpa", "dropout", "baddbmm"):
            yield from (node.attributes.get(name) for name in ("scale", "dropout", "p", "alpha", "beta"))
    seen: set[Node] = set()
    while work:
        node, depth = work.pop()
        if node in seen or depth > 32 or node.kind not in _ELEMENTWISE:
            continue
        seen.add(node)
        yield from (x for x in node.inputs if not isinstance(x, Node))
        work += [(operand, depth + 1) for operand in node.operands]


def _specialise(gm: torch.fx.GraphModule, nodes: list[Node]) -> bool:
    """Makes the symbolic floats among ``_factors`` numbers. True when there were any."""
    wanted = {symbol for x in _factors(nodes) if isinstance(x, sympy.Basic) for symbol in x.free_symbols}
    found = False
    for node in gm.graph.nodes if wanted else ():
        value = example(node)
        # A float that comes out of data has no value yet.
        if isinstance(value, torch.SymFloat) and value.node.expr in wanted and value.node.hint is not None:
            float(value)
            found = True
    return found
