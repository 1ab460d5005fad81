"""Where a converted model goes: nothing that stood there is lost until the new file is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from fastattn_compile.converting.source import Source
from fastattn_compile.errors import ConversionError, OptionError

# From here on weights go to a file of their own: protobuf holds 2 GB.
_INLINE = 1 << 30


def target_of(source: Source, out: str | Path | None) -> Path | None:
    """The path of the converted model, after a look at whether a file can be written there.

    Raises:
        OptionError: It is the model itself, a folder, or in a folder that takes no files.
    """
    if out is None:
        return None
    target = Path(out)
    if isinstance(source, (str, Path)) and _same(Path(source), target):
        raise OptionError(f"{target} is the model itself; name another file for the converted one")
    if target.is_dir():
        raise OptionError(f"{target} is a folder; name a file for the converted model")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fastattn-"):
            pass
    except OSError as error:
        raise OptionError(
            f"no file can be written to {target.parent} ({error.strerror or error}); name another place for the converted "
            "model"
        ) from error
    return target


def keep_weights(model: ir.Model, target: Path | None) -> None:
    """Refuses a target that is a file the model keeps its weights in.

    Raises:
        OptionError: It is one.
    """
    if target is None or not target.exists():
        return
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and _same(Path(tensor.path), target):
            raise OptionError(
                f"{target} holds the weights of the model; name another file for the converted one"
            )


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them is not there
        return a.resolve() == b.resolve()


@contextmanager
def staged(target: Path | None) -> Iterator[Path]:
    """A folder beside the target, so that the files of a converted model move into place by a rename.

    What a killed process leaves beside, ``.fastattn-*``, may be deleted.

    Raises:
        ConversionError: The disk is full, or files cannot be written for another reason.
    """
    folder = target.parent if target is not None else Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fastattn-") as beside:
            yield Path(beside)
    except OSError as error:
        raise ConversionError(
            f"the converted model cannot be written to {folder}: {error.strerror or error}; nothing there was changed"
        ) from error


def write(model: ir.Model, path: Path) -> Path | None:
    """Saves a model; weights that lay in other files go to one of a name of its own, so that no old file is touched.

    Returns:
        The file of the weights, where there is one.
    """
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    size = sum(t.nbytes for t in tensors)
    if size < _INLINE and not any(isinstance(t, ir.ExternalTensor) for t in tensors):
        ir.save(model, path)
        return None
    data = path.parent / f"{path.stem}.{os.urandom(4).hex()}.data"
    ir.save(model, path, external_data=data.name)
    return data if data.exists() else None


def move(path: Path, data: Path | None, target: Path) -> None:
    """Puts the written files in their places, weights first: at no time does a model name weights that are not there."""
    if data is not None:
        os.replace(data, target.parent / data.name)
    os.replace(path, target)


def original_path(source: Source, folder: Path) -> Path:
    """The file of the original; one in ``folder`` where it came without a file."""
    if isinstance(source, (str, Path)):
        return Path(source)
    path = folder / "original.onnx"
    if isinstance(source, (bytes, bytearray)):
        path.write_bytes(bytes(source))
    else:
        onnx.save(source if isinstance(source, onnx.ModelProto) else ir.to_proto(source), str(path))
    return path
