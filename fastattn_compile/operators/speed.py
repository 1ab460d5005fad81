"""Predicted time of an operator on a device: enough to say on which side of the crossover a site stands."""

from __future__ import annotations

import dataclasses

from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator

# Seconds a call, and floating-point operations a second relative to exact attention's kernel on the same device. Measured
# by benchmarks/fma_cpu.py: blocked operators gather keys and write scores to memory, so a product costs them more.
_OVERHEAD = {"cpu": 1e-4, "cuda": 2e-5}
_RATE = {"cpu": 1e11, "cuda": 4e14}
_EFFICIENCY = {"exact": 1.0, "fma": 0.15, "conv_basis": 0.1, "barnes_hut": 0.05}
_LONGEST = 1 << 24


def predicted_seconds(operator: Operator, spec: SiteSpec) -> float:
    """Time of one forward pass at a site of known sizes."""
    rate = _RATE.get(spec.device, _RATE["cpu"]) * _EFFICIENCY.get(operator.name, _EFFICIENCY["fma"])
    return _OVERHEAD.get(spec.device, _OVERHEAD["cpu"]) + operator.cost(spec).flops / rate


def crossover(operator: Operator, spec: SiteSpec) -> int:
    """The shortest sequence at which an operator is predicted faster than exact attention.

    Args:
        operator: The operator.
        spec: The site; its lengths are not read, so they may be symbolic.

    Returns:
        A length; 2**24 when it never is.
    """
    exact = make_operator("exact")

    def faster(n: int) -> bool:
        at = dataclasses.replace(spec, batch=1, query_len=n, key_len=n)
        return predicted_seconds(operator, at) < predicted_seconds(exact, at)

    high = 2
    while not faster(high):
        high *= 2
        if high >= _LONGEST:
            return _LONGEST
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
