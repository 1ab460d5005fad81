"""What replacing every head of every attention of SmolLM2-135M costs without training, for all operators.

Perplexity, divergence from the exact model and agreement with it, on the sources of Python's standard
library. Learned parameters start from other modules of it and are not trained. Beside each row stands what a
window of as many keys a query would cost: between measured windows, a straight line in log-log.

    python benchmarks/quality_smollm2.py                 # what the document does not hold yet
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from rows import Rows, add_row_options
from smollm2 import (
    attention,
    by_operator,
    calibration_ids,
    captured,
    config_difference,
    loaded,
    site,
    started,
)

from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "quality_smollm2.json"
NEAR = {"window": 64, "sinks": 4}
CAST = {"clustering": "token_choice", "select": "key", "combine": "lse"}
# What SmolLM2 turns queries and keys by, ``rope_theta``.
ROTARY_BASE = 100_000.0
# The middle budget of every operator first: a run that is stopped early has something of each.
BUDGETS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("window", {"width": 128}),
    ("window", {"width": 512}),
    ("fma", {"rank": 4}),
    ("fma", {"rank": 16}),
    ("fma", {"rank": 4, "sinks": 0}),
    ("fma", {"rank": 4, "rotary_base": ROTARY_BASE}),
    ("tf_attention", {"height": 4, **NEAR}),
    ("cast", {"clusters": 32, "cluster_size": 64, **CAST}),
    ("tc_attention", {"height": 6}),
    ("conv_basis", {"k": 64}),
    ("linformer", {"rank": 64}),
    ("tf_attention", {"height": 2, **NEAR}),
    ("cast", {"clusters": 16, "cluster_size": 256, **CAST}),
    ("tc_attention", {"height": 4}),
    ("conv_basis", {"k": 16}),
    ("tf_attention", {"height": 6, **NEAR}),
    ("cast", {"clusters": 32, "cluster_size": 16, **CAST}),
    ("tc_attention", {"height": 8}),
    ("conv_basis", {"k": 256}),
    ("barnes_hut", {"open": 28}),
    ("barnes_hut", {"open": 64}),
    ("barnes_hut", {"open": 115, "beam": 60}),
    ("fma", {"block": 128, "rank": 16}),
    ("window", {"width": 32}),
)


def described(operator: Operator, spec: SiteSpec) -> dict[str, Any]:
    return {
        "operator": operator.name,
        "config": operator.config.to_dict(),
        "options": config_difference(operator),
        "keys_per_query": round(operator.cost(spec).keys_per_query, 1),
        "reason": operator.supports(spec).reason,
    }


def window_kl(rows: list[dict[str, Any]], keys: float) -> float | None:
    """KL of a window that meets ``keys`` keys; ``None`` outside of what was measured."""
    points = sorted((r["keys_per_query"], r["kl"]) for r in rows if r["operator"] == "window" and "kl" in r)
    for (low, kl_low), (high, kl_high) in itertools.pairwise(points):
        if low <= keys <= high:
            share = math.log(keys / low) / math.log(high / low)
            return float(kl_low ** (1 - share) * kl_high**share)
    return None


def show(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, best first within an operator."""
    lines = [
        "| operator | options | keys a query | KL | top-1 | perplexity | KL of a window of as many keys |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["operator"], r["keys_per_query"])):
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        if row["reason"]:
            lines.append(f"| `{row['operator']}` | {options} | | refused: {row['reason']} | | | |")
            continue
        window = window_kl(rows, row["keys_per_query"])
        lines.append(
            f"| `{row['operator']}` | {options} | {row['keys_per_query']:.0f} | {row['kl']:.4f} "
            f"| {row['top1'] * 100:.1f} % | {row['ppl']:.2f} | {'' if window is None else f'{window:.4f}'} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence")
    parser.add_argument("--calibration", type=int, default=1024, help="tokens that parameters start from")
    parser.add_argument("--only", nargs="+", help="operators")
    add_row_options(parser, RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.show:
        print(show(Rows(args.json, "fastattn.quality/1", (), {}).all))
        return
    given = loaded(args.length)
    model, ids = given.model, given.inputs["input_ids"]
    spec = site(model, args.length)
    context = {"benchmark": "quality_smollm2", "text": given.source, "calibration_tokens": args.calibration}
    origin = provenance(model, given.inputs, seed=0, context=context)
    rows = Rows(
        # By options: a configuration that gains a field is still the one that was measured.
        args.json,
        "fastattn.quality/1",
        ("operator", "options"),
        {"n": args.length, "provenance": origin},
    )
    exact: torch.Tensor | None = None
    samples: dict[int, AttentionInputs] = {}
    for name, options in BUDGETS:
        if args.only and name not in args.only:
            continue
        operator = make_operator(name, **options)
        row = described(operator, spec)
        if rows.find(row) is not None and not args.fresh:
            continue
        if not row["reason"]:
            if exact is None:
                exact = model(input_ids=ids, use_cache=False).logits
            if operator.learned and not samples:
                samples = captured(model, calibration_ids(args.calibration))
            parameters = started(operator, spec, samples) if operator.learned else {}
            with attention(model, by_operator(operator, parameters)):
                logits = model(input_ids=ids, use_cache=False).logits
            summary = summarise(compare_logits(exact, logits, ids))
            if summary is None:
                raise ValueError("no token has a label")
            row |= dataclasses.asdict(summary)
        rows.put(row)
        print(
            {k: row.get(k) for k in ("operator", "options", "keys_per_query", "kl", "top1", "ppl")},
            flush=True,
        )
    print(show(rows.all))


if __name__ == "__main__":
    main()
