"""Tiles, warps and stages of the kernels of fast multipole and window attention, by GPU, type and channels.

The rows are the first of a search, from large tiles to small, that the ahead-of-time compiler turns into machine code
without spills; where two do, the one of which more programs fit a multiprocessor. A test compiles every row again. Those
of ``sm_80`` keep to the shared memory of its consumer cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import cells, padded


@dataclass(frozen=True)
class Config:
    """One configuration; a size is 0 where the kernel has no such constant.

    Args:
        rows: Queries of a tile, ``BM``.
        columns: Keys of a tile, ``BN``.
        far: Pooled rows of a tile, ``BF``.
        warps: Of a program.
        stages: Of the software pipeline.
        split: Whether gradients of keys and of values are two launches, because both do not fit registers.
    """

    rows: int
    columns: int
    far: int
    warps: int = 4
    stages: int = 2
    split: bool = False

    @property
    def tiles(self) -> dict[str, int]:
        """The constants of the kernel."""
        given = {"BM": self.rows, "BN": self.columns, "BF": self.far}
        return {name: size for name, size in given.items() if size}

    @property
    def launch(self) -> dict[str, int]:
        """As keywords of a launch."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}

    @property
    def parts(self) -> tuple[int, ...]:
        """``WHICH`` of each launch: 1 keys, 2 values, 3 both."""
        return (1, 2) if self.split else (3,)


# kernel, architecture, type, channels up to, rows, columns, far, warps, stages, split
_ROWS = """
    fma_fwd sm_90 float 64 64 32 32 4 2
    fma_fwd sm_90 half 64 64 64 64 4 2
    fma_dq sm_90 half 64 64 64 64 4 2
    fma_far sm_90 half 64 64 0 64 4 2
    fma_dkv sm_90 half 64 64 64 0 4 2
    fma_sinks sm_90 half 64 64 0 0 4 2
    fma_fwd sm_90 half 128 64 64 32 4 2
    fma_dq sm_90 half 128 64 32 32 4 2
    fma_far sm_90 half 128 64 0 64 8 2
    fma_dkv sm_90 half 128 64 64 0 8 2
    fma_sinks sm_90 half 128 64 0 0 4 2
    fma_fwd sm_100 half 64 64 64 64 4 2
    fma_dq sm_100 half 64 64 64 64 4 2
    fma_far sm_100 half 64 64 0 64 4 2
    fma_dkv sm_100 half 64 64 64 0 4 2
    fma_sinks sm_100 half 64 64 0 0 4 2
    fma_fwd sm_100 half 128 64 64 64 4 2
    fma_dq sm_100 half 128 64 64 64 8 2
    fma_far sm_100 half 128 64 0 64 8 2
    fma_dkv sm_100 half 128 64 64 0 8 2
    fma_sinks sm_100 half 128 64 0 0 4 2
    fma_fwd sm_80 half 64 64 64 64 8 2
    fma_dq sm_80 half 64 64 32 32 4 2
    fma_far sm_80 half 64 64 0 64 4 2
    fma_dkv sm_80 half 64 64 64 0 8 2
    fma_sinks sm_80 half 64 64 0 0 4 2
    fma_fwd sm_80 half 128 32 32 32 4 1
    fma_dq sm_80 half 128 32 32 32 8 1
    fma_far sm_80 half 128 64 0 64 8 2
    fma_dkv sm_80 half 128 64 64 0 8 2
    fma_sinks sm_80 half 128 64 0 0 4 2
    fma_fwd gfx942 half 64 64 64 64 4 2
    fma_dq gfx942 half 64 64 64 64 4 2
    fma_far gfx942 half 64 64 0 64 4 1
    fma_dkv gfx942 half 64 64 64 0 4 2
    fma_sinks gfx942 half 64 64 0 0 4 2
    window_fwd sm_90 half 64 64 64 0 4 2
    window_dq sm_90 half 64 64 64 0 4 2
    window_dkv sm_90 half 64 64 64 0 4 2
    window_fwd sm_90 half 128 64 64 0 4 2
    window_dq sm_90 half 128 64 32 0 4 2
    window_dkv sm_90 half 128 64 64 0 8 2
    fma_fwd sm_90 half 256 64 16 16 8 2
    fma_dq sm_90 half 256 16 16 16 8 1
    fma_far sm_90 half 256 32 0 32 8 1
    fma_dkv sm_90 half 256 32 64 0 8 2 split
    fma_sinks sm_90 half 256 64 0 0 4 1
    fma_dq sm_90 float 64 16 32 32 4 1
    fma_far sm_90 float 64 32 0 32 4 1
    fma_dkv sm_90 float 64 32 64 0 8 2
    fma_sinks sm_90 float 64 64 0 0 4 2
    fma_far sm_90 float 128 16 0 16 4 1
    fma_dkv sm_90 float 128 16 16 0 4 1
    fma_sinks sm_90 float 128 16 0 0 4 1
    fma_decode sm_90 half 64 16 64 64 4 2
    fma_decode sm_90 half 128 16 64 64 8 2
    fma_decode sm_90 half 256 16 16 16 8 2
    fma_decode sm_90 float 64 16 64 64 8 2
    fma_decode sm_90 float 128 16 16 16 8 2
    fma_decode sm_80 half 64 16 64 64 4 2
    fma_decode sm_80 half 128 16 64 64 8 2
    fma_decode sm_80 half 256 16 16 16 8 2
    fma_decode sm_80 float 64 16 64 64 8 2
    fma_decode sm_100 half 64 16 64 64 4 2
    fma_decode sm_100 half 128 16 64 64 8 2
    fma_decode sm_100 float 64 16 32 32 8 2
    fma_decode gfx942 half 64 16 64 64 4 2
    fma_decode gfx942 half 128 16 64 64 4 2
    fma_decode gfx942 half 256 16 16 16 8 2
    fma_decode gfx942 float 64 16 64 64 4 2
    fma_decode gfx942 float 128 16 64 64 4 2
    fma_decode gfx942 float 256 16 16 16 8 2
    window_fwd sm_90 half 256 64 32 0 8 2
    window_dq sm_90 half 256 64 16 0 8 2
    window_dkv sm_90 half 256 32 64 0 8 2 split
    window_fwd sm_90 float 64 64 32 0 4 2
    window_dkv sm_90 float 64 32 64 0 8 2
    window_dkv sm_90 float 128 16 16 0 4 1
    fma_fwd sm_100 half 256 64 64 64 8 2
    fma_far sm_100 half 256 64 0 64 8 2 split
    fma_dkv sm_100 half 256 64 64 0 8 2 split
    fma_sinks sm_100 half 256 64 0 0 4 1
    fma_dq sm_100 half 256 64 32 32 8 2
    fma_fwd sm_80 half 256 16 32 32 4 1
    fma_far sm_80 half 256 32 0 64 8 1 split
    fma_dkv sm_80 half 256 32 64 0 8 1 split
    fma_sinks sm_80 half 256 64 0 0 4 1
    fma_dq sm_80 half 256 16 16 16 8 1
    fma_fwd gfx942 half 256 64 32 32 4 2
    fma_far gfx942 half 256 16 0 16 4 1
    fma_dkv gfx942 half 256 32 32 0 4 1
    fma_sinks gfx942 half 256 32 0 0 4 1
    fma_dq gfx942 half 256 32 32 32 4 1
    fma_fwd sm_100 float 64 64 64 64 8 2
    fma_far sm_100 float 64 32 0 64 8 1
    fma_dkv sm_100 float 64 32 64 0 8 2
    fma_sinks sm_100 float 64 64 0 0 4 2
    fma_dq sm_100 float 64 64 32 32 8 2
    fma_fwd sm_80 float 64 64 16 16 8 2
    window_fwd sm_80 half 64 64 64 0 4 2
    window_dq sm_80 half 64 64 32 0 4 2
    window_dkv sm_80 half 64 32 64 0 8 2
    window_fwd sm_80 half 128 64 64 0 8 2
    window_dq sm_80 half 128 64 32 0 8 2
    window_dkv sm_80 half 128 32 64 0 8 2
    fma_fwd_packed sm_80 half 256 16 32 32 8 1
    fma_fwd_packed sm_90 float 64 32 32 32 8 1
    fma_dq_packed sm_90 float 64 16 32 32 8 1
    fma_far_packed sm_90 float 64 32 0 32 8 1
    fma_dkv_packed sm_90 float 64 32 64 0 8 1
    fma_fwd sm_90 float 128 16 32 32 8 2
    window_fwd sm_100 half 64 64 64 0 4 2
    window_dq sm_100 half 64 64 64 0 4 2
    window_dkv sm_100 half 64 64 64 0 4 2
    window_fwd sm_100 half 128 64 64 0 4 2
    window_dq sm_100 half 128 64 64 0 8 2
    window_dkv sm_100 half 128 64 64 0 4 2
    fma_fwd_packed sm_100 float 64 64 32 32 8 2
    fma_far_packed sm_100 float 64 64 0 64 8 2 split
    window_fwd gfx942 half 64 64 64 0 4 2
    window_dq gfx942 half 64 64 64 0 4 2
    window_dkv gfx942 half 64 64 64 0 4 2
    fma_fwd gfx942 half 128 64 64 64 4 2
    fma_dq gfx942 half 128 64 32 32 4 2
    fma_far gfx942 half 128 64 0 64 4 1
    fma_dkv gfx942 half 128 32 64 0 8 1
    fma_sinks gfx942 half 128 64 0 0 4 2
    window_fwd gfx942 half 128 64 64 0 4 2
    window_dq gfx942 half 128 64 64 0 4 2
    window_dkv gfx942 half 128 32 64 0 8 1
    fma_fwd_packed sm_90 float 128 16 16 16 8 2
    window_fwd sm_80 half 256 64 32 0 8 1
    window_dq sm_80 half 256 32 32 0 8 1
    window_dkv sm_80 half 256 32 64 0 8 1 split
    window_fwd sm_100 half 256 64 64 0 8 2
    window_dq sm_100 half 256 64 32 0 8 2
    window_dkv sm_100 half 256 32 64 0 8 2
    window_fwd gfx942 half 256 64 32 0 4 2
    window_dq gfx942 half 256 32 32 0 4 1
    window_dkv gfx942 half 256 32 32 0 4 1
    fma_dq sm_80 float 64 16 32 32 8 2
    fma_far sm_80 float 64 32 0 32 8 1
    fma_dkv sm_80 float 64 32 32 0 8 1
    fma_sinks sm_80 float 64 64 0 0 4 2
    window_fwd sm_80 float 64 64 16 0 8 2
    window_dkv sm_80 float 64 32 32 0 8 1
    window_fwd sm_100 float 64 64 64 0 8 2
    window_dq sm_100 float 64 64 64 0 8 2
    window_dkv sm_100 float 64 32 64 0 8 2
    window_fwd gfx942 float 64 64 64 0 4 2
    window_dq gfx942 float 64 64 64 0 4 2
    window_dkv gfx942 float 64 32 64 0 8 1
    fma_fwd gfx942 float 64 64 64 64 4 2
    fma_dq gfx942 float 64 64 64 64 4 2
    fma_far gfx942 float 64 64 0 64 4 1
    fma_dkv gfx942 float 64 32 64 0 8 1
    fma_sinks gfx942 float 64 64 0 0 4 2
    fma_fwd gfx942 float 128 64 64 64 4 1
    fma_dq gfx942 float 128 32 32 32 4 1
    fma_far gfx942 float 128 32 0 32 4 1
    fma_dkv gfx942 float 128 32 32 0 4 1
    fma_sinks gfx942 float 128 32 0 0 4 2
    window_fwd gfx942 float 128 64 64 0 4 2
    window_dq gfx942 float 128 32 32 0 4 1
    window_dkv gfx942 float 128 32 32 0 4 1
"""

# Where the search found none: tiles of 16 spill already, with 4 and 8 warps.
_NONE = """
    fma_fwd sm_90 float 256
    fma_dq sm_90 float 128 256
    fma_far sm_90 float 256
    fma_dkv sm_90 float 256
    fma_sinks sm_90 float 256
    fma_decode sm_90 float 256
    fma_decode sm_100 half 256
    window_fwd sm_90 float 128 256
    window_dq sm_80 float 64
    window_dq sm_90 float 64 128 256
    window_dkv sm_90 float 256
"""

# What serves where there is no row: they may spill, and are right all the same.
_SMALL = {
    "fma_fwd": Config(16, 16, 16), "fma_dq": Config(16, 16, 16), "fma_far": Config(16, 0, 16),
    "fma_dkv": Config(16, 16, 0), "fma_sinks": Config(16, 0, 0), "window_fwd": Config(16, 16, 0),
    "window_dq": Config(16, 16, 0), "window_dkv": Config(16, 16, 0), "fma_decode": Config(16, 16, 16),
}  # fmt: skip


@cache
def configs() -> dict[tuple[str, str, str, int], Config]:
    """All rows by kernel, architecture, ``"half"`` or ``"float"``, and channels."""
    found = {}
    for row in _ROWS.strip().splitlines():
        name, architecture, kind, width, *sizes = row.split()
        rows, columns, far, warps, stages = map(int, sizes[:5])
        split = sizes[5:] == ["split"]
        found[name, architecture, kind, int(width)] = Config(rows, columns, far, warps, stages, split)
    return found


@cache
def without() -> frozenset[tuple[str, str, str, int]]:
    """Cells that have no row because the search found none."""
    return cells(_NONE)


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def chosen(kernel: str, query: Tensor, value: Tensor, packed: bool = False) -> Config:
    """The configuration of a kernel for tensors of one type on one device.

    Args:
        kernel: Name of the kernel.
        query: ``(..., d)``.
        value: ``(..., e)``.
        packed: Whether documents take the place of sequences, which takes a few registers more: a row ``<kernel>_packed``
            goes before that of the kernel.
    """
    if not query.is_cuda:
        # The interpreter runs tile by tile; tests are to see several.
        return _SMALL[kernel]
    kind = "float" if query.dtype == torch.float32 else "half"
    # Narrower tensors take the tiles of 64 channels.
    widest = max(64, padded(max(query.shape[-1], value.shape[-1])))
    cell = _architecture(query.device), kind, widest
    plain = configs().get((kernel, *cell), _SMALL[kernel])
    return configs().get((f"{kernel}_packed", *cell), plain) if packed else plain
