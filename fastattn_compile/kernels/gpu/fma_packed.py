"""Packed documents by fast multipole attention in Triton, forward: each document in place, none is copied or padded.

The documents of all sequences take the place of the sequences: a table of them tells a program where its document stands,
how long it is and where its pooled rows are, which all stand in one list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.gpu.fma_attend import fma_fwd
from fastattn_compile.kernels.gpu.fma_configs import chosen
from fastattn_compile.kernels.gpu.fma_pool import pool_means
from fastattn_compile.kernels.gpu.launch import LOG2_E, channels, padded, precision, tensor_obstacle

MOST_SINKS = 64


@dataclass(frozen=True)
class Documents:
    """The documents of some sequences, in order, and what their rows weigh.

    Args:
        table: ``(k, 5)`` int32: sequence, first token, length, levels, first row among those of all.
        counts: ``(1, rows)`` float32, tokens that a row stands for.
        mass: ``(1, rows)`` float32, log2 of what a row weighs.
        pooled: ``(b, n)`` uint8, the tokens that are no sinks.
        sink: ``(k, sinks)`` int32, positions in the document, -1 for none.
        longest: Tokens of the longest document.
        levels: Its levels.
    """

    table: Tensor
    counts: Tensor
    mass: Tensor
    pooled: Tensor
    sink: Tensor
    longest: int
    levels: int


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
    longest, most, total = torch.stack([length.max(), levels.max(), rows.sum()]).tolist()
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
    sink = torch.arange(pattern.sinks, device=device, dtype=torch.int32).expand(len(length), -1)
    sink = sink.masked_fill(sink >= length[:, None], -1).contiguous()
    table = torch.stack([opening // n, opening % n, length, levels, base], 1).int()
    pooled = (place >= pattern.sinks).to(torch.uint8).view(batch, n)
    return Documents(table, counts, mass, pooled, sink, longest, most)


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
    documents, config = find_documents(segments, pattern), chosen("fma_fwd", query, value)
    _, kv_heads, n, d = key.shape
    group, nb, sinks = query.shape[1] // kv_heads, 2 << documents.levels, pattern.sinks
    made = (
        documents.pooled,
        documents.counts,
        nb,
        documents.levels,
        pattern.rank,
        pattern.block,
        documents.table,
    )
    rows_k, rows_v = pool_means(key, *made), pool_means(value, *made)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(query.shape[:3], dtype=torch.float32)
    pairs = -(-documents.longest // (2 * pattern.block))
    left = -1 if pattern.left is None else pattern.left
    right = -1 if pattern.causal or pattern.right is None else pattern.right
    fma_fwd[(pairs * -(-2 * pattern.block * group // config.rows), len(documents.table) * kv_heads)](
        query, key, value, rows_k, rows_v, documents.mass, None, documents.sink, out, log_sum_exp, documents.table,
        kv_heads, n, 0, 0, documents.counts.shape[1], *query.stride(), *key.stride(), *value.stride(), 0, 0, sinks, left,
        right, scale * LOG2_E, **channels(D=d, E=value.shape[3]), G=group, BLOCK=pattern.block, RANK=pattern.rank,
        SINKS=sinks, BS=padded(sinks), CAUSAL=pattern.causal, BANDED=pattern.banded, PADDED=False, LEARNED=False,
        PACKED=True, PRECISION=precision(query.dtype), **config.launch,
    )  # fmt: skip
    return out, log_sum_exp


def obstacle(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> str:
    """Why this form cannot serve a call; empty when it can."""
    if pattern.learned:
        return "learned rows are combined by ATen, sequence by sequence"
    if pattern.rotary is not None:
        return "it pools keys as they come, with their rotary embedding"
    if pattern.sinks > MOST_SINKS:
        return f"{pattern.sinks} sinks, a tile holds up to {MOST_SINKS}"
    return tensor_obstacle(query, key, value)
