"""Peak memory of one call on long sequences on a CPU, each in a fresh process: what it needs beyond query, key and value.

python benchmarks/memory_cpu.py --lengths 65536 262144
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rows import Rows

from fastattn_compile.benchmarking.case import Case
from fastattn_compile.benchmarking.memory import peak_bytes
from fastattn_compile.machine import device_name
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "memory_cpu.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--operators", nargs="+", default=["fma", "window", "barnes_hut", "tf_attention"])
    parser.add_argument("--group", type=int, default=16, help="queries that share a choice in barnes_hut")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--direction", default="forward", choices=["forward", "both"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    return parser.parse_args()


def main() -> None:
    """Measures case after case; every row is written as soon as it is there."""
    asked = parse()
    head = {
        "device": device_name(torch.device("cpu")),
        "threads": asked.threads,
        "versions": versions(),
    }
    rows = Rows(
        asked.json, "fastattn.memory/1", ("operator", "config", "n", "heads", "head_dim", "direction"), head
    )
    for name in asked.operators:
        options = {"group": asked.group} if name == "barnes_hut" else {}
        for n in asked.lengths:
            case = Case(
                operator=name, options=options, n=n, heads=asked.heads, kv_heads=asked.heads,
                head_dim=asked.head_dim, direction=asked.direction,
            )  # fmt: skip
            peak = peak_bytes(case, asked.threads)
            inputs = sum(x.numel() * x.element_size() for x in dataclasses.replace(case, n=1).tensors()) * n
            rows.put({
                "operator": name, "config": case.make_operator().config.to_dict(), "n": n, "heads": asked.heads,
                "head_dim": asked.head_dim, "direction": asked.direction, "dtype": case.dtype,
                "peak_bytes": peak, "input_bytes": inputs,
            })  # fmt: skip
            found = "not measurable here" if peak is None else f"{peak / 2**30:.2f} GiB"
            print(f"{name} n={n} {asked.direction}: {found} beyond {inputs / 2**30:.2f} GiB of inputs")


if __name__ == "__main__":
    main()
