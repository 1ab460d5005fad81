"""The torch.compile backend: find, choose, rewrite, hand the rest to Inductor."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from fastattn_compile import measure
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.options import Options, parse_options
from fastattn_compile.passes.analyse import Analysis, analyse
from fastattn_compile.passes.choose import (
    Choice,
    choose_measured,
    choose_operator,
    choose_planned,
    fused,
    is_decoding,
)
from fastattn_compile.passes.learned import take_parameters
from fastattn_compile.passes.mask_guard import MaskCheck, MaskHistory
from fastattn_compile.passes.names import module_ids
from fastattn_compile.passes.regions import copied
from fastattn_compile.passes.rewrite import Replacement, rewrite
from fastattn_compile.passes.site import NOT_ATTENTION, Site, Softmax
from fastattn_compile.surfacing import surfacing

_KEPT_RECORDS = 256
# Batches with other masks after which a graph is compiled anew: with ones there is a word for, and, beyond those batches
# whose masks were as on the first, with ones there is none for.
_PATIENCE = 2
_PATIENCE_UNKNOWN = 8


@dataclass(frozen=True)
class Decision:
    """What the backend did with one softmax.

    Args:
        name: Name of the site.
        operator: Name of the operator that serves it; ``"exact"`` when it was left as it was.
        options: The operator's configuration.
        reason: Why.
        error: Measured relative output error, when it was measured at compile time.
        softmax: What was found.
        decoding: It is a step of generation, which stays exact whatever serves the site.
    """

    name: str
    operator: str
    options: Mapping[str, Any]
    reason: str
    error: float | None
    softmax: Softmax
    decoding: bool = False


@dataclass
class CompiledGraph:
    """One graph the backend compiled.

    Args:
        modules: Identities of the modules the graph came from.
        decisions: One for each softmax.
        monitor: Errors sampled at run time.
        planned: Names that the plan serves by an operator, of this graph's sites or others'.
        guard: What is asked before every call, for masks that were read from values.
    """

    modules: set[int]
    decisions: list[Decision]
    monitor: measure.Monitor | None = None
    planned: frozenset[str] = frozenset()
    guard: MaskGuard | None = None
    stop: Callable[[], None] = field(default=lambda: None, repr=False)

    def watch(self, share: float, names: set[str]) -> None:
        """Samples the errors of some sites from now on, on a share of the calls."""
        self.monitor = measure.Monitor(share)
        self.stop = self.monitor.watch(names)


class MaskGuard:
    """Runs a compiled graph where masks are what they were on the first batch, and elsewhere the graph as it was.

    Args:
        check: Compares.
        original: The graph before it was rewritten.
    """

    def __init__(self, check: MaskCheck, original: torch.fx.GraphModule) -> None:
        self.check, self.original = check, original
        self.calls = self.failures = 0
        self.broken: Counter[str] = Counter()
        self.history = MaskHistory()

    def lasts(self) -> bool:
        """Whether to go on with the graph, or to compile it anew with what was learned of the masks that broke."""
        learned = self.history.met or self.history.buffers
        kept = self.calls - self.failures
        return self.failures < (_PATIENCE if learned else kept + _PATIENCE_UNKNOWN)

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The function to call in place of ``compiled``."""

        def run(*inputs: Any) -> Any:
            self.calls += 1
            broken = self.check.broken(inputs)
            if not broken:
                return compiled(*inputs)
            if not self.failures:
                warnings.warn(
                    f"fastattn: {broken[0].failure}; such batches run exact and uncompiled, and where they keep coming "
                    "the graph is compiled anew; options={'check_masks': False} keeps sites with such masks exact from the "
                    "start",
                    stacklevel=2,
                )
            if self.lasts():
                self.check.learn(inputs, broken, self.history)
            self.failures += 1
            self.broken.update({name for claim in broken for name in claim.names})
            return self.original.forward(*inputs)

        return run


_compiled: list[CompiledGraph] = []


def fastattn(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compiles a captured graph with its attention replaced; see ``Options`` for what may be asked.

    Args:
        gm: The graph, from Dynamo.
        example_inputs: Its inputs.
        mode: A torch.compile mode for the rest of the graph.
        options: The user's options.

    Raises:
        OptionError: An option is unknown or bad.
        UnsupportedSiteError: ``strict``, and a site cannot be served.
    """
    with surfacing("find and replace the attention of a graph"):
        parsed = parse_options(options, mode)
        record = _rewrite(gm, example_inputs, parsed)
    if record.decisions and not parsed.quiet:
        print(f"fastattn: {summary(record.decisions)}", file=sys.stderr)
    compiled = _compile(gm, example_inputs, parsed)
    return compiled if record.guard is None else record.guard.around(compiled)


def _rewrite(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> CompiledGraph:
    """Replaces what is to be replaced, in place."""
    modules = module_ids(gm)
    history = _history(modules)
    analyses = analyse(gm, parsed.within, example_inputs if parsed.check_masks else None, history)
    # Learned parameters are marked in the graph by calls, which must go whether or not they are used.
    learned = {name: nodes for analysis in analyses for name, nodes in take_parameters(analysis.gm).items()}
    lines = [line for a in analyses for line in a.softmaxes]
    frame = analyses[0].frame
    measured = parsed.operator is None and parsed.plan is None
    if frame is not None and lines and measured:
        # What was measured on one model says nothing of another of the same class.
        frame.bind()
    shared = frame.aliases if frame is not None and frame.inside else None
    choices = _choose(gm, example_inputs, lines, parsed, learned, shared, history)
    if parsed.exact_fuse:
        choices = {name: fused(choice) for name, choice in choices.items()}
    rewritten = {name for name, choice in choices.items() if choice.operator is not None or choice.fuse}
    guard = None
    check = analyses[0].check
    if check is not None and (check := check.of(rewritten)) is not None:
        guard = MaskGuard(check, copied(gm))
        if frame is not None:
            frame.use_while(guard.lasts, "fastattn: the masks are what they were")
    for analysis in analyses:
        _apply(analysis, choices, learned)
    made = [_decision(c) for c in choices.values()]
    record = CompiledGraph(modules, made, planned=_planned(parsed), guard=guard)
    replaced = {
        c.line.name for c in choices.values() if c.operator is not None and c.operator.name != "exact"
    }
    if parsed.monitor and replaced:
        record.watch(parsed.monitor, replaced)
    remember(record)
    return record


def _history(modules: set[int]) -> MaskHistory:
    """What is known of the masks of a model, or of functions without modules, from graphs that were compiled before."""
    history = MaskHistory()
    for record in _compiled:
        if record.guard is not None and (record.modules & modules or record.modules == modules):
            history.add(record.guard.history)
    return history


def _planned(options: Options) -> frozenset[str]:
    sites = options.plan.sites.items() if options.plan is not None else ()
    return frozenset(name for name, site in sites if site.operator != "exact")


def not_found(model: torch.nn.Module | None = None) -> list[str]:
    """Names that a plan serves and no graph compiled so far has."""
    found = {decision.name for decision in decisions(model)}
    return sorted({name for record in records(model) for name in record.planned} - found)


def remember(record: CompiledGraph) -> None:
    """Keeps what was done with a graph, or by another way into a model, for reports."""
    if any(record is known for known in _compiled):
        return
    _compiled.append(record)
    for forgotten in _compiled[:-_KEPT_RECORDS]:
        forgotten.stop()
    del _compiled[:-_KEPT_RECORDS]


def forget(record: CompiledGraph) -> None:
    """Drops what ``remember`` keeps, when its model is gone: identities of its modules will be those of others."""
    record.stop()
    _compiled[:] = [known for known in _compiled if known is not record]


def reset() -> None:
    """Forgets everything compiled so far; ``torch.compiler.reset()`` calls it."""
    for record in _compiled:
        record.stop()
    _compiled.clear()


fastattn.reset = reset  # type: ignore[attr-defined]


def records(model: torch.nn.Module | None = None) -> list[CompiledGraph]:
    """The graphs compiled so far, of one model or of all.

    Args:
        model: A model, compiled or not.
    """
    if model is None:
        return list(_compiled)
    own = {id(module) for module in getattr(model, "_orig_mod", model).modules()}
    return [record for record in _compiled if record.modules & own]


def decisions(model: torch.nn.Module | None = None) -> list[Decision]:
    """What was done with each softmax of a model; the latest compilation of a site counts, decoding steps last."""
    latest: dict[str, Decision] = {}
    for record in records(model):
        for decision in record.decisions:
            if decision.name not in latest or not decision.decoding:
                latest[decision.name] = decision
    return list(latest.values())


def summary(made: Sequence[Decision]) -> str:
    """One line that says what was done."""
    attention = [d for d in made if d.softmax.status != NOT_ATTENTION]
    by_operator = Counter(d.operator for d in attention)
    others = len(made) - len(attention)
    text = f"{len(attention)} attention site{'s' if len(attention) != 1 else ''}: " + ", ".join(
        f"{count} {name}" for name, count in by_operator.most_common()
    )
    reasons = Counter(d.reason for d in attention if d.operator == "exact" and d.reason)
    if reasons:
        reason = reasons.most_common(1)[0][0]
        text += f" (exact because: {reason}{f', and {len(reasons) - 1} other reasons' if len(reasons) > 1 else ''})"
    return text + (f"; {others} softmax{'es' if others > 1 else ''} not attention" if others else "")


def _choose(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    softmaxes: list[Softmax],
    options: Options,
    learned: Collection[str],
    shared: Callable[[str], Collection[str]] | None,
    history: MaskHistory,
) -> dict[str, Choice]:
    operator = options.build_operator()
    if operator is not None:
        made = choose_operator(softmaxes, operator, options.strict, learned)
    elif options.plan is not None:
        planned = {name: (site.build(), site.reason) for name, site in options.plan.sites.items()}
        made = choose_planned(softmaxes, planned, options.strict, learned, shared)
    else:

        def errors(sites: Sequence[Site], candidate: Operator) -> Mapping[str, float]:
            return measure.measure_graph(gm, example_inputs, sites, candidate, history)

        real = errors if measure.is_real(example_inputs) else None
        made = choose_measured(softmaxes, make_operator("fma"), options.tolerance, real)
    return {choice.line.name: choice for choice in made}


def _apply(
    analysis: Analysis, choices: Mapping[str, Choice], learned: Mapping[str, tuple[torch.fx.Node, ...]]
) -> None:
    replacements = []
    for line in analysis.softmaxes:
        operator = choices[line.name].operator
        if operator is not None and line.site is not None:
            parameters = learned[line.name] if operator.learned else ()
            replacements.append(Replacement(line.site, operator, parameters))
        elif choices[line.name].fuse and line.site is not None:
            replacements.append(Replacement(line.site, None))
    rewrite(analysis.gm, replacements)


def _decision(choice: Choice) -> Decision:
    operator = choice.operator
    return Decision(
        choice.line.name,
        operator.name if operator is not None else "exact",
        operator.config.to_dict() if operator is not None else {},
        choice.reason,
        choice.error,
        choice.line,
        is_decoding(choice.line),
    )


def _compile(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.compiler == "eager":
        return gm.forward
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        compiled: Callable[..., Any] = lookup_backend("aot_eager")(gm, list(example_inputs))
        return compiled
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(options.inductor_mode)) if options.inductor_mode else {}
    patches.update(options.inductor)
    lowered: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return lowered
