"""Which implementation of a kernel runs: C++ or ATen on a CPU, Triton or ATen on a GPU.

ATen serves everything everywhere. The others are faster where they can run; each says in a sentence why it cannot. A name
the user chose (``FASTATTN_KERNELS``, or ``use_kernels``) never falls back in silence: what it cannot serve raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor

IMPLEMENTATIONS = ("auto", "aten", "cpp", "triton")
VARIABLE = "FASTATTN_KERNELS"

_chosen: str | None = None
_records: list[dict[str, str]] = []


def chosen_kernels() -> str:
    """The implementation the user asked for, ``"auto"`` when none.

    Raises:
        ValueError: The environment variable names no implementation.
    """
    return _known(_chosen if _chosen is not None else os.environ.get(VARIABLE, "auto") or "auto")


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Runs the body with one implementation, for every thread of the process.

    Args:
        name: One of ``IMPLEMENTATIONS``.

    Raises:
        ValueError: The name is unknown.
    """
    global _chosen
    before, _chosen = _chosen, _known(name)
    try:
        yield
    finally:
        _chosen = before


@contextmanager
def recorded_kernels() -> Iterator[dict[str, str]]:
    """Collects which implementation served each kernel called inside the block, in any thread."""
    record: dict[str, str] = {}
    _records.append(record)
    try:
        yield record
    finally:
        # By identity: two empty records are equal.
        _records[:] = [each for each in _records if each is not record]


def select(kernel: str, offered: Mapping[str, Callable[[], str]]) -> str:
    """The implementation that serves a call.

    Args:
        kernel: What is called, for error texts (``"fma forward"``).
        offered: Implementations besides ATen, best first; each tells why it cannot serve the call, ``""`` when it can.

    Returns:
        A name of ``offered``, or ``"aten"``.

    Raises:
        RuntimeError: The implementation the user chose cannot serve the call; the text says why.
    """
    name = chosen_kernels()
    if name == "auto":
        name = next((each for each, obstacle in offered.items() if not obstacle()), "aten")
    elif name != "aten":
        _insist(kernel, name, offered)
    for record in _records:
        record[kernel] = name
    return name


def takes_step(name: str, why_not: Callable[[], str]) -> bool:
    """Whether an implementation takes a step of a kernel, which no one chooses by itself: what it cannot do ATen does,
    whatever was asked for.

    Args:
        name: The implementation.
        why_not: Tells why it cannot take the step, ``""`` when it can.
    """
    return chosen_kernels() in ("auto", name) and not why_not()


def give_way(kernel: str, name: str, reason: str) -> None:
    """Leaves a call to ATen after ``select`` gave it to another implementation, which found out from the values.

    Args:
        kernel: As for ``select``.
        name: The implementation that cannot go on.
        reason: What it met.

    Raises:
        RuntimeError: The user chose the implementation.
    """
    if chosen_kernels() == name:
        _insist(kernel, name, {name: lambda: reason})
    for record in _records:
        record[kernel] = "aten"


def gpu_obstacle(*tensors: Tensor) -> str:
    """Why Triton cannot run on these tensors at all; empty when it can."""
    if not all(x.is_cuda for x in tensors):
        return "the tensors are not on a GPU"
    return "" if find_spec("triton") else "triton is not installed"


def _insist(kernel: str, name: str, offered: Mapping[str, Callable[[], str]]) -> None:
    """Raises when the implementation the user chose cannot serve a call."""
    reason = offered[name]() if name in offered else f"there is no {name} implementation of it"
    if reason:
        raise RuntimeError(
            f"{kernel}: kernels '{name}' were chosen and cannot serve this call: {reason}. "
            f"Choose 'auto' or 'aten' ({VARIABLE} or use_kernels)."
        )


def _known(name: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown kernels {name!r}; one of {', '.join(IMPLEMENTATIONS)} ({VARIABLE})")
    return name
