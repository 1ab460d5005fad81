"""Tiles, warps and stages of the operator kernels, by GPU, type and channels.

The rows are the first of a search, from large tiles to small, that the ahead-of-time compiler turns into machine code
without spills; a test compiles every row again. Those of ``sm_80`` keep to the shared memory of its consumer cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import padded

# kernel, architecture, type, channels up to, rows, columns, warps, stages
_ROWS = """
    leaf_fwd sm_80 half 64 64 64 4 2
    leaf_fwd sm_90 half 64 64 64 4 2
    leaf_fwd sm_90 half 128 64 64 4 2
    leaf_fwd sm_90 half 256 64 32 8 2
    leaf_fwd sm_90 float 64 64 64 8 2
    leaf_fwd sm_90 float 128 32 32 8 2
    leaf_dq sm_80 half 64 64 64 4 2
    leaf_dq sm_90 half 64 64 64 4 2
    leaf_dq sm_90 half 128 64 64 4 2
    leaf_dq sm_90 half 256 32 64 8 2
    leaf_dq sm_90 float 64 64 64 8 2
    leaf_dkv sm_80 half 64 64 64 8 2
    leaf_dkv sm_90 half 64 64 64 4 2
    leaf_dkv sm_90 half 128 64 64 8 2
    leaf_dkv sm_90 half 256 64 32 8 2
    leaf_dkv sm_90 float 64 32 64 8 2
    bh_fwd sm_80 half 64 64 64 4 2
    bh_fwd sm_90 half 64 64 64 4 2
    bh_fwd sm_90 half 128 64 64 8 2
    bh_fwd sm_90 half 256 64 16 8 2
    bh_fwd sm_90 float 64 64 32 4 2
    bh_fwd_few sm_80 half 64 16 64 4 2
    bh_fwd_few sm_90 half 64 16 64 4 2
    bh_fwd_few sm_90 half 128 16 64 4 2
    bh_fwd_few sm_90 half 256 16 64 8 2
    bh_fwd_few sm_90 float 64 16 64 8 2
    bh_dq sm_90 half 64 64 64 4 2
    bh_dq sm_90 half 128 64 32 8 2
    bh_dq_few sm_90 half 64 16 64 4 2
    bh_dq_few sm_90 half 128 16 64 4 2
    bh_dq_few sm_90 half 256 16 64 8 2
    bh_dkv sm_90 half 64 64 64 8 2
    bh_dkv sm_90 half 128 32 64 8 2
    bh_dkv sm_90 half 256 32 32 8 2
    bh_dkv sm_90 float 64 32 64 8 1
    bh_far_dkv sm_90 half 64 64 0 4 2
    bh_far_dkv sm_90 half 128 64 0 4 2
    bh_far_dkv sm_90 half 256 64 0 8 2
    bh_far_dkv sm_90 float 64 64 0 8 2
"""


@dataclass(frozen=True)
class Config:
    """One configuration.

    Args:
        rows: Queries of a tile, ``BM``.
        columns: Keys of a tile, ``BN``; 0 where the kernel has no such constant.
        warps: Of a program.
        stages: Of the software pipeline.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """As keywords of a launch."""
        tiles = {"BM": self.rows, "BN": self.columns} if self.columns else {"BM": self.rows}
        return {**tiles, "num_warps": self.warps, "num_stages": self.stages}


@cache
def configs() -> dict[tuple[str, str, str, int], Config]:
    """All rows by kernel, architecture, ``"half"`` or ``"float"``, and channels."""
    rows = (row.split() for row in _ROWS.strip().splitlines())
    return {(name, arch, kind, int(d)): Config(*map(int, sizes)) for name, arch, kind, d, *sizes in rows}


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def chosen(kernel: str, query: Tensor, value: Tensor) -> Config:
    """The configuration of a kernel for tensors of one type on one device.

    Where the search found none, small tiles: they may spill, and are right all the same.

    Args:
        kernel: Name of the kernel.
        query: ``(..., d)``.
        value: ``(..., e)``.
    """
    small = Config(16, 0 if kernel == "bh_far_dkv" else 16)
    if not query.is_cuda:
        # The interpreter runs tile by tile; tests are to see several.
        return small
    kind = "float" if query.dtype == torch.float32 else "half"
    widest = max(64, padded(max(query.shape[-1], value.shape[-1])))
    return configs().get((kernel, _architecture(query.device), kind, widest), small)
