"""Configuration of Barnes-Hut attention."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.operators.base import OperatorConfig
from fastattn_compile.operators.mask import MaskStructure

SELECT = ("mean", "cumulant", "bound", "sampled")
REST = ("drop", "pool")
SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class BarnesHutConfig(OperatorConfig):
    """What Barnes-Hut attention can be told.

    Args:
        block: Tokens of a block. Queries meet their own and the neighbouring blocks exactly.
        sinks: First real tokens of a sequence that every query keeps meeting; at most ``block``.
        leaf: Tokens of a leaf, which is opened as a whole; divides ``block``.
        fanout: Children of a node of the tree.
        group: Consecutive queries that share a choice; divides ``block``. 1 is the most accurate: under a causal
            mask a shared choice can follow only the queries up to the group's first. 16 is several times as fast.
        open: Leaves opened for a group.
        beam: Nodes expanded on the level above the leaves; half as many on every next level, 8 at the least.
        tolerance: Share of a row's estimated mass that may stay unopened. 0 opens ``open`` leaves whatever
            they hold.
        max_open: Leaves opened at most under a tolerance.
        select: How the mass of a node is estimated. ``"mean"``: its mean key. ``"cumulant"``: mean and
            diagonal variance of its keys, at twice the work. ``"bound"``: an upper bound from the channel-wise
            extremes, at twice the work. ``"sampled"``: its mean key, and up to 4 queries speak for a group, evenly
            spaced from the group's first one. In the others the mean query speaks; with ``"mean"`` what it says is the
            mean of the scores of all, with ``"cumulant"`` and ``"bound"`` it is not quite.
        rest: What is not opened is left out (``"drop"``) or met as one pooled key and value a node
            (``"pool"``).
        share_group: The query heads of a key head make one choice: keys are gathered once for all of them.
    """

    block: int = 64
    sinks: int = 4
    leaf: int = 4
    fanout: int = 4
    group: int = 1
    open: int = 64
    beam: int = 32
    tolerance: float = 0.0
    max_open: int = 128
    select: str = "mean"
    rest: str = "drop"
    share_group: bool = True

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("leaf", 1), ("fanout", 2), ("group", 1), ("open", 0), ("beam", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        for name in ("leaf", "group"):
            part = getattr(self, name)
            if self.block % part:
                fitting = [x for x in range(1, self.block + 1) if self.block % x == 0]
                raise ValueError(
                    f"{name} must divide block: block {self.block} is not a multiple of {part}; "
                    f"values that fit: {', '.join(map(str, fitting))}"
                )
        if not 0 <= self.sinks <= self.block:
            raise ValueError(f"sinks must be between 0 and block ({self.block}), got {self.sinks}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is a share of mass, at least 0 and below 1, got {self.tolerance}")
        if self.max_open < 1:
            raise ValueError(f"max_open must be 1 or more, got {self.max_open}")
        for name, known in (("select", SELECT), ("rest", REST)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; it is one of {', '.join(known)}")

    @property
    def most_open(self) -> int:
        """Leaves that are opened at most."""
        return self.max_open if self.tolerance else self.open

    def pattern(self, mask: MaskStructure) -> TreePattern:
        """What the kernels need to know of this configuration under a mask."""
        return TreePattern(
            self.block, self.leaf, self.fanout, self.group, self.most_open, self.beam, self.sinks,
            "mean" if self.select == "sampled" else self.select, SAMPLES if self.select == "sampled" else 0,
            self.share_group, mask.causal, mask.left, mask.right, self.tolerance,
        )  # fmt: skip
