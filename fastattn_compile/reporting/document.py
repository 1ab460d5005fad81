"""The report as a document, schema ``fastattn.report/1``: what ran at each site and what it cost.

JSON is the truth, the terminal prints from it. Keys are only ever added within a version, so readers ignore
those they do not know. A number that was not measured is ``null``, and so is one that is not finite.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.files import write_json

SCHEMA = "fastattn.report/1"


class ReportError(FastAttentionError, ValueError):
    """A file or document is not a report."""


@dataclass(frozen=True)
class SiteReport:
    """One softmax attention. Errors are ``||o - o_exact|| / ||o_exact||`` of its output over sampled rows.

    Args:
        name: Name of the site, as ``fa.scan`` prints it.
        operator: What served it; ``"exact"`` where the softmax attention was kept.
        reason: Why.
        own_error: Median error of the operator on the exact model's tensors: what the site itself adds.
        accumulated_error: Median error of the site's output inside the replaced model: with what came from
            below.
        mass_recall: Mean share of the softmax mass on keys the operator meets one by one.
        controls: Median own error of ``no_attention`` and of a ``window`` that meets as many keys.
        keys_per_query: Mean number of score products of a query.
        own_error_p95: 95 % of the rows are better.
        own_error_p99: 99 % of the rows are better.
        accumulated_error_p95: 95 % of the rows are better.
        accumulated_error_p99: 99 % of the rows are better.
        attention_ms: Time of the operator's forward on the site's tensors.
        attention_ms_exact: Time of exact attention on the same tensors.
        options: The operator's configuration.
        diagnostics: What the operator knows of its own loss or balance (``Operator.diagnostics``).
        mask: Structure of the mask, as ``fa.scan`` prints it.
        mask_checked: The structure was read from the mask's values on a first batch, and compared before every call.
        mask_broken: Calls on which the mask was something else. They ran exact and uncompiled.
    """

    name: str
    operator: str
    reason: str = ""
    own_error: float | None = None
    accumulated_error: float | None = None
    mass_recall: float | None = None
    controls: Mapping[str, float | None] = field(default_factory=dict)
    keys_per_query: float | None = None
    own_error_p95: float | None = None
    own_error_p99: float | None = None
    accumulated_error_p95: float | None = None
    accumulated_error_p99: float | None = None
    attention_ms: float | None = None
    attention_ms_exact: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    mask: str = ""
    mask_checked: bool = False
    mask_broken: int = 0

    @property
    def replaced(self) -> bool:
        """Whether something other than softmax attention serves the site."""
        return self.operator != "exact"


@dataclass(frozen=True)
class SpanReport:
    """The model's delta over a span of positions.

    Args:
        start: First position.
        stop: One past the last.
        kl: Mean KL(exact || replaced), nats a token.
        top1: Share of tokens with the same prediction.
        ppl_exact: Perplexity of the exact model.
        ppl: Perplexity of the replaced model.
    """

    start: int
    stop: int
    kl: float | None = None
    top1: float | None = None
    ppl_exact: float | None = None
    ppl: float | None = None


@dataclass(frozen=True)
class ModelReport:
    """The delta end to end. Models without logits have the two ``hidden`` fields instead.

    Args:
        kl: Mean KL(exact || replaced), nats a token.
        top1: Share of tokens with the same prediction.
        ppl_exact: Perplexity of the exact model.
        ppl: Perplexity of the replaced model.
        by_position: The same by thirds of the position.
        tokens: Tokens counted.
        hidden_error: Median relative error of the last hidden state over tokens.
        hidden_cosine: Mean cosine of the last hidden states over tokens.
        intervals: 95 % intervals by a paired bootstrap over stretches of tokens: of ``kl``, ``top1`` and
            ``ppl_change`` (relative), or of ``hidden_cosine``. Empty for a short text.
        controls: ``kl``, else ``hidden_error``, with something else in the place of every replaced site's
            output: ``no_attention``, ``window`` of as many keys, ``near_only`` and ``far_only``. Empty when
            not measured.
    """

    kl: float | None = None
    top1: float | None = None
    ppl_exact: float | None = None
    ppl: float | None = None
    by_position: tuple[SpanReport, ...] = ()
    tokens: int | None = None
    hidden_error: float | None = None
    hidden_cosine: float | None = None
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    controls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CostReport:
    """Time, measured in one run on one machine: read the ratios.

    Args:
        attention_ms: All sites' attention, forward, as the plan runs it.
        attention_ms_exact: All sites' exact attention on the same tensors.
        total_ms: One forward pass of the replaced model.
        total_ms_exact: One forward pass of the exact model, lowered by the same compiler.
        n: Tokens a sequence.
        attention_baseline: What exact attention was timed with.
        compiler: What lowered both models.
        repeats: Runs behind each median of the whole model.
    """

    attention_ms: float | None = None
    attention_ms_exact: float | None = None
    total_ms: float | None = None
    total_ms_exact: float | None = None
    n: int | None = None
    attention_baseline: str = ""
    compiler: str = ""
    repeats: int | None = None


@dataclass(frozen=True)
class Report:
    """What a plan costs: per site and end to end, in accuracy and in time.

    Args:
        sites: Every site, in execution order, the exact ones with their reason.
        model: The delta end to end.
        cost: The times.
        provenance: Versions, device, seed, hashes.
        checks: What was proved, when it was asked for: ``causal`` (``None`` where the exact model looks ahead
            itself), ``future_influence`` on earlier outputs with what is allowed, ``finite``.
    """

    sites: tuple[SiteReport, ...]
    model: ModelReport = field(default_factory=ModelReport)
    cost: CostReport = field(default_factory=CostReport)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema ``fastattn.report/1``; no NaN, no infinity."""
        return {"schema": SCHEMA, **plain(dataclasses.asdict(self))}

    @staticmethod
    def from_json(document: Any) -> Report:
        """Reads a report document; keys of later writers are ignored.

        Raises:
            ReportError: It is not a report.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
            raise ReportError(f"expected a report with schema {SCHEMA!r}, got {found!r}")
        try:
            model = dict(document["model"])
            spans = tuple(_known(SpanReport, span) for span in model.pop("by_position", ()))
            return Report(
                sites=tuple(_known(SiteReport, site) for site in document["sites"]),
                model=dataclasses.replace(_known(ModelReport, model), by_position=spans),
                cost=_known(CostReport, document["cost"]),
                provenance=dict(document.get("provenance", {})),
                checks=dict(document.get("checks", {})),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReportError(f"malformed report: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the report beside the target and renames it, so that a killed run leaves no half file."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Report:
        """Reads a report file.

        Raises:
            ReportError: The file is missing, is not JSON, or is not a report.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ReportError(f"cannot read the report {path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"the report {path} is not JSON: {error}") from error
        return Report.from_json(document)

    def print(self, file: IO[str] | None = None, *, full: bool = False) -> None:
        """Prints tables and a verdict.

        Args:
            file: Where to; standard output when ``None``.
            full: List every site, however many there are.
        """
        from fastattn_compile.reporting.terminal import print_report

        print_report(self, file=file, full=full)


Section = TypeVar("Section", SiteReport, SpanReport, ModelReport, CostReport)


def _known(cls: type[Section], values: Mapping[str, Any]) -> Section:
    """Builds a section from the keys this version knows."""
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def plain(value: Any) -> Any:
    """Makes a value fit for strict JSON: tuples are lists, keys are text, what is not finite is ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
