"""What the launchers of operator kernels share: sizes, precision, obstacles that all attention kernels have."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634
MOST_CHANNELS = 256
# Of kernels with one configuration: passes over memory, and those with products that fill registers.
LIGHT = {"num_warps": 4, "num_stages": 1}
HEAVY = {"num_warps": 8, "num_stages": 1}


def padded(size: int) -> int:
    """The power of two, at least 16, that holds ``size``: what a product on tensor cores takes."""
    return max(16, triton.next_power_of_2(size))


def channels(**sizes: int) -> dict[str, int]:
    """Constants ``D`` and ``BD`` for ``D=...``: numbers of channels, and the tiles that hold them."""
    return {**sizes, **{f"B{name}": padded(size) for name, size in sizes.items()}}


def precision(dtype: torch.dtype) -> str:
    """How products of a type are made: float32 in three parts on tensor cores, which AMD's compiler does not offer."""
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


def cells(text: str) -> frozenset[tuple[str, str, str, int]]:
    """Cells of a table of configurations, from lines of a kernel, an architecture, a type and some widths."""
    lines = (line.split() for line in text.strip().splitlines())
    return frozenset((name, arch, kind, int(d)) for name, arch, kind, *widths in lines for d in widths)


def tensor_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why the attention kernels cannot take these tensors, whatever is asked; empty when they can.

    Args:
        query: ``(..., d)``.
        key: ``(..., d)``.
        value: ``(..., e)``.
    """
    types = {x.dtype for x in (query, key, value)}
    if torch.float64 in types:
        return "float64 is not computed on tensor cores"
    if len(types) > 1:
        return "query, key and value differ in type"
    if not types <= {torch.float32, torch.float16, torch.bfloat16}:
        return f"no kernel computes in {query.dtype}"
    widest = max(query.shape[-1], value.shape[-1])
    return f"{widest} channels, a tile holds up to {MOST_CHANNELS}" if widest > MOST_CHANNELS else ""


def step(x: Tensor | None) -> int:
    """Stride between sequences, 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
