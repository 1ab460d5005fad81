import json
from pathlib import Path

import pytest

MODEL = "tiny_models:language_model"
FAST = ("--length", "96", "--threads", "1", "--cost", "flops", "--sequences", "1")
LADDER = ("-o", "window:width=8", "-o", "window:width=32")


def test_plan_and_another_budget(fastattn):
    result = fastattn(
        "plan", MODEL, "--max-drop", "0.05", *LADDER, *FAST, "--out", "plan.json", "--json", "--resume", "run"
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(Path("plan.json").read_text())
    assert set(document["sites"]) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    search = document["provenance"]["search"]
    assert search["reached"] and search["drop"] <= 0.05
    assert document["frontier"]["curve"][0] == [1.0, 0.0]
    again = fastattn("plan", MODEL, "--max-drop", "0.05", *LADDER, *FAST, "--json", "--resume", "run")
    assert json.loads(again.stdout)["provenance"]["search"]["evaluations"] == 0
    solved = fastattn("plan", MODEL, "--from", "plan.json", "--speedup", "1.2")
    assert solved.exit_code == 0, solved.output
    assert "frontier (flops, n = 96)" in solved.stdout and "solved" not in solved.stdout


def test_a_budget_that_nothing_reaches(fastattn):
    result = fastattn("plan", MODEL, "--speedup", "1e6", *LADDER, *FAST, "--out", "plan.json")
    assert result.exit_code == 3
    assert "budget not reached" in result.stderr and "speedup" in result.stderr
    assert json.loads(Path("plan.json").read_text())["sites"]  # the best so far is kept


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--metric", "bleu"), "metric must be one of"),
        (("-o", "nothing"), "unknown operator"),
        (("--keep", "layers.9"), "does not have"),
        (("--from", "missing.json"), "cannot read the plan"),
    ],
)
def test_usage(fastattn, arguments, text):
    result = fastattn("plan", MODEL, *FAST, *arguments)
    assert result.exit_code == 2 and text in result.stderr


def test_nothing_found(fastattn):
    result = fastattn("plan", "tiny_models:no_attention", "--metric", "cosine")
    assert result.exit_code == 4, result.output


@pytest.mark.slow
def test_retrofit_saves_only_what_keeps_to_the_budget(fastattn):
    plan = {
        "schema": "fastattn.plan/1",
        "sites": {
            f"model.layers.{i}.self_attn": {"operator": "fma", "options": {"block": 8, "basis": "depthwise"}}
            for i in range(2)
        },
    }
    Path("plan.json").write_text(json.dumps(plan))
    fast = (
        "--length",
        "96",
        "--threads",
        "1",
        "--sequences",
        "2",
        "--passes",
        "1",
        "--steps",
        "2",
        "--compiler",
        "eager",
    )
    result = fastattn("retrofit", MODEL, "out", "--plan", "plan.json", *fast, "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {line["site"] for line in document["provenance"]["fit"]} == set(plan["sites"])
    saved = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert Path("out/fastattn_params.safetensors") in saved
    refused = fastattn(
        "retrofit", MODEL, "out", "--plan", "plan.json", *fast, "--no-verify", "--max-kl", "1e-9"
    )
    assert refused.exit_code == 3 and "over budget" in refused.stderr
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == saved
