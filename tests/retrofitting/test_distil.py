"""Distillation: what helps is kept, what does not is not; a killed run goes on as if it had not been killed."""

import copy
import json
import math

import pytest
import torch
from retrofitting.tiny import SITES, language, tokens
from torch import nn

import fastattn_compile as fa
from fastattn_compile.errors import (
    CheckpointError,
    NumericError,
    OptionError,
    PlanError,
    UnsupportedSiteError,
)
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.lora import AdaptedLinear, adapt, merge
from fastattn_compile.retrofitting.objectives import distance, language_model_loss
from fastattn_compile.retrofitting.processes import World, blocks_of

LEARNED = {"block": 8, "rank": 2, "sinks": 2, "basis": "depthwise"}
PLAN = fa.Plan(
    {SITES[0]: fa.PlannedSite("fma", LEARNED), SITES[1]: fa.PlannedSite("window", {"width": 8, "sinks": 2})}
)
DATA = [{"input_ids": tokens(4, 64, seed)} for seed in range(2, 10)]
HELD_OUT = [{"input_ids": tokens(4, 64, seed)} for seed in (100, 101)]


def prepared(plan=PLAN, seed=0):
    """Sharp attention, so that a window loses something."""
    model = language(seed)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.qkv.weight[: 2 * 16].mul_(3)
    fa.attach(model, plan, DATA[0]["input_ids"])
    return model


def stage(**changes):
    settings = {"name": "logits", "steps": 12, "learning_rate": 1e-2, "warmup": 2, "rank": 2, **changes}
    return fa.DistilStage(**settings)


def distilled(model, stages, plan=PLAN, data=DATA, **settings):
    settings = {"compiler": "eager", **settings}
    return fa.distil(model, plan, data, HELD_OUT, stages=stages, **settings)


def served(model, plan, batch=0):
    torch.compiler.reset()
    options = {"plan": plan, "strict": True, "compiler": "eager", "quiet": True}
    with torch.no_grad():
        return torch.compile(model, backend="fastattn", options=options)(HELD_OUT[batch]["input_ids"])[
            "logits"
        ]


def kl(model, plan, teacher):
    each = []
    for number, batch in enumerate(HELD_OUT):
        with torch.no_grad():
            p, q = (
                x.log_softmax(-1)
                for x in (teacher(batch["input_ids"])["logits"], served(model, plan, number))
            )
        each.append((p.exp() * (p - q)).sum(-1))
    return float(torch.stack(each).mean())


@pytest.mark.parametrize("train", ["operators", "lora", "full"])
def test_a_stage_brings_the_model_nearer_to_its_teacher(train):
    model = prepared()
    teacher = copy.deepcopy(model)
    fa.detach(teacher)
    before = kl(model, PLAN, teacher)
    start = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    result = distilled(model, [stage(train=train)])
    (report,) = result.stages
    assert report.kept and report.gain > 0
    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(kl(model, PLAN, teacher), rel=1e-3)
    if train != "operators":
        assert report.after < 0.9 * report.before
    # The model has the modules it had, in the mode it had, and only what was to be trained has changed.
    assert set(start) == {name for name, _ in model.named_parameters()}
    assert model.training and all(p.requires_grad for p in model.parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    learned = {name for name in start if ".fastattn." in name}
    projections = {name for name in start if name.endswith(("qkv.weight", "out.weight"))}
    if train == "operators":
        assert changed <= learned and changed
    elif train == "lora":
        assert changed <= learned | projections and projections <= changed
    else:
        assert "embed.weight" in changed
    assert set(report.metrics_after) == {"kl", "language_model"}
    assert result.to_json()["stages"][0]["gain"] == report.gain
    assert result.base.changed(fa.BaseWeights.of(model)) == sorted(
        changed - learned | ({"head.weight"} if train == "full" else set()),
        key=list(result.base.tensors).index,
    )
    assert model.fastattn_plan == PLAN


def test_a_stage_that_does_not_help_changes_nothing():
    model = prepared()
    start = {name: p.clone() for name, p in model.named_parameters()}
    result = distilled(model, [stage(learning_rate=1.0, clip=1e9, warmup=0, train="full")])
    (report,) = result.stages
    assert not report.kept and report.gain < 0
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_stages_follow_each_other_and_the_language_model_loss_is_one():
    model = prepared()
    result = distilled(model, [stage(), stage(name="language", objective="language_model", train="full")])
    first, second = result.stages
    assert second.metrics_before["kl"] == pytest.approx(first.after, rel=1e-4)
    assert second.objective == "language_model"
    assert second.before == pytest.approx(second.metrics_before["language_model"])
    assert math.log(23) * 0.5 < second.before


def test_hidden_states_serve_models_without_logits():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = prepared(fa.Plan({}))

        def forward(self, input_ids):
            x = self.inner.embed(input_ids)
            for layer in self.inner.layers:
                x = layer(x)
            return {"last_hidden_state": x}

    plan = fa.Plan({f"inner.{SITES[0]}": fa.PlannedSite("window", {"width": 4})})
    model = Encoder()
    (report,) = distilled(model, [stage(objective="hidden")], plan).stages
    assert report.kept and set(report.metrics_after) == {"hidden"}
    with pytest.raises(OptionError, match=r"'kl' needs a model that gives logits"):
        distilled(model, [stage()], plan)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [(0, 7), (1, 3), (1, 10)])
def test_a_run_that_stops_goes_on_where_it_was(tmp_path, stopped_at):
    stages = [stage(), stage(name="language", objective="language_model", train="full", steps=11)]
    whole = prepared()
    wanted = distilled(whole, stages, checkpoint_every=5)

    class Stop(Exception):
        pass

    where, step = stages[stopped_at[0]].name, stopped_at[1]

    def stop(name, done, total):
        if (name, done) == (where, step):
            raise Stop

    model = prepared()
    with pytest.raises(Stop):
        distilled(model, stages, folder=tmp_path / "run", checkpoint_every=5, progress=stop)
    seen = []
    again = prepared()
    result = distilled(
        again, stages, folder=tmp_path / "run", checkpoint_every=5, progress=lambda *said: seen.append(said)
    )
    trained = [done for name, done, total in seen if name == where and total]
    assert trained[0] == 5 * (step // 5) + 1  # at most the steps since the last checkpoint are done again
    for name, p in whole.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], p), name
    assert [(s.before, s.after) for s in result.stages] == [(s.before, s.after) for s in wanted.stages]
    # A finished run is read, not made again; its folder holds the model after each stage.
    third = prepared()
    assert distilled(third, stages, folder=tmp_path / "run", checkpoint_every=5).stages == result.stages
    assert torch.equal(served(third, PLAN), served(whole, PLAN))
    assert torch.equal(
        served(fa.from_pretrained(language_base(), tmp_path / "run/stage-1"), PLAN), served(whole, PLAN)
    )
    assert not list((tmp_path / "run").glob("step-*"))
    assert not any(p.suffix in (".pkl", ".pt", ".bin") for p in (tmp_path / "run").rglob("*"))


def language_base():
    model = prepared()
    fa.detach(model)
    return model


def test_a_run_with_other_settings_is_refused(tmp_path):
    distilled(prepared(), [stage(steps=2)], folder=tmp_path / "run")
    for change, words in (
        ({"stages": [stage(steps=3)]}, "another stages"),
        ({"seed": 1}, "another seed"),
        ({"data": DATA[1:]}, "another data"),
        ({"plan": fa.Plan({SITES[1]: PLAN.sites[SITES[1]]})}, "another plan"),
    ):
        settings = {"stages": [stage(steps=2)], **change}
        with pytest.raises(CheckpointError, match=words):
            distilled(prepared(), folder=tmp_path / "run", **settings)
    other = prepared(seed=1)
    with pytest.raises(CheckpointError, match="another model"):
        distilled(other, [stage(steps=2)], folder=tmp_path / "run")
    (tmp_path / "run/state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        distilled(prepared(), [stage(steps=2)], folder=tmp_path / "run")


def test_a_damaged_checkpoint_is_explained(tmp_path):
    def stop(name, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(prepared(), [stage()], folder=tmp_path / "run", checkpoint_every=2, progress=stop)
    state = json.loads((tmp_path / "run/state.json").read_text())
    (shard,) = (tmp_path / "run" / state["checkpoint"]).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        distilled(prepared(), [stage()], folder=tmp_path / "run", checkpoint_every=2)


def test_a_loss_that_is_not_finite_stops_with_stage_and_step():
    model = prepared()
    start = {name: p.clone() for name, p in model.named_parameters()}
    bad = [*DATA[:3], {"x": 1, **DATA[0]}]

    class Poison(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, x=None):
            out = self.inner(input_ids)
            return {"logits": out["logits"] * (float("nan") if x is not None else 1.0)}

    plan = fa.Plan({f"inner.{site}": p for site, p in PLAN.sites.items()})
    fa.detach(model)
    poison = Poison()
    fa.attach(poison, plan, DATA[0]["input_ids"])
    start = {name: p.clone() for name, p in poison.named_parameters()}
    with pytest.raises(NumericError, match=r"stage 'logits', step 3"):
        fa.distil(poison, plan, bad, HELD_OUT, stages=[stage()], compiler="eager")
    assert all(torch.equal(p, start[name]) for name, p in poison.named_parameters())


def test_bad_input_is_explained():
    model = prepared()
    with pytest.raises(OptionError, match="the data ended after 3 batches"):
        distilled(model, [stage()], data=iter(DATA[:3]))
    with pytest.raises(OptionError, match="holds no batch"):
        distilled(model, [stage()], data=[])
    with pytest.raises(OptionError, match="validation holds no batch"):
        fa.distil(model, PLAN, DATA, [], stages=[stage()], compiler="eager")
    window = fa.Plan({SITES[1]: PLAN.sites[SITES[1]]})
    bare = language()
    with pytest.raises(OptionError, match="trains nothing"):
        distilled(bare, [stage(train="operators")], window)

    with pytest.raises(UnsupportedSiteError, match=r"layers\.0\.attention .*call fa\.attach"):
        distilled(bare, [stage()])

    class Broken(list):
        def __iter__(self):
            yield from DATA[:2]
            raise RuntimeError("disk gone")

    with pytest.raises(OptionError, match="the data raised RuntimeError after 2 batches: disk gone"):
        distilled(model, [stage()], data=Broken())
    for change in ({"objective": "mse"}, {"train": "all"}, {"steps": 0}, {"learning_rate": 0.0}):
        with pytest.raises(OptionError, match="stage 'logits'"):
            stage(**change)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["operators", "full"])
def test_trees_grow_inside_a_stage(tmp_path, train):
    schedule = fa.BootstrapSchedule(
        SITES, heights=(1, 2), width=1, steps=2, operator="tc_attention", warmup=1
    )
    growing = stage(name="trees", trees=schedule, steps=12, train=train, learning_rate=3e-3)
    model = language_base()
    result = distilled(model, [growing], fa.Plan({}))
    (report,) = result.stages
    assert {s.operator for s in result.plan.sites.values()} == {"tc_attention"}
    delta = kl(model, result.plan, language_base())
    assert delta == pytest.approx(min(report.before, report.after), rel=1e-3)
    if train == "full":
        assert report.kept
        return

    def stop(name, done, total):
        if (name, done) == ("trees", 7):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(
            language_base(),
            [growing],
            fa.Plan({}),
            folder=tmp_path / "run",
            checkpoint_every=3,
            progress=stop,
        )
    again = language_base()
    (resumed,) = distilled(again, [growing], fa.Plan({}), folder=tmp_path / "run", checkpoint_every=3).stages
    assert (resumed.before, resumed.after) == (report.before, report.after)
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(again.named_parameters())[name], p, msg=name)


def test_trees_need_room_and_exact_attention():
    schedule = fa.BootstrapSchedule(SITES[:1], heights=(1, 2), width=1, steps=2)
    with pytest.raises(OptionError, match="full-grown after 4 steps"):
        distilled(language_base(), [stage(trees=schedule, steps=4)], fa.Plan({}))
    with pytest.raises(PlanError, match=r"serves layers\.1\.attention"):
        distilled(prepared(), [stage(trees=schedule, steps=9)])


def test_adapters_start_as_nothing_and_merge_to_what_they_computed():
    model = language().double()
    plain = copy.deepcopy(model)
    names = adapt(model, [SITES[0]], rank=2, scale=3.0, seed=0)
    assert names == ["layers.0.attention.qkv", "layers.0.attention.out"]
    assert isinstance(model.layers[0].attention.qkv, AdaptedLinear)
    ids = tokens()
    assert torch.equal(model(ids)["logits"], plain(ids)["logits"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_up"):
                p.normal_()
    trained = dict(model.named_parameters())
    used = merge(plain, trained, 3.0)
    assert len(used) == 4 and all("lora" in name for name in used)
    torch.testing.assert_close(model(ids)["logits"], plain(ids)["logits"], rtol=1e-10, atol=1e-10)
    with pytest.raises(PlanError, match="linear layers"):
        adapt(nn.ModuleDict({"a": nn.LayerNorm(3)}), ["a"], 2, 1.0, 0)


def test_layers_of_gpt2_are_adapted():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64, use_cache=False)
    plain = GPT2LMHeadModel(config).eval().double()
    model = copy.deepcopy(plain)
    names = adapt(model, ["transformer.h.1.attn"], rank=2, scale=3.0, seed=0)
    assert names == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_up"):
                p.normal_()
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    assert len(merge(plain, dict(model.named_parameters()), 3.0)) == 4
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


def test_gpt2_is_distilled_through_adapters():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=64, use_cache=False)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(20)
    plan = fa.Plan({"transformer.h.0.attn": fa.PlannedSite("window", {"width": 8, "sinks": 2})})
    (report,) = distilled(model, [stage(steps=8)], plan).stages
    assert report.kept and report.gain > 0
    assert model.fastattn_base.changed(fa.BaseWeights.of(model)) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
    ]


def test_objectives_are_their_formulas():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    total, count = distance("kl", student, teacher, real, temperature=2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    wanted = 4 * nn.functional.kl_div(q[real].log(), p[real], reduction="sum")
    torch.testing.assert_close(total, wanted)
    assert count == 8
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2] = -100
    total, count = language_model_loss(student, labels, real)
    pairs = [(b, t) for b in range(2) for t in range(4) if labels[b, t + 1] >= 0 and real[b, t + 1]]
    wanted = -sum(student[b, t].log_softmax(-1)[labels[b, t + 1]] for b, t in pairs)
    torch.testing.assert_close(total, wanted)
    assert count == len(pairs) == 5
    total, count = distance("hidden", 2 * teacher, teacher, None)
    assert total == pytest.approx(10, rel=1e-5) and count == 10


def test_batches_start_over_and_are_sought():
    batches = Batches([1, 2, 3])
    assert [batches.next() for _ in range(5)] == [1, 2, 3, 1, 2]
    batches.seek(1)
    assert batches.peek() == batches.next() == 2
    batches.seek(7)
    assert batches.next() == 2
    once = Batches(iter([1, 2, 3]))
    once.seek(2)
    assert once.next() == 3
    with pytest.raises(OptionError, match="cannot be read again"):
        once.seek(0)


def test_shares_of_a_batch():
    batch = {"input_ids": torch.arange(8).view(4, 2), "scale": 3.0, "bias": torch.ones(1, 2)}
    second = World(1, 2).share(batch)
    assert second["input_ids"].tolist() == [[4, 5], [6, 7]] and second["scale"] == 3.0
    assert second["bias"] is batch["bias"]
    assert World(0, 2).share((batch["input_ids"],))[0].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(OptionError, match="4 sequences cannot be shared by 3"):
        World(0, 3).share(batch)
    assert World(0, 3).share(batch, even=False) is batch


def test_layers_are_found():
    model = language()
    assert blocks_of(model, PLAN) == ["layers.0", "layers.1"]
    outer = nn.Module()
    outer.body = model
    renamed = fa.Plan({f"body.{site}": p for site, p in PLAN.sites.items()})
    assert blocks_of(outer, renamed) == ["body.layers.0", "body.layers.1"]
    assert blocks_of(model.layers[0], fa.Plan({"attention": fa.PlannedSite("window")})) == ["attention"]
    assert blocks_of(model.layers, fa.Plan({"1.attention": fa.PlannedSite("window")})) == ["1"]
