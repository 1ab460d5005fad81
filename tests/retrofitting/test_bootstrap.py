"""The two-level schedule: who is converted when, what is kept between stages, and that training goes through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn_compile.backend as backend
from fastattn_compile.errors import PlanError
from fastattn_compile.retrofitting.bootstrap import Bootstrap, BootstrapSchedule

SITES = ["layers.0", "layers.1", "layers.2"]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def batch():
    return torch.randn(2, 24, 8)


def schedule(**changes):
    return BootstrapSchedule(
        **{"sites": SITES, "heights": (1, 2), "width": 2, "steps": 10, "warmup": 4, **changes}
    )


def operators_used():
    return {decision.name: decision.operator for decision in backend.decisions()}


def test_groups_go_from_the_output_and_trees_grow_inside_a_group():
    stages = schedule().stages()
    assert [(s.first_step, s.steps, s.group) for s in stages] == [
        (0, 10, ("layers.1", "layers.2")),
        (10, 10, ("layers.1", "layers.2")),
        (20, 10, ("layers.0",)),
        (30, 10, ("layers.0",)),
        (40, None, ()),
    ]
    assert [dict(s.heights) for s in stages] == [
        {"layers.1": 1, "layers.2": 1},
        {"layers.1": 2, "layers.2": 2},
        {"layers.1": 2, "layers.2": 2, "layers.0": 1},
        {"layers.1": 2, "layers.2": 2, "layers.0": 2},
        {"layers.1": 2, "layers.2": 2, "layers.0": 2},
    ]


def test_decisions_steepen_with_the_height():
    steep = schedule(betas=(1, 10), finish_with="tf_attention", finish_options={"window": 3})
    stages = steep.stages()
    of_stage = [{n: s.options["beta"] for n, s in steep.plan(stage).sites.items()} for stage in stages]
    assert of_stage[2] == {"layers.1": 10.0, "layers.2": 10.0, "layers.0": 1.0}
    assert set(of_stage[-1].values()) == {10.0}
    assert all("beta" not in s.options for s in schedule().plan(stages[0]).sites.values())


def test_the_other_order_and_the_one_level_variant():
    stages = schedule(order="input_first", heights=(3,)).stages()
    assert [s.group for s in stages] == [("layers.0", "layers.1"), ("layers.2",), ()]
    assert set(stages[-1].heights.values()) == {3}


def test_steps_belong_to_stages_and_the_learning_rate_rises_in_each():
    plan = schedule()
    assert [plan.stage_at(step).index for step in (0, 9, 10, 39, 40, 10**9)] == [0, 0, 1, 3, 4, 4]
    assert [plan.learning_rate_factor(step) for step in (0, 1, 3, 9, 10, 13)] == [
        0.25,
        0.5,
        1.0,
        1.0,
        0.25,
        1.0,
    ]
    assert schedule(warmup=0).learning_rate_factor(0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        plan.stage_at(-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": []}, "at least one"),
        ({"sites": ["a", "a"]}, "different names"),
        ({"heights": (2, 2)}, "rise"),
        ({"heights": ()}, "rise"),
        ({"heights": (0, 1)}, "positive"),
        ({"width": 0}, "width must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"order": "middle"}, "output_first, input_first"),
        ({"operator": "fma"}, "tc_attention or tf_attention"),
        ({"finish_with": "exact"}, "tc_attention or tf_attention"),
        ({"options": {"height": 3}}, "the schedule sets it"),
        ({"betas": (1.0,)}, "one for each of heights"),
        ({"betas": (1.0, 2.0), "options": {"beta": 3.0}}, "must not hold 'beta'"),
    ],
)
def test_a_bad_schedule_is_refused_with_the_reason(change, words):
    with pytest.raises(ValueError, match=words):
        schedule(**change)


def test_a_schedule_that_does_not_fit_the_model_is_refused(batch):
    with pytest.raises(PlanError, match=r"layers\.7"):
        Bootstrap(Model(), schedule(sites=["layers.7"]), batch)
    with pytest.raises(PlanError, match="log2"):
        Bootstrap(Model(), schedule(heights=(5,)), batch)


def test_stages_convert_exactly_their_sites_and_keep_what_was_learned(batch):
    model = Model()
    exact = model(batch)
    bootstrap = Bootstrap(model, schedule(), batch, compiler="eager")
    assert torch.equal(bootstrap(batch), exact)
    assert bootstrap.begin_step(0) and not bootstrap.begin_step(1)
    backend.reset()
    first = bootstrap(batch)
    assert operators_used() == {"layers.0": "exact", "layers.1": "tc_attention", "layers.2": "tc_attention"}
    assert not torch.allclose(first, exact)
    with torch.no_grad():
        for parameter in bootstrap.bundles["layers.1"].parameters():
            parameter.add_(0.1)
    before = {n: p.detach().clone() for n, p in bootstrap.bundles["layers.1"].named_parameters()}
    first = bootstrap(batch)
    assert bootstrap.begin_step(10)
    after = dict(bootstrap.bundles["layers.1"].named_parameters())
    assert after["key_planes"].shape[2] == 3
    assert torch.equal(after["key_planes"][:, :, :1], before["key_planes"])
    assert torch.equal(after["level_weights"][..., :2], before["level_weights"])
    # Coarse attention grows without a change of its outputs.
    assert torch.allclose(bootstrap(batch), first, atol=1e-5)
    assert bootstrap.begin_step(20)
    bootstrap(batch)
    assert torch.equal(
        dict(bootstrap.bundles["layers.1"].named_parameters())["key_planes"], after["key_planes"]
    )
    assert set(bootstrap.bundles) == set(SITES)


def test_leaf_attention_takes_over_the_planes_at_the_end(batch):
    plan = schedule(finish_with="tf_attention", finish_options={"window": 4, "sinks": 1}, freeze_planes=True)
    bootstrap = Bootstrap(Model(), plan, batch, compiler="eager")
    bootstrap.begin_step(35)
    planes = {site: b.key_planes.detach().clone() for site, b in bootstrap.bundles.items()}
    bootstrap.begin_step(40)
    backend.reset()
    bootstrap(batch)
    assert set(operators_used().values()) == {"tf_attention"}
    for site, bundle in bootstrap.bundles.items():
        assert torch.equal(bundle.key_planes, planes[site])
        assert not any(p.requires_grad for p in bundle.parameters())


def test_calibration_splits_keys_evenly_and_random_planes_do_not_depend_on_data(batch):
    evenness = []
    for calibrate in (True, False):
        torch.manual_seed(0)
        bootstrap = Bootstrap(Model(), schedule(heights=(3,)), batch, compiler="eager", calibrate=calibrate)
        bootstrap.begin_step(0)
        with bootstrap.watching() as seen:
            bootstrap(batch)
        assert set(seen) == {"layers.1", "layers.2"}
        evenness.append(float(bootstrap.regulariser({"layers.2": seen["layers.2"]}, balance=1.0).detach()))
    assert evenness[0] < evenness[1]


@pytest.mark.parametrize("shared", [True, False])
def test_planes_go_back_to_unit_length_before_every_step_and_decide_as_before(batch, shared):
    plan = schedule(heights=(2,), unit_planes=True, options={"shared": shared})
    bootstrap = Bootstrap(Model(), plan, batch, compiler="eager", calibrate=False)
    assert bootstrap.begin_step(0)
    bundle = bootstrap.bundles["layers.2"]
    sides = ["key"] if shared else ["key", "query"]
    for side in sides:
        planes, offsets = (getattr(bundle, f"{side}_{name}") for name in ("planes", "offsets"))
        assert torch.allclose(planes.norm(dim=-1), torch.ones_like(offsets), atol=1e-6)
        with torch.no_grad():
            offsets.add_(0.05)
            factor = 0.5 + torch.rand_like(offsets)
            factor[0, 0, 0] = 0  # a plane of no length sends all vectors one way
            planes.mul_(factor[..., None])
            offsets.mul_(torch.where(factor > 0, factor, 1.0))
    before = bootstrap(batch)
    assert not bootstrap.begin_step(1)
    for side in sides:
        length = getattr(bundle, f"{side}_planes").norm(dim=-1)
        assert length[0, 0, 0] == 0 and torch.allclose(length.flatten()[1:], torch.ones(()), atol=1e-6)
    assert torch.allclose(bootstrap(batch), before, atol=1e-6)


def test_the_optimizer_follows_the_stages(batch):
    model = Model()
    bootstrap = Bootstrap(model, schedule(), batch, compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    base = {id(p) for p in model.parameters()}
    for step in (0, 10, 20):
        bootstrap.begin_step(step)
        bootstrap.update_optimizer(optimizer, lr=0.5)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(set(held))
        assert {g["lr"] for g in optimizer.param_groups if id(g["params"][0]) not in base} == {0.5}
        bootstrap(batch).square().mean().backward()
        optimizer.step()
        assert all(id(p) in {id(x) for x in held} for p in optimizer.state)


def test_training_through_the_stages_approaches_the_teacher(batch):
    teacher = Model()
    model = copy.deepcopy(teacher)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan = schedule(steps=12, heights=(1, 2), width=3, warmup=2, operator="tf_attention")
    bootstrap = Bootstrap(model, plan, batch, compiler="eager", calibrate=False)
    losses: dict[int, list[float]] = {}
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.05)
    for step in range(36):
        if bootstrap.begin_step(step):
            bootstrap.update_optimizer(optimizer, lr=0.05)
        optimizer.zero_grad()
        with bootstrap.watching() as seen:
            error = (bootstrap(batch) - teacher(batch).detach()).square().mean()
        (error + bootstrap.regulariser(seen, balance=0.01, mass=0.05, rows=8)).backward()
        learned = [p for b in bootstrap.bundles.values() for p in b.parameters()]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
        assert any(p.grad.any() for p in learned)
        optimizer.step()
        losses.setdefault(bootstrap.stage.index, []).append(float(error.detach()))
    assert min(losses[0][-4:]) < losses[0][0]
