"""``fa.fit``: the learned parameters of a plan's operators, site by site, towards exact attention.

All sites are fitted in one pass over the data: the model runs with exact attention, so that every site sees the tensors
the teacher gives it, and at each site a few steps are made on them before the pass goes on. Nothing but the tensors of the
present site is held. (RADLADS, arXiv 2505.03005, stage 1; LoLCATs, arXiv 2410.10254, attention transfer.)
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import NumericError, OptionError, PlanError
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.evaluate import Progress, evaluating
from fastattn_compile.reporting.provenance import inputs_hash, weights_hash
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.fit_files import FitFolder
from fastattn_compile.retrofitting.matching import Weights, matching_loss, output_of, squared_error
from fastattn_compile.retrofitting.replay import Replay
from fastattn_compile.version import __version__


@dataclass(frozen=True)
class FitSettings:
    """How parameters are fitted.

    Args:
        passes: Batches the model is run on.
        steps: Steps at a site in one pass.
        learning_rate: Of Adam, relative to the size of a parameter's values; falls as a cosine to a tenth.
        weights: Weights of the parts of the loss.
        seed: Of sampled rows and of steps without near field.

    Raises:
        OptionError: A value is out of range.
    """

    passes: int = 16
    steps: int = 4
    learning_rate: float = 0.03
    weights: Weights = field(default_factory=Weights)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passes", "steps", "learning_rate"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be above 0, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        share = step / max(1, self.passes * self.steps - 1)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


@dataclass(frozen=True)
class SiteFit:
    """What fitting did at a site.

    Args:
        site: Name of the site.
        operator: What serves it.
        before: Relative squared error of the output on held-out data with the parameters that the operator started with.
        after: The same with the fitted ones.
        kept: Whether the fitted ones are kept: only where they are better.
    """

    site: str
    operator: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Fit:
    """Fitted parameters.

    Args:
        parameters: Site and token of the operator to its parameters, in order.
        names: Site to the names of its parameters.
        sites: What fitting did.
    """

    parameters: Mapping[tuple[str, str], tuple[Tensor, ...]]
    names: Mapping[str, tuple[str, ...]]
    sites: tuple[SiteFit, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The errors before and after, as plain values."""
        return [dataclasses.asdict(site) for site in self.sites]


def fit(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    settings: FitSettings | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fits the learned parameters of a plan's operators; the model is left as it is.

    Args:
        model: The model, without or with parameters attached; it runs with exact attention.
        plan: What serves which site. Sites of operators without parameters are passed over.
        data: Batches, again from the start when they end. Parameters serve sequences up to the length of the first.
        validation: Batches to judge by; the first of ``data``, which is then left out, when ``None``.
        settings: How to fit.
        folder: Keeps parameters there after every site's steps and resumes: a killed run loses one site's steps.
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        PlanError: The plan names a site that the model does not have or its operator cannot serve.
        NumericError: The loss of a site is not finite; the text names the site.
        OptionError: The data holds no batch, raises, or is shorter than what an operator learns from.
        CheckpointError: ``folder`` holds another run, or is damaged.
        ModelLoadError: The model has no data, or is spread over devices.
    """
    settings = settings or FitSettings()
    model = getattr(model, "_orig_mod", model)
    operators = {name: site.build() for name, site in plan.sites.items()}
    learned = {name: operator for name, operator in operators.items() if operator.learned}
    if not learned:
        return Fit({}, {}, ())
    replay = Replay(model)
    batches = Batches(data)
    held_out = [batches.next()] if validation is None else list(validation)
    if not held_out:
        raise OptionError("validation holds no batch")
    fitting = _Fitting(learned, settings, progress or (lambda stage, done, total: None))
    with evaluating(model), torch.random.fork_rng(), replay.closed():
        torch.manual_seed(settings.seed)
        first = batches.peek()
        replay.run(first, take=fitting.start)
        fitting.check(list(replay.specs))
        fitting.store = FitFolder(
            None if folder is None else Path(folder),
            {
                "model": weights_hash(model),
                "plan": inputs_hash({name: operator.token for name, operator in learned.items()}),
                "data": inputs_hash(first),
                "settings": inputs_hash(dataclasses.asdict(settings)),
                "version": __version__,
            },
        )
        fitting.resume()
        for number in range(settings.passes):
            fitting.number = number
            if fitting.behind():
                replay.run(batches.next(), take=fitting.train)
            else:
                batches.next()
        for batch in held_out:
            replay.run(batch, take=fitting.judge)
    return fitting.result()


class _Site:
    """Parameters of one site while they are fitted."""

    def __init__(self, site: str, operator: Operator, values: Mapping[str, Tensor], like: Tensor) -> None:
        self.site, self.operator, self.names = site, operator, tuple(values)
        wide = torch.promote_types(like.dtype, torch.float32)
        self.initial = [v.to(like.device, wide) for v in values.values()]
        self.parameters = [v.clone().requires_grad_(True) for v in self.initial]
        usual = float(like.float().square().mean().sqrt())
        # Values that start at 0 have no size of their own: a tenth of the keys'.
        sizes = [float(v.square().mean().sqrt()) or 0.1 * usual for v in self.initial]
        groups = [{"params": [p], "size": s, "lr": s} for p, s in zip(self.parameters, sizes)]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.steps = 0
        self.before: list[float] = []
        self.after: list[float] = []

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments, to be stored."""
        stored: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters):
            stored[name] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                stored[f"{name}::{key}"] = torch.as_tensor(value)
        return stored

    def load(self, stored: Mapping[str, Tensor], steps: int) -> None:
        """Takes a stored state over."""
        for name, parameter in zip(self.names, self.parameters):
            with torch.no_grad():
                parameter.copy_(stored[name])
            state = {k.partition("::")[2]: v for k, v in stored.items() if k.startswith(f"{name}::")}
            if state:
                self.optimizer.state[parameter] = state
        self.steps = steps


class _Fitting:
    """The observers of the passes."""

    def __init__(self, learned: Mapping[str, Operator], settings: FitSettings, say: Progress) -> None:
        self.learned, self.settings, self.say = learned, settings, say
        self.sites: dict[str, _Site] = {}
        self.store = FitFolder(None, {})
        self.number = 0

    def start(self, site: str, inputs: AttentionInputs, _: Tensor) -> None:
        operator = self.learned.get(site)
        if operator is None or site in self.sites:
            return
        support = operator.supports(inputs.spec())
        if not support:
            raise PlanError(f"{operator.name} cannot serve site {site!r}: {support.reason}")
        self.say("start the parameters from the data", len(self.sites) + 1, len(self.learned))
        values = operator.initial_parameters(inputs.spec(), inputs)
        if not values:
            raise OptionError(
                f"{operator.name} has no learned parameters at site {site!r} for the {inputs.key.shape[2]} tokens of this "
                "data: all of them are its near field; fit on sequences as long as those it is to serve"
            )
        self.sites[site] = _Site(site, operator, values, inputs.key)

    def check(self, known: list[str]) -> None:
        missing = sorted(set(self.learned) - set(self.sites))
        if missing:
            raise PlanError(
                f"the plan names sites the model does not have: {', '.join(missing)}; it has {sorted(known)}"
            )

    def resume(self) -> None:
        for name, site in self.sites.items():
            found = self.store.load(name)
            if found is not None:
                site.load(*found)

    def behind(self) -> bool:
        """Whether a site still needs the present pass."""
        due = (self.number + 1) * self.settings.steps
        return any(site.steps < due for site in self.sites.values())

    def train(self, name: str, inputs: AttentionInputs, exact: Tensor) -> None:
        site = self.sites.get(name)
        due = (self.number + 1) * self.settings.steps
        if site is None or site.steps >= due:
            return
        with torch.enable_grad():
            while site.steps < due:
                self._step(site, inputs, exact)
        self.store.save(name, site.state(), site.steps)
        done = sum(s.steps for s in self.sites.values())
        self.say("fit the sites", done, len(self.sites) * self.settings.passes * self.settings.steps)

    def _step(self, site: _Site, inputs: AttentionInputs, exact: Tensor) -> None:
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{self.settings.seed}/{site.site}/{site.steps}".encode())
        )
        loss = matching_loss(
            site.operator, inputs, tuple(site.parameters), exact, self.settings.weights, generator
        )
        if not bool(torch.isfinite(loss)):
            raise NumericError(f"the loss of site {site.site} is {float(loss)} at step {site.steps}")
        site.optimizer.zero_grad()
        loss.backward()
        for group in site.optimizer.param_groups:
            group["lr"] = self.settings.rate(site.steps) * group["size"]
        site.optimizer.step()
        site.steps += 1

    def judge(self, name: str, inputs: AttentionInputs, exact: Tensor) -> None:
        site = self.sites.get(name)
        if site is None:
            return
        for values, errors in ((site.initial, site.before), (site.parameters, site.after)):
            error = float(
                squared_error(output_of(site.operator, inputs, tuple(v.detach() for v in values))[0], exact)
            )
            if not math.isfinite(error):
                raise NumericError(f"NaN or Inf in the output of site {name} served by {site.operator}")
            errors.append(error)
        self.say("judge the sites", len([s for s in self.sites.values() if s.after]), len(self.sites))

    def result(self) -> Fit:
        parameters, lines = {}, []
        for name, site in self.sites.items():
            before, after = (sum(x) / len(x) for x in (site.before, site.after))
            kept = after < before
            values = site.parameters if kept else site.initial
            parameters[name, site.operator.token] = tuple(v.detach() for v in values)
            lines.append(SiteFit(name, str(site.operator), before, after, kept))
        return Fit(parameters, {name: site.names for name, site in self.sites.items()}, tuple(lines))
