"""Deciding what serves each site: an explicit operator, a plan, or what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.lowering.sdpa import serves
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.speed import crossover
from fastattn_compile.passes.fx_meta import value_of
from fastattn_compile.passes.names import site_module
from fastattn_compile.passes.site import NOT_ATTENTION, TAKEN, Site, Softmax

Measure = Callable[[Sequence[Site], Operator], Mapping[str, float]]


AMBIGUOUS = (
    "the plan treats the sites of this module differently, and behind a graph break one graph may serve all"
)
DECODING = "one query against the keys of a cache: a decoding step is linear already and stays exact"


def is_decoding(line: Softmax) -> bool:
    """Whether a site has a single query, as a step of generation does."""
    spec = line.site.spec if line.site is not None else None
    return spec is not None and isinstance(spec.query_len, int) and spec.query_len == 1


@dataclass(frozen=True)
class Choice:
    """What serves a site.

    Args:
        line: The softmax.
        operator: Its operator; ``None`` leaves the site as it was.
        reason: Why.
        error: Measured relative output error (95th percentile over sampled queries), ``None`` when not measured.
        fuse: Without an operator, write the site as SDPA with its mask as structure.
    """

    line: Softmax
    operator: Operator | None
    reason: str
    error: float | None = None
    fuse: bool = False


def symbolic_spec(site: Site) -> SiteSpec:
    """The site's description with sizes as ``torch.SymInt`` where they are symbolic, so that a comparison is guarded."""
    known: dict[Any, Any] = {}
    for operand in (site.query, site.key, site.value):
        for node in (operand.origin, operand.node):
            tensor = value_of(node)
            for size in tensor.shape if isinstance(tensor, torch.Tensor) else ():
                if isinstance(size, torch.SymInt):
                    known[size.node.expr] = size
    if not known:
        return site.spec

    def sized(expression: Any) -> Any:
        if not isinstance(expression, sympy.Expr):
            return expression
        if expression in known:
            return known[expression]
        factors: Any = 1
        for factor in sympy.Mul.make_args(expression):
            factors = factors * (int(factor) if factor.is_number else known.get(factor, factor))
        return factors

    sizes = {
        name: sized(getattr(site.spec, name))
        for name in ("batch", "heads", "kv_heads", "query_len", "key_len", "head_dim", "value_dim")
    }
    return dataclasses.replace(site.spec, **sizes)


def choose_operator(
    softmaxes: Sequence[Softmax], operator: Operator, strict: bool, learned: Collection[str] = ()
) -> list[Choice]:
    """Serves every site with one operator.

    Args:
        softmaxes: What was found.
        operator: The operator.
        strict: Raise when a site cannot be served.
        learned: Names of the sites that learned parameters are attached to.

    Raises:
        UnsupportedSiteError: ``strict``, and a softmax attention cannot be served.
    """
    return _strictly([_serve(line, operator, "named by the user", learned) for line in softmaxes], strict)


def choose_planned(
    softmaxes: Sequence[Softmax],
    planned: Mapping[str, tuple[Operator, str]],
    strict: bool,
    learned: Collection[str] = (),
    shared: Callable[[str], Collection[str]] | None = None,
) -> list[Choice]:
    """Serves each site as a plan says; sites the plan does not name stay exact.

    Args:
        softmaxes: What was found.
        planned: Name of a site to its operator and the plan's reason.
        strict: Raise when a planned site cannot be served.
        learned: Names of the sites that learned parameters are attached to.
        shared: For a graph that may be called several times in one pass of the model: path of a module to all its paths.
            A module that the plan treats differently from call to call then stays exact.

    Raises:
        UnsupportedSiteError: ``strict``, and a planned site cannot be served.
    """
    choices = []
    here = {line.name for line in softmaxes}
    for line in softmaxes:
        if shared is not None and _ambiguous(line.name, planned, shared(site_module(line.name)), here):
            choices.append(Choice(line, None, AMBIGUOUS))
        elif line.name not in planned:
            choices.append(Choice(line, None, line.reason or "not named by the plan"))
        elif planned[line.name][0].name == "exact":
            choices.append(Choice(line, None, planned[line.name][1] or "exact by the plan"))
        else:
            operator, reason = planned[line.name]
            choices.append(_serve(line, operator, reason or "named by the plan", learned))
    named = {name for name, (operator, _) in planned.items() if operator.name != "exact"}
    return _strictly(choices, strict, named)


def _ambiguous(
    name: str, planned: Mapping[str, tuple[Operator, str]], paths: Collection[str], here: Collection[str]
) -> bool:
    """Whether a plan says something else of other sites of a site's module, which are not in its graph."""

    def token(site: str) -> str:
        operator = planned[site][0] if site in planned else None
        return operator.token if operator is not None and operator.name != "exact" else ""

    others = [other for other in planned if site_module(other) in paths and other not in here]
    return any(token(other) != token(name) for other in others)


def choose_measured(
    softmaxes: Sequence[Softmax], candidate: Operator, tolerance: float, measure: Measure | None
) -> list[Choice]:
    """Serves a site with the candidate where it is predicted faster and its measured error is within tolerance.

    Args:
        softmaxes: What was found.
        candidate: The operator to consider.
        tolerance: Largest relative output error.
        measure: Gives the error of an operator at some sites; ``None`` when there is no real batch to measure on.
    """
    choices: dict[str, Choice] = {}
    worthwhile: list[Site] = []
    for line in softmaxes:
        choice = _serve(line, candidate, "")
        if choice.operator is not None and line.site is not None:
            spec = symbolic_spec(line.site)
            shortest = crossover(candidate, spec)
            # Comparing a symbolic length installs a guard: a shorter batch is compiled anew and decided anew.
            if not bool(spec.key_len >= shortest):
                choice = Choice(
                    line,
                    None,
                    f"exact attention is predicted to be as fast below {shortest} keys on {spec.device}",
                )
            elif measure is None:
                choice = Choice(line, None, "no real batch at compile time to measure the error on")
            else:
                worthwhile.append(line.site)
        choices[line.name] = choice
    errors = measure(worthwhile, candidate) if worthwhile and measure is not None else {}
    for site in worthwhile:
        if site.name not in errors:
            choices[site.name] = Choice(
                choices[site.name].line,
                None,
                "exact attention could not be run beside it to measure the error",
            )
    for name, error in errors.items():
        within = error <= tolerance
        verdict = f"measured error {error:.3g} is {'within' if within else 'above'} tolerance {tolerance:g}"
        choices[name] = Choice(choices[name].line, candidate if within else None, verdict, error)
    return list(choices.values())


def fused(choice: Choice) -> Choice:
    """A site that no operator serves, as SDPA with the recovered structure of its mask, where that computes it."""
    line = choice.line
    if choice.operator is not None or line.status != TAKEN or line.site is None or is_decoding(line):
        return choice
    if not serves(line.site.spec):
        return choice
    reason = f"{choice.reason}; written as SDPA, mask {line.site.spec.mask}"
    return dataclasses.replace(choice, fuse=True, reason=reason)


def _serve(line: Softmax, operator: Operator, reason: str, learned: Collection[str] = ()) -> Choice:
    if line.status != TAKEN or line.site is None:
        return Choice(line, None, line.reason)
    if operator.name != "exact" and is_decoding(line):
        return Choice(line, None, DECODING)
    if operator.learned and line.name not in learned:
        return Choice(
            line,
            None,
            f"{operator} has learned parameters and none are attached here; call fa.attach before compiling",
        )
    support = operator.supports(symbolic_spec(line.site))
    return Choice(line, operator, reason) if support else Choice(line, None, support.reason)


def _strictly(choices: list[Choice], strict: bool, named: set[str] | None = None) -> list[Choice]:
    refused = [
        c for c in choices
        if c.operator is None and c.line.status != NOT_ATTENTION and (named is None or c.line.name in named)
        and not is_decoding(c.line)
    ]  # fmt: skip
    if strict and refused:
        lines = "\n".join(f"  {c.line.name} ({c.line.source}): {c.reason}" for c in refused)
        raise UnsupportedSiteError(f"strict: {len(refused)} attention sites cannot be served:\n{lines}")
    return choices
