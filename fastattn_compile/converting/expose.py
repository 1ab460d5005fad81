"""Values inside a model as its outputs, those of branches and loops too: so that a run shows what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fastattn_compile.errors import ConversionError
from fastattn_compile.passes.onnx.view import owners

# Nodes out of whose bodies a value can be carried.
_CARRIED = frozenset({"If", "Loop", "Scan"})


def expose(model: ir.Model, values: Sequence[ir.Value], prefix: str) -> list[str]:
    """Makes values outputs of the model, through nodes that only rename them.

    A value of a branch is carried out through the ``If``; where the other branch is taken it is empty. A value of a loop has
    an axis more, in front: the rounds.

    Returns:
        The names of the outputs, in order.

    Raises:
        ConversionError: A value stands in the body of a node out of which nothing can be carried.
    """
    names = []
    around = owners(model)
    for number, value in enumerate(values):
        name = f"{prefix}{number}"
        outside, depth = value, 0
        while (graph := _graph_of(outside)) is not model.graph:
            outside = _carried(outside, around[graph], graph, f"{name}_{depth}")
            depth += 1
        _append(model.graph, _renamed(outside, name))
        names.append(name)
    return names


def hidden_in(model: ir.Model, value: ir.Value) -> str:
    """Why a value cannot be made an output of the model; empty where it can."""
    around: Mapping[ir.Graph, ir.Node] | None = None
    while (graph := _graph_of(value)) is not model.graph:
        around = around or owners(model)  # few values stand in a body
        owner = around[graph]
        if not _carries(owner):
            return f"it stands in the body of a node {owner.op_type}, out of which nothing can be measured"
        value = owner.outputs[0]
    return ""


def _carries(owner: ir.Node) -> bool:
    return owner.op_type in _CARRIED and owner.domain in ("", "ai.onnx")


def _graph_of(value: ir.Value) -> ir.Graph:
    graph = value.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"{value.name} stands in no graph")
    return graph


def _append(graph: ir.Graph, node: ir.Node) -> None:
    """A node whose result becomes an output of the graph."""
    graph.append(node)
    graph.outputs.append(node.outputs[0])


def _renamed(value: ir.Value, name: str) -> ir.Node:
    node = ir.Node("", "Identity", [value], num_outputs=1, name=name)
    made = node.outputs[0]
    made.name, made.type, made.shape = name, value.type, value.shape
    return node


def _carried(value: ir.Value, owner: ir.Node, body: ir.Graph, name: str) -> ir.Value:
    """A new output of the node in whose body a value stands."""
    if not _carries(owner):
        raise ConversionError(
            f"{value.name} stands in the body of a node {owner.op_type}; nothing was written"
        )
    rank = len(value.shape) if value.shape is not None else None
    if owner.op_type == "If":
        for attribute in owner.attributes.values():
            branch = attribute.as_graph()
            node = _renamed(value, f"{name}_taken") if branch is body else _empty(value, rank, f"{name}_not")
            _append(branch, node)
    else:
        _append(body, _renamed(value, f"{name}_round"))
        rank = None if rank is None else rank + 1
        for each in ("scan_output_axes", "scan_output_directions"):
            if each in owner.attributes:
                listed = [*owner.attributes[each].as_ints(), 0]
                owner.attributes[each] = ir.AttrInt64s(each, listed)
    owner.resize_outputs(len(owner.outputs) + 1)
    out = owner.outputs[-1]
    out.name, out.type = name, value.type
    out.shape = None if rank is None else ir.Shape([None] * rank)
    return out


def _empty(like: ir.Value, rank: int | None, name: str) -> ir.Node:
    """A tensor without elements, of the type of another."""
    if like.dtype is None:
        raise ConversionError(
            f"the type of {like.name}, which stands in a branch, is not known; nothing was written"
        )
    held = ir.Tensor(np.zeros([0] * (rank or 1), dtype=like.dtype.numpy()), dtype=like.dtype)
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", held)], num_outputs=1, name=name)
    made = node.outputs[0]
    made.name, made.type, made.shape = name, like.type, ir.Shape(held.shape)
    return node
