"""Associative recall and induction, learned from scratch by a small model with every causal operator.

``mqar``: pairs of a key and a value, then queries among fillers that must be answered by the value bound to
the key (Arora et al., Zoology, 2023, with a small vocabulary). ``induction``: random tokens in which one
special token occurs twice; after the second the token that followed the first is asked for. Accuracy is over
the asked positions of fresh sequences. Training ends early when it is perfect.

    python benchmarks/recall.py --task induction --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from small_model import Decoder, Sizes, Trial, build, train, window_of
from torch import Tensor

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "recall.json"
SYMBOLS = 32  # keys, and as many values
HIDDEN = -100
DONE = 0.02  # mean loss of the last steps at which the task counts as learned


def mqar(size: int, length: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``pairs`` bindings first; every key is asked once, at a random later place."""
    ids = torch.full((size, length), 2 * SYMBOLS)
    labels = torch.full((size, length), HIDDEN)
    keys = torch.rand(size, SYMBOLS, generator=generator).argsort(-1)[:, :pairs]
    values = SYMBOLS + torch.randint(SYMBOLS, (size, pairs), generator=generator)
    ids[:, : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + torch.rand(size, length - 2 * pairs, generator=generator).argsort(-1)[:, :pairs]
    return ids.scatter(1, places, keys), labels.scatter(1, places, values)


def induction(size: int, length: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The special token stands once in the first half, and last; what followed it is asked for."""
    ids = torch.randint(2 * SYMBOLS, (size, length), generator=generator)
    first = torch.randint(length // 2, (size, 1), generator=generator)
    ids.scatter_(1, first, 2 * SYMBOLS)
    ids[:, -1] = 2 * SYMBOLS
    labels = torch.full((size, length), HIDDEN)
    labels[:, -1] = ids.gather(1, first + 1)[:, 0]
    return ids, labels


TASKS = {"mqar": mqar, "induction": induction}


def trials(sizes: Sizes) -> list[Trial]:
    """Blocks and windows are short beside the sequence, so that what is asked for is far."""
    fma = {"block": 8, "rank": 2, "sinks": 2}
    plain = Trial("fma", "fma", fma)
    return [
        Trial("exact", "exact", {}),
        plain,
        Trial("fma, depthwise", "fma", {**fma, "basis": "depthwise"}),
        window_of(plain, sizes, sinks=2),
        Trial("tf_attention", "tf_attention", {"height": 2, "window": 8, "sinks": 2}),
        Trial("tc_attention", "tc_attention", {"height": 4}),
        Trial(
            "cast", "cast",
            {"clusters": 8, "cluster_size": 16, "clustering": "token_choice", "select": "key"},
        ),
        Trial("conv_basis", "conv_basis", {"k": 16, "sinks": 2}),
        Trial("barnes_hut", "barnes_hut", {"block": 8, "sinks": 2, "leaf": 2, "open": 4, "beam": 8}),
        Trial("linformer", "linformer", {"rank": 16}),
    ]  # fmt: skip


@torch.no_grad()
def accuracy(model: Decoder, ids: Tensor, labels: Tensor) -> float:
    asked = labels != HIDDEN
    found = torch.cat([model(part).argmax(-1) for part in ids.split(64)])
    return (found == labels)[asked].float().mean().item()


def run(trial: Trial, sizes: Sizes, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    operator = trial.make()
    row: dict[str, Any] = {
        "task": args.task, "name": trial.name, "operator": trial.operator, "config": operator.config.to_dict(),
        "seed": seed, "length": args.length, "pairs": args.pairs, "steps": args.steps,
        "reason": operator.supports(sizes.site).reason,
    }  # fmt: skip
    if row["reason"]:
        return row
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    task, recent = TASKS[args.task], []

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield task(args.batch, args.length, args.pairs, generator)

    def watch(step: int, loss: float) -> bool:
        recent.append(loss)
        if step % 100 == 0:
            spent = time.process_time() - start
            print(
                f"  {trial.name}: step {step} loss {statistics.mean(recent[-20:]):.3f} {spent:.0f} s",
                flush=True,
            )
        return len(recent) >= 20 and statistics.mean(recent[-20:]) < DONE

    try:
        model = build(trial, sizes, next(source())[0], seed)
        done = train(model, source(), steps=args.steps, rate=args.rate, watch=watch)
    except (FloatingPointError, FastAttentionError) as error:
        return row | {"reason": str(error)}
    fresh = task(512, args.length, args.pairs, torch.Generator().manual_seed(10_000 + seed))
    return row | {
        "accuracy": round(accuracy(model, *fresh), 4), "steps_done": done,
        "keys_per_query": round(operator.cost(sizes.site).keys_per_query, 1),
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="mqar")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4, help="bindings of a sequence (mqar)")
    parser.add_argument("--steps", type=int, default=2000, help="steps at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(2 * SYMBOLS + 1, args.length, args.width, args.layers, args.heads)
    setup = {name: getattr(args, name) for name in ("batch", "width", "layers", "heads", "rate")}
    rows = Rows(
        args.json, "fastattn.recall/1", ("task", "name", "config", "length", "pairs", "seed"),
        {"setup": setup, "provenance": {"versions": versions()}},
    )  # fmt: skip
    for seed in args.seeds:
        for trial in trials(sizes):
            if args.only and trial.name not in args.only:
                continue
            key = {"task": args.task, "name": trial.name, "config": trial.make().config.to_dict(),
                   "length": args.length, "pairs": args.pairs, "seed": seed}  # fmt: skip
            row = None if args.fresh else rows.find(key)
            if row is None:
                row = run(trial, sizes, seed, args)
                rows.put(row)
            print(
                {k: row.get(k) for k in ("task", "name", "seed", "accuracy", "steps_done", "reason")},
                flush=True,
            )


if __name__ == "__main__":
    main()
