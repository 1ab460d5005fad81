"""Where a number comes from: versions, device, seed, hashes of weights and inputs. No paths, no host name."""

from __future__ import annotations

import datetime
import hashlib
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.machine import device_name as device_name
from fastattn_compile.version import __version__

_SAMPLE = 1 << 16


def provenance(
    model: nn.Module, inputs: Any, *, seed: int, context: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a reader needs to trust or to repeat a measurement.

    Args:
        model: The model measured.
        inputs: Its inputs: tensors in tuples, lists, dictionaries.
        seed: Seed of the sampled rows.
        context: More entries: the command line, the source of the text; no paths of this machine.
    """
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
        "model": type(model).__name__,
        "model_hash": weights_hash(model),
        "model_hash_method": f"sha256 of names, shapes, types, up to {_SAMPLE} spaced elements a tensor",
        "inputs_hash": inputs_hash(inputs),
        **(context or {}),
    }


def versions() -> dict[str, str]:
    """Versions of Python, torch, this package, and of transformers when it is imported."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "fastattn_compile": __version__}
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        found["transformers"] = getattr(transformers, "__version__", "unknown")
    return found


def weights_hash(model: nn.Module) -> str:
    """A hash that changes when the weights do: fast for any size, the same on every machine and device.

    Parameters and persistent buffers are hashed by name, shape, type, and up to 65536 evenly spaced elements
    each. A change of a few single elements of a large tensor can go unseen; a fine-tuned model does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor, _SAMPLE))
    return digest.hexdigest()


def inputs_hash(inputs: Any) -> str:
    """A hash of all elements of all tensors in the inputs, and of the other values, with their places."""
    digest = hashlib.sha256()
    for place, value in _leaves(inputs, ""):
        if isinstance(value, Tensor):
            digest.update(f"{place} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(_bytes(value, None))
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{place} {value!r}\n".encode())
        else:
            digest.update(f"{place} {type(value).__name__}\n".encode())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))


def _bytes(tensor: Tensor, sample: int | None) -> bytes:
    if tensor.is_meta:
        return b"meta"
    flat = tensor.detach().reshape(-1)
    if sample is not None and flat.numel() > sample:
        flat = flat[:: -(-flat.numel() // sample)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _leaves(value: Any, place: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{place}.{key}")
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{place}.{position}")
    else:
        yield place, value
