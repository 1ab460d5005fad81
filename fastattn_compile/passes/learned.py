"""Taking the marks of learned parameters out of a captured graph."""

from __future__ import annotations

import torch
import torch.fx

from fastattn_compile.operators.parameters import mark_parameters


def take_parameters(gm: torch.fx.GraphModule) -> dict[str, tuple[torch.fx.Node, ...]]:
    """Removes the marks and returns what they marked.

    Args:
        gm: A captured graph; changed in place.

    Returns:
        Name of a site to the nodes of its parameters.
    """
    found: dict[str, tuple[torch.fx.Node, ...]] = {}
    marks = (torch.ops.fastattn.parameters.default, torch.ops.fastattn.parameters, mark_parameters)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in marks:
            parameters, site = node.args
            found[site] = tuple(parameters)
            gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return found
