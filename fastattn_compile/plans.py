"""A plan: which operator serves which site, and why. Serialisable; written by hand, by a search, or by the backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn_compile.errors import PlanError
from fastattn_compile.frontier import Frontier
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.registry import make_operator

SCHEMA = "fastattn.plan/1"


@dataclass(frozen=True)
class PlannedSite:
    """What a plan says of one site.

    Args:
        operator: Name of an operator; ``"exact"`` keeps the softmax attention.
        options: Fields of the operator's configuration; the defaults fill the rest.
        reason: Why, in words.
    """

    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def build(self) -> Operator:
        """The configured operator."""
        return make_operator(self.operator, **self.options)


@dataclass(frozen=True)
class Plan:
    """Site names to operators.

    Args:
        sites: Name of a site, as ``fa.scan`` prints it, to what serves it. A site that is not named stays exact.
        provenance: Where the plan came from (versions, hashes), free form.
        frontier: What the search that made the plan knows: the loss and the cost of all it could have chosen.
    """

    sites: Mapping[str, PlannedSite]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frontier: Frontier | None = None

    def __post_init__(self) -> None:
        for name, site in self.sites.items():
            try:
                site.build()
            except (ValueError, TypeError) as error:
                raise PlanError(f"plan, site {name!r}: {error}") from error

    @staticmethod
    def uniform(names: list[str], operator: str, **options: Any) -> Plan:
        """The same operator at every named site."""
        return Plan(
            {name: PlannedSite(operator, options, "the same operator at every site") for name in names}
        )

    def solve(self, *, max_drop: float | None = None, speedup: float | None = None) -> Plan:
        """The plan for another budget, from what the search measured; the model is not needed.

        Args:
            max_drop: Most that may be lost, in the search's metric.
            speedup: Least factor between the cost of exact attention and the plan's.

        Raises:
            PlanError: The plan was not made by a search, or neither or both budgets are given.
        """
        if self.frontier is None:
            raise PlanError(
                "this plan has no frontier: only plans made by fa.plan can be solved for another budget"
            )
        point = self.frontier.solve(max_drop=max_drop, speedup=speedup)
        total = self.frontier.total_exact
        search = {
            **self.provenance.get("search", {}),
            "max_drop": max_drop,
            "speedup": speedup,
            "reached": bool(point.choice or max_drop == 0)
            and (speedup is None or point.cost * speedup <= total * (1 + 1e-9)),
            "stopped": "solved from the frontier",
            "drop": point.drop,
            "measured": point.measured,
            "cost_share": point.cost / total if total else 1.0,
            "replaced": len(point.choice),
        }
        return Plan.of_point(self.frontier, point.choice, {**self.provenance, "search": search})

    @staticmethod
    def of_point(frontier: Frontier, choice: Mapping[str, int], provenance: Mapping[str, Any]) -> Plan:
        """The plan that a choice of candidates makes.

        Args:
            frontier: What holds the candidates.
            choice: Name of a site to the index of its candidate; sites without one stay exact.
            provenance: Of the plan.
        """
        sites = {}
        for name in frontier.exact_cost:
            if name not in choice:
                sites[name] = PlannedSite(
                    "exact", {}, frontier.reasons.get(name, "nothing cheaper fits the budget")
                )
                continue
            candidate = frontier.candidates[choice[name]]
            share = candidate.cost / frontier.exact_cost[name]
            how = "measured" if candidate.measured else "estimated"
            reason = f"costs {share:.0%} of exact attention, {how} {frontier.metric} {candidate.drop:.2g} by itself"
            sites[name] = PlannedSite(candidate.operator, dict(candidate.options), reason)
        return Plan(sites, provenance, frontier)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document, schema ``fastattn.plan/1``."""
        document = {
            "schema": SCHEMA,
            "sites": {
                name: {"operator": s.operator, "options": dict(s.options), "reason": s.reason}
                for name, s in self.sites.items()
            },
            "provenance": dict(self.provenance),
        }
        if self.frontier is not None:
            document["frontier"] = self.frontier.to_json()
        return document

    @staticmethod
    def from_json(document: Any) -> Plan:
        """Reads a plan document.

        Raises:
            PlanError: It is not a plan, or names an operator or option that does not exist.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
            raise PlanError(f"expected a plan with schema {SCHEMA!r}, got {found!r}")
        sites = document.get("sites")
        if not isinstance(sites, Mapping):
            raise PlanError("a plan holds 'sites': {name: {'operator': ..., 'options': {...}}}")
        planned = {}
        for name, entry in sites.items():
            if not isinstance(entry, Mapping) or not isinstance(entry.get("operator"), str):
                raise PlanError(
                    f"plan, site {name!r}: expected {{'operator': name, 'options': {{...}}}}, got {entry!r}"
                )
            planned[name] = PlannedSite(
                entry["operator"], dict(entry.get("options", {})), entry.get("reason", "")
            )
        frontier = document.get("frontier")
        return Plan(
            planned,
            dict(document.get("provenance", {})),
            Frontier.from_json(frontier) if frontier is not None else None,
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan beside the target and renames it, so that a killed run leaves no half file."""
        from fastattn_compile.files import write_json

        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan file, or the plan of a folder that ``fa.save_pretrained`` wrote.

        Raises:
            PlanError: The file is missing, is not JSON, or is not a plan.
        """
        folder = Path(path).is_dir()
        try:
            source = Path(path) / "fastattn_config.json" if folder else Path(path)
            document = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"the plan {path} is not JSON: {error}") from error
        if folder:
            document = document.get("plan") if isinstance(document, Mapping) else None
        return Plan.from_json(document)
