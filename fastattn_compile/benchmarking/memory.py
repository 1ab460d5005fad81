"""Memory that one call needs beyond its inputs, its output included.

On a GPU the allocator counts. On a CPU (Linux) a fresh process runs the call and reads its own high-water mark, which the
kernel is told to forget just before: nothing that ran earlier hides the peak.

    python -m fastattn_compile.benchmarking.memory '{"operator": "fma", "n": 4096}'
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastattn_compile.benchmarking.case import Case
from fastattn_compile.files import high_water_mark

_WARM_UP = 2048


def peak_bytes(case: Case, threads: int) -> int | None:
    """Peak memory of a case in bytes; ``None`` where it cannot be measured.

    Args:
        case: The case.
        threads: Threads of torch.
    """
    if case.device == "cuda":
        return _peak_on_gpu(case)
    if not Path("/proc/self/clear_refs").exists():
        return None
    given = {**dataclasses.asdict(case), "threads": threads}
    command = [sys.executable, "-m", "fastattn_compile.benchmarking.memory", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def _peak_on_gpu(case: Case) -> int:
    call = _call(case)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _call(case: Case) -> Callable[[], Any]:
    operator, tensors = case.make_operator(), case.tensors()
    parameters = case.parameters(operator, case.inputs(tensors))
    return case.step(case.attention(operator, parameters), tensors)


def _main(text: str) -> None:
    given = json.loads(text)
    torch.set_num_threads(given.pop("threads"))
    case = Case(**given)
    # Compilers, caches and thread pools come to rest on a short sequence.
    _call(dataclasses.replace(case, n=min(case.n, _WARM_UP)))()
    call = _call(case)
    with high_water_mark() as mark:
        call()
    print(mark.bytes)


if __name__ == "__main__":
    _main(sys.argv[1])
