"""How time and memory of every operator grow with the length: slopes in log-log, on one CPU core.

Time is the processor time of one thread, the median of several calls, so that other work on the machine
counts little. Memory is what a call needs beyond its inputs, its output included, in a fresh process (Linux).
A slope is that of the straight line of least squares through all lengths. Configurations follow the length
where the operator is meant so: trees are as high as leaves of about 64 keys ask for, CAST has sqrt(n)
clusters.

    python benchmarks/slopes.py                     # what the file does not hold yet
    python benchmarks/slopes.py --only window cast --fresh
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor

from fastattn_compile.benchmarking.case import BOTH, FORWARD, Case
from fastattn_compile.files import high_water_mark
from fastattn_compile.kernels.dispatch import chosen_kernels
from fastattn_compile.machine import device_name
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "slopes.json"
LENGTHS = (4096, 8192, 16384, 32768, 65536)
LEAF = 64
CALIBRATION = 4096  # tokens that learned parameters start from

# name of the series: operator, causal, options at a length, and the slope that was promised
Series = tuple[str, bool, Callable[[int], dict[str, Any]], float]


def height(n: int) -> int:
    return int(math.log2(n // LEAF))


def clusters(n: int) -> int:
    return math.isqrt(n)


def image(n: int) -> tuple[int, int]:
    """Height and width of an image of n tokens, n a power of two: as wide as high, or twice."""
    height = 1 << (n.bit_length() - 1) // 2
    return height, n // height


SERIES: dict[str, Series] = {
    "fma": ("fma", True, lambda n: {}, 1.15),
    "fma grid": ("fma", False, lambda n: {"grid": image(n)}, 1.15),
    "fma pooled queries": ("fma", False, lambda n: {"sinks": 0, "queries": "pooled"}, 1.15),
    "barnes_hut": ("barnes_hut", True, lambda n: {}, 1.15),
    "tf_attention": ("tf_attention", True, lambda n: {"height": height(n)}, 1.15),
    "tc_attention": ("tc_attention", True, lambda n: {"height": height(n)}, 1.15),
    "window": ("window", True, lambda n: {}, 1.15),
    "linformer": ("linformer", False, lambda n: {}, 1.15),
    "cast": ("cast", False, lambda n: {"clusters": clusters(n)}, 1.6),
    "cast sa_topk": ("cast", False, lambda n: {"clusters": clusters(n), "clustering": "sa_topk"}, 1.6),
    "cast causal": (
        "cast",
        True,
        lambda n: {
            "clusters": clusters(n), "cluster_size": clusters(n), "clustering": "token_choice", "select": "key",
        },
        1.6,
    ),
    "conv_basis": ("conv_basis", True, lambda n: {"k": 16}, 1.2),
}  # fmt: skip


def case_of(name: str, n: int, args: argparse.Namespace) -> Case:
    operator, causal, options, _ = SERIES[name]
    sizes = {"heads": args.heads, "kv_heads": args.heads, "head_dim": args.head_dim}
    return Case(operator=operator, options=options(n), n=n, causal=causal, direction=args.direction, **sizes)


def call_of(case: Case) -> Callable[[], Any]:
    """One call, ready to be measured; learned parameters start from the first tokens."""
    operator, tensors = case.make_operator(), case.tensors()
    parameters: tuple[Tensor, ...] = ()
    if operator.learned:
        q, k, v = (x.detach()[:, :, :CALIBRATION].contiguous() for x in tensors)
        sample = AttentionInputs(q, k, v, case.head_dim**-0.5, case.mask)
        parameters = tuple(operator.initial_parameters(case.spec(), sample).values())
    return case.step(case.attention(operator, parameters), tensors)


def cpu_ms(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def peak_bytes(name: str, n: int, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory-of", name, str(n), "--direction", args.direction]
    command += ["--heads", str(args.heads), "--head-dim", str(args.head_dim)]
    # Blocks of this size go back to the system when they are freed, so that none hides the peak of a later call.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.split()[-1])


def report_memory(name: str, n: int, args: argparse.Namespace) -> None:
    call_of(case_of(name, 2048, args))()  # caches and thread pools come to rest on a short sequence
    call = call_of(case_of(name, n, args))
    with high_water_mark() as mark:
        call()
    print(mark.bytes)


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Slope of the straight line of least squares in log-log."""
    if len(lengths) < 2 or not all(values):
        return None
    return round(
        statistics.linear_regression([math.log(n) for n in lengths], [math.log(v) for v in values])[0], 3
    )


def slopes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, direction in dict.fromkeys((row["series"], row["direction"]) for row in rows):
        mine = [row for row in rows if (row["series"], row["direction"]) == (name, direction)]
        mine.sort(key=lambda row: row["n"])
        lengths = [row["n"] for row in mine]
        time_slope = slope(lengths, [row["cpu_ms"] for row in mine])
        memory_slope = slope(lengths, [row["peak_bytes"] for row in mine])
        bound = SERIES[name][3]
        met = all(s is not None and s <= bound for s in (time_slope, memory_slope))
        found.append(
            {"series": name, "direction": direction, "lengths": lengths, "time": time_slope,
             "memory": memory_slope, "bound": bound, "met": met}
        )  # fmt: skip
    return found


def measure(name: str, n: int, args: argparse.Namespace, peak: int | None) -> dict[str, Any]:
    case = case_of(name, n, args)
    call = call_of(case)
    first = cpu_ms(call)
    repeats = int(min(7, max(2, args.seconds * 1e3 / max(first, 1e-3))))
    peak = peak_bytes(name, n, args) if peak is None else peak
    spent = statistics.median([cpu_ms(call) for _ in range(repeats)])
    return {
        "series": name, "operator": case.operator, "config": case.make_operator().config.to_dict(),
        "causal": case.causal, "heads": case.heads, "head_dim": case.head_dim, "direction": case.direction,
        "n": n, "cpu_ms": round(spent, 3), "repeats": repeats, "peak_bytes": peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--direction", choices=[FORWARD, BOTH], default=FORWARD)
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on one row, about")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    parser.add_argument("--times", action="store_true", help="measure times again, keep the memory")
    parser.add_argument("--memory-of", nargs=2, metavar=("SERIES", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        report_memory(args.memory_of[0], int(args.memory_of[1]), args)
        return
    provenance = {
        "versions": versions(), "device": device_name(torch.device("cpu")), "threads": 1,
        "kernels": chosen_kernels(),
    }  # fmt: skip
    rows = Rows(
        args.json, "fastattn.slopes/1", ("series", "direction", "heads", "head_dim", "n"),
        {"slopes": [], "provenance": provenance},
    )  # fmt: skip
    for name in args.only:
        for n in args.lengths:
            wanted = {"series": name, "direction": args.direction, "heads": args.heads,
                      "head_dim": args.head_dim, "n": n}  # fmt: skip
            row = None if args.fresh else rows.find(wanted)
            if row is None or args.times:
                row = measure(name, n, args, row["peak_bytes"] if row else None)
                rows.put(row)
                rows.put(row, slopes=slopes(rows.all))
            print(
                f"{name:14} {args.direction} {n:6} {row['cpu_ms']:10.1f} ms {row['peak_bytes'] / 2**20:8.1f} MiB",
                flush=True,
            )
    print("\nseries         direction   time memory  bound")
    for found in slopes(rows.all):
        print(json.dumps(found) if found["time"] is None else
              f"{found['series']:14} {found['direction']:9} {found['time']:6.2f} {found['memory']:6.2f} "
              f"{found['bound']:6.2f} {'' if found['met'] else 'missed'}")  # fmt: skip


if __name__ == "__main__":
    main()
