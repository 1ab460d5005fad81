"""The native kernels in ONNX Runtime against the definitions: the same file runs with them and without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_models.helpers import attention_model, native_session, run, run_native
from oracle import assert_as_good_as, cast, make_inputs, relative_error

import fastattn_compile as fa
from fastattn_compile.lowering.onnx.body import BodySpec
from fastattn_compile.lowering.onnx.native import build
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler")
SMALL = {"block": 16, "rank": 4, "sinks": 3}
TYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.float64: ir.DataType.DOUBLE,
    torch.bfloat16: ir.DataType.BFLOAT16,
}  # fmt: skip


def model_of(inputs: AttentionInputs, layers: int = 1, **options: object) -> onnx.ModelProto:
    s = inputs.spec()
    spec = BodySpec(
        s.heads, s.kv_heads, s.head_dim, s.value_dim, inputs.scale, s.mask, TYPES[s.dtype], 18, 1024
    )
    return attention_model(make_operator("fma", **{**SMALL, **options}), spec, layers)


def check(inputs: AttentionInputs, **options: object) -> None:
    operator = make_operator("fma", **{**SMALL, **options})
    out = run_native(model_of(inputs, **options), inputs)
    oracle = operator.reference(cast(inputs, torch.float64)).out
    if out.dtype == torch.float64:
        assert relative_error(out, oracle) <= 8 * torch.finfo(torch.float64).eps
    else:
        assert_as_good_as(out, oracle=oracle, formula=operator.reference(inputs).out)


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [1, 16, 75, 333])
def test_kernels_compute_what_is_defined(dtype: torch.dtype, length: int, mask: str) -> None:
    check(make_inputs(mask, length=length, value_dim=6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{"sinks": 0}, {"scale_attn": False}, {"rank": 16}, {"block": 24, "rank": 2}], ids=str
)
@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
def test_options(options: dict[str, object], mask: str, dtype: torch.dtype) -> None:
    check(make_inputs(mask, length=200, dtype=dtype), **options)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)], ids=str)
def test_grouped_heads(heads: tuple[int, int]) -> None:
    check(make_inputs("causal", heads=heads[0], kv_heads=heads[1], length=130))


def test_the_kernel_runs_instead_of_the_function() -> None:
    """A function that gives the values back tells who ran."""
    inputs = make_inputs("none", length=75, heads=2, kv_heads=2)
    model = model_of(inputs)
    body = model.functions[0]
    del body.node[:]
    body.node.append(onnx.helper.make_node("Identity", ["value"], [body.output[0]]))
    feeds = {name: getattr(inputs, name).numpy() for name in ("query", "key", "value")}
    np.testing.assert_array_equal(run(model, feeds)[0], inputs.value.numpy())
    expected = make_operator("fma", **SMALL).reference(inputs).out
    torch.testing.assert_close(run_native(model, inputs), expected)


def test_queries_that_do_not_see_a_bad_key_keep_their_output() -> None:
    inputs = make_inputs("causal", length=150)
    inputs.key[:, :, 100] = float("nan")
    clean = dataclasses.replace(inputs, key=inputs.key.nan_to_num(0))
    expected = make_operator("fma", **SMALL).reference(clean).out
    out = run_native(model_of(inputs), inputs)
    torch.testing.assert_close(out[:, :, :100], expected[:, :, :100])
    assert out[:, :, 100:].isnan().all()


def test_nan_at_padding_is_not_seen() -> None:
    inputs = make_inputs("key_padding", length=90)
    hidden = ~inputs.key_padding[:, None, :, None]
    inputs = dataclasses.replace(
        inputs,
        key=inputs.key.masked_fill(hidden, float("nan")),
        value=inputs.value.masked_fill(hidden, float("inf")),
    )
    clean = dataclasses.replace(inputs, key=inputs.key.nan_to_num(0), value=inputs.value.nan_to_num(0, 0, 0))
    expected = make_operator("fma", **SMALL).reference(clean).out
    torch.testing.assert_close(run_native(model_of(inputs), inputs), expected)


def test_more_layers_and_threads_give_the_same() -> None:
    inputs = make_inputs("causal", length=400, heads=4, kv_heads=2, head_dim=8, value_dim=8)
    model = model_of(inputs, layers=3)
    given = {name: getattr(inputs, name).numpy() for name in ("query", "key", "value")}
    threaded = native_session(model, threads=2).run(None, given)[0]
    np.testing.assert_array_equal(threaded, native_session(model).run(None, given)[0])
    np.testing.assert_allclose(threaded, run(model, given)[0], rtol=1e-4, atol=1e-5)


def _with(model: onnx.ModelProto, name: str, value: object) -> onnx.ModelProto:
    for attribute in model.graph.node[0].attribute:
        if attribute.name == name:
            attribute.CopyFrom(onnx.helper.make_attribute(name, value))
    return model


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("body_version", 2, "body_version 1, the model has 2"), ("mask", "window(9)", "does not know the mask"),
     ("rank", 5, "rank must divide block")],
)  # fmt: skip
def test_what_the_library_does_not_know_is_refused(name: str, value: object, message: str) -> None:
    model = _with(model_of(make_inputs("causal", length=8)), name, value)
    with pytest.raises(Exception, match=message):
        native_session(model)


def test_sizes_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs("causal", length=32, heads=2, kv_heads=2)
    short = dataclasses.replace(inputs, key=inputs.key[:, :, :16], value=inputs.value[:, :, :16])
    model = model_of(inputs)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[2].dim_param = f"n_{value.name}"
    with pytest.raises(Exception, match="of one length"):
        run_native(model, short)


def test_the_library_registers_by_its_path(tmp_path: Path) -> None:
    inputs = make_inputs("causal", length=40)
    path = tmp_path / "model.onnx"
    onnx.save(model_of(inputs), path)
    feeds = {name: getattr(inputs, name).numpy() for name in ("query", "key", "value")}
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(fa.onnx.library())
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(made.run(None, feeds)[0], fa.onnx.session(path).run(None, feeds)[0])
