"""Configuration of a site whose heads are served by different operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn_compile.operators.base import OperatorConfig

_PART = {"operator", "options"}


@dataclass(frozen=True, kw_only=True)
class PerHeadConfig(OperatorConfig):
    """Which operator serves which heads.

    Args:
        parts: What serves: ``{"operator": name, "options": {...}}`` each.
        heads: For every key head the number of its part, from 0; the query heads that read a key head go with it. Empty:
            the first part serves all.
    """

    parts: tuple[Mapping[str, Any], ...] = ({"operator": "window"},)
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"parts must name at least one operator, got {self.parts!r}")
        for part in self.parts:
            named = isinstance(part, Mapping) and isinstance(part.get("operator"), str)
            if not named or set(part) - _PART or not isinstance(part.get("options", {}), Mapping):
                raise ValueError(f"parts are {{'operator': name, 'options': {{...}}}}, got {self.parts!r}")
            if part["operator"] == "per_head":
                raise ValueError(f"parts cannot be per_head themselves, got {part!r}")
        for head in self.heads:
            if type(head) is not int or not 0 <= head < len(self.parts):
                raise ValueError(
                    f"heads are numbers of parts, 0 to {len(self.parts) - 1}, one for each key head; got {self.heads!r}"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PerHeadConfig:
        """Builds the configuration from plain values; JSON gives lists where the fields are tuples.

        Raises:
            ValueError: A name is unknown or a value is out of range.
            TypeError: A value has the wrong type.
        """
        return super().from_dict({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def served(self, kv_heads: int) -> list[tuple[int, list[int]]]:
        """Parts that serve any head, each with its key heads."""
        found: dict[int, list[int]] = {}
        for head in range(kv_heads):
            found.setdefault(self.heads[head] if self.heads else 0, []).append(head)
        return sorted(found.items())
