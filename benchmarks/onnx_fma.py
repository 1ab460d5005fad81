"""Fast multipole attention as an ONNX function in stock ONNX Runtime, against the runtime's best exact attention.

python benchmarks/onnx_fma.py --lengths 1024 4096 8192 16384
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from fastattn_compile.files import write_json
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
    io = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, n, HEADS * CHANNELS]) for x in "qkvy"]
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["y"],
        domain="com.microsoft",
        num_heads=HEADS,
        unidirectional=int(causal),
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph([node], "exact", io[:3], io[3:]), opset_imports=opsets, ir_version=10
    )


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(causal: bool, n: int, args: argparse.Namespace) -> dict[str, Any]:
    given = {
        x: np.random.default_rng(0).standard_normal((1, HEADS, n, CHANNELS)).astype(np.float32) for x in "qkv"
    }
    folded = {x: a.transpose(0, 2, 1, 3).reshape(1, n, -1) for x, a in given.items()}
    replaced, original = (
        session(fast(causal, max(args.lengths)), args.threads),
        session(exact(causal, n), args.threads),
    )
    calls = [lambda: replaced.run(None, given), lambda: original.run(None, folded)]
    for call in calls:
        call()
    ms, baseline_ms = interleaved_ms(calls, args.repeats)
    return {
        "operator": "fma", "config": make_operator("fma").config.to_dict(), "device": "cpu", "dtype": "float32",
        "heads": HEADS, "kv_heads": HEADS, "head_dim": CHANNELS, "n": n, "causal": causal, "direction": "forward",
        "ms": round(ms, 2), "baseline": "com.microsoft MultiHeadAttention", "baseline_ms": round(baseline_ms, 2),
        "ratio": round(baseline_ms / ms, 2), "repeats": args.repeats,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    start = time.perf_counter()
    session(fast(True, 8192, layers=24), args.threads)
    load = time.perf_counter() - start
    print(f"a session of 24 layers loads in {load:.2f} s")
    rows = []
    for causal in (True, False):
        for n in args.lengths:
            rows.append(measure(causal, n, args))
            print(
                f"{'causal' if causal else 'bidirectional':14} {n:6} {rows[-1]['ms']:9.2f} ms, exact "
                f"{rows[-1]['baseline_ms']:9.2f} ms, {rows[-1]['ratio']:5.2f}x", flush=True,
            )  # fmt: skip
    provenance = {
        "onnxruntime": onnxruntime.__version__, "device": device_name_of_cpu(), "system": platform.platform(terse=True),
        "threads": args.threads, "session_load_seconds_24_layers": round(load, 3),
    }  # fmt: skip
    write_json(args.out, {"schema": "fastattn.bench/1", "rows": rows, "provenance": provenance})


def device_name_of_cpu() -> str:
    import torch

    return device_name(torch.device("cpu"))


if __name__ == "__main__":
    main()
