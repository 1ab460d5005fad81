"""One process or many: shares of a batch, sums over processes, and a model sharded by FSDP2.

``torchrun`` is recognised by its environment. Every process reads the same batches and takes its share of each, so the
result does not depend on how many there are.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastattn_compile.errors import OptionError
from fastattn_compile.passes.names import site_module
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.evaluate import readable_refusals


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Args:
        rank: Number of this one.
        size: How many there are.
        joined: Whether there is a process group, possibly of one.
    """

    rank: int = 0
    size: int = 1
    joined: bool = False

    @staticmethod
    def current(device: torch.device) -> World:
        """The group this process is in; joins the one that ``torchrun`` has prepared.

        Args:
            device: Where the model is: decides between ``nccl`` and ``gloo``.
        """
        if not dist.is_available():
            return World()
        if not dist.is_initialized() and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not dist.is_initialized():
            return World()
        return World(dist.get_rank(), dist.get_world_size(), True)

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, batch: Any, even: bool = True) -> Any:
        """This process's sequences of a batch.

        Args:
            batch: The same on every process.
            even: Insist on equal shares, which gradients need. Otherwise a batch that has none is everybody's: a mean
                over processes is the same.

        Raises:
            OptionError: The batch cannot be shared out evenly.
        """
        sizes = {x.shape[0] for x in _tensors(batch) if x.dim()}
        if self.size == 1 or not sizes:
            return batch
        count = max(sizes)
        if count % self.size and not even:
            return batch
        if count % self.size:
            raise OptionError(
                f"a batch of {count} sequences cannot be shared by {self.size} processes: "
                "make it a multiple of their number"
            )
        part = slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

        def cut(value: Any) -> Any:
            shared = isinstance(value, Tensor) and value.dim() and value.shape[0] == count
            return value[part] if shared else value

        if isinstance(batch, Mapping):
            return {name: cut(value) for name, value in batch.items()}
        return tuple(map(cut, batch)) if isinstance(batch, (tuple, list)) else cut(batch)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, without gradient."""
        total = value.detach().clone()
        if self.joined:
            dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.joined:
            dist.barrier()


def _tensors(batch: Any) -> list[Tensor]:
    values = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, (tuple, list))
        else [batch]
    )
    return [x for x in values if isinstance(x, Tensor)]


def compiled(module: nn.Module, options: Mapping[str, Any], forward: bool = False) -> Callable[..., Any]:
    """A module compiled by itself: what else is compiled of its class neither helps nor counts against it.

    Args:
        module: What to compile.
        options: Of the backend.
        forward: Compile the body only, so that hooks run outside.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs) if forward else module(*args, **kwargs)

    # Dynamo caches, and limits, by code object.
    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    lowered = torch.compile(own, backend="fastattn", options=dict(options))

    def served(*args: Any, **kwargs: Any) -> Any:
        with readable_refusals():
            return lowered(*args, **kwargs)

    return served


def blocks_of(model: nn.Module, plan: Plan) -> list[str]:
    """Paths of the modules to shard and compile one by one: the repeated layers that hold the sites of a plan.

    A layer is an element of the outermost ``nn.ModuleList`` or ``nn.Sequential`` around a site; a site outside of any
    is in its own module.
    """
    found = []
    for site in plan.sites:
        path = site_module(site)
        steps = path.split(".")
        prefixes = [".".join(steps[:count]) for count in range(len(steps))]
        block = path
        for prefix in prefixes:
            if isinstance(model.get_submodule(prefix), (nn.ModuleList, nn.Sequential)):
                block = (
                    ".".join(steps[: len(prefix.split(".")) + (1 if prefix else 0)]) if prefix else steps[0]
                )
                break
        if block not in found:
            found.append(block)
    return found


def shard(model: nn.Module, plan: Plan, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """Shards a model over the processes with FSDP2, layer by layer, and compiles each layer with its part of the plan.

    Args:
        model: Changed in place.
        plan: Its sites say which layers there are.
        options: Of the backend; ``None`` leaves the layers uncompiled, with the attention they have.

    Returns:
        The model to call.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for path in blocks_of(model, plan):
        block = model.get_submodule(path)
        if options is not None:
            body = compiled(block, {**options, "plan": plan, "within": path}, forward=True)
            block.forward = body  # hooks of the sharding run around it
        fully_shard(block, mesh=mesh)
    # Also the root is sharded again after every forward pass, or its parameters would be whole ones between passes, and
    # an optimizer made then would hold those.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding: every process gets all of it, so all must ask."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach()
