"""Watching sites while a model runs: reports, monitors and calibration see the tensors of a site through here.

Watching is a matter of run time, not of the graph: nothing is recompiled when an observer comes or goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator

Observer = Callable[[str, Operator, AttentionInputs, AttentionOutput], None]

Substitute = Callable[[str, Operator, AttentionInputs, tuple[Tensor, ...], AttentionOutput], Tensor]

_observers: list[Observer] = []
_substitutes: list[Substitute] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Calls ``observer(site, operator, inputs, output)`` after every forward of a fastattn op inside the block.

    The observer runs below autograd and must not change the tensors.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def add_observer(observer: Observer) -> Callable[[], None]:
    """Adds an observer for good; the returned function removes it."""
    _observers.append(observer)
    return lambda: _observers.remove(observer) if observer in _observers else None


def notify(site: str, operator: Operator, inputs: AttentionInputs, output: AttentionOutput) -> None:
    """Tells the observers of one forward pass. Costs a list check when there are none."""
    for observer in tuple(_observers):
        observer(site, operator, inputs, output)


@contextmanager
def substituting(substitute: Substitute) -> Iterator[None]:
    """Puts ``substitute(site, operator, inputs, parameters, output)`` in the place of every output inside the block.

    It returns a tensor of the output's shape and type, which may be ``output.out`` itself. For ablations: gradients
    still are those of the operator.
    """
    _substitutes.append(substitute)
    try:
        yield
    finally:
        _substitutes.remove(substitute)


def substituted(
    site: str,
    operator: Operator,
    inputs: AttentionInputs,
    parameters: tuple[Tensor, ...],
    output: AttentionOutput,
) -> AttentionOutput:
    """The output of one forward pass, or what stands in its place."""
    for substitute in tuple(_substitutes):
        output = AttentionOutput(substitute(site, operator, inputs, parameters, output), output.log_sum_exp)
    return output
