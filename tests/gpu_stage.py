"""How Triton kernels are tested: on a GPU, or in the interpreter, or as machine code. A process does one of the three.

``TRITON_INTERPRET=1`` is read when a kernel is defined, so it must be set before the first import of one.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

INTERPRETED = bool(triton.knobs.runtime.interpret)
RUNS = INTERPRETED or torch.cuda.is_available()


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
