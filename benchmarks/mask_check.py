"""What comparing a mask that is data with its structure costs before a call, beside the attention it stands before.

A mask ``(batch, 1, n, n)`` of causal attention with padding is an argument of the model. Timed are the comparison of a new
mask, of a new one of packed documents, of one that was looked at before, exact attention with the mask as it is (SDPA), and
``fma``.

    python benchmarks/mask_check.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import Rows
from torch import Tensor, nn

import fastattn_compile.backend as backend
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "mask_check.json"
HEADS, CHANNELS = 8, 64


class Attention(nn.Module):
    """SDPA whose mask is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times[1:]), 2)


def guarded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Callable[..., Tensor], backend.MaskGuard]:
    """SDPA compiled for a mask, and what is asked before every call."""
    torch.compiler.reset()
    backend.reset()
    options = {"operator": "fma", "compiler": "eager", "quiet": True}
    fast = torch.compile(Attention(), backend="fastattn", dynamic=False, options=options)
    fast(q, k, v, mask)
    (record,) = backend.records()
    if record.guard is None or not record.decisions[0].softmax.checked:
        raise RuntimeError(f"the mask was not read: {record.decisions}")
    return fast, record.guard


@torch.no_grad()
def measure(n: int, repeats: int) -> dict[str, float]:
    """The times of a length."""
    q, k, v = torch.randn(3, 2, HEADS, n, CHANNELS)
    seen = torch.ones(n, n, dtype=torch.bool).tril() & (torch.arange(n) < n - 7)
    document = torch.arange(n) // 700
    packed = seen & (document == document[:, None])

    def new(guard: backend.MaskGuard, mask: Tensor) -> float:
        masks = itertools.cycle([mask.clone(), mask])  # neither is the one that was looked at last
        return milliseconds(lambda: guard.check.broken([q, k, v, next(masks)]), repeats)

    masks = [torch.zeros(2, 1, n, n).masked_fill(~x, torch.finfo(torch.float32).min) for x in (packed, seen)]
    of_documents = new(guarded(q, k, v, masks[0])[1], masks[0])
    inputs = [q, k, v, masks[1]]
    fast, guard = guarded(*inputs)
    times = {
        "new_mask_ms": new(guard, masks[1]),
        "new_packed_mask_ms": of_documents,
    }
    fast(*inputs)
    return times | {
        "same_mask_ms": milliseconds(lambda: guard.check.broken(inputs), repeats),
        "exact_ms": milliseconds(lambda: Attention()(*inputs), repeats),
        "fma_ms": milliseconds(lambda: fast(*inputs), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(args.json, "fastattn.mask_check/1", ("n",), {"provenance": {"versions": versions()}})
    for n in args.lengths:
        row = {"n": n, "batch": 2, "heads": HEADS, "head_dim": CHANNELS, **measure(n, args.repeats)}
        rows.put(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
