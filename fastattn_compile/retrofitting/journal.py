"""What a long run has measured, line by line in a file: a run that was killed reads it back and goes on.

A search that is decided by its measurements alone comes to the same place when they are read instead of made, so that
nothing else has to be stored. A line is whole or it is not counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastattn_compile.errors import CheckpointError

SCHEMA = "fastattn.journal/1"


class Journal:
    """Measured values by name; in memory, or in a file that grows by a line a value.

    Args:
        path: The file; ``None`` keeps them in memory.
        fingerprint: What the run depends on, by name.

    Raises:
        CheckpointError: The file belongs to another run, or is no journal.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, str]) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        if path is None:
            return
        whole = self._read(path, dict(fingerprint)) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.truncate(whole)  # what a kill left of a last line
        if not whole:
            self._append({"schema": SCHEMA, "fingerprint": dict(fingerprint)})

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of a name: as it was measured before, else measured now and kept.

        Args:
            name: The name.
            measure: Gives the value, something JSON can hold.
        """
        if name not in self._values:
            value = measure()
            if self.path is not None:
                self._append({"name": name, "value": value})
            self._values[name] = value
        return self._values[name]

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, path: Path, fingerprint: dict[str, str]) -> int:
        """Reads the whole lines; returns how many bytes they are."""
        whole = 0
        with path.open("rb") as stream:
            for number, raw in enumerate(stream):
                if not raw.endswith(b"\n"):
                    break
                try:
                    line = json.loads(raw)
                    if number == 0:
                        self._check(path, line, fingerprint)
                    else:
                        self._values[line["name"]] = line["value"]
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    if isinstance(error, CheckpointError):
                        raise
                    raise CheckpointError(
                        f"line {number + 1} of {path} is damaged ({error}); delete the file to start over"
                    ) from error
                whole += len(raw)
        return whole

    def _check(self, path: Path, line: Mapping[str, Any], fingerprint: dict[str, str]) -> None:
        if line.get("schema") != SCHEMA:
            raise CheckpointError(f"{path} is no journal of a run: expected schema {SCHEMA!r}")
        found = line["fingerprint"]
        other = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
        if other:
            raise CheckpointError(
                f"{path.parent} holds a run with other {', '.join(other)}; give another folder, or delete it to start over"
            )
