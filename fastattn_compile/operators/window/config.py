"""Configuration of local window attention."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.operators.base import OperatorConfig
from fastattn_compile.operators.mask import MaskStructure


@dataclass(frozen=True, kw_only=True)
class WindowConfig(OperatorConfig):
    """What local window attention can be told.

    Args:
        width: Tokens a query meets around it: itself and those before it under a causal mask, half on each
            side
            otherwise.
        sinks: First real tokens of a sequence that every query keeps meeting.
    """

    width: int = 256
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be a positive number of tokens, got {self.width}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 or more tokens, got {self.sinks}")

    def reach(self, causal: bool) -> tuple[int, int]:
        """Largest distance back and ahead of a key that a query meets."""
        return (self.width - 1, 0) if causal else (self.width // 2, (self.width - 1) // 2)

    def band(self, mask: MaskStructure) -> MaskStructure:
        """The window alone, as a mask aligned as the site's is."""
        left, right = self.reach(mask.causal)
        return MaskStructure(left=left, right=right, end_aligned=mask.end_aligned)
