"""Running ONNX models in ONNX Runtime, in this process for values and in a fresh one for time and memory.

python -m fastattn_compile.converting.run model.onnx inputs.npz repeats threads
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.files import high_water_mark


class RuntimeFailure(FastAttentionError):
    """ONNX Runtime cannot load or run a model."""


@dataclass(frozen=True)
class Timing:
    """What a model costs in a fresh process.

    Args:
        ms: Median time of a run.
        load_seconds: Time until the session could run.
        peak_bytes: Memory of a run beyond what the session held, ``None`` where it cannot be measured.
    """

    ms: float
    load_seconds: float
    peak_bytes: int | None


def session(model: str | bytes, threads: int = 0, what: str = "the model") -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: A path, or the bytes of a model without external data.
        threads: Threads of one operator; 0 leaves it to the runtime.
        what: Of the model, for the message.

    Raises:
        RuntimeFailure: The runtime does not load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # every failure is an exception class of its own
        raise RuntimeFailure(
            f"{what} does not load in ONNX Runtime {onnxruntime.__version__}: {_first_line(error)}"
        ) from error


def run(made: Any, feeds: dict[str, NDArray[Any]], what: str) -> dict[str, NDArray[Any]]:
    """Runs a session; outputs by name.

    Args:
        made: A session.
        feeds: Inputs by name.
        what: Of the model, for the message.

    Raises:
        RuntimeFailure: The run failed.
    """
    names = [output.name for output in made.get_outputs()]
    try:
        return dict(zip(names, made.run(names, feeds)))
    except Exception as error:  # every failure is an exception class of its own
        sizes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
        raise RuntimeFailure(f"{what} does not run on {sizes}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What the runtime says, without its codes and the name of the file, which is a copy that goes away."""
    text = re.sub(
        r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?(Load model from .*? failed:)?",
        "",
        " ".join(str(error).split()),
    )
    return text[:300]


def timed(model: Path, feeds: Path, repeats: int, threads: int) -> Timing:
    """Times a model in a process of its own.

    Raises:
        RuntimeFailure: The process failed.
    """
    command = [
        sys.executable,
        "-m",
        "fastattn_compile.converting.run",
        str(model),
        str(feeds),
        str(repeats),
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeFailure(f"the process that times {model.name} failed: {done.stderr.strip()[-300:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def _main(model: str, feeds: str, repeats: str, threads: str) -> None:
    with np.load(feeds, allow_pickle=False) as archive:
        given = {name: archive[name] for name in archive.files}
    start = time.perf_counter()
    made = session(model, int(threads))
    load = time.perf_counter() - start
    with high_water_mark() as mark:
        run(made, given, "the model")
    spent = []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        run(made, given, "the model")
        spent.append((time.perf_counter() - start) * 1e3)
    print(json.dumps({"ms": statistics.median(spent), "load_seconds": load, "peak_bytes": mark.bytes}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
