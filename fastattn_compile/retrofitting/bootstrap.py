"""Two-level bootstrapped training of tree attention: group by group from the output, and from low trees to
high ones.

Tree attention that is trained from scratch stays at a high loss. Algorithm 1 of Treeformer (arXiv 2208.09015;
specification section 9) therefore starts from a trained softmax model and converts the attention of one group
of layers at a time; within a group the trees grow in stages, each of which keeps the decisions learned so
far. The specification reconstructs the two axes; order, widths, heights and step counts are settings here.

Example:
    ::

        schedule = BootstrapSchedule(sites, heights=(2, 4, 6), width=3, steps=2000)
        bootstrap = Bootstrap(model, schedule, batch)
        for step, batch in enumerate(batches):
            if bootstrap.begin_step(step):
                bootstrap.update_optimizer(optimizer)
            rate = bootstrap.schedule.learning_rate_factor(step)
            with bootstrap.watching() as seen:
                loss = objective(bootstrap(batch))
            loss = loss + bootstrap.regulariser(seen, balance=0.01)
            ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import PlanError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator, SiteSpec
from fastattn_compile.operators.observe import observing
from fastattn_compile.operators.treeformer import balance_loss, mass_loss
from fastattn_compile.operators.treeformer.common import TreeOperator
from fastattn_compile.plans import Plan, PlannedSite
from fastattn_compile.retrofitting.attach import LearnedParameters, attach, detach
from fastattn_compile.retrofitting.samples import site_samples
from fastattn_compile.scanning import scan

ORDERS = ("output_first", "input_first")


@dataclass(frozen=True)
class Stage:
    """One stage of a schedule.

    Args:
        index: Its number, from 0.
        first_step: Step at which it begins.
        steps: How many steps it lasts; ``None`` is to the end of training.
        group: Sites that are converted, or whose trees grow, in this stage. Empty in the fine-tuning at the
            end.
        heights: Height of the trees at every site converted so far.
        operator: What serves the converted sites.
    """

    index: int
    first_step: int
    steps: int | None
    group: tuple[str, ...]
    heights: Mapping[str, int]
    operator: str


@dataclass(frozen=True)
class BootstrapSchedule:
    """Which sites have trees of which height at which step.

    Args:
        sites: Names of the sites, as ``fa.scan`` prints them, from the model's input to its output.
        heights: Heights that the trees of a group go through, rising. One height is the one-level variant.
        betas: Steepness of the decisions' sigmoids at each of ``heights``, commonly rising from 1 to 10; empty leaves it to
            ``options``. Sites whose trees are grown keep the last.
        width: Sites of a group.
        steps: Steps of a stage.
        operator: ``"tc_attention"`` or ``"tf_attention"``.
        options: Further fields of the operator's configuration; not ``height``.
        order: ``"output_first"`` converts the last group first; ``"input_first"`` the first.
        finish_with: Operator of the fine-tuning at the end, which takes over the planes; ``""`` keeps
            ``operator``. Leaf attention after coarse attention is one remedy for the gradient that its
            queries' planes lack.
        finish_options: Fields of its configuration; not ``height``.
        freeze_planes: Planes are not trained in the fine-tuning at the end.
        unit_planes: Planes are brought back to length 1 before every step, their offsets with them. Decisions stay as
            they are, and only ``beta`` says how steep they are.
        warmup: Steps in which the learning rate rises again at the start of each stage.

    Raises:
        ValueError: A value is out of range.
    """

    sites: Sequence[str]
    heights: Sequence[int] = (2, 4, 6)
    betas: Sequence[float] = ()
    width: int = 3
    steps: int = 1000
    operator: str = "tc_attention"
    options: Mapping[str, Any] = field(default_factory=dict)
    order: str = "output_first"
    finish_with: str = ""
    finish_options: Mapping[str, Any] = field(default_factory=dict)
    freeze_planes: bool = False
    unit_planes: bool = False
    warmup: int = 100

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites must be different names, at least one; got {list(self.sites)}")
        rising = all(a < b for a, b in zip(self.heights, self.heights[1:]))
        if not self.heights or not rising or self.heights[0] < 1:
            raise ValueError(
                f"heights must be positive and rise, for example (2, 4, 6); got {list(self.heights)}"
            )
        if self.betas and len(self.betas) != len(self.heights):
            raise ValueError(
                f"betas must be one for each of heights ({list(self.heights)}), or none; got {list(self.betas)}"
            )
        for name, least in (("width", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; orders: {', '.join(ORDERS)}")
        for name in (self.operator, self.finish_with or self.operator):
            if name not in ("tc_attention", "tf_attention"):
                raise ValueError(f"bootstrapping trains tc_attention or tf_attention, got {name!r}")
        for name in ("options", "finish_options"):
            if self.betas and "beta" in getattr(self, name):
                raise ValueError(
                    f"{name} must not hold 'beta': the schedule sets it (betas={list(self.betas)})"
                )
            if "height" in getattr(self, name):
                raise ValueError(
                    f"{name} must not hold 'height': the schedule sets it (heights={list(self.heights)})"
                )

    def stages(self) -> list[Stage]:
        """All stages in order; the last one is the fine-tuning, without end."""
        groups = [tuple(self.sites[at : at + self.width]) for at in range(0, len(self.sites), self.width)]
        if self.order == "output_first":
            # Whole groups are counted from the output: a smaller one, if any, stands at the input.
            reversed_sites = list(reversed(self.sites))
            cuts = range(0, len(reversed_sites), self.width)
            groups = [tuple(reversed(reversed_sites[at : at + self.width])) for at in cuts]
        made: list[Stage] = []
        reached: dict[str, int] = {}
        for group in groups:
            for height in self.heights:
                reached = {**reached, **dict.fromkeys(group, height)}
                made.append(
                    Stage(len(made), len(made) * self.steps, self.steps, group, reached, self.operator)
                )
        last = self.finish_with or self.operator
        return [*made, Stage(len(made), len(made) * self.steps, None, (), reached, last)]

    def stage_at(self, step: int) -> Stage:
        """The stage of a step.

        Raises:
            ValueError: The step is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        stages = self.stages()
        return stages[min(step // self.steps, len(stages) - 1)]

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the learning rate: rises to 1 in the first ``warmup`` steps of every stage."""
        since = step - self.stage_at(step).first_step
        return min(1.0, (since + 1) / self.warmup) if self.warmup else 1.0

    def plan(self, stage: Stage) -> Plan:
        """The plan of a stage: trees at the sites converted so far, exact attention elsewhere."""
        options = dict(self.options)
        if stage.steps is None and self.finish_with:
            options = dict(self.finish_options)
        reason = f"bootstrapping, stage {stage.index}"
        steepness: list[dict[str, float]] = [{"beta": float(beta)} for beta in self.betas] or [{}] * len(
            self.heights
        )
        of_height = dict(zip(self.heights, steepness))
        return Plan(
            {
                name: PlannedSite(stage.operator, {**options, "height": height, **of_height[height]}, reason)
                for name, height in stage.heights.items()
            }
        )


class Bootstrap:
    """Carries a model through a schedule: converts sites, grows trees, keeps what was learned. Called as the
    model is.

    Beginning a stage changes the set of learned parameters and compiles the model anew; it discards what else
    this process has compiled (``torch.compiler.reset``).

    Args:
        model: A trained softmax model; changed in place.
        schedule: The schedule.
        *args: Arguments of one call of the model, to find its sites and, if ``calibrate``, to start new
            planes from.
        calibrate: New planes split the keys of that call; otherwise they are random.
        compiler: ``"inductor"``, ``"aot_eager"`` or ``"eager"``, as in the backend's options.
        **kwargs: Keyword arguments of the call.

    Raises:
        PlanError: The schedule names a site that the model does not have, or that its operator cannot serve.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: BootstrapSchedule,
        *args: Any,
        calibrate: bool = True,
        compiler: str = "inductor",
        **kwargs: Any,
    ) -> None:
        self.model, self.schedule, self.stage = model, schedule, None
        self.bundles: dict[str, LearnedParameters] = {}
        self._args, self._kwargs, self._calibrate, self._compiler = args, kwargs, calibrate, compiler
        self._call: Any = model
        found = scan(model, *args, **kwargs).softmaxes
        self._specs = {line.name: line.site.spec for line in found if line.site is not None}
        self._check()

    stage: Stage | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model with the attention of the present stage."""
        return self._call(*args, **kwargs)

    def begin_step(self, step: int) -> bool:
        """Brings the model to the stage of a step. Call it before every step, with any first step: training may
        resume.

        Args:
            step: Number of the step, from 0.

        Returns:
            Whether a stage began: the optimizer then has to be told (``update_optimizer``).
        """
        stage = self.schedule.stage_at(step)
        begins = self.stage is None or stage.index != self.stage.index
        if begins:
            self._begin(stage)
        if self.schedule.unit_planes:
            for bundle in self.bundles.values():
                _to_unit_length(dict(bundle.named_parameters()))
        return begins

    def _begin(self, stage: Stage) -> None:
        learned = {
            site: {name: value.detach().clone() for name, value in bundle.named_parameters()}
            for site, bundle in self.bundles.items()
        }
        growing = [name for name, height in stage.heights.items() if self._height(name) != height]
        detach(self.model)
        samples = {}
        if self._calibrate and growing:
            samples = site_samples(self.model, growing, *self._args, **self._kwargs)
        plan = self.schedule.plan(stage)
        self.bundles = attach(self.model, plan, *self._args, calibrate=False, **self._kwargs)
        for site, bundle in self.bundles.items():
            self._fill(bundle, self._specs[site], learned.get(site, {}), samples.get(site))
            if stage.steps is None and self.schedule.freeze_planes:
                for name, parameter in bundle.named_parameters():
                    parameter.requires_grad_(name == "level_weights")
        self.stage = stage
        torch.compiler.reset()
        self._call = self._compiled({"plan": plan, "strict": True, "compiler": self._compiler, "quiet": True})

    def update_optimizer(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Takes the parameters of the last stage out of an optimizer and adds those of this one as a group.

        Args:
            optimizer: The optimizer; it keeps the state of all other parameters.
            **options: Of the new group, for example ``lr``.
        """
        alive = {id(p) for p in self.model.parameters()}
        for group in optimizer.param_groups:
            for gone in [p for p in group["params"] if id(p) not in alive]:
                optimizer.state.pop(gone, None)
            group["params"] = [p for p in group["params"] if id(p) in alive]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fresh = [
            p for b in self.bundles.values() for p in b.parameters() if id(p) not in known and p.requires_grad
        ]
        if fresh:
            optimizer.add_param_group({"params": fresh, **options})

    @contextmanager
    def watching(self) -> Iterator[dict[str, AttentionInputs]]:
        """Collects the tensors of the converted sites while the model runs inside the block, for
        ``regulariser``.
        """
        seen: dict[str, AttentionInputs] = {}

        def observe(site: str, _: Operator, inputs: AttentionInputs, __: AttentionOutput) -> None:
            if site in self.bundles:
                seen[site] = inputs

        with observing(observe):
            yield seen

    def regulariser(
        self, seen: Mapping[str, AttentionInputs], balance: float = 0.01, mass: float = 0.0, rows: int = 64
    ) -> Tensor:
        """Losses of the planes beside the model's own, on the tensors of a forward pass; they train the
        planes only.

        Args:
            seen: From ``watching``.
            balance: Weight of ``balance_loss``.
            mass: Weight of ``mass_loss``.
            rows: Query rows of a site that ``mass_loss`` samples, evenly spaced.

        Returns:
            A scalar, the sum over sites.
        """
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for site, inputs in seen.items():
            bundle = self.bundles[site]
            config, planes = bundle.operator.config, tuple(bundle.tensors())
            if balance:
                total = total + balance * balance_loss(config, inputs, planes)
            if mass:
                count = inputs.query.shape[2]
                chosen = torch.linspace(0, count - 1, min(rows, count), device=inputs.query.device).long()
                total = total + mass * mass_loss(config, inputs, planes, chosen)
        return total

    def _check(self) -> None:
        missing = sorted(set(self.schedule.sites) - set(self._specs))
        if missing:
            raise PlanError(
                f"the schedule names sites the model does not have: {', '.join(missing)}; "
                f"it has {sorted(self._specs)}"
            )
        for stage in self.schedule.stages():
            for name, site in self.schedule.plan(stage).sites.items():
                support = site.build().supports(self._specs[name])
                if not support:
                    raise PlanError(f"{site.operator} cannot serve site {name!r}: {support.reason}")

    def _height(self, site: str) -> int:
        return 0 if self.stage is None else self.stage.heights.get(site, 0)

    def _compiled(self, options: dict[str, Any]) -> Any:
        return torch.compile(self.model, backend="fastattn", options=options)

    def _fill(
        self,
        bundle: LearnedParameters,
        spec: SiteSpec,
        learned: dict[str, Tensor],
        sample: AttentionInputs | None,
    ) -> None:
        operator = bundle.operator
        if not isinstance(operator, TreeOperator):
            raise PlanError(f"site {bundle.site!r} is served by {operator.name}, which has no trees")
        values = operator.grown_parameters(spec, learned, sample)
        with torch.no_grad():
            for name, parameter in bundle.named_parameters():
                parameter.copy_(values[name])


@torch.no_grad()
def _to_unit_length(learned: Mapping[str, Tensor]) -> None:
    """Scales planes and their offsets in place; planes of length 0 stay."""
    for side in ("key", "query"):
        if f"{side}_planes" in learned:
            planes, offsets = learned[f"{side}_planes"], learned[f"{side}_offsets"]
            length = planes.norm(dim=-1)
            length = torch.where(length > 0, length, 1.0)
            planes.div_(length[..., None])
            offsets.div_(length)
