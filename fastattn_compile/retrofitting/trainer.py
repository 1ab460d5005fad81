"""The training inside a distillation: a copy of the model learns, is measured, and hands over what it learned."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import NumericError, OptionError, PlanError, UnsupportedSiteError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.observe import observing
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.evaluate import Progress
from fastattn_compile.retrofitting.attach import LearnedParameters, attach, detach, place
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.bootstrap import Bootstrap, BootstrapSchedule
from fastattn_compile.retrofitting.lora import adapt, merge
from fastattn_compile.retrofitting.objectives import (
    HIDDEN,
    KL,
    LANGUAGE_MODEL,
    distance,
    language_model_loss,
    main_output,
    real_tokens,
    split_batch,
)
from fastattn_compile.retrofitting.processes import World, compiled, shard, whole
from fastattn_compile.retrofitting.run_folder import RunFolder, trained_tensors
from fastattn_compile.retrofitting.stages import FULL, LORA, DistilStage, StageReport


class Trainer:
    """What the stages of one distillation share.

    Args:
        world: The processes.
        teacher: The frozen model with exact attention.
        batches: To train on.
        validation: To judge by.
        run: Keeps what is reached.
        compiler: What lowers the student.
        checkpoint_every: Steps between checkpoints.
        seed: Of the corrections' start.
        say: Told of progress.
    """

    def __init__(
        self,
        world: World,
        teacher: nn.Module,
        batches: Batches,
        validation: list[Any],
        run: RunFolder,
        compiler: str,
        checkpoint_every: int,
        seed: int,
        say: Progress,
    ) -> None:
        self.world, self.teacher, self.batches, self.validation, self.run = (
            world, teacher, batches, validation, run,
        )  # fmt: skip
        self.compiler, self.checkpoint_every, self.seed, self.say = compiler, checkpoint_every, seed, say
        self.device = next(teacher.parameters()).device
        self._seated = False

    def stage(self, model: nn.Module, plan: Plan, stage: DistilStage, index: int) -> tuple[Plan, StageReport]:
        """Trains a copy of the model and brings over what it learned if that helps.

        Args:
            model: Changed only at the end.
            plan: What serves its sites.
            stage: What to do.
            index: Number of the stage.

        Returns:
            The plan after the stage, and what the stage did.
        """
        begun = time.monotonic()
        start = model
        if stage.trees is not None:
            start, plan = self._planted(model, plan, stage.trees, stage)
        self._seat_teacher(plan)
        student = copy.deepcopy(start)
        _choose_trained(student, plan, stage, self.seed + index)
        self.say(f"{stage.name}: measure before", 0, 0)
        if stage.trees is None:
            call = self._prepare(student, plan)
            before = self._measure(call, stage.objective, plan)  # corrections start as none
            self._train(student, call, stage)
        else:
            before = self._measure(self._prepare(start, plan), stage.objective, plan)
            self._grow(student, stage, stage.trees)
            call = self._prepare(student, plan)
        self.say(f"{stage.name}: measure after", 0, 0)
        after = self._measure(call, stage.objective, plan)
        for when, found in (("before", before), ("after", after)):
            if not all(map(math.isfinite, found.values())):
                raise NumericError(
                    f"stage {stage.name!r}: NaN or Inf on the held-out batches {when} the training: {found}"
                )
        trained = {name: whole(p) for name, p in trained_tensors(student).items()}
        kept = after[stage.objective] < before[stage.objective]
        if start is not model:
            _adopt(model, start)
        if kept:
            _bring_over(model, trained, stage.scale)
        report = StageReport(
            stage.name, stage.objective, stage.train, stage.steps, before[stage.objective],
            after[stage.objective], kept, before, after, time.monotonic() - begun,
        )  # fmt: skip
        return plan, report

    def _seat_teacher(self, plan: Plan) -> None:
        """Shards the teacher, once, by the layers of the first plan."""
        if self.world.joined and not self._seated:
            shard(self.teacher, plan, None)
        self._seated = True

    def _prepare(self, student: nn.Module, plan: Plan) -> Callable[..., Any]:
        options = {"strict": True, "compiler": self.compiler, "quiet": True}
        if self.world.joined:
            return shard(student, plan, options)
        return compiled(student, {**options, "plan": plan})

    def _train(self, student: nn.Module, call: Callable[..., Any], stage: DistilStage) -> None:
        optimizer = _optimizer(student, stage)
        self.run.load_step(student, optimizer)
        done = self.run.state["step"]
        self.batches.seek_ahead(done)
        for step in range(done, stage.steps):
            self._step(student, call, stage, step, optimizer, None)

    def _grow(self, student: nn.Module, stage: DistilStage, trees: BootstrapSchedule) -> None:
        """As ``_train``, with trees that grow: what there is to train changes from stage to stage of the schedule."""
        arguments, keywords, _ = split_batch(_moved(self.batches.peek(), self.device))
        bootstrap = Bootstrap(student, trees, *arguments, compiler=self.compiler, **keywords)
        done = self.run.state["step"]
        if done:
            bootstrap.begin_step(done - 1)
        optimizer = _optimizer(student, stage)
        self.run.load_step(student, optimizer)
        self.batches.seek_ahead(done)
        for step in range(done, stage.steps):
            if bootstrap.begin_step(step):
                bootstrap.update_optimizer(optimizer)
            self._step(student, bootstrap, stage, step, optimizer, bootstrap)

    def _step(
        self,
        student: nn.Module,
        call: Callable[..., Any],
        stage: DistilStage,
        step: int,
        optimizer: torch.optim.Optimizer,
        bootstrap: Bootstrap | None,
    ) -> None:
        batch = _moved(self.world.share(self.batches.next()), self.device)
        if bootstrap is None:
            total, count = self._loss(call, batch, stage.objective, stage.temperature)
            extra: Tensor | float = 0.0
        else:
            with bootstrap.watching() as seen:
                total, count = self._loss(call, batch, stage.objective, stage.temperature)
            extra = bootstrap.regulariser(seen, balance=stage.balance)
        # FSDP averages gradients over processes: the sum over all tokens by the number of all tokens is the mean.
        tokens = self.world.sum(count.double()).clamp(min=1)
        loss = total * (self.world.size / tokens) + extra
        if not bool(torch.isfinite(self.world.sum(loss.double()))):
            raise NumericError(
                f"stage {stage.name!r}, step {step}: the loss is NaN or Inf; lower learning_rate"
            )
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, stage.clip)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % self.checkpoint_every == 0 and step + 1 < stage.steps:
            self.run.save_step(step + 1, student, optimizer)
        self.say(stage.name, step + 1, stage.steps)

    def _loss(
        self, call: Callable[..., Any], batch: Any, objective: str, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        arguments, keywords, labels = split_batch(batch)
        output = main_output(call(*arguments, **keywords), objective)
        real = real_tokens(keywords, output)
        if objective == LANGUAGE_MODEL:
            return language_model_loss(output, labels, real)
        with torch.no_grad():
            wanted = main_output(self.teacher(*arguments, **keywords), objective)
        return distance(objective, output, wanted, real, temperature)

    def _measure(self, call: Callable[..., Any], objective: str, plan: Plan) -> dict[str, float]:
        """Means over the held-out batches: of the objective, and of the other one where logits give it.

        Raises:
            UnsupportedSiteError: A site of the plan did not run: what is measured would not be the plan.
        """
        served: set[str] = set()

        def observe(site: str, operator: Operator, _: AttentionInputs, __: AttentionOutput) -> None:
            if operator.name != "exact":
                served.add(site)

        sums: dict[str, Tensor] = {}
        with torch.no_grad(), observing(observe):
            for batch in self.validation:
                arguments, keywords, labels = split_batch(
                    _moved(self.world.share(batch, even=False), self.device)
                )
                output = main_output(call(*arguments, **keywords), objective)
                wanted = main_output(self.teacher(*arguments, **keywords), objective)
                real = real_tokens(keywords, output)
                close = HIDDEN if objective == HIDDEN else KL
                found = {close: distance(close, output, wanted, real)}
                if objective == LANGUAGE_MODEL or (objective == KL and _labelled(labels, output)):
                    found[LANGUAGE_MODEL] = language_model_loss(output, labels, real)
                for name, pair in found.items():
                    sums[name] = sums.get(name, 0) + torch.stack([x.double() for x in pair])
        missing = {s for s, planned in plan.sites.items() if planned.operator != "exact"} - served
        if missing:
            raise UnsupportedSiteError(
                f"sites of the plan did not run, so their operators cannot be trained: {', '.join(sorted(missing))}"
            )
        means = {name: self.world.sum(total) for name, total in sums.items()}
        return {name: float(total[0] / total[1].clamp(min=1)) for name, total in means.items()}

    def _planted(
        self, model: nn.Module, plan: Plan, trees: BootstrapSchedule, stage: DistilStage
    ) -> tuple[nn.Module, Plan]:
        """A copy with the trees that a schedule ends with, started from a batch: what growing them must beat."""
        if self.world.size > 1:
            raise OptionError(f"stage {stage.name!r}: trees grow in one process; run without torchrun")
        last = trees.stages()[-1]
        final = trees.plan(last)
        others = [
            s for s, planned in plan.sites.items() if planned.operator != "exact" and s not in final.sites
        ]
        if others:
            raise PlanError(
                f"stage {stage.name!r} grows trees from exact attention, but the plan serves {', '.join(others)} "
                "otherwise: make it the first stage, on a plan without them"
            )
        if stage.steps <= last.first_step:
            raise OptionError(
                f"stage {stage.name!r}: the trees are full-grown after {last.first_step} steps, so steps must be more; "
                f"got {stage.steps}"
            )
        start = copy.deepcopy(model)
        detach(start)
        arguments, keywords, _ = split_batch(_moved(self.batches.peek(), self.device))
        attach(start, final, *arguments, **keywords)
        return start, final


def _adopt(model: nn.Module, other: nn.Module) -> None:
    """Gives a model the learned parameters of a copy in place of its own."""
    detach(model)
    for bundle in [m for m in other.modules() if isinstance(m, LearnedParameters)]:
        place(model, bundle.site, bundle.operator, {n: p.detach() for n, p in bundle.named_parameters()})


def _choose_trained(student: nn.Module, plan: Plan, stage: DistilStage, seed: int) -> None:
    replaced = [site for site, planned in plan.sites.items() if planned.operator != "exact"]
    student.requires_grad_(stage.train == FULL)
    for module in student.modules():
        if isinstance(module, LearnedParameters):
            module.requires_grad_(True)
    if stage.train == LORA:
        adapt(student, replaced, stage.rank, stage.scale, seed)
    if not any(p.requires_grad for p in student.parameters()):
        names = ", ".join(sorted({plan.sites[site].operator for site in replaced})) or "exact"
        raise OptionError(
            f"stage {stage.name!r} trains nothing: the operators of the plan ({names}) have no learned parameters "
            'attached; train "lora" or "full"'
        )


def _optimizer(student: nn.Module, stage: DistilStage) -> torch.optim.AdamW:
    trained = [p for p in student.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=stage.learning_rate, weight_decay=0.0)


def _bring_over(model: nn.Module, trained: Mapping[str, Tensor], scale: float) -> None:
    merged = merge(model, trained, scale)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            if name not in merged:
                own[name].copy_(value)


def _labelled(labels: Tensor | None, output: Tensor) -> bool:
    return output.dim() == 3 and labels is not None and tuple(labels.shape) == tuple(output.shape[:2])


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
