"""The weights a retrofit starts from, known by their hashes: whether they are the same, which differ, which are tied."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import CheckpointError
from fastattn_compile.retrofitting.attach import LearnedParameters

_LISTED = 3


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a model.

    Args:
        sha256: Hash of its elements.
        shape: Its shape.
        dtype: Its type, for example ``"float32"``.
    """

    sha256: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class BaseWeights:
    """Every parameter and persistent buffer of a model by its hash, learned parameters of operators apart.

    Args:
        model: Name of the model's class.
        tensors: Name in the ``state_dict`` to facts.
    """

    model: str
    tensors: Mapping[str, TensorFacts]

    @staticmethod
    def of(model: nn.Module) -> BaseWeights:
        """Reads a model. Every element counts; tied tensors are read once.

        Raises:
            CheckpointError: A tensor has no data here (``meta``), or only a shard of it is here.
        """
        known: dict[tuple[Any, ...], TensorFacts] = {}
        tensors: dict[str, TensorFacts] = {}
        for name, tensor in base_state(model).items():
            place = alias_of(tensor)
            if place not in known:
                known[place] = _facts(tensor)
            tensors[name] = known[place]
        return BaseWeights(type(model).__name__, tensors)

    @property
    def hash(self) -> str:
        """One hash for all tensors with their names, shapes and types."""
        digest = hashlib.sha256()
        for name, facts in sorted(self.tensors.items()):
            digest.update(f"{name} {facts.shape} {facts.dtype} {facts.sha256}\n".encode())
        return digest.hexdigest()

    def changed(self, other: BaseWeights) -> list[str]:
        """Names of tensors whose elements differ in another state of the same model.

        Raises:
            CheckpointError: It has not the same tensors.
        """
        problem = self.structure(other)
        if problem:
            raise CheckpointError(problem)
        return [name for name, facts in self.tensors.items() if facts.sha256 != other.tensors[name].sha256]

    def structure(self, other: BaseWeights) -> str:
        """What differs in names, shapes or types from these weights, in words; empty when nothing does."""
        mine, theirs = set(self.tensors), set(other.tensors)
        if mine != theirs:
            missing, extra = sorted(mine - theirs), sorted(theirs - mine)
            parts = [f"lacks {listed(missing)}"] if missing else []
            parts += [f"has besides {listed(extra)}"] if extra else []
            return f"the model {' and '.join(parts)}"
        for name, facts in self.tensors.items():
            found = other.tensors[name]
            if found.shape != facts.shape:
                return f"{name} has shape {found.shape}, expected {facts.shape}"
        kinds = {(f.dtype, other.tensors[n].dtype) for n, f in self.tensors.items()}
        wrong = sorted((a, b) for a, b in kinds if a != b)
        if wrong:
            expected, found_type = wrong[0]
            return (
                f"the weights are {found_type}, expected {expected}: load the model in {expected}, then load this "
                "folder, then convert the model"
            )
        return ""

    def difference(self, other: BaseWeights) -> str:
        """What differs from these weights, in words; empty when nothing does."""
        problem = self.structure(other)
        if problem:
            return problem
        names = self.changed(other)
        return f"{len(names)} of {len(self.tensors)} tensors differ: {listed(names)}" if names else ""

    def to_json(self) -> dict[str, Any]:
        """As a part of a JSON document."""
        return {
            "model": self.model,
            "hash": self.hash,
            "tensors": {
                name: {"sha256": f.sha256, "shape": list(f.shape), "dtype": f.dtype}
                for name, f in self.tensors.items()
            },
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> BaseWeights:
        """Reads ``to_json`` back.

        Raises:
            CheckpointError: The hash of the whole does not fit the tensors.
        """
        tensors = {
            str(name): TensorFacts(str(f["sha256"]), tuple(map(int, f["shape"])), str(f["dtype"]))
            for name, f in document["tensors"].items()
        }
        found = BaseWeights(str(document["model"]), tensors)
        if found.hash != document["hash"]:
            raise CheckpointError(
                "the base model's hash does not fit the hashes of its tensors: the file was changed"
            )
        return found


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` without learned parameters of operators.

    Args:
        model: The model, with or without any attached.
    """
    own = [f"{name}." for name, m in model.named_modules() if isinstance(m, LearnedParameters)]
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not any(name.startswith(prefix) for prefix in own)
    }


def alias_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tied tensors have in common: the same for names that are one tensor, different otherwise."""
    if not tensor.numel() or tensor.is_meta or is_shard(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), str(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.dtype


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name to the first name of the same tensor."""
    first: dict[tuple[Any, ...], str] = {}
    return {name: first.setdefault(alias_of(tensor), name) for name, tensor in state.items()}


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def listed(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _facts(tensor: Tensor) -> TensorFacts:
    if tensor.is_meta:
        raise CheckpointError("the model has tensors on the meta device: load its weights first")
    if is_shard(tensor):
        raise CheckpointError("the model is sharded over processes: gather its weights into one model first")
    elements: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(elements).hexdigest()
    return TensorFacts(digest, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
