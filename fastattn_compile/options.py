"""Options of the backend: what a user may write in ``torch.compile(..., options={...})``, checked in one place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastattn_compile.errors import OptionError
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.registry import operator_class, operator_names
from fastattn_compile.plans import Plan

COMPILERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """What the backend is asked to do.

    Without ``operator`` and ``plan`` it plans by itself: each site's error is measured on the first real batch, and a site
    is replaced only where that error is within ``tolerance`` and the operator is predicted faster than exact attention.

    Args:
        operator: Serve every site with this operator. Sites it cannot serve stay exact, with the reason in the report.
        plan: Serve each site as a plan says.
        tolerance: Largest relative output error, 95th percentile over sampled queries, for a site to be replaced.
        strict: Raise when the named operator or the plan cannot serve a site.
        monitor: Share of calls, 0 to 1, on which each replaced site's error is measured while the model runs.
        compiler: What compiles the rewritten graph: ``inductor``, ``aot_eager`` or ``eager`` (no compilation).
        inductor: Configuration patches for Inductor.
        inductor_mode: A torch.compile mode (``max-autotune``, ...), which cannot be given beside ``options`` otherwise.
        quiet: Do not print the line that says what was done.
        exact_fuse: Write sites that no operator serves as SDPA with the recovered causal flag, window and grouped heads, so
            that no n x n mask is built. The same attention, up to rounding.
        check_masks: Read masks that are data to the graph, inputs and constants, from their values on the first batch, and
            compare them before every call; where they differ the graph runs as it was, exact and uncompiled.
        within: Path of the compiled module inside the model, when its blocks are compiled one by one (as under FSDP):
            sites are then named as in the whole model, which is how plans and learned parameters know them.
        operator_options: Fields of the named operator's configuration.
    """

    operator: str | None = None
    plan: Plan | None = None
    tolerance: float = 1e-2
    strict: bool = False
    monitor: float = 0.0
    compiler: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    inductor_mode: str | None = None
    quiet: bool = False
    exact_fuse: bool = False
    check_masks: bool = True
    within: str = ""
    operator_options: Mapping[str, Any] = field(default_factory=dict)

    def build_operator(self) -> Operator | None:
        """The operator the user named, configured."""
        if self.operator is None:
            return None
        cls = operator_class(self.operator)
        return cls(cls.config_type.from_dict(dict(self.operator_options)))


_KNOWN = [f.name for f in dataclasses.fields(Options) if f.name != "operator_options"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_options(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Reads the options a user gave.

    Args:
        given: The mapping from ``torch.compile(options=...)``. Keys are fields of ``Options``, or of the named operator's
            configuration.
        mode: The mode from ``torch.compile(mode=...)``.

    Raises:
        OptionError: A key is unknown or a value is bad; the text names the valid ones.
    """
    values = dict(given or {})
    if mode not in (None, "default"):
        values.setdefault("inductor_mode", mode)
    own = {key: values.pop(key) for key in list(values) if key in _KNOWN}
    operator, plan = own.get("operator"), own.get("plan")
    if operator is not None and operator not in operator_names():
        raise OptionError(
            f"option operator: unknown operator {operator!r}; operators: {', '.join(operator_names())}"
        )
    if operator is not None and plan is not None:
        raise OptionError("give either operator or plan, not both: a plan names an operator for each site")
    if values and operator is None:
        raise OptionError(
            f"unknown option{'s' if len(values) > 1 else ''} {', '.join(sorted(map(str, values)))}; "
            f"options: {', '.join(_KNOWN)}; fields of an operator's configuration need option operator"
        )
    if plan is not None:
        own["plan"] = _read_plan(plan)
    checks = {
        "tolerance": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
        "strict": (lambda v: isinstance(v, bool), "True or False"),
        "exact_fuse": (lambda v: isinstance(v, bool), "True or False"),
        "quiet": (lambda v: isinstance(v, bool), "True or False"),
        "monitor": (lambda v: _is_number(v) and 0 <= v <= 1, "a share between 0 and 1"),
        "compiler": (lambda v: v in COMPILERS, f"one of {', '.join(COMPILERS)}"),
        "inductor": (lambda v: isinstance(v, Mapping), "a mapping of Inductor settings"),
        "within": (lambda v: isinstance(v, str), "the path of a module"),
        "inductor_mode": (lambda v: v is None or isinstance(v, str), "the name of a torch.compile mode"),
    }
    for key, (right, wanted) in checks.items():
        if key in own and not right(own[key]):
            raise OptionError(f"option {key} must be {wanted}, got {own[key]!r}")
    options = Options(**own, operator_options=values)
    try:
        options.build_operator()
    except (ValueError, TypeError) as error:
        raise OptionError(f"{error}; options of the backend itself: {', '.join(_KNOWN)}") from error
    return options


def _read_plan(plan: Any) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(os.fspath(plan))
    if isinstance(plan, Mapping):
        return Plan.from_json(plan)
    raise OptionError(f"option plan must be a Plan, a path or a plan document, got {type(plan).__name__}")
