"""Configuration of conv-basis attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastattn_compile.operators.base import OperatorConfig

_CHOICES = {
    "anchors": ("sink_strided", "strided", "recover", "jumps"),
    "gradient": ("implemented", "softmax_formula"),
    "form": ("auto", "fft", "buckets", "gather"),
    "uncovered": ("anchor", "ones", "zeros"),
    "transform": ("float64", "float32"),
    "offset_bias": ("none", "alibi", "learned"),
    "approximation": ("conv", "low_rank"),
}
CAUSAL_ANCHORS = ("sink_strided", "strided")


@dataclass(frozen=True, kw_only=True)
class ConvBasisConfig(OperatorConfig):
    """What conv-basis attention can be told.

    Args:
        k: Terms of the basis: segments of one triangle of the scores. At most the number of tokens.
        anchors: Where segments begin. ``"strided"``: evenly; ``"sink_strided"``: the first ``sinks`` columns
            alone, the rest evenly; both depend on no content. ``"recover"``: the paper's binary search;
            ``"jumps"``: where neighbouring columns differ most. These two read later tokens to place anchors,
            so a causal output depends, through the places, on what follows.
        stride: Columns between the anchors of ``"strided"`` and ``"sink_strided"``; the segment of the last of ``k``
            anchors takes the rest. Then the anchors of a token stay where they are while the sequence grows,
            which decoding needs. 0 divides the sequence into ``k`` segments.
        sinks: Leading columns with an anchor of their own (``"sink_strided"`` and ``"jumps"``).
        probe: Scores of a column that are compared, ``T`` of the paper (``"recover"`` and ``"jumps"``).
        delta: How far apart, in the 1-norm over ``probe`` scores, anchors are (``"recover"``).
        eps: Noise of one score; at most ``delta / (5 * probe)``, or columns cannot be told apart
            (``"recover"``).
        uncovered: What ``"recover"`` does with columns before the first one it finds: ``"anchor"`` makes the
            first column an anchor without a search; ``"ones"`` gives them score 0, so weight 1 (a basis with
            ``m_1 < n``, corrected); ``"zeros"`` gives them no weight.
        share_anchors: The query heads of one key head share the places of their anchors.
        gradient: ``"implemented"``: the gradient of the function that is computed, places held constant (7B);
            only anchor keys receive one. ``"softmax_formula"``: the gradient formula of softmax with the fast
            weights in it, as the paper analyses it (7A); every key receives one, and it is not the derivative
            of the output.
        form: How sums are formed. ``"fft"``: one transform, an error when the range of the scores does not
            allow it; ``"buckets"``: rows grouped by magnitude; ``"gather"``: tiles, any range, O(n^2);
            ``"auto"``: the cheapest that is safe.
        bucket_width: Nats that a bucket spans; 0 for 8 in float64 and 4 in float32.
        transform: Type of the transforms. float64 lets rows differ by 8 more orders of magnitude and is the
            default for inputs of any type; in float32 the first rows, which see few keys, drown in the noise.
        offset_bias: A score added by distance, which costs no term: ``"alibi"`` with the slopes of Press et
            al. (2022), or ``"learned"``, a parameter of every head.
        key_bias: Whether a score added by key is learned, one of every head and position.
        approximation: ``"conv"``, or ``"low_rank"``: the Taylor polynomial of the exponential as a product of
            features (section 8), for scores of small size.
        degree: Degree of that polynomial; even, so that no weight is negative.
    """

    k: int = 64
    anchors: str = "sink_strided"
    stride: int = 0
    sinks: int = 4
    probe: int = 8
    delta: float = 8.0
    eps: float = 0.0
    uncovered: str = "anchor"
    share_anchors: bool = False
    gradient: str = "implemented"
    form: str = "auto"
    bucket_width: float = 0.0
    transform: str = "float64"
    offset_bias: str = "none"
    key_bias: bool = False
    approximation: str = "conv"
    degree: int = 2

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choices: {', '.join(choices)}")
        if self.k < 1:
            raise ValueError(f"k must be a positive number of terms, got {self.k}")
        if self.probe < 1:
            raise ValueError(f"probe must be a positive number of scores, got {self.probe}")
        if self.stride < 0:
            raise ValueError(f"stride must be a positive number of columns, or 0, got {self.stride}")
        if self.stride and self.anchors not in CAUSAL_ANCHORS:
            raise ValueError(
                f"stride is the distance of strided anchors; anchors={self.anchors!r} finds places of its own"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 or more columns, got {self.sinks}")
        for name in ("delta", "eps", "bucket_width"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
        if self.delta == 0:
            raise ValueError("delta must be positive: with 0 every column would be an anchor")
        if self.eps > self.delta / (5 * self.probe):
            raise ValueError(
                f"eps must be at most delta / (5 * probe) = {self.delta / (5 * self.probe):g} for anchors to "
                f"stand out from noise, got {self.eps:g}; raise delta or lower probe"
            )
        if self.degree < 0 or self.degree % 2:
            raise ValueError(
                f"degree must be even and not negative, so that no weight is negative; got {self.degree}"
            )
        if self.approximation == "low_rank":
            if self.offset_bias != "none":
                raise ValueError(
                    "offset_bias is a Toeplitz matrix, which the low-rank approximation lacks; use conv"
                )
            if self.gradient != "implemented":
                raise ValueError("the low-rank approximation has one gradient, 'implemented'")

    @property
    def width(self) -> float:
        """Nats that a bucket spans."""
        return self.bucket_width or (8.0 if self.transform == "float64" else 4.0)
