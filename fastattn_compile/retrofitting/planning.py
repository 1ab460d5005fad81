"""``fa.plan``: what serves each site, under a budget of loss or of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn_compile.errors import OptionError, PlanError
from fastattn_compile.frontier import Frontier
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.evaluate import Progress, evaluating
from fastattn_compile.reporting.provenance import inputs_hash, provenance, weights_hash
from fastattn_compile.retrofitting.candidates import (
    FLOPS,
    PREDICTED,
    SECONDS,
    Costs,
    Wanted,
    wanted_operators,
)
from fastattn_compile.retrofitting.journal import Journal
from fastattn_compile.retrofitting.losses import Metric, metric_of
from fastattn_compile.retrofitting.replay import Replay
from fastattn_compile.retrofitting.search import Budget, Clock, Search, controls
from fastattn_compile.retrofitting.sensitivity import (
    Fitted,
    Laboratory,
    mixed,
    read_batches,
    sensitivities,
    site_candidates,
)
from fastattn_compile.version import __version__

JOURNAL = "plan.jsonl"
UNITS = (SECONDS, PREDICTED, FLOPS)


def plan(
    model: nn.Module,
    data: Iterable[Any],
    *,
    max_drop: float | None = None,
    metric: str | Metric = "kl",
    speedup: float | None = None,
    max_minutes: float | None = None,
    operators: Wanted | None = None,
    keep: Sequence[str] = (),
    n: int | None = None,
    unit: str | None = None,
    batches: int = 4,
    prior: Plan | None = None,
    fitted: Fitted | None = None,
    per_head: bool = True,
    show_controls: bool = True,
    memory: int = 2 << 30,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    context: dict[str, Any] | None = None,
) -> Plan:
    """Finds what serves each site of a model so that it is cheapest within a loss, or loses least at a speed.

    The model is left as it is. The plan holds the whole frontier: ``plan.solve(max_drop=...)`` gives the plan of another
    budget at once. ``plan.provenance["search"]`` says whether the budget was reached; where it was not, the plan is the
    best that was found.

    Args:
        model: The model.
        data: Batches: mappings of keywords, tuples of arguments, or tensors. ``labels`` are not given to the model.
        max_drop: Most that may be lost, in the metric; 0.02 when neither this nor ``speedup`` is given.
        metric: ``"kl"``, ``"ppl"`` (relative rise), ``"cosine"`` (of the last hidden states), or a function
            ``metric(result, exact_result, batch) -> float`` that is 0 where nothing is lost.
        speedup: Least factor between the cost of exact attention and the plan's, over all sites.
        max_minutes: The search ends after this time with the best so far.
        operators: Which to try: names, pairs of a name and options, or a mapping of name to a list of options;
            ``barnes_hut``, ``window`` and ``fma`` when ``None``.
        keep: Names of sites that stay exact.
        n: Tokens a sequence that the cost is for: then time is measured on this device at that length.
        unit: ``"seconds"`` (the default with ``n``), ``"predicted seconds"`` of the cost model (the default without), or
            ``"flops"``.
        batches: Batches to read at most; all are kept in memory with the exact model's result.
        prior: A plan of the same model whose measured sensitivities are taken over; the length may differ.
        fitted: Learned parameters of operators by site and token, from ``fa.fit``.
        per_head: Let the heads of a site be served by different ones of its candidates, where that is worth it.
        show_controls: Measure also the same operator everywhere, a random choice and a window at the plan's cost.
        memory: Bytes for states of passes; with less, more is computed again.
        folder: Keeps what was measured there and resumes from it.
        seed: Of random controls and random starts.
        progress: Called as ``progress(stage, done, total)``.
        context: More entries for the provenance; no paths.

    Raises:
        OptionError: An argument is out of range, or the data holds no batch or raises.
        PlanError: ``keep`` names a site that the model does not have.
        ModelLoadError: The model has no data, or is spread over devices.
        CheckpointError: ``folder`` holds another run.
        NumericError: A site, or the metric, gave NaN or Inf.
    """
    budget = _budget(max_drop, speedup)
    name, measure = metric_of(metric)
    chosen_unit = unit if unit is not None else PREDICTED if n is None else SECONDS
    _check(chosen_unit, batches, n, max_minutes)
    wanted = wanted_operators(operators)
    say: Progress = progress or (lambda stage, done, total: None)
    clock = Clock(max_minutes)
    model = getattr(model, "_orig_mod", model)
    replay = Replay(model, memory)
    given = read_batches(data, batches)
    journal = Journal(
        None if folder is None else Path(folder) / JOURNAL,
        {
            "model": weights_hash(model),
            "data": inputs_hash(given),
            "operators": inputs_hash([operator.token for operator, _ in wanted]),
            "metric": name,
            "cost": f"{chosen_unit} at {n}",
            "fitted": inputs_hash({"/".join(key): list(value) for key, value in (fitted or {}).items()}),
            "version": __version__,
        },
    )
    with evaluating(model), torch.random.fork_rng(), replay.closed():
        torch.manual_seed(seed)
        say("capture the model", 0, 0)
        replay.run(given[0])
        unknown = sorted(set(keep) - set(replay.specs))
        if unknown:
            raise PlanError(
                f"keep names sites the model does not have: {', '.join(unknown)}; it has {sorted(replay.specs)}"
            )
        costs = Costs(chosen_unit, n, journal)
        candidates, exact_cost, reasons = site_candidates(replay, wanted, costs, keep)
        laboratory = Laboratory(replay, given, measure, metric, journal, say, fitted)
        shares = laboratory.observe(candidates)
        if per_head:
            candidates, shares = mixed(laboratory, candidates, shares, replay.specs, costs)
        errors = {key: sum(heads) for key, heads in shares.items()}
        found = sensitivities(
            laboratory, candidates, errors, prior.frontier if prior is not None else None, clock.up
        )
        length = n if n is not None else max((int(s.key_len) for s in replay.specs.values()), default=0)
        known = Frontier(name, chosen_unit, length, exact_cost, tuple(found), reasons=reasons)
        search = Search(laboratory, known, budget, clock.up)
        best = search.run()
        others = controls(search, best, replay.specs, costs, list(candidates), seed) if show_controls else []
        origin = provenance(model, given, seed=seed, context=context)
    frontier = Frontier(**{**vars(search.frontier), "controls": tuple(others)})
    total = frontier.total_exact
    stopped = "out of time" if clock.up() else "nothing left that helps"
    if not found:
        stopped = "no site has a candidate: " + next(iter(reasons.values()), "the model has no attention")
    origin["search"] = {
        "max_drop": budget.max_drop,
        "speedup": budget.speedup,
        "reached": budget.met(frontier, best),
        "stopped": stopped,
        "drop": best.drop,
        "cost_share": best.cost / total if total else 1.0,
        "sites": len(exact_cost),
        "replaced": len(best.choice),
        "evaluations": laboratory.evaluations,
        "seconds": round(clock.seconds, 1),
    }
    return Plan.of_point(frontier, best.choice, origin)


def _budget(max_drop: float | None, speedup: float | None) -> Budget:
    if max_drop is None and speedup is None:
        max_drop = 0.02
    if max_drop is not None and not max_drop >= 0:
        raise OptionError(f"max_drop must be at least 0, got {max_drop}")
    if speedup is not None and not speedup >= 1:
        raise OptionError(f"speedup must be at least 1, got {speedup}")
    return Budget(max_drop, speedup)


def _check(unit: str, batches: int, n: int | None, max_minutes: float | None) -> None:
    if unit not in UNITS:
        raise OptionError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    for name, value in (("batches", batches), ("n", n), ("max_minutes", max_minutes)):
        if value is not None and not value > 0:
            raise OptionError(f"{name} must be above 0, got {value}")
