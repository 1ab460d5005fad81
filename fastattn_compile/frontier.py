"""What a search under a budget knows: candidates, what each loses and costs, and the best choices for every budget.

A frontier needs no model. Choosing one candidate a site so that the sum of losses stays within a budget and the cost is
least is a multiple-choice knapsack; on the lower convex hull of every site's candidates, the greedy order by loss for
cost saved is optimal up to its last move (Sinha and Zoltners, 1979). Losses of sites are not quite additive, so the sum
is corrected by what whole choices were measured to lose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn_compile.errors import PlanError

# A drop that noise made negative, or that was too small to see, counts as this: it still orders by cost.
LEAST_DROP = 1e-9


@dataclass(frozen=True)
class Candidate:
    """An operator that could serve a site.

    Args:
        site: Name of the site.
        operator: Name of the operator.
        options: Fields of its configuration.
        cost: Of one forward pass, in the frontier's unit.
        error: Relative squared error of the site's output on the exact model's tensors.
        drop: What the model loses when this site alone is replaced, or in the context of others where it was re-scored.
        measured: Whether the drop was measured; else it is scaled from another candidate's by the error.
    """

    site: str
    operator: str
    options: Mapping[str, Any]
    cost: float
    error: float
    drop: float
    measured: bool = False


@dataclass(frozen=True)
class Point:
    """A choice for the whole model.

    Args:
        cost: Of all sites together, in the frontier's unit.
        drop: What the model loses: measured, or the corrected sum.
        measured: Whether the drop was measured with all of the choice in place.
        choice: Site to index of its candidate; sites that are not named stay exact.
        label: What kind of choice it is.
    """

    cost: float
    drop: float
    measured: bool
    choice: Mapping[str, int] = field(default_factory=dict)
    label: str = "frontier"


@dataclass(frozen=True)
class Frontier:
    """Candidates, and what choices of them lose and cost.

    Args:
        metric: What ``drop`` is.
        unit: What ``cost`` is: ``"seconds"`` measured, ``"predicted seconds"``, or ``"flops"``.
        n: Keys a sequence that cost and drop hold for.
        exact_cost: Site to the cost of its exact attention, all sites in execution order.
        candidates: What could serve the sites.
        points: Choices that were measured.
        controls: Other ways to spend about as much as the plan: the same operator everywhere, a random choice.
        reasons: Site that has no candidate to why it has none.
    """

    metric: str
    unit: str
    n: int
    exact_cost: Mapping[str, float]
    candidates: Sequence[Candidate]
    points: Sequence[Point] = ()
    controls: Sequence[Point] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_exact(self) -> float:
        """Cost of all sites exact."""
        return sum(self.exact_cost.values())

    def cost_of(self, choice: Mapping[str, int]) -> float:
        """Cost of a choice."""
        exact = sum(cost for name, cost in self.exact_cost.items() if name not in choice)
        return exact + sum(self.candidates[index].cost for index in choice.values())

    def sum_of(self, choice: Mapping[str, int]) -> float:
        """Sum of the drops of a choice's candidates."""
        return sum(max(self.candidates[index].drop, LEAST_DROP) for index in choice.values())

    def path(self) -> list[dict[str, int]]:
        """Choices from all exact to the cheapest, one move after the other, each with the least loss for its saving."""
        by_site: dict[str, list[int]] = {name: [] for name in self.exact_cost}
        for index, candidate in enumerate(self.candidates):
            by_site[candidate.site].append(index)
        moves: list[tuple[float, int, str, int]] = []
        for order, (name, indices) in enumerate(by_site.items()):
            for slope, index in self._hull(name, indices):
                moves.append((slope, order, name, index))
        choice: dict[str, int] = {}
        choices = [dict(choice)]
        # Slopes rise along a hull, so the moves of a site stay in their order.
        for _, _, name, index in sorted(moves, key=lambda move: (move[0], move[1])):
            choice[name] = index
            choices.append(dict(choice))
        return choices

    def _hull(self, name: str, indices: Sequence[int]) -> list[tuple[float, int]]:
        """Candidates on the lower hull of drop over saving, cheapest last, with the slope that leads to each."""
        exact = self.exact_cost[name]
        # The zero stands for exact attention; a candidate that saves nothing is never chosen.
        corners: list[tuple[float, float, int, float]] = [(0.0, 0.0, -1, -math.inf)]
        options = sorted(
            (exact - c.cost, max(c.drop, LEAST_DROP), i)
            for i in indices
            if (c := self.candidates[i]).cost < exact
        )
        for saving, drop, index in options:
            slope = math.inf
            while corners:
                before = corners[-1]
                if saving <= before[0]:
                    if drop >= before[1]:
                        break
                    corners.pop()
                    continue
                slope = (drop - before[1]) / (saving - before[0])
                if slope > before[3]:
                    break
                corners.pop()
            if corners and saving > corners[-1][0]:
                corners.append((saving, drop, index, slope))
        return [(slope, index) for _, _, index, slope in corners if index >= 0]

    def corrected(self, total: float) -> float:
        """What a choice whose drops sum to ``total`` is expected to lose, from the measured choices nearest to it."""
        known = sorted(
            (self.sum_of(p.choice), max(p.drop, LEAST_DROP))
            for p in self.points
            if p.measured and p.choice and self.sum_of(p.choice) > 0
        )
        if not known or total <= 0:
            return total
        below = [pair for pair in known if pair[0] <= total]
        above = [pair for pair in known if pair[0] > total]
        if not below or not above:
            at, drop = below[-1] if below else above[0]
            return total * drop / at
        (low, low_drop), (high, high_drop) = below[-1], above[0]
        share = math.log(total / low) / math.log(high / low)
        return total * (low_drop / low) ** (1 - share) * (high_drop / high) ** share

    def frontier(self) -> list[Point]:
        """All choices that are best for some budget, from all exact to the cheapest: measured ones as measured."""
        found = [
            Point(
                self.cost_of(choice),
                self.corrected(self.sum_of(choice)) if choice else 0.0,
                not choice,
                choice,
            )
            for choice in self.path()
        ]
        best: list[Point] = []
        for point in sorted([*found, *self.points], key=lambda p: (-p.cost, p.drop)):
            if best and best[-1].cost <= point.cost and best[-1].drop <= point.drop:
                continue
            while best and best[-1].drop >= point.drop and best[-1].choice:
                best.pop()
            best.append(point)
        return best

    def solve(self, *, max_drop: float | None = None, speedup: float | None = None) -> Point:
        """The best choice for a budget: the cheapest within ``max_drop``, or the one of least loss with ``speedup``.

        Args:
            max_drop: Most that may be lost.
            speedup: Least factor between the cost of all exact and the choice's.

        Returns:
            The choice; where no choice reaches ``speedup``, the cheapest.

        Raises:
            PlanError: Not exactly one budget is given, or it is out of range.
        """
        if (max_drop is None) == (speedup is None):
            raise PlanError(
                f"give one budget, max_drop or speedup; got max_drop={max_drop}, speedup={speedup}"
            )
        points = self.frontier()
        if max_drop is not None:
            if not max_drop >= 0:
                raise PlanError(f"max_drop must be at least 0, got {max_drop}")
            # All exact loses nothing, so there is always one.
            best = min((p for p in points if p.drop <= max_drop or not p.choice), key=lambda p: p.cost)
            filled = self._filled(best.choice, max_drop)
            total = self.sum_of(filled)
            return (
                best
                if filled == best.choice
                else Point(self.cost_of(filled), self.corrected(total), False, filled)
            )
        assert speedup is not None
        if not speedup > 0:
            raise PlanError(f"speedup must be above 0, got {speedup}")
        enough = [p for p in points if p.cost * speedup <= self.total_exact * (1 + 1e-9)]
        if enough:
            return min(enough, key=lambda p: p.drop)
        return min(points, key=lambda p: p.cost)

    def _filled(self, choice: Mapping[str, int], max_drop: float) -> dict[str, int]:
        """A choice with what is left of the budget spent on the largest savings that still fit, off the hull too."""
        filled, total = dict(choice), self.sum_of(choice)
        known = [dict(p.choice) for p in self.points if p.measured]
        rate = self.corrected(total) / total if total > 0 else 1.0
        while True:
            moves = []
            for index, candidate in enumerate(self.candidates):
                name = candidate.site
                present = filled.get(name, -1)
                cost, drop = self.exact_cost[name], 0.0
                if present >= 0:
                    cost, drop = self.candidates[present].cost, max(self.candidates[present].drop, LEAST_DROP)
                after = total - drop + max(candidate.drop, LEAST_DROP)
                if candidate.cost < cost and after * rate <= max_drop:
                    moves.append((cost - candidate.cost, index, after))
            for _, index, after in sorted(moves, reverse=True):
                tried = {**filled, self.candidates[index].site: index}
                # What was measured is among the points already, with what it really loses.
                if tried not in known and self.corrected(after) <= max_drop:
                    filled, total = tried, after
                    break
            else:
                return filled

    def to_json(self) -> dict[str, Any]:
        """The frontier as plain values; ``curve`` repeats the best choices as cost share and drop, for readers."""
        exact = self.total_exact or 1.0
        return {
            **{name: getattr(self, name) for name in ("metric", "unit", "n")},
            "exact_cost": dict(self.exact_cost),
            "candidates": [{**dataclasses.asdict(c), "options": dict(c.options)} for c in self.candidates],
            "points": [_point(p) for p in self.points],
            "controls": [_point(p) for p in self.controls],
            "reasons": dict(self.reasons),
            "curve": [[p.cost / exact, p.drop] for p in self.frontier()],
        }

    @staticmethod
    def from_json(document: Any) -> Frontier:
        """Reads ``to_json``.

        Raises:
            PlanError: It is no frontier.
        """
        try:
            candidates = tuple(_known(Candidate, line) for line in document["candidates"])
            points, controls = (
                tuple(_known(Point, line) for line in document.get(name, ()))
                for name in ("points", "controls")
            )
            exact = {str(name): float(cost) for name, cost in document["exact_cost"].items()}
            for line in (*points, *controls):
                for site, index in line.choice.items():
                    if candidates[index].site != site:
                        raise ValueError(f"candidate {index} is not of site {site!r}")
            if any(c.site not in exact for c in candidates):
                raise ValueError("a candidate is of a site without exact_cost")
            return Frontier(
                str(document["metric"]),
                str(document["unit"]),
                int(document["n"]),
                exact,
                candidates,
                points,
                controls,
                {str(site): str(why) for site, why in document.get("reasons", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(f"malformed frontier of a plan: {error}") from error


def _point(point: Point) -> dict[str, Any]:
    return {**dataclasses.asdict(point), "choice": dict(point.choice)}


def _known(cls: Any, values: Mapping[str, Any]) -> Any:
    """Builds from the keys this version knows."""
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})
