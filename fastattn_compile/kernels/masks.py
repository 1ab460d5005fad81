"""What the rows of a mask show, in C++ on a CPU where it can: a mask is large, and that reads it once.

It is a step of checking masks, not a kernel one chooses: what C++ cannot read is read by ATen whatever was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.cpu import masks as cpu
from fastattn_compile.kernels.dispatch import takes_step


@dataclass(frozen=True)
class Rows:
    """What queries see.

    Args:
        count: ``(batch, queries)`` int64, how many keys.
        first: ``(batch, queries)`` int64, the first of them; the number of keys where there is none.
        last: ``(batch, queries)`` int64, the last of them; -1 where there is none.
        seen: ``(batch, keys)`` boolean, whether any query sees a key.
    """

    count: Tensor
    first: Tensor
    last: Tensor
    seen: Tensor

    @property
    def some(self) -> Tensor:
        """Whether a query sees anything, ``(batch, queries)``."""
        return self.last >= 0


def read(visible: Tensor) -> Rows:
    """Reads a mask.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
    """
    if takes_step("cpp", lambda: cpu.why_not(visible)):
        return Rows(*cpu.read(visible))
    return read_aten(visible)


def read_aten(visible: Tensor) -> Rows:
    """``read`` on ATen, which compilers trace."""
    keys, marks = visible.shape[2], as_bytes(visible)
    first = marks.argmax(2)
    some = visible.gather(2, first[..., None]).squeeze(2)
    last = keys - 1 - marks.flip(2).argmax(2)
    return Rows(
        marks.sum(2, dtype=torch.int64), torch.where(some, first, keys), torch.where(some, last, -1),
        any_along(visible, 1),
    )  # fmt: skip


def any_along(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """``x.any(dim)`` of truth values, which CPUs do faster as a maximum of bytes."""
    return as_bytes(x).amax(dim, keepdim) != 0


def any_at_all(x: Tensor) -> bool:
    """``bool(x.any())`` of at least one truth value, for contiguous tensors in no graph: their bytes are not copied."""
    return bool(x.view(torch.uint8).amax())


def as_bytes(x: Tensor) -> Tensor:
    """Truth values as 0 and 1. Not as a view: Inductor then reads the bits that a comparison left in a vector."""
    return x.to(torch.uint8)
