"""Predicted time of an operator on a device: enough to say on which side of the crossover a site stands.

A call costs a fixed time and its floating-point operations at a fixed rate: two constants an operator and device, read
from ``speed.json`` beside this file, or from what ``fastattn bench --calibrate`` measured on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastattn_compile.errors import OptionError
from fastattn_compile.files import write_json
from fastattn_compile.kernels.cpu.build import obstacle
from fastattn_compile.kernels.dispatch import chosen_kernels
from fastattn_compile.machine import device_name
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.registry import make_operator, operator_names

SCHEMA = "fastattn.speed/1"
VARIABLE = "FASTATTN_SPEED"
_SHIPPED = Path(__file__).with_name("speed.json")
_LONGEST = 1 << 24
# Kernels that add a bias by distance; of the operators that are not named, only those on ATen do.
_ADD_A_BIAS = {"fma": ("aten", "cpp")}


@dataclass(frozen=True)
class Speed:
    """How fast an operator is on a device.

    Args:
        operator: Name of the operator.
        device: Name of the device, or its type for what holds when nothing was measured.
        kernels: Implementation that was measured: ``"aten"``, ``"cpp"`` or ``"triton"``.
        dtype: Type of the tensors, without ``torch.``.
        seconds_per_call: Fixed time of a call.
        flops_per_second: Rate at which the operations of ``Operator.cost`` are done.
    """

    operator: str
    device: str
    kernels: str
    dtype: str
    seconds_per_call: float
    flops_per_second: float

    def __post_init__(self) -> None:
        if self.operator not in operator_names():
            raise ValueError(f"unknown operator {self.operator!r}; operators: {', '.join(operator_names())}")
        if not (self.flops_per_second > 0 and self.seconds_per_call >= 0):
            raise ValueError(
                f"flops_per_second must be above 0 and seconds_per_call at least 0, got {self.flops_per_second} "
                f"and {self.seconds_per_call}"
            )


def user_file() -> Path:
    """Where this machine's own constants are: ``FASTATTN_SPEED``, else the user's cache folder."""
    given = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "fastattn_compile" / "speed.json"


def load_speeds(path: Path) -> tuple[Speed, ...]:
    """Reads constants.

    Args:
        path: A JSON file of schema ``fastattn.speed/1``.

    Raises:
        OptionError: It is no such file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema") != SCHEMA:
            raise ValueError(f"schema is {document.get('schema')!r}, expected {SCHEMA!r}")
        return tuple(Speed(**row) for row in document["speeds"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"{path} does not hold speed constants: {error}; delete it or run fastattn bench --calibrate"
        ) from error


def save_speeds(path: Path, speeds: Iterable[Speed]) -> None:
    """Adds constants to a file; those of the same operator, device, implementation and type are replaced."""
    before = load_speeds(path) if path.exists() else ()
    merged = {_key(speed): speed for speed in (*before, *speeds)}
    rows = [dataclasses.asdict(merged[key]) for key in sorted(merged)]
    write_json(path, {"schema": SCHEMA, "speeds": rows})
    known_speeds.cache_clear()


def _key(speed: Speed) -> tuple[str, ...]:
    return speed.device, speed.operator, speed.kernels, speed.dtype


@lru_cache(maxsize=1)
def known_speeds() -> tuple[Speed, ...]:
    """This machine's constants first, then those that ship with the package."""
    own = user_file()
    return (*(load_speeds(own) if own.is_file() else ()), *load_speeds(_SHIPPED))


def speed_of(name: str, device: str, dtype: torch.dtype, known: Sequence[Speed] | None = None) -> Speed:
    """The constants that fit best: of this very device before its type, of this implementation and type before others.

    Args:
        name: Name of the operator.
        device: Device type.
        dtype: Type of the tensors.
        known: Constants to look among; ``known_speeds()`` when ``None``.
    """
    machine = device_name(torch.device(device))
    kernels = chosen_kernels()
    wanted_type = str(dtype).removeprefix("torch.")

    def fit(speed: Speed) -> tuple[bool, ...]:
        # With no implementation chosen the fastest that was measured is the one that runs.
        return speed.device == machine, kernels in ("auto", speed.kernels), speed.dtype == wanted_type

    found = [
        s for s in (known_speeds() if known is None else known)
        if s.operator == name and s.device in (machine, device) and not (s.kernels == "cpp" and obstacle())
    ]  # fmt: skip
    if not found:
        # An operator nobody measured here: as slow as the slowest that was.
        rates = [s.flops_per_second for s in known_speeds() if s.device in (machine, device)]
        return Speed(name, device, "aten", wanted_type, 1e-3, min(rates, default=1e9))
    best = max(fit(s) for s in found)
    return max((s for s in found if fit(s) == best), key=lambda s: s.flops_per_second)


def predicted_seconds(operator: Operator, spec: SiteSpec) -> float:
    """Time of one forward pass at a site of known sizes."""
    return sum(_predicted(piece, share) for piece, share in operator.pieces(spec))


def _predicted(operator: Operator, spec: SiteSpec) -> float:
    serving = _ADD_A_BIAS.get(operator.name, ("aten",)) if spec.bias != "none" else ()
    serving = ("aten",) if operator.only_on_aten else serving
    known = tuple(s for s in known_speeds() if not serving or s.kernels in serving)
    speed = speed_of(operator.name, spec.device, spec.dtype, known)
    return speed.seconds_per_call + operator.cost(spec).flops / speed.flops_per_second


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


def fit_speed(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fits the two constants to measured times, every sample weighing the same in relative terms.

    Args:
        samples: Floating-point operations and seconds of each measured call; at least two different sizes.

    Returns:
        Seconds a call (0 where the fit would be negative) and operations a second.

    Raises:
        ValueError: The samples do not tell the two constants apart.
    """
    if len({flops for flops, _ in samples}) < 2:
        raise ValueError(f"two lengths at least are needed to fit a speed, got {len(samples)} samples of one")
    # Least squares of (fixed + flops * inverse) / seconds against 1.
    rows = torch.tensor([[1 / seconds, flops / seconds] for flops, seconds in samples], dtype=torch.float64)
    size = rows.norm(dim=0)
    ones = torch.ones(len(samples), 1, dtype=torch.float64)
    fixed, inverse = (torch.linalg.lstsq(rows / size, ones).solution[:, 0] / size).tolist()
    if fixed < 0 or inverse <= 0:
        column = rows[:, 1]
        fixed, inverse = 0.0, float(column.sum() / (column * column).sum())
    return fixed, 1 / inverse
