"""Choosing what serves each site under a budget: greedy with re-scoring, and the controls it has to beat.

    losses of single sites -> best choices of their sum -> measure the one at the budget -> correct -> again
    -> losses of the next moves in the context of the choice -> again

What is best so far is kept whenever it stops.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastattn_compile.frontier import LEAST_DROP, Candidate, Frontier, Point
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.retrofitting.candidates import Costs
from fastattn_compile.retrofitting.sensitivity import Laboratory

_CHECKS = 8  # whole choices measured in a round
_MOVES = 6  # next moves of each kind that are scored again in context
_CLOSE = 0.002  # share of the exact cost that is not worth another measurement


@dataclass(frozen=True)
class Budget:
    """What is asked for.

    Args:
        max_drop: Most that may be lost.
        speedup: Least factor between the cost of exact attention and the plan's.
    """

    max_drop: float | None
    speedup: float | None

    def best(self, frontier: Frontier) -> Point:
        """The best choice of a frontier: with both budgets, the least loss at the speedup, if that loses little enough."""
        if self.speedup is None:
            return frontier.solve(max_drop=self.max_drop)
        fast = frontier.solve(speedup=self.speedup)
        if self.max_drop is None or fast.drop <= self.max_drop:
            return fast
        return frontier.solve(max_drop=self.max_drop)

    def met(self, frontier: Frontier, point: Point) -> bool:
        """Whether a choice keeps to the budget."""
        fast = self.speedup is None or point.cost * self.speedup <= frontier.total_exact * (1 + 1e-9)
        good = self.max_drop is None or point.drop <= self.max_drop
        # A budget that leaves everything exact buys nothing, unless nothing was to be bought.
        return fast and good and (bool(point.choice) or not frontier.candidates or self.max_drop == 0)


class Search:
    """The search over a frontier.

    Args:
        laboratory: Where losses are measured.
        frontier: Candidates with their losses by themselves.
        budget: What is asked for.
        stop: Called before each measurement; true ends the search.
    """

    def __init__(
        self, laboratory: Laboratory, frontier: Frontier, budget: Budget, stop: Callable[[], bool]
    ) -> None:
        self.laboratory, self.frontier, self.budget, self.stop = laboratory, frontier, budget, stop

    def run(self, rounds: int = 2) -> Point:
        """Searches and returns the best measured choice; ``frontier`` then holds all that was measured."""
        self._settle()
        for number in range(rounds):
            best = self.best_measured()
            if self.stop() or not best.choice:
                break
            self.laboratory.say(f"score the next moves in context, round {number + 1}", 0, 2 * _MOVES)
            if not self._rescore(best):
                break
            self._settle()
        return self.best_measured()

    def best_measured(self) -> Point:
        """The best choice that was measured; all exact where none fits."""
        exact = Point(self.frontier.total_exact, 0.0, True)
        points = [p for p in self.frontier.points if p.measured] + [exact]
        budget = self.budget
        good = [p for p in points if budget.max_drop is None or p.drop <= budget.max_drop]
        if budget.speedup is None:
            return min(good, key=lambda p: (p.cost, p.drop))
        fast = [p for p in good if p.cost * budget.speedup <= self.frontier.total_exact * (1 + 1e-9)]
        return min(fast, key=lambda p: p.drop) if fast else min(good, key=lambda p: (p.cost, p.drop))

    def tokens(self, choice: Mapping[str, int]) -> dict[str, str]:
        """A choice as site to token of the operator."""
        return {site: self._token(index) for site, index in choice.items()}

    def _token(self, index: int) -> str:
        candidate = self.frontier.candidates[index]
        return make_operator(candidate.operator, **candidate.options).token

    def _settle(self) -> None:
        """Measures the choice at the budget, corrects the sums by it, and again until it stays."""
        for check in range(_CHECKS):
            point = self.budget.best(self.frontier)
            if not point.choice and not self.frontier.points:
                # By the estimate nothing fits; an estimate nobody has checked decides nothing.
                point = dataclasses.replace(point, choice=dict(next(iter(self.frontier.path()[1:]), {})))
            known = any(p.choice == point.choice for p in self.frontier.points)
            best = self.best_measured()
            gain = (best.cost - point.cost) / max(self.frontier.total_exact, 1e-30)
            if known or not point.choice or self.stop():
                return
            if best.choice and self.budget.speedup is None and gain < _CLOSE:
                return
            self.laboratory.say("measure whole choices", check, _CHECKS)
            self.measure(point.choice)

    def measure(self, choice: Mapping[str, int]) -> Point:
        """Measures a choice and notes it."""
        drop = self.laboratory.drop(self.tokens(choice))
        point = Point(self.frontier.cost_of(choice), max(drop, 0.0), True, dict(choice))
        self.frontier = dataclasses.replace(self.frontier, points=(*self.frontier.points, point))
        return point

    def _rescore(self, best: Point) -> bool:
        """Measures, with a choice in place, what the next moves from it change; whether any was measured."""
        frontier, choice = self.frontier, best.choice
        moves = self._moves(choice)
        scale = best.drop / max(frontier.sum_of(choice), LEAST_DROP)
        if scale <= 0:
            return False
        candidates = list(frontier.candidates)
        kept, scored = False, False
        for done, (site, index) in enumerate(moves):
            if self.stop():
                break
            changed = (
                {**choice, site: index} if index >= 0 else {s: i for s, i in choice.items() if s != site}
            )
            if not kept and not self.laboratory.knows(self.tokens(changed)):
                # What comes after a changed site is run from the states of this choice.
                self.laboratory.keep(self.tokens(choice))
                kept = True
            self.laboratory.say("score the next moves in context", done, len(moves))
            drop = self.laboratory.drop(self.tokens(changed))
            scored = True
            self._note(candidates, choice, site, index, (drop - best.drop) / scale)
            point = Point(frontier.cost_of(changed), max(drop, 0.0), True, changed)
            self.frontier = dataclasses.replace(self.frontier, points=(*self.frontier.points, point))
        if kept:
            self.laboratory.replay.forget(
                {s: self.laboratory.servers[s, t] for s, t in self.tokens(choice).items()}
            )
        self.frontier = dataclasses.replace(self.frontier, candidates=tuple(candidates))
        return scored

    def _note(
        self, candidates: list[Candidate], choice: Mapping[str, int], site: str, index: int, change: float
    ) -> None:
        """Corrects candidates of a site by a measured change of the loss between two of them.

        Such a change is small beside the loss that it is measured in, and other sites' errors may cancel it: a loss is
        lowered to a tenth at the most, never to nothing.
        """
        present = choice.get(site, -1)
        drop_of = {i: candidates[i].drop if i >= 0 else 0.0 for i in (present, index)}
        if index >= 0:
            drop = max(drop_of[present] + change, 0.1 * drop_of[index], LEAST_DROP)
            candidates[index] = dataclasses.replace(candidates[index], drop=drop, measured=True)
        if index < 0 or drop_of[index] < drop_of[present]:
            # Going back towards exact says what the present candidate costs in this context.
            drop = max(drop_of[index] - change, 0.1 * drop_of[present], LEAST_DROP)
            candidates[present] = dataclasses.replace(candidates[present], drop=drop, measured=True)

    def _moves(self, choice: Mapping[str, int]) -> list[tuple[str, int]]:
        """The moves that decide the budget: the next to make, and the last that were made, undone. -1 is exact."""
        path = self.frontier.path()
        ladders: dict[str, list[int]] = {site: [-1] for site in self.frontier.exact_cost}
        for step in path:
            for site, index in step.items():
                if ladders[site][-1] != index:
                    ladders[site].append(index)
        down: list[tuple[float, str, int]] = []
        up: list[tuple[float, str, int]] = []
        for site, ladder in ladders.items():
            present = choice.get(site, -1)
            if present not in ladder:
                continue
            place = ladder.index(present)
            if place + 1 < len(ladder):
                down.append((self._slope(site, present, ladder[place + 1]), site, ladder[place + 1]))
            if place > 0:
                up.append((-self._slope(site, ladder[place - 1], present), site, ladder[place - 1]))
        return [(site, index) for _, site, index in [*sorted(down)[:_MOVES], *sorted(up)[:_MOVES]]]

    def _slope(self, site: str, dear: int, cheap: int) -> float:
        candidates, exact = self.frontier.candidates, self.frontier.exact_cost[site]
        cost, drop = (candidates[dear].cost, candidates[dear].drop) if dear >= 0 else (exact, 0.0)
        saved = cost - candidates[cheap].cost
        return (candidates[cheap].drop - drop) / saved if saved > 0 else float("inf")


def controls(
    search: Search, best: Point, specs: Mapping[str, SiteSpec], costs: Costs, sites: Sequence[str], seed: int
) -> list[Point]:
    """Other ways to spend about as much as a choice: one operator everywhere, a window, candidates at random.

    Args:
        search: What found the choice.
        best: The choice.
        specs: The sites.
        costs: What operators cost.
        sites: Sites that may be replaced.
        seed: Of the random choices.
    """
    found: list[Point] = []
    if not best.choice:
        return found
    frontier, laboratory = search.frontier, search.laboratory

    def measured(choice: Mapping[str, int], label: str) -> None:
        if not search.stop():
            drop = laboratory.drop(search.tokens(choice))
            found.append(Point(frontier.cost_of(choice), max(drop, 0.0), True, dict(choice), label))

    laboratory.say("controls of the same cost", 0, 3)
    alike = _uniform(frontier, best.cost, sites)
    if alike:
        line = frontier.candidates[next(iter(alike.values()))]
        measured(alike, f"the same everywhere: {make_operator(line.operator, **line.options)}")
    laboratory.say("controls of the same cost", 1, 3)
    chance = random_choice(frontier, best.cost, random.Random(seed))
    if chance:
        measured(chance, f"at random, seed {seed}")
    laboratory.say("controls of the same cost", 2, 3)
    if not search.stop():
        window = _window(frontier, best.cost, specs, costs, sites)
        if window is not None:
            operator, cost = window
            for site in sites:
                laboratory.serve(site, operator)
            drop = laboratory.drop(dict.fromkeys(sites, operator.token))
            found.append(Point(cost, max(drop, 0.0), True, {}, f"the same everywhere: {operator}"))
    return found


def _uniform(frontier: Frontier, cost: float, sites: Sequence[str]) -> dict[str, int]:
    """The best choice of one operator at all sites that costs at least as much, and as little more as there is."""
    by_token: dict[str, dict[str, int]] = {}
    for index, candidate in enumerate(frontier.candidates):
        token = make_operator(candidate.operator, **candidate.options).token
        by_token.setdefault(token, {})[candidate.site] = index
    whole = [choice for choice in by_token.values() if set(choice) == set(sites)]
    dearer = [choice for choice in whole if frontier.cost_of(choice) >= cost]
    if not dearer:
        return {}
    near = 1.1 * min(frontier.cost_of(choice) for choice in dearer)
    return min((c for c in dearer if frontier.cost_of(c) <= near), key=frontier.sum_of)


def random_choice(frontier: Frontier, cost: float, generator: random.Random) -> dict[str, int]:
    """Sites in random order are given random candidates until the choice costs no more than ``cost``."""
    by_site: dict[str, list[int]] = {}
    for index, candidate in enumerate(frontier.candidates):
        if candidate.cost < frontier.exact_cost[candidate.site]:
            by_site.setdefault(candidate.site, []).append(index)
    choice: dict[str, int] = {}
    sites = list(by_site)
    # The last moves may be many: where the cheapest candidate everywhere is needed, only that fits.
    for _ in range(50):
        generator.shuffle(sites)
        for site in sites:
            if frontier.cost_of(choice) <= cost:
                return choice
            choice[site] = generator.choice(by_site[site])
    return choice if frontier.cost_of(choice) <= cost else {}


def _window(
    frontier: Frontier, cost: float, specs: Mapping[str, SiteSpec], costs: Costs, sites: Sequence[str]
) -> tuple[Operator, float] | None:
    """The narrowest window, with 4 sinks, at all sites that costs at least as much."""
    rest = sum(value for name, value in frontier.exact_cost.items() if name not in sites)

    def price(width: int) -> float:
        operator = make_operator("window", width=width)
        return rest + sum(costs.of(operator, specs[site]) for site in sites)

    if not all(make_operator("window").supports(specs[site]) for site in sites):
        return None
    low, high = 1, max(int(costs.at(specs[site]).key_len) for site in sites)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) >= cost else (middle + 1, high)
    return make_operator("window", width=low), price(low)


class Clock:
    """Says when time is up.

    Args:
        minutes: From now; ``None`` never.
    """

    def __init__(self, minutes: float | None) -> None:
        self.began = time.monotonic()
        self.minutes = minutes

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def up(self) -> bool:
        """Whether time is up."""
        return self.minutes is not None and self.seconds > 60 * self.minutes
