"""How Triton kernels are tested: on a GPU, or in the interpreter, or as machine code. A process does one of the three.

``TRITON_INTERPRET=1`` is read when a kernel is defined, so it must be set before the first import of one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastattn_compile.kernels.gpu.aot import Report

INTERPRETED = bool(triton.knobs.runtime.interpret)
RUNS = INTERPRETED or torch.cuda.is_available()
# Registers are recorded of the compiler that PyTorch 2.13 comes with. The one of PyTorch 2.11 needs more, and spills these
# few bytes, where tiles without a spill would read queries twice or leave Hopper's instruction.
OLDER = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7)
_SPILLED_BY_OLDER = {
    "fma_far-sm_90-half-128": 100, "fma_far-sm_90-half-128-packed": 124, "fma_far-sm_90-half-64-packed": 12,
    "bh_dkv-sm_90-half-128": 8, "bh_dq_few_pool-sm_90-half-64": 4, "tf_decode-sm_90": 16,
}  # fmt: skip


def but_for_known_spills(report: Report, row: str) -> Report:
    """A report without the spill that is known of the older compiler for a row."""
    known = _SPILLED_BY_OLDER.get(row, 0) if OLDER else 0
    return dataclasses.replace(report, spilled=0, stack=0) if report.spilled <= known else report


def _wide(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle as float32; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _narrow(data: np.ndarray) -> TensorHandle:
    """float32 rounded to bfloat16, to the nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(data.astype(np.float32))).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def mend_bfloat16() -> None:
    """Makes bfloat16 work in the interpreter, which computes with its bit patterns (triton-lang/triton#11584)."""
    dot, cast, binary = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
    )

    def create_dot(self, a, b, *others):
        return dot(self, _wide(a), _wide(b), *others)

    def cast_impl(self, source, kind):
        if kind.scalar == tl.bfloat16:
            return _narrow(_wide(source).data)
        wide = _wide(source)
        return wide if kind.scalar == wide.dtype.scalar else cast(self, wide, kind)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        made = op(_wide(left).data, _wide(right).data)
        return TensorHandle(made, tl.int1) if made.dtype == bool else _narrow(made)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
