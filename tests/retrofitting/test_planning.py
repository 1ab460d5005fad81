import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastattn_compile as fa
from fastattn_compile.errors import CheckpointError, ModelLoadError, NumericError, OptionError, PlanError
from fastattn_compile.frontier import LEAST_DROP, Candidate, Frontier
from fastattn_compile.operators.registry import make_operator, operator_names
from fastattn_compile.reporting.evaluate import evaluate
from fastattn_compile.retrofitting.candidates import LADDERS, wanted_operators
from fastattn_compile.retrofitting.replay import Replay, Server
from fastattn_compile.retrofitting.search import Budget, Search
from fastattn_compile.retrofitting.sensitivity import gains_of

LADDER = {
    "window": [{"width": 8}, {"width": 24}, {"width": 64}],
    "barnes_hut": [{"block": 8, "open": 4, "beam": 8}],
}
NAMES = ["layers.0", "layers.1", "layers.2"]


class Attention(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Three residual attentions over an embedding; logits out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(16, 31)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Stack().eval()
    with torch.no_grad():
        for layer in made.layers:
            layer.qkv.weight *= 3  # attention that looks at something
    return made


def batches(count=2, length=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(31, (1, length), generator=generator)} for _ in range(count)]


def found_by(model, **options):
    given = {"unit": "flops", "operators": LADDER, "show_controls": False, **options}
    return fa.plan(model, given.pop("data", batches()), **given)


def test_replay_is_the_model_and_starts_in_the_middle(model):
    batch = batches(1)[0]
    replay, calls = Replay(model), []
    window = Server(make_operator("window", width=4))
    with replay.closed(), torch.no_grad():
        exact = replay.run(batch, keep=True)
        torch.testing.assert_close(exact, model(**batch))
        whole = replay.run(batch, {"layers.1": window}, take=lambda site, *_: calls.append(site))
        assert calls == NAMES  # watched from the start
        window_plan = fa.Plan({"layers.1": fa.PlannedSite("window", {"width": 4})})
        hooked = torch.compile(
            model, backend="fastattn",
            options={"plan": window_plan, "compiler": "eager", "quiet": True},
        )  # fmt: skip
        torch.testing.assert_close(whole, hooked(**batch))
        graph = replay._graphs[0]
        assert graph.resumable and graph.sites == NAMES
        start, _ = replay._best_start(graph, _pass({"layers.1": window}))
        assert start == graph.cuts[1]
        torch.testing.assert_close(replay.run(batch, {"layers.1": window}), whole, rtol=0, atol=0)
        # States of another batch, or of another choice below, are not used.
        assert replay._best_start(graph, _pass({"layers.1": window}, batch=7))[0] == 0
        assert replay._best_start(graph, _pass({"layers.0": window, "layers.1": window}))[0] == graph.cuts[0]


def test_batches_of_more_sizes_than_dynamo_compiles_by_itself(model):
    """Dynamo runs a function as it is after eight compilations: then nothing was replaced, and nothing lost."""
    data = [batches(1, length=24 + i)[0] for i in range(10)]
    window = Server(make_operator("window", width=2, sinks=0))
    replay = Replay(model)
    with replay.closed():
        exact = [replay.run(batch, index=i, keep=True) for i, batch in enumerate(data)]
        serving = {"layers.2": window}
        for i, batch in enumerate(data):
            found = replay.run(batch, serving, index=i)
            assert (found - exact[i]).abs().max() > 1e-3
            # Each size has a graph of its own, and starts in the middle of it.
            graph = replay._graphs[i]
            assert replay._best_start(graph, _pass(serving, i))[0] == graph.cuts[2]
            torch.testing.assert_close(found, replay.run(batch, serving, index=100), rtol=0, atol=0)


def test_states_of_a_model_in_several_graphs_are_not_used():
    class Broken(Stack):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            x = x + self.layers[0](x)
            torch._dynamo.graph_break()
            return self.head(x + self.layers[1](x))

    replay = Replay(Broken().eval())
    with replay.closed():
        replay.run(batches(1)[0], keep=True)
        assert len(replay._graphs) == 2 and not replay._kept


def test_a_batch_that_is_one_argument_itself(model):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, data):
            return self.model(data["first"])

    data = {"first": batches(1)[0]["input_ids"]}
    with pytest.raises(OptionError, match=r"does not fit Pair.forward.data.: missing .*goes as \(batch,\)"):
        found_by(Pair(), data=[data])
    assert list(found_by(Pair(), data=[(data,)], max_drop=0.01).sites) == [f"model.{name}" for name in NAMES]


def test_sites_without_a_candidate_say_why():
    class Crossed(nn.Module):
        def forward(self, x, y):
            z = nn.functional.scaled_dot_product_attention(x, y, y)
            return z + nn.functional.scaled_dot_product_attention(z, z, z)

    data = [(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 48, 16))]

    def loss(result, exact, batch):
        return float((result - exact).square().mean())

    found = found_by(Crossed(), data=data, metric=loss, max_drop=1.0, operators={"window": [{"width": 8}]})
    cross, own = found.sites.values()
    assert own.operator == "window" and cross.operator == "exact"
    assert cross.reason.startswith("no operator that was tried serves it: window: ")
    again = fa.Plan.from_json(json.loads(json.dumps(found.to_json())))
    assert again.solve(max_drop=1.0).sites == found.solve(max_drop=1.0).sites
    kept = found_by(
        Crossed(),
        data=data,
        metric=loss,
        operators={"window": [{"width": 200}]},
        keep=[next(iter(found.sites))],
    )
    assert [site.reason.partition(" here")[0] for site in kept.sites.values()] == [
        "it is to be kept", "no operator that was tried is cheaper than exact attention"
    ]  # fmt: skip
    assert kept.provenance["search"]["stopped"].startswith("no site has a candidate: ")


def _pass(serving, batch=0):
    from fastattn_compile.retrofitting.replay import _Pass

    return _Pass(serving, batch, False, None)


def test_replay_keeps_no_more_than_it_may(model):
    batch = batches(1)[0]
    replay = Replay(model, memory=1)
    with replay.closed():
        replay.run(batch, keep=True)
        assert replay.kept_bytes == 0
        torch.testing.assert_close(replay.run(batch, {}), model(**batch).detach())


def test_in_place_changes_keep_states_from_being_used():
    class Counting(Stack):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, input_ids):
            self.seen.add_(1)
            return super().forward(input_ids) * self.seen

    torch.manual_seed(0)
    replay = Replay(Counting().eval())
    with replay.closed():
        replay.run(batches(1)[0], keep=True)
        assert not replay._graphs[0].resumable and not replay._kept


def test_a_plan_keeps_to_its_budget_as_measured_from_outside(model):
    found = found_by(model, data=batches(1), max_drop=0.003)
    search = found.provenance["search"]
    assert search["reached"] and 0 < search["drop"] <= 0.003 and search["replaced"] > 0
    assert list(found.sites) == NAMES
    batch = batches(1)[0]
    report = evaluate(model, batch, plan=found, labels=batch["input_ids"], compiler="eager", repeats=1)
    assert report.model.kl == pytest.approx(search["drop"], rel=1e-3)
    frontier = found.frontier
    chosen = {line.operator for line in report.sites}
    assert chosen <= {"window", "barnes_hut", "exact"}
    # No choice that was measured keeps to the budget at less cost.
    assert all(
        p.drop > 0.003 or p.cost / frontier.total_exact >= search["cost_share"] - 1e-9
        for p in frontier.points
    )
    # A wider budget is cheaper, at once and without the model.
    assert found.solve(max_drop=0.05).provenance["search"]["cost_share"] < search["cost_share"]


def test_the_plan_beats_its_controls(model):
    found = found_by(model, max_drop=0.02, show_controls=True)
    search, frontier = found.provenance["search"], found.frontier
    assert len(frontier.controls) >= 2
    assert any("window" in point.label for point in frontier.controls)
    for point in frontier.controls:
        dearer = point.cost / frontier.total_exact >= search["cost_share"] - 1e-9
        assert point.measured and (point.drop >= search["drop"] - 1e-9 or dearer)


def test_a_speedup_is_a_budget(model):
    found = found_by(model, speedup=1.5)
    search = found.provenance["search"]
    assert search["reached"] and search["cost_share"] <= 1 / 1.5
    both = found_by(model, speedup=1.5, max_drop=1e-9)
    assert not both.provenance["search"]["reached"]  # the best so far is a plan all the same
    assert list(both.sites) == NAMES


def test_sites_may_be_kept_exact(model):
    found = found_by(model, max_drop=1.0, keep=["layers.1"])
    assert found.sites["layers.1"].operator == "exact" and found.sites["layers.0"].operator != "exact"
    with pytest.raises(PlanError, match=r"layers\.9"):
        found_by(model, keep=["layers.9"])


@pytest.mark.parametrize("metric", ["kl", "ppl", "cosine", "function"])
def test_metrics(model, metric):
    def difference(result, exact, batch):
        assert set(batch) == {"input_ids"}
        return float((result - exact).abs().max())

    found = found_by(model, max_drop=0.05, metric=difference if metric == "function" else metric)
    assert found.frontier.metric == ("difference" if metric == "function" else metric)
    assert found.provenance["search"]["drop"] <= 0.05


def test_measured_time_is_a_cost(model):
    found = found_by(
        model, data=batches(1), max_drop=0.5, unit=None, n=96, operators={"window": [{"width": 8}]}
    )
    assert found.frontier.unit == "seconds" and found.frontier.n == 96
    assert all(0 < cost < 10 for cost in found.frontier.exact_cost.values())


def test_a_killed_search_resumes_and_measures_nothing_twice(model, tmp_path):
    class Killed(Exception):
        pass

    def kill(stage, done, total):
        if stage == "what the model loses by each site" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        found_by(model, max_drop=0.02, folder=tmp_path, progress=kill)
    journal = tmp_path / "plan.jsonl"
    lines = journal.read_text().splitlines()
    drops = [json.loads(line)["name"] for line in lines[1:] if json.loads(line)["name"].startswith("drop/")]
    assert len(drops) == 2
    with journal.open("a") as stream:
        stream.write('{"name": "half a li')  # the line it was killed in
    resumed = found_by(model, max_drop=0.02, folder=tmp_path)
    names = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:]]
    assert len(names) == len(set(names))
    straight = found_by(model, max_drop=0.02)
    assert resumed.sites == straight.sites and resumed.frontier == straight.frontier
    assert resumed.provenance["search"]["evaluations"] == straight.provenance["search"]["evaluations"] - 2
    again = found_by(model, max_drop=0.02, folder=tmp_path)
    assert again.sites == straight.sites and again.provenance["search"]["evaluations"] == 0
    with pytest.raises(CheckpointError, match="other metric"):
        found_by(model, metric="cosine", folder=tmp_path)
    kept = journal.read_bytes()
    journal.write_bytes(kept.replace(b'"name"', b'"nam', 1))
    with pytest.raises(CheckpointError, match=r"line 2 of .* is damaged"):
        found_by(model, max_drop=0.02, folder=tmp_path)
    journal.write_bytes(kept)
    with torch.no_grad():
        model.head.weight += 1
    with pytest.raises(CheckpointError, match="other model"):
        found_by(model, folder=tmp_path)


def test_time_that_is_up_gives_the_best_so_far(model):
    found = found_by(model, max_drop=0.003, max_minutes=1e-9)
    search = found.provenance["search"]
    assert search["stopped"] == "out of time" and search["evaluations"] == 0
    assert {site.operator for site in found.sites.values()} == {"exact"} and not search["reached"]
    assert found.frontier.candidates  # and the frontier, as far as it is known


def test_sensitivities_carry_over_to_another_text(model):
    first = found_by(model, max_drop=0.06, per_head=False)
    second = found_by(model, data=batches(1, 128, seed=5), max_drop=0.06, per_head=False, prior=first)
    assert second.provenance["search"]["drop"] <= 0.06
    assert second.provenance["search"]["replaced"] > 0
    # Nothing was measured site by site: those come one replaced site at a time, before any whole choice.
    assert second.provenance["search"]["evaluations"] < first.provenance["search"]["evaluations"]


def test_short_data_leaves_everything_exact(model):
    """Within a block every operator is exact attention, and saves nothing."""
    operators = {"barnes_hut": [{"block": 64}], "fma": [{"block": 64}]}
    found = found_by(model, data=batches(1, 16), operators=operators)
    assert {site.operator for site in found.sites.values()} == {"exact"}


def test_bad_input(model):
    def broken():
        yield batches(1)[0]
        raise OSError("disk gone")

    with pytest.raises(OptionError, match="OSError after 1 batches: disk gone"):
        found_by(model, data=broken())
    with pytest.raises(OptionError, match="no batch"):
        found_by(model, data=[])
    for options, text in (
        ({"metric": "bleu"}, "metric must be one of"), ({"max_drop": -1.0}, "max_drop"), ({"speedup": 0.5}, "speedup"),
        ({"unit": "watts"}, "unit"), ({"operators": ["fmaa"]}, "unknown operator"), ({"operators": ["exact"]}, "nothing to"),
        ({"max_minutes": 0}, "max_minutes"), ({"operators": [("window", {"widht": 3})]}, "widht"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=text):
            found_by(model, **options)
    with pytest.raises(ModelLoadError, match="meta device"):
        found_by(Stack().to("meta"))
    half = Stack()
    half.head.to("meta")
    with pytest.raises(ModelLoadError, match="meta device"):
        found_by(half)
    spread = nn.Module()
    spread.named_parameters = lambda: [
        ("a", SimpleNamespace(device="cuda:0")),
        ("b", SimpleNamespace(device="cpu")),
    ]
    with pytest.raises(ModelLoadError, match="a on cuda:0, b on cpu"):
        Replay(spread)
    with pytest.raises(NumericError, match="metric"):
        found_by(model, metric=lambda result, exact, batch: float("nan"))


def test_every_operator_has_a_ladder_that_can_be_made():
    # What serves heads differently is put together from the candidates of a site.
    named = [name for name in operator_names() if name not in ("exact", "per_head")]
    assert set(LADDERS) == set(named)
    tried = wanted_operators(named)
    assert len(tried) == sum(len(ladder) for ladder in LADDERS.values())
    assert {operator.name for operator, _ in wanted_operators(None)} == {"barnes_hut", "window", "fma"}


def test_nan_stops_with_the_name_of_the_site(model, monkeypatch):
    batch = batches(1)[0]
    replay = Replay(model)
    window = make_operator("window", width=4)
    poisoned = type(window)(window.config)
    with replay.closed():
        replay.run(batch)
        monkeypatch.setattr(
            sys.modules["fastattn_compile.retrofitting.replay"], "torch_op", lambda name: _poison
        )
        with pytest.raises(NumericError, match=r"layers\.2"):
            replay.run(batch, {"layers.2": Server(poisoned)})


def _poison(query, key, value, *rest):
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    if rest[-1] == "layers.2":
        out = out * torch.nan
    return out, out[..., 0]


def test_tied_weights_and_a_shared_layer(model):
    """A layer that is called twice is two sites."""
    model.layers[2] = model.layers[0]
    model.head.weight = nn.Parameter(torch.randn(31, 16))
    model.embed.weight = model.head.weight
    found = found_by(model, max_drop=0.01)
    assert len(found.sites) == 3 and len(set(found.sites)) == 3
    report = evaluate(model, batches(2)[0], plan=found, compiler="eager", repeats=1)
    assert {line.name for line in report.sites} == set(found.sites)


def test_a_loss_that_was_lost_in_noise_says_nothing_to_another_search():
    """Else a site would be given up for nothing: what it seemed to lose was a difference of two large losses."""
    lines = [
        Candidate("a", "window", {"width": 8}, 1.0, 0.1, LEAST_DROP, measured=True),
        Candidate("b", "window", {"width": 8}, 1.0, 0.1, LEAST_DROP, measured=True),
        Candidate("b", "window", {"width": 16}, 2.0, 0.05, 0.02, measured=True),
        Candidate("c", "window", {"width": 8}, 1.0, 0.1, 0.03),
    ]
    known = Frontier("kl", "flops", 64, dict.fromkeys("abc", 4.0), tuple(lines))
    assert gains_of(known) == {"b": pytest.approx(0.4)}


@pytest.mark.parametrize("change", [-5.0, 0.0, 0.4])
def test_one_measurement_in_context_lowers_a_loss_to_a_tenth_at_most(change):
    lines = (
        Candidate("a", "window", {"width": 16}, 2.0, 0.05, 0.2),
        Candidate("a", "window", {"width": 8}, 1.0, 0.1, 0.5),
    )
    search = Search(None, Frontier("kl", "flops", 64, {"a": 4.0}, lines), Budget(0.1, None), lambda: False)
    candidates = list(lines)
    search._note(candidates, {"a": 0}, "a", 1, change)
    assert candidates[1].drop == pytest.approx(max(0.2 + change, 0.05)) and candidates[1].measured
    candidates = list(lines)
    search._note(candidates, {"a": 1}, "a", -1, change)
    assert candidates[1].drop == pytest.approx(max(-change, 0.05))
