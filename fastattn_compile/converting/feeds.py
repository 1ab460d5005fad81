"""Inputs to run a model on: the user's, or made from the model's signature."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastattn_compile.errors import OptionError

Feeds = dict[str, NDArray[Any]]

_LENGTH_WORDS = ("seq", "len", "token", "time", "frame", "num_keypoints", "patch")
_MASK_WORDS = ("mask",)
_VOCABULARY = 1000
# Bytes of an input that is made.
_LARGEST = 4 << 30
# Operators behind which token numbers are still token numbers.
_CARRIED = frozenset({"Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten", "Slice"})


def signature(model: ir.Model) -> list[ir.Value]:
    """The inputs a caller gives: initializers that are inputs as well have their value already."""
    return [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def load_feeds(path: Path, model: ir.Model) -> Feeds:
    """Reads inputs from an ``.npz`` file, one array an input.

    Raises:
        OptionError: It is no such file, or the arrays are not those the model takes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            given = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise OptionError(f"{path} is no .npz file of arrays: {error}") from error
    return check_feeds(given, model)


def check_feeds(given: Mapping[str, Any], model: ir.Model) -> Feeds:
    """The inputs as arrays, after a look at names, types and ranks.

    Raises:
        OptionError: A name is missing or unknown, or an array has another type or rank than the model says.
    """
    wanted = {v.name or "": v for v in signature(model)}
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        said = (f"missing: {', '.join(missing)}" if missing else "") + (
            f"{'; ' if missing else ''}unknown: {', '.join(unknown)}" if unknown else ""
        )
        raise OptionError(f"the inputs do not fit the model ({said}); it takes {', '.join(wanted)}")
    feeds = {}
    for name, value in wanted.items():
        array = np.asarray(given[name])
        if value.dtype is not None and array.dtype != value.dtype.numpy():
            raise OptionError(f"input {name} must be of type {value.dtype.name}, got {array.dtype}")
        if value.shape is not None and len(value.shape) != array.ndim:
            raise OptionError(f"input {name} must have {len(value.shape)} dimensions, got {array.shape}")
        feeds[name] = array
    return feeds


def make_feeds(model: ir.Model, length: int, batch: int = 1, seed: int = 0) -> Feeds:
    """Random inputs that fit the signature: token numbers, masks of ones, normal reals.

    A named dimension is the batch when it comes first, or a length when its name or place says so.

    Args:
        model: The model.
        length: Tokens.
        batch: Sequences.
        seed: Seed of the random numbers.

    Raises:
        OptionError: An input would take more memory than anybody means.
    """
    generator = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in signature(model):
        name, dims = value.name or "", list(value.shape) if value.shape is not None else []
        shape = [_size(dim, place, length, batch) for place, dim in enumerate(dims)]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        if math.prod(shape) * dtype.itemsize > _LARGEST:
            raise OptionError(
                f"input {name} of shape {tuple(shape)} is too large to be made up; give arrays of your own (--inputs)"
            )
        if dtype.kind == "b" or (dtype.kind in "iu" and any(word in name.lower() for word in _MASK_WORDS)):
            feeds[name] = np.ones(shape, dtype)
        elif dtype.kind in "iu":
            limit = min(_vocabulary(model, value), 127 if dtype.itemsize == 1 else _VOCABULARY * 1000)
            if "position" in name.lower() and len(shape) == 2:
                feeds[name] = np.broadcast_to(np.arange(shape[1]), shape).astype(dtype)
            elif "type" in name.lower():
                feeds[name] = np.zeros(shape, dtype)
            else:
                feeds[name] = generator.integers(0, limit, shape).astype(dtype)
        else:
            feeds[name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def _size(dim: Any, place: int, length: int, batch: int) -> int:
    if isinstance(dim, int):
        return dim
    name = str(dim.value or "").lower()
    if any(word in name for word in _LENGTH_WORDS):
        return length
    return batch if place == 0 else length


def _vocabulary(model: ir.Model, value: ir.Value) -> int:
    """Rows of the table that token numbers are looked up in."""
    sizes = []
    for use in value.uses():
        node = use.node
        if node.op_type in _CARRIED and use.idx == 0:
            sizes.append(_vocabulary(model, node.outputs[0]))
        elif node.op_type == "Gather" and use.idx == 1 and node.inputs[0] is not None:
            shape = node.inputs[0].shape
            if shape is not None and isinstance(shape[0], int):
                sizes.append(shape[0])
    return min(sizes, default=_VOCABULARY)
