import copy

import pytest
import torch
from retrofitting.test_planning import Stack, batches
from safetensors import safe_open

import fastattn_compile as fa
from fastattn_compile.errors import CheckpointError, NumericError, OptionError, PlanError
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.retrofitting.matching import (
    Weights,
    far_error,
    matching_loss,
    output_of,
    squared_error,
)

FMA = {"block": 8, "rank": 2, "basis": "depthwise"}
NAMES = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Stack().eval()
    with torch.no_grad():
        for layer in made.layers:
            layer.qkv.weight *= 2
    return made


def planned(operator="fma", options=FMA):
    return fa.Plan(
        {"layers.0": fa.PlannedSite("exact")} | {n: fa.PlannedSite(operator, options) for n in NAMES[1:]}
    )


def smooth(length=128, seed=0):
    """Tensors whose far field a learned basis can follow: the values of a group's first tokens count for more."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    loud = (torch.arange(length) % 8 == 0)[None, None, :, None]
    return AttentionInputs(query, key + 2 * loud * torch.ones(8), value * (1 + loud), 8**-0.5, CAUSAL)


def test_matching_learns_what_a_mean_cannot():
    operator, train, test = make_operator("fma", **FMA), smooth(), smooth(seed=1)
    start = list(operator.initial_parameters(train.spec(), train).values())
    parameters = [p.clone().requires_grad_(True) for p in start]
    optimizer = torch.optim.Adam(parameters, 0.01)
    exact = make_operator("exact")
    for step in range(60):
        optimizer.zero_grad()
        inputs = smooth(seed=2 + step)
        target, generator = exact.forward(inputs).out, torch.Generator().manual_seed(step)
        matching_loss(operator, inputs, tuple(parameters), target, Weights(), generator).backward()
        optimizer.step()
    errors = [
        float(squared_error(output_of(operator, test, tuple(values))[0], exact.forward(test).out))
        for values in (start, [p.detach() for p in parameters])
    ]
    assert errors[1] < 0.7 * errors[0]


def test_the_far_field_of_an_operator_that_pools_nothing_is_exact():
    """With one token a pooled row, the far field is what exact attention is there."""
    inputs, rows = smooth(32), torch.arange(16, 32)
    for rank, error in ((8, 0.0), (1, None)):
        operator = make_operator("fma", block=8, rank=rank)
        out, log_sum_exp = output_of(operator, inputs, ())
        found = float(far_error(operator, inputs, (), out, log_sum_exp, rows))
        assert found == pytest.approx(0, abs=1e-9) if error == 0 else found > 0.01
    whole = make_operator("barnes_hut", block=8, open=64, beam=64, rest="pool", leaf=1)
    out, log_sum_exp = output_of(whole, inputs, ())
    # Everything is opened: there is no far field, and nothing to count.
    assert float(far_error(whole, inputs, (), out, log_sum_exp, rows)) < 1e-9


def test_all_sites_are_fitted_in_one_pass_from_the_teachers_inputs(model):
    before = copy.deepcopy(model.state_dict())
    seen = []
    fitted = fa.fit(
        model, planned(), batches(4), settings=fa.FitSettings(passes=2, steps=3),
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    assert [line.site for line in fitted.sites] == NAMES[1:]
    assert all(line.after < line.before or not line.kept for line in fitted.sites)
    assert ("fit the sites", 12, 12) in seen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    token = make_operator("fma", **FMA).token
    assert set(fitted.parameters) == {(name, token) for name in NAMES[1:]}


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (
            "cast",
            {
                "clusters": 4,
                "cluster_size": 32,
                "clustering": "token_choice",
                "select": "key",
                "combine": "lse",
            },
        ),
        ("tf_attention", {"height": 2}),
        ("tc_attention", {"height": 2}),
    ],
)
def test_routers_learn_from_the_softmax_mass(model, operator, options):
    made = make_operator(operator, **options)
    inputs = smooth(96)
    values = made.initial_parameters(inputs.spec(), inputs)
    parameters = tuple(v.clone().requires_grad_(True) for v in values.values())
    rows = torch.arange(10, 90, 7)
    first = made.routing_loss(inputs, parameters, rows)
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        made.routing_loss(inputs, parameters, rows).backward()
        optimizer.step()
    assert float(made.routing_loss(inputs, parameters, rows)) < float(first)
    plan = fa.Plan({"layers.1": fa.PlannedSite(operator, options)})
    fitted = fa.fit(model, plan, batches(2), settings=fa.FitSettings(passes=1, steps=2))
    assert len(fitted.sites) == 1


def test_routing_matters_only_where_something_is_routed():
    inputs = smooth(32)
    assert make_operator("fma").routing_loss(inputs, (), torch.arange(4)) is None


def test_a_killed_fit_loses_at_most_one_sites_steps(model, tmp_path):
    class Killed(Exception):
        pass

    settings = fa.FitSettings(passes=3, steps=2)

    def kill(stage, done, total):
        if stage == "fit the sites" and done == 6:  # in the second pass, after its first site
            raise Killed

    with pytest.raises(Killed):
        fa.fit(model, planned(), batches(4), settings=settings, folder=tmp_path, progress=kill)
    steps = []
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            steps.append(int(stream.metadata()["steps"]))
    assert sorted(steps) == [2, 4]
    resumed = fa.fit(model, planned(), batches(4), settings=settings, folder=tmp_path)
    straight = fa.fit(model, planned(), batches(4), settings=settings)
    for key, values in straight.parameters.items():
        for a, b in zip(values, resumed.parameters[key]):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="other settings"):
        fa.fit(model, planned(), batches(4), settings=fa.FitSettings(passes=4), folder=tmp_path)
    victim = next(tmp_path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        fa.fit(model, planned(), batches(4), settings=settings, folder=tmp_path)


def test_bad_input(model):
    with pytest.raises(PlanError, match=r"layers\.7"):
        fa.fit(model, fa.Plan({"layers.7": fa.PlannedSite("fma", FMA)}), batches(2))
    with pytest.raises(OptionError, match="ended after 1 batches"):
        fa.fit(model, planned(), iter(batches(1)))

    def broken():
        yield from batches(2)
        raise RuntimeError("worker died")

    with pytest.raises(OptionError, match="RuntimeError after 2 batches: worker died"):
        fa.fit(model, planned(), broken(), settings=fa.FitSettings(passes=5, steps=1))
    with pytest.raises(OptionError, match="steps"):
        fa.FitSettings(steps=0)
    with torch.no_grad():
        model.layers[1].qkv.weight[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"layers\.1"):
        fa.fit(model, planned(), batches(3), settings=fa.FitSettings(passes=1, steps=1))


def test_data_shorter_than_a_block_is_refused(model):
    with pytest.raises(OptionError, match=r"'layers\.1' for the 16 tokens of this data"):
        fa.fit(model, planned(options={**FMA, "block": 64}), batches(3, 16))


def test_nothing_to_fit(model):
    assert fa.fit(model, planned("window", {"width": 8}), batches(1)).sites == ()


def test_retrofit_attaches_fits_and_reports(model, tmp_path):
    base = copy.deepcopy(model)
    report = fa.retrofit(
        model, planned(), batches(3), batches(1, seed=9), settings=fa.FitSettings(passes=2, steps=2),
        compiler="eager", verify=False,
    )  # fmt: skip
    assert [line.operator for line in report.sites] == ["exact", "fma", "fma"]
    assert {line["site"] for line in report.provenance["fit"]} == set(NAMES[1:])
    assert model.fastattn_plan == planned()
    fa.save_pretrained(model, tmp_path / "saved", report=report)
    again = fa.from_pretrained(base, tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_failed_retrofit_leaves_no_parameters(model, monkeypatch):
    def fail(*args, **kwargs):
        raise NumericError("NaN at the end")

    monkeypatch.setattr("fastattn_compile.retrofitting.retrofit.evaluate", fail)
    with pytest.raises(NumericError):
        fa.retrofit(model, planned(), batches(2), settings=fa.FitSettings(passes=1, steps=1))
    assert not any("fastattn" in name for name in model.state_dict())


def test_retrofit_distils_and_is_saved_with_what_it_trained(model, tmp_path):
    base = copy.deepcopy(model)
    stages = [fa.DistilStage("logits", "kl", steps=3, train="full", learning_rate=1e-3, warmup=0)]
    report = fa.retrofit(
        model, planned(), batches(3), batches(1, seed=9), settings=fa.FitSettings(passes=1, steps=1), stages=stages,
        compiler="eager", verify=False, folder=tmp_path / "run",
    )  # fmt: skip
    (line,) = report.provenance["stages"]
    assert line["kept"] and line["gain"] > 0
    fa.save_pretrained(model, tmp_path / "saved", report=report)
    again = fa.from_pretrained(base, tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_failed_retrofit_takes_back_what_stages_trained(model, monkeypatch):
    def fail(*args, **kwargs):
        raise NumericError("NaN at the end")

    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("fastattn_compile.retrofitting.retrofit.evaluate", fail)
    stages = [fa.DistilStage("logits", "kl", steps=2, train="full", learning_rate=1e-3, warmup=0)]
    with pytest.raises(NumericError, match="at the end"):
        fa.retrofit(
            model, planned(), batches(2), batches(1, seed=9), settings=fa.FitSettings(passes=1, steps=1),
            stages=stages, compiler="eager",
        )  # fmt: skip
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "fastattn_plan") and not hasattr(model, "fastattn_base")


def test_stages_need_held_out_data_and_data_to_read_again(model):
    stages = [fa.DistilStage("logits", "kl", steps=1)]
    with pytest.raises(OptionError, match="stages need validation"):
        fa.retrofit(model, planned(), batches(2), stages=stages)
    with pytest.raises(OptionError, match="not an iterator"):
        fa.retrofit(model, planned(), iter(batches(2)), batches(1), stages=stages)
