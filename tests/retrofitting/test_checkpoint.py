"""Saved folders load back to the same function; damage, mismatch and kills lose nothing."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from retrofitting.tiny import SITES, language, tokens
from safetensors.torch import load_file
from torch import nn

import fastattn_compile as fa
from fastattn_compile.errors import CheckpointError, NumericError, PlanError
from fastattn_compile.reporting.document import ModelReport, Report, SiteReport

LEARNED = {"block": 8, "rank": 2, "sinks": 2, "basis": "depthwise"}
PLAN = fa.Plan(
    {SITES[0]: fa.PlannedSite("fma", LEARNED), SITES[1]: fa.PlannedSite("window", {"width": 8, "sinks": 2})}
)


def retrofitted(seed=0, plan=PLAN, **options):
    """A model whose learned parameters are not the initial ones."""
    model = language(seed, **options)
    for bundle in fa.attach(model, plan, tokens()).values():
        for parameter in bundle.parameters():
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model, plan=PLAN):
    torch.compiler.reset()
    options = {"plan": plan, "strict": True, "compiler": "eager", "quiet": True}
    with torch.no_grad():
        return torch.compile(model, backend="fastattn", options=options)(tokens())["logits"]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def edit(folder, **changes):
    path = Path(folder) / "fastattn_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_model_computes_the_same_after_loading(tmp_path):
    model = retrofitted()
    assert not torch.equal(logits(model), logits(retrofitted(plan=fa.Plan({})), fa.Plan({})))
    stages = [
        {
            "name": "logits",
            "objective": "kl",
            "train": "lora",
            "steps": 9,
            "before": 0.2,
            "after": 0.1,
            "kept": True,
        }
    ]
    report = Report(
        (SiteReport(SITES[0], "fma"),),
        ModelReport(kl=0.01, ppl=5.0, ppl_exact=4.9),
        provenance={"stages": stages},
    )
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, report=report)
    assert set(contents(tmp_path / "saved")) == {
        "fastattn_config.json", "fastattn_params.safetensors", "report.json", "README.md",
    }  # fmt: skip
    loaded = fa.from_pretrained(language(), tmp_path / "saved")
    assert loaded.fastattn_plan == PLAN
    assert torch.equal(logits(loaded, loaded.fastattn_plan), logits(model))
    assert Report.load(tmp_path / "saved/report.json") == report
    card = (tmp_path / "saved/README.md").read_text()
    assert "| `fma` | block=8" in card and "| perplexity | 4.90 | 5.00 |" in card
    assert "| logits | kl | lora | 9 | 0.200 | 0.100 | yes |" in card
    # The folder is a plan, too.
    assert fa.Plan.load(tmp_path / "saved") == PLAN
    # A second save takes the plan from the loaded model.
    fa.save_pretrained(loaded, tmp_path / "again")
    assert (
        contents(tmp_path / "again")["fastattn_params.safetensors"]
        == (contents(tmp_path / "saved")["fastattn_params.safetensors"])
    )


def test_untouched_base_weights_are_not_stored(tmp_path):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    stored = load_file(tmp_path / "saved/fastattn_params.safetensors")
    assert stored and all(name.startswith(f"{SITES[0]}::") for name in stored)


def test_changed_weights_are_stored_and_tied_ones_once(tmp_path):
    model = retrofitted()
    base = fa.BaseWeights.of(language())
    with torch.no_grad():
        model.embed.weight.add_(1)
        model.layers[1].attention.out.bias.add_(1)
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, base=base)
    stored = [n for n in load_file(tmp_path / "saved/fastattn_params.safetensors") if n.startswith("base::")]
    assert sorted(stored) == ["base::embed.weight", "base::layers.1.attention.out.bias"]
    loaded = fa.from_pretrained(language(), tmp_path / "saved")
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied_now", [True, False])
def test_tied_weights_that_were_saved_apart_do_not_overwrite_each_other(tmp_path, tied_now):
    start = language(tied=False)
    with torch.no_grad():
        start.head.weight.copy_(start.embed.weight)  # the same values, two tensors
    model = copy.deepcopy(start)
    fa.attach(model, PLAN, tokens())
    with torch.no_grad():
        model.head.weight.add_(1)
    fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, base=fa.BaseWeights.of(start))
    target = copy.deepcopy(start)
    if not tied_now:
        assert torch.equal(logits(fa.from_pretrained(target, tmp_path / "saved")), logits(model))
        return
    target.head.weight = target.embed.weight
    before = target.embed.weight.clone()
    with pytest.raises(CheckpointError, match="tied"):
        fa.from_pretrained(target, tmp_path / "saved")
    assert torch.equal(target.embed.weight, before)


def test_merged_weights_need_no_base(tmp_path):
    model = retrofitted()
    base = fa.BaseWeights.of(language())
    with torch.no_grad():
        model.embed.weight.mul_(2)
    manifest = fa.save_pretrained(model, tmp_path / "saved", plan=PLAN, base=base, merge=True)
    assert manifest.origin == base.hash
    other = language(seed=7)
    assert torch.equal(logits(fa.from_pretrained(other, tmp_path / "saved")), logits(model))
    with pytest.raises(
        CheckpointError,
        match=r"not the Language that was saved: it lacks nothing and has besides layers\.2\.",
    ):
        fa.from_pretrained(language(layers=3), tmp_path / "saved", check=False)
    with pytest.raises(CheckpointError, match="give the base model"):
        fa.from_pretrained(None, tmp_path / "saved")


def test_another_base_is_refused_and_left_alone(tmp_path):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    other = language(seed=5)
    with pytest.raises(CheckpointError, match=r"hash .* tensors differ: .*embed.*check=False"):
        fa.from_pretrained(other, tmp_path / "saved")
    assert not any("fastattn" in name for name, _ in other.named_modules())
    assert not hasattr(other, "fastattn_plan")
    fa.from_pretrained(other, tmp_path / "saved", check=False)
    with pytest.raises(CheckpointError, match="the weights are float64, expected float32"):
        fa.from_pretrained(language().double(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="meta"):
        fa.from_pretrained(language().to("meta"), tmp_path / "saved")


def test_one_changed_element_is_seen():
    model = language()
    before = fa.BaseWeights.of(model)
    with torch.no_grad():
        model.embed.weight[3, 5] = torch.nextafter(model.embed.weight[3, 5], torch.tensor(9.0))
    after = fa.BaseWeights.of(model)
    assert before.changed(after) == ["embed.weight", "head.weight"]
    assert before.hash != after.hash


def test_renamed_modules_are_named(tmp_path):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    renamed = language()
    renamed.blocks = renamed.layers
    del renamed.layers
    for check in (True, False):
        with pytest.raises(CheckpointError, match=r"layers\.0\.attention.*is it 'blocks\.0\.attention' now"):
            fa.from_pretrained(renamed, tmp_path / "saved", check=check)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_parameters_are_named(tmp_path, size):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    path = tmp_path / "saved/fastattn_params.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"fastattn_params\.safetensors is damaged"):
        fa.from_pretrained(language(), tmp_path / "saved")


def test_a_flipped_bit_is_seen_and_without_the_hash_the_header_is_still_read_safely(tmp_path):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    path = tmp_path / "saved/fastattn_params.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged"):
        fa.from_pretrained(language(), tmp_path / "saved")
    path.write_bytes(whole[:50])
    edit(tmp_path / "saved", files={})
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        fa.from_pretrained(language(), tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "fastattn.checkpoint/9"}, "a later version"),
        ({"schema": "something"}, "another file"),
        ({"plan": {"schema": "fastattn.plan/1", "sites": {"a": {"operator": "nonesuch"}}}}, "unknown operator"),
        ({"base": {"model": "x", "hash": "y", "tensors": {}}}, "hash does not fit"),
        ({"weights": "both"}, "weights must be"),
        ({"learned": {}}, "do not belong together"),
        ({"files": {"../../etc/passwd": "0"}}, "outside of its folder"),
        ({"files": {"missing.bin": "0"}}, "missing.bin is missing"),
        ({"owners": 3}, "malformed"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_explained(tmp_path, change, words):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    edit(tmp_path / "saved", **change)
    with pytest.raises((CheckpointError, PlanError), match=words):
        fa.from_pretrained(language(), tmp_path / "saved")


def test_broken_json_and_a_missing_folder(tmp_path):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    path = tmp_path / "saved/fastattn_config.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(CheckpointError, match="is not JSON"):
        fa.from_pretrained(language(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="was not saved by fastattn_compile"):
        fa.from_pretrained(language(), tmp_path / "nowhere")


def test_a_refused_save_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "saved"
    model = retrofitted()
    fa.save_pretrained(model, folder, plan=PLAN)
    before = contents(folder)
    with torch.no_grad():
        next(iter(model.layers[0].attention.fastattn.parameters()))[0] = torch.nan
    with pytest.raises(NumericError, match=SITES[0]):
        fa.save_pretrained(model, folder, plan=PLAN)
    with pytest.raises(PlanError, match="not attached"):
        fa.save_pretrained(language(), folder, plan=PLAN)
    with pytest.raises(PlanError, match=r"has no module 'layers\.9'"):
        fa.save_pretrained(retrofitted(), folder, plan=fa.Plan({"layers.9": fa.PlannedSite("window")}))
    with pytest.raises(PlanError, match="block=16"):
        fa.save_pretrained(
            retrofitted(), folder, plan=fa.Plan({SITES[0]: fa.PlannedSite("fma", {**LEARNED, "block": 16})})
        )
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    before = contents(tmp_path / "saved")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastattn_compile.retrofitting.checkpoint.write_json", fails)
    with pytest.raises(OSError, match="No space"):
        fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    assert contents(tmp_path / "saved") == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save_file", "write_json", "_read_tensors"])
def test_a_kill_at_any_moment_leaves_the_old_folder(tmp_path, moment):
    fa.save_pretrained(retrofitted(), tmp_path / "saved", plan=PLAN)
    before = contents(tmp_path / "saved")
    script = f"""
        import os, signal, sys
        import fastattn_compile as fa
        from fastattn_compile.retrofitting import checkpoint
        from retrofitting.test_checkpoint import PLAN, retrofitted
        real = checkpoint.{moment}
        def killed(*args, **kwargs):
            real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        model = retrofitted(seed=3)
        checkpoint.{moment} = killed
        fa.save_pretrained(model, {str(tmp_path / "saved")!r}, plan=PLAN)
    """
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path / "saved") == before
    fa.from_pretrained(language(), tmp_path / "saved")


def test_what_the_user_put_into_the_folder_is_kept_and_what_we_wrote_goes(tmp_path):
    folder = tmp_path / "saved"
    fa.save_pretrained(retrofitted(), folder, plan=PLAN, merge=True, report=Report(()))
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("keep")
    fa.save_pretrained(retrofitted(), folder, plan=PLAN)
    assert set(contents_names(folder)) == {
        "README.md", "fastattn_config.json", "fastattn_params.safetensors", "notes", "notes/mine.txt",
    }  # fmt: skip


def contents_names(folder):
    return [str(p.relative_to(folder)) for p in folder.rglob("*")]


def test_the_folder_of_someone_else_is_not_touched(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        fa.save_pretrained(retrofitted(), tmp_path, plan=PLAN)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(CheckpointError, match="is a file"):
        fa.save_pretrained(retrofitted(), tmp_path / "README.md", plan=PLAN)


def test_a_plan_is_needed_and_attached_parameters_make_one(tmp_path):
    with pytest.raises(PlanError, match="no plan to save"):
        fa.save_pretrained(language(), tmp_path / "saved")
    model = retrofitted()
    manifest = fa.save_pretrained(model, tmp_path / "saved")
    assert list(manifest.plan.sites) == [SITES[0]]
    with pytest.raises(ValueError, match=r"fa\.detach"):
        fa.from_pretrained(model, tmp_path / "saved")


def test_weights_of_every_type_and_layout_survive(tmp_path):
    model = nn.Module()
    storage = torch.randn(4, 6)
    model.a, model.b = nn.Parameter(storage[:2]), nn.Parameter(storage[2:].T)
    model.c = nn.Parameter(torch.tensor(3.0, dtype=torch.bfloat16))
    model.register_buffer("d", torch.arange(3))
    fa.save_pretrained(model, tmp_path / "saved", plan=fa.Plan({}), merge=True)
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.zero_()
    fa.from_pretrained(other, tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
