"""``fastattn eval BEFORE AFTER``: a saved retrofit against the model it was made from."""

import json

import pytest
import torch

import fastattn_compile as fa

pytest.importorskip("transformers")

BEFORE = "tiny_models:small_language_model"
FAST = ("--compiler", "eager", "--repeats", "1", "--rows", "8", "--length", "384", "--threads", "1")
SITE = "model.layers.1.self_attn"
PLAN = fa.Plan({SITE: fa.PlannedSite("fma", {"block": 16, "rank": 2, "basis": "depthwise"})})


@pytest.fixture
def saved(fastattn, tmp_path):
    """A retrofit with learned parameters, saved beside its base (``after``) and merged (``merged``)."""
    import tiny_models

    model = tiny_models.small_language_model().eval()
    base = fa.BaseWeights.of(model)
    fa.attach(model, PLAN, torch.zeros(1, 384, dtype=torch.long))
    with torch.no_grad():
        for parameter in model.model.layers[1].self_attn.parameters():
            parameter.mul_(1.2)
    for name, merge in (("after", False), ("merged", True)):
        fa.save_pretrained(model, tmp_path / name, plan=PLAN, base=base, merge=merge)
    return model


def test_a_retrofit_is_served_by_its_own_plan(fastattn, saved):
    documents = []
    for after in ("after", "merged"):
        result = fastattn("eval", BEFORE, after, *FAST, "--json")
        assert result.exit_code == 0, result.output + result.stderr
        documents.append(json.loads(result.stdout))
    for document in documents:
        assert [s["operator"] for s in document["sites"]] == ["exact", "fma"]
        assert set(document["sites"][1]["controls"]) == {"no_attention", "window", "near_only", "far_only"}
        model = document["model"]
        assert set(model["controls"]) == {"no_attention", "window", "near_only", "far_only"}
        assert model["intervals"]["kl"][0] <= model["kl"] <= model["intervals"]["kl"][1]
        assert document["checks"]["causal"] is True
    assert documents[0]["model"]["kl"] == pytest.approx(documents[1]["model"]["kl"], rel=1e-6)
    # The weights were changed, too: served exactly, it still is not the base.
    result = fastattn("eval", BEFORE, "after", *FAST, "--operator", "exact", "--json")
    assert json.loads(result.stdout)["model"]["kl"] > 1e-6


def test_tables_say_what_was_proved(fastattn, saved):
    result = fastattn("eval", BEFORE, "after", *FAST)
    assert result.exit_code == 0, result.output
    for words in ("95 % of resampled", "KL end to end with", "near only", "far only", "Causal:"):
        assert words in result.stdout
    result = fastattn("eval", BEFORE, "after", *FAST, "--no-verify")
    assert "KL end to end with" not in result.stdout


def test_a_budget_on_kl_is_code_3(fastattn, saved):
    result = fastattn("eval", BEFORE, "after", *FAST, "--no-verify", "--max-kl", "1e-9", "--json")
    assert result.exit_code == 3
    assert "over budget: KL" in result.stderr
    assert json.loads(result.stdout)["sites"]
    assert fastattn("eval", BEFORE, "after", *FAST, "--no-verify", "--max-kl", "9").exit_code == 0
    result = fastattn("eval", "tiny_models:stack", "--operator", "exact", *FAST, "--max-kl", "9")
    assert result.exit_code == 3
    assert "no logits" in result.stderr


def test_a_merged_folder_is_a_model_and_a_separate_one_says_what_it_needs(fastattn, saved):
    result = fastattn("eval", "merged", *FAST, "--json")
    assert result.exit_code == 0, result.stderr
    assert [s["operator"] for s in json.loads(result.stdout)["sites"]] == ["exact", "fma"]
    result = fastattn("eval", "after", *FAST)
    assert result.exit_code == 2
    assert "give the base model" in result.stderr


def test_another_base_is_code_2(fastattn, saved):
    result = fastattn("eval", "tiny_models:language_model", "after", *FAST)
    assert result.exit_code == 2
    assert "this is not the model the folder was made for" in result.stderr


def test_a_leak_is_code_3(fastattn, saved, monkeypatch):
    from fastattn_compile.operators.base import AttentionOutput
    from fastattn_compile.operators.fma.operator import FastMultipoleAttention

    forward = FastMultipoleAttention.forward

    def leak(self, inputs, parameters=()):
        output = forward(self, inputs, parameters)
        mean = inputs.value.mean(2, keepdim=True).repeat_interleave(inputs.group, 1)
        return AttentionOutput((output.out + 1e-3 * mean).contiguous(), output.log_sum_exp)

    monkeypatch.setattr(FastMultipoleAttention, "forward", leak)
    result = fastattn("eval", BEFORE, "after", *FAST)
    assert result.exit_code == 3
    assert f"site {SITE} is not causal" in result.stderr
