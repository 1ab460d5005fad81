"""Measures what a plan costs: two passes over the same input, one replaced, one exact, watched at every site.

The replaced pass runs first and says which operator serves which site. The exact pass then sees each site's
true tensors: the operator runs on them alone (own error), beside the controls, and the sampled rows of the
exact output are compared with those of the replaced pass (accumulated error). A site's tensors are used while
they are at hand and dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile.errors import FastAttentionError, NumericError
from fastattn_compile.integrations.hugging_face.plain import plain_attention
from fastattn_compile.operators.observe import Observer, observing
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import CostReport, ModelReport, Report, SiteReport, SpanReport
from fastattn_compile.reporting.intervals import bootstrap, interval, token_intervals
from fastattn_compile.reporting.metrics import (
    Quantiles,
    Summary,
    compare_logits,
    cosine,
    relative_error,
    summarise,
    thirds,
)
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.reporting.timing import interleaved_ms
from fastattn_compile.reporting.verify import control_deltas, probe_causality
from fastattn_compile.reporting.watch import ExactPass, ReplacedPass, SiteRecord

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``; ``total`` is 0 while it is not known."""

Inputs = Mapping[str, Any] | tuple[Any, ...]


def evaluate(
    model: nn.Module,
    inputs: Inputs,
    *,
    operator: str | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    labels: Tensor | None = None,
    rows: int = 64,
    seed: int = 0,
    compiler: str = "inductor",
    repeats: int = 3,
    before: nn.Module | None = None,
    verify: bool = False,
    context: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures what replacing a model's attention costs in accuracy and what it gains in time.

    With neither ``operator`` nor ``plan`` the backend plans by itself, under ``options["tolerance"]``. The
    model is left as it was; what torch.compile held in this process is dropped (``torch.compiler.reset``)
    before and after.

    Args:
        model: The model. A compiled one is unwrapped.
        inputs: Keyword arguments, or positional ones as a tuple.
        operator: Name of an operator for every site.
        options: Backend options and fields of the operator's configuration.
        plan: Which operator serves which site.
        labels: ``(batch, n)`` token ids for the perplexity, not shifted, negative where not counted. When
            ``None``, ``inputs["input_ids"]`` if the model gives logits and all its sites are causal.
        rows: Query positions to sample at each site.
        seed: Seed of the sample.
        compiler: What lowers both models: ``inductor``, ``aot_eager`` or ``eager``.
        repeats: Timed runs of each model and of each attention, of which the median is reported.
        before: The model to compare with end to end, run with its own attention: the one that ``model`` was made
            from, when its weights were trained since. ``model`` with exact attention when ``None``; that is what
            the errors of the sites are taken against in any case.
        verify: Prove causality and measure the end-to-end controls as well: about ten more passes, and O(n^2)
            work for the controls.
        context: More entries for the provenance: the command line, the source of the text; no paths.
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        OptionError: An option is unknown or out of range.
        NumericError: A site, or a model's output, holds NaN or Inf; the text names the site.
        UnsupportedSiteError: ``options["strict"]`` is set and the operator cannot serve a site.
        VerificationError: ``verify``, and the replaced model looks into the future where the exact one does not.
    """
    from fastattn_compile.backend import decisions, fastattn
    from fastattn_compile.options import parse_options

    chosen = {"operator": operator, "plan": plan}
    settings: dict[str, Any] = {**(options or {})}
    settings.update({key: value for key, value in chosen.items() if value is not None})
    settings.update(compiler=compiler, quiet=True)
    parse_options(settings)
    model = getattr(model, "_orig_mod", model)
    say: Progress = progress or (lambda stage, done, total: None)

    with _undisturbed(model):
        replaced_model: Any = torch.compile(model, backend=fastattn, options=settings)
        exact_settings: dict[str, Any] = {"operator": "exact", "compiler": compiler, "quiet": True}
        exact_model: Any = torch.compile(model, backend=fastattn, options=exact_settings)

        say("compile and run the replaced model", 0, 0)
        watch_replaced = ReplacedPass(rows, seed)
        replaced = _predict(replaced_model, inputs, labels, watch_replaced)
        decided = {d.name: d.reason for d in decisions(model) if d.softmax.status != "not_attention"}
        records = watch_replaced.records

        stage, count = "compile and run the exact model", len(decided)
        say(stage, 0, 0)
        watch_exact = ExactPass(
            records, _learned(model), rows, seed, repeats, lambda done: say(stage, done, max(done, count))
        )
        exact = _predict(exact_model, inputs, labels, watch_exact)

        say("compare the outputs", 0, 0)
        known = labels if labels is not None else _own_labels(inputs, watch_exact)
        if before is not None:
            with evaluating(before), plain_attention(before):
                exact = _predict(before, inputs, labels)
        delta = compare_outputs(exact, replaced, known, _real_tokens(inputs), seed)
        checks: dict[str, Any] = {}
        if verify:
            say("prove causality", 0, 0)
            checks = _prove_causality(replaced_model, exact_model, inputs, seed)
            say("run the controls", 0, 0)
            controls = _control_deltas(replaced_model, inputs, exact, (labels, known), seed)
            delta = dataclasses.replace(delta, controls=controls)
        del exact, replaced

        done = 0

        def timed() -> None:
            nonlocal done
            done += 1
            say("time both models", done, repeats)

        say("time both models", 0, repeats)
        total, total_exact = interleaved_ms(
            [lambda: _call(replaced_model, inputs), lambda: _call(exact_model, inputs)], repeats, timed
        )
        origin = provenance(model, inputs, seed=seed, context=context)

    cost = CostReport(
        attention_ms=sum(r.ms for r in records.values()) if records else None,
        attention_ms_exact=sum(r.ms_exact for r in records.values()) if records else None,
        total_ms=total,
        total_ms_exact=total_exact,
        n=watch_exact.length or None,
        attention_baseline=" and ".join(watch_exact.baselines),
        compiler=compiler,
        repeats=repeats,
    )
    return Report(_sites(decided, records), delta, cost, origin, checks)


def _prove_causality(replaced: Any, exact: Any, inputs: Inputs, seed: int) -> dict[str, Any]:
    found = probe_causality(
        lambda given: _predict(replaced, given, None)[0],
        lambda given: _predict(exact, given, None)[0],
        inputs,
        seed,
    )
    found.insist()
    return {
        "finite": True,  # anything else has raised by now
        "causal": found.causal,
        "future_influence": found.influence,
        "future_influence_exact": found.influence_exact,
        "future_influence_allowed": found.allowed,
        "site_future_influence": max(found.sites.values(), default=None),
        "causal_sites": len(found.sites),
    }


def _control_deltas(
    replaced: Any,
    inputs: Inputs,
    exact: tuple[Tensor | None, bool],
    labels: tuple[Tensor | None, Tensor | None],
    seed: int,
) -> dict[str, float]:
    def measured() -> float | None:
        output = _predict(replaced, inputs, labels[0])
        found = compare_outputs(exact, output, labels[1], _real_tokens(inputs), seed)
        return found.kl if found.kl is not None else found.hidden_error

    return control_deltas(measured)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled before or left behind."""
    torch.compiler.reset()
    try:
        with evaluating(model), plain_attention(model), torch.no_grad():
            yield
    finally:
        torch.compiler.reset()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of every module as it was after it."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def readable_refusals() -> Iterator[None]:
    """Dynamo wraps what a backend raises while it compiles; a refusal of ours is for the user to read."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, FastAttentionError):
            raise error.inner_exception from error
        raise


def _call(model: Any, inputs: Inputs, observer: Observer | None = None) -> Any:
    with readable_refusals(), observing(observer) if observer else nullcontext():
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _predict(
    model: Any, inputs: Inputs, labels: Tensor | None, observer: Observer | None = None
) -> tuple[Tensor | None, bool]:
    """The model's main output and whether it is logits; everything else it returned is dropped."""
    result = _call(model, inputs, observer)
    entries = result if isinstance(result, Mapping) else {}
    logits, hidden = entries.get("logits"), entries.get("last_hidden_state")
    found = logits if logits is not None else hidden
    if found is None:
        values = entries.values() if entries else result if isinstance(result, (tuple, list)) else [result]
        found = next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)
    if found is not None and not bool(torch.isfinite(found).all()):
        raise NumericError(
            f"NaN or Inf in the output of the model {type(getattr(model, '_orig_mod', model)).__name__}"
        )
    return found, logits is not None or (found is not None and labels is not None)


def _learned(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The learned parameters of each site's operator, where the model has been given some."""
    from fastattn_compile.retrofitting.attach import LearnedParameters

    bundles = [module for module in model.modules() if isinstance(module, LearnedParameters)]
    return {bundle.site: tuple(bundle.tensors()) for bundle in bundles}


def _own_labels(inputs: Inputs, watch: ExactPass) -> Tensor | None:
    """The input is its own label where every token is predicted from those before it."""
    causal = bool(watch.calls) and watch.causal
    return inputs.get("input_ids") if causal and isinstance(inputs, Mapping) else None


def _real_tokens(inputs: Inputs) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def compare_outputs(
    exact_output: tuple[Tensor | None, bool],
    replaced_output: tuple[Tensor | None, bool],
    labels: Tensor | None,
    real: Tensor | None,
    seed: int = 0,
) -> ModelReport:
    """The delta of a model's output.

    Args:
        exact_output: The output of the exact model and whether it is logits.
        replaced_output: That of the replaced model.
        labels: ``(batch, n)`` token ids when each is predicted from those before it, for perplexities.
        real: ``(batch, n)`` boolean, true where a token is no padding.
        seed: Seed of the bootstrap.

    Raises:
        FastAttentionError: The two outputs have not the same shape.
    """
    (exact, logits), (replaced, _) = exact_output, replaced_output
    if exact is None or replaced is None:
        return ModelReport()
    if exact.shape != replaced.shape:
        raise FastAttentionError(
            f"the outputs to compare have shapes {tuple(exact.shape)} and {tuple(replaced.shape)}: the two models do "
            "not belong together"
        )
    if not logits:
        error, angle = relative_error(replaced, exact), cosine(replaced, exact)
        means = bootstrap({"cosine": angle.cpu()}, _counted(angle, real), seed) if angle.dim() == 2 else {}
        if real is not None and real.shape == error.shape:
            error, angle = error[real], angle[real]
        middle = Quantiles.of(error)
        return ModelReport(
            hidden_error=middle.median if middle else None,
            hidden_cosine=float(angle.double().mean()),
            intervals={f"hidden_{name}": interval(draws) for name, draws in means.items()},
        )
    if exact.dim() == 2:  # one prediction for a sequence
        exact, replaced, labels, real = exact[:, None], replaced[:, None], None, None
    length = exact.shape[1]
    fits = labels is not None and tuple(labels.shape) == tuple(exact.shape[:2])
    tokens = compare_logits(exact, replaced, labels if fits else None)
    real = real if real is not None and real.shape == tokens.kl.shape else None
    whole = summarise(tokens, real)
    spans = [(span, summarise(tokens, real, span)) for span in thirds(length)] if length >= 3 else []
    return ModelReport(
        **_numbers(whole),  # type: ignore[arg-type]
        tokens=whole.tokens if whole else None,
        intervals=token_intervals(tokens, real, seed),
        by_position=tuple(
            SpanReport(span.start, span.stop, **_numbers(found)) for span, found in spans if found
        ),
    )


def _counted(values: Tensor, real: Tensor | None) -> Tensor:
    fits = real is not None and real.shape == values.shape
    return real.cpu() if real is not None and fits else torch.ones(values.shape, dtype=torch.bool)


def _numbers(summary: Summary | None) -> dict[str, float | None]:
    names = ("kl", "top1", "ppl_exact", "ppl")
    return {name: getattr(summary, name) for name in names} if summary else {}


def _sites(decided: dict[str, str], records: dict[str, SiteRecord]) -> tuple[SiteReport, ...]:
    """One line a site, in execution order; a site that no pass could watch kept its softmax."""
    lines = []
    for name in dict.fromkeys([*decided, *records]):
        reason, record = decided.get(name, ""), records.get(name)
        lines.append(record.report(name, reason) if record else SiteReport(name, "exact", reason))
    return tuple(lines)
