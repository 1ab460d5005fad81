"""Biases by distance and packed documents on a CPU, against exact attention that is given them as a dense mask.

Every row is one run in which both take turns; the numbers are medians. PyTorch's exact attention has no other way to be
told of slopes, of numbers by distance or of documents than a tensor of the size of the scores.

    python benchmarks/biases.py --lengths 2048 4096 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.machine import device_name
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.provenance import versions
from fastattn_compile.reporting.timing import elapsed_ms, interleaved_ms

RESULTS = Path(__file__).parent / "results" / "biases.json"
DOCUMENT = 700
Tensors = tuple[Tensor, Tensor, Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--operators", nargs="+", default=["fma", "window"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    return parser.parse_args()


def facts(kind: str, heads: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """What an operator is given, and the same as a dense mask of the scores."""
    place = torch.arange(n)
    distance = place - place[:, None]
    hidden = distance > 0
    if kind == "documents":
        numbers = (place // DOCUMENT)[None]
        dense = torch.zeros(1, 1, n, n).masked_fill(hidden | (numbers.mT != numbers), -torch.inf)
        return {"segments": numbers}, dense
    if kind == "alibi":
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        bias, dense = slopes, -slopes[:, None, None] * distance.abs()
    else:
        bias = torch.randn(heads, 2 * n - 1)
        dense = bias[:, distance + n - 1]
    return {"bias": bias}, dense.masked_fill(hidden, -torch.inf)[None]


def step(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], given: Tensors, both: bool
) -> Callable[[], Any]:
    if not both:
        return lambda: attention(*given)
    given = tuple(x.clone().requires_grad_() for x in given)  # type: ignore[assignment]
    seed = torch.randn_like(given[0])
    return lambda: torch.autograd.grad(attention(*given), given, seed)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    head = {"device": device_name(torch.device("cpu")), "threads": args.threads, "versions": versions()}
    rows = Rows(
        args.json, "fastattn.bench/1", ["operator", "kind", "n", "direction", "heads", "head_dim"], head
    )
    for n in args.lengths:
        q, k, v = (torch.randn(1, args.heads, n, args.head_dim) for _ in range(3))
        for kind in ("alibi", "bucketed", "documents"):
            given, dense = facts(kind, args.heads, n)
            for name in args.operators:
                operator = make_operator(name)

                def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    return attend(q, k, v, operator, mask="causal", **given)[0]  # noqa: B023  called here

                def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)  # noqa: B023

                for both in (False, True):
                    calls = [step(attention, (q, k, v), both) for attention in (fast, exact)]
                    for call in calls:
                        elapsed_ms(call)
                    ms, baseline_ms = interleaved_ms(calls, args.repeats)
                    row = {
                        "operator": name, "config": operator.config.to_dict(), "kind": kind, "device": "cpu",
                        "dtype": "float32", "heads": args.heads, "kv_heads": args.heads, "head_dim": args.head_dim,
                        "n": n, "causal": True, "direction": "both" if both else "forward", "ms": round(ms, 2),
                        "baseline": "scaled_dot_product_attention with a dense mask",
                        "baseline_ms": round(baseline_ms, 2), "ratio": round(baseline_ms / ms, 2),
                        "repeats": args.repeats,
                    }  # fmt: skip
                    rows.put(row)
                    print(
                        f"{name:8} {kind:10} {row['direction']:8} {n:6} {ms:9.1f} ms  exact {baseline_ms:9.1f} ms  "
                        f"{row['ratio']:6.1f}x",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
