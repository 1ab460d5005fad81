"""Operators other than fma in ONNX Runtime, by native kernel and as functions, against its own best exact attention.

python benchmarks/onnx_native.py --lengths 4096 16384
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_fma import BASELINES, CHANNELS, HEADS, device_name_of_cpu, exact, feeds, session

import fastattn_compile as fa
from fastattn_compile.files import write_json
from fastattn_compile.lowering.onnx.body import DOMAIN, BodySpec
from fastattn_compile.lowering.onnx.function import function, node_attributes, node_inputs
from fastattn_compile.lowering.onnx.native.build import library_path
from fastattn_compile.lowering.onnx.registry import body_of
from fastattn_compile.lowering.onnx.writer import attribute
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.timing import interleaved_ms

RESULTS = Path(__file__).parent / "results" / "onnx_native.json"
# Names of rows: an operator, and what it is told at a length. Leaves of trees hold some 64 keys.
CASES = ("window", "barnes_hut", "barnes_hut group=16", "tf_attention", "tc_attention")


def operator_of(case: str, n: int) -> Operator:
    name, _, group = case.partition(" group=")
    options: dict[str, Any] = {"window": {"width": 512}, "barnes_hut": {"group": int(group or 1)}}.get(
        name, {}
    )
    if name in ("tf_attention", "tc_attention"):
        options["height"] = max(1, (n // 64).bit_length() - 1)
    return make_operator(name, **options)


def fast(operator: Operator, causal: bool, n: int) -> onnx.ModelProto:
    mask = CAUSAL if causal else NO_MASK
    spec = BodySpec(HEADS, HEADS, CHANNELS, CHANNELS, CHANNELS**-0.5, mask, ir.DataType.FLOAT, 18, n)
    body, real = body_of(operator), ir.TensorType(ir.DataType.FLOAT)
    shape = ir.Shape([1, HEADS, "n", CHANNELS])
    inputs = [ir.Value(name=name, type=real, shape=shape) for name in ("q", "k", "v")]
    given = {name: torch.from_numpy(x) for name, x in feeds(n, "native").items()}
    sample = AttentionInputs(given["q"], given["k"], given["v"], spec.scale, mask)
    learned = []
    for name, value in operator.initial_parameters(sample.spec(), sample).items():
        tensor = ir.tensor(value.numpy(), name=name)
        learned.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    attributes = [attribute(k, v) for k, v in node_attributes(operator, spec, body).items()]
    node = ir.Node(DOMAIN, body.op_type, node_inputs(inputs, None, learned), attributes, name="attention")
    out = node.outputs[0]
    out.name, out.type, out.shape = "y", real, shape
    opsets = {"": 18, DOMAIN: 1}
    graph = ir.Graph(
        inputs, [out], nodes=[node], initializers=learned, opset_imports=opsets, name="attention"
    )
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function(operator, spec)]))


def measure(causal: bool, n: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    calls, names = [], []

    def add(name: tuple[str, str], made: onnxruntime.InferenceSession, form: str) -> None:
        given = feeds(n, form)
        names.append(name)
        calls.append(lambda: made.run(None, given))
        calls[-1]()

    add(("exact", "exact"), session(exact(causal, n), args.threads), "exact")
    for case in args.cases:
        operator = operator_of(case, n)
        model = fast(operator, causal, n)
        add((case, "native"), session(model, args.threads, native=True), "native")
        if n in args.functions:
            add((case, "function"), session(model, args.threads), "native")
    times = dict(zip(names, interleaved_ms(calls, args.repeats)))
    baseline = times[("exact", "exact")]
    return [
        {
            "operator": case.split()[0], "config": operator_of(case, n).config.to_dict(), "form": form, "device": "cpu",
            "dtype": "float32", "heads": HEADS, "kv_heads": HEADS, "head_dim": CHANNELS, "n": n, "causal": causal,
            "direction": "forward", "ms": round(ms, 2), "baseline": BASELINES[causal],
            "baseline_ms": round(baseline, 2), "ratio": round(baseline / ms, 2), "repeats": args.repeats,
        }
        for (case, form), ms in times.items()
        if form != "exact"
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--functions", type=int, nargs="*", default=[], help="lengths at which functions are measured too"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    fa.onnx.library()  # built before anything is timed
    rows = []
    for n in args.lengths:
        for causal in (True, False):
            for row in measure(causal, n, args):
                rows.append(row)
                print(
                    f"{'causal' if causal else 'bidirectional':14} {n:6} {row['operator']:12} "
                    f"group {row['config'].get('group', '-')} {row['form']:9} {row['ms']:9.2f} ms, exact "
                    f"{row['baseline_ms']:9.2f} ms, {row['ratio']:6.2f}x", flush=True,
                )  # fmt: skip
    provenance = {
        "onnxruntime": onnxruntime.__version__, "device": device_name_of_cpu(),
        "library": library_path().stem.rpartition("-x86-64-")[2], "system": platform.platform(terse=True),
        "threads": args.threads, "numpy": np.__version__,
    }  # fmt: skip
    write_json(args.out, {"schema": "fastattn.bench/1", "rows": rows, "provenance": provenance})


if __name__ == "__main__":
    main()
