"""The finder on ONNX graphs: the same sites, masks and sizes as in torch, whatever the exporter and the optimiser made."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_models.helpers import Attention, export

from fastattn_compile.converting.convert import scan_onnx
from fastattn_compile.passes.graph import same_size
from fastattn_compile.passes.onnx.sizes import parse_size, symbol

EXPORTERS = [(True, 18), (True, 23), (False, 17)]


def made(fused: bool, causal: bool, padded: bool, dynamo: bool, opset: int) -> onnx.ModelProto:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 20, 32)] + ([torch.ones(2, 20, dtype=torch.long)] if padded else [])
    names = ("x", "attention_mask")[: len(inputs)]
    return export(
        Attention(fused=fused, causal=causal, padded=padded), *inputs, dynamo=dynamo, opset=opset, names=names
    )


@pytest.mark.parametrize("exporter", EXPORTERS, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "eager"])
@pytest.mark.parametrize(("causal", "padded"), [(False, False), (True, False), (False, True)])
def test_sites_and_masks(fused: bool, causal: bool, padded: bool, exporter: tuple[bool, int]) -> None:
    (line,) = scan_onnx(made(fused, causal, padded, *exporter)).softmaxes
    assert line.status == "taken", line.reason
    assert line.mask == ("causal" if causal else "key_padding" if padded else "none")
    assert (line.kind, line.heads, line.head_dim) == ("self", 4, 8)


def optimised(model: onnx.ModelProto, tmp_path: object, level: str) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(tmp_path / "optimised.onnx"))


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("exporter", [(True, 18), (False, 17)], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "eager"])
def test_graphs_that_the_runtime_optimised(
    fused: bool, exporter: tuple[bool, int], level: str, tmp_path
) -> None:
    """The older exporter's files hold no shapes, and those of fused operators must be inferred."""
    model = optimised(made(fused, True, False, *exporter), tmp_path, level)
    (line,) = scan_onnx(model).softmaxes
    assert (line.status, line.mask) == ("taken", "causal"), line.reason


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "eager"])
def test_dynamic_quantisation(fused: bool, tmp_path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(made(fused, False, True, True, 18), str(source))
    quantize_dynamic(str(source), str(target), extra_options={"MatMulConstBOnly": False})
    (line,) = scan_onnx(target).softmaxes
    assert (line.status, line.mask) == ("taken", "key_padding"), line.reason


def test_a_router_is_no_attention() -> None:
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(x).softmax(-1)

    scan = scan_onnx(export(Router(), torch.randn(2, 20, 32)))
    assert scan.counts == {"taken": 0, "exact": 0, "not_attention": 1}


def test_names_are_module_paths() -> None:
    model = torch.nn.Sequential(Attention(fused=True, causal=True), Attention(fused=True, causal=True))
    for dynamo in (True, False):
        lines = scan_onnx(
            export(model, torch.randn(2, 20, 32), dynamo=dynamo, opset=18 if dynamo else 17)
        ).softmaxes
        assert [line.name for line in lines] == ["0", "1"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7), ("batch", symbol("batch")), ("2*batch + 1", 2 * symbol("batch") + 1), ("seq len", symbol("seq len")),
        ("n//2", symbol("n") // 2), ("((n**2)//n)", symbol("n")),
        ("a**9", symbol("a**9")), ("__import__('os').system('x')", symbol("__import__('os').system('x')")),
        ("(1).__class__", symbol("(1).__class__")), ("", symbol("")),
    ],
)  # fmt: skip
def test_dimensions_are_read_and_never_run(text: str, size: object) -> None:
    assert same_size(parse_size(text), size)


def test_the_standard_operator_is_found() -> None:
    shape = ["batch", 4, "n", 8]
    io = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "qkvy"]
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    graph = onnx.helper.make_graph([node], "g", io[:3], io[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    (line,) = scan_onnx(model).softmaxes
    assert (line.status, line.mask, line.heads, line.head_dim) == ("taken", "causal", 4, 8), line.reason


def test_constants_of_any_layout_are_read() -> None:
    """A causal mask that an exporter folded to a constant is a causal mask."""

    class Folded(Attention):
        def __init__(self) -> None:
            super().__init__(fused=False, causal=False)
            self.register_buffer("future", torch.ones(20, 20).triu(1).bool())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                p(x).view(2, 20, -1, 8).transpose(1, 2).repeat_interleave(r, 1)
                for p, r in ((self.q, 1), (self.k, 2), (self.v, 2))
            )
            scores = (q @ k.transpose(-1, -2)).masked_fill(self.future, -1e4)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 20, -1))

    model = torch.onnx.export(
        Folded().eval(), (torch.randn(2, 20, 32),), dynamo=True, opset_version=18, verbose=False
    )
    (line,) = scan_onnx(model.model_proto).softmaxes
    assert (line.status, line.mask) == ("taken", "causal"), line.reason
    assert np.asarray(line.head_dim) == 8


class Packed(torch.nn.Module):
    """A causal mask made as transformers makes it: documents begin anew where the positions do."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        if positions is None:
            positions = torch.arange(length, device=x.device)[None].expand(batch, -1)
        before = positions[:, :1] - 1
        document = (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)
        rows = torch.arange(batch, device=x.device)[:, None, None]
        queries = torch.arange(length, device=x.device)[None, :, None]
        keys = torch.arange(length, device=x.device)[None, None, :]
        seen = keys <= queries
        seen = seen & (document[rows, queries] == document[rows, keys])
        heads = x.view(batch, length, 4, 8).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen[:, None])
        return y.transpose(1, 2).reshape(batch, length, -1)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_documents_that_positions_tell_apart(given: bool, opset: int) -> None:
    """Positions that are counted make one document, whatever the model asks of them; given ones may make several."""
    inputs = [torch.randn(2, 20, 32)] + ([torch.arange(20).repeat(2, 1)] if given else [])
    model = export(Packed(), *inputs, opset=opset, names=("x", "positions")[: len(inputs)])
    (line,) = scan_onnx(model).softmaxes
    assert (line.status, line.mask) == ("taken", "causal & segments" if given else "causal"), line.reason
