"""Distillation end to end: the model with its operators learns from the frozen model with exact attention.

Operators fitted site by site leave errors that add up along the model. A short training of the whole repairs most of
it (RADLADS, arXiv 2505.03005; LoLCATs, arXiv 2410.10254): first towards the teacher's logits, then on the language
model's own loss. Every stage is measured on held-out batches before and after and is kept only if it helps.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastattn_compile.errors import OptionError
from fastattn_compile.integrations.hugging_face.plain import plain_attention
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import plain
from fastattn_compile.reporting.evaluate import Progress, evaluating
from fastattn_compile.reporting.provenance import inputs_hash
from fastattn_compile.retrofitting.attach import detach
from fastattn_compile.retrofitting.base_weights import BaseWeights
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.checkpoint import (
    BASE_ATTRIBUTE,
    PLAN_ATTRIBUTE,
    from_pretrained,
    save_pretrained,
)
from fastattn_compile.retrofitting.processes import World
from fastattn_compile.retrofitting.run_folder import RunFolder
from fastattn_compile.retrofitting.stages import STAGES, Distilled, DistilStage, StageReport
from fastattn_compile.retrofitting.trainer import Trainer
from fastattn_compile.version import __version__


def distil(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    validation: Iterable[Any],
    *,
    stages: Sequence[DistilStage] = STAGES,
    teacher: nn.Module | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int = 50,
    compiler: str = "inductor",
    seed: int = 0,
    progress: Progress | None = None,
) -> Distilled:
    """Trains a model with replaced attention end to end, stage by stage; in one process or under ``torchrun``.

    Under ``torchrun`` every process calls this with the same model, data and folder. The model is sharded by FSDP2
    layer by layer while it trains, each process takes its share of every batch, and the result does not depend on the
    number of processes but for rounding. Every process ends with the whole model.

    The model is only changed by a stage that is over and helped; after an error it is as after the stage before. The
    weights it had are known from then on as ``model.fastattn_base``: a save stores those that differ.

    Args:
        model: With the learned parameters of the plan attached (``fa.attach``); changed in place. Trained without
            dropout.
        plan: What serves which site.
        data: Batches to train on, again from the start when they end: mappings of keywords, tuples of arguments, or
            tensors.
        validation: Batches to judge by, which the training must not hold.
        stages: In order.
        teacher: The model with exact attention to learn from; a copy of ``model`` as it is when ``None``.
        folder: Keeps the run there and resumes it: at most ``checkpoint_every`` steps are lost to a kill.
        checkpoint_every: Steps between checkpoints.
        compiler: What lowers the model: ``inductor``, ``aot_eager`` or ``eager``.
        seed: Seed of the corrections' start.
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        CheckpointError: ``folder`` holds another run.
        PlanError: The plan does not fit the model.
        OptionError: A batch does not fit, the data has ended, or there is nothing to train.
        NumericError: The loss is not finite; the text names stage and step.
        UnsupportedSiteError: A site of the plan cannot be served.
    """
    model = getattr(model, "_orig_mod", model)
    world = World.current(next(model.parameters()).device)
    say: Progress = progress if progress is not None and world.first else _quiet
    batches, held_out = Batches(data), list(validation)
    if not held_out:
        raise OptionError("validation holds no batch: without one nobody knows whether a stage helps")
    base = BaseWeights.of(model)
    if not hasattr(model, BASE_ATTRIBUTE):
        setattr(model, BASE_ATTRIBUTE, base)
    run = RunFolder(
        folder,
        {
            "model": base.hash,
            "plan": inputs_hash(plan.to_json()["sites"]),
            "stages": inputs_hash(plain([dataclasses.asdict(stage) for stage in stages])),
            "data": inputs_hash(batches.peek()),
            "validation": inputs_hash(held_out),
            "seed": str(seed),
            "version": __version__,
        },
        world,
    )
    with evaluating(model), plain_attention(model):  # a routed model would teach what it is to learn
        frozen = _teacher(model if teacher is None else teacher)
        trainer = Trainer(world, frozen, batches, held_out, run, compiler, checkpoint_every, seed, say)
        reports = [StageReport.from_json(line) for line in run.state["stages"]]
        if reports:
            plan = _restore(model, run, len(reports) - 1)
        batches.seek(sum(report.steps for report in reports))
        for index in range(len(reports), len(stages)):
            plan, report = trainer.stage(model, plan, stages[index], index)
            reports.append(report)
            setattr(model, PLAN_ATTRIBUTE, plan)
            kept_in = run.stage_folder(index)
            if kept_in is not None and world.first:
                save_pretrained(model, kept_in, plan=plan, base=base)
            run.finish_stage(dataclasses.asdict(report))
    setattr(model, PLAN_ATTRIBUTE, plan)
    return Distilled(plan, base, tuple(reports))


def _quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def _teacher(model: nn.Module) -> nn.Module:
    with plain_attention(model):
        frozen = copy.deepcopy(model)
    detach(frozen)
    return frozen.eval().requires_grad_(False)


def _restore(model: nn.Module, run: RunFolder, index: int) -> Plan:
    """Brings a fresh base model to the state after a stage of a resumed run."""
    kept_in = run.stage_folder(index)
    assert kept_in is not None
    detach(model)
    from_pretrained(model, kept_in)
    plan: Plan = getattr(model, PLAN_ATTRIBUTE)
    return plan
