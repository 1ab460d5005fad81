"""Tiles, warps and stages of the operator kernels, by GPU, type and channels.

The rows are the first of a search, from large tiles to small, that the ahead-of-time compiler turns into machine code
without spills; a test compiles every row again. Those of ``sm_80`` keep to the shared memory of its consumer cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastattn_compile.kernels.gpu.launch import cells, padded

# kernel, architecture, type, channels up to, rows, columns, warps, stages, registers of a thread
_ROWS = """
    leaf_fwd sm_80 half 64 64 64 4 2 180
    leaf_fwd sm_80 half 128 64 64 8 2 178
    leaf_fwd sm_80 half 256 64 16 8 2 192
    leaf_fwd sm_80 float 64 64 32 8 2 255
    leaf_fwd sm_90 half 64 64 64 4 2 152
    leaf_fwd sm_90 half 128 64 64 4 2 198
    leaf_fwd sm_90 half 256 64 32 8 2 242
    leaf_fwd sm_90 float 64 64 64 8 2 251
    leaf_fwd sm_90 float 128 32 32 8 2 242
    leaf_fwd sm_100 half 64 64 64 4 2 164
    leaf_fwd sm_100 half 128 64 64 4 2 202
    leaf_fwd sm_100 half 256 64 64 8 2 190
    leaf_fwd sm_100 float 64 64 64 8 2 189
    leaf_fwd gfx942 half 64 64 64 4 1 199
    leaf_fwd gfx942 half 128 64 64 4 1 328
    leaf_fwd gfx942 half 256 64 64 4 2 505
    leaf_fwd gfx942 float 64 64 64 4 2 208
    leaf_fwd gfx942 float 128 64 64 4 2 329
    leaf_dq sm_80 half 64 64 64 4 2 213
    leaf_dq sm_80 half 128 64 64 8 2 182
    leaf_dq sm_80 half 256 64 16 8 1 255
    leaf_dq sm_80 float 64 32 32 4 1 178
    leaf_dq sm_90 half 64 64 64 4 2 138
    leaf_dq sm_90 half 128 64 64 4 2 236
    leaf_dq sm_90 half 256 32 64 8 2 162
    leaf_dq sm_90 float 64 64 64 8 2 255
    leaf_dq sm_100 half 64 64 64 8 2 99
    leaf_dq sm_100 half 128 64 64 4 2 210
    leaf_dq sm_100 half 256 64 64 8 2 251
    leaf_dq sm_100 float 64 64 64 8 2 242
    leaf_dq gfx942 half 64 64 64 4 1 256
    leaf_dq gfx942 half 128 64 64 4 1 418
    leaf_dq gfx942 half 256 64 32 4 1 511
    leaf_dq gfx942 float 64 64 64 4 2 330
    leaf_dq gfx942 float 128 64 32 4 2 413
    leaf_dkv sm_80 half 64 64 64 8 2 255
    leaf_dkv sm_80 half 128 64 64 8 1 192
    leaf_dkv sm_80 half 256 32 32 8 2 210
    leaf_dkv sm_80 float 64 32 32 8 2 221
    leaf_dkv sm_90 half 64 64 64 4 2 212
    leaf_dkv sm_90 half 128 64 64 8 2 238
    leaf_dkv sm_90 half 256 64 32 8 2 210
    leaf_dkv sm_90 float 64 32 64 8 2 255
    leaf_dkv sm_90 float 128 16 16 4 2 255
    leaf_dkv sm_100 half 64 64 64 4 2 135
    leaf_dkv sm_100 half 128 64 64 4 2 151
    leaf_dkv sm_100 half 256 32 64 4 2 208
    leaf_dkv sm_100 float 64 32 64 8 2 248
    leaf_dkv gfx942 half 64 64 64 4 1 349
    leaf_dkv gfx942 half 128 64 64 4 1 505
    leaf_dkv gfx942 half 256 32 32 4 1 480
    leaf_dkv gfx942 float 64 64 64 4 1 497
    leaf_dkv gfx942 float 128 32 32 4 1 451
    bh_fwd sm_80 half 64 64 64 4 2 255
    bh_fwd sm_80 half 128 64 64 8 2 178
    bh_fwd sm_80 half 256 64 32 8 1 254
    bh_fwd sm_80 float 64 64 16 8 2 255
    bh_fwd sm_90 half 64 64 64 4 2 193
    bh_fwd sm_90 half 128 64 64 8 2 201
    bh_fwd sm_90 half 256 64 16 8 2 255
    bh_fwd sm_90 float 64 64 32 4 2 255
    bh_fwd sm_100 half 64 64 64 4 2 210
    bh_fwd sm_100 half 128 64 64 8 2 182
    bh_fwd sm_100 half 256 64 64 8 2 201
    bh_fwd sm_100 float 64 64 64 8 2 255
    bh_fwd gfx942 half 64 64 64 4 1 236
    bh_fwd gfx942 half 128 64 64 4 1 333
    bh_fwd gfx942 half 256 64 32 4 2 415
    bh_fwd gfx942 float 64 64 64 4 2 334
    bh_fwd gfx942 float 128 64 64 4 1 479
    bh_fwd_few sm_80 half 64 16 64 4 2 128
    bh_fwd_few sm_80 half 128 16 64 4 2 148
    bh_fwd_few sm_80 half 256 16 64 4 2 255
    bh_fwd_few sm_80 float 64 16 64 8 2 255
    bh_fwd_few sm_90 half 64 16 64 4 2 114
    bh_fwd_few sm_90 half 128 16 64 4 2 143
    bh_fwd_few sm_90 half 256 16 64 8 2 146
    bh_fwd_few sm_90 float 64 16 64 8 2 255
    bh_fwd_few sm_100 half 64 16 64 8 2 86
    bh_fwd_few sm_100 half 128 16 64 4 2 143
    bh_fwd_few sm_100 half 256 16 64 4 2 193
    bh_fwd_few sm_100 float 64 16 64 8 2 253
    bh_fwd_few gfx942 half 64 16 64 4 1 165
    bh_fwd_few gfx942 half 128 16 64 4 1 219
    bh_fwd_few gfx942 half 256 16 64 4 1 361
    bh_fwd_few gfx942 float 64 16 64 4 2 255
    bh_fwd_few gfx942 float 128 16 64 4 2 407
    bh_dq sm_80 half 64 64 32 4 2 255
    bh_dq sm_80 half 128 64 64 8 1 242
    bh_dq sm_80 half 256 32 32 8 1 188
    bh_dq sm_90 half 64 64 64 4 2 225
    bh_dq sm_90 half 128 64 32 8 2 228
    bh_dq sm_90 half 256 32 32 8 1 196
    bh_dq sm_100 half 64 64 64 4 2 166
    bh_dq sm_100 half 128 64 64 8 2 163
    bh_dq sm_100 half 256 64 32 8 2 249
    bh_dq sm_100 float 64 64 32 8 2 242
    bh_dq gfx942 half 64 64 64 4 1 255
    bh_dq gfx942 half 128 64 64 4 1 455
    bh_dq gfx942 half 256 32 32 4 1 417
    bh_dq gfx942 float 64 64 64 4 2 487
    bh_dq gfx942 float 128 32 32 4 1 364
    bh_dq_few sm_80 half 64 16 64 4 2 128
    bh_dq_few sm_80 half 128 16 64 8 2 170
    bh_dq_few sm_80 half 256 16 64 8 1 180
    bh_dq_few sm_90 half 64 16 64 4 2 140
    bh_dq_few sm_90 half 128 16 64 4 2 189
    bh_dq_few sm_90 half 256 16 64 8 2 182
    bh_dq_few sm_100 half 64 16 64 4 2 138
    bh_dq_few sm_100 half 128 16 64 4 2 180
    bh_dq_few sm_100 half 256 16 64 8 2 180
    bh_dq_few gfx942 half 64 16 64 4 1 187
    bh_dq_few gfx942 half 128 16 64 4 1 255
    bh_dq_few gfx942 half 256 16 32 4 2 370
    bh_dq_few gfx942 float 64 16 64 4 2 345
    bh_dq_few gfx942 float 128 16 64 4 1 422
    bh_dkv sm_80 half 64 32 64 4 2 241
    bh_dkv sm_80 half 128 64 64 8 1 219
    bh_dkv sm_80 half 256 32 32 8 2 253
    bh_dkv sm_80 float 64 32 32 8 2 255
    bh_dkv sm_90 half 64 64 64 8 2 241
    bh_dkv sm_90 half 128 32 64 8 2 235
    bh_dkv sm_90 half 256 32 32 8 2 250
    bh_dkv sm_90 float 64 32 64 8 1 255
    bh_dkv sm_100 half 64 64 64 4 2 254
    bh_dkv sm_100 half 128 64 64 8 1 155
    bh_dkv sm_100 half 256 32 32 8 2 250
    bh_dkv sm_100 float 64 32 64 8 1 246
    bh_dkv gfx942 half 64 64 64 4 1 280
    bh_dkv gfx942 half 128 64 64 4 1 446
    bh_dkv gfx942 half 256 32 32 4 1 460
    bh_dkv gfx942 float 64 64 64 4 1 392
    bh_dkv gfx942 float 128 32 32 4 1 405
    bh_far_dkv sm_80 half 64 64 0 4 2 126
    bh_far_dkv sm_80 half 128 64 0 4 2 186
    bh_far_dkv sm_80 half 256 32 0 4 2 210
    bh_far_dkv sm_80 float 64 64 0 8 2 204
    bh_far_dkv sm_90 half 64 64 0 4 2 124
    bh_far_dkv sm_90 half 128 64 0 4 2 168
    bh_far_dkv sm_90 half 256 64 0 8 2 176
    bh_far_dkv sm_90 float 64 64 0 8 2 204
    bh_far_dkv sm_90 float 128 32 0 8 2 234
    bh_far_dkv sm_100 half 64 64 0 8 2 100
    bh_far_dkv sm_100 half 128 64 0 4 2 174
    bh_far_dkv sm_100 half 256 64 0 8 2 170
    bh_far_dkv sm_100 float 64 64 0 8 2 200
    bh_far_dkv gfx942 half 64 64 0 4 1 172
    bh_far_dkv gfx942 half 128 64 0 4 1 280
    bh_far_dkv gfx942 half 256 32 0 4 2 494
    bh_far_dkv gfx942 float 64 64 0 4 2 442
    bh_far_dkv gfx942 float 128 64 0 4 1 482
    bh_fwd_pool sm_80 half 64 64 64 4 2 255
    bh_fwd_pool sm_80 half 128 32 64 8 2 222
    bh_fwd_pool sm_90 half 64 64 64 4 2 185
    bh_fwd_pool sm_90 half 128 64 64 8 2 191
    bh_fwd_pool sm_100 half 64 64 64 4 2 245
    bh_fwd_pool sm_100 half 128 64 64 8 2 188
    bh_fwd_pool gfx942 half 64 64 64 4 1 236
    bh_fwd_pool gfx942 half 128 64 64 4 1 335
    bh_fwd_few_pool sm_80 half 64 16 64 4 2 128
    bh_fwd_few_pool sm_80 half 128 16 64 8 2 160
    bh_fwd_few_pool sm_90 half 64 16 64 4 2 144
    bh_fwd_few_pool sm_90 half 128 16 64 4 2 178
    bh_fwd_few_pool sm_100 half 64 16 64 8 2 94
    bh_fwd_few_pool sm_100 half 128 16 64 4 2 176
    bh_fwd_few_pool gfx942 half 64 16 64 4 1 165
    bh_fwd_few_pool gfx942 half 128 16 64 4 1 223
    bh_dq_pool sm_80 half 64 64 32 4 2 255
    bh_dq_pool sm_80 half 128 32 64 8 2 255
    bh_dq_pool sm_90 half 64 64 64 4 2 248
    bh_dq_pool sm_90 half 128 64 32 8 2 225
    bh_dq_pool sm_100 half 64 64 64 4 2 244
    bh_dq_pool sm_100 half 128 64 64 8 2 247
    bh_dq_pool gfx942 half 64 64 64 4 1 256
    bh_dq_pool gfx942 half 128 64 64 4 1 476
    bh_dq_few_pool sm_80 half 64 16 64 4 2 128
    bh_dq_few_pool sm_80 half 128 16 64 8 2 176
    bh_dq_few_pool sm_90 half 64 16 64 8 2 102
    bh_dq_few_pool sm_90 half 128 16 64 8 2 178
    bh_dq_few_pool sm_100 half 64 16 64 4 2 135
    bh_dq_few_pool sm_100 half 128 16 64 4 2 188
    bh_dq_few_pool gfx942 half 64 16 64 4 1 199
    bh_dq_few_pool gfx942 half 128 16 64 4 1 284
    bh_far_dkv_pool sm_80 half 64 64 0 4 2 128
    bh_far_dkv_pool sm_80 half 128 64 0 4 2 168
    bh_far_dkv_pool sm_90 half 64 64 0 4 2 148
    bh_far_dkv_pool sm_90 half 128 64 0 4 2 168
    bh_far_dkv_pool sm_100 half 64 64 0 8 2 100
    bh_far_dkv_pool sm_100 half 128 64 0 4 2 171
    bh_far_dkv_pool gfx942 half 64 64 0 4 1 176
    bh_far_dkv_pool gfx942 half 128 64 0 4 1 283
"""

# Where the search found none: tiles of 16 spill already, with 4 and 8 warps, and are what serves.
_NONE = """
    leaf_fwd sm_90 float 256
    leaf_dq sm_90 float 128 256
    leaf_dkv sm_90 float 256
    bh_fwd sm_90 float 128 256
    bh_fwd_few sm_90 float 128 256
    bh_dq sm_80 float 64
    bh_dq sm_90 float 64 128 256
    bh_dq_few sm_80 float 64
    bh_dq_few sm_90 float 64 128 256
    bh_dq_few sm_100 float 64
    bh_dkv sm_90 float 128 256
    bh_far_dkv sm_90 float 256
"""


@dataclass(frozen=True)
class Config:
    """One configuration.

    Args:
        rows: Queries of a tile, ``BM``.
        columns: Keys of a tile, ``BN``; 0 where the kernel has no such constant.
        warps: Of a program.
        stages: Of the software pipeline.
        registers: Of a thread, when the row was found; a compiler may need less, not more.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    registers: int = 255

    @property
    def tiles(self) -> dict[str, int]:
        """The constants of the kernel."""
        return {"BM": self.rows, "BN": self.columns} if self.columns else {"BM": self.rows}

    @property
    def launch(self) -> dict[str, int]:
        """As keywords of a launch."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}


@cache
def configs() -> dict[tuple[str, str, str, int], Config]:
    """All rows by kernel, architecture, ``"half"`` or ``"float"``, and channels."""
    rows = (row.split() for row in _ROWS.strip().splitlines())
    return {(name, arch, kind, int(d)): Config(*map(int, sizes)) for name, arch, kind, d, *sizes in rows}


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


def chosen(kernel: str, query: Tensor, value: Tensor) -> Config:
    """The configuration of a kernel for tensors of one type on one device.

    Where the search found none, small tiles: they may spill, and are right all the same.

    Args:
        kernel: Name of the kernel.
        query: ``(..., d)``.
        value: ``(..., e)``.
    """
    small = Config(16, 0 if kernel.startswith("bh_far_dkv") else 16)
    if not query.is_cuda:
        # The interpreter runs tile by tile; tests are to see several.
        return small
    kind = "float" if query.dtype == torch.float32 else "half"
    widest = max(64, padded(max(query.shape[-1], value.shape[-1])))
    return configs().get((kernel, _architecture(query.device), kind, widest), small)
