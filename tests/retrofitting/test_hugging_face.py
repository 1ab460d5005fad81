"""A merged Hugging Face folder loads through transformers, and through us with its learned parameters."""

import json

import pytest
import torch

import fastattn_compile as fa
from fastattn_compile.errors import CheckpointError

transformers = pytest.importorskip("transformers")

SITE = "model.layers.1.self_attn"
PLAN = fa.Plan({SITE: fa.PlannedSite("fma", {"block": 8, "rank": 2, "sinks": 2, "basis": "depthwise"})})


@pytest.fixture
def ids():
    return torch.randint(0, 31, (1, 64))


@pytest.fixture
def model(ids):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    for bundle in fa.attach(made, PLAN, ids).values():
        for parameter in bundle.parameters():
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def logits(model, ids, plan=PLAN):
    torch.compiler.reset()
    options = {"plan": plan, "strict": True, "compiler": "eager", "quiet": True}
    with torch.no_grad():
        return torch.compile(model, backend="fastattn", options=options)(ids).logits


def test_a_merged_folder_loads_three_ways(model, ids, tmp_path, recwarn):
    wanted = logits(model, ids)
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, merge=True)
    loaded = fa.from_pretrained(None, tmp_path / "saved")
    assert torch.equal(logits(loaded, ids), wanted)

    plain, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)
    assert fa.Plan.from_json(plain.config.fastattn["plan"]) == PLAN
    assert torch.equal(logits(fa.from_pretrained(plain, tmp_path / "saved"), ids), wanted)

    # Saved again by transformers, the entry stays.
    plain.config.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config/config.json").read_text())["fastattn"]["plan"] == PLAN.to_json()


def test_a_damaged_merged_folder_is_explained(model, tmp_path):
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, merge=True)
    weights = tmp_path / "saved/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="does not load through transformers"):
        fa.from_pretrained(None, tmp_path / "saved")
    weights.write_bytes(whole[:-4] + b"\x00\x00\x00\x40")
    with pytest.raises(CheckpointError, match=r"1 of .* tensors differ"):
        fa.from_pretrained(None, tmp_path / "saved")
    config = tmp_path / "saved/config.json"
    config.write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match="names no architecture"):
        fa.from_pretrained(None, tmp_path / "saved")


def test_a_loaded_folder_is_routed_without_compiling_and_generates(model, ids, tmp_path):
    wanted = logits(model, ids)
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, merge=True)
    fa.register_transformers()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="fastattn"
    )
    for loaded in (
        fa.from_pretrained(None, tmp_path / "saved"),
        fa.from_pretrained(plain, tmp_path / "saved"),
    ):
        fa.route(loaded)  # the plan that the folder left on the model
        assert loaded.config._attn_implementation == "fastattn"
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, wanted)
        assert [site.operator for site in fa.report(loaded).sites] == ["exact", "fma"]
        made = loaded.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
        assert made.shape == (1, 67) and torch.equal(made[:, :64], ids)


def test_a_routed_model_is_measured_and_trained_against_its_own_exact_attention(model, ids):
    settings = {"plan": PLAN, "compiler": "eager", "repeats": 1, "rows": 8}
    wanted = fa.evaluate(model, {"input_ids": ids}, **settings).model.kl
    assert wanted > 0
    fa.route(model, plan=PLAN)
    report = fa.evaluate(model, {"input_ids": ids}, before=model, **settings)
    assert [site.operator for site in report.sites] == ["exact", "fma"]
    assert report.model.kl == pytest.approx(wanted, rel=1e-3)
    stage = fa.DistilStage("logits", steps=1, learning_rate=1e-9)
    (told,) = fa.distil(model, PLAN, [ids], [ids], stages=[stage], compiler="eager").stages
    assert told.before == pytest.approx(wanted, rel=1e-3)
    assert model.config._attn_implementation == "fastattn"
