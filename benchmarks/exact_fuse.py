"""What exact sites gain as SDPA by structure (``exact_fuse``), against the model as it is and against Inductor.

A Llama of random weights with eager attention and a padding mask, as transformers writes it: its mask is a tensor of n x n.
Every row is a process of its own: the median time of a call on one thread, and its peak memory, the
compiler's included.

    python benchmarks/exact_fuse.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import Rows

from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "exact_fuse.json"
WAYS = ("eager", "inductor", "exact_fuse")
KEY = ("way", "n", "direction", "window")


def model(window: int) -> Any:
    """Two layers of eight heads of 32 channels that share four key heads, with a window or without."""
    import transformers

    sizes = {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16384, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = (
        transformers.MistralConfig(sliding_window=window, **sizes)
        if window
        else transformers.LlamaConfig(**sizes)
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def measure(way: str, n: int, direction: str, window: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    made = model(window).train(direction == "training")
    ids = torch.randint(256, (1, n))
    real = torch.ones(1, n, dtype=torch.long)
    real[0, n - 9 :] = 0
    nothing = {"schema": "fastattn.plan/1", "sites": {}}
    run = {
        "eager": lambda: made,
        "inductor": lambda: torch.compile(made, dynamic=False),
        "exact_fuse": lambda: torch.compile(
            made,
            backend="fastattn",
            dynamic=False,
            options={"plan": nothing, "exact_fuse": True, "quiet": True},
        ),
    }[way]()

    def call() -> None:
        with torch.set_grad_enabled(direction == "training"):
            out = run(input_ids=ids, attention_mask=real, labels=ids if direction == "training" else None)
            if direction == "training":
                out.loss.backward()
                made.zero_grad(set_to_none=True)

    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {
        "way": way, "n": n, "direction": direction, "window": window,
        "ms": round(1e3 * statistics.median(times), 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument(
        "--directions", nargs="+", default=["forward", "training"], choices=["forward", "training"]
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256], help="0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        way, n, direction, window = args.row
        print(json.dumps(measure(way, int(n), direction, int(window), args.repeats)))
        return
    rows = Rows(args.json, "fastattn.exact_fuse/1", KEY, {"provenance": {"versions": versions()}}, args.fresh)
    for direction in args.directions:
        for window in args.windows:
            for n in args.lengths:
                for way in WAYS:
                    key = {"way": way, "n": n, "direction": direction, "window": window}
                    if rows.find(key) is None:
                        command = [
                            sys.executable,
                            __file__,
                            "--repeats",
                            str(args.repeats),
                            "--row",
                            way,
                            str(n),
                        ]
                        done = subprocess.run(
                            [*command, direction, str(window)], capture_output=True, text=True, check=True
                        )
                        rows.put(json.loads(done.stdout.splitlines()[-1]))
                    row = rows.find(key)
                    print({k: row[k] for k in (*KEY, "ms", "peak_bytes")} if row else "", flush=True)


if __name__ == "__main__":
    main()
