"""Wrong usage is one line on stderr and exit code 2, before anything slow happens."""

import json
import subprocess
import sys

import pytest

from fastattn_compile.cli import info
from fastattn_compile.version import __version__


def refused(result, *words):
    """One line of error that says the words, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("- ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    for word in words:
        assert word in errors[0]
    return errors[0]


def test_version(fastattn):
    result = fastattn("--version")
    assert (result.exit_code, result.stdout) == (0, f"fastattn {__version__}\n")


def test_help_names_every_verb_and_the_exit_codes(fastattn):
    text = fastattn("--help").stdout
    for word in ("demo", "scan", "eval", "info", "over budget"):
        assert word in text


@pytest.mark.parametrize(
    "words", [["frob"], ["scan"], ["eval", "m:f", "--length", "0"], ["scan", "m:f", "--frob"]]
)
def test_usage_errors_of_the_parser(fastattn, words):
    assert fastattn(*words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--operator", "fmm"], ["unknown operator 'fmm'", "fma"]),
        (["--operator", "fma", "--option", "blok=3"], ["blok", "block"]),
        (["--operator", "fma", "--option", "block=yes"], ["block", "int", "'yes'"]),
        (["--operator", "fma", "--option", "block"], ["key=value", "'block'"]),
        (["--compiler", "gcc"], ["compiler", "inductor"]),
        (["--plan", "none.json"], ["none.json", "No such file"]),
        (["--option", "block=3"], ["block", "option"]),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(fastattn, words, says):
    refused(fastattn("eval", "no_such_module:f", *words), *says)


@pytest.mark.parametrize("verb", ["scan", "eval"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nowhere", ["nowhere", "no such file or folder"]),
        ("no_such_module:f", ["cannot import 'no_such_module'"]),
        ("tiny_models:nothing", ["no function 'nothing'"]),
        ("tiny_models:not_a_model", ["must return a torch.nn.Module", "str"]),
        ("tiny_models:odd_inputs", ["dict", "tuple", "int"]),
        ("tiny_models:needs_inputs", ["Linear does not read token ids", "(model, inputs)"]),
        ("missing.gguf", ["missing.gguf: no such file"]),
    ],
)
def test_what_is_no_model(fastattn, verb, model, says):
    refused(fastattn(verb, model), *says)


def test_files_that_are_no_models(fastattn, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(fastattn("scan", "notes.txt"), "notes.txt is no model", "config.json")
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04rest")
    refused(fastattn("scan", "fake.gguf"), "fake.gguf is no GGUF file")


def test_folders_that_are_no_models(fastattn, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    refused(fastattn("scan", "model"), "no config.json")
    (folder / "config.json").write_text("{")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(fastattn("scan", "model"), "no .safetensors", "can run code")
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    refused(fastattn("scan", "model"), "is not JSON")
    (folder / "config.json").write_text("{}")
    refused(fastattn("scan", "model"), "names no model_type")


def test_damaged_gguf_and_weights_are_one_line(fastattn, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00" + bytes(12))
    refused(fastattn("scan", "cut.gguf"), "cut.gguf does not load as a model")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(fastattn("scan", "model"), "model does not load as a model")


def test_remote_code_is_not_run(fastattn, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "remote.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "remote.C", "AutoModel": "remote.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    refused(fastattn("scan", "model"), "does not load as a model")


def test_bad_text_and_types(fastattn, tmp_path):
    pytest.importorskip("transformers")
    refused(fastattn("scan", "tiny_models:stack", "--dtype", "int8"), "--dtype", "float32")
    refused(fastattn("scan", str(tmp_path), "--attn", "flash"), "--attn", "eager")


def test_out_that_cannot_be_written(fastattn, tmp_path):
    (tmp_path / "file").write_text("")
    result = fastattn("info", "--out", "file/report.json")
    refused(result, "cannot write")


def test_info_is_json_alone(fastattn):
    result = fastattn("info", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "fastattn.info/1"
    assert "fma" in document["operators"]
    assert document["device"]["threads"] >= 1
    assert set(document["extras"]) == {"hf", "onnx", "mlir", "report"}


def test_info_for_people(fastattn):
    text = fastattn("info", "--threads", "1").stdout
    assert "1 of" in text
    assert "exact, fma" in text


def test_info_tells_what_serves_on_a_gpu(fastattn, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert json.loads(fastattn("info", "--json").stdout)["kernels"]["triton_obstacle"] == "there is no GPU"
    assert "Triton: there is no GPU" in fastattn("info").stdout
    served = {"chosen": "auto", "cpu": "cpp", "cpp_obstacle": "", "gpu": "triton", "triton_obstacle": ""}
    assert "packed documents" in info._described_gpu(served)
    assert info._described_gpu({**served, "gpu": "aten", "chosen": "aten"}) == "ATen (chosen: aten)"


def test_python_dash_m_starts_fast_and_without_torch():
    code = (
        "import sys, fastattn_compile.cli.app; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    run = subprocess.run(
        [sys.executable, "-m", "fastattn_compile", "--version"], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.startswith("fastattn ")
