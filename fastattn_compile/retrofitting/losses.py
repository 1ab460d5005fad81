"""What a model loses, as one number: the metric of a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastattn_compile.errors import NumericError, OptionError
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.retrofitting.objectives import HIDDEN, KL, main_output, real_tokens, split_batch

Metric = Callable[[Any, Any, Any], float]
"""``metric(result, exact_result, batch)``: what one batch lost, 0 where nothing did."""

METRICS = ("kl", "ppl", "cosine")


def metric_of(metric: str | Metric) -> tuple[str, Metric]:
    """The metric and its name.

    Args:
        metric: ``"kl"``: mean KL(exact || replaced) of the predictions, nats a token. ``"ppl"``: relative rise of the
            perplexity, 0.02 for 2 %. ``"cosine"``: 1 - mean cosine of the last hidden states. Or a function of the
            replaced model's result, the exact model's, and the batch.

    Raises:
        OptionError: The name is unknown.
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    known: Mapping[str, Metric] = {"kl": _kl, "ppl": _perplexity, "cosine": _cosine}
    if metric not in known:
        raise OptionError(f"metric must be one of {', '.join(METRICS)} or a function, got {metric!r}")
    return metric, known[metric]


def lost(metric: Metric, result: Any, exact: Any, batch: Any) -> float:
    """What a metric says, as a finite number.

    Raises:
        NumericError: It is NaN or Inf.
    """
    value = float(metric(result, exact, batch))
    if not math.isfinite(value):
        raise NumericError(
            f"the metric is {value} on a batch: the model's output, or the metric itself, overflows"
        )
    return value


def kept_result(metric: str | Metric, result: Any) -> Any:
    """What of the exact model's result the metric needs later."""
    if callable(metric):
        return result
    return {"last_hidden_state" if metric == "cosine" else "logits": _output(metric, result)}


def _output(name: str, result: Any) -> Tensor:
    return main_output(result, HIDDEN if name == "cosine" else KL)


def _kl(result: Any, exact: Any, batch: Any) -> float:
    return _summary("kl", result, exact, batch, None).kl


def _perplexity(result: Any, exact: Any, batch: Any) -> float:
    labels = split_batch(batch)[2]
    found = _summary("ppl", result, exact, batch, labels)
    if found.ppl is None or found.ppl_exact is None:
        raise OptionError(
            "metric 'ppl' needs labels (batch, n) that fit the logits: put 'labels' into the batches"
        )
    return found.ppl / found.ppl_exact - 1


def _summary(name: str, result: Any, exact: Any, batch: Any, labels: Tensor | None) -> Any:
    before, after = _output(name, exact), _output(name, result)
    if before.dim() == 2:  # one prediction a sequence
        before, after = before[:, None], after[:, None]
    fits = labels is not None and tuple(labels.shape) == tuple(before.shape[:2])
    real = real_tokens(split_batch(batch)[1], before)
    found = summarise(compare_logits(before, after, labels if fits else None), real)
    if found is None:
        raise OptionError("a batch has no real token to measure on")
    return found


def _cosine(result: Any, exact: Any, batch: Any) -> float:
    before, after = (_output("cosine", x).double() for x in (exact, result))
    angle = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1)).clamp(min=1e-300)
    real = real_tokens(split_batch(batch)[1], before)
    return float(1 - (angle[real] if real is not None else angle).mean())
