"""What a distillation is asked to do, stage by stage, and what each stage did."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastattn_compile.errors import OptionError
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import plain
from fastattn_compile.retrofitting.base_weights import BaseWeights
from fastattn_compile.retrofitting.bootstrap import BootstrapSchedule
from fastattn_compile.retrofitting.objectives import KL, LANGUAGE_MODEL, OBJECTIVES

SCHEMA = "fastattn.distil/1"
OPERATORS, LORA, FULL = "operators", "lora", "full"
TRAINED = (OPERATORS, LORA, FULL)


@dataclass(frozen=True)
class DistilStage:
    """One stage of a distillation.

    Args:
        name: Its name in the report.
        objective: ``"kl"``: KL to the teacher's predictions; ``"language_model"``: loss of the next token; ``"hidden"``:
            distance of the last hidden states, for models without logits.
        steps: Batches to train on.
        train: ``"operators"``: their learned parameters only; ``"lora"``: these, and low-rank corrections of the
            projections in the replaced sites' modules, merged at the end; ``"full"``: every weight.
        learning_rate: At its highest; AdamW without weight decay, a linear rise, then a cosine to a tenth.
        rank: Of the corrections.
        scale: Factor on the corrections.
        temperature: Divides the logits in ``"kl"``.
        warmup: Steps of the rise.
        clip: Largest norm of the gradient.
        trees: Convert sites to tree attention step by step (``BootstrapSchedule``), in one process, from a plan that
            keeps them exact. What the stage must beat is the same trees attached at once and not trained.
        balance: Weight of the loss that keeps the trees' leaves even.

    Raises:
        OptionError: A value is out of range.
    """

    name: str
    objective: str = KL
    steps: int = 200
    train: str = LORA
    learning_rate: float = 1e-4
    rank: int = 8
    scale: float = 2.0
    temperature: float = 1.0
    warmup: int = 20
    clip: float = 1.0
    trees: BootstrapSchedule | None = None
    balance: float = 0.01

    def __post_init__(self) -> None:
        for name, value, known in (("objective", self.objective, OBJECTIVES), ("train", self.train, TRAINED)):
            if value not in known:
                raise OptionError(
                    f"stage {self.name!r}: {name} must be one of {', '.join(known)}, got {value!r}"
                )
        for name, least in (("steps", 1), ("rank", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise OptionError(
                    f"stage {self.name!r}: {name} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise OptionError(f"stage {self.name!r}: {name} must be positive, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.trees is not None:
            return self.learning_rate * self.trees.learning_rate_factor(step)
        return self.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))


STAGES = (
    DistilStage("logits", KL, steps=200),
    DistilStage("language model", LANGUAGE_MODEL, steps=100, learning_rate=3e-5),
)


@dataclass(frozen=True)
class StageReport:
    """What a stage did, measured on the held-out batches.

    Args:
        name: Of the stage.
        objective: What it minimised.
        train: What it trained.
        steps: Batches trained on.
        before: The objective before.
        after: The objective after.
        kept: Whether the model keeps what it learned: only if the objective fell.
        metrics_before: All metrics the model has: ``kl``, ``language_model``, ``hidden``.
        metrics_after: The same after training, whether kept or not.
        seconds: Time of the stage.
    """

    name: str
    objective: str
    train: str
    steps: int
    before: float
    after: float
    kept: bool
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """By how much the objective fell; negative when it rose."""
        return self.before - self.after

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> StageReport:
        """Reads a line back; keys of later writers are ignored."""
        names = {f.name for f in dataclasses.fields(StageReport)}
        return StageReport(**{name: value for name, value in line.items() if name in names})


@dataclass(frozen=True)
class Distilled:
    """The result of a distillation; the model itself was changed in place.

    Args:
        plan: What serves the sites now.
        base: The weights before, for ``fa.save_pretrained(base=...)``.
        stages: One report a stage.
    """

    plan: Plan
    base: BaseWeights
    stages: tuple[StageReport, ...]

    def to_json(self) -> dict[str, Any]:
        """The stages as a JSON document, schema ``fastattn.distil/1``."""
        lines = [{**dataclasses.asdict(s), "gain": s.gain} for s in self.stages]
        return {"schema": SCHEMA, "stages": plain(lines)}
