"""One call of fast multipole attention in Triton: its sizes, its tables, and the arguments that kernels share.

A call serves sequences, or packed documents in their place: their lengths, levels and rows then stand in a table, and
what follows from a length (the grid of a launch) follows from the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan, level_count, make_plan
from fastattn_compile.kernels.aten.fma_pool import combine_levels, combine_levels_backward
from fastattn_compile.kernels.gpu.fma_pool import pool_means
from fastattn_compile.kernels.gpu.launch import channels, padded, precision, step

# Blocks of queries of one walk of fma_far, as a power of two.
LOG2_WALK = 4


@dataclass(frozen=True)
class Tables:
    """What is pooled and what a row weighs, for every sequence or for all alike.

    Args:
        counts: ``(b or 1, rows)`` float32, tokens that a row stands for.
        mass: ``(b or 1, rows)`` float32, log2 of what a row weighs.
        fine: ``(b, n)`` uint8, tokens that are real; ``None`` for all.
        pooled: ``(b or 1, n)`` uint8, tokens that are pooled; ``None`` for all.
        sink: ``(b or 1, sinks)`` int32 positions of the sinks, -1 for none.
    """

    counts: Tensor
    mass: Tensor
    fine: Tensor | None
    pooled: Tensor | None
    sink: Tensor | None


@dataclass(frozen=True)
class Documents:
    """Packed documents, in order.

    Args:
        table: ``(k, 6)`` int32: sequence, first token, length, levels, first row and first run of ``fma_far`` among
            those of all.
        tables: Of the documents in place of the sequences. ``counts`` and ``mass`` are ``(1, rows of all)``, ``pooled``
            is ``(b, n)``, ``sink`` holds positions in a document.
        longest: Tokens of the longest document.
        levels: Its levels.
        runs: Of all.
    """

    table: Tensor
    tables: Tables
    longest: int
    levels: int
    runs: int


def make_tables(real: Tensor, all_real: bool, pattern: Pattern) -> Tables:
    """The tables of sequences.

    Args:
        real: ``(b or 1, n)`` boolean, tokens that are there.
        all_real: Whether all are.
        pattern: Who meets whom.
    """
    batch, length = real.shape
    levels, m = level_count(length, pattern.block), pattern.block
    sinks = min(pattern.sinks, length)
    sink, pooled = None, None if all_real else real
    if sinks:
        # Real tokens first, in order: the first of them are the sinks.
        place = torch.sort(~real, dim=1, stable=True).indices[:, :sinks]
        sink = torch.where(real.gather(1, place), place, -1).to(torch.int32)
        pooled = real.scatter(1, place, False)
    cells = pattern.rank << (levels + 1)
    taken = F.pad((real if pooled is None else pooled).float(), (0, (m << (levels + 1)) - length))
    by_level = [taken.view(batch, cells, -1).sum(-1)]
    for _ in range(levels - 1):
        by_level.append(by_level[-1].view(batch, -1, 2).sum(-1))
    counts = torch.cat(by_level, 1)
    if pattern.learned:
        counts = (
            counts.view(batch, -1, pattern.rank)
            .mean(-1, keepdim=True)
            .expand(-1, -1, pattern.rank)
            .flatten(1)
        )
    counts = counts.contiguous()
    mass = (counts if pattern.weighted else (counts > 0).float()).log2()
    # Bytes, one a token: a kernel reads no booleans.
    fine, pooled = (None if x is None else x.to(torch.uint8) for x in (None if all_real else real, pooled))
    return Tables(counts, mass, fine, pooled, sink)


@lru_cache(maxsize=16)
def _tables_without_padding(length: int, pattern: Pattern, device: torch.device) -> Tables:
    return make_tables(torch.ones(1, length, dtype=torch.bool, device=device), True, pattern)


class Call:
    """One attention: its sizes, tables, and the arguments that kernels share.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, n, d)``.
        value: ``(b, g, n, e)``.
        scale: Factor on the scores.
        pattern: Who meets whom.
        key_padding: ``(b, n)`` boolean, true where a token is real; not with documents.
        documents: Those that take the place of the sequences.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        pattern: Pattern,
        key_padding: Tensor | None = None,
        documents: Documents | None = None,
    ) -> None:
        self.query, self.key, self.value, self.pattern, self.scale = query, key, value, pattern, scale
        self.batch, self.kv_heads, self.length = key.shape[:3]
        self.group = query.shape[1] // self.kv_heads
        self.table = None if documents is None else documents.table
        if documents is not None:
            self.units, self.longest, self.levels = len(documents.table), documents.longest, documents.levels
            self.tables, self.runs = documents.tables, documents.runs
            self.log2_walk = LOG2_WALK
        else:
            self.units, self.longest = self.batch, self.length
            self.levels = level_count(self.length, pattern.block)
            self.tables = (
                _tables_without_padding(self.length, pattern, query.device)
                if key_padding is None
                else make_tables(key_padding, False, pattern)
            )
            self.log2_walk = min(LOG2_WALK, self.levels)
            self.runs = run_count(self.levels, self.log2_walk)
        self.units *= self.kv_heads
        self.blocks, self.nb = -(-self.longest // pattern.block), 2 << self.levels
        self.window = (
            -1 if pattern.left is None else pattern.left,
            -1 if pattern.causal or pattern.right is None else pattern.right,
        )
        self.sizes = {
            **channels(D=query.shape[3], E=value.shape[3]), "G": self.group, "BLOCK": pattern.block,
            "CAUSAL": pattern.causal, "BANDED": pattern.banded, "PRECISION": precision(query.dtype),
        }  # fmt: skip
        self.of_rows = {"RANK": pattern.rank, "LEARNED": pattern.learned}
        sinks = 0 if self.tables.sink is None else self.tables.sink.shape[1]
        self.of_sinks = {"SINKS": sinks, "BS": padded(sinks)}
        self.of_far = {**self.of_rows, "LOG2S": self.log2_walk}
        self.padded = {"PADDED": self.tables.fine is not None}
        self.packed = {"PACKED": documents is not None}

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of query, key and value."""
        return *self.query.stride(), *self.key.stride(), *self.value.stride()

    @property
    def steps(self) -> tuple[int, int, int]:
        """Steps between sequences (or documents) of what rows weigh, of real tokens, of sinks."""
        tables = self.tables
        return step(tables.mass), step(tables.fine), step(tables.sink)

    def tiles(self, rows: int) -> int:
        """Programs of ``rows`` packed queries that walk one unit."""
        pairs = -(-self.blocks // 2)
        return pairs * -(-2 * self.pattern.block * self.group // rows)

    def pool(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The pooled rows of keys or values."""
        if not self.pattern.learned:
            tables, pattern = self.tables, self.pattern
            sizes = self.nb, self.levels, pattern.rank
            return pool_means(x, tables.pooled, tables.counts, *sizes, pattern.block, self.table)
        made = x.new_empty(self.batch, self.kv_heads, self.tables.counts.shape[1], x.shape[3])
        for sequences, tokens, factor in self._learned(x):
            rows = torch.empty(tokens.shape[0], made.shape[2], made.shape[3], device=x.device)
            combine_levels(tokens, rows, factor, weights, self._plan, self.pattern)
            made[sequences] = rows.unflatten(0, (-1, self.kv_heads)).to(x.dtype)
        return made

    def learned_backward(
        self, x: Tensor, grad_rows: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the tokens ``(b, g, n, c)`` and of the weights, from those of learned rows; float32."""
        grads = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
        made = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for sequences, tokens, factor in self._learned(x):
            grad_tokens = torch.zeros_like(tokens)
            combine_levels_backward(
                tokens,
                grad_rows[sequences].flatten(0, 1),
                factor,
                weights,
                grad_tokens,
                grads,
                self._plan,
                self.pattern,
            )
            made[sequences] = grad_tokens[:, : self.length].unflatten(0, (-1, self.kv_heads))
        if self.tables.pooled is not None:
            made *= self.tables.pooled[:, None, :, None]
        return made, grads

    @property
    def _plan(self) -> Plan:
        return make_plan(self.length, self.pattern, self.query.device)

    def _learned(self, x: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        """Sequences of one table: which, their tokens as ``combine_levels`` takes them, what rows are multiplied by."""
        pattern, pooled, found = self.pattern, self.tables.pooled, []
        width = torch.cat([
            torch.full((pattern.rank * self.nb >> level,), pattern.block << level, device=x.device)
            for level in range(self.levels)
        ])  # fmt: skip
        each = self.batch if self.tables.counts.shape[0] == 1 else 1
        for first in range(0, self.batch, each):
            tokens = x[first : first + each].float()
            if pooled is not None:
                of_table = pooled[first % pooled.shape[0] :][:1, None, :, None]
                tokens = tokens.masked_fill(of_table == 0, 0)
            tokens = F.pad(tokens.flatten(0, 1), (0, 0, 0, self.blocks * pattern.block - self.length))
            counts = self.tables.counts[first % self.tables.counts.shape[0]]
            found.append((slice(first, first + each), tokens, width / (counts * pattern.rank).clamp(min=1)))
        return found


def run_count(levels: int, log2_walk: int) -> int:
    """Runs of ``fma_far``: where those of the level after the last would begin (``fma_gradients.first_run``)."""
    return sum((2 << levels) >> min(level + 1, log2_walk) for level in range(levels))
