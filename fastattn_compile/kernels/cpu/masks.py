"""Reading masks in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn_compile.kernels.cpu.build import library, obstacle

# Queries whose seen keys are noted apart: threads share out a mask by them.
_STRETCH = 512


class _Arguments(ctypes.Structure):
    """``MaskArgs`` of ``masks.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("visible", "count", "first", "last", "seen")),
        *((name, ctypes.c_int64) for name in ("b", "n", "m", "stretches")),
        ("threads", ctypes.c_int32), ("spread", ctypes.c_void_p), ("pool", ctypes.c_void_p),
    )  # fmt: skip


def why_not(visible: Tensor) -> str:
    """Why C++ cannot read a mask, ``""`` when it can."""
    if visible.device.type != "cpu":
        return f"it runs on a CPU, the mask is on {visible.device.type}"
    return obstacle("masks")


def read(visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``kernels.masks.read``; the fields of its ``Rows``."""
    visible = visible.contiguous()
    batch, queries, keys = visible.shape
    count, first, last = (torch.empty(batch, queries, dtype=torch.int64) for _ in range(3))
    stretches = max(1, -(-queries // _STRETCH))
    seen = torch.empty(stretches, batch, keys, dtype=torch.bool)
    arguments = _Arguments(*(x.data_ptr() for x in (visible, count, first, last, seen)))
    arguments.b, arguments.n, arguments.m = visible.shape
    arguments.stretches, arguments.threads = stretches, torch.get_num_threads()
    library("masks").masks_read(ctypes.byref(arguments))
    return count, first, last, seen.any(0)
