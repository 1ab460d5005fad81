"""``fa.onnx``: converted models in ONNX Runtime with our native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def library() -> str:
    """The path of the native library: the one of the wheel, where it was packed with a compiler, else built at first use.

    Hand it to ``SessionOptions.register_custom_ops_library`` of any ONNX Runtime from 1.17 on: nodes of the domain
    ``fastattn`` then run as kernels instead of through the function that stands beside them; ``placement`` says which.

    Raises:
        RuntimeError: The wheel has none for this processor, and there is no C++ compiler, or it fails.
    """
    from fastattn_compile.lowering.onnx.native.build import library_path

    return str(library_path())


def placement(model: Any) -> dict[str, str]:
    """How the nodes of our domain run in a session with the library.

    Args:
        model: A path, the bytes of a model, or an ``onnx.ModelProto``.

    Returns:
        By name of the node (its type and number where it has none): ``"native"``, or ``"function"`` where the library has
        no kernel for its type.
    """
    import onnx

    from fastattn_compile.lowering.onnx.body import DOMAIN
    from fastattn_compile.lowering.onnx.native import NODES

    if isinstance(model, (str, Path)):
        model = onnx.load(str(model), load_external_data=False)
    elif isinstance(model, bytes):
        model = onnx.load_from_string(model)
    ours = [node for node in _nodes(model.graph) if node.domain == DOMAIN]
    return {
        node.name or f"{node.op_type} {number}": "native" if node.op_type in NODES else "function"
        for number, node in enumerate(ours)
    }


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, those in its branches and loops too."""
    for node in graph.node:
        yield node
        for given in node.attribute:
            if given.HasField("g"):
                yield from _nodes(given.g)


def export(module: Any, args: tuple[Any, ...], *, longest: int = 8192, **options: Any) -> Any:
    """``torch.onnx.export(dynamo=True)`` of a model that calls our operators: nodes with their functions beside them.

    Args:
        module: The model.
        args: Example inputs.
        longest: Longest sequence the exported model must serve where the length is free.
        options: Of ``torch.onnx.export``, for example ``dynamic_shapes`` and ``opset_version``.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        ConversionError: A call cannot be said in ONNX.
    """
    from fastattn_compile.lowering.onnx.export import export as exported

    return exported(module, args, longest, **options)


def session(model: str | Path | bytes, options: Any = None, providers: list[Any] | None = None) -> Any:
    """An ONNX Runtime session that runs our nodes by native kernels.

    Args:
        model: A path, or the bytes of a model.
        options: ``onnxruntime.SessionOptions``; the library is registered in them. New ones when ``None``.
        providers: Execution providers; the CPU's when ``None``.

    Returns:
        The ``onnxruntime.InferenceSession``.

    Raises:
        RuntimeError: There is no library for this processor and no C++ compiler, or it fails. The model runs without the
            library, too: make the session with onnxruntime itself.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions() if options is None else options
    options.register_custom_ops_library(library())
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=providers or ["CPUExecutionProvider"])
