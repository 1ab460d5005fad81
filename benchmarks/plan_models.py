"""Plans for models of other kinds under several budgets, chosen on some data and measured on other.

Beside each plan stand controls of its cost on the same held-out data: one operator everywhere, a window everywhere,
candidates at random. Cost is counted arithmetic with the choice of what is met, as a share of exact attention's over all
sites, those that stay exact included; ``time`` is the same share of processor time, one thread.

    python benchmarks/plan_models.py saliency-518 matcher-1024 --folder run
    python benchmarks/plan_models.py --show

What to install for a model stands in the file that loads it. A run that was stopped goes on where it was when it is given
the same --folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import matcher
import saliency
import torch
from rows import Rows
from torch import nn

from fastattn_compile.frontier import Frontier
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.provenance import inputs_hash, provenance
from fastattn_compile.retrofitting.journal import Journal
from fastattn_compile.retrofitting.planning import plan
from fastattn_compile.retrofitting.replay import Replay, Server
from fastattn_compile.retrofitting.search import random_choice

RESULTS = Path(__file__).parent / "results" / "plan_models.json"
SEEDS = 2

# Short sequences need small blocks: near fields are three blocks wide.
TREES: Sequence[Mapping[str, Any]] = (
    {"block": 16, "open": 8, "beam": 8}, {"block": 16, "open": 16, "beam": 16}, {"block": 16, "open": 32, "beam": 32},
    {"block": 32, "open": 32, "beam": 32}, {"block": 32, "open": 64, "beam": 64},
    {"block": 16, "open": 32, "beam": 64, "group": 8}, {"block": 32, "open": 64, "beam": 128, "group": 8},
)  # fmt: skip
WINDOWS: Sequence[Mapping[str, Any]] = tuple({"width": 2**k} for k in range(6, 10))
MULTIPOLES: Sequence[Mapping[str, Any]] = (
    {"block": 16}, {"block": 16, "rank": 8}, {"block": 32, "rank": 8}, {"block": 64, "rank": 16},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with what it is planned on.

    Args:
        model: The model.
        calibration: Batches that a plan is chosen on.
        evaluation: Batches that it is measured on.
        metric: What is lost.
        score: A number that users of the model know, of a replaced and an exact result; 1 is no difference.
        operators: What may serve a site.
        budgets: Of the metric.
    """

    model: nn.Module
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    metric: Callable[[Any, Any, Any], float]
    score: Callable[[Any, Any], float]
    operators: Mapping[str, Sequence[Mapping[str, Any]]]
    budgets: Sequence[float]


def salient(pixels: int, curve: bool, calibration: int = 3, evaluation: int = 4) -> Case:
    """The vision transformer on so many images; along a curve the squares of a grid are not where ``grid`` expects them."""
    side = pixels // saliency.PATCH
    cells = [{"block": 16, "rank": 1}, {"block": 16, "rank": 4}, {"block": 36, "rank": 4}]
    squares = [{"grid": (side, side), "prefix": 1, **cell} for cell in cells if not curve]
    return Case(
        saliency.load(pixels, curve),
        list(saliency.images(saliency.CALIBRATION[:calibration], pixels)),
        list(saliency.images(saliency.EVALUATION[:evaluation], pixels)),
        saliency.map_loss,
        saliency.agreement,
        {"barnes_hut": TREES, "window": WINDOWS, "fma": [*MULTIPOLES, *squares]},
        (0.01, 0.02),
    )


def matching(points: int, curve: bool) -> Case:
    """The matcher of points."""
    return Case(
        matcher.Matcher().eval(),
        list(matcher.pairs(matcher.CALIBRATION, points, curve)),
        list(matcher.pairs(matcher.EVALUATION, points, curve)),
        matcher.moved,
        matcher.agreement,
        {"barnes_hut": TREES, "window": WINDOWS, "fma": MULTIPOLES},
        (0.05, 0.1),
    )


CASES: Mapping[str, Callable[[], Case]] = {
    "saliency-224": lambda: salient(224, False),
    "saliency-518": lambda: salient(518, False, 2, 3),
    "saliency-518-curve": lambda: salient(518, True, 2, 3),
    "matcher-1024": lambda: matching(1024, False),
    "matcher-1024-curve": lambda: matching(1024, True),
    "matcher-4096-curve": lambda: matching(4096, True),
}


def everywhere(
    name: str, option: str, frontier: Frontier, specs: Mapping[str, SiteSpec], cost: float, **fixed: Any
) -> tuple[str, float, dict[str, Server]]:
    """The operator at every site it serves, with the least value of an option that costs at least ``cost`` in all."""

    def serving(value: int) -> tuple[float, dict[str, Server]]:
        server = Server(make_operator(name, **{option: value, **fixed}))
        serves = {site: server for site, spec in specs.items() if server.operator.supports(spec)}
        total = sum(
            server.operator.cost(specs[site]).flops if site in serves else exact
            for site, exact in frontier.exact_cost.items()
        )
        return total, serves

    low, high = 1, max(int(spec.key_len) for spec in specs.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if serving(middle)[0] >= cost else (middle + 1, high)
    total, serves = serving(low)
    return f"the same everywhere: {name}, {option} {low}", total, serves


class Timer:
    """Processor time of attention, one thread, on random tensors of the sites' sizes; each operator and size once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def of(self, specs: Mapping[str, SiteSpec], serving: Mapping[str, Server]) -> float:
        """Seconds of all sites together."""
        exact = make_operator("exact")
        return sum(
            self._one(serving[name].operator if name in serving else exact, spec)
            for name, spec in specs.items()
        )

    def _one(self, operator: Operator, spec: SiteSpec) -> float:
        sizes = [(spec.heads, spec.query_len), (spec.kv_heads, spec.key_len), (spec.kv_heads, spec.key_len)]
        name = (operator.token, str(sizes))
        if name not in self._known:
            query, key, value = (torch.randn(1, int(h), int(n), int(spec.head_dim)) for h, n in sizes)
            spent = []
            for _ in range(4):  # the first builds and warms up
                began = time.process_time()
                attend(query, key, value, operator)
                spent.append(time.process_time() - began)
            self._known[name] = min(spent[1:])
        return self._known[name]


def held_out(case: Case, found: Plan, seed: int, file: Path | None) -> list[dict[str, Any]]:
    """Loss and score of a plan and of its controls on the evaluation data, what was measured kept in a file."""
    frontier = found.frontier
    assert frontier is not None
    cost = found.provenance["search"]["cost_share"] * frontier.total_exact
    rows = []
    run = {"plan": inputs_hash(str(found.sites)), "data": inputs_hash(case.evaluation)}
    kept = Journal(file, run)
    with Replay(case.model).closed() as replay:

        @cache
        def exact(index: int) -> Any:
            return replay.run(case.evaluation[index])

        exact(0)  # what names the sites
        timer = Timer()

        def losses(share: float, serving: Mapping[str, Server]) -> dict[str, float]:
            lost, scores = [], []
            for index, batch in enumerate(case.evaluation):
                result = replay.run(batch, serving)
                lost.append(case.metric(result, exact(index), batch))
                scores.append(case.score(result, exact(index)))
            return {
                "arithmetic": share, "time": timer.of(replay.specs, serving) / timer.of(replay.specs, {}),
                "loss": fmean(lost), "worst_loss": max(lost), "score": fmean(scores), "worst_score": min(scores),
            }  # fmt: skip

        def measure(label: str, cost: float, serving: Mapping[str, Server]) -> None:
            share = cost / frontier.total_exact
            rows.append({"label": label, **kept.get(label, lambda: losses(share, serving))})
            print(json.dumps(rows[-1]), flush=True)

        def planned(choice: Plan) -> dict[str, Server]:
            return {n: Server(s.build()) for n, s in choice.sites.items() if s.operator != "exact"}

        measure("plan", cost, planned(found))
        if not planned(found):
            return rows
        measure(*everywhere("barnes_hut", "open", frontier, replay.specs, cost, block=16, beam=32))
        measure(*everywhere("window", "width", frontier, replay.specs, cost))
        for number in range(SEEDS):
            choice = random_choice(frontier, cost, random.Random(seed + number))
            if choice:
                measure(
                    f"at random, seed {seed + number}", frontier.cost_of(choice),
                    planned(Plan.of_point(frontier, choice, {})),
                )  # fmt: skip
    return rows


def show(document: Rows) -> None:
    """The rows as a table."""
    print(
        "| model | tokens | budget | | arithmetic | time | loss | worst | score |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in document.all:
        for line in row["held_out"]:
            print(
                f"| {row['model']} | {row['n']} | {row['max_drop']} | {line['label']} | {line['arithmetic']:.1%} "
                f"| {line['time']:.0%} "
                f"| {line['loss']:.4f} | {line['worst_loss']:.4f} | {line['score']:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--show", action="store_true", help="print the table of what is there, measure nothing"
    )
    parser.add_argument("--folder", type=Path, help="for what was measured")
    parser.add_argument("--max-drop", type=float, help="one budget in place of the model's own")
    parser.add_argument("--minutes", type=float, help="of the search for each budget")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    unknown = set(args.models) - set(CASES)
    if unknown or not (args.models or args.show):
        parser.error(f"MODEL is one of {', '.join(CASES)}, got {', '.join(sorted(unknown)) or 'none'}")
    torch.set_num_threads(args.threads)
    document = Rows(args.json, "fastattn.plan_models/1", ("model", "max_drop"), {})
    for name in args.models:
        case = CASES[name]()
        folder = args.folder / name if args.folder else None
        began = time.monotonic()

        def progress(stage: str, done: int, total: int, began: float = began) -> None:
            print(f"{time.monotonic() - began:6.0f} s  {stage} {done}/{total}", flush=True)

        for budget in case.budgets if args.max_drop is None else (args.max_drop,):
            found = plan(
                case.model, case.calibration, max_drop=budget, metric=case.metric, unit="flops",
                operators=case.operators, batches=len(case.calibration), show_controls=False, progress=progress,
                max_minutes=args.minutes,
                folder=folder,
            )  # fmt: skip
            assert found.frontier is not None
            print(json.dumps(found.provenance["search"]), flush=True)
            file = folder / f"held_out_{budget}.jsonl" if folder else None
            origin = provenance(case.model, case.evaluation, seed=0, context={"benchmark": "plan_models"})
            document.put(
                {
                    "model": name, "n": found.frontier.n, "max_drop": budget, "metric": found.frontier.metric,
                    "held_out": held_out(case, found, 0, file), "search": found.provenance["search"],
                    "curve": found.frontier.to_json()["curve"], "provenance": origin,
                    "sites": {n: str(s.build()) for n, s in found.sites.items()},
                }
            )  # fmt: skip
    if args.show:
        show(document)


if __name__ == "__main__":
    main()
