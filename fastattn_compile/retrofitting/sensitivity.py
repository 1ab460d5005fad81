"""How much a model loses by an operator at a site: measured on cached states, and scaled where it was not measured.

One pass of the exact model shows every site's true tensors. There each candidate's own error is measured; the model's
loss is measured for one candidate a site, by running what follows the site again. A small error changes the predictions
by a quadratic form, so the loss of another candidate at the site is that one's times the ratio of squared errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.errors import OptionError
from fastattn_compile.frontier import LEAST_DROP, Candidate, Frontier
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.evaluate import Progress
from fastattn_compile.retrofitting.candidates import Costs
from fastattn_compile.retrofitting.journal import Journal
from fastattn_compile.retrofitting.losses import Metric, kept_result, lost
from fastattn_compile.retrofitting.per_head import Shares, mixtures
from fastattn_compile.retrofitting.replay import Replay, Server

Fitted = Mapping[tuple[str, str], tuple[Tensor, ...]]
"""Site and token of an operator to its learned parameters."""


def read_batches(data: Iterable[Any], most: int) -> list[Any]:
    """Up to ``most`` batches of a loader.

    Raises:
        OptionError: It holds none, or raises while it is read.
    """
    found: list[Any] = []
    try:
        for batch in data:
            found.append(batch)
            if len(found) == most:
                break
    except Exception as error:
        raise OptionError(
            f"the data raised {type(error).__name__} after {len(found)} batches: {error}; "
            "what was measured before is kept in the run's folder"
        ) from error
    if not found:
        raise OptionError("the data holds no batch")
    return found


@dataclass(frozen=True)
class SiteCandidates:
    """The candidates of one site before anything was measured.

    Args:
        operators: Operators with the options that make them.
        costs: Their costs, in order.
        exact_cost: Cost of exact attention.
    """

    operators: Sequence[tuple[Operator, dict[str, Any]]]
    costs: Sequence[float]
    exact_cost: float


class Laboratory:
    """A model, its data, and everything that is measured on them.

    Args:
        replay: The model.
        batches: The data.
        metric: What is lost.
        name: Name of the metric, or the metric.
        journal: Where measured values are kept.
        say: Progress.
        fitted: Learned parameters to use in place of those that operators start with.
    """

    def __init__(
        self, replay: Replay, batches: Sequence[Any], metric: Metric, name: str | Metric, journal: Journal,
        say: Progress, fitted: Fitted | None = None,
    ) -> None:  # fmt: skip
        self.replay, self.batches, self.metric, self.name = replay, batches, metric, name
        self.journal, self.say, self.fitted = journal, say, dict(fitted or {})
        self.exact: list[Any] = []
        self.servers: dict[tuple[str, str], Server] = {}
        self.evaluations = 0

    def observe(self, candidates: Mapping[str, SiteCandidates]) -> dict[tuple[str, str], Shares]:
        """Runs the exact model over the data, keeps its states, and measures every candidate's error at every site.

        Returns:
            Site and token to the squared error of each key head over the squared norm of the site's output; infinite where
            it is not finite.
        """
        sums: dict[tuple[str, str], list[Shares]] = {}
        done, total = 0, len(candidates) * len(self.batches)
        for index, batch in enumerate(self.batches):

            def take(site: str, inputs: AttentionInputs, exact: Tensor, index: int = index) -> None:
                nonlocal done
                if site not in candidates:
                    return
                operators = [operator for operator, _ in candidates[site].operators]
                self._serve(site, operators, inputs)
                errors = self.journal.get(
                    f"errors by head/{site}/{index}",
                    lambda: [self._error(site, op, inputs, exact) for op in operators],
                )
                for operator, error in zip(operators, errors):
                    heads = (math.inf,) * inputs.key.shape[1] if error is None else tuple(error)
                    sums.setdefault((site, operator.token), []).append(heads)
                done += 1
                self.say("errors of the candidates at every site", done, total)

            result = self.replay.run(batch, index=index, keep=True, take=take)
            self.exact.append(kept_result(self.name, result))
        return {key: tuple(map(statistics.fmean, zip(*errors))) for key, errors in sums.items()}

    def drop(self, choice: Mapping[str, str]) -> float:
        """What the model loses with a choice, mean over the batches.

        Args:
            choice: Site to the token of its operator.
        """
        if not choice:
            return 0.0

        def measure() -> float:
            serving = {site: self.servers[site, token] for site, token in choice.items()}
            values = [
                lost(self.metric, self.replay.run(batch, serving, index=i), self.exact[i], batch)
                for i, batch in enumerate(self.batches)
            ]
            self.evaluations += 1
            return statistics.fmean(values)

        return float(self.journal.get(_name(choice), measure))

    def knows(self, choice: Mapping[str, str]) -> bool:
        """Whether a choice was measured before."""
        return _name(choice) in self.journal

    def keep(self, choice: Mapping[str, str]) -> None:
        """Keeps the states of a choice beside those of the exact model."""
        serving = {site: self.servers[site, token] for site, token in choice.items()}
        for i, batch in enumerate(self.batches):
            self.replay.run(batch, serving, index=i, keep=True)

    def serve(self, site: str, operator: Operator) -> None:
        """Lets an operator without learned parameters serve a site."""
        self.servers.setdefault((site, operator.token), Server(operator))

    def _serve(self, site: str, operators: Sequence[Operator], inputs: AttentionInputs) -> None:
        for operator in operators:
            key = (site, operator.token)
            if key in self.servers:
                continue
            given = self.fitted.get(key)
            if given is None and operator.learned:
                given = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
            given = tuple(p.to(inputs.key.device, inputs.key.dtype) for p in given or ())
            self.servers[key] = Server(operator, given)

    def _error(
        self, site: str, operator: Operator, inputs: AttentionInputs, exact: Tensor
    ) -> list[float] | None:
        parameters = list(self.servers[site, operator.token].parameters)
        out = torch_op(operator.name)(
            inputs.query, inputs.key, inputs.value, inputs.key_padding, inputs.segments, inputs.bias, parameters,
            inputs.scale, str(inputs.mask), operator.token, "",
        )[0]  # fmt: skip
        wide = torch.promote_types(exact.dtype, torch.float32)
        error = (out.to(wide) - exact.to(wide)).square().sum((0, 2, 3))
        shares = error.unflatten(0, (inputs.key.shape[1], -1)).sum(1) / exact.to(wide).square().sum().clamp(
            min=1e-30
        )
        return shares.tolist() if bool(torch.isfinite(shares).all()) else None


def _name(choice: Mapping[str, str]) -> str:
    return "drop/" + ";".join(f"{site}={token}" for site, token in sorted(choice.items()))


def site_candidates(
    replay: Replay, operators: Sequence[tuple[Operator, dict[str, Any]]], costs: Costs, keep: Iterable[str]
) -> tuple[dict[str, SiteCandidates], dict[str, float], dict[str, str]]:
    """Which operators can serve which site for less than exact attention.

    Returns:
        The candidates of the sites that have any, every site's exact cost, and why the other sites have none.
    """
    exact = make_operator("exact")
    kept = set(keep)
    found: dict[str, SiteCandidates] = {}
    exact_cost: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, spec in replay.specs.items():
        exact_cost[name] = costs.of(exact, spec)
        if name in kept:
            reasons[name] = "it is to be kept"
            continue
        fitting: list[tuple[Operator, dict[str, Any]]] = []
        refusals: dict[str, str] = {}
        for operator, options in operators:
            support = operator.supports(spec) and operator.supports(costs.at(spec))
            if support:
                fitting.append((operator, options))
            else:
                refusals.setdefault(operator.name, f"{operator.name}: {support.reason}")
        priced = [(pair, costs.of(pair[0], spec)) for pair in fitting]
        cheaper = [(pair, cost) for pair, cost in priced if cost < exact_cost[name]]
        if cheaper:
            pairs, prices = zip(*cheaper)
            found[name] = SiteCandidates(pairs, prices, exact_cost[name])
        elif fitting:
            reasons[name] = (
                f"no operator that was tried is cheaper than exact attention here ({costs.unit}, "
                f"{costs.at(spec).key_len} keys)"
            )
        else:
            reasons[name] = "no operator that was tried serves it: " + "; ".join(refusals.values())
    return found, exact_cost, reasons


def mixed(
    laboratory: Laboratory, candidates: Mapping[str, SiteCandidates], shares: Mapping[tuple[str, str], Shares],
    specs: Mapping[str, SiteSpec], costs: Costs,
) -> tuple[dict[str, SiteCandidates], dict[tuple[str, str], Shares]]:  # fmt: skip
    """The candidates and their errors, with those that serve the heads of a site differently."""
    more, known = dict(candidates), dict(shares)
    for site, here in candidates.items():
        errors = [shares[site, operator.token] for operator, _ in here.operators]
        found = mixtures(here.operators, here.costs, errors, specs[site], costs, here.exact_cost)
        for operator, _, _, own in found:
            laboratory.serve(site, operator)
            known[site, operator.token] = own
        more[site] = SiteCandidates(
            [*here.operators, *((operator, options) for operator, options, _, _ in found)],
            [*here.costs, *(cost for _, _, cost, _ in found)], here.exact_cost,
        )  # fmt: skip
    return more, known


def gains_of(prior: Frontier) -> dict[str, float]:
    """What a site loses for a unit of its squared error, from what another search measured.

    A candidate that seemed to lose nothing says nothing: its loss was less than the noise of what it was measured in.
    """
    ratios: dict[str, list[float]] = {}
    for candidate in prior.candidates:
        if candidate.measured and candidate.error > 0 and candidate.drop > LEAST_DROP:
            ratios.setdefault(candidate.site, []).append(candidate.drop / candidate.error)
    return {site: statistics.median(values) for site, values in ratios.items()}


def probe_of(candidates: SiteCandidates, errors: Sequence[float]) -> int:
    """The candidate to measure a site's sensitivity with: the one of middle error among those worth choosing."""
    order = sorted(range(len(errors)), key=lambda i: (candidates.costs[i], errors[i]))
    worth: list[int] = []
    for i in order:
        if math.isfinite(errors[i]) and (not worth or errors[i] < errors[worth[-1]]):
            worth.append(i)
    return worth[len(worth) // 2] if worth else -1


def sensitivities(
    laboratory: Laboratory, candidates: Mapping[str, SiteCandidates], errors: Mapping[tuple[str, str], float],
    prior: Frontier | None, stop: Any,
) -> list[Candidate]:  # fmt: skip
    """Every candidate with what the model loses by it.

    Args:
        laboratory: Where losses are measured.
        candidates: By site.
        errors: From ``Laboratory.observe``.
        prior: A search whose sensitivities are taken over for sites it measured.
        stop: Called before each measurement; true ends measuring, and sites left are given the median sensitivity.
    """
    gains = gains_of(prior) if prior is not None else {}
    measured: dict[tuple[str, str], float] = {}
    for done, (site, here) in enumerate(candidates.items()):
        laboratory.say("what the model loses by each site", done, len(candidates))
        if site in gains or stop():
            continue
        own = [errors[site, operator.token] for operator, _ in here.operators]
        probe = probe_of(here, own)
        if probe < 0:
            continue
        token = here.operators[probe][0].token
        measured[site, token] = laboratory.drop({site: token})
        gains[site] = max(measured[site, token], LEAST_DROP) / max(own[probe], 1e-12)
    usual = statistics.median(gains.values()) if gains else 1.0
    found = []
    for site, here in candidates.items():
        for (operator, options), cost in zip(here.operators, here.costs):
            error = errors[site, operator.token]
            if not math.isfinite(error):
                continue
            key = (site, operator.token)
            drop = measured.get(key, gains.get(site, usual) * error)
            found.append(Candidate(site, operator.name, options, cost, error, drop, key in measured))
    return found
