"""What leaf size and group of Barnes-Hut attention trade: divergence of SmolLM2-135M against time.

All rows open as many keys, 256 a query. Divergence is that of the whole model with every head of every layer replaced,
nothing trained. Time is the processor time of one thread for one head of random tensors of ``--time-length`` tokens,
selection included; beside it stands the best exact attention's in the same run.

    python benchmarks/barnes_hut_trade.py --plot docs/barnes_hut_trade.svg
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import Rows
from smollm2 import attention, by_operator, loaded, site

from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "barnes_hut_trade.json"
OPENED = 256  # keys a query
LEAVES, GROUPS = (2, 4, 8, 16), (1, 4, 16, 32)


def processor_ms(call: Any, repeats: int) -> float:
    """The median processor time of some calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


@torch.no_grad()
def forward_ms(operator: Operator, length: int) -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 64, generator=generator) for _ in range(3))
    given = AttentionInputs(q, k, v, 0.125, CAUSAL)
    return processor_ms(lambda: operator.forward(given), 5)


@torch.no_grad()
def exact_ms(length: int) -> float:
    q, k, v = (torch.randn(1, 1, length, 64) for _ in range(3))
    return processor_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against time, one line a group, the leaf size at each point."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for group in GROUPS:
        mine = sorted((r for r in rows if r["group"] == group), key=lambda r: r["leaf"])
        axes.plot([r["ms"] for r in mine], [r["kl"] for r in mine], marker="o", label=f"group {group}")
        for r in mine:
            axes.annotate(
                str(r["leaf"]), (r["ms"], r["kl"]), textcoords="offset points", xytext=(4, 4), fontsize=8
            )
    axes.set(xscale="log", yscale="log", xlabel="ms, one head, one thread", ylabel="KL at 2048 tokens")
    axes.set_title(f"Leaf size at each point; {OPENED} opened keys a query")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens that quality is measured on")
    parser.add_argument("--time-length", type=int, default=16384, help="tokens that time is measured on")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    parser.add_argument("--times", action="store_true", help="measure times again, keep the quality")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = loaded(args.length)
    model, ids = given.model, given.inputs["input_ids"]
    spec, exact = site(model, args.length), None
    origin = provenance(
        model, given.inputs, seed=0, context={"benchmark": "barnes_hut_trade", "text": given.source}
    )
    rows = Rows(
        args.json, "fastattn.barnes_hut_trade/1", ("leaf", "group"),
        {"n": args.length, "time_n": args.time_length, "provenance": origin}, args.fresh,
    )  # fmt: skip
    baseline = exact_ms(args.time_length)
    for group in GROUPS:
        for leaf in LEAVES:
            operator = make_operator("barnes_hut", leaf=leaf, group=group, open=OPENED // leaf)
            row = rows.find({"leaf": leaf, "group": group})
            if row is not None and not args.times:
                continue
            if row is None:
                row = {
                    "leaf": leaf, "group": group, "config": operator.config.to_dict(),
                    "keys_per_query": operator.cost(spec).keys_per_query,
                }  # fmt: skip
                with torch.no_grad():
                    if exact is None:
                        exact = model(input_ids=ids, use_cache=False).logits
                    with attention(model, by_operator(operator, {})):
                        logits = model(input_ids=ids, use_cache=False).logits
                summary = summarise(compare_logits(exact, logits, ids))
                if summary is None:
                    raise ValueError("no token has a label")
                row |= {"kl": summary.kl, "top1": summary.top1}
            rows.put(row | {"ms": forward_ms(operator, args.time_length), "exact_ms": baseline})
            print({k: row.get(k) for k in ("leaf", "group", "kl", "top1", "ms")}, flush=True)
    for row in rows.all:
        print(
            f"leaf {row['leaf']:2d} group {row['group']:2d}: KL {row['kl']:.4f}, top-1 {row['top1'] * 100:.1f} %, "
            f"{row['ms']:.0f} ms, x{row['exact_ms'] / row['ms']:.1f}"
        )
    if args.plot:
        draw(rows.all, args.plot)


if __name__ == "__main__":
    main()
