"""An ONNX graph as a view: every node in the vocabulary of ``graph.KINDS``, so that one finder serves FX and ONNX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
import torch
from numpy.typing import NDArray

from fastattn_compile.passes.fx_rules import Meaning
from fastattn_compile.passes.graph import GraphView, Node, Size
from fastattn_compile.passes.names import plain_path
from fastattn_compile.passes.onnx import layout_rules  # noqa: F401  registers its rules
from fastattn_compile.passes.onnx.quantised import real_type
from fastattn_compile.passes.onnx.rules import RULES, Call
from fastattn_compile.passes.onnx.shapes import is_known, result_shape, split_shapes
from fastattn_compile.passes.onnx.sizes import SizeValues, shapes_of
from fastattn_compile.passes.onnx.symbolic import infer
from fastattn_compile.passes.onnx.unfold import MEANS, STANDS_FOR, WHY_NOT

# torch types by their ONNX names.
_TYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64, ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32,
    ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8, ir.DataType.BOOL: torch.bool,
    ir.DataType.INT16: torch.int16,
}  # fmt: skip
# A weight of more elements is a weight whatever it holds; smaller tensors may be masks and are read.
_READABLE = 1 << 24
# Names that ONNX Runtime's inference makes up for sizes that it cannot tell.
_UNKNOWN = re.compile(r"unk__\d+$|.+_o\d+__d\d+$")
_LEGACY_STEP = re.compile(r"[/.]")


def infer_shapes(model: ir.Model) -> None:
    """Puts shapes on all values of a model, in place, as far as they can be inferred, with symbols for named dimensions.

    ONNX Runtime's symbolic inference does the work where it can be installed, ONNX's own otherwise. Weights are not
    copied: both see them by shape and type alone, but for the small ones that shapes are computed with.

    Args:
        model: The model.
    """
    if not _may_attend(model):
        return  # inference takes its time
    _note(model.graph, infer(skeleton(model)).graph)


def _note(graph: ir.Graph, inferred: onnx.GraphProto) -> None:
    """Puts what was inferred of a graph on its values, and of the bodies of its branches and loops on theirs."""
    found = {v.name: v.type for v in (*inferred.value_info, *inferred.output)}
    nodes = {node.output[0]: node for node in inferred.node if node.output}
    for node in graph:
        for value in node.outputs:
            proto = found.get(value.name or "")
            if proto is None or not proto.HasField("tensor_type"):
                continue
            tensor = proto.tensor_type
            if value.dtype is None and tensor.elem_type:
                value.dtype = ir.DataType(tensor.elem_type)
            if tensor.HasField("shape") and (value.shape is None or not _settled(value.shape)):
                dims = [
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
                ]
                value.shape = ir.Shape(dims)
        same = nodes.get(node.outputs[0].name or "") if node.outputs else None
        bodies = {a.name: a.g for a in same.attribute} if same is not None else {}
        for name, given in node.attributes.items():
            if given.type == ir.AttributeType.GRAPH and name in bodies:
                _note(given.value, bodies[name])


def _may_attend(model: ir.Model) -> bool:
    """Whether anything in a model could be a softmax."""
    return any(
        node.op_type in ("Softmax", "LogSoftmax", "Exp", "QLinearSoftmax") or "Attention" in node.op_type
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    )


def _settled(shape: ir.Shape) -> bool:
    return all(isinstance(d, int) or (d.value is not None and not _UNKNOWN.match(d.value)) for d in shape)


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its large weights and without shapes somebody else inferred."""
    proto = onnx.ModelProto()
    whole = ir.serde.serialize_model(_without_weights(model))
    proto.CopyFrom(whole)
    del proto.graph.value_info[:]
    return proto


def _without_weights(model: ir.Model) -> ir.Model:
    """A clone whose large initializers became inputs."""
    clone = model.clone()
    for name, value in list(clone.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.size > 1024:
            del clone.graph.initializers[name]
            value.const_value = None
            if value not in clone.graph.inputs:
                clone.graph.inputs.append(value)
    return clone


def view(model: ir.Model, graph: ir.Graph | None = None) -> GraphView:
    """Normalises a graph.

    Args:
        model: The model, after ``infer_shapes``.
        graph: The graph to view, the main graph or the body of a branch or loop; the main graph when ``None``.

    Returns:
        Nodes in order; ``origin`` is the ``onnx_ir.Value`` a node stands for, ``None`` for intermediate meanings.
    """
    return GraphView(_Builder(model, graph or model.graph).nodes)


class _Builder:
    """Reads the nodes of one graph in order."""

    def __init__(self, model: ir.Model, graph: ir.Graph) -> None:
        self.opset = model.opset_imports.get("", 0)
        self.nodes: list[Node] = []
        self.of: dict[ir.Value, Node] = {}
        self.shapes: dict[ir.Value, tuple[Size, ...] | None] = {}
        self.values = SizeValues(self.shape, constant_of)
        for value in graph.inputs:
            if value.name not in graph.initializers:
                self._leaf(value, "input")
        for node in graph:
            for operand in node.inputs:
                if operand is not None and operand not in self.of:
                    self._leaf(operand, "parameter" if operand.const_value is not None else "input")
            self._read(node)
        outputs = tuple(self._operand(v) for v in graph.outputs)
        self._append("output", Meaning("output", outputs), None, "", "")

    def shape(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Sizes of a value: inferred, or what the rule of its node found."""
        if value not in self.shapes:
            self.shapes[value] = shapes_of(value.shape)
        return self.shapes[value]

    def _leaf(self, value: ir.Value, kind: str) -> None:
        constant = constant_of(value)
        meaning = Meaning(kind)
        if constant is not None:
            meaning = _constant(constant, value)
        elif kind == "parameter":
            meaning = Meaning("parameter")
        self.of[value] = self._append(value.name or f"v{len(self.nodes)}", meaning, value, "", "")

    def _operand(self, value: ir.Value | None) -> Any:
        return None if value is None else self.of.get(value)

    def _read(self, node: ir.Node) -> None:
        self.values.follow(node)
        self._refine(node)
        stands_for = node.meta.get(STANDS_FOR)
        module, source = provenance(node if stands_for is None else stands_for[0].producer())
        call = Call(node, [self._operand(v) for v in node.inputs], self.values, self.shape, self.opset)
        for at, value in enumerate(node.outputs):
            known = self.values.known.get(value)
            meaning: Meaning | None = None
            if known is not None:
                meaning = _sizes(known)
            elif at == 0 and MEANS in node.meta:
                meaning = Meaning("identity", (self.of[node.meta[MEANS]],))
            elif at == 0 and WHY_NOT in node.meta:
                operands = tuple(x for x in call.inputs if isinstance(x, Node))
                meaning = Meaning("mha", operands, {"reason": node.meta[WHY_NOT]})
            elif value.const_value is not None or node.op_type == "Constant":
                constant = constant_of(value)
                meaning = _constant(constant, value) if constant is not None else None
            else:
                rule = RULES.get((_domain(node), node.op_type))
                meaning = rule(call, at) if rule is not None else None
            if meaning is None:
                operands = tuple(x for x in call.inputs if isinstance(x, Node))
                meaning = Meaning("opaque", (*operands, *self._captured(node)), {"target": node.op_type})
            made = self._append(value.name or f"{node.name}.{at}", meaning, value, module, source)
            if known is not None and known.size == 1:
                made.shape = None  # one size is a number, as it is in an FX graph
            self.of[value] = made

    def _captured(self, node: ir.Node) -> list[Node]:
        """What the branches or the body of a node read from around them."""
        bodies = [x for x in node.attributes.values() if x.type == ir.AttributeType.GRAPH]
        read = {
            value: None
            for body in bodies
            for inner in ir.traversal.RecursiveGraphIterator(body.value)
            for value in inner.inputs
            if value is not None
        }
        read.update((value, None) for body in bodies for value in body.value.outputs)
        return [self.of[value] for value in read if value in self.of]

    def _refine(self, node: ir.Node) -> None:
        """A target shape that was computed with tensors says more than what inference made of it."""
        if node.op_type == "Split":
            for value, part in zip(node.outputs, split_shapes(node, self.values)):
                if not is_known(self.shape(value)):
                    self.shapes[value] = part
            return
        inferred = self.shape(node.outputs[0]) if node.outputs else None
        if node.op_type not in ("Reshape", "Expand", "ConstantOfShape") and is_known(inferred):
            return
        shape = result_shape(node, self.values)
        if shape is not None and (is_known(shape) or inferred is None):
            self.shapes[node.outputs[0]] = shape

    def _append(self, name: str, meaning: Meaning, value: ir.Value | None, module: str, source: str) -> Node:
        inputs = tuple(
            self._append(f"{name}.{len(self.nodes)}", x, None, module, source)
            if isinstance(x, Meaning)
            else x
            for x in meaning.inputs
        )
        attributes = dict(meaning.attributes)
        if isinstance(attributes.get("index"), tuple):  # index tensors that were computed with the meaning
            made_of = {id(x): node for x, node in zip(meaning.inputs, inputs)}
            attributes["index"] = tuple(made_of.get(id(x), x) for x in attributes["index"])
        shape, dtype = meaning.shape, meaning.dtype
        if value is not None and shape is None:
            shape = self.shape(value)
        if value is not None and dtype is None:
            stands_for = real_type(value)
            dtype = _TYPES.get(stands_for) if stands_for is not None else None
        made = Node(name, meaning.kind, inputs, attributes, shape, dtype, module, source, False, value)
        self.nodes.append(made)
        return made


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def constant_of(value: ir.Value) -> NDArray[Any] | None:
    """The numpy value of an initializer or of a ``Constant`` node, ``None`` when it is neither or lies elsewhere."""
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
        for name, given in node.attributes.items():
            if name == "value":
                tensor = given.value
            elif name in ("value_float", "value_floats"):
                return np.asarray(given.value, dtype=np.float32)
            elif name in ("value_int", "value_ints"):
                return np.asarray(given.value, dtype=np.int64)
    if tensor is None or tensor.size > _READABLE:
        return None
    try:
        array: NDArray[Any] = tensor.numpy()
    except (OSError, ValueError, TypeError):  # external data that is not there, or a type numpy has not
        return None
    return array


def _sizes(known: NDArray[Any]) -> Meaning:
    """A tensor of sizes: one of them as a number, several numbers as a tensor, several symbols as nothing to be read."""
    flat = known.reshape(-1).tolist()
    if len(flat) == 1:
        return Meaning("constant", (), {"value": flat[0]})
    if any(isinstance(x, sympy.Expr) for x in flat):
        return Meaning("constant")
    return Meaning("constant", (), {"value": torch.tensor(flat).reshape(known.shape)})


def _constant(array: NDArray[Any], value: ir.Value) -> Meaning:
    """A constant with its value; one number as a number, so that scales and fills are seen as such."""
    if array.dtype.kind not in "fiub" or value.dtype == ir.DataType.BFLOAT16:
        array = array.astype(np.float32) if array.size == 1 else array
    if array.dtype.kind not in "fiub":
        return Meaning("parameter")
    if array.size == 1:
        return Meaning("constant", (), {"value": array.reshape(-1)[0].item()})
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return Meaning("parameter")
    return Meaning(
        "constant", (), {"value": torch.from_numpy(array if array.flags.writeable else array.copy())}
    )


def provenance(node: ir.Node) -> tuple[str, str]:
    """Module path and source line of a node, as its exporter wrote them.

    ``torch.onnx.export(dynamo=True)`` leaves the module stack in the metadata; the older exporter leaves the path in the
    names of nodes (``/encoder/layer.0/attention/Softmax``). Other exporters leave neither: the node's name stands for it.
    """
    stack = node.metadata_props.get("namespace", "")
    if stack:
        *modules, _call = stack.split("/")
        path = modules[-1].split(": ")[0] if modules else ""
        return plain_path(path.strip()), _line(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
    name = node.name or ""
    if name.startswith("/"):
        steps = [step for step in name.split("/")[1:-1] if step]
        return plain_path(".".join(steps)), ""
    return "", name


def _line(trace: str) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not frames:
        return ""
    file, line = frames[-1]
    parts = re.split(r"(?:site|dist)-packages/", file.replace("\\", "/"))
    return f"{parts[-1] if len(parts) > 1 else file.rsplit('/', 1)[-1]}:{line}"


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and the bodies of its branches and loops."""
    yield model.graph
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for given in node.attributes.values():
            if given.type == ir.AttributeType.GRAPH:
                yield given.value
            elif given.type == ir.AttributeType.GRAPHS:
                yield from given.value


def owners(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """The node around each body of a branch or loop."""
    found: dict[ir.Graph, ir.Node] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for given in node.attributes.values():
            bodies = [given.value] if given.type == ir.AttributeType.GRAPH else []
            found.update(
                dict.fromkeys(given.value if given.type == ir.AttributeType.GRAPHS else bodies, node)
            )
    return found
