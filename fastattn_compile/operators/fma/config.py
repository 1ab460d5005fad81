"""Configuration of fast multipole attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fastattn_compile.kernels.rotary import Rotary, check_base
from fastattn_compile.operators.base import OperatorConfig

BASES = ("mean", "depthwise", "dense", "recursive")
GRID_BASES = ("mean", "depthwise")
BOUNDARIES = ("clean", "zero_pad")
_ON_GRIDS = ("version", "block", "rank", "basis", "scale_attn", "sinks", "boundary", "grid", "prefix")
QUERIES = ("all", "pooled")


@dataclass(frozen=True, kw_only=True)
class FmaConfig(OperatorConfig):
    """What fast multipole attention can be told.

    Args:
        block: Tokens of a finest group. Queries meet their own and the neighbouring blocks exactly. Any
            positive number; kernels are fastest at 64 and 128.
        rank: Pooled rows that stand for one group at every level; divides ``block``.
        basis: How a group is pooled: ``"mean"``, row ``r`` is the mean of the ``r``-th part of the group;
            ``"depthwise"``, every row is a learned combination of the group's tokens, channel by channel,
            that starts as the mean; ``"dense"``, the same over all channels of the head; ``"recursive"``, the
            finest level is pooled as in ``"depthwise"`` and every further one merges the rows of its two children
            by weights that all levels share, so that the number of parameters does not depend on the length.
        scale_attn: A pooled row counts as many keys as it stands for (adds ``log(count)`` to its score).
            Turning it off is for models trained so.
        sinks: First real tokens of a sequence that every query keeps meeting exactly; at most ``block``.
        boundary: What stands before the first token: ``"clean"``, nothing; ``"zero_pad"``, keys and values of 0
            that are attended, as in the published code. For weights trained so; causal, without sinks, with
            ``block`` times a power of two tokens, and without decoding.
        grid: Height and width, or one number for a square, when the tokens are those of an image, row after row: groups are
            then square cells and the near field is that of the plane (specification 1.9). ``block`` is the tokens of a
            finest cell, a square number; bidirectional, with the bases ``"mean"`` and ``"depthwise"``, and no ``sinks`` but
            ``prefix``.
        prefix: Tokens in front of the grid (class token, registers). Every query meets them exactly, and they meet
            every token exactly.
        queries: Who meets pooled rows: ``"all"``, every query; ``"pooled"``, the mean query of a group at every level, so
            that the whole takes O(n). A mean of queries knows later tokens, so bidirectional only and without decoding;
            with means as basis and without sinks.
        rotary_base: Base of the rotary embedding that keys carry. Other than 0, keys are pooled without it, and their rows
            get it at the mean position of what they stand for; fine keys stay as they are. 0 pools keys as they come.
            Positions are counted over real tokens. With means it does not matter where they begin.
        rotary_dim: How many of the first channels the embedding turns; 0, all.
        rotary_interleaved: It turns channels ``2 i`` and ``2 i + 1`` as a pair, else ``i`` and ``i + rotary_dim / 2``.
    """

    block: int = 64
    rank: int = 4
    basis: str = "mean"
    scale_attn: bool = True
    sinks: int = 4
    boundary: str = "clean"
    grid: tuple[int, int] | None = None
    prefix: int = 0
    queries: str = "all"
    rotary_base: float = 0.0
    rotary_dim: int = 0
    rotary_interleaved: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be a positive number of tokens, got {self.block}")
        if self.grid is not None:
            self._check_grid()
        elif self.prefix:
            raise ValueError(
                f"prefix counts tokens in front of a grid, got prefix={self.prefix} without grid"
            )
        if not 1 <= self.rank <= self.block:
            raise ValueError(f"rank must be between 1 and block ({self.block}), got {self.rank}")
        if self.block % self.rank:
            fitting = [r for r in range(1, self.block + 1) if self.block % r == 0]
            raise ValueError(
                f"rank must divide block: block {self.block} is not a multiple of rank {self.rank}; "
                f"ranks that fit: {', '.join(map(str, fitting))}"
            )
        if not 0 <= self.sinks <= self.block:
            raise ValueError(f"sinks must be between 0 and block ({self.block}), got {self.sinks}")
        if self.basis not in BASES:
            raise ValueError(f"unknown basis {self.basis!r}; bases: {', '.join(BASES)}")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"unknown boundary {self.boundary!r}; boundaries: {', '.join(BOUNDARIES)}")
        if self.boundary == "zero_pad" and self.sinks:
            raise ValueError(f"boundary 'zero_pad' has no sinks, got sinks={self.sinks}; set sinks to 0")
        if self.queries not in QUERIES:
            raise ValueError(f"unknown queries {self.queries!r}; queries: {', '.join(QUERIES)}")
        check_base(self.rotary_base)
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_dim must be an even number of channels, or 0 for all, got {self.rotary_dim}"
            )
        if not self.rotary_base and (self.rotary_dim or self.rotary_interleaved):
            raise ValueError("rotary_dim and rotary_interleaved describe an embedding; give its rotary_base")
        if self.queries == "pooled":
            if self.rotary_base:
                raise ValueError(
                    "queries 'pooled' is not defined with rotary_base: means of turned queries meet the rows"
                )
            if self.sinks:
                raise ValueError(f"queries 'pooled' has no sinks, got sinks={self.sinks}; set sinks to 0")
            if self.basis != "mean" or self.boundary != "clean":
                raise ValueError(
                    "queries 'pooled' is defined with basis 'mean' and boundary 'clean', "
                    f"got {self.basis!r} and {self.boundary!r}"
                )

    def rotary(self, head_dim: int) -> Rotary | None:
        """The rotary embedding of keys of ``head_dim`` channels, ``None`` when it is left alone."""
        if not self.rotary_base:
            return None
        return Rotary(self.rotary_base, self.rotary_dim or head_dim, self.rotary_interleaved)

    def _check_grid(self) -> None:
        given: Any = self.grid
        grid = (given, given) if type(given) is int else given
        if not isinstance(grid, (tuple, list)) or not all(type(size) is int for size in grid):
            raise TypeError(f"grid must be height and width, or one number for a square, got {given!r}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(
                f"grid must be two positive numbers, height and width, or one for a square, got {given!r}"
            )
        object.__setattr__(self, "grid", tuple(grid))
        if math.isqrt(self.block) ** 2 != self.block:
            near = max(1, round(math.sqrt(self.block)))
            raise ValueError(
                f"with a grid, block counts the tokens of a square cell: {self.block} is no square number; "
                f"{near * near} is a cell of {near} x {near}"
            )
        if self.basis not in GRID_BASES:
            raise ValueError(
                f"basis {self.basis!r} is not defined on a grid; bases that are: {', '.join(GRID_BASES)}"
            )
        if self.boundary != "clean":
            raise ValueError(f"a grid has the boundary 'clean', got {self.boundary!r}")
        # Options of the sequence form, whatever is added to it, must not be passed over in silence.
        foreign = [
            f.name for f in fields(self) if f.name not in _ON_GRIDS and getattr(self, f.name) != f.default
        ]
        if foreign:
            raise ValueError(f"not defined on a grid: {', '.join(foreign)}; leave it out, or leave grid out")
        if self.prefix < 0:
            raise ValueError(f"prefix must be 0 or more tokens, got {self.prefix}")
        if self.sinks not in (0, type(self).sinks):
            raise ValueError(
                f"a grid has no sinks, got sinks={self.sinks}; tokens in front of the grid are named with prefix"
            )
        object.__setattr__(self, "sinks", 0)


def level_count(length: int, block: int) -> int:
    """Pooled levels of a sequence: ``max(0, ceil(log2(ceil(length / block))) - 1)`` (specification 4.1).

    Args:
        length: Tokens of the sequence.
        block: Tokens of a finest group.
    """
    blocks = -(-length // block)
    return max(0, (blocks - 1).bit_length() - 1)
