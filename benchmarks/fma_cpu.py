"""Fast multipole attention on a CPU against PyTorch's exact attention: time, ratio, share of the floor, memory.

Every row is one run in which both take turns, so that a busy moment of the machine hits both; the numbers are
medians. The floor is the time that the operator's own floating-point operations (or bytes) would take at the best
rate this machine shows for a product (or a copy) in the same run. Peak memory is the growth of the resident set
of a fresh process during one call, its output included (Linux).

    python benchmarks/fma_cpu.py --lengths 1024 4096 16384
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.files import write_json
from fastattn_compile.operators.base import SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.provenance import device_name, versions
from fastattn_compile.reporting.timing import elapsed_ms, interleaved_ms

RESULTS = Path(__file__).parent / "results" / "fma_cpu.json"
FORWARD, BOTH = "forward", "both"
# A backward pass computes the scores again and has four products more: five for the two of the forward pass.
WORK = {FORWARD: 1.0, BOTH: 3.5}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 65536])
    parser.add_argument(
        "--both-up-to", type=int, default=16384, help="longest length timed with its backward"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="time to spend on one row, about")
    parser.add_argument(
        "--patience", type=float, default=0, help="seconds to wait for an idle machine before a row (Linux)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--memory-of", choices=["fma", "exact"], help=argparse.SUPPRESS)
    return parser.parse_args()


def tensors(args: argparse.Namespace, n: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, args.dtype)
    q = torch.randn(1, args.heads, n, args.head_dim, dtype=dtype, requires_grad=grad)
    k, v = (
        torch.randn(1, args.kv_heads, n, args.head_dim, dtype=dtype, requires_grad=grad) for _ in range(2)
    )
    return q, k, v


def attentions(args: argparse.Namespace) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    operator = make_operator("fma", block=args.block, rank=args.rank, sinks=args.sinks)
    mask = NO_MASK if args.bidirectional else CAUSAL
    return {
        "fma": lambda q, k, v: attend(q, k, v, operator, mask=mask)[0],
        "exact": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=not args.bidirectional, enable_gqa=args.heads != args.kv_heads
        ),
    }


def step(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    given: tuple[Tensor, Tensor, Tensor],
    direction: str,
) -> Callable[[], Any]:
    if direction == FORWARD:
        return lambda: attention(*given)
    seed = torch.randn_like(given[0])
    return lambda: torch.autograd.grad(attention(*given), given, seed)


def best_rates() -> tuple[float, float]:
    """Floating-point operations and bytes a second: the best of some products, and of a copy."""
    flops = 0.0
    for batch, rows, inner, columns in ((16, 64, 64, 192), (16, 64, 192, 64), (1, 1024, 1024, 1024)):
        a, b = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
        ms = min(elapsed_ms(lambda a=a, b=b: torch.bmm(a, b)) for _ in range(20))
        flops = max(flops, 2e3 * batch * rows * inner * columns / ms)
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    ms = min(elapsed_ms(lambda: target.copy_(source)) for _ in range(10))
    return flops, 2e3 * source.numel() * 4 / ms


def peak_bytes(args: argparse.Namespace, n: int, which: str) -> int:
    """Memory that one forward call needs beyond its inputs, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", which, "--lengths", str(n), "--dtype", args.dtype]
    for name in ("heads", "kv_heads", "head_dim", "block", "rank", "sinks", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.bidirectional:
        command.append("--bidirectional")
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(args: argparse.Namespace) -> None:
    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    attention = attentions(args)[args.memory_of]
    attention(*tensors(args, 32 * args.block))
    given = tensors(args, args.lengths[0])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    attention(*given)
    print(max(0, status("VmHWM") - before))


def wait_until_idle(patience: float) -> None:
    """Waits until the processors have been idle for a second, or patience ends."""

    def ticks() -> tuple[int, int]:
        counts = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(counts), counts[3] + counts[4]

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        (total, idle), _ = ticks(), time.sleep(1)
        now, now_idle = ticks()
        if now_idle - idle > 0.95 * (now - total):
            return


def measure(args: argparse.Namespace, n: int, direction: str, rates: tuple[float, float]) -> dict[str, Any]:
    given = tensors(args, n, grad=direction == BOTH)
    calls = [step(attention, given, direction) for attention in attentions(args).values()]
    once = [elapsed_ms(call) for call in calls]
    repeats = int(min(15, max(1, args.seconds * 1e3 / sum(once) - 1)))
    ms, baseline_ms = interleaved_ms(calls, repeats)
    operator = make_operator("fma", block=args.block, rank=args.rank, sinks=args.sinks)
    mask = NO_MASK if args.bidirectional else CAUSAL
    sizes = (1, args.heads, args.kv_heads, n, n, args.head_dim, args.head_dim)
    cost = operator.cost(SiteSpec(*sizes, dtype=given[0].dtype, mask=mask))
    floor_ms = 1e3 * max(cost.flops / rates[0], cost.bytes / rates[1]) * WORK[direction]
    return {
        "operator": "fma",
        "config": operator.config.to_dict(),
        "device": "cpu",
        "dtype": args.dtype,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "n": n,
        "causal": not args.bidirectional,
        "direction": direction,
        "ms": round(ms, 3),
        "baseline": "scaled_dot_product_attention",
        "baseline_ms": round(baseline_ms, 3),
        "ratio": round(baseline_ms / ms, 2),
        "peak_bytes": peak_bytes(args, n, "fma") if direction == FORWARD else None,
        "floor_fraction": round(floor_ms / ms, 3),
        "repeats": repeats,
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        report_memory(args)
        return
    wait_until_idle(args.patience)
    rates = best_rates()
    print(f"best rates of this machine: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.0f} GB/s")
    print("direction      n     fma ms   exact ms   ratio  floor  peak MB  B/token")
    rows = []
    for direction in (FORWARD, BOTH):
        for n in args.lengths:
            if direction == BOTH and n > args.both_up_to:
                continue
            wait_until_idle(args.patience)
            row = measure(args, n, direction, rates)
            rows.append(row)
            peak = row["peak_bytes"]
            memory = f"{peak / 2**20:8.1f} {peak / n:8.0f}" if peak is not None else ""
            print(
                f"{direction:9} {n:6} {row['ms']:10.2f} {row['baseline_ms']:10.2f} {row['ratio']:6.1f}x "
                f"{row['floor_fraction']:6.0%} {memory}",
                flush=True,
            )
            provenance = {
                "versions": versions(),
                "device": device_name(torch.device("cpu")),
                "system": platform.platform(terse=True),
                "threads": args.threads,
                "flops_per_second": round(rates[0]),
                "bytes_per_second": round(rates[1]),
                "load": round(os.getloadavg()[0], 2),
            }
            write_json(args.json, {"schema": "fastattn.bench/1", "rows": rows, "provenance": provenance})


if __name__ == "__main__":
    main()
