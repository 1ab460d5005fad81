"""Function bodies against the definitions: any length, every mask they serve, opsets 13 to 25, all types."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_models.helpers import attention_model, run
from oracle import assert_as_good_as, cast, make_inputs, make_parameters, relative_error

from fastattn_compile.lowering.onnx.body import BodySpec
from fastattn_compile.lowering.onnx.registry import supported
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator

SMALL = {"block": 16, "rank": 4, "sinks": 3}
TREE = {"block": 8, "leaf": 2, "fanout": 2, "open": 3, "beam": 4, "sinks": 2}
OPTIONS: dict[str, dict[str, object]] = {
    "exact": {},
    "fma": SMALL,
    "window": {"width": 20, "sinks": 3},
    "linformer": {"rank": 8},
    "tf_attention": {"height": 3, "window": 6, "sinks": 2},
    "tc_attention": {"height": 3},
    "barnes_hut": TREE,
    "cast": {"clusters": 4},
    "conv_basis": {"k": 6, "sinks": 2},
    "per_head": {
        "parts": [{"operator": "fma", "options": SMALL}, {"operator": "barnes_hut", "options": TREE}],
        "heads": [1, 0],
    },
}
SERVED = [name for name in OPTIONS if name != "exact"]
BIDIRECTIONAL = ["linformer", "cast"]
TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


def served(name: str, mask: str) -> str:
    """The mask, as far as the operator has it."""
    if name in BIDIRECTIONAL:
        mask = mask.replace("causal & ", "").replace("causal", "none")
    return mask


def spec_of(inputs: AttentionInputs, opset: int = 18, longest: int = 1024) -> BodySpec:
    s = inputs.spec()
    return BodySpec(
        s.heads, s.kv_heads, s.head_dim, s.value_dim, inputs.scale, s.mask, TYPES[s.dtype], opset, longest
    )  # fmt: skip


def feeds_of(inputs: AttentionInputs) -> dict[str, np.ndarray]:
    feeds = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.key_padding is not None:
        feeds["key_padding"] = inputs.key_padding
    return {name: tensor.numpy() for name, tensor in feeds.items()}


def check(name: str, inputs: AttentionInputs, **options: object) -> None:
    operator = make_operator(name, **options)
    learned = make_parameters(operator, inputs)
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    out = torch.from_numpy(run(model, feeds_of(inputs))[0])
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in learned)).out
    if inputs.value.dtype == torch.float64:  # no wider type to judge by: a few roundings
        assert relative_error(out, oracle) <= 8 * torch.finfo(torch.float64).eps
        return
    assert_as_good_as(out, oracle=oracle, formula=operator.reference(inputs, learned).out)


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [2, 16, 31, 75, 130, 333])
@pytest.mark.parametrize("name", ["exact", "fma"])
def test_bodies_compute_what_is_defined(name: str, length: int, mask: str) -> None:
    check(name, make_inputs(mask, length=length, value_dim=6), **(SMALL if name == "fma" else {}))


@pytest.mark.parametrize(
    "options", [{"sinks": 0}, {"scale_attn": False}, {"rank": 16}, {"block": 24, "rank": 2}], ids=str
)
@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
def test_options_of_fma(options: dict[str, object], mask: str) -> None:
    check("fma", make_inputs(mask, length=200), **{**SMALL, **options})


@pytest.mark.parametrize("options", [{"width": 30, "sinks": 3}, {"width": 9, "sinks": 0}], ids=str)
@pytest.mark.parametrize(
    "mask",
    ["none", "causal", "key_padding", "causal & key_padding", "causal & window(40)", "left(40) & right(3)"],
)
@pytest.mark.parametrize("length", [2, 64, 75, 200])
def test_window(length: int, mask: str, options: dict[str, object]) -> None:
    check("window", make_inputs(mask, length=length, value_dim=6), **options)


@pytest.mark.parametrize("sharing", ["heads", "none", "key_value"])
@pytest.mark.parametrize("mask", ["none", "key_padding"])
@pytest.mark.parametrize("length", [16, 75, 200])
def test_linformer(length: int, mask: str, sharing: str) -> None:
    check("linformer", make_inputs(mask, length=length, value_dim=6), rank=16, sharing=sharing)


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [8, 31, 64, 200])
@pytest.mark.parametrize("name", ["tf_attention", "tc_attention"])
def test_trees(name: str, length: int, mask: str) -> None:
    check(name, make_inputs(mask, length=length, value_dim=6), height=3)


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize(
    "options",
    [
        {"shared": False},
        {"height": 5},
        {"fallback": "zero"},
        {"n_trees": 2, "combine": "mean", "window": 4},
        {"window": 9, "sinks": 3},
        {"window": 5, "sinks": 2, "fallback": "zero"},
    ],
    ids=str,
)
def test_options_of_leaf_attention(options: dict[str, object], mask: str) -> None:
    check("tf_attention", make_inputs(mask, length=150), **{"height": 3, **options})


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize(
    "options",
    [{"shared": False}, {"height": 5}, {"include_root": False}, {"n_trees": 2, "level_weights": "softmax"}],
    ids=str,
)
def test_options_of_coarse_attention(options: dict[str, object], mask: str) -> None:
    check("tc_attention", make_inputs(mask, length=150), **{"height": 3, **options})


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [5, 16, 75, 200])
def test_barnes_hut(length: int, mask: str) -> None:
    check("barnes_hut", make_inputs(mask, length=length, value_dim=6), **TREE)


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize(
    "options",
    [
        {"group": 4},
        {"group": 8, "select": "cumulant"},
        {"select": "cumulant"},
        {"share_group": False},
        {"sinks": 0, "fanout": 4, "leaf": 4},
    ],
    ids=str,
)
def test_options_of_barnes_hut(options: dict[str, object], mask: str) -> None:
    check("barnes_hut", make_inputs(mask, length=190), **{**TREE, **options})


@pytest.mark.parametrize("combine", ["paper", "lse"])
@pytest.mark.parametrize("mask", ["none", "key_padding"])
@pytest.mark.parametrize("length", [8, 31, 200])
def test_cast(length: int, mask: str, combine: str) -> None:
    check("cast", make_inputs(mask, length=length, value_dim=6), clusters=4, combine=combine)


@pytest.mark.parametrize("mask", ["none", "causal", "key_padding", "causal & key_padding"])
@pytest.mark.parametrize("length", [8, 31, 200])
def test_conv_basis(length: int, mask: str) -> None:
    check("conv_basis", make_inputs(mask, length=length, value_dim=6), k=6, sinks=2)


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize("options", [{"k": 1}, {"k": 20}, {"k": 5, "anchors": "strided"}], ids=str)
def test_options_of_conv_basis(options: dict[str, object], mask: str) -> None:
    check("conv_basis", make_inputs(mask, length=100), **options)


def test_every_column_of_a_short_sequence_is_an_anchor() -> None:
    inputs = make_inputs("causal", length=5)
    model = attention_model(make_operator("conv_basis", k=12), spec_of(inputs))
    exact = make_operator("exact").reference(inputs).out
    torch.testing.assert_close(torch.from_numpy(run(model, feeds_of(inputs))[0]), exact)


def test_scores_too_far_apart_for_transforms_stop_the_run() -> None:
    inputs = make_inputs("causal", length=100)
    model = attention_model(make_operator("conv_basis", k=6), spec_of(inputs))
    feeds = feeds_of(inputs)
    feeds["query"] = 40 * feeds["query"]
    with pytest.raises(Exception, match="out of data bounds"):
        run(model, feeds)


@pytest.mark.parametrize(
    "options",
    [
        {"select": "query", "head_reduce": "mean"},
        {"head_reduce": "softmax_mean", "affinity_scale": "sqrt_width"},
        {"tau": "learned", "xi": "softplus", "surrogate_space": "input"},
        {"own_summary": "included", "phi_heads": "per_head"},
        {"cluster_size": 9},
        {"cluster_size": 30, "combine": "lse", "select": "key"},
    ],
    ids=str,
)
def test_options_of_cast(options: dict[str, object]) -> None:
    check("cast", make_inputs("key_padding", length=100), **{"clusters": 5, **options})


def test_a_token_may_be_in_every_cluster_or_in_none() -> None:
    """Surrogates that are all alike: every cluster takes the same tokens."""
    inputs = make_inputs("none", length=40)
    operator = make_operator("cast", clusters=4)
    learned = make_parameters(operator, inputs)
    learned[0][:] = learned[0][:1]
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    expected = operator.reference(inputs, learned).out
    torch.testing.assert_close(torch.from_numpy(run(model, feeds_of(inputs))[0]), expected)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("name", ["tf_attention", "tc_attention", "barnes_hut", "cast", "conv_basis"])
def test_grouped_heads_of_trees(name: str, heads: tuple[int, int]) -> None:
    inputs = make_inputs(served(name, "causal"), heads=heads[0], kv_heads=heads[1], length=100)
    check(name, inputs, **OPTIONS[name])


def test_leaves_of_any_size() -> None:
    """One leaf with nearly all keys, and leaves with none: the loop reads what there is."""
    inputs = make_inputs("causal", length=200, heads=2, kv_heads=1)
    operator = make_operator("tf_attention", height=3)
    planes, offsets = make_parameters(operator, inputs)
    learned = planes, torch.tensor([3.0, 3, 3, -1, 9, 9, 9]).expand_as(offsets).contiguous()
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    out = torch.from_numpy(run(model, feeds_of(inputs))[0])
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in learned)).out
    assert_as_good_as(out, oracle=oracle, formula=operator.reference(inputs, learned).out)


@pytest.mark.parametrize(
    "name", ["tf_attention", "tc_attention", "barnes_hut", "cast", "conv_basis", "linformer"]
)
def test_nan_at_padding_is_not_seen(name: str) -> None:
    inputs = make_inputs("key_padding", length=75)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    expected = operator.reference(inputs, learned).out
    for x in (inputs.key, inputs.value):
        x.masked_fill_(~inputs.key_padding[:, None, :, None], float("nan"))
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    torch.testing.assert_close(torch.from_numpy(run(model, feeds_of(inputs))[0]), expected)


def test_a_sequence_longer_than_the_projections_stops_the_run() -> None:
    inputs = make_inputs("none", length=40)
    operator = make_operator("linformer", rank=8)
    model = attention_model(operator, spec_of(inputs), parameters=make_parameters(operator, inputs))
    with pytest.raises(Exception, match="dimension"):
        run(model, feeds_of(make_inputs("none", length=41)))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)], ids=str)
def test_grouped_heads(heads: tuple[int, int]) -> None:
    check("fma", make_inputs("causal", heads=heads[0], kv_heads=heads[1], length=100), **SMALL)


def test_windows_of_exact() -> None:
    check("exact", make_inputs("causal & window(9)", length=40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize("name", SERVED)
def test_other_types(name: str, mask: str, dtype: torch.dtype) -> None:
    if (name, dtype) == ("conv_basis", torch.float64):
        return  # refused, see below
    check(name, make_inputs(served(name, mask), length=150, dtype=dtype), **OPTIONS[name])


def run_in_bfloat16(model: onnx.ModelProto, inputs: AttentionInputs) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    made = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = made.io_binding()  # numpy has no bfloat16
    out = torch.empty(*inputs.query.shape[:3], inputs.value.shape[3], dtype=torch.bfloat16)
    kind, tensors = onnx.TensorProto.BFLOAT16, [inputs.query, inputs.key, inputs.value]
    for name, x in zip(("query", "key", "value"), map(torch.Tensor.contiguous, tensors)):
        binding.bind_input(name, "cpu", 0, kind, tuple(x.shape), x.data_ptr())
    if inputs.key_padding is not None:
        binding.bind_cpu_input("key_padding", inputs.key_padding.numpy())
    binding.bind_output("out_0", "cpu", 0, kind, tuple(out.shape), out.data_ptr())
    made.run_with_iobinding(binding)
    return out


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_is_float32_inside(name: str, mask: str) -> None:
    inputs = make_inputs(served(name, mask), length=150, dtype=torch.bfloat16)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, cast(inputs, torch.float32))
    model = attention_model(operator, spec_of(inputs), parameters=learned)
    onnx.checker.check_model(model, full_check=True)
    out = run_in_bfloat16(model, inputs)
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in learned)).out
    # Rounded once, at the end.
    assert (out.double() - oracle).norm() <= torch.finfo(torch.bfloat16).eps / 2 * oracle.norm()


@pytest.mark.parametrize("name", SERVED)
def test_a_length_that_is_a_number(name: str) -> None:
    inputs = make_inputs(served(name, "causal & key_padding"), length=90)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    free, fixed = (
        run(attention_model(operator, spec_of(inputs), parameters=learned, length=length), feeds_of(inputs))[
            0
        ]
        for length in (None, 90)
    )
    np.testing.assert_allclose(fixed, free, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(free).max())


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)], ids=str)
def test_grouped_heads_of_a_window(heads: tuple[int, int]) -> None:
    check("window", make_inputs("none", heads=heads[0], kv_heads=heads[1], length=100), width=15, sinks=4)


def test_a_key_outside_the_window_is_not_seen() -> None:
    inputs = make_inputs("causal", length=150)
    model = attention_model(make_operator("window", width=20, sinks=3), spec_of(inputs))
    (before,) = run(model, feeds_of(inputs))
    inputs.key[:, :, 50] += 1.0
    (after,) = run(model, feeds_of(inputs))
    np.testing.assert_array_equal(np.delete(before, range(50, 70), 2), np.delete(after, range(50, 70), 2))
    assert (before[:, :, 50:70] != after[:, :, 50:70]).all()


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 20, 23, 25])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_body_serves_every_opset(name: str, opset: int) -> None:
    inputs = make_inputs(served(name, "causal & key_padding"), length=75)
    operator = make_operator(name, **OPTIONS[name])
    learned = make_parameters(operator, inputs)
    model = attention_model(operator, spec_of(inputs, opset), parameters=learned)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    out = torch.from_numpy(run(model, feeds_of(inputs))[0])
    wanted = operator.reference(inputs, learned).out
    assert (out - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("mask", ["none", "causal & key_padding"])
@pytest.mark.parametrize("name", SERVED)
def test_the_reference_evaluator_agrees_with_the_runtime(name: str, mask: str) -> None:
    # The evaluator's GatherElements takes 64 entries at most; trees sort all the queries of a key head by it.
    inputs = make_inputs(served(name, mask), length=24 if name in ("tf_attention", "barnes_hut") else 60)
    operator = make_operator(name, **OPTIONS[name])
    model = attention_model(operator, spec_of(inputs), parameters=make_parameters(operator, inputs))
    (there,) = run(model, feeds_of(inputs))
    (here,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds_of(inputs))
    np.testing.assert_allclose(here, there, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(there).max())


def test_nan_at_padding_stays_there() -> None:
    inputs = make_inputs("causal & key_padding", length=75)
    for x in (inputs.key, inputs.value):
        x.masked_fill_(~inputs.key_padding[:, None, :, None], float("nan"))
    operator = make_operator("fma", **SMALL)
    out = torch.from_numpy(run(attention_model(operator, spec_of(inputs)), feeds_of(inputs))[0])
    clean = dataclasses.replace(inputs, key=inputs.key.nan_to_num(0), value=inputs.value.nan_to_num(0))
    torch.testing.assert_close(out, operator.reference(clean).out)


@pytest.mark.parametrize("name", ["fma", "barnes_hut"])
def test_a_longer_sequence_than_promised_stops_the_run(name: str) -> None:
    inputs = make_inputs("causal", length=300)
    model = attention_model(make_operator(name, **OPTIONS[name]), spec_of(inputs, longest=128))
    with pytest.raises(Exception, match="out of data bounds"):
        run(model, feeds_of(inputs))


def test_bodies_are_lean() -> None:
    """A session loads in a time that grows with the square of the number of nodes."""
    inputs = make_inputs("causal", length=8)
    body = attention_model(make_operator("fma"), spec_of(inputs, longest=8192)).functions[0]
    assert sum(node.op_type != "Constant" for node in body.node) < 250


def test_what_a_body_cannot_say_is_refused() -> None:
    spec = spec_of(make_inputs("causal & window(9)", length=8))
    assert "without a window" in supported(make_operator("fma"), spec).reason
    double = dataclasses.replace(spec, dtype=ir.DataType.DOUBLE)
    assert "less than float64" in supported(make_operator("conv_basis"), double).reason
    assert "at even distances" in supported(make_operator("conv_basis", anchors="jumps"), spec).reason
    assert "convolutions alone" in supported(make_operator("conv_basis", key_bias=True), spec).reason
    assert "one token after the other" in supported(make_operator("cast", clustering="sa_topk"), spec).reason
    plain = spec_of(make_inputs("causal", length=8))
    assert "several trees" in supported(make_operator("tf_attention", n_trees=2), plain).reason
    assert "beside a window" in supported(make_operator("tf_attention", sinks=4), plain).reason
    assert "rotary" in supported(make_operator("tc_attention", rotary_base=1e4), plain).reason
    assert "height 1 to" in supported(make_operator("tf_attention", height=0), plain).reason
    assert "rest='drop'" in supported(make_operator("barnes_hut", rest="pool"), plain).reason
    assert "chooses by" in supported(make_operator("barnes_hut", select="bound"), plain).reason
    assert "mean basis" in supported(make_operator("fma", basis="depthwise"), plain).reason
