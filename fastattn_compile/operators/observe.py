"""Watching sites while a model runs: reports, monitors and calibration see the tensors of a site through here.

Watching is a matter of run time, not of the graph: nothing is recompiled when an observer comes or goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator

Observer = Callable[[str, Operator, AttentionInputs, AttentionOutput], None]

_observers: list[Observer] = []


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
