"""Files written so that a reader never sees half of one, and the kernel's own count of a process's memory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
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


@contextmanager
def replaced_folder(path: str | Path, dropped: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into that takes the place of ``path`` when the block ends well.

    Until then ``path`` is as it was, also when the process is killed. Files of the old folder that the block did not
    write are carried over. What a killed process leaves beside, ``.<name>.*.part``, may be deleted.

    Args:
        path: The folder to make or to replace.
        dropped: Names of files of the old folder that are not carried over.

    Yields:
        The folder to write into, beside the target.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield staging
        os.chmod(staging, 0o755)
        if not target.exists():
            os.rename(staging, target)
            return
        _carry_over(target, staging, dropped)
        if not _exchange(staging, target):  # no such call here: between the two renames there is no folder
            aside = staging.with_suffix(".old")
            os.rename(target, aside)
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(aside, target)
                raise
            os.rename(aside, staging)
        shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _carry_over(old: Path, new: Path, dropped: Collection[str]) -> None:
    """Hard links, which cost no space, to the files of a folder that another does not have."""
    for source in old.rglob("*"):
        place = new / source.relative_to(old)
        if str(source.relative_to(old)) in dropped:
            continue
        if source.is_dir() and not source.is_symlink():
            place.mkdir(exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, place, follow_symlinks=False)
            except (OSError, NotImplementedError):
                shutil.copy2(source, place, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step (Linux ``renameat2`` with ``RENAME_EXCHANGE``); false where there is no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


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
