"""Files written so that a reader never sees half of one, and the kernel's own count of a process's memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Writes text beside the target, then renames it over the target."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, document: Any) -> None:
    """Writes a JSON document, indented, with a final newline."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


@dataclass
class HighWaterMark:
    """Memory that a stretch of work needed beyond what was there before.

    Args:
        bytes: The peak; ``None`` where the system does not tell (it does on Linux).
    """

    bytes: int | None = None


@contextmanager
def high_water_mark() -> Iterator[HighWaterMark]:
    """Measures the peak of this process's resident memory inside the block. Run it in a process of its own."""
    mark, reset = HighWaterMark(), Path("/proc/self/clear_refs")
    if not reset.exists():
        yield mark
        return
    reset.write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    yield mark
    mark.bytes = max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
