"""Regions that are captured once and called several times: a body of its own for every call.

``torch.compiler.nested_compile_region`` captures a block once and calls the body for every block that looks the same. What
serves its sites is then one thing for all of them; so calls beyond the first get a copy, named by the parameters that the
call hands over.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.fx

from fastattn_compile.passes.names import join_paths, module_root, parameter_path

_CALL = torch.ops.higher_order.invoke_subgraph


def unshare(gm: torch.fx.GraphModule, bodies: Collection[torch.fx.GraphModule]) -> bool:
    """Gives every call of some bodies its own, in place; what the graph computes does not change.

    Args:
        gm: A graph.
        bodies: Graphs inside it that must not be shared.

    Returns:
        Whether there were any.
    """
    changed = False
    for owner in [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]:
        first: dict[str, torch.fx.Node] = {}
        for node in list(owner.graph.nodes):
            if node.op != "call_function" or node.target is not _CALL:
                continue
            attribute = node.args[0]
            if not isinstance(attribute, torch.fx.Node) or attribute.op != "get_attr":
                continue
            name = str(attribute.target)
            body = owner.get_submodule(name)
            if body not in bodies or first.setdefault(name, node) is node:
                continue
            assert isinstance(body, torch.fx.GraphModule)
            _copy(owner, first[name], node, body)
            changed = True
        if changed:
            owner.recompile()
    return changed


def _copy(
    owner: torch.fx.GraphModule, first: torch.fx.Node, call: torch.fx.Node, body: torch.fx.GraphModule
) -> None:
    attribute, identifier, *operands = call.args
    assert isinstance(attribute, torch.fx.Node)
    number = 1
    while hasattr(owner, name := f"{attribute.target}_call_{number}"):
        number += 1
    own = copied(body)
    moves = _moves(first.args[2:], operands)
    for inner in own.modules():
        if isinstance(inner, torch.fx.GraphModule):
            _rename(inner.graph, moves)
    owner.add_submodule(name, own)
    with owner.graph.inserting_before(call):
        mine = owner.graph.get_attr(name)
    mine.meta = dict(attribute.meta)
    call.args = (mine, f"{identifier}_call_{number}", *operands)


def _moves(before: Collection[object], after: Collection[object]) -> dict[str, str] | None:
    """Module paths of one call to those of another, by the parameters the two hand over; ``None`` when that says nothing."""
    moves: dict[str, str] = {}
    for one, other in zip(before, after):
        if not isinstance(one, torch.fx.Node) or not isinstance(other, torch.fx.Node) or one is other:
            continue
        source, target = parameter_path(one).split("."), parameter_path(other).split(".")
        if len(source) < 2 or len(target) < 2:
            continue
        while len(source) > 1 and len(target) > 1 and source[-1] == target[-1]:
            source.pop()
            target.pop()
        if moves.setdefault(join_paths(*source), join_paths(*target)) != join_paths(*target):
            return None
    return moves or None


def _rename(graph: torch.fx.Graph, moves: dict[str, str] | None) -> None:
    for node in graph.nodes:
        stack = node.meta.pop("nn_module_stack", None)
        if not stack or moves is None:
            # The source line names it.
            continue
        written = {}
        for key, value in stack.items():
            spelled = str(value[0] if isinstance(value, (tuple, list)) else value)
            path = module_root(spelled)[1]
            source = max((s for s in moves if f"{path}.".startswith(f"{s}.")), key=len, default="")
            if source:
                path = join_paths(moves[source], path[len(source) + 1 :])
                # The module of the first call is not the one of this.
                key = path
            written[key] = (path, *value[1:]) if isinstance(value, (tuple, list)) else path
        node.meta["nn_module_stack"] = written


def copied(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a graph and the graphs inside it. Parameters and constants are shared, metadata of nodes are not."""
    graph = torch.fx.Graph()
    result = graph.graph_copy(gm.graph, val_map := {})
    if result is not None:
        output = graph.output(result)
        source = next(node for node in gm.graph.nodes if node.op == "output")
        output.meta = dict(source.meta)
        val_map[source] = output
    copy = torch.fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, child in copy.named_children():
        if isinstance(child, torch.fx.GraphModule):
            setattr(copy, name, copied(child))
    return copy
