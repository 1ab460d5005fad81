"""What is known of the error of conv-basis attention: bounds, and what a sample of rows allows to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ErrorBound:
    """A bound on the output error of every head (specification section 6).

    Args:
        score_error: ``(b, h)`` eta, the largest difference of a score from the exact one over the rows looked
            at.
        output: ``(b, h)`` bound on every entry of ``|out - exact|``: ``2 tanh(eta / 2) max |V|``.
        channels: ``(b, h, e)`` bound of every channel: ``tanh(eta / 2) (max V - min V)``.
        paper: ``(b, h)`` the paper's bound ``2 (e^eta - 1) max |V|``, eta its ``2 eps``.
        certified: All rows were looked at, so the bounds hold for every row; else only for the rows given.
    """

    score_error: Tensor
    output: Tensor
    channels: Tensor
    paper: Tensor
    certified: bool


def error_bound(score_error: Tensor, value: Tensor, certified: bool) -> ErrorBound:
    """Turns score errors into bounds on the output.

    Scores off by at most eta change a row's weights by at most ``tanh(eta / 2)`` in total variation: their
    logarithms, after normalisation, lie within a range of ``2 eta``, and a range of ``x`` allows ``tanh(x /
    4)``.

    Args:
        score_error: ``(b, h)``.
        value: ``(b, h, n, e)``, without hidden keys (repeat a visible one in their place).
        certified: Whether ``score_error`` is over all rows.
    """
    largest = value.abs().amax((-2, -1)).to(score_error.dtype)
    spread = (value.amax(-2) - value.amin(-2)).to(score_error.dtype)
    variation = (score_error / 2).tanh()
    return ErrorBound(
        score_error,
        2 * variation * largest,
        variation[..., None] * spread,
        2 * score_error.expm1() * largest,
        certified,
    )


def score_error_for(output_error: float) -> float:
    """The score error that a relative output error allows: ``2 atanh(error / 2)`` (section 14.3).

    Raises:
        ValueError: The error is not between 0 and 2.
    """
    if not 0 <= output_error < 2:
        raise ValueError(f"an output error relative to max |V| lies between 0 and 2, got {output_error}")
    return 2 * math.atanh(output_error / 2)


def sampling_margin(samples: int, confidence: float) -> float:
    """How far a mean of numbers in [0, 1] may be off: ``sqrt(ln(2 / p) / (2 R))`` (section 14.1).

    Args:
        samples: ``R``, numbers averaged.
        confidence: ``1 - p``.

    Raises:
        ValueError: The confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * max(1, samples)))


@dataclass(frozen=True)
class TermChoice:
    """What an error budget allows.

    Args:
        k: Terms; ``None`` when no number of terms that can pay is within the budget, so exact attention is to
            be kept.
        error: Upper estimate of the mean output error relative to ``max |V|`` at ``k``, or at the last ``k``
            tried.
        tried: Every ``k`` looked at, with its upper estimate.
    """

    k: int | None
    error: float
    tried: tuple[tuple[int, float], ...]
