"""A softmax as ``onnx.version_converter`` writes it for opset 13: over a flattened tensor, and back."""

from __future__ import annotations

import onnx_ir as ir


def undo_flattened_softmax(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Lets each softmax read and give the tensor as it was, where only the last dimension is left by the flattening.

    Until opset 12 a softmax took the dimensions from its axis on together; for the last axis both are the same.

    Args:
        graph: A graph with shapes; changed in place.

    Returns:
        What each changed softmax gives, and what it stands for.
    """
    changed = []
    for node in graph:
        if node.op_type != "Softmax" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
            continue
        flatten, users = node.inputs[0].producer(), node.outputs[0].uses()
        if (
            flatten is None
            or flatten.op_type != "Flatten"
            or len(users) != 1
            or node.outputs[0].is_graph_output()
        ):
            continue
        back, source = next(iter(users)).node, flatten.inputs[0]
        target = (
            back.inputs[1].producer() if back.op_type == "Reshape" and back.inputs[1] is not None else None
        )
        if target is None or target.op_type != "Shape" or target.inputs[0] is not source or target.attributes:
            continue
        if source is None or source.shape is None or _axis(node, -1) not in (1, -1):
            continue
        rank = len(source.shape)
        if _axis(flatten, 1) % rank != rank - 1:
            continue
        out, whole = node.outputs[0], back.outputs[0]
        if whole.is_graph_output():
            continue
        node.replace_input_with(0, source)
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        out.shape, out.type = whole.shape, whole.type
        whole.replace_all_uses_with(out)
        changed.append((out, whole))
    return changed


def _axis(node: ir.Node, default: int) -> int:
    found = node.attributes.get("axis")
    return default if found is None else int(found.value)
