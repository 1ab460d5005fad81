"""What a few minutes of distillation give back: SmolLM2-135M with every attention replaced, LoRA on its projections.

Trained on one half of Python's standard library modules, judged on the other; every row is a run of ``fa.distil``
with one stage, and of the controls on the result. A run that was stopped goes on where it was.

    python benchmarks/distil_smollm2.py --steps 40
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from smollm2 import loaded, text_ids

import fastattn_compile as fa
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.reporting.text import CALIBRATION, EVALUATION

RESULTS = Path(__file__).parent / "results" / "distil_smollm2.json"
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "fma": ("fma", {"block": 32, "rank": 2, "sinks": 4, "basis": "depthwise"}),
    "window": ("window", {"width": 64, "sinks": 4}),
}


def batches(modules: Sequence[str], length: int, count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in text_ids(length * count, modules).split(length, 1)]


def measured(name: str, steps: int, length: int, folder: Path | None) -> dict[str, Any]:
    operator, options = PLANS[name]
    base = loaded(length).model
    base.config.use_cache = False
    held_out = batches(EVALUATION, length, 4)
    model = loaded(length).model
    model.config.use_cache = False
    sites = [line.name for line in fa.scan(model, **held_out[0]).softmaxes if line.status == "taken"]
    plan = fa.Plan.uniform(sites, operator, **options)
    fa.attach(model, plan, **held_out[0])
    stage = fa.DistilStage("logits", "kl", steps=steps, train="lora", learning_rate=2e-4, warmup=5)
    result = fa.distil(
        model, plan, batches(CALIBRATION, length, steps), held_out, stages=[stage], compiler="eager",
        folder=folder, checkpoint_every=10, progress=lambda *said: print(*said, flush=True),
    )  # fmt: skip
    report = fa.evaluate(
        model, held_out[0], plan=result.plan, before=base, verify=True, compiler="eager", repeats=1, rows=16
    )
    (told,) = result.to_json()["stages"]
    return {
        "operator": operator, "options": options, "length": length, "steps": steps, "tokens": steps * length,
        "stage": told, "keys_per_query": report.sites[0].keys_per_query,
        "controls": dict(report.model.controls), "intervals": dict(report.model.intervals),
        "kl": report.model.kl, "causal": report.checks["causal"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="keeps the runs, so that they may be stopped")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = loaded(options.length)
    head = {"provenance": provenance(model.model, model.inputs, seed=0)}
    rows = Rows(options.json, "fastattn.distil-benchmark/1", ("operator", "steps", "length"), head)
    for name in options.operators:
        folder = options.folder / name if options.folder else None
        rows.put(measured(name, options.steps, options.length, folder))


if __name__ == "__main__":
    main()
