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


def test_stages_are_read():
    from fastattn_compile.cli.retrofit import read_stages

    first, second = read_stages(["kl:steps=7,train=operators,learning_rate=1e-3", "kl"])
    assert (first.name, first.steps, first.train, first.learning_rate) == ("kl", 7, "operators", 1e-3)
    assert (second.name, second.rank, second.train) == ("kl 2", 8, "lora")
    assert read_stages(None) == []


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("loss", "objective must be one of"),
        ("kl:stepz=3", "unknown stepz; a stage takes steps"),
        ("kl:steps=0", "steps must be at least 1"),
        ("kl:steps=many", "steps=many"),
        ("kl:train=all", "train must be one of"),
        ("kl:rank", "takes key=value"),
    ],
)
def test_a_bad_stage_is_refused_before_anything_runs(fastattn, stage, text):
    result = fastattn("retrofit", MODEL, "out", "--distil", stage)
    assert result.exit_code == 2 and text in result.stderr, result.stderr
    assert not Path("out").exists()


@pytest.mark.slow
def test_retrofit_distils_resumes_and_loads(fastattn, monkeypatch):
    import torch
    from tiny_models import sharp_language_model

    import fastattn_compile as fa

    model = "tiny_models:sharp_language_model"
    sites = {f"model.layers.{i}.self_attn": {"operator": "window", "options": {"width": 8}} for i in range(2)}
    Path("plan.json").write_text(json.dumps({"schema": "fastattn.plan/1", "sites": sites}))
    call = (
        "retrofit", model, "out", "--plan", "plan.json", "--length", "96", "--threads", "1", "--sequences", "2",
        "--compiler", "eager", "--no-verify", "--json", "--resume", "run", "--checkpoint-every", "3",
        "--distil", "kl:steps=12,rank=4,learning_rate=1e-2,warmup=2", "--distil", "kl:steps=3,train=full,learning_rate=10",
    )  # fmt: skip
    result = fastattn(*call)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    good, bad = document["provenance"]["stages"]
    assert good["kept"] and good["gain"] > 0 and not bad["kept"]
    assert "stage kl: kl" in result.stderr and "not kept" in result.stderr
    assert document["model"]["kl"] == pytest.approx(good["after"], rel=0.05)
    # The base is the model before the training; what was trained is in the folder.
    base = sharp_language_model().eval()
    changed = list(json.loads(Path("out/fastattn_config.json").read_text())["changed"])
    assert changed and all("self_attn" in name for name in changed)
    again = fa.from_pretrained(base, "out")
    assert set(fa.BaseWeights.of(sharp_language_model()).changed(fa.BaseWeights.of(again))) == set(changed)

    # Both stages are over: the same command trains nothing again and ends with the same weights.
    def never(*_, **__):
        raise AssertionError("a stage was trained again")

    monkeypatch.setattr("fastattn_compile.retrofitting.trainer.Trainer.stage", never)
    repeated = fastattn(*call)
    assert repeated.exit_code == 0, repeated.output
    other = fa.from_pretrained(sharp_language_model().eval(), "out")
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in other.named_parameters())
