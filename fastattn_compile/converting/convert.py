"""``fa.convert``: replaces the attention of an ONNX model, measures what that cost, and saves it only when it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy

from fastattn_compile.converting.delta import (
    cost_report,
    errors,
    model_report,
    run_in_folder,
    site_reports,
)
from fastattn_compile.converting.expose import expose, hidden_in
from fastattn_compile.converting.feeds import Feeds, check_feeds, load_feeds, make_feeds
from fastattn_compile.converting.learned import Learned, parameters_of, stored_parameters
from fastattn_compile.converting.run import RuntimeFailure
from fastattn_compile.converting.saving import keep_weights, move, original_path, staged, target_of, write
from fastattn_compile.converting.source import Prepared, Source, prepare, read_model
from fastattn_compile.errors import ConversionError, OptionError
from fastattn_compile.lowering.onnx.native import NODES
from fastattn_compile.lowering.onnx.registry import body_of
from fastattn_compile.operators.base import Operator, no
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.onnx.rewrite import Placed, Replacement, can_replace, rewrite
from fastattn_compile.passes.onnx.sizes import symbol
from fastattn_compile.passes.site import NOT_ATTENTION
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import Report, SiteReport
from fastattn_compile.reporting.provenance import inputs_hash, versions
from fastattn_compile.scanning import Scan, judge

Progress = Callable[[str, int, int], None]

LONGEST = 8192
_CANDIDATE = "fma"
_UNTRAINED = "its parameters start from these inputs, nobody has fitted them"
_UNSEEN = "these inputs do not reach it, its error is not known"


def scan_onnx(source: Source) -> Scan:
    """Lists every softmax of an ONNX model, as ``fa.scan`` does for a module.

    Args:
        source: A path, the bytes of a file, or an ``onnx.ModelProto``.

    Raises:
        ModelLoadError: It is no ONNX model.
    """
    prepared = prepare(source)
    return Scan(tuple(judge(line) for line in prepared.softmaxes))


def convert(
    source: Source,
    out: str | Path | None = None,
    *,
    operator: str | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | str | Path | None = None,
    tolerance: float | None = None,
    inputs: Mapping[str, Any] | str | Path | None = None,
    length: int = 2048,
    longest: int = LONGEST,
    repeats: int = 3,
    threads: int = 0,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Replaces the softmax attention of an ONNX model by nodes that any ONNX runtime can run.

    Each replaced attention becomes one node of the domain ``fastattn`` and a function of the same name in standard
    operators, which a runtime that knows nothing of us inlines. The original and the converted model then run side by
    side; nothing is written when the converted one fails or costs more than ``tolerance``.

    Args:
        source: A path, the bytes of a file, or an ``onnx.ModelProto``.
        out: Where the converted model goes; ``None`` measures only.
        operator: Serve every site with this operator. With neither it nor a plan, ``fma`` is tried and kept where the
            error of a site is within ``tolerance`` (0.01 when not given).
        options: Fields of its configuration.
        plan: Serve each site as a plan says, by the names that ``scan_onnx`` gives. Of a folder that
            ``fa.save_pretrained`` wrote the fitted parameters are taken, too; else learned parameters are what they
            start with, from these inputs.
        tolerance: Largest relative error of a site (95th percentile). With an operator or a plan, more is a failure.
        inputs: Arrays by name, or the path of an ``.npz`` file; made from the model's signature when ``None``.
        length: Tokens of the inputs that are made.
        longest: Longest sequence the converted model must serve where the length is not fixed; a longer one stops
            the run with an index out of range in a node named ``...fastattn...``.
        repeats: Timed runs behind a median.
        threads: Threads of ONNX Runtime; 0 leaves it to the runtime.
        seed: Seed of made inputs.
        progress: Told the stage at hand.

    Returns:
        The report, schema ``fastattn.report/1``.

    Raises:
        ModelLoadError: ``source`` is no ONNX model.
        OptionError: An argument is out of range, or inputs do not fit.
        ConversionError: The converted model fails validation or is over budget. ``out`` is left as it was.
    """
    target = target_of(source, out)
    named = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if operator is not None and named is not None:
        raise OptionError("give an operator or a plan, not both")
    progress("find the attention", 0, 0)
    prepared = prepare(source)
    keep_weights(prepared.model, target)
    choices, reasons = _choose(prepared, operator, options, named, longest)
    feeds = _feeds(inputs, prepared, length, seed)
    tokens = _tokens(prepared, choices, feeds, length)
    if not choices:
        return Report(_kept(prepared, reasons, {}), provenance=_provenance(prepared, feeds))
    progress("run the original and each operator beside it", 0, 0)
    learned, fresh = parameters_of(source, choices, stored_parameters(plan), feeds, threads, longest)
    reasons.update({name: f"{reasons[name]}; {_UNTRAINED}" for name in fresh})
    before, exact, own = _shadow(source, choices, learned, feeds, threads, longest)
    limit = tolerance if tolerance is not None else 0.01
    over = {name: q.p95 for name, q in own.items() if q is not None and q.p95 > limit}
    unseen = [name for name, q in own.items() if q is None]
    if operator is None and named is None:
        for name in (*over, *unseen):
            del choices[name]
            error = (
                f"measured error {over[name]:.3g} is above tolerance {limit:g}" if name in over else _UNSEEN
            )
            reasons[name] = error
        if not choices:
            return Report(_kept(prepared, reasons, own), provenance=_provenance(prepared, feeds))
    elif tolerance is not None:
        _within(over, unseen, len(choices), limit)
    reasons.update({name: f"{reasons[name]}; {_UNSEEN}" for name in unseen if name in choices})
    progress("run the converted model", 0, 0)
    after, inside, placed, converted = _converted(source, choices, learned, feeds, threads, longest)
    names = [v.name or "" for v in prepared.model.graph.outputs]
    _validate(names, before, after)
    for name, array in inside.items():
        if array.shape != exact[name].shape:
            raise ConversionError(
                f"{name}: the converted model takes other branches or other numbers of rounds than the original on these "
                "inputs; nothing was written"
            )
    causal = all(item.site.spec.mask.causal for item in placed)
    alone = [own.get(item.site.name) for item in placed]
    accumulated = [errors(inside[item.site.name], exact[item.site.name]) for item in placed]
    replaced = site_reports(placed, choices, alone, accumulated, reasons, tokens)
    lines = {line.name: line for line in (*_kept(prepared, reasons, own), *replaced)}
    sites = tuple(lines[s.name] for s in prepared.softmaxes if s.name in lines)
    provenance = {**_provenance(prepared, feeds), "kernels": _kernels(choices.values())}
    report = Report(sites, model_report(names, before, after, feeds, causal), provenance=provenance)
    progress("time both", 0, 0)
    return _saved(source, converted, target, report, feeds, tokens, repeats, threads)


def _within(over: Mapping[str, float], unseen: list[str], sites: int, limit: float) -> None:
    """Raises where a site is above a tolerance that was asked for, or nothing shows that it is not."""
    if over:
        worst = max(over, key=lambda name: over[name])
        raise ConversionError(
            f"over budget: {len(over)} of {sites} sites are above the tolerance {limit:g}, the worst is {worst} with "
            f"{over[worst]:.3g}; nothing was written"
        )
    if unseen:
        raise ConversionError(
            f"{len(unseen)} of {sites} sites are not reached by these inputs ({', '.join(unseen[:5])}): nothing shows that "
            f"they are within the tolerance {limit:g}; give inputs that take their branches. Nothing was written"
        )


def _choose(
    prepared: Prepared,
    operator: str | None,
    options: Mapping[str, Any] | None,
    plan: Plan | None,
    longest: int,
) -> tuple[dict[str, Operator], dict[str, str]]:
    """The operators of the sites that can be replaced, and the reasons of all sites."""
    try:
        uniform = make_operator(operator or _CANDIDATE, **dict(options or {})) if plan is None else None
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error
    planned = {name: site.build() for name, site in plan.sites.items()} if plan is not None else {}
    strange = sorted(set(planned) - {line.name for line in prepared.softmaxes})
    if strange:
        known = ", ".join(line.name for line in prepared.softmaxes[:5])
        raise OptionError(
            f"the plan names sites the model does not have: {', '.join(strange[:5])}; it has {known} ..."
        )
    choices: dict[str, Operator] = {}
    reasons: dict[str, str] = {}
    for line in prepared.softmaxes:
        wanted = uniform if uniform is not None else planned.get(line.name)
        if line.site is None:
            reasons[line.name] = line.reason
            continue
        if wanted is None:
            reasons[line.name] = "not named by the plan"
            continue
        support = can_replace(Replacement(line.site, wanted, longest), prepared.opset)
        if support and (hidden := hidden_in(prepared.model, line.site.out.origin)):
            support = no(hidden)
        reasons[line.name] = support.reason or (
            "named by the user" if plan is None and operator else "within tolerance"
        )
        if support:
            choices[line.name] = wanted
    return choices, reasons


def _feeds(
    inputs: Mapping[str, Any] | str | Path | None, prepared: Prepared, length: int, seed: int
) -> Feeds:
    if inputs is None:
        return make_feeds(prepared.model, length, seed=seed)
    if isinstance(inputs, (str, Path)):
        return check_feeds(load_feeds(Path(inputs), prepared.model), prepared.model)
    return check_feeds(inputs, prepared.model)


def _tokens(prepared: Prepared, choices: Mapping[str, Operator], feeds: Feeds, length: int) -> int:
    """Keys of the longest replaced site on these inputs; that of token numbers where no site tells it."""
    dims = {
        symbol(str(dim.value)): array.shape[at]
        for value in prepared.model.graph.inputs
        if (array := feeds.get(value.name or "")) is not None and value.shape is not None
        for at, dim in enumerate(value.shape)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    sites = [line.site for line in prepared.softmaxes if line.site is not None and line.name in choices]
    sizes = [sympy.sympify(site.spec.key_len).subs(dims) for site in sites]
    known = [int(size) for size in sizes if size.is_Integer]
    if known:
        return max(known)
    numbers = [a.shape[1] for a in feeds.values() if a.ndim >= 2 and a.dtype.kind in "iu"]
    return max(numbers, default=length)


def _replacements(
    prepared: Prepared, choices: Mapping[str, Operator], learned: Learned, longest: int
) -> list[Replacement]:
    return [
        Replacement(line.site, choices[line.name], longest, learned.get(line.name, {}))
        for line in prepared.softmaxes
        if line.site is not None and line.name in choices
    ]


def _shadow(
    source: Source,
    choices: Mapping[str, Operator],
    learned: Learned,
    feeds: Feeds,
    threads: int,
    longest: int,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Runs the original with every operator beside its site: outputs, outputs of the sites, the sites' own errors."""
    prepared = prepare(source)
    placed = rewrite(prepared.model, _replacements(prepared, choices, learned, longest), replace=False)
    exact_names = expose(prepared.model, [item.original for item in placed], "fastattn_exact_")
    own_names = expose(prepared.model, [item.output for item in placed], "fastattn_own_")
    try:
        outputs = run_in_folder(
            prepared.model, feeds, "the model with the replaced attention beside", threads
        )
    except RuntimeFailure as error:
        run_in_folder(read_model(source), feeds, "the original model", threads)  # it may be to blame alone
        raise ConversionError(f"{error}; nothing was written") from error
    sites = [item.site.name for item in placed]
    exact = {site: outputs[name] for site, name in zip(sites, exact_names)}
    own = {site: errors(outputs[name], exact[site]) for site, name in zip(sites, own_names)}
    return outputs, exact, own


def _converted(
    source: Source,
    choices: Mapping[str, Operator],
    learned: Learned,
    feeds: Feeds,
    threads: int,
    longest: int,
) -> tuple[dict[str, Any], dict[str, Any], list[Placed], ir.Model]:
    """Runs the converted model: outputs, outputs of the sites, what was written, and the model itself."""
    prepared = prepare(source)
    placed = rewrite(prepared.model, _replacements(prepared, choices, learned, longest))
    prepared.forget_inferred()
    exposed = prepared.model.clone()
    same = dict(zip(_values(prepared.model), _values(exposed), strict=True))
    names = expose(exposed, [same[item.output] for item in placed], "fastattn_inside_")
    try:
        after = run_in_folder(exposed, feeds, "the converted model", threads)
    except RuntimeFailure as error:
        raise ConversionError(f"{error}; nothing was written") from error
    inside = {item.site.name: after[name] for item, name in zip(placed, names)}
    return after, inside, placed, prepared.model


def _values(model: ir.Model) -> list[ir.Value]:
    """What the nodes of a model give, those of branches and loops too."""
    return [v for node in ir.traversal.RecursiveGraphIterator(model.graph) for v in node.outputs]


def _validate(names: list[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in names:
        if before[name].shape != after[name].shape:
            raise ConversionError(
                f"output {name} has shape {after[name].shape} in the converted model and {before[name].shape} in the "
                "original; nothing was written"
            )
        if after[name].dtype.kind == "f" and not np.isfinite(after[name][np.isfinite(before[name])]).all():
            raise ConversionError(
                f"output {name} of the converted model holds NaN or Inf; nothing was written"
            )


def _kept(prepared: Prepared, reasons: Mapping[str, str], own: Mapping[str, Any]) -> tuple[SiteReport, ...]:
    """Lines of the sites that stay as they are; a softmax that is no attention is no site."""
    return tuple(
        SiteReport(line.name, "exact", reasons.get(line.name, line.reason), **_own(own.get(line.name)))
        for line in prepared.softmaxes
        if line.status != NOT_ATTENTION
    )


def _own(quantiles: Any) -> dict[str, Any]:
    return {} if quantiles is None else {"own_error": quantiles.median, "own_error_p95": quantiles.p95}


def _provenance(prepared: Prepared, feeds: Feeds) -> dict[str, Any]:
    import onnxruntime

    model = prepared.model
    return {
        "versions": {**versions(), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "model": model.graph.name or "", "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        "opset": prepared.opset, "ir_version": model.ir_version,
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "inputs_hash": inputs_hash({name: _as_tensor(array) for name, array in feeds.items()}),
    }  # fmt: skip


def _kernels(operators: Iterable[Operator]) -> dict[str, str]:
    """By type of the nodes that were written whether ``fa.onnx.session`` has a kernel for it, or it is its function."""
    bodies = [body_of(operator) for operator in operators]
    types = {body.op_type for body in bodies if body is not None}
    return {op_type: "native" if op_type in NODES else "function" for op_type in sorted(types)}


def _as_tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _saved(
    source: Source, model: ir.Model, target: Path | None, report: Report, feeds: Feeds, tokens: int, repeats: int,
    threads: int,
) -> Report:  # fmt: skip
    """Checks, times and moves the model into place."""
    with staged(target) as beside:
        path = beside / (target.name if target is not None else "model.onnx")
        data = write(model, path)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:  # ValidationError, InferenceError, or what the C++ checker throws
            raise ConversionError(
                f"the converted model does not pass onnx.checker: {error}; nothing was written"
            ) from error
        cost, exact, replaced = cost_report(
            original_path(source, beside), path, feeds, tokens, repeats, threads
        )
        if target is not None:
            move(path, data, target)
    files = {
        "session_load_seconds": replaced.load_seconds, "session_load_seconds_exact": exact.load_seconds,
        "peak_bytes": replaced.peak_bytes, "peak_bytes_exact": exact.peak_bytes,
    }  # fmt: skip
    return dataclasses.replace(report, cost=cost, provenance={**report.provenance, **files})
