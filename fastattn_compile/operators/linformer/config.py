"""Configuration of Linformer."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.operators.base import OperatorConfig

SHARINGS = ("heads", "none", "key_value")
STARTS = ("blocks", "data")


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(OperatorConfig):
    """What Linformer can be told.

    Args:
        rank: Rows that keys and values are projected to.
        max_length: Longest sequence the projections serve; ``None`` is the length of the site they are made
            for. Shorter sequences use the first columns.
        sharing: ``"heads"``, one pair of projections for all heads of the site; ``"none"``, one for each key
            head; ``"key_value"``, one projection for the keys and the values of all heads. (The paper's
            fourth way, one for all layers, would be a parameter of no site.)
        start: ``"blocks"``, rows start as means of equal blocks of positions; ``"data"``, as means of
            positions whose keys are alike in the calibration sample, blocks where there is no sample.
    """

    rank: int = 64
    max_length: int | None = None
    sharing: str = "heads"
    start: str = "blocks"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be a positive number of rows, got {self.rank}")
        if self.max_length is not None:
            if type(self.max_length) is not int:
                raise TypeError(f"max_length must be int or None, got {self.max_length!r}")
            if self.max_length < self.rank:
                raise ValueError(
                    f"max_length ({self.max_length}) must be at least rank ({self.rank}): "
                    "more rows than tokens cost more than exact attention"
                )
        if self.sharing not in SHARINGS:
            raise ValueError(f"unknown sharing {self.sharing!r}; one of: {', '.join(SHARINGS)}")
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r}; one of: {', '.join(STARTS)}")
