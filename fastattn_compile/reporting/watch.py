"""The observers of the two passes of an evaluation; of a site they keep a few rows and a few numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn_compile.errors import NumericError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator, SiteSpec
from fastattn_compile.reporting.document import SiteReport
from fastattn_compile.reporting.metrics import (
    Quantiles,
    counted_rows,
    probe_rows,
    relative_error,
    sample_rows,
)
from fastattn_compile.reporting.timing import exact_attention, interleaved_ms


@dataclass
class SiteRecord:
    """What the passes saw of one site; the lists have an entry for each time it ran.

    Args:
        operator: What serves it in the replaced model.
        keys_per_query: From the operator's cost.
        replaced: Sampled rows of its output in the replaced model.
        accumulated: Relative error of those rows.
        own: Relative error of the operator on the exact tensors.
        recall: Softmax mass on the operator's exact keys.
        controls: Relative error of each control.
        diagnostics: ``Operator.diagnostics`` on the exact tensors.
        ms: Time of the operator.
        ms_exact: Time of exact attention.
    """

    operator: Operator
    keys_per_query: float
    replaced: list[Tensor] = field(default_factory=list)
    accumulated: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    controls: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    diagnostics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ms: float = 0.0
    ms_exact: float = 0.0

    def report(self, name: str, reason: str) -> SiteReport:
        """The record as a line of the report. A kept softmax attention has no error of its own."""
        own, accumulated = (_quantiles(parts) for parts in (self.own, self.accumulated))
        exact = self.operator.name == "exact"
        if exact:
            own = Quantiles(0.0, 0.0, 0.0)
        return SiteReport(
            name=name,
            operator=self.operator.name,
            reason=reason,
            own_error=own.median if own else None,
            accumulated_error=accumulated.median if accumulated else None,
            mass_recall=1.0 if exact else _mean(self.recall),
            controls={
                control: found.median
                for control, parts in self.controls.items()
                if (found := _quantiles(parts)) is not None
            },
            keys_per_query=self.keys_per_query,
            own_error_p95=own.p95 if own else None,
            own_error_p99=own.p99 if own else None,
            accumulated_error_p95=accumulated.p95 if accumulated else None,
            accumulated_error_p99=accumulated.p99 if accumulated else None,
            attention_ms=self.ms,
            attention_ms_exact=self.ms_exact,
            options=self.operator.config.to_dict(),
            diagnostics={name: sum(found) / len(found) for name, found in self.diagnostics.items()},
        )


def _quantiles(parts: list[Tensor]) -> Quantiles | None:
    return Quantiles.of(torch.cat(parts)) if parts else None


def _mean(parts: list[Tensor]) -> float | None:
    values = torch.cat(parts) if parts else torch.empty(0)
    return float(values.double().mean()) if values.numel() else None


class ReplacedPass:
    """Keeps which operator served each site, and the sampled rows of its output.

    Args:
        rows: Query positions to sample.
        seed: Seed of the sample.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.records: dict[str, SiteRecord] = {}
        self.rows, self.seed = rows, seed

    def __call__(
        self, site: str, operator: Operator, inputs: AttentionInputs, output: AttentionOutput
    ) -> None:
        """Sees one site's forward."""
        check_finite(site, operator, inputs, output.out)
        if site not in self.records:
            self.records[site] = SiteRecord(operator, operator.cost(inputs.spec()).keys_per_query)
        chosen = sample_rows(inputs.query.shape[2], self.rows, self.seed).to(output.out.device)
        self.records[site].replaced.append(output.out[:, :, chosen].clone())


class ExactPass:
    """Runs each site's operator and the controls on the exact tensors, and times it against exact attention.

    Args:
        records: From the replaced pass; sites that kept their softmax are added.
        parameters: Learned parameters of the sites' operators, by site.
        rows: As in the replaced pass.
        seed: As in the replaced pass.
        repeats: Timed runs of each attention.
        after: Called after each site with the number of sites done.
    """

    def __init__(
        self,
        records: dict[str, SiteRecord],
        parameters: Mapping[str, tuple[Tensor, ...]],
        rows: int,
        seed: int,
        repeats: int,
        after: Callable[[int], None],
    ) -> None:
        self.records, self.parameters, self.after = records, parameters, after
        self.rows, self.seed, self.repeats = rows, seed, repeats
        self.calls: dict[str, int] = defaultdict(int)
        self.warm: set[tuple[str, SiteSpec]] = set()
        self.causal = True
        self.length = 0

    @property
    def baselines(self) -> list[str]:
        """What exact attention was timed with."""
        return sorted({name for name, _ in self.warm})

    def __call__(self, site: str, exact: Operator, inputs: AttentionInputs, output: AttentionOutput) -> None:
        """Sees one site's forward."""
        check_finite(site, exact, inputs, output.out)
        self.causal &= inputs.mask.causal
        self.length = max(self.length, inputs.query.shape[2])
        if site not in self.records:
            self.records[site] = SiteRecord(exact, exact.cost(inputs.spec()).keys_per_query)
        record = self.records[site]
        chosen = sample_rows(inputs.query.shape[2], self.rows, self.seed).to(output.out.device)
        call, self.calls[site] = self.calls[site], self.calls[site] + 1
        if call < len(record.replaced):
            error = relative_error(record.replaced[call], output.out[:, :, chosen])
            record.accumulated.append(error[counted_rows(inputs, chosen).expand_as(error)].cpu())
        self._measure(site, record, inputs, chosen)
        self.after(len(self.calls))

    def _measure(self, site: str, record: SiteRecord, inputs: AttentionInputs, chosen: Tensor) -> None:
        name, baseline = exact_attention(inputs)
        if (name, inputs.spec()) not in self.warm:  # the operator is warm from the replaced pass
            self.warm.add((name, inputs.spec()))
            baseline()
        operator, parameters = record.operator, self.parameters.get(site, ())
        if operator.name == "exact":
            (spent,) = interleaved_ms([baseline], self.repeats)
            record.ms, record.ms_exact = record.ms + spent, record.ms_exact + spent
            return
        outputs: list[AttentionOutput] = []

        def run() -> None:
            outputs[:] = [operator.forward(inputs, parameters)]

        spent, spent_exact = interleaved_ms([run, baseline], self.repeats)
        record.ms, record.ms_exact = record.ms + spent, record.ms_exact + spent_exact
        check_finite(site, operator, inputs, outputs[0].out)
        out, lse = outputs[0].out, outputs[0].log_sum_exp
        probe = probe_rows(inputs, chosen, out, operator, parameters, lse)
        record.own.append(probe.own_error)
        record.recall.append(probe.mass_recall)
        for control, error in probe.controls.items():
            record.controls[control].append(error)
        for name, value in operator.diagnostics(inputs, parameters).items():
            record.diagnostics[name].append(value)


def check_finite(site: str, operator: Operator, inputs: AttentionInputs, out: Tensor) -> None:
    """Stops at the first site whose output is not finite.

    Raises:
        NumericError: NaN or Inf; the text names the site and says whether the site made it.
    """
    if bool(torch.isfinite(out).all()):
        return
    finite = all(bool(torch.isfinite(x).all()) for x in (inputs.query, inputs.key, inputs.value))
    blame = "from finite inputs" if finite else "its inputs already held them"
    raise NumericError(f"NaN or Inf in the output of site {site or '(unnamed)'}, {operator}: {blame}")
