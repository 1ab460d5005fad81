"""``fastattn_config.json``: what a saved folder holds, which model it belongs to, and hashes that betray damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn_compile.errors import CheckpointError, PlanError
from fastattn_compile.plans import Plan
from fastattn_compile.retrofitting.base_weights import BaseWeights

SCHEMA = "fastattn.checkpoint/1"
CONFIG, PARAMETERS, REPORT, CARD = (
    "fastattn_config.json", "fastattn_params.safetensors", "report.json", "README.md",
)  # fmt: skip
SEPARATE, MERGED = "separate", "merged"
WEIGHTS_NOTE = {
    SEPARATE: "The base model's weights are not in this folder: load it, then this folder into it.",
    MERGED: "The folder holds the whole model.",
}


@dataclass(frozen=True)
class Manifest:
    """The document ``fastattn_config.json``, schema ``fastattn.checkpoint/1``.

    Args:
        plan: Which operator serves which site.
        base: The weights that the folder is applied to.
        weights: ``"separate"``: the base weights are not in the folder; ``"merged"``: they are.
        learned: Site to the names of its learned parameters in order; each is stored as ``<site>::<name>``.
        owners: Site to the module it is in; ``None`` for a site that is named by its source line.
        changed: Name of every base tensor that the folder holds (those that differ from the base, or all when
            merged by us), to the name it is stored under: names of one tied tensor share one.
        origin: Hash of the weights before they were changed and merged; empty when they were not.
        producer: Name and version of what wrote it.
        files: Name of a file that must not change to its SHA-256.
        written: Names of all files that were saved; others in the folder are the user's.
    """

    plan: Plan
    base: BaseWeights
    weights: str = SEPARATE
    learned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    owners: Mapping[str, str | None] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    producer: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": SCHEMA,
            "producer": dict(self.producer),
            "weights": self.weights,
            "base": self.base.to_json(),
            "origin": self.origin,
            "plan": self.plan.to_json(),
            "learned": {site: list(names) for site, names in self.learned.items()},
            "owners": dict(self.owners),
            "changed": dict(self.changed),
            "files": dict(self.files),
            "written": sorted(self.written),
        }

    @staticmethod
    def from_json(document: Any) -> Manifest:
        """Reads the document; keys of later writers within the version are ignored.

        Raises:
            CheckpointError: It is not one, or was written by a later version.
        """
        schema = document.get("schema") if isinstance(document, Mapping) else None
        if schema != SCHEMA:
            later = isinstance(schema, str) and schema.startswith(SCHEMA.rpartition("/")[0])
            advice = "a later version of fastattn_compile wrote it: update" if later else "it is another file"
            raise CheckpointError(f"{CONFIG}: expected schema {SCHEMA!r}, got {schema!r}; {advice}")
        try:
            weights = document["weights"]
            if weights not in (SEPARATE, MERGED):
                raise ValueError(f"weights must be {SEPARATE!r} or {MERGED!r}, got {weights!r}")
            return Manifest(
                plan=Plan.from_json(document["plan"]),
                base=BaseWeights.from_json(document["base"]),
                weights=weights,
                learned={str(s): tuple(map(str, names)) for s, names in document["learned"].items()},
                owners=dict(document["owners"]),
                changed=dict(document["changed"]),
                origin=str(document["origin"]),
                producer=dict(document["producer"]),
                files=dict(document["files"]),
                written=tuple(map(str, document.get("written", ()))),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, (CheckpointError, PlanError)):
                raise
            raise CheckpointError(f"{CONFIG} is malformed: {type(error).__name__}: {error}") from error

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Reads the document of a folder.

        Raises:
            CheckpointError: There is none, it is not JSON, or it is malformed.
        """
        path = folder / CONFIG
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{folder} was not saved by fastattn_compile: cannot read {CONFIG} ({error.strerror})"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
        return Manifest.from_json(document)

    def check_files(self, folder: Path) -> None:
        """Compares every file with its hash.

        Raises:
            CheckpointError: A file is missing, truncated or changed.
        """
        for name, expected in self.files.items():
            path = folder / name
            if path.name != name:
                raise CheckpointError(
                    f"{CONFIG} names a file outside of its folder: {name!r}; it was tampered with"
                )
            if not path.is_file():
                raise CheckpointError(f"{folder} is incomplete: {name} is missing; copy the folder again")
            if file_hash(path) != expected:
                raise CheckpointError(
                    f"{path} is damaged: it does not have the hash that {CONFIG} names "
                    f"({path.stat().st_size} bytes here); copy the folder again"
                )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
