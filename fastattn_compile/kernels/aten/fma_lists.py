"""What the blocks of one sequence meet in fast multipole attention, padding and sinks taken into account."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan, make_plan, sink_slots_met
from fastattn_compile.kernels.aten.fma_pool import row_counts
from fastattn_compile.kernels.rotary import Turn


@dataclass(frozen=True)
class Lists:
    """What the blocks of one sequence meet, padding and sinks taken into account.

    Args:
        index: ``(blocks, slots)`` int32, rows of a head's array.
        bias: ``(blocks, slots)`` logarithm of what a slot weighs, -inf where it is not met.
        first: ``(blocks, slots)`` int32, first position a slot covers.
        last: ``(blocks, slots)`` int32, last position a slot covers.
        counts: ``(pooled rows,)`` tokens a pooled row stands for.
        sinks: ``(s,)`` positions of the sinks.
        padding: ``(n,)`` boolean, true where no token is; ``None`` when every token is real.
        tokens: What the rotary embedding did to keys, ``(blocks * block, pairs)``; nothing when it is left alone.
        centres: What it does to pooled keys, at the mean position of what they stand for, ``(pooled rows, pairs)``.
    """

    index: Tensor
    bias: Tensor
    first: Tensor
    last: Tensor
    counts: Tensor
    sinks: Tensor
    padding: Tensor | None
    tokens: Turn
    centres: Turn


def make_lists(plan: Plan, pattern: Pattern, padding: Tensor | None, dtype: torch.dtype) -> Lists:
    """The lists of one sequence.

    Args:
        plan: The plan of its length.
        pattern: The pattern.
        padding: ``(n,)`` boolean, true where no token is.
        dtype: The work type.
    """
    device, m = plan.index.device, pattern.block
    index, met, first, last = plan.index, plan.met, plan.first, plan.last
    sinks = torch.arange(pattern.sinks, device=device)
    taken = torch.zeros(plan.blocks * m, dtype=dtype, device=device)
    taken[: plan.length] = 1
    if padding is not None:
        taken[: plan.length].masked_fill_(padding, 0)
        # Real tokens first, in order: the first of them are the sinks.
        sinks = torch.sort(padding, stable=True).indices[: pattern.sinks]
        slots = slice(pattern.near, pattern.near + pattern.sinks)
        index, met, first, last = (x.clone() for x in (index, met, first, last))
        met[:, slots] = sink_slots_met(sinks, torch.arange(plan.blocks, device=device)[:, None], pattern)
        index[:, slots] = torch.where(met[:, slots], sinks + m, 0).to(index.dtype)
        first[:, slots] = last[:, slots] = sinks.to(first.dtype)
    fine = torch.full((plan.fine_rows,), -torch.inf, dtype=dtype, device=device)
    fine[m : m + taken.shape[0]] = taken.log()
    taken[sinks] = 0
    counts = row_counts(taken, plan, pattern)
    mass = counts if pattern.weighted else (counts > 0).to(dtype)
    bias = torch.where(met, torch.cat([fine, mass.log().repeat(pattern.sides)])[index], -torch.inf)
    return Lists(index, bias, first, last, counts, sinks, padding, *_turns(taken, padding, plan, pattern))


def _turns(taken: Tensor, padding: Tensor | None, plan: Plan, pattern: Pattern) -> tuple[Turn, Turn]:
    """The rotary embedding at the positions of tokens, counted over real ones, and at those of pooled rows."""
    if pattern.rotary is None:
        return Turn(), Turn()
    place = torch.arange(len(taken), dtype=torch.float64, device=taken.device)
    if padding is not None:
        place[: plan.length] = ((~padding).cumsum(0) - 1).clamp(min=0)
    counts, sums = (row_counts(x, plan, pattern) for x in (taken.double(), taken * place))
    centres = sums / torch.where(counts > 0, counts, 1)
    return pattern.rotary.at(place, taken.dtype), pattern.rotary.at(centres, taken.dtype)


@lru_cache(maxsize=16)
def lists_without_padding(length: int, pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Lists:
    """The lists of a sequence of real tokens only; shared by all sequences, heads and layers.

    Args:
        length: Tokens.
        pattern: The pattern.
        device: Where the tables lie.
        dtype: The work type.
    """
    return make_lists(make_plan(length, pattern, device), pattern, None, dtype)
