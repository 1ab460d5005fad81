"""Reading an ONNX model from a path, bytes or a proto, and saying clearly what is wrong with one that is no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from fastattn_compile.errors import ModelLoadError
from fastattn_compile.lowering.onnx.body import DOMAIN
from fastattn_compile.passes.analyse import named
from fastattn_compile.passes.find import find
from fastattn_compile.passes.onnx.view import graphs, infer_shapes, view
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
    if isinstance(source, onnx.ModelProto):
        return _checked(_from_proto(source), None)
    if isinstance(source, (bytes, bytearray)):
        return _checked(_from_proto(_parsed(bytes(source), "the given bytes")), None)
    path = Path(source)
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file")
    _parsed_header(path)
    try:
        model = ir.load(path)
    except Exception as error:  # whatever a broken file makes the parser raise
        raise ModelLoadError(f"{path} does not read as an ONNX model: {_short(error)}") from error
    return _checked(model, path)


def _from_proto(proto: onnx.ModelProto) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except Exception as error:  # SerdeError, ValueError, and what they were raised from
        raise ModelLoadError(f"the given model is broken: {_short(error.__cause__ or error)}") from error


def _parsed(data: bytes, name: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # google.protobuf's DecodeError; the class depends on its implementation
        raise ModelLoadError(f"{name} do not read as an ONNX model: {_short(error)}") from error
    return proto


def _parsed_header(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ModelLoadError(f"{path} is empty")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(model: ir.Model, path: Path | None) -> ir.Model:
    """Refuses what cannot be converted before anything is made of it."""
    where = str(path) if path is not None else "the model"
    if not len(model.graph) and not model.graph.outputs:
        raise ModelLoadError(f"{where} holds no graph; is it an ONNX model?")
    if "" not in model.opset_imports:
        raise ModelLoadError(f"{where} does not say which opset it uses")
    names: set[str] = set()
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.name in names:
                raise ModelLoadError(f"{where}: two nodes give a value named {value.name!r}")
            names.add(value.name or "")
    folder = path.parent.resolve() if path is not None else None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, folder, where)
        elif tensor is None:
            raise ModelLoadError(f"{where}: the weight {value.name!r} has no data")
    return model


def _check_external(tensor: ir.ExternalTensor, folder: Path | None, where: str) -> None:
    if folder is None:
        raise ModelLoadError(f"{where} keeps its weights in other files; give the path of the model instead")
    location = Path(os.fspath(tensor.location))
    target = (folder / location).resolve()
    if location.is_absolute() or folder not in target.parents:
        raise ModelLoadError(
            f"{where}: the weight {tensor.name!r} lies outside the folder of the model ({location}); refused"
        )
    if not target.is_file():
        raise ModelLoadError(f"{where}: the file of the weight {tensor.name!r} is missing ({location})")
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if target.stat().st_size < end:
        raise ModelLoadError(f"{where}: the file {location} ends before the weight {tensor.name!r} does")


def prepare(source: Source) -> Prepared:
    """Reads a model and finds its softmaxes.

    Raises:
        ModelLoadError: It is no ONNX model, or its graph is broken.
    """
    model = read_model(source)
    foreign = [f for f in model.functions.values() if f.domain != DOMAIN]
    if foreign:
        model = ir_passes.InlinePass()(model).model
    every = [v for g in graphs(model) for node in g for v in node.outputs]
    given = {v: (v.shape.copy() if v.shape is not None else None, v.type) for v in every}
    try:
        model.graph.sort()
        infer_shapes(model)
        found = [find(view(model, graph)) for graph in graphs(model)]
    except ValueError as error:
        raise ModelLoadError(f"the graph of the model is broken: {_short(error)}") from error
    lines = named([line for graph in found for line in graph])
    return Prepared(model, lines, model.opset_imports[""], given)
