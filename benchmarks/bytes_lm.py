"""A byte-level language model trained from scratch with every causal operator, on the same budget of steps.

Training text is every module of Python's standard library that is not evaluated on; bits per byte are of the
evaluation modules, over all positions and over the second half of a sequence. ``window`` stands beside FMA at
equal keys a query.

    python benchmarks/bytes_lm.py --steps 500
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from small_model import Decoder, Sizes, Trial, build, train, window_of
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.reporting.provenance import versions
from fastattn_compile.reporting.text import EVALUATION, stdlib_text

RESULTS = Path(__file__).parent / "results" / "bytes_lm.json"


def trials(sizes: Sizes) -> list[Trial]:
    fma = {"block": 32, "rank": 4, "sinks": 4, "rotary_base": sizes.rotary_base}
    plain = Trial("fma", "fma", fma)
    return [
        Trial("exact", "exact", {}),
        plain,
        window_of(plain, sizes),
        Trial("fma, depthwise", "fma", {**fma, "basis": "depthwise"}),
        Trial("tf_attention", "tf_attention", {"height": 3, "window": 32, "sinks": 4}),
        Trial("tc_attention", "tc_attention", {"height": 4}),
        Trial(
            "cast", "cast",
            {"clusters": 16, "cluster_size": 32, "clustering": "token_choice", "select": "key"},
        ),
        Trial("conv_basis", "conv_basis", {"k": 64}),
        Trial("barnes_hut", "barnes_hut", {"block": 32, "open": 4, "leaf": 4, "beam": 8}),
        Trial("linformer", "linformer", {"rank": 64}),
    ]  # fmt: skip


def training_text() -> str:
    names = sorted(
        n for n in sys.stdlib_module_names if n not in EVALUATION and n not in ("this", "antigravity")
    )
    random.Random(0).shuffle(names)
    return stdlib_text(8_000_000, [n for n in names if not n.startswith("_")])


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("utf-8", "ignore")), dtype=torch.uint8).long()


def batches(text: Tensor, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for every operator."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length - 1, (size,), generator=generator).tolist()
        ids = torch.stack([text[s : s + length + 1] for s in starts])
        yield ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def bits_per_byte(model: Decoder, text: Tensor, length: int, sequences: int) -> tuple[float, float]:
    """Of all positions, and of those in the second half of their sequence."""
    # Sequences spread over the whole text, not its first module alone.
    starts = torch.linspace(0, len(text) - length - 1, sequences).long().tolist()
    ids = torch.stack([text[s : s + length + 1] for s in starts])
    losses = [
        F.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none")
        for part in ids.split(8)
    ]
    bits = torch.cat(losses) / math.log(2)
    return bits.mean().item(), bits[:, length // 2 :].mean().item()


def run(
    trial: Trial, sizes: Sizes, args: argparse.Namespace, text: Tensor, held_out: Tensor
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": trial.name, "operator": trial.operator, "seed": args.seed, "reason": ""}
    operator = trial.make()
    row |= {"config": operator.config.to_dict(), "steps": args.steps, "rotary_base": args.rotary_base}
    support = operator.supports(sizes.site)
    if not support:
        return row | {"reason": support.reason}
    start = time.process_time()
    source = batches(text, args.batch, sizes.length, args.seed)

    def watch(step: int, loss: float) -> bool:
        if step % 20 == 0 or step == 1:
            spent = time.process_time() - start
            print(f"  {trial.name}: step {step} {loss / math.log(2):.3f} bits, {spent:.0f} s", flush=True)
        return False

    try:
        model = build(trial, sizes, next(source)[0], args.seed)
        train(model, source, steps=args.steps, rate=args.rate, watch=watch)
    except (FloatingPointError, FastAttentionError) as error:
        return row | {"reason": str(error)}
    bits, late = bits_per_byte(model, held_out, sizes.length, args.sequences)
    return row | {
        "bits_per_byte": round(bits, 4), "bits_second_half": round(late, 4),
        "keys_per_query": round(operator.cost(sizes.site).keys_per_query, 1),
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument(
        "--rotary-base", type=float, default=0.0, help="of a rotary embedding; 0, learned positions"
    )
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=48, help="sequences evaluated")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(256, args.length, args.width, args.layers, args.heads, args.rotary_base)
    text, held_out = as_bytes(training_text()), as_bytes(stdlib_text(10_000_000))
    setup = {
        name: getattr(args, name)
        for name in ("batch", "length", "width", "layers", "heads", "rotary_base", "rate")
    }
    setup |= {"training_bytes": len(text), "evaluation_bytes": len(held_out)}
    rows = Rows(
        args.json, "fastattn.bytes_lm/1", ("name", "config", "steps", "seed", "rotary_base"),
        {"setup": setup, "provenance": {"versions": versions()}},
    )  # fmt: skip
    for trial in trials(sizes):
        if args.only and trial.name not in args.only:
            continue
        key = {
            "name": trial.name,
            "config": trial.make().config.to_dict(),
            "steps": args.steps,
            "seed": args.seed,
            "rotary_base": args.rotary_base,
        }
        row = None if args.fresh else rows.find(key)
        if row is None:
            row = run(trial, sizes, args, text, held_out)
            rows.put(row)
        print({k: row[k] for k in row if k not in ("config", "operator")}, flush=True)


if __name__ == "__main__":
    main()
