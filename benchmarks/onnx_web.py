"""The same file in ONNX Runtime Web under Node, against its own exact attention. Needs Node and the package:

npm install --no-save onnxruntime-web@1.30.0
python benchmarks/onnx_web.py --lengths 1024 2048 4096
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from onnx_fma import CHANNELS, HEADS, device_name_of_cpu, exact, fast, feeds

from fastattn_compile.files import write_json
from fastattn_compile.operators.registry import make_operator

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "onnx_web.json"


def run_in_web(
    package: Path,
    models: list[tuple[str, onnx.ModelProto, dict[str, np.ndarray]]],
    repeats: int,
    threads: int = 1,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs models in turns.

    Args:
        package: The folder in which ``npm install onnxruntime-web`` was run.
        models: Name, model, inputs.
        repeats: Timed runs of each.
        threads: Of WebAssembly.

    Returns:
        What ``onnx_web.mjs`` prints, and the first output of each model that ran, flat.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        job: dict[str, Any] = {
            "package": str(package.resolve()),
            "threads": threads,
            "repeats": repeats,
            "models": [],
        }
        for name, model, given in models:
            onnx.save(model, str(place / f"{name}.onnx"))
            inputs = {}
            for key, array in given.items():
                array.astype(np.float32).tofile(place / f"{name}.{key}.bin")
                inputs[key] = {"path": str(place / f"{name}.{key}.bin"), "dims": list(array.shape)}
            job["models"].append(
                {
                    "name": name,
                    "path": str(place / f"{name}.onnx"),
                    "inputs": inputs,
                    "output": str(place / f"{name}.out"),
                }
            )
        (place / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            ["node", str(HERE / "onnx_web.mjs"), str(place / "job.json")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not done.stdout:
            raise RuntimeError(f"node ended with {done.returncode}: {done.stderr[-500:]}")
        outputs = {
            name: np.fromfile(place / f"{name}.out", np.float32)
            for name, _, _ in models
            if (place / f"{name}.out").exists()
        }
        return json.loads(done.stdout.splitlines()[-1]), outputs


def plain(causal: bool, n: int) -> onnx.ModelProto:
    """Products and a softmax, as exporters write attention."""
    shape = [1, HEADS, n, CHANNELS]
    info = {x: helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in "qkvy"}
    constants = [numpy_helper.from_array(np.array(CHANNELS**-0.5, np.float32), "scale")]
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["columns"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "columns"], ["scores"]),
    ]
    if causal:
        constants.append(numpy_helper.from_array(np.triu(np.full((n, n), -1e30, np.float32), 1), "future"))
        nodes.append(helper.make_node("Add", ["scores", "future"], ["masked"]))
    nodes += [
        helper.make_node("Softmax", ["masked" if causal else "scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "plain", [info[x] for x in "qkv"], [info["y"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def sliced(n: int, parts: int) -> onnx.ModelProto:
    """``MultiHeadAttention`` for a part of the queries at a time: its scores in one piece are too large for 32 bits."""
    io = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, n, HEADS * CHANNELS]) for x in "qkvy"]
    nodes = [helper.make_node("Split", ["q"], [f"q{i}" for i in range(parts)], axis=1, num_outputs=parts)]
    for i in range(parts):
        nodes.append(
            helper.make_node(
                "MultiHeadAttention", [f"q{i}", "k", "v"], [f"y{i}"], domain="com.microsoft", num_heads=HEADS
            )
        )
    nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(parts)], ["y"], axis=1))
    graph = helper.make_graph(nodes, "sliced", io[:3], io[3:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def forms(causal: bool, n: int, longest: int) -> list[tuple[str, onnx.ModelProto, dict[str, np.ndarray]]]:
    """Ours, and every exact attention the runtime has; the fastest that runs is the baseline."""
    by_head, flat = feeds(n, "function"), feeds(n, "exact")
    made = [("fma", fast(causal, longest), by_head), ("plain", plain(causal, n), by_head)]
    if causal:
        masked = exact(False, n)
        masked.graph.node[0].attribute.append(helper.make_attribute("unidirectional", 1))
        return [*made, ("MultiHeadAttention", masked, flat), ("GroupQueryAttention", exact(True, n), flat)]
    return [
        *made,
        ("MultiHeadAttention", exact(False, n), flat),
        *((f"MultiHeadAttention in {parts} parts", sliced(n, parts), flat) for parts in (4, 16)),
    ]


def measure(causal: bool, n: int, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    models = forms(causal, n, max(args.lengths))
    models = [model for model in models if not (model[0] == "GroupQueryAttention" and n > args.longest_slow)]
    printed, outputs = run_in_web(args.package, models, args.repeats, args.threads)
    ms = {r["name"]: round(statistics.median(r["ms"]), 1) for r in printed["results"] if not r["error"]}
    failed = {r["name"]: r["error"] for r in printed["results"] if r["error"]}
    best = min((name for name in ms if name != "fma"), key=lambda name: ms[name])
    session = onnxruntime.InferenceSession(
        models[0][1].SerializeToString(), providers=["CPUExecutionProvider"]
    )
    native = session.run(None, models[0][2])[0].reshape(-1)
    apart = float(np.linalg.norm(outputs["fma"] - native) / np.linalg.norm(native))
    row = {
        "operator": "fma", "config": make_operator("fma").config.to_dict(), "form": "function", "device": "wasm",
        "dtype": "float32", "heads": HEADS, "kv_heads": HEADS, "head_dim": CHANNELS, "n": n, "causal": causal,
        "direction": "forward", "ms": ms["fma"], "baseline": best, "baseline_ms": ms[best],
        "ratio": round(ms[best] / ms["fma"], 2), "repeats": args.repeats, "exact_ms": ms, "exact_errors": failed,
        "apart_from_native_runtime": apart,
    }  # fmt: skip
    return row, {"onnxruntime_web": printed["version"], "node": printed["node"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument(
        "--threads", type=int, default=1, help="of WebAssembly; 1 is what a page without isolation has"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--longest-slow", type=int, default=1024, help="longest run of GroupQueryAttention, which is slow"
    )
    parser.add_argument(
        "--package", type=Path, default=HERE.parent, help="where npm installed onnxruntime-web"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows, versions = [], {}
    for causal in (True, False):
        for n in args.lengths:
            row, versions = measure(causal, n, args)
            rows.append(row)
            print(
                f"{'causal' if causal else 'bidirectional':14} {n:6} fma {row['ms']:8.1f} ms, {row['baseline']} "
                f"{row['baseline_ms']:8.1f} ms, {row['ratio']:5.2f}x; {row['exact_ms']} {row['exact_errors']}", flush=True,
            )  # fmt: skip
    provenance = {
        **versions, "device": device_name_of_cpu(), "system": platform.platform(terse=True), "threads": args.threads,
    }  # fmt: skip
    write_json(args.out, {"schema": "fastattn.bench/1", "rows": rows, "provenance": provenance})


if __name__ == "__main__":
    main()
