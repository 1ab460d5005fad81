"""What sinks got from the queries beyond their near field, brought to their own gradients."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.gpu.fma_rows import whose
from fastattn_compile.kernels.gpu.launch import LIGHT, padded, step

_CHANNELS = 64


@triton.jit(do_not_specialize=["length"])
def add_sinks(
    FOUND, SINK, TOTAL, DOCUMENT, heads, length, sink_b, C: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Adds ``FOUND`` ``(units, SINKS, C)`` to the rows of a unit's sinks in ``TOTAL`` ``(b, g, n, C)``."""
    unit, total = tl.program_id(0).to(tl.int64), length
    head = unit % heads
    number, batch, opening, _length, _nb, _levels, _base, _rows = whose(
        DOCUMENT, unit, heads, length, 0, 0, 0, PACKED
    )
    i, c = tl.arange(0, BS), tl.program_id(1) * BC + tl.arange(0, BC)
    key = tl.load(SINK + number * sink_b + i, mask=i < SINKS, other=-1)
    there = (key >= 0)[:, None] & (c < C)[None, :]
    at = TOTAL + ((batch * heads + head) * total + opening + key)[:, None] * C + c[None, :]
    found = tl.load(FOUND + (unit * SINKS + i)[:, None] * C + c[None, :], mask=there, other=0.0)
    sum_of_both = tl.load(at, mask=there, other=0.0).to(tl.float32) + found
    tl.store(at, sum_of_both.to(TOTAL.dtype.element_ty), mask=there)


def give_to_sinks(
    grads: Sequence[Tensor], parts: Sequence[Tensor], sink: Tensor, documents: Tensor | None = None
) -> None:
    """Adds, in place, what sinks got. They are rounded once more than others; in turn no gradient is kept in float32.

    Args:
        grads: Gradients of keys and of values, ``(b, g, n, c)`` contiguous.
        parts: Of each what the sinks got from each stretch of queries, ``(k, g, stretches, sinks, c)`` float32, of ``k``
            sequences or documents.
        sink: ``(k or 1, sinks)`` int32 positions in a sequence or a document, -1 for none.
        documents: ``(k, 6)`` int32 as ``fma_rows.document`` reads it.
    """
    for total, part in zip(grads, parts):
        _, heads, length, c = total.shape
        block = min(_CHANNELS, padded(c))
        found = part.sum(2)
        add_sinks[(found.shape[0] * heads, -(-c // block))](
            found, sink, total, documents, heads, length, step(sink), C=c, SINKS=sink.shape[1],
            PACKED=documents is not None, BC=block, BS=padded(sink.shape[1]), **LIGHT,
        )  # fmt: skip
