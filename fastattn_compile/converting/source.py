"""Reading an ONNX model from a path, bytes or a proto, and saying clearly what is wrong with one that is no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from fastattn_compile.converting.checks import check, diagnosis, first_line, parse, read_file
from fastattn_compile.errors import FastAttentionError, ModelLoadError
from fastattn_compile.lowering.onnx.body import DOMAIN
from fastattn_compile.passes.analyse import named
from fastattn_compile.passes.find import find
from fastattn_compile.passes.onnx.flattened import undo_flattened_softmax
from fastattn_compile.passes.onnx.unfold import STANDS_FOR, unfold
from fastattn_compile.passes.onnx.view import graphs, infer_shapes, skeleton, view
from fastattn_compile.passes.site import Softmax

Source = Any  # str | Path | bytes | onnx.ModelProto | onnx_ir.Model


@dataclass(frozen=True)
class Prepared:
    """A model and what was found in it.

    Args:
        model: The model; local functions but ours are inlined, shapes are inferred.
        softmaxes: One for each softmax, in the order of the graph.
        opset: Version of the standard operators.
        given: Shapes and types that values had before inference.
    """

    model: ir.Model
    softmaxes: list[Softmax]
    opset: int
    given: dict[ir.Value, tuple[Any, Any]]

    def forget_inferred(self) -> None:
        """Takes back the shapes and types that inference put on values: the file says what it said."""
        for value, (shape, dtype) in self.given.items():
            value.shape, value.type = shape, dtype


def read_model(source: Source) -> ir.Model:
    """Reads a model.

    Args:
        source: A path, the bytes of a file, an ``onnx.ModelProto`` or an ``onnx_ir.Model`` (which is cloned).

    Raises:
        ModelLoadError: It is no ONNX model, or its weights lie outside its folder, or are not there.
    """
    if isinstance(source, ir.Model):
        return source.clone()
    where, folder = name_of(source), None
    if isinstance(source, onnx.ModelProto):
        proto = source
    elif isinstance(source, (bytes, bytearray)):
        proto = parse(bytes(source), where)
    else:
        folder = Path(source).parent
        proto = read_file(Path(source))
    check(proto, folder, where)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # SerdeError, ValueError, and what they were raised from
        raise ModelLoadError(f"{where} is broken: {first_line(error)}") from error
    _free_dimensions(model)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
        _bring_in(model)
    return model


def _free_dimensions(model: ir.Model) -> None:
    """A dimension of -1, as Paddle writes it, is one without a number."""
    values = [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and -1 in value.shape:
            value.shape = ir.Shape([None if dim == -1 else dim for dim in value.shape])


def _bring_in(model: ir.Model) -> None:
    """Reads what nodes hold and what lies in other files: where a model is saved, its own weights alone are moved."""

    def inside(tensor: ir.ExternalTensor) -> ir.Tensor:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)

    for graph in graphs(model):
        for node in graph:
            for name, given in list(node.attributes.items()):
                if given.type == ir.AttributeType.TENSOR and isinstance(given.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, inside(given.value))
        if graph is not model.graph:
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = inside(value.const_value)


def name_of(source: Source) -> str:
    """What messages call a model."""
    if isinstance(source, (str, Path)):
        return str(source)
    return "the given bytes" if isinstance(source, (bytes, bytearray)) else "the model"


def prepare(source: Source) -> Prepared:
    """Reads a model and finds its softmaxes.

    Raises:
        ModelLoadError: It is no ONNX model, or its graph is broken.
    """
    model = read_model(source)
    with sound(source):
        foreign = [f for f in model.functions.values() if f.domain != DOMAIN]
        if foreign:
            model = ir_passes.InlinePass()(model).model
        every = [v for g in graphs(model) for node in g for v in node.outputs]
        given = {v: (v.shape.copy() if v.shape is not None else None, v.type) for v in every}
        try:
            model.graph.sort()
        except ValueError as error:
            raise ModelLoadError(
                f"{name_of(source)}: the nodes of the graph read each other in a cycle"
            ) from error
        infer_shapes(model)
        for graph in graphs(model):
            given.update((out, given[whole]) for out, whole in undo_flattened_softmax(graph))
        opset = model.opset_imports[""]
        written = [node for g in graphs(model) for node in unfold(g, opset)]
        if written:
            given |= {v: (None, None) for node in written for v in node.outputs}
            # What takes a fused node's place is known as well as that was: it may become an output of the model.
            given |= {result: given[fused] for fused, result in (node.meta[STANDS_FOR] for node in written)}
            infer_shapes(model)
        found = [find(view(model, graph)) for graph in graphs(model)]
    lines = named([line for graph in found for line in graph])
    return Prepared(model, lines, opset, given)


@contextmanager
def sound(source: Source) -> Iterator[None]:
    """Whatever fails on a model that ``onnx.checker`` finds broken fails because of that.

    The checker is asked only then: it also finds fault with models that run.

    Raises:
        ModelLoadError: With the words of the checker.
    """
    try:
        yield
    except FastAttentionError:
        raise
    except Exception as error:
        wrong = diagnosis(lambda: skeleton(read_model(source)))
        if wrong:
            raise ModelLoadError(f"{name_of(source)}: the graph is broken: {wrong}") from error
        raise
