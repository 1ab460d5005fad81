"""Packed documents by fast multipole attention in Triton: each document in place, none is copied or padded.

The documents of all sequences take the place of the sequences: a table of them tells a program where its document stands,
how long it is and where its pooled rows are, which all stand in one list. The kernels are those of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.gpu import fma
from fastattn_compile.kernels.gpu.fma_call import LOG2_WALK, Call, Documents, Tables, run_count
from fastattn_compile.kernels.gpu.launch import tensor_obstacle

MOST_SINKS = 64


def find_documents(segments: Tensor, pattern: Pattern) -> Documents:
    """The documents that stand side by side, and their tables.

    Args:
        segments: ``(b, n)`` integers, one for the tokens of a document and another for its neighbours'.
        pattern: Who meets whom.
    """
    (batch, n), m, rank, device = segments.shape, pattern.block, pattern.rank, segments.device
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    opening = begins.flatten().nonzero().flatten()
    length = torch.diff(opening, append=opening.new_full((1,), batch * n))
    blocks, bit = (length + m - 1) // m, torch.arange(32, device=device)
    levels = (((blocks - 1)[:, None] >> bit > 0).sum(1) - 1).clamp(min=0)
    nb = 2 << levels
    rows = 2 * rank * (nb - (nb >> levels))
    base = rows.cumsum(0) - rows
    runs = torch.tensor([run_count(at, LOG2_WALK) for at in range(31)], device=device)[levels]
    of_all = torch.stack([length.max(), levels.max(), rows.sum(), runs.sum()])
    longest, most, total, all_runs = of_all.tolist()
    # Of every row its document, level and number, then the tokens it covers.
    owner = torch.repeat_interleave(torch.arange(len(length), device=device), rows, output_size=total)
    inside = torch.arange(total, device=device) - base[owner]
    starts = 2 * rank * (nb[owner, None] - (nb[owner, None] >> torch.arange(most + 1, device=device)))
    level = (inside[:, None] >= starts).sum(1) - 1
    cover = (m << level) // rank
    first = (inside - starts.gather(1, level[:, None]).squeeze(1)) * cover
    last = torch.minimum(first + cover, length[owner])
    counts = (last - first.clamp(min=pattern.sinks)).clamp(min=0).float()[None]
    mass = (counts if pattern.weighted else (counts > 0).float()).log2()
    place = torch.arange(batch * n, device=device)
    place = place - torch.where(begins.flatten(), place, 0).cummax(0).values
    sink = None
    if pattern.sinks:
        sink = torch.arange(pattern.sinks, device=device, dtype=torch.int32).expand(len(length), -1)
        sink = sink.masked_fill(sink >= length[:, None], -1).contiguous()
    table = torch.stack([opening // n, opening % n, length, levels, base, runs.cumsum(0) - runs], 1).int()
    pooled = (place >= pattern.sinks).to(torch.uint8).view(batch, n)
    tables = Tables(counts, mass, None, pooled, sink)
    return Documents(table, tables, longest, most, all_runs)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, segments: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of every document by itself.

    Args:
        query: ``(b, h, n, d)``, float16, bfloat16 or float32, any strides.
        key: ``(b, g, n, d)``, same type.
        value: ``(b, g, n, e)``, same type.
        scale: Factor on the scores.
        pattern: Who meets whom in a document.
        segments: ``(b, n)`` integers, one for the tokens of a document, which stand side by side.

    Returns:
        Output ``(b, h, n, e)``; log-sum-exp ``(b, h, n)`` float32.
    """
    documents = find_documents(segments, pattern)
    return fma.attend(Call(query, key, value, scale, pattern, documents=documents))


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, segments: Tensor, out: Tensor,
    log_sum_exp: Tensor, grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``forward``, deterministic.

    Args:
        query: As in ``forward``.
        key: As in ``forward``.
        value: As in ``forward``.
        scale: As in ``forward``.
        pattern: As in ``forward``.
        segments: As in ``forward``.
        out: Output of ``forward``.
        log_sum_exp: Log-sum-exp of ``forward``.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.

    Returns:
        Gradients of query, key and value.
    """
    call = Call(query, key, value, scale, pattern, documents=find_documents(segments, pattern))
    return fma.differentiate(call, out, log_sum_exp, grad_out, grad_log_sum_exp)[:3]


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why this form cannot serve a call; empty when it can."""
    if pattern.learned:
        return "learned rows are combined by ATen, sequence by sequence"
    if pattern.rotary is not None:
        return "it pools keys as they come, with their rotary embedding"
    if pattern.sinks > MOST_SINKS:
        return f"{pattern.sinks} sinks, a tile holds up to {MOST_SINKS}"
    return tensor_obstacle(query, key, value)
