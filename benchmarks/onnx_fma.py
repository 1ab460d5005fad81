"""Fast multipole attention in ONNX Runtime, by native kernel and as a function, against its own best exact attention.

python benchmarks/onnx_fma.py --lengths 1024 4096 8192 16384
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import fastattn_compile as fa
from fastattn_compile.files import high_water_mark, write_json
from fastattn_compile.lowering.onnx.body import DOMAIN, BodySpec
from fastattn_compile.lowering.onnx.function import function, node_attributes
from fastattn_compile.lowering.onnx.registry import body_of
from fastattn_compile.lowering.onnx.writer import attribute
from fastattn_compile.machine import device_name
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.timing import interleaved_ms

RESULTS = Path(__file__).parent / "results" / "onnx_fma.json"
HEADS, CHANNELS = 8, 64
BASELINES = {False: "com.microsoft MultiHeadAttention", True: "com.microsoft GroupQueryAttention"}
FORMS = ("native", "function", "exact")


def fast(causal: bool, longest: int, layers: int = 1) -> onnx.ModelProto:
    operator = make_operator("fma")
    mask = CAUSAL if causal else NO_MASK
    spec = BodySpec(HEADS, HEADS, CHANNELS, CHANNELS, CHANNELS**-0.5, mask, ir.DataType.FLOAT, 18, longest)
    body, real = body_of(operator), ir.TensorType(ir.DataType.FLOAT)
    shape = ir.Shape([1, HEADS, "n", CHANNELS])
    inputs = [ir.Value(name=name, type=real, shape=shape) for name in ("q", "k", "v")]
    attributes = [attribute(k, v) for k, v in node_attributes(operator, spec, body).items()]
    nodes, query = [], inputs[0]
    for layer in range(layers):
        nodes.append(ir.Node(DOMAIN, body.op_type, [query, *inputs[1:]], attributes, name=f"layer_{layer}"))
        query = nodes[-1].outputs[0]
        query.name = f"y_{layer}"
    query.type, query.shape = real, shape
    graph = ir.Graph(inputs, [query], nodes=nodes, opset_imports={"": 18, DOMAIN: 1}, name="fma")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function(operator, spec)]))


def exact(causal: bool, n: int) -> onnx.ModelProto:
    """The fastest exact attention of the runtime: its causal ``MultiHeadAttention`` would hold all n^2 scores."""
    io = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, n, HEADS * CHANNELS]) for x in "qkvy"]
    domain, constants = "com.microsoft", []
    if causal:
        constants = [
            numpy_helper.from_array(np.array([n - 1], np.int32), "last"),
            numpy_helper.from_array(np.array(n, np.int32), "total"),
        ]
        node = helper.make_node(
            "GroupQueryAttention", ["q", "k", "v", "", "", "last", "total"], ["y", "keys", "values"], domain=domain,
            num_heads=HEADS, kv_num_heads=HEADS,
        )  # fmt: skip
    else:
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain=domain, num_heads=HEADS)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph([node], "exact", io[:3], io[3:], constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, threads: int, native: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    # Sessions take turns: threads of one that go on looking for work after its run would take the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if native:
        return fa.onnx.session(model.SerializeToString(), options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds(n: int, form: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    given = {x: generator.standard_normal((1, HEADS, n, CHANNELS), np.float32) for x in "qkv"}
    if form != "exact":
        return given
    return {x: np.ascontiguousarray(a.transpose(0, 2, 1, 3)).reshape(1, n, -1) for x, a in given.items()}


def session_of(form: str, causal: bool, n: int, longest: int, threads: int) -> onnxruntime.InferenceSession:
    if form == "exact":
        return session(exact(causal, n), threads)
    return session(fast(causal, longest), threads, native=form == "native")


def measure(causal: bool, n: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    calls = []
    for form in FORMS:
        made, given = session_of(form, causal, n, max(args.lengths), args.threads), feeds(n, form)
        calls.append(lambda made=made, given=given: made.run(None, given))
        calls[-1]()
    times = dict(zip(FORMS, interleaved_ms(calls, args.repeats)))
    peaks = {form: peak_bytes(form, causal, n, args) for form in FORMS} if n in args.memory else {}
    return [
        {
            "operator": "fma", "config": make_operator("fma").config.to_dict(), "form": form, "device": "cpu",
            "dtype": "float32", "heads": HEADS, "kv_heads": HEADS, "head_dim": CHANNELS, "n": n, "causal": causal,
            "direction": "forward", "ms": round(times[form], 2), "baseline": BASELINES[causal],
            "baseline_ms": round(times["exact"], 2), "ratio": round(times["exact"] / times[form], 2),
            "repeats": args.repeats, "peak_bytes": peaks.get(form), "baseline_peak_bytes": peaks.get("exact"),
        }
        for form in FORMS[:-1]
    ]  # fmt: skip


def peak_bytes(form: str, causal: bool, n: int, args: argparse.Namespace) -> int:
    """Memory of the first run of a session beyond what stood there before it, output included, in a fresh process."""
    command = [sys.executable, __file__, "--peak", form, str(int(causal)), str(n), str(args.threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(form: str, causal: str, n: str, threads: str) -> None:
    made, given = session_of(form, causal == "1", int(n), int(n), int(threads)), feeds(int(n), form)
    with high_water_mark() as mark:
        made.run(None, given)
    print(mark.bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[8192], help="lengths at which memory is measured"
    )
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(*args.peak)
    fa.onnx.library()  # built before anything is timed
    load = {}
    for form in FORMS[:-1]:
        start = time.perf_counter()
        session(fast(True, 8192, layers=24), args.threads, native=form == "native")
        load[form] = round(time.perf_counter() - start, 3)
        print(f"{form}: a session of 24 layers loads in {load[form]:.2f} s")
    rows = []
    for causal in (True, False):
        for n in args.lengths:
            for row in measure(causal, n, args):
                rows.append(row)
                peak = (
                    ""
                    if row["peak_bytes"] is None
                    else (
                        f", {row['peak_bytes'] / 1e6:.0f} MB, exact {row['baseline_peak_bytes'] / 1e6:.0f} MB"
                    )
                )
                print(
                    f"{'causal' if causal else 'bidirectional':14} {n:6} {row['form']:9} {row['ms']:9.2f} ms, exact "
                    f"{row['baseline_ms']:9.2f} ms, {row['ratio']:5.2f}x{peak}", flush=True,
                )  # fmt: skip
    provenance = {
        "onnxruntime": onnxruntime.__version__, "device": device_name_of_cpu(), "system": platform.platform(terse=True),
        "threads": args.threads, "session_load_seconds_24_layers": load,
    }  # fmt: skip
    write_json(args.out, {"schema": "fastattn.bench/1", "rows": rows, "provenance": provenance})


def device_name_of_cpu() -> str:
    import torch

    return device_name(torch.device("cpu"))


if __name__ == "__main__":
    main()
