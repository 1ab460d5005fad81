"""The further forms of FMA as function bodies: on the grid of an image, and with the rotary embedding of keys taken off."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_models.helpers import attention_model, export, run
from onnx_models.test_bodies import SMALL, check, feeds_of, spec_of
from oracle import make_inputs

import fastattn_compile as fa
from fastattn_compile.lowering.onnx.registry import supported
from fastattn_compile.operators.registry import make_operator

GRIDS = [
    {"grid": (16, 16), "block": 16, "rank": 4},
    {"grid": (13, 21), "block": 16, "rank": 1, "prefix": 2},
    {"grid": (5, 40), "block": 4, "rank": 2, "prefix": 1, "scale_attn": False},
    {"grid": (8, 8), "block": 16, "rank": 4},  # two cells down and across: all of it is near
]


def tokens(options: dict[str, object]) -> int:
    height, width = options["grid"]
    return height * width + options.get("prefix", 0)


@pytest.mark.parametrize("mask", ["none", "key_padding"])
@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_a_grid_is_attended_as_it_is_defined(options: dict[str, object], mask: str) -> None:
    check("fma", make_inputs(mask, length=tokens(options), value_dim=6), sinks=0, **options)


@pytest.mark.parametrize(
    "options", [{}, {"rotary_dim": 4}, {"rotary_interleaved": True, "sinks": 0}], ids=str
)
@pytest.mark.parametrize(("mask", "length"), [("causal", 200), ("key_padding", 130), ("none", 9)])
def test_keys_are_pooled_without_their_rotation(options: dict[str, object], mask: str, length: int) -> None:
    check("fma", make_inputs(mask, length=length), **{**SMALL, "rotary_base": 10000.0, **options})


FORMS = [{**GRIDS[1], "sinks": 0}, {**SMALL, "rotary_base": 500.0}]


@pytest.mark.parametrize("opset", [13, 17, 23])
@pytest.mark.parametrize("options", FORMS, ids=["grid", "rotary"])
def test_every_opset_and_the_runtime_of_onnx_agree(options: dict[str, object], opset: int) -> None:
    length = tokens(options) if "grid" in options else 60  # onnx.reference gathers no more than 64 elements
    inputs = make_inputs("key_padding", length=length)
    model = attention_model(make_operator("fma", **options), spec_of(inputs, opset))
    onnx.checker.check_model(model, full_check=True)
    feeds = feeds_of(inputs)
    got = run(model, feeds)[0]
    if opset == 17:
        other = onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]
        assert np.abs(got - other).max() <= 1e-5 * np.abs(got).max()
    newest = run(attention_model(make_operator("fma", **options), spec_of(inputs, 18)), feeds)[0]
    assert np.abs(got - newest).max() <= 1e-6 * np.abs(got).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", FORMS, ids=["grid", "rotary"])
def test_other_types(options: dict[str, object], dtype: torch.dtype) -> None:
    length = tokens(options) if "grid" in options else 130
    check("fma", make_inputs("none", length=length, dtype=dtype), **options)


def test_what_no_body_serves_is_named() -> None:
    spec = spec_of(make_inputs("none", length=64))
    pooled = supported(make_operator("fma", sinks=0, queries="pooled"), spec)
    assert not pooled and "queries='pooled'" in pooled.reason
    learned = supported(make_operator("fma", sinks=0, grid=8, block=16, basis="depthwise"), spec)
    assert not learned and "depthwise" in learned.reason
    causal = supported(
        make_operator("fma", sinks=0, grid=8, block=16), spec_of(make_inputs("causal", length=64))
    )
    assert not causal


class Patches(torch.nn.Module):
    """Attention of a class token and 12 x 12 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_vision_model_is_converted_with_its_grid(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 145, 16)
    program = torch.onnx.export(Patches().eval(), (x,), dynamo=True, opset_version=18, verbose=False)
    options = {"grid": 12, "prefix": 1, "sinks": 0, "block": 9, "rank": 1}
    target = tmp_path / "out.onnx"
    (site,) = fa.convert(program.model_proto, target, operator="fma", options=options, repeats=1).sites
    assert site.operator == "fma" and 0 < site.own_error < 1, site.reason
    assert fa.onnx.placement(target) == {"fastattn_0_FMAGrid": "function"}
    (kept,) = fa.convert(
        program.model_proto, operator="fma", options={**options, "prefix": 0}, repeats=1
    ).sites
    assert kept.operator == "exact" and "the grid has 144 tokens" in kept.reason


def test_a_free_length_is_no_grid() -> None:
    model = export(Patches(), torch.randn(2, 145, 16))
    options = {"grid": 12, "prefix": 1, "sinks": 0, "block": 9, "rank": 1}
    (site,) = fa.convert(model, operator="fma", options=options, length=145, repeats=1).sites
    assert site.operator == "exact" and "the grid has 145 tokens" in site.reason
