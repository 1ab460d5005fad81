"""Attention that is one node: found like any other, replaced as a whole, or kept with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx_models.helpers import exact, run

from fastattn_compile.converting.source import prepare
from fastattn_compile.passes.onnx.rewrite import rewrite

MICROSOFT = "com.microsoft"
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 12, 4, 8
WIDTH = HEADS * HEAD_DIM
EPS = float(np.finfo(np.float32).eps)


def model_of(
    op_type: str,
    domain: str,
    inputs: dict[str, np.ndarray | None],
    weights: tuple[str, ...] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node; inputs that are no weights have a free batch and length."""
    names = ["" if x is None else name for name, x in inputs.items()]
    shown = {n: x for n, x in inputs.items() if x is not None and n not in weights}
    infos = []
    for name, x in shown.items():
        shape: list[Any] = list(x.shape)
        if name != "total":
            shape[: min(2, x.ndim)] = ["batch", "length"][: x.ndim] if name != "bias" else [1, HEADS]
        infos.append(
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), shape)
        )
    out = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", WIDTH])
    node = onnx.helper.make_node(op_type, names, ["y"], domain=domain, name="core", **attributes)
    held = [onnx.numpy_helper.from_array(inputs[name], name) for name in weights]
    graph = onnx.helper.make_graph([node], "g", infos, [out], held)
    opset = 23 if not domain else 18
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


Q = (BATCH, LENGTH, WIDTH)
KV = (BATCH, LENGTH, WIDTH // 2)


def padding() -> np.ndarray:
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[0, 9:] = 0
    return mask


def separate(**more: np.ndarray | None) -> dict[str, np.ndarray | None]:
    q, k, v = arrays(Q, Q, Q)
    return {"q": q, "k": k, "v": v, **more}


def projected(**more: np.ndarray | None) -> dict[str, np.ndarray | None]:
    x, w, b = arrays(Q, (WIDTH, 3 * WIDTH), (3 * WIDTH,))
    return {"x": x, "w": w / 6, "b": b, **more}


def grouped() -> dict[str, np.ndarray | None]:
    q, k, v = arrays(Q, KV, KV)
    last = np.full((BATCH,), LENGTH - 1, np.int32)
    return {"q": q, "k": k, "v": v, "past_key": None, "past_value": None, "lengths": last,
            "total": np.array([LENGTH], np.int32)}  # fmt: skip


def narrow() -> dict[str, np.ndarray | None]:
    q, k, v = arrays(Q, KV, KV)
    return {"q": q, "k": k, "v": v}


N, QN, G = {"num_heads": HEADS}, {"q_num_heads": HEADS}, {"kv_num_heads": 2}
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], dict[str, Any], str]] = {
    "standard": ("Attention", "", narrow(), (), {**QN, **G, "is_causal": 1}, "causal"),
    "standard, scaled": ("Attention", "", narrow(), (), {**QN, **G, "scale": 0.2}, "none"),
    "projections": ("Attention", MICROSOFT, projected(), ("w", "b"), {**N}, "none"),
    "projections, causal": (
        "Attention", MICROSOFT, projected(), ("w", "b"), {**N, "unidirectional": 1}, "causal",
    ),
    "projections, padding": ("Attention", MICROSOFT, projected(m=padding()), ("w", "b"), {**N}, "key_padding"),
    "projections, lengths": (
        "Attention", MICROSOFT, projected(m=padding().sum(1, dtype=np.int32)), ("w", "b"), {**N}, "key_padding",
    ),
    "separate": ("MultiHeadAttention", MICROSOFT, separate(), (), {**N}, "none"),
    "separate, causal": (
        "MultiHeadAttention", MICROSOFT, separate(), (), {**N, "unidirectional": 1}, "causal",
    ),
    "separate, biased and padded": (
        "MultiHeadAttention", MICROSOFT, separate(b=arrays((3 * WIDTH,))[0], m=padding()), ("b",), {**N},
        "key_padding",
    ),
    "packed": (
        "MultiHeadAttention", MICROSOFT, {"q": arrays((BATCH, LENGTH, HEADS, 3, HEAD_DIM))[0]}, (), {**N},
        "none",
    ),
    "grouped": ("GroupQueryAttention", MICROSOFT, grouped(), (), {**N, **G}, "causal & key_padding"),
    "grouped, local": (
        "GroupQueryAttention", MICROSOFT, grouped(), (), {**N, **G, "local_window_size": 4},
        "causal & window(4) & key_padding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_fused_node_is_found_and_replaced(case: str) -> None:
    op_type, domain, inputs, weights, attributes, mask = CASES[case]
    model = model_of(op_type, domain, inputs, weights, **attributes)
    (line,) = prepare(model).softmaxes
    assert (line.status, line.mask, line.name) == ("taken", mask, "core"), line.reason
    feeds = {n: x for n, x in inputs.items() if x is not None and n not in weights}
    after = exact(model)
    assert op_type not in [node.op_type for node in after.graph.node]
    if case == "packed":
        return  # ONNX Runtime has no kernel for it on a CPU
    before, got = run(model, feeds)[0], run(after, feeds)[0]
    # Two orders of the same sums over LENGTH weights of sum 1 and HEAD_DIM products.
    bound = 4 * (HEAD_DIM + LENGTH) * EPS * np.abs(before).max()
    np.testing.assert_allclose(got, before, rtol=0, atol=bound)


def test_what_a_runtime_keeps_inside_stays_with_a_reason() -> None:
    inputs = grouped()
    past = arrays((BATCH, 2, 3, HEAD_DIM))[0]
    inputs["past_key"] = inputs["past_value"] = None
    model = model_of("GroupQueryAttention", MICROSOFT, inputs, (), num_heads=HEADS, kv_num_heads=2)
    model.graph.input.append(onnx.helper.make_tensor_value_info("past", TensorProto.FLOAT, past.shape))
    model.graph.node[0].input[3] = model.graph.node[0].input[4] = "past"
    (line,) = prepare(model).softmaxes
    assert line.status == "exact" and "cache" in line.reason


def test_a_fused_node_that_is_not_replaced_stays_one() -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate"]
    prepared = prepare(model_of(op_type, domain, inputs, weights, **attributes))
    rewrite(prepared.model, [])
    assert [node.op_type for node in ir.to_proto(prepared.model).graph.node] == [op_type]
