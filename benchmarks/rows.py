"""Rows of a benchmark kept in a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn_compile.files import write_json


def add_row_options(parser: argparse.ArgumentParser, results: Path) -> None:
    """Where rows are kept, whether to measure them again, and whether to show them only.

    Args:
        parser: Gets ``--json``, ``--fresh`` and ``--show``.
        results: The file without ``--json``.
    """
    parser.add_argument("--json", type=Path, default=results, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    parser.add_argument(
        "--show", action="store_true", help="print the table of what is there, measure nothing"
    )


class Rows:
    """Rows of one document, written after every change.

    Args:
        path: The JSON file.
        schema: Name and version of its contents; a file of another schema is refused.
        key: Fields that tell two rows apart.
        head: Further fields of the document, set anew with every run.
        fresh: Drop the rows that the file holds.
    """

    def __init__(
        self, path: Path, schema: str, key: Sequence[str], head: dict[str, Any], fresh: bool = False
    ) -> None:
        self.path, self.key = path, key
        self.document: dict[str, Any] = {"schema": schema, **head, "rows": []}
        if path.exists() and not fresh:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("schema") != schema:
                raise ValueError(
                    f"{path} holds {kept.get('schema')!r}, expected {schema!r}; choose another --json"
                )
            self.document["rows"] = kept["rows"]

    @property
    def all(self) -> list[dict[str, Any]]:
        """The rows, in the order of measurement."""
        return self.document["rows"]

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The row whose key fields are those of ``wanted``."""
        key = self._key(wanted)
        return next((row for row in self.all if self._key(row) == key), None)

    def put(self, row: dict[str, Any], **head: Any) -> None:
        """Adds a row, in place of the one of its key, and writes the document."""
        at = next((i for i, old in enumerate(self.all) if self._key(old) == self._key(row)), len(self.all))
        self.all[at : at + 1] = [row]
        self.document |= head
        write_json(self.path, self.document)

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.key], sort_keys=True)
