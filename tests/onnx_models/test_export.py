"""Models that call our operators, exported by torch.onnx.export: the same nodes as a conversion writes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_models.helpers import run

import fastattn_compile as fa
from fastattn_compile.errors import ConversionError


class Model(torch.nn.Module):
    def __init__(self, mask: str = "causal", operator: str = "fma", **options: object):
        super().__init__()
        self.qkv, self.mask = torch.nn.Linear(32, 96), mask
        self.operator = fa.make_operator(operator, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y, _ = fa.attend(q, k, v, self.operator, mask=self.mask)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("mask", ["causal", "none"])
def test_a_call_becomes_a_node_with_its_body(mask: str, opset: int) -> None:
    module = Model(mask, block=16, rank=4, sinks=3).eval()
    length = torch.export.Dim("length", min=2, max=8192)
    model = fa.onnx.export(
        module,
        (torch.randn(1, 64, 32),),
        dynamic_shapes=({1: length},),
        opset_version=opset,
        input_names=["x"],
    )
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node if n.domain == "fastattn"] == ["FMA"]
    x = torch.randn(1, 150, 32)
    (out,) = run(model, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(out, module(x).numpy(), rtol=1e-4, atol=1e-5)


def test_what_a_body_cannot_say_is_refused() -> None:
    with pytest.raises(ConversionError, match="even distances"):
        fa.onnx.export(Model("none", "conv_basis", k=8, anchors="jumps").eval(), (torch.randn(1, 64, 32),))


class Learned(torch.nn.Module):
    """Projections of 128 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.operator = torch.nn.Linear(32, 96), fa.make_operator("linformer", rank=8)
        self.keys, self.values = (torch.nn.Parameter(torch.randn(1, 8, 128) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y, _ = fa.attend(q, k, v, self.operator, parameters=(self.keys, self.values))
        return y.transpose(1, 2).flatten(2)


def test_learned_parameters_are_inputs_of_the_node() -> None:
    module = Learned().eval()
    length = torch.export.Dim("length", min=8, max=128)
    model = fa.onnx.export(
        module, (torch.randn(1, 64, 32),), dynamic_shapes=({1: length},), input_names=["x"], longest=128
    )
    (node,) = [n for n in model.graph.node if n.domain == "fastattn"]
    assert (node.op_type, list(node.input[3:])) == ("Linformer", ["", "keys", "values"])
    assert {"keys", "values"} <= {i.name for i in model.graph.initializer}
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(2, 100, 32)[:1]
    with torch.no_grad():
        np.testing.assert_allclose(run(model, {"x": x.numpy()})[0], module(x).numpy(), rtol=1e-4, atol=1e-5)


def test_several_operators_in_one_model() -> None:
    first = Model("causal", block=16, rank=4, sinks=3)
    second = Model("none", block=16, rank=2, sinks=0)
    third = Model("causal", "window", width=20, sinks=2)
    fourth = Model("causal", "barnes_hut", block=16, open=4)
    fifth = Model("none", "conv_basis", k=8)
    module = torch.nn.Sequential(first, second, third, fourth, fifth).eval()
    model = fa.onnx.export(module, (torch.randn(1, 96, 32),), input_names=["x"])
    ours = [(n.op_type, n.overload) for n in model.graph.node if n.domain == "fastattn"]
    assert ours == [("FMA", ""), ("FMA", "v2"), ("Window", ""), ("BarnesHut", ""), ("ConvBasis", "")]
    x = torch.randn(1, 96, 32)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, {"x": x.numpy()})[0], module(x).numpy(), rtol=1e-4, atol=1e-5)
        native = fa.onnx.session(model.SerializeToString()).run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(native, module(x).numpy(), rtol=1e-4, atol=1e-5)
