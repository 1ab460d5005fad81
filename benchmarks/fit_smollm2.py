"""What fitting gains: fast multipole attention in SmolLM2-135M with fitted combinations in place of plain means.

The combinations are fitted site by site towards exact attention on some modules of Python's standard library; error of
every site, and KL of the model, are measured on others. The cost of both is the same. KL is measured with every site
replaced, and with the third of the sites alone where the fitted operator has the least error: those a plan would choose.

    python benchmarks/fit_smollm2.py --folder run       # a run that was stopped goes on
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from plan_smollm2 import batch
from rows import Rows
from smollm2 import calibration_ids, loaded

from fastattn_compile.operators.registry import make_operator
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.retrofitting.fit import FitSettings, fit
from fastattn_compile.retrofitting.replay import Replay, Server

RESULTS = Path(__file__).parent / "results" / "fit_smollm2.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = loaded(args.length)
    model, began = given.model, time.monotonic()
    options = {"block": args.block, "rank": args.rank}
    mean = make_operator("fma", **options)
    names = [f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)]
    planned = Plan.uniform(names, "fma", **options, basis="depthwise")
    learned = planned.sites[names[0]].build()
    text = calibration_ids(args.length * args.passes)[0]
    data = [batch(text[None, at : at + args.length], args.length) for at in range(0, len(text), args.length)]
    data = [one for one in data if one["input_ids"].shape[1] == args.length]
    held_out = batch(given.inputs["input_ids"], args.every)

    def progress(stage: str, done: int, total: int) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {stage} {done}/{total}", flush=True)

    fitted = fit(
        model, planned, data, [held_out], folder=args.folder, progress=progress,
        settings=FitSettings(passes=args.passes, steps=args.steps, learning_rate=args.rate),
    )  # fmt: skip
    errors = {line.site: line for line in fitted.sites}
    best = sorted(names, key=lambda name: errors[name].after)[: len(names) // 3]
    rows: list[dict[str, Any]] = []
    with Replay(model).closed() as replay:
        exact = replay.run(held_out).logits
        for label, sites in (("every site", names), ("third of least error", best)):
            for basis in ("mean", "fitted"):
                serving = {
                    name: Server(mean) if basis == "mean" else Server(learned, fitted.parameters[name, learned.token])
                    for name in sites
                }  # fmt: skip
                found = summarise(compare_logits(exact, replay.run(held_out, serving).logits))
                if found is None:
                    raise ValueError("no token was counted")
                rows.append({"sites": label, "basis": basis, "kl": found.kl, "top1": found.top1})
                print(rows[-1], flush=True)
    origin = provenance(
        model, given.inputs, seed=0, context={"benchmark": "fit_smollm2", "text": given.source}
    )
    key = {"n": args.length, **options, "passes": args.passes, "steps": args.steps, "rate": args.rate}
    document = Rows(args.json, "fastattn.quality/1", tuple(key), {"provenance": origin})
    document.put({**key, "batches": len(data), "kl": rows, "errors": fitted.to_json()})


if __name__ == "__main__":
    main()
