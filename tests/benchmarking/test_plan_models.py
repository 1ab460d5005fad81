"""The benchmark of plans for other kinds of models, on a model that needs no package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn_compile as fa
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.retrofitting.replay import Replay

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_models
import saliency


@pytest.mark.parametrize("side", [1, 2, 5, 16, 37])
def test_a_curve_passes_every_cell_once_and_leaps_seldom(side: int) -> None:
    order = saliency.curve_order(side)
    assert sorted(order.tolist()) == list(range(side * side))
    steps = torch.stack([order // side, order % side]).diff(dim=1).abs().sum(0)
    # On a power of two a Hilbert curve goes from neighbour to neighbour; elsewhere it leaves the square and comes back.
    assert (steps == 1).all() if side & (side - 1) == 0 else (steps == 1).double().mean() > 0.9


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            q, k, v = layer(x)[:, None].chunk(3, -1)
            x = x + nn.functional.scaled_dot_product_attention(3 * q, k, v)[:, 0]
        return x


def test_rows_are_measured_on_the_evaluation_data(tmp_path) -> None:
    def metric(result, exact, batch):
        return float((result - exact).square().mean())

    model, data = Two().eval(), [torch.randn(1, 96, 16) for _ in range(2)]
    case = plan_models.Case(
        model, data, data, metric, lambda result, exact: 1 - metric(result, exact, None),
        {"window": [{"width": 8}, {"width": 32}]}, (1.0,),
    )  # fmt: skip
    found = fa.plan(model, data, max_drop=1.0, metric=metric, unit="flops", operators=case.operators)
    rows = plan_models.held_out(case, found, 0, tmp_path / "rows.jsonl")
    search = found.provenance["search"]
    assert search["replaced"] and rows[0]["label"] == "plan"
    assert rows[0]["loss"] == pytest.approx(search["drop"], rel=1e-4)
    assert rows[0]["arithmetic"] == pytest.approx(search["cost_share"])
    assert any("barnes_hut" in row["label"] for row in rows) and any("window" in row["label"] for row in rows)
    assert plan_models.held_out(case, found, 0, tmp_path / "rows.jsonl") == rows  # times included: read back


def test_a_control_costs_at_least_what_the_plan_does() -> None:
    model, x = Two().eval(), torch.randn(1, 96, 16)
    replay = Replay(model)
    with replay.closed():
        replay.run(x)
        exact = {name: make_operator("exact").cost(spec).flops for name, spec in replay.specs.items()}
        frontier = fa.plan(model, [x], metric=lambda *_: 0.0, unit="flops", operators=["window"]).frontier
        wanted = 0.5 * sum(exact.values())
        label, cost, serving = plan_models.everywhere("window", "width", frontier, replay.specs, wanted)
        width = int(label.rpartition(" ")[2])
        narrower = make_operator("window", width=width - 1)
    assert set(serving) == set(exact) and cost >= wanted
    assert sum(narrower.cost(spec).flops for spec in replay.specs.values()) < wanted
