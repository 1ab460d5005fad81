"""Why a softmax was read as it was: the part of the graph that was walked, with the line of code behind every node."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.passes.graph import Node
from fastattn_compile.passes.site import Softmax

# Nodes walked back from a softmax that was not understood.
_BACK = 16


@dataclass(frozen=True)
class Step:
    """One node.

    Args:
        role: What it is to the attention: ``"queries"``, ``"keys"``, ``"values"``, ``"softmax"``, ``"output"``, or
            ``"attention"`` for a fused call; ``"beside"`` for an operand that does not depend on them, such as a mask;
            else ``""``.
        kind: What it computes, in the vocabulary of ``passes.graph``.
        name: Of the node.
        shape: Of its result, as text.
        source: ``file:line`` of the statement.
    """

    role: str
    kind: str
    name: str
    shape: str
    source: str


def explain(line: Softmax) -> tuple[Step, ...]:
    """The steps of one softmax in execution order.

    Args:
        line: From a scan made in this process: a document read from a file holds no graph.

    Returns:
        For an attention that was understood: from queries, keys and values to its output. Otherwise the way back from the
        softmax until it ended, at the first node that did not fit.

    Raises:
        ValueError: The line holds no graph.
    """
    if line.node is None:
        raise ValueError(f"{line.name} holds no graph; scan the model in this process")
    if line.site is None:
        return _back(line.node)
    site = line.site
    roles = {
        site.query.origin: "queries", site.key.origin: "keys", site.value.origin: "values", site.node: "softmax",
        site.out: "output" if site.out is not site.node else "attention",
    }  # fmt: skip
    starts = {site.query.origin, site.key.origin, site.value.origin}
    walked, inside = _left(site.out, starts), set(starts)
    for node in walked:
        if any(x in inside for x in node.operands):
            inside.add(node)
    beside = {x for node in inside - starts for x in node.operands} - inside
    shown = (node for node in walked if node in inside or node in beside)
    return tuple(_step(node, roles.get(node, "beside" if node in beside else "")) for node in shown)


def _left(end: Node, starts: set[Node]) -> list[Node]:
    """The ancestors of a node, operands before what reads them; nothing before ``starts``."""
    seen: set[Node] = set()
    result: list[Node] = []
    work: list[tuple[Node, bool]] = [(end, False)]
    while work:
        node, done = work.pop()
        if done:
            result.append(node)
        elif node not in seen:
            seen.add(node)
            work.append((node, True))
            if node not in starts:
                work.extend((x, False) for x in reversed(node.operands))
    return result


def _back(node: Node) -> tuple[Step, ...]:
    steps = [_step(node, "softmax")]
    while node.operands and len(steps) < _BACK:
        # Of several operands the one of the same shape carries the scores.
        node = next((x for x in node.operands if x.shape == node.shape), node.operands[0])
        steps.append(_step(node, ""))
        if node.kind in ("opaque", "linear", "matmul", "einsum", "baddbmm", "input", "parameter", "constant"):
            break
    return tuple(reversed(steps))


def _step(node: Node, role: str) -> Step:
    shape = "" if node.shape is None else f"({', '.join(map(str, node.shape))})"
    return Step(role, node.operation, node.name, shape, node.source)
