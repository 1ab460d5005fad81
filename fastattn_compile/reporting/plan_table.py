"""A plan on the terminal: its sites, the frontier it stands on, the controls of its cost."""

from __future__ import annotations

from itertools import groupby
from typing import IO

from rich.markup import escape

from fastattn_compile.frontier import Point
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.terminal import console, joined_names, new_table

_LINES = 12


def print_plan(plan: Plan, file: IO[str] | None = None) -> None:
    """Prints a plan.

    Args:
        plan: The plan.
        file: Where to; standard output when ``None``.
    """
    out = console(file)
    sites = new_table("site", "operator", "why")
    for _, members in groupby(plan.sites.items(), key=lambda item: (item[1].operator, str(item[1].options))):
        names, served = zip(*members)
        options = ", ".join(f"{key}={value}" for key, value in served[0].options.items())
        # Reasons of replaced sites hold each its own loss; those of exact ones are often the same.
        why = served[0].reason if len({site.reason for site in served}) == 1 else f"{len(names)} sites"
        sites.add_row(
            escape(joined_names(list(names))),
            served[0].operator + (f" ({options})" if options else ""),
            escape(why),
        )
    out.print(sites)
    frontier = plan.frontier
    if frontier is None:
        return
    total = frontier.total_exact or 1.0
    curve = new_table(
        "cost of attention", frontier.metric, "", title=f"frontier ({frontier.unit}, n = {frontier.n})"
    )
    points = frontier.frontier()
    step = max(1, -(-len(points) // _LINES))
    for point in [*points[:-1:step], points[-1]]:
        curve.add_row(
            f"{point.cost / total:.1%}", f"{point.drop:.3g}", "measured" if point.measured else "estimated"
        )
    out.print(curve)
    search = plan.provenance.get("search")
    if search:
        compared = new_table("at about this cost", "cost", frontier.metric)
        plan_line = Point(search["cost_share"] * total, search["drop"], True, label="this plan")
        for point in (plan_line, *frontier.controls):
            compared.add_row(escape(point.label), f"{point.cost / total:.1%}", f"{point.drop:.3g}")
        out.print(compared)
