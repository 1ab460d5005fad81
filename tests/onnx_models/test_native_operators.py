"""The native kernels of all nodes but fma's against the definitions, and against the functions beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_models.helpers import attention_model, native_session, run, run_native
from oracle import assert_as_good_as, cast, make_inputs, make_parameters, relative_error

import fastattn_compile as fa
from fastattn_compile.lowering.onnx.body import BodySpec
from fastattn_compile.lowering.onnx.native import NODES, build
from fastattn_compile.lowering.onnx.registry import body_of
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a library")
OPTIONS: dict[str, dict[str, object]] = {
    "window": {"width": 20, "sinks": 3},
    "barnes_hut": {"block": 8, "leaf": 2, "fanout": 2, "open": 3, "beam": 4, "sinks": 2},
    "tf_attention": {"height": 3, "window": 6, "sinks": 2},
    "tc_attention": {"height": 3},
}
TREES = ["tf_attention", "tc_attention"]
TYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.float64: ir.DataType.DOUBLE,
    torch.bfloat16: ir.DataType.BFLOAT16,
}  # fmt: skip
MASKS = ["none", "causal", "key_padding", "causal & key_padding"]


def spec_of(inputs: AttentionInputs) -> BodySpec:
    s = inputs.spec()
    return BodySpec(
        s.heads, s.kv_heads, s.head_dim, s.value_dim, inputs.scale, s.mask, TYPES[s.dtype], 18, 1024
    )


def check(name: str, inputs: AttentionInputs, **options: object) -> None:
    operator = make_operator(name, **{**OPTIONS[name], **options})
    learned = make_parameters(operator, inputs)
    out = run_native(attention_model(operator, spec_of(inputs), parameters=learned), inputs)
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in learned)).out
    if out.dtype == torch.float64:
        assert relative_error(out, oracle) <= 8 * torch.finfo(torch.float64).eps
    else:
        assert_as_good_as(out, oracle=oracle, formula=operator.reference(inputs, learned).out)


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 16, 75, 333])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_compute_what_is_defined(name: str, length: int, mask: str, dtype: torch.dtype) -> None:
    if name in TREES:
        length = max(length, 8)  # a tree of height 3 needs a key for every leaf
    check(name, make_inputs(mask, length=length, value_dim=6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{"width": 30}, {"width": 9, "sinks": 0}, {"width": 1, "sinks": 5}], ids=str
)
@pytest.mark.parametrize(
    "mask",
    ["none", "causal & key_padding", "causal & window(40)", "left(40) & right(3)", "right(5) & key_padding"],
)
def test_windows(mask: str, options: dict[str, object], dtype: torch.dtype) -> None:
    check("window", make_inputs(mask, length=200, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"group": 4}, {"group": 8, "select": "cumulant"}, {"select": "cumulant"}, {"sinks": 0, "fanout": 4, "leaf": 4},
     {"share_group": False}, {"block": 16, "group": 16, "open": 6}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
def test_options_of_barnes_hut(mask: str, options: dict[str, object], dtype: torch.dtype) -> None:
    check("barnes_hut", make_inputs(mask, length=190, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tf_attention", {"shared": False, "window": 0, "sinks": 0}),
        ("tf_attention", {"height": 5, "window": 1, "sinks": 0}),
        ("tf_attention", {"fallback": "zero"}),
        ("tf_attention", {"n_trees": 2, "combine": "mean", "window": 4, "sinks": 0}),
        ("tc_attention", {"shared": False}),
        ("tc_attention", {"height": 5}),
        ("tc_attention", {"include_root": False}),
        ("tc_attention", {"n_trees": 2, "level_weights": "softmax"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
def test_options_of_trees(mask: str, name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    check(name, make_inputs(mask, length=150, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal & end_aligned", "causal & end_aligned & key_padding"])
def test_queries_that_continue_a_cache(mask: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(mask, length=40, key_len=90, dtype=dtype)
    check("tf_attention", inputs, window=6 if "causal" in mask else 0, sinks=2 if "causal" in mask else 0)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_grouped_heads(name: str, heads: tuple[int, int]) -> None:
    check(name, make_inputs("causal", heads=heads[0], kv_heads=heads[1], length=130))


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_and_function_agree(name: str, mask: str) -> None:
    inputs = make_inputs(mask, length=220, heads=4, kv_heads=2)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    feeds = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.key_padding is not None:
        feeds["key_padding"] = inputs.key_padding
    feeds = {k: x.numpy() for k, x in feeds.items()}
    threaded = native_session(model, threads=2).run(None, feeds)[0]
    np.testing.assert_array_equal(threaded, native_session(model).run(None, feeds)[0])
    np.testing.assert_allclose(threaded, run(model, feeds)[0], rtol=1e-4, atol=1e-5)
    # A function that answers nothing but the values shows that it is not the function that answered.
    body = model.functions[0]
    del body.node[:]
    body.node.append(onnx.helper.make_node("Identity", ["value"], [body.output[0]]))
    np.testing.assert_array_equal(native_session(model).run(None, feeds)[0], threaded)


@pytest.mark.parametrize("name", OPTIONS)
def test_nan_at_padding_is_not_seen(name: str) -> None:
    inputs = make_inputs("key_padding", length=90)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    expected = operator.reference(inputs, learned).out
    for x in (inputs.key, inputs.value):
        x.masked_fill_(~inputs.key_padding[:, None, :, None], float("nan"))
    out = run_native(attention_model(operator, spec_of(inputs), parameters=learned), inputs)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_queries_before_a_bad_key_keep_their_output(name: str) -> None:
    inputs = make_inputs("causal", length=150)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    clean = operator.reference(inputs, learned).out
    key = inputs.key.clone()
    key[:, :, 100] = float("nan")
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    out = run_native(model, dataclasses.replace(inputs, key=key))
    torch.testing.assert_close(out[:, :, :100], clean[:, :, :100])
    assert out[:, :, 100].isnan().all()


def test_every_node_of_the_library_is_tested() -> None:
    assert {
        body_of(make_operator(name, **OPTIONS.get(name, {}))).op_type for name in ["fma", *OPTIONS]
    } == set(NODES)


def test_placement_says_what_runs_natively() -> None:
    inputs = make_inputs("none", length=40)
    for name, expected in (("window", "native"), ("conv_basis", "function")):
        operator = make_operator(name, **OPTIONS.get(name, {"k": 4}))
        model = attention_model(operator, spec_of(inputs), 2)
        assert fa.onnx.placement(model) == {"attention_0": expected, "attention_1": expected}
        assert fa.onnx.placement(model.SerializeToString()) == fa.onnx.placement(model)
        feeds = {k: getattr(inputs, k).numpy() for k in ("query", "key", "value")}
        np.testing.assert_allclose(
            native_session(model).run(None, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "attribute", "value", "message"),
    [("window", "body_version", 2, "body_version 1, the model has 2"), ("window", "width", 0, "width must be 1 or more"),
     ("window", "mask", "chunk(8)", "does not know the mask"), ("barnes_hut", "select", "bound", "does not choose by"),
     ("tf_attention", "fallback", "self+window", "does not know the fallback"),
     ("tc_attention", "level_weights", "even", "does not know level_weights"),
     ("barnes_hut", "leaf", 3, "leaf and group must divide"), ("barnes_hut", "mask", "left(9)", "does not know the mask")],
)  # fmt: skip
def test_what_the_library_does_not_know_is_refused(
    name: str, attribute: str, value: object, message: str
) -> None:
    inputs = make_inputs("causal", length=8)
    operator = make_operator(name, **OPTIONS[name])
    model = attention_model(operator, spec_of(inputs), parameters=make_parameters(operator, inputs))
    for given in model.graph.node[0].attribute:
        if given.name == attribute:
            given.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(Exception, match=message):
        native_session(model)
