"""Configuration of exact attention."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.operators.base import OperatorConfig


@dataclass(frozen=True)
class ExactConfig(OperatorConfig):
    """Exact attention has nothing to configure."""
