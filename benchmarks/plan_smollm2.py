"""A plan for SmolLM2-135M under a budget, chosen on one text and measured on another.

Sources of Python's standard library; the modules that the plan is chosen on and those it is measured on are different
ones. Beside the plan stand controls of the same cost: one operator everywhere, candidates at random, a window. Cost is
counted arithmetic with the choice of what is met, as a share of exact attention's.

    python benchmarks/plan_smollm2.py                                    # n = 2048
    python benchmarks/plan_smollm2.py --length 8192 --prior plan.json    # sensitivities of a shorter text

A run that was stopped goes on where it was when it is given the same --folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from smollm2 import calibration_ids, loaded, site, text_ids

from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.retrofitting.candidates import SECONDS, Costs
from fastattn_compile.retrofitting.journal import Journal
from fastattn_compile.retrofitting.planning import plan
from fastattn_compile.retrofitting.replay import Replay, Server
from fastattn_compile.retrofitting.search import random_choice

RESULTS = Path(__file__).parent / "results" / "plan_smollm2.json"
SCHEMA = "fastattn.quality/1"
KEY = ("n", "max_drop", "text")
# For a budget that was itself chosen by the evaluation text: modules that neither a plan nor a budget has seen.
UNSEEN = (
    "ast", "calendar", "cmd", "codecs", "csv", "dis", "enum", "_pydecimal", "ftplib", "gettext", "heapq", "locale",
    "random", "shlex",
)  # fmt: skip


def batch(ids: torch.Tensor, every: int) -> dict[str, Any]:
    """The whole text goes through the model; its head, a third of the arithmetic, serves every few positions."""
    kept = torch.arange(every - 1, ids.shape[1], every)
    return {"input_ids": ids, "use_cache": False, "logits_to_keep": kept}


def serving(found: Plan) -> dict[str, Server]:
    return {name: Server(site.build()) for name, site in found.sites.items() if site.operator != "exact"}


def equal(name: str, option: str, spec: SiteSpec, share: float) -> tuple[Operator, float]:
    """The operator with the least value of an option that costs at least a share of exact attention's arithmetic."""
    exact = make_operator("exact").cost(spec).flops
    low, high = 1, int(spec.key_len)
    while low < high:
        middle = (low + high) // 2
        enough = make_operator(name, **{option: middle}).cost(spec).flops >= share * exact
        low, high = (low, middle) if enough else (middle + 1, high)
    operator = make_operator(name, **{option: low})
    return operator, operator.cost(spec).flops / exact


def held_out(model: Any, ids: torch.Tensor, every: int, found: Plan) -> list[dict[str, Any]]:
    """KL and top-1 on the evaluation text of the plan, and of its controls: one operator everywhere, and chance."""
    given, frontier = batch(ids, every), found.frontier
    if frontier is None:
        raise ValueError("the plan has no frontier")
    share = found.provenance["search"]["cost_share"]
    choices = [("plan", share, serving(found))]
    for name, option in (("barnes_hut", "open"), ("window", "width")):
        operator, cost = equal(name, option, site(model, ids.shape[1]), share)
        choices.append(
            (f"the same everywhere: {operator}", cost, dict.fromkeys(found.sites, Server(operator)))
        )
    chance = random_choice(frontier, share * frontier.total_exact, random.Random(0))
    drawn = serving(Plan.of_point(frontier, chance, {}))
    choices.append(("at random, seed 0", frontier.cost_of(chance) / frontier.total_exact, drawn))
    rows = []
    with Replay(model).closed() as replay:
        exact = replay.run(given).logits
        for label, cost, chosen in choices:
            summary = summarise(compare_logits(exact, replay.run(given, chosen).logits))
            if summary is None:
                raise ValueError("no token was counted")
            rows.append({"label": label, "arithmetic": cost, "kl": summary.kl, "top1": summary.top1})
            print(rows[-1], flush=True)
    return rows


def time_share(found: Plan, spec: SiteSpec) -> float:
    """Measured time of the plan's operators over that of as many exact attentions by the best kernel there is."""
    costs = Costs(SECONDS, None, Journal(None, {}))
    mine = sum(costs.of(site.build(), spec) for site in found.sites.values())
    return mine / (len(found.sites) * costs.of(make_operator("exact"), spec))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--max-drop", type=float, default=0.02)
    parser.add_argument(
        "--every", type=int, default=4, help="positions between predictions that are compared"
    )
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--sequences", type=int, default=1, help="of calibration text to choose by")
    parser.add_argument("--prior", type=Path)
    parser.add_argument("--operators", type=json.loads, help="JSON: name to a list of options")
    parser.add_argument("--no-controls", action="store_true", help="no controls on the text it is chosen on")
    parser.add_argument("--solve", type=float, help="take the plan of the folder for this budget; no search")
    parser.add_argument(
        "--times", action="store_true", help="only measure the plan's time, for rows there are"
    )
    parser.add_argument("--text", choices=("evaluation", "unseen"), default="evaluation", help="measured on")
    parser.add_argument("--memory", type=int, default=2048, help="MiB for states of passes")
    parser.add_argument("--folder", type=Path, required=True, help="for the plan and what was measured")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = loaded(args.length)
    model = given.model
    began = time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {stage} {done}/{total}", flush=True)

    origin = provenance(
        model, given.inputs, seed=0, context={"benchmark": "plan_smollm2", "text": given.source}
    )
    document = Rows(args.json, SCHEMA, KEY, {"provenance": origin})
    budget = args.solve or args.max_drop
    if args.times or args.solve:
        found = Plan.load(args.folder / "plan.json")
        found = found.solve(max_drop=args.solve) if args.solve else found
    else:
        calibration = calibration_ids(args.sequences * args.length).view(args.sequences, 1, -1)
        found = plan(
            model, [batch(ids, args.every) for ids in calibration], max_drop=args.max_drop,
            max_minutes=args.minutes, unit="flops", operators=args.operators, folder=args.folder, progress=progress,
            prior=Plan.load(args.prior) if args.prior else None, show_controls=not args.no_controls,
            memory=args.memory << 20, context={"text": "calibration modules"},
        )  # fmt: skip
        found.save(args.folder / "plan.json")
    if args.times:
        seconds = time_share(found, site(model, args.length))
        for row in [r for r in document.all if (r["n"], r["max_drop"]) == (args.length, budget)]:
            document.put({**row, "seconds": seconds, "threads": args.threads})
            print(row["text"], seconds, flush=True)
        return
    print(json.dumps(found.provenance["search"], indent=1), flush=True)
    ids = given.inputs["input_ids"] if args.text == "evaluation" else text_ids(args.length, UNSEEN)
    rows = held_out(model, ids, args.every, found)
    document.put(
        {
            "n": args.length, "max_drop": budget, "text": args.text, "held_out": rows,
            "search": found.provenance["search"],
            "curve": found.frontier.to_json()["curve"] if found.frontier else [],
            "sites": {name: str(site.build()) for name, site in found.sites.items()},
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
