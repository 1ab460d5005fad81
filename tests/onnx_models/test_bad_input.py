"""Files that are broken, hostile or no models, and places that take no files: a clear error, an exit code, nothing lost."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models.helpers import Attention, export
from safetensors.torch import save as safetensors
from typer.testing import CliRunner

import fastattn_compile as fa
from fastattn_compile.cli.app import app
from fastattn_compile.converting.checks import read_file
from fastattn_compile.errors import ModelLoadError
from fastattn_compile.passes.onnx.sizes import parse_size, symbol

WORDS = ("--operator", "fma", "--option", "block=16", "--length", "40", "--repeats", "1", "--threads", "1")


@pytest.fixture(scope="module")
def whole() -> onnx.ModelProto:
    torch.manual_seed(0)
    return export(Attention(fused=True, causal=True), torch.randn(2, 20, 32))


@pytest.fixture
def model(whole: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(whole.SerializeToString())


def convert(source: Path, out: Path, *more: str) -> tuple[int, str]:
    """Exit code and the line of the error, as ``fastattn convert`` gives them."""
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(out), *WORDS, *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return result.exit_code, lines[-1] if lines else ""


def refused(source: Path, words: str) -> None:
    """Exit code 2, these words, the given file untouched and what stood at the target still there."""
    before, out = source.read_bytes() if source.is_file() else None, source.parent / "out.onnx"
    out.write_text("what was there")
    others = set(source.parent.iterdir())
    code, line = convert(source, out)
    assert words in line, line
    assert code == 2
    assert out.read_text() == "what was there"
    assert set(source.parent.iterdir()) == others
    assert before is None or source.read_bytes() == before


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    size, length = len(content), b""
    while size >= 128:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        branch = field(1, b"then_branch") + b"\xa0\x01\x05" + field(6, graph)
        graph = field(1, field(4, b"If") + field(5, branch))
    return b"\x08\x0a" + field(8, field(1, b"") + b"\x10\x12") + field(7, graph)


def saved_by_torch() -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b"", "is empty; expected an ONNX model"),
        (lambda b: b[: len(b) // 2], "does not read as an ONNX model"),
        (lambda b: b[:-1], "cut short"),
        (lambda b: b[:10], "does not read as an ONNX model"),
        (lambda b: bytes(1000), "does not read as an ONNX model"),
        (lambda b: np.random.default_rng(0).bytes(5000), "does not read as an ONNX model"),
        (lambda b: b"\x3a\xff\xff\xff\xff\x0fabc", "does not read as an ONNX model"),  # a graph of 4 GB
        (lambda b: b"\x3a" + b"\xff" * 8 + b"\x7fabc", "does not read as an ONNX model"),  # of 2^63 bytes
        (lambda b: nested(5000), "does not read as an ONNX model"),
        (lambda b: nested(20), "the graph has no outputs"),
        (lambda b: b"A file to read first.\n" * 30, "it looks like a text"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda b: safetensors({"a": torch.zeros(4, 4)}), "it looks like a safetensors file"),
        (lambda b: saved_by_torch(), "it looks like a zip archive"),
        (lambda b: b.replace(b"main_graph", b"\xff\xfein_graph"), "broken"),  # no UTF-8
    ],
)
def test_files_that_are_no_models(
    whole, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    (tmp_path / "in.onnx").write_bytes(damage(whole.SerializeToString()))
    refused(tmp_path / "in.onnx", words)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.onnx", "no such file")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "is a folder, not a file")


def test_a_file_beyond_protobuf(tmp_path: Path) -> None:
    with (tmp_path / "in.onnx").open("wb") as stream:
        stream.truncate((1 << 31) + 1)  # takes no room
    with pytest.raises(ModelLoadError, match=r"has 2.0 GB; protobuf holds at most 2 GB"):
        read_file(tmp_path / "in.onnx")


def weight(model: onnx.ModelProto) -> TensorProto:
    return max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))


def node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


def behind(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Puts nodes between the last one, whose output becomes ``before``, and the output of the model."""
    name = model.graph.output[0].name
    next(n for n in model.graph.node if name in n.output).output[0] = "before"
    nodes[-1].output[0] = name
    model.graph.node.extend(nodes)


def foreign(model: onnx.ModelProto) -> None:
    behind(model, helper.make_node("Foo", ["before"], ["after"], domain="acme"))
    model.opset_import.append(helper.make_opsetid("acme", 1))


def recursive(model: onnx.ModelProto) -> None:
    itself = helper.make_node("R", ["a"], ["b"], domain="acme")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    model.functions.append(helper.make_function("acme", "R", ["a"], ["b"], [itself], opsets))
    model.opset_import.append(opsets[1])
    behind(model, helper.make_node("R", ["before"], ["after"], domain="acme"))


def dangling_function(model: onnx.ModelProto) -> None:
    inside = helper.make_node("Relu", ["nowhere"], ["b"])
    model.functions.append(
        helper.make_function("acme", "F", ["a"], ["b"], [inside], [helper.make_opsetid("", 18)])
    )


def bomb(model: onnx.ModelProto) -> None:
    """A tensor of 2^40 numbers, made of one."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "huge"))
    behind(
        model,
        helper.make_node("ConstantOfShape", ["huge"], ["filled"]),
        helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
        helper.make_node("Add", ["before", "sum"], ["after"]),
    )


def attribute(op_type: str, **given: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for n in model.graph.node:
            if n.op_type == op_type:
                del n.attribute[:]
                n.attribute.extend(helper.make_attribute(k, v) for k, v in given.items())

    return change


def renamed_output(of: int, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[of].output[0] = name

    return change


def dimension(place: int, size: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = size

    return change


def cyclic(model: onnx.ModelProto) -> None:
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    products[0].input[0] = products[-1].output[0]


def one_name(model: onnx.ModelProto) -> None:
    for n in model.graph.node:
        n.name = "same"


def clear(of: Callable[[onnx.ModelProto], object], name: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: of(model).ClearField(name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: weight(m).dims.__setitem__(0, -32), "has shape [-32, 32]"),
        (lambda m: weight(m).dims.__setitem__(0, 1 << 40), "needs 140737488355328 bytes and has 4096"),
        (lambda m: weight(m).dims.append(7), "of shape [32, 32, 7] needs 28672 bytes and has 4096"),
        (lambda m: setattr(weight(m), "data_type", 99), "is of type 99, which ONNX does not have"),
        (lambda m: setattr(weight(m), "data_type", 0), "is of type 0, which ONNX does not have"),
        (lambda m: setattr(weight(m), "data_type", TensorProto.DOUBLE), "needs 8192 bytes and has 4096"),
        (lambda m: setattr(weight(m), "data_type", TensorProto.INT32), "tensor(int32)"),
        (clear(weight, "raw_data"), "needs 1024 entries and has no data"),
        (lambda m: m.graph.initializer.remove(weight(m)), "which no input, weight or node gives"),
        (lambda m: m.graph.node.remove(node(m, "MatMul")), "which no input, weight or node gives"),
        (lambda m: m.graph.initializer.append(weight(m)), "two values are named"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "two values are named 'x'"),
        (renamed_output(3, "x"), "two values are named 'x'"),
        (lambda m: renamed_output(3, weight(m).name)(m), "two values are named"),
        (lambda m: renamed_output(3, m.graph.node[2].output[0])(m), "two values are named"),
        (one_name, "two nodes with same node name"),
        (cyclic, "read each other in a cycle"),
        (lambda m: node(m, "MatMul").input.__setitem__(0, node(m, "MatMul").output[0]), "in a cycle"),
        (clear(lambda m: m, "graph"), "holds no graph; is it an ONNX model?"),
        (clear(lambda m: m.graph, "output"), "the graph has no outputs"),
        (lambda m: setattr(m.graph.output[0], "name", "other"), "nothing gives the output 'other'"),
        (clear(lambda m: m, "opset_import"), "does not say which opset it uses"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "uses opset 999; the installed onnx"),
        (lambda m: setattr(m.opset_import[0], "version", -5), "uses opset -5"),
        (lambda m: setattr(m, "ir_version", 0), "does not say its IR version"),
        (lambda m: setattr(m, "ir_version", 99), "the original model does not load in ONNX Runtime"),
        (foreign, "acme:Foo(-1) is not a registered function/op"),
        (lambda m: setattr(node(m, "Transpose"), "op_type", "Foo"), "No Op registered for Foo"),
        (recursive, "Model-local functions must not be recursive"),
        (dangling_function, "reads 'nowhere'"),
        (clear(lambda m: node(m, "Softmax"), "input"), "has input size 0 not in range"),
        (lambda m: node(m, "MatMul").input.pop(), "has input size 1 not in range"),
        (attribute("Transpose", perm=[9, 9, 9, 9]), "Invalid attribute perm"),
        (attribute("Transpose", perm=[0]), "the original model does not load in ONNX Runtime"),
        (attribute("Transpose", perm=1.5), "Mismatched attribute type"),
        (attribute("Softmax", axis=17), "'axis' must be in [-4 , 3]"),
        (attribute("Softmax", axis="last"), "Mismatched attribute type"),
        (dimension(2, -32), "input 'x' has a dimension of -32"),
        (dimension(1, 1 << 50), "is too large to be made up; give arrays of your own (--inputs)"),
        (clear(lambda m: m.graph.input[0], "type"), "does not have type information"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77), "77 is not a valid DataType"),
        (bomb, "the original model does not run on"),
    ],
)  # fmt: skip
def test_models_that_are_broken(
    model: onnx.ModelProto, tmp_path: Path, damage: Callable[[onnx.ModelProto], object], words: str
) -> None:
    damage(model)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "in.onnx", words)


def test_a_dimension_of_minus_one_is_a_free_one(model: onnx.ModelProto, tmp_path: Path) -> None:
    """So Paddle writes it."""
    for place in (0, 1):
        dimension(place, -1)(model)
    del model.graph.value_info[:]
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    code, line = convert(tmp_path / "in.onnx", tmp_path / "out.onnx", "--length", "50")
    assert not code, line
    assert onnx.load(str(tmp_path / "out.onnx")).functions


def test_exact_attention_that_was_asked_for_is_written(path: Path) -> None:
    code, line = convert(path, path.parent / "out.onnx", "--operator", "exact", "--option", "block=16")
    assert code == 2 and "block" in line
    words = ["convert", str(path), "-o", str(path.parent / "out.onnx"), "--operator", "exact", "-n", "40"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert onnx.load(str(path.parent / "out.onnx")).functions


def test_names_of_dimensions_are_no_programs() -> None:
    for text in ("9**9**9**9", "((((9**62)**62)**62)**62)", "__import__('os').getpid()", "(" * 5000, "a**b"):
        assert parse_size(text) == symbol(text)
    assert parse_size("2**10*n - 3") == 1024 * symbol("n") - 3


# Weights in other files.


def elsewhere(
    model: onnx.ModelProto, location: str, tensor: TensorProto | None = None, **said: object
) -> bytes:
    """Moves the data of a weight to another file, which is not written, and returns it."""
    tensor = weight(model) if tensor is None else tensor
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": len(data), **said}.items():
        tensor.external_data.add(key=key, value=str(value))
    return data


@pytest.mark.parametrize(
    ("location", "said", "words"),
    [
        ("/etc/passwd", {}, "outside the folder of the model (/etc/passwd); refused"),
        ("/dev/zero", {}, "outside the folder of the model"),
        ("../secret.data", {}, "outside the folder of the model"),
        ("sub/../../secret.data", {}, "outside the folder of the model"),
        ("link.data", {}, "outside the folder of the model"),
        ("linked/secret.data", {}, "outside the folder of the model"),
        ("", {}, "outside the folder of the model (no location)"),
        (".", {}, "outside the folder of the model"),
        ("nothing.data", {}, "there is no such file beside the model"),
        ("short.data", {}, "ends at byte 4096 of short.data, and the file ends at 10"),
        ("good.data", {"offset": 8}, "ends at byte 4104 of good.data"),
        ("good.data", {"offset": -8}, "expected two numbers"),
        ("good.data", {"offset": "far"}, "expected two numbers"),
        ("good.data", {"length": 1 << 70}, "needs 4096 bytes"),
        ("good.data", {"length": 8}, "needs 4096 bytes, good.data gives it 8"),
    ],
)
@pytest.mark.parametrize("place", ["weight", "constant"])
def test_weights_elsewhere(
    model: onnx.ModelProto, tmp_path: Path, place: str, location: str, said: dict[str, object], words: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensor = None
    if place == "constant":
        constant = helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(np.ones((32, 32), np.float32))
        )
        behind(model, constant, helper.make_node("MatMul", ["before", "c"], ["after"]))
        tensor = model.graph.node[-2].attribute[0].t
    data = elsewhere(model, location, tensor, **said)
    (tmp_path / "secret.data").write_bytes(data)
    (folder / "good.data").write_bytes(data)
    (folder / "short.data").write_bytes(data[:10])
    (folder / "link.data").symlink_to("../secret.data")
    (folder / "linked").symlink_to("..")
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    refused(folder / "in.onnx", words)


@pytest.mark.parametrize("place", ["weight", "constant", "branch"])
def test_weights_beside_the_model_come_along(model: onnx.ModelProto, tmp_path: Path, place: str) -> None:
    """The result stands where no file of the model is."""
    given, made = tmp_path / "given", tmp_path / "made"
    given.mkdir()
    ones, tensor = numpy_helper.from_array(np.ones((32, 32), np.float32), "ones"), None
    if place == "constant":
        constant = helper.make_node("Constant", [], ["c"], value=ones)
        behind(model, constant, helper.make_node("MatMul", ["before", "c"], ["after"]))
        tensor = model.graph.node[-2].attribute[0].t
    elif place == "branch":
        shown = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        product = helper.make_node("MatMul", ["before", "ones"], ["y"])
        branch = helper.make_graph([product], "one", [], [shown], [ones])
        other = helper.make_graph([helper.make_node("Identity", ["before"], ["y"])], "other", [], [shown])
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        behind(model, helper.make_node("If", ["yes"], ["after"], then_branch=branch, else_branch=other))
        (tensor,) = (a.g.initializer[0] for a in model.graph.node[-1].attribute if a.g.initializer)
    (given / "w.data").write_bytes(elsewhere(model, "w.data", tensor))
    (given / "in.onnx").write_bytes(model.SerializeToString())
    code, line = convert(given / "in.onnx", made / "out.onnx")
    assert not code, line
    x = np.random.default_rng(0).standard_normal((1, 50, 32)).astype(np.float32)
    both = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (given / "in.onnx", made / "out.onnx")
    ]
    assert np.linalg.norm(both[0] - both[1]) < 0.2 * np.linalg.norm(both[0])


def test_the_weights_of_the_model_are_no_target(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = elsewhere(model, "w.data")
    (tmp_path / "w.data").write_bytes(data)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    code, line = convert(tmp_path / "in.onnx", tmp_path / "w.data")
    assert code == 2 and "holds the weights of the model" in line
    assert (tmp_path / "w.data").read_bytes() == data


# Places that take no files, and processes that end in the middle.


@pytest.fixture
def path(whole: onnx.ModelProto, tmp_path: Path) -> Path:
    (tmp_path / "in.onnx").write_bytes(whole.SerializeToString())
    return tmp_path / "in.onnx"


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "dots"])
def test_the_model_itself_is_no_target(path: Path, link: str) -> None:
    before, out = path.read_bytes(), path.parent / "other.onnx"
    if link == "symbolic":
        out.symlink_to(path)
    elif link == "hard":
        os.link(path, out)
    else:
        out = path if link == "same" else path.parent / "x" / ".." / "in.onnx"
    code, line = convert(path, out)
    assert code == 2 and "is the model itself" in line
    assert path.read_bytes() == before


@pytest.mark.parametrize("report", ["in.onnx", "out.onnx"])
def test_a_report_overwrites_no_model(path: Path, report: str) -> None:
    before = path.read_bytes()
    code, line = convert(path, path.parent / "out.onnx", "--report", str(path.parent / report))
    assert code == 2 and "name another file for the report" in line
    assert path.read_bytes() == before and not (path.parent / "out.onnx").exists()


def test_folders_that_take_no_files(path: Path) -> None:
    (path.parent / "file").write_text("no folder")
    code, line = convert(path, path.parent / "file" / "out.onnx")
    assert code == 2 and "no file can be written to" in line
    code, line = convert(path, path.parent)
    assert code == 2 and "is a folder; name a file" in line
    if sys.platform == "linux":
        code, line = convert(path, Path("/proc/self/out.onnx"))  # also for root
        assert code == 2 and "no file can be written to /proc/self" in line
    if os.geteuid():
        (path.parent / "locked").mkdir(mode=0o555)
        code, line = convert(path, path.parent / "locked" / "out.onnx")
        assert code == 2 and "Permission denied" in line


def test_a_full_disk(path: Path) -> None:
    """A limit on the size of files stands for the disk: at every place of the conversion that writes one."""
    out = path.parent / "out.onnx"
    out.write_text("what was there")
    codes, free = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, path.stat().st_size + 2000, 200_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        try:
            code, line = convert(path, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
        codes.append(code)
        assert not code or ("cannot be written" in line and "File too large" in line), line
        assert not code or out.read_text() == "what was there"
    assert codes == [3, 3, 0]
    assert {p.name for p in path.parent.iterdir()} == {"in.onnx", "out.onnx"}


def test_killed_at_any_time(path: Path) -> None:
    """The old file is whole until the new one is: killed by the operating system as soon as its folder shows a change."""
    out = path.parent / "out.onnx"
    killed = 0
    for wait in (0.0, 0.2, 1.0):
        out.write_text("what was there")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fastattn_compile",
                "convert",
                str(path),
                "-o",
                str(out),
                *WORDS,
                "--repeats",
                "200",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            staged = list(path.parent.glob(".fastattn-*/out.onnx"))
            if staged:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        killed += process.wait() == -signal.SIGKILL
        assert out.read_text() == "what was there" or onnx.load(str(out)).functions
    assert killed
    code, line = convert(path, out)  # what was left behind is in nobody's way
    assert not code, line
    assert onnx.load(str(out)).functions


@pytest.mark.slow
def test_weights_beyond_2_gb(model: onnx.ModelProto, tmp_path: Path) -> None:
    """A table of 2.1 GB that takes no room on the disk, looked up by a model that attends."""
    given = tmp_path / "given"
    given.mkdir()
    rows = (1 << 24) + (1 << 20)
    table = TensorProto(
        name="table", data_type=TensorProto.FLOAT, dims=[rows, 32], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": "w.data", "offset": 0, "length": rows * 128}.items():
        table.external_data.add(key=key, value=str(value))
    with (given / "w.data").open("wb") as stream:
        stream.truncate(rows * 128)
    model.graph.initializer.extend([table, numpy_helper.from_array(np.array([rows - 1]), "last")])
    behind(
        model,
        helper.make_node("Gather", ["table", "last"], ["row"]),
        helper.make_node("Add", ["before", "row"], ["after"]),
    )
    (given / "in.onnx").write_bytes(model.SerializeToString())
    report = fa.convert(given / "in.onnx", tmp_path / "out.onnx", operator="fma", options={"block": 16}, length=40,
                        repeats=1, threads=1)  # fmt: skip
    assert [site.operator for site in report.sites] == ["fma"]
    (data,) = tmp_path.glob("out.*.data")
    assert data.stat().st_size >= rows * 128
    assert (tmp_path / "out.onnx").stat().st_size < 1 << 20
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
