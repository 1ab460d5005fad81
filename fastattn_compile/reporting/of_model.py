"""``fa.report``: what the backend did with a model, as a report document."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from typing import Any

import torch

from fastattn_compile.backend import Decision, decisions, not_found, records
from fastattn_compile.reporting.document import Report, ReportError, SiteReport
from fastattn_compile.reporting.provenance import versions


def report(model: torch.nn.Module | None = None) -> Report:
    """What serves each attention of a compiled model, why, and what error was measured.

    It costs nothing: it collects what is known from compilation and from the calls since: masks that were not what they
    were on the first batch and, under ``monitor``, errors. For the delta end to end use ``fa.evaluate``.

    Args:
        model: A compiled model, or the model inside; every model compiled so far when ``None``.

    Raises:
        ReportError: Nothing has been compiled for this model yet.
    """
    found = records(model)
    if not found:
        raise ReportError(
            "nothing was compiled for this model yet; "
            'call torch.compile(model, backend="fastattn") and run it once'
        )
    watched: dict[str, list[float]] = {}
    for record in found:
        watched.update(record.monitor.errors if record.monitor is not None else {})
    broken = sum((record.guard.broken for record in found if record.guard is not None), Counter[str]())
    sites = {
        decision.name: _site(decision, watched.get(decision.name, []), broken[decision.name])
        for decision in decisions(model)
        if decision.softmax.status != "not_attention"
    }
    calls = sum(len(errors) for r in found if r.monitor is not None for errors in r.monitor.errors.values())
    provenance: dict[str, Any] = {"versions": versions(), "monitored_calls": calls}
    missing = not_found(model)
    if missing:
        provenance["planned_not_found"] = missing
        warnings.warn(
            f"the plan names sites that were not compiled: {', '.join(missing)}; compiled were {', '.join(sites)}. Run what "
            "was not run yet, or look names up with fa.scan",
            stacklevel=2,
        )
    return Report(tuple(sites.values()), provenance=provenance)


def _site(decision: Decision, watched: list[float], broken: int) -> SiteReport:
    # Both are 95th percentiles over the sampled queries of a batch; the monitor's is the median over batches.
    error = statistics.median(watched) if watched else decision.error
    return SiteReport(
        decision.name, decision.operator, decision.reason, own_error_p95=error, options=decision.options,
        mask=decision.softmax.mask, mask_checked=decision.softmax.checked, mask_broken=broken,
    )  # fmt: skip
