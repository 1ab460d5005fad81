import itertools
import json
import random
import time

import pytest

from fastattn_compile.errors import PlanError
from fastattn_compile.frontier import Candidate, Frontier, Point
from fastattn_compile.plans import Plan


def drawn(sites=4, each=4, seed=0):
    generator = random.Random(seed)
    names = [f"layers.{i}" for i in range(sites)]
    candidates = []
    for name in names:
        weight = 10 ** generator.uniform(-4, -1)
        for width in (32, 64, 128, 256)[:each]:
            cost = width / 320 * generator.uniform(0.8, 1.2)
            error = generator.uniform(0.5, 2) * 32 / width
            candidates.append(Candidate(name, "window", {"width": width}, cost, error, weight * error))
    return Frontier("kl", "flops", 2048, dict.fromkeys(names, 1.0), tuple(candidates))


def best_by_enumeration(frontier, budget):
    sites = list(frontier.exact_cost)
    options = [[None, *(i for i, c in enumerate(frontier.candidates) if c.site == s)] for s in sites]
    best = frontier.total_exact
    for chosen in itertools.product(*options):
        choice = {s: i for s, i in zip(sites, chosen) if i is not None}
        if frontier.sum_of(choice) <= budget:
            best = min(best, frontier.cost_of(choice))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_path_is_optimal_up_to_one_move(seed):
    frontier = drawn(seed=seed)
    path = frontier.path()
    costs = [frontier.cost_of(c) for c in path]
    drops = [frontier.sum_of(c) for c in path]
    assert costs == sorted(costs, reverse=True) and drops == sorted(drops)
    for choice, cost, drop in zip(path, costs, drops):
        # Points on the path are exactly optimal for their own drop.
        assert cost == pytest.approx(best_by_enumeration(frontier, drop * (1 + 1e-9)))
        assert frontier.cost_of(choice) == cost
    assert not path[0] and set(path[-1]) == set(frontier.exact_cost)


def test_solving_for_another_budget():
    frontier = drawn()
    loose, tight = frontier.solve(max_drop=0.1), frontier.solve(max_drop=0.001)
    assert loose.drop <= 0.1 and tight.drop <= 0.001 and loose.cost < tight.cost
    assert frontier.solve(max_drop=0.0).choice == {}
    fast = frontier.solve(speedup=2.0)
    assert fast.cost <= frontier.total_exact / 2
    # A speedup that nothing reaches gives the cheapest there is.
    assert frontier.solve(speedup=1e6).cost == min(frontier.cost_of(c) for c in frontier.path())
    for wrong in ({}, {"max_drop": 0.1, "speedup": 2.0}, {"max_drop": -1.0}, {"speedup": 0.0}):
        with pytest.raises(PlanError):
            frontier.solve(**wrong)


def test_what_the_hull_leaves_of_a_budget_is_spent():
    steep = Candidate("a", "window", {"width": 256}, 0.9, 0.1, 0.017)
    jump = Candidate("a", "window", {"width": 64}, 0.6, 0.2, 0.031)
    frontier = Frontier("kl", "flops", 8, {"a": 1.0}, (steep, jump))
    assert frontier.path() == [{}, {"a": 1}]  # the first is not on the hull
    assert frontier.solve(max_drop=0.02).choice == {"a": 0}
    for seed in range(6):
        drawn_one = drawn(seed=seed)
        point = drawn_one.solve(max_drop=0.01)
        assert point.drop <= 0.01
        assert point.cost <= best_by_enumeration(drawn_one, 0.01) + 0.1 * drawn_one.total_exact


def test_a_large_frontier_is_solved_in_under_a_second():
    frontier = drawn(sites=200)
    start = time.thread_time()
    frontier.solve(max_drop=0.05)
    assert time.thread_time() - start < 1


def test_measured_choices_correct_the_sum_and_are_kept():
    frontier = drawn()
    choice = frontier.path()[5]
    twice = 2 * frontier.sum_of(choice)
    known = Frontier(**{**vars(frontier), "points": (Point(frontier.cost_of(choice), twice, True, choice),)})
    assert known.corrected(known.sum_of(choice)) == pytest.approx(twice)
    assert known.corrected(3 * known.sum_of(choice)) == pytest.approx(3 * twice)
    # A budget just below what was measured no longer allows that choice, one just above does.
    assert known.solve(max_drop=twice * 1.001).choice == choice
    assert known.solve(max_drop=twice * 0.999).cost > known.cost_of(choice)


def test_a_candidate_that_saves_nothing_or_loses_more_is_never_chosen():
    exact = {"a": 1.0}
    good = Candidate("a", "window", {"width": 64}, 0.5, 0.1, 0.01)
    dear = Candidate("a", "window", {"width": 512}, 1.5, 0.0, 0.0)
    worse = Candidate("a", "fma", {}, 0.6, 0.2, 0.02)
    frontier = Frontier("kl", "flops", 8, exact, (worse, dear, good))
    assert frontier.path() == [{}, {"a": 2}]


def test_noise_below_zero_does_not_break_the_order():
    frontier = Frontier(
        "ppl", "flops", 8, {"a": 1.0}, (Candidate("a", "window", {"width": 64}, 0.5, 0.1, -0.3),)
    )
    assert frontier.solve(max_drop=0.0001).choice == {"a": 0}


def test_a_plan_keeps_its_frontier_through_json(tmp_path):
    frontier = drawn()
    point = frontier.solve(max_drop=0.01)
    plan = Plan.of_point(frontier, point.choice, {"model_hash": "abc"})
    assert list(plan.sites) == list(frontier.exact_cost)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.solve(max_drop=0.1).sites != plan.sites
    assert again.solve(max_drop=0.01).sites == plan.sites
    with pytest.raises(PlanError, match="no frontier"):
        Plan({}).solve(max_drop=1.0)


@pytest.mark.parametrize(
    "broken",
    [{}, {"candidates": 3}, {"candidates": [], "exact_cost": {}, "metric": "kl"}, []],
)
def test_a_damaged_frontier_is_refused(broken):
    document = {"schema": "fastattn.plan/1", "sites": {}, "frontier": broken}
    with pytest.raises(PlanError, match="frontier"):
        Plan.from_json(json.loads(json.dumps(document)))
