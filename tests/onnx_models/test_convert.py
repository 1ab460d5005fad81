"""``fa.convert``: files in, files out, with the delta; nothing lost when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_models.helpers import Attention, export, run

import fastattn_compile as fa
from fastattn_compile.errors import ConversionError, ModelLoadError, OptionError

FAST = {"length": 100, "repeats": 1, "threads": 1}
FMA = {"operator": "fma", "options": {"block": 16, "rank": 4}}


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(Attention(fused=True, causal=True) for _ in range(2)))
    return export(stack, torch.randn(2, 20, 32))


@pytest.fixture
def path(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    onnx.save(proto, str(tmp_path / "in.onnx"))
    return tmp_path / "in.onnx"


def test_exact_reproduces_the_model(proto: onnx.ModelProto, path: Path, tmp_path: Path) -> None:
    report = fa.convert(path, tmp_path / "out.onnx", operator="exact", **FAST)
    x = np.random.default_rng(0).standard_normal((3, 77, 32)).astype(np.float32)
    (a,), (b,) = run(proto, {"x": x}), run(onnx.load(str(tmp_path / "out.onnx")), {"x": x})
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)
    assert [site.own_error < 1e-5 for site in report.sites] == [True, True]


def test_fma_is_what_it_is_in_torch(path: Path, tmp_path: Path) -> None:
    report = fa.convert(path, tmp_path / "out.onnx", **FMA, **FAST)
    assert [(s.name, s.operator) for s in report.sites] == [("0", "fma"), ("1", "fma")]
    assert all(0 < s.own_error <= s.own_error_p95 for s in report.sites)
    assert report.model.hidden_cosine > 0.9
    assert report.cost.total_ms > 0
    assert report.provenance["session_load_seconds"] > 0
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(Attention(fused=True, causal=True) for _ in range(2))).eval()
    x = torch.randn(1, 200, 32)
    fast = torch.compile(
        module,
        backend="fastattn",
        options={"operator": "fma", "block": 16, "rank": 4, "compiler": "eager", "quiet": True},
    )
    with torch.no_grad():
        wanted = fast(x)
    (got,) = run(onnx.load(str(tmp_path / "out.onnx")), {"x": x.numpy()})
    assert np.linalg.norm(got - wanted.numpy()) <= 1e-5 * np.linalg.norm(got)


def test_the_file_keeps_what_it_said(proto: onnx.ModelProto, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    fa.convert(path, out, **FMA, **FAST)
    made = onnx.load(str(out))
    onnx.checker.check_model(made, full_check=True)
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    assert [i.name for i in made.graph.input] == [i.name for i in proto.graph.input]
    assert [o.name for o in made.graph.output] == [o.name for o in proto.graph.output]
    assert made.graph.input[0].type == proto.graph.input[0].type
    assert made.ir_version == proto.ir_version
    assert {o.domain: o.version for o in made.opset_import} == {"": 18, "fastattn": 1}
    nodes = [n for n in made.graph.node if n.domain == "fastattn"]
    assert [n.op_type for n in nodes] == ["FMA", "FMA"]
    said = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert (said["block"], said["rank"], said["body_version"], said["mask"]) == (16, 4, 1, b"causal")
    assert len(made.functions) == 1
    assert "Softmax" not in {n.op_type for n in made.graph.node}


def test_a_plan_drives_it_by_the_same_names(path: Path, tmp_path: Path) -> None:
    plan = fa.Plan({"1": fa.PlannedSite("fma", {"block": 16})})
    plan.save(tmp_path / "plan.json")
    report = fa.convert(path, tmp_path / "out.onnx", plan=tmp_path / "plan.json", **FAST)
    assert [site.operator for site in report.sites] == ["exact", "fma"]
    with pytest.raises(OptionError, match="the plan names sites the model does not have: 7"):
        fa.convert(path, plan=fa.Plan({"7": fa.PlannedSite("fma")}), **FAST)


def test_two_configurations_are_two_functions(path: Path, tmp_path: Path) -> None:
    plan = fa.Plan({"0": fa.PlannedSite("fma", {"block": 16}), "1": fa.PlannedSite("fma", {"block": 32})})
    fa.convert(path, tmp_path / "out.onnx", plan=plan, **FAST)
    made = onnx.load(str(tmp_path / "out.onnx"))
    assert sorted(f.overload for f in made.functions) == ["", "v2"]
    assert run(made, {"x": np.zeros((1, 50, 32), np.float32)})[0].shape == (1, 50, 32)


def test_tolerance_keeps_sites_exact_or_fails(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = fa.convert(path, out, tolerance=1e-9, options={"block": 16}, **FAST)
    assert not any(site.replaced for site in report.sites)
    assert "above tolerance" in report.sites[0].reason
    assert not out.exists()
    out.write_text("what was there")
    with pytest.raises(ConversionError, match="over budget: 2 of 2 sites"):
        fa.convert(path, out, **FMA, tolerance=1e-9, **FAST)
    assert out.read_text() == "what was there"


def test_bytes_protos_and_models(proto: onnx.ModelProto, tmp_path: Path) -> None:
    for source in (proto, proto.SerializeToString(), ir.from_proto(proto)):
        report = fa.convert(source, tmp_path / "out.onnx", **FMA, **FAST)
        assert len(report.sites) == 2


def test_inputs_of_the_user(path: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((1, 64, 32), np.float32))
    report = fa.convert(path, inputs=tmp_path / "x.npz", **FMA, **FAST)
    assert report.provenance["inputs"] == {"x": [1, 64, 32]}
    with pytest.raises(OptionError, match="missing: x; unknown: y"):
        fa.convert(path, inputs={"y": np.ones(3)}, **FMA, **FAST)
    with pytest.raises(OptionError, match="must be of type FLOAT"):
        fa.convert(path, inputs={"x": np.ones((1, 64, 32))}, **FMA, **FAST)
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(OptionError, match=r"bad.npz is no .npz file"):
        fa.convert(path, inputs=tmp_path / "bad.npz", **FMA, **FAST)


def test_external_data_stays_external(proto: onnx.ModelProto, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    onnx.save(
        onnx.ModelProto.FromString(proto.SerializeToString()),
        str(folder / "in.onnx"),
        save_as_external_data=True,
        location="w.data",
        size_threshold=1024,
    )
    fa.convert(folder / "in.onnx", tmp_path / "out.onnx", **FMA, **FAST)
    (data,) = tmp_path.glob("out.*.data")
    made = onnx.load(str(tmp_path / "out.onnx"))
    assert data.stat().st_size > 1000
    assert run(made, {"x": np.zeros((1, 50, 32), np.float32)})[0].shape == (1, 50, 32)
    model = ir.load(folder / "in.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "../secret", 0, value.const_value.nbytes, value.const_value.dtype, shape=value.const_value.shape,
                name=value.name, base_dir=str(folder),
            )  # fmt: skip
            break
    ir.save(model, folder / "evil.onnx")
    with pytest.raises(ModelLoadError, match="outside the folder of the model"):
        fa.convert(folder / "evil.onnx", **FMA, **FAST)
    (folder / "w.data").write_bytes(b"short")
    with pytest.raises(ModelLoadError, match=r"of w.data, and the file ends at 5"):
        fa.convert(folder / "in.onnx", **FMA, **FAST)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no model at all" * 9]
)
def test_broken_files_are_named(proto: onnx.ModelProto, tmp_path: Path, damage) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(damage(proto.SerializeToString()))
    with pytest.raises(ModelLoadError, match=r"broken.onnx"):
        fa.convert(broken, tmp_path / "out.onnx", **FMA, **FAST)
    assert not (tmp_path / "out.onnx").exists()


def test_cycles_and_double_names_are_named(proto: onnx.ModelProto, tmp_path: Path) -> None:
    twice = onnx.ModelProto.FromString(proto.SerializeToString())
    twice.graph.node[3].output[0] = twice.graph.node[2].output[0]
    with pytest.raises(ModelLoadError):
        fa.convert(twice, **FMA, **FAST)
    cyclic = onnx.ModelProto.FromString(proto.SerializeToString())
    last = next(n for n in reversed(cyclic.graph.node) if n.op_type == "MatMul")
    first = next(n for n in cyclic.graph.node if n.op_type == "MatMul")
    first.input[0] = last.output[0]
    with pytest.raises(ModelLoadError):
        fa.convert(cyclic, **FMA, **FAST)


def test_a_softmax_over_a_flattened_tensor(tmp_path: Path) -> None:
    """So ``onnx.version_converter`` writes those of opset 12, where it does not know their shapes."""
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2, "n", 8]) for n in "xy")
    make = onnx.helper.make_node
    nodes = [
        make("Transpose", ["x"], ["columns"], perm=[0, 1, 3, 2]),
        make("MatMul", ["x", "columns"], ["scores"]),
        make("Shape", ["scores"], ["whole"]),
        make("Flatten", ["scores"], ["flat"], axis=3),
        make("Softmax", ["flat"], ["weights"], axis=-1),
        make("Reshape", ["weights", "whole"], ["back"]),
        make("MatMul", ["back", "x"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "raised", [x], [y])
    raised = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
    report = fa.convert(raised, tmp_path / "out.onnx", operator="exact", **FAST)
    assert report.sites[0].own_error < 1e-6
    given = np.random.default_rng(0).standard_normal((1, 2, 50, 8)).astype(np.float32)
    (a,), (b,) = run(raised, {"x": given}), run(onnx.load(str(tmp_path / "out.onnx")), {"x": given})
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)
    raised.graph.node[3].attribute[0].i = 2  # over two dimensions: no attention
    assert not fa.convert(raised, operator="exact", **FAST).sites


def test_what_stands_beside_attention_stays_as_it_was(proto: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(proto.SerializeToString())
    model.producer_name, model.domain, model.model_version, model.doc_string = (
        "me",
        "acme",
        7,
        "what it is for",
    )
    model.metadata_props.add(key="licence", value="MIT")
    model.graph.metadata_props.add(key="part", value="encoder")
    last = model.graph.node[-1]
    last.doc_string = "the projection"
    last.metadata_props.add(key="note", value="keep")
    onnx.save(model, str(tmp_path / "in.onnx"))
    fa.convert(tmp_path / "in.onnx", tmp_path / "out.onnx", **FMA, **FAST)
    made = onnx.load(str(tmp_path / "out.onnx"))
    for name in ("ir_version", "producer_name", "domain", "model_version", "doc_string"):
        assert getattr(made, name) == getattr(model, name)
    assert {p.key: p.value for p in made.metadata_props} == {p.key: p.value for p in model.metadata_props}
    assert {p.key: p.value for p in made.graph.metadata_props}.items() >= {"part": "encoder"}.items()
    (same,) = (n for n in made.graph.node if n.name == last.name)
    assert (same.input, same.output, same.doc_string) == (last.input, last.output, last.doc_string)
    assert {p.key: p.value for p in same.metadata_props} == {p.key: p.value for p in last.metadata_props}
    weights = {t.name: t for t in model.graph.initializer}
    assert all(t.raw_data == weights[t.name].raw_data for t in made.graph.initializer if t.name in weights)


def test_in_place_is_refused(path: Path) -> None:
    with pytest.raises(OptionError, match="is the model itself"):
        fa.convert(path, path, **FMA, **FAST)


def test_the_command(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fastattn_compile.cli.app import app

    monkeypatch.chdir(tmp_path)
    words = [
        "convert",
        "in.onnx",
        "-o",
        "out.onnx",
        "--operator",
        "fma",
        "--option",
        "block=16",
        "--length",
        "100",
        "--repeats",
        "1",
    ]
    result = CliRunner().invoke(app, [*words, "--json", "--report", "report.json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "fastattn.report/1"
    assert json.loads(Path("report.json").read_text()) == document
    assert document["provenance"]["kernels"] == {"FMA": "native"}
    told = CliRunner().invoke(app, words).output
    assert "Nodes FMA run native kernels" in told and "functions everywhere" not in told
    assert CliRunner().invoke(app, [*words, "--tolerance", "1e-9"]).exit_code == 3
    assert CliRunner().invoke(app, ["scan", "in.onnx"]).exit_code == 0
    assert CliRunner().invoke(app, ["convert", "nothing.onnx"]).exit_code == 2
    result = CliRunner().invoke(
        app, ["convert", "in.onnx", "--operator", "linformer", "-o", "no.onnx"]
    )  # causal
    assert result.exit_code == 4
    assert not Path("no.onnx").exists()


class Alibi(torch.nn.Module):
    """Causal attention with slopes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        place = torch.arange(x.shape[1])
        distance = place - place[:, None]
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        scores = (q @ q.mT + slopes * distance).masked_fill(distance > 0, -torch.inf)
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("operator", ["exact", "fma"])
def test_a_bias_keeps_a_site_as_it_is(tmp_path: Path, operator: str) -> None:
    """Operators add biases by distance; their ONNX bodies do not, and a site never loses what it adds."""
    onnx.save(export(Alibi(), torch.randn(2, 20, 32)), str(tmp_path / "in.onnx"))
    report = fa.convert(tmp_path / "in.onnx", tmp_path / "out.onnx", operator=operator, **FAST)
    assert [site.operator for site in report.sites] == ["exact"]
    assert "add no bias" in report.sites[0].reason
    assert not (tmp_path / "out.onnx").exists()


def test_the_report_tells_the_length_of_the_inputs_that_were_given() -> None:
    model = export(Attention(fused=True, causal=True), torch.randn(1, 24, 32))
    given = {"x": np.random.default_rng(0).standard_normal((1, 96, 32)).astype(np.float32)}
    report = fa.convert(model, operator="fma", options={"block": 16}, inputs=given, repeats=1, threads=1)
    assert report.cost is not None and report.cost.n == 96


def _bidirectional() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Attention(fused=True, causal=False) for _ in range(2))).eval()


def test_learned_parameters_start_from_the_inputs_and_are_weights_of_the_model(tmp_path: Path) -> None:
    model = export(_bidirectional(), torch.randn(2, 20, 32))
    report = fa.convert(model, tmp_path / "out.onnx", operator="linformer", options={"rank": 8}, **FAST)
    assert [site.operator for site in report.sites] == ["linformer", "linformer"]
    assert all("nobody has fitted them" in site.reason for site in report.sites)
    made = onnx.load(str(tmp_path / "out.onnx"))
    onnx.checker.check_model(made, full_check=True)
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    nodes = [n for n in made.graph.node if n.domain == "fastattn"]
    assert {name for n in nodes for name in n.input[4:]} <= {i.name for i in made.graph.initializer}
    assert [len(n.input) for n in nodes] == [6, 6]


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("tf_attention", {"height": 3}),
        ("tc_attention", {"height": 3}),
        ("window", {"width": 16}),
        ("barnes_hut", {"block": 16, "open": 4}),
        ("conv_basis", {"k": 8}),
    ],
)
def test_operators_that_have_a_body_convert(
    path: Path, tmp_path: Path, operator: str, options: dict[str, object]
) -> None:
    report = fa.convert(path, tmp_path / "out.onnx", operator=operator, options=options, **FAST)
    assert [site.operator for site in report.sites] == [operator] * 2
    made = onnx.load(str(tmp_path / "out.onnx"))
    onnx.checker.check_model(made, full_check=True)
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    assert run(made, {"x": np.zeros((2, 50, 32), np.float32)})[0].shape == (2, 50, 32)


def test_cast_converts(tmp_path: Path) -> None:
    model = export(_bidirectional(), torch.randn(2, 20, 32))
    report = fa.convert(model, tmp_path / "out.onnx", operator="cast", options={"clusters": 4}, **FAST)
    assert report.provenance["kernels"] == {"CAST": "function"}
    assert [site.operator for site in report.sites] == ["cast", "cast"]
    made = onnx.load(str(tmp_path / "out.onnx"))
    onnx.checker.check_model(made, full_check=True)
    assert run(made, {"x": np.zeros((2, 50, 32), np.float32)})[0].shape == (2, 50, 32)


def test_a_fitted_retrofit_is_what_it_is_in_torch(tmp_path: Path) -> None:
    module, x = _bidirectional(), torch.randn(1, 96, 32)
    plan = fa.Plan({"1": fa.PlannedSite("linformer", {"rank": 8})})
    for bundle in fa.attach(module, plan, x).values():
        for parameter in bundle.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    fa.save_pretrained(module, tmp_path / "fitted", plan=plan)
    with torch.no_grad():
        compiled = torch.compile(
            module, backend="fastattn", options={"plan": plan, "compiler": "eager", "quiet": True}
        )
        wanted = compiled(x).numpy()
    model = export(_bidirectional(), torch.randn(2, 20, 32))
    report = fa.convert(
        model, tmp_path / "out.onnx", plan=tmp_path / "fitted", longest=96, **{**FAST, "length": 96}
    )
    assert [site.operator for site in report.sites] == ["exact", "linformer"]
    assert not any("nobody has fitted" in site.reason for site in report.sites)
    (got,) = run(onnx.load(str(tmp_path / "out.onnx")), {"x": x.numpy()})
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(got)
