"""Candidates that serve the heads of a site differently, put together from what its whole-site candidates err by head.

The heads of a site are to it what the sites are to a model: choosing one candidate a head so that the sum of squared
errors is least for the cost is the same knapsack, and the same hulls solve it. What was measured of whole sites tells
the error of every mixture, so that none has to be run to know it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastattn_compile.frontier import Candidate, Frontier
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.retrofitting.candidates import Costs

Shares = tuple[float, ...]
"""Squared error of every key head over the squared norm of the site's whole output."""

_MOST = 4  # mixtures a site
_BETTER = (
    0.9  # share of the error of the best whole-site candidate for no more, which a mixture must come below
)


def mixtures(
    operators: Sequence[tuple[Operator, dict[str, Any]]], prices: Sequence[float], shares: Sequence[Shares],
    spec: SiteSpec, costs: Costs, exact_cost: float,
) -> list[tuple[Operator, dict[str, Any], float, Shares]]:  # fmt: skip
    """The mixtures of a site's candidates that are worth choosing.

    Candidates with learned parameters serve whole sites alone: these belong to all of a site's heads.

    Args:
        operators: The candidates of the site with the options that make them.
        prices: Their costs.
        shares: Their errors.
        spec: The site.
        costs: What a mixture costs.
        exact_cost: Cost of the site's exact attention.

    Returns:
        Operator, options, cost and error of each, the most expensive first.
    """
    heads = len(shares[0]) if shares else 1
    usable = [i for i, (operator, _) in enumerate(operators) if not operator.learned]
    if heads == 1 or len(usable) < 2:
        return []
    single = [
        Candidate(str(h), str(i), {}, prices[i] / heads, shares[i][h], shares[i][h])
        for h in range(heads)
        for i in usable
    ]
    exact = {str(h): exact_cost / heads for h in range(heads)}
    whole = [(price, sum(heads)) for price, heads in zip(prices, shares)] + [(exact_cost, 0.0)]
    found = []
    for choice in Frontier("error", costs.unit, 0, exact, single).path():
        mixed = [int(single[choice[h]].operator) if h in choice else -1 for h in exact]
        if len(set(mixed)) == 1:
            continue
        options = _options([operators[i] if i >= 0 else None for i in mixed])
        operator = make_operator("per_head", **options)
        cost = costs.of(operator, spec)
        own = tuple(shares[i][h] if i >= 0 else 0.0 for h, i in enumerate(mixed))
        if operator.supports(spec) and cost < exact_cost and sum(own) <= _BETTER * _hull(whole, cost):
            found.append((operator, options, cost, own))
    step = max(1, -(-len(found) // _MOST))
    return found[::step]


def _hull(points: Sequence[tuple[float, float]], cost: float) -> float:
    """The least error for a cost between two points of cost and error; infinite below the cheapest."""
    found = math.inf
    for low, more in points:
        for high, less in points:
            if low <= cost < high:
                found = min(found, more + (less - more) * (cost - low) / (high - low))
    return found


def _options(by_head: Sequence[tuple[Operator, dict[str, Any]] | None]) -> dict[str, Any]:
    """What says in plain values that each key head is served by an operator, ``None`` for exact attention."""
    parts: list[dict[str, Any]] = []
    heads = []
    for served in by_head:
        part = {"operator": "exact", "options": {}}
        if served is not None:
            part = {"operator": served[0].name, "options": dict(served[1])}
        if part not in parts:
            parts.append(part)
        heads.append(parts.index(part))
    return {"parts": parts, "heads": heads}
