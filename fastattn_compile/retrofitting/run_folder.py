"""A distillation that can be killed: what is done, and what the stage in progress has reached.

    state.json          stages done, step of the present one, fingerprint
    stage-<k>/          the model after stage k, as ``fa.save_pretrained`` writes it
    step-<s>/           trained parameters and optimizer of the present stage (torch.distributed.checkpoint, safetensors)

A new step folder is complete before ``state.json`` names it, so a kill loses what came after the last checkpoint and no
more. Step folders may be read by another number of processes than wrote them.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import CheckpointError
from fastattn_compile.files import write_json
from fastattn_compile.retrofitting.attach import LearnedParameters
from fastattn_compile.retrofitting.processes import World

SCHEMA = "fastattn.distil-run/1"
STATE = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class RunFolder:
    """The folder of one distillation.

    Args:
        path: The folder; ``None`` keeps nothing.
        fingerprint: What the result depends on, by name.
        world: The processes; the first writes.

    Raises:
        CheckpointError: The folder belongs to another run; the text says what differs.
    """

    def __init__(self, path: str | Path | None, fingerprint: Mapping[str, str], world: World) -> None:
        self.path = Path(path) if path is not None else None
        self.world, self.fingerprint = world, dict(fingerprint)
        self.state: dict[str, Any] = {"stages": [], "step": 0, "checkpoint": None}
        if self.path is not None and (self.path / STATE).is_file():
            self.state = self._read(self.path)
        world.wait()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            document = json.loads((path / STATE).read_text(encoding="utf-8"))
            found, stages, step = document["fingerprint"], document["stages"], int(document["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path / STATE} is damaged ({error}); delete the folder to start over"
            ) from error
        differing = sorted(
            name for name in {*found, *self.fingerprint} if found.get(name) != self.fingerprint.get(name)
        )
        if differing:
            raise CheckpointError(
                f"{path} holds a run with another {', '.join(differing)}: resume it as it was begun, or name another folder"
            )
        return {"stages": list(stages), "step": step, "checkpoint": document.get("checkpoint")}

    def write(self) -> None:
        """Writes ``state.json``, then deletes step folders that it no longer names."""
        if self.path is None:
            return
        self.world.wait()
        if self.world.first:
            write_json(self.path / STATE, {"schema": SCHEMA, "fingerprint": self.fingerprint, **self.state})
            for old in self.path.glob("step-*"):
                if old.name != self.state["checkpoint"]:
                    shutil.rmtree(old, ignore_errors=True)
        self.world.wait()

    def save_step(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keeps what the present stage has reached.

        Args:
            step: Steps done.
            model: The model in training, sharded or not.
            optimizer: AdamW.
        """
        if self.path is None:
            return
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        name = f"step-{len(self.state['stages'])}-{step}"
        self.world.wait()
        if self.world.first:
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).mkdir(parents=True)
        self.world.wait()
        writer = dcp.HuggingFaceStorageWriter(str(self.path / name), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            dcp.save(_tensors(model, optimizer), storage_writer=writer, no_dist=not self.world.joined)
        self.state.update(step=step, checkpoint=name)
        self.write()

    def load_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Brings model and optimizer to the last checkpoint of the present stage.

        Raises:
            CheckpointError: The checkpoint is incomplete or damaged.
        """
        if self.path is None or self.state["checkpoint"] is None:
            return
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        folder = self.path / self.state["checkpoint"]
        tensors = _tensors(model, optimizer, self.state["step"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                reader = dcp.HuggingFaceStorageReader(str(folder))
                dcp.load(tensors, storage_reader=reader, no_dist=not self.world.joined)
        except (Exception, dcp.api.CheckpointException) as error:  # readers of damaged files raise anything
            said = " ".join(str(error).split())[-300:]
            raise CheckpointError(
                f"{folder} is incomplete or damaged ({type(error).__name__}: {said}); "
                "delete the run folder to start over"
            ) from error

    def finish_stage(self, document: Mapping[str, Any]) -> None:
        """Notes that the present stage is done; the model after it has been saved in ``stage_folder``."""
        self.state["stages"].append(dict(document))
        self.state.update(step=0, checkpoint=None)
        self.write()

    def stage_folder(self, index: int) -> Path | None:
        """Where the model after a stage is kept."""
        return None if self.path is None else self.path / f"stage-{index}"


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training may have changed: parameters with gradients, and all learned parameters of operators."""
    learned = {id(p) for m in model.modules() if isinstance(m, LearnedParameters) for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad or id(p) in learned}


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, made_at: int | None = None
) -> dict[str, Tensor]:
    """Trained parameters and their moments, by name; with ``made_at`` moments are made where there are none yet."""
    found: dict[str, Tensor] = {}
    for name, parameter in trained_tensors(model).items():
        found[f"parameter.{name}"] = parameter.detach()
        if not parameter.requires_grad:
            continue
        if made_at is not None:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(made_at)),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        state = optimizer.state.get(parameter, {})
        found.update({f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state})
    return found
