"""What is wrong with an ONNX file, said before anything is made of it: sizes, names, weights, weights in other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from fastattn_compile.errors import ModelLoadError

# One message of protobuf holds no more.
_LARGEST_FILE = (1 << 31) - 1
# What other files begin with, for those who give one of them.
_SIGNATURES = (
    (0, b"PK\x03\x04", "a zip archive, such as torch.save writes"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x80\x02", "a Python pickle"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (4, b"ORTM", "a model in ONNX Runtime's own format (.ort)"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file it stands for (git lfs pull)"),
    (8, b'{"', "a safetensors file"),
)  # fmt: skip
# Typed fields of a tensor by data type, and how many entries of the field one element takes.
_FIELDS: dict[int, tuple[str, float]] = {
    TensorProto.FLOAT: ("float_data", 1), TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1), TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1), TensorProto.UINT32: ("uint64_data", 1), TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}  # fmt: skip
# Types of which one byte holds several, as far as the installed onnx knows them.
_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in (("UINT4", 4), ("INT4", 4), ("FLOAT4E2M1", 4), ("UINT2", 2), ("INT2", 2))
    if hasattr(TensorProto, name)
}


def parse(data: bytes, where: str) -> onnx.ModelProto:
    """Reads a model.

    Args:
        data: The bytes of a file.
        where: Its name, for messages.

    Raises:
        ModelLoadError: The bytes are no ONNX model.
    """
    if not data:
        raise ModelLoadError(f"{where} is empty; expected an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # google.protobuf's DecodeError; the class depends on its implementation
        raise ModelLoadError(
            f"{where} does not read as an ONNX model ({_looks_like(data) or first_line(error)}); it is damaged, cut short, "
            "or something else"
        ) from error
    if not proto.HasField("graph") and (kind := _looks_like(data)):
        raise ModelLoadError(f"{where} is no ONNX model; {kind}")
    return proto


def read_file(path: Path) -> onnx.ModelProto:
    """Reads the model of a file; weights in other files stay there.

    Raises:
        ModelLoadError: There is no such file, or it holds no ONNX model.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ModelLoadError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
        if size > _LARGEST_FILE:
            raise ModelLoadError(
                f"{path} has {size / 2**30:.1f} GB; protobuf holds at most 2 GB in one file. Save it with its weights in "
                "another file (onnx.save with save_as_external_data=True)"
            )
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error


def check(model: onnx.ModelProto, folder: Path | None, where: str) -> None:
    """Refuses a model that is broken, or that reads files it has no business with.

    Args:
        model: The model, weights in other files not loaded.
        folder: Where these files must lie; ``None`` when the model came without a place.
        where: The name of the model, for messages.

    Raises:
        ModelLoadError: Says what is wrong.
    """
    if not model.HasField("graph") or not (len(model.graph.node) or len(model.graph.output)):
        raise ModelLoadError(f"{where} holds no graph; is it an ONNX model?")
    if not model.graph.output:
        raise ModelLoadError(f"{where}: the graph has no outputs")
    if model.ir_version < 1:
        raise ModelLoadError(
            f"{where} does not say its IR version ({model.ir_version}); set ir_version, 10 for instance"
        )
    _check_opset(model, where)
    main = _Scope.of(model.graph, frozenset())
    scopes = [(model.graph, main), *_graphs(model.graph.node, main.known)]
    for function in model.functions:
        inside = _Scope(list(function.input), [], list(function.output), function.node)
        scopes += [(function, inside), *_graphs(function.node, inside.known)]
    for holder, scope in scopes:
        _check_names(scope, where)
        for tensor in _tensors(holder):
            _check_tensor(tensor, folder, where)
    _check_inputs(model.graph, where)


def _check_opset(model: onnx.ModelProto, where: str) -> None:
    opset = next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise ModelLoadError(f"{where} does not say which opset it uses")
    known = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= known:
        raise ModelLoadError(
            f"{where} uses opset {opset}; the installed onnx {onnx.__version__} knows 1 to {known}. Export with one of "
            "these, or install a newer onnx"
        )


@dataclass(frozen=True)
class _Scope:
    """The main graph, the body of a branch or loop, or a function: what it defines, what it may read from around it."""

    inputs: list[str]
    weights: list[str]
    outputs: list[str]
    nodes: Sequence[onnx.NodeProto]
    outer: frozenset[str] = frozenset()

    @staticmethod
    def of(graph: onnx.GraphProto, outer: frozenset[str]) -> _Scope:
        weights = [*(t.name for t in graph.initializer), *(x.values.name for x in graph.sparse_initializer)]
        return _Scope(
            [v.name for v in graph.input], weights, [v.name for v in graph.output], graph.node, outer
        )

    @property
    def made(self) -> list[str]:
        return [name for node in self.nodes for name in node.output if name]

    @property
    def known(self) -> frozenset[str]:
        return self.outer.union(self.inputs, self.weights, self.made)


def _graphs(
    nodes: Sequence[onnx.NodeProto], outer: frozenset[str]
) -> Iterator[tuple[onnx.GraphProto, _Scope]]:
    """The bodies of branches and loops, at any depth."""
    for node in nodes:
        for given in node.attribute:
            for body in (*([given.g] if given.HasField("g") else []), *given.graphs):
                scope = _Scope.of(body, outer)
                yield body, scope
                yield from _graphs(body.node, scope.known)


def _check_names(scope: _Scope, where: str) -> None:
    """Every name stands for one value, and every value that is read is there."""
    for names in (scope.inputs, scope.weights):
        _check_once(names, where)
    _check_once([*scope.made, *{*scope.inputs, *scope.weights}], where)  # a weight may be an input as well
    known = scope.known
    for node in scope.nodes:
        for name in node.input:
            if name and name not in known:
                raise ModelLoadError(
                    f"{where}: node {node.name or '(unnamed)'!r} ({node.op_type}) reads {name!r}, which no input, weight or "
                    "node gives"
                )
    for name in scope.outputs:
        if name not in known:
            raise ModelLoadError(f"{where}: nothing gives the output {name!r}")


def _check_once(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ModelLoadError(f"{where}: two values are named {name!r}")
        seen.add(name)


def _check_inputs(graph: onnx.GraphProto, where: str) -> None:
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            continue
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < -1:  # -1 is how some write a free one
                raise ModelLoadError(f"{where}: input {value.name!r} has a dimension of {dim.dim_value}")


def _tensors(graph: Any) -> Iterator[TensorProto]:
    """Tensors of a graph or function: its weights and what its nodes hold; not those of graphs inside nodes."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for given in node.attribute:
            if given.HasField("t"):
                yield given.t
            yield from given.tensors


def _check_tensor(tensor: TensorProto, folder: Path | None, where: str) -> None:
    """What a tensor says of itself and what is there fit."""
    name, dims = tensor.name, list(tensor.dims)
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelLoadError(
            f"{where}: the weight {name!r} is of type {tensor.data_type}, which ONNX does not have"
        )
    if any(d < 0 for d in dims):
        raise ModelLoadError(f"{where}: the weight {name!r} has shape {dims}")
    size = int(np.prod([int(d) for d in dims], dtype=object)) if dims else 1
    expected = _bytes(tensor.data_type, size)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, expected or 0, folder, where)
        return
    if tensor.HasField("raw_data"):
        got, unit = len(tensor.raw_data), "bytes"
    else:
        field, entries = _FIELDS.get(tensor.data_type, ("int32_data", _BITS.get(tensor.data_type, 8) / 8))
        got, unit, expected = len(getattr(tensor, field)), "entries", int(np.ceil(size * entries))
    if expected is not None and got != expected:
        raise ModelLoadError(
            f"{where}: the weight {name!r} of shape {dims} needs {expected} {unit} and has {got or 'no data'}"
        )


def _bytes(data_type: int, size: int) -> int | None:
    """Bytes of so many elements; ``None`` for texts."""
    if data_type == TensorProto.STRING:
        return None
    if data_type in _BITS:
        return -(-size * _BITS[data_type] // 8)
    return size * onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def _check_external(tensor: TensorProto, expected: int, folder: Path | None, where: str) -> None:
    if folder is None:
        raise ModelLoadError(f"{where} keeps its weights in other files; give the path of the model instead")
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, weight = said.get("location", ""), f"{where}: the weight {tensor.name!r}"
    try:
        offset, length = int(said.get("offset", 0)), int(said.get("length", expected))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise ModelLoadError(
            f"{weight} lies at offset {said.get('offset')!r}, length {said.get('length')!r} of {location}; expected two "
            "numbers"
        )
    if length != expected:
        raise ModelLoadError(
            f"{weight} of shape {list(tensor.dims)} needs {expected} bytes, {location} gives it {length}"
        )
    path = Path(location)
    target = (folder / path).resolve()
    if not location or path.is_absolute() or ".." in path.parts or folder.resolve() not in target.parents:
        raise ModelLoadError(
            f"{weight} lies outside the folder of the model ({location or 'no location'}); refused. Put its file beside the "
            "model and name it by a relative path"
        )
    if not target.is_file():
        raise ModelLoadError(f"{weight} lies in {location}, and there is no such file beside the model")
    if (there := target.stat().st_size) < offset + length:
        raise ModelLoadError(
            f"{weight} ends at byte {offset + length} of {location}, and the file ends at {there}; it was cut short or "
            "belongs to another model"
        )


def diagnosis(model: Any) -> str:
    """What ``onnx.checker`` says of a model; empty when it finds nothing.

    Args:
        model: An ``onnx.ModelProto`` without large weights, or something that makes one when called.
    """
    try:
        onnx.checker.check_model(model() if callable(model) else model, full_check=True)
    except Exception as error:  # ValidationError, InferenceError, or what serialisation raises
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The text of an error in one line, that of its first cause when it wraps others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _looks_like(data: bytes) -> str:
    for at, begin, name in _SIGNATURES:
        if data[at : at + len(begin)] == begin:
            return f"it looks like {name}"
    head = data[:256]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it looks like a text"
    return ""
