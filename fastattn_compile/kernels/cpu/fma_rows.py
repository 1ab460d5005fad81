"""Pooled rows made before the C++ kernel of fast multipole attention: learned ones, and those without rotary embedding.

Channel by channel a learned basis is pooled in C++ too; one that mixes channels is a product of matrices, for ATen. Rows
stand as ``aten.fma_plan`` lays them out. ``R`` is their number, ``plan.offsets[-1]``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.fma_lists import Lists, lists_without_padding, make_lists
from fastattn_compile.kernels.aten.fma_plan import Pattern, Plan
from fastattn_compile.kernels.aten.fma_pool import (
    combine_levels,
    combine_levels_backward,
    row_gains,
    spread_levels,
    sum_levels,
    used_rows,
)
from fastattn_compile.kernels.cpu.arguments import TYPES, dense_rows
from fastattn_compile.kernels.cpu.build import library
from fastattn_compile.kernels.rotary import Turn


def lists_of(plan: Plan, pattern: Pattern, batch: int, key_padding: Tensor | None) -> list[Lists]:
    """The lists of every sequence."""
    if key_padding is None:
        device = plan.index.device
        return [lists_without_padding(plan.length, pattern, device, torch.float32)] * batch
    return [make_lists(plan, pattern, ~real, torch.float32) for real in key_padding]


class PooledRows:
    """Pooled rows of keys or values, and the way of their gradients back.

    Args:
        plan: The plan.
        pattern: The pattern; its rows are learned, or keys are pooled without their rotary embedding.
        lists: Of every sequence.
        weights: For a learned pattern weight and bias of every level, as ``combine_levels`` takes them.
        turned: They are keys, which are pooled without their rotary embedding where the pattern has one.
    """

    def __init__(
        self, plan: Plan, pattern: Pattern, lists: Sequence[Lists], weights: Sequence[Tensor], turned: bool
    ) -> None:  # fmt: skip
        self.plan, self.pattern, self.lists = plan, pattern, lists
        self.weights = [w.float().contiguous() for w in weights]
        self.turned = turned and pattern.rotary is not None
        self.by_channel = pattern.learned and not pattern.dense
        self.pooled = torch.ones(len(lists), plan.length, dtype=torch.bool)
        for pooled, one in zip(self.pooled, lists):
            if one.padding is not None:
                pooled.copy_(~one.padding)
            pooled[one.sinks] = False
        self.gains = torch.stack([row_gains(one.counts, plan, pattern) for one in lists])[:, None, :, None]

    def make(self, x: Tensor) -> Tensor:
        """The rows ``(b, g, R, c)`` of keys or values ``(b, g, n, c)``."""
        rows = torch.zeros(*x.shape[:2], self.plan.offsets[-1], x.shape[3])
        if self.by_channel:
            self._call(self._taken(x) if self.turned else x, rows)
            rows *= self.gains
            for level, bias in enumerate(self.weights[1 : 2 * self.plan.levels : 2]):
                rows[:, :, used_rows(level, self.plan, self.pattern)].unflatten(
                    2, (-1, self.pattern.rank)
                ).add_(bias.T)
        else:
            for tokens, into, gain, one in zip(self._padded(x), rows, self.gains, self.lists):
                if self.pattern.learned:
                    combine_levels(tokens, into, gain.flatten(), self.weights, self.plan, self.pattern)
                else:
                    sum_levels(tokens, into, self.plan, self.pattern)
                    into.div_(one.counts.clamp(min=1)[:, None])
        if self.turned:
            for into, one in zip(rows, self.lists):
                into.copy_(one.centres.redo(into))
        return rows

    def spread(self, x: Tensor, grad_rows: Tensor, grad_x: Tensor) -> list[Tensor]:
        """The transpose of ``make``.

        Args:
            x: As in ``make``.
            grad_rows: Gradients of the rows; overwritten.
            grad_x: ``(b, g, n, c)`` float32, contiguous, added to.

        Returns:
            Gradients of the weights, float32.
        """
        grads = [torch.zeros_like(w) for w in self.weights]
        if self.turned:
            for into, one in zip(grad_rows, self.lists):
                into.copy_(one.centres.undo(into))
        target = torch.zeros_like(grad_x) if self.turned else grad_x
        if self.by_channel:
            for level, grad in enumerate(grads[1 : 2 * self.plan.levels : 2]):
                of_groups = grad_rows[:, :, used_rows(level, self.plan, self.pattern)]
                grad.copy_(of_groups.unflatten(2, (-1, self.pattern.rank)).sum((0, 1, 2)).T)
            grad_rows *= self.gains
            self._call(self._taken(x) if self.turned else x, grad_rows, target, grads)
        else:
            padded = self._padded(x)
            of_tokens = torch.zeros_like(padded)
            for tokens, into, rows, gain, one in zip(padded, of_tokens, grad_rows, self.gains, self.lists):
                if self.pattern.learned:
                    combine_levels_backward(
                        tokens, rows, gain.flatten(), self.weights, into, grads, self.plan, self.pattern
                    )
                else:
                    rows.div_(one.counts.clamp(min=1)[:, None])
                    spread_levels(rows, into, self.plan, self.pattern)
            target += of_tokens[:, :, : self.plan.length].masked_fill_(~self.pooled[:, None, :, None], 0)
        if self.turned:
            for into, grad, one in zip(grad_x, target, self.lists):
                into += self._turn(one).redo(grad)
        return grads

    def _turn(self, one: Lists) -> Turn:
        """What the embedding did to the tokens."""
        cos, sin = (None if x is None else x[: self.plan.length] for x in (one.tokens.cos, one.tokens.sin))
        return Turn(cos, sin, one.tokens.interleaved)

    def _taken(self, x: Tensor) -> Tensor:
        """What is pooled, ``(b, g, n, c)``."""
        if not self.turned:
            return x.float()
        return torch.stack([self._turn(one).undo(part.float()) for part, one in zip(x, self.lists)])

    def _padded(self, x: Tensor) -> Tensor:
        """The same up to a whole number of blocks, 0 where a token is not pooled."""
        taken = self._taken(x).masked_fill(~self.pooled[:, None, :, None], 0)
        return torch.nn.functional.pad(
            taken, (0, 0, 0, self.plan.blocks * self.pattern.block - self.plan.length)
        )

    def _call(
        self, x: Tensor, rows: Tensor, grad_x: Tensor | None = None, grad_weights: Sequence[Tensor] = ()
    ) -> None:
        """Combinations of tokens written to ``rows``, or with ``grad_x`` their gradients read from there."""
        x, rows, levels = dense_rows(x), rows.contiguous(), self.plan.levels
        arguments = _Arguments()
        arguments.x, arguments.rows, arguments.pooled = x.data_ptr(), rows.data_ptr(), self.pooled.data_ptr()
        arguments.weight[:levels] = [w.data_ptr() for w in self.weights[: 2 * levels : 2]]
        arguments.grad_x = None if grad_x is None else grad_x.data_ptr()
        if grad_x is not None:
            arguments.grad_weight[:levels] = [w.data_ptr() for w in grad_weights[: 2 * levels : 2]]
        arguments.strides[:] = x.stride()[:3]
        arguments.b, arguments.g, arguments.n, arguments.c = x.shape
        arguments.m, arguments.p = self.pattern.block, self.pattern.rank
        arguments.dtype, arguments.threads = TYPES[x.dtype], torch.get_num_threads()
        library("pool").pool_run(ctypes.byref(arguments))


class _Arguments(ctypes.Structure):
    """``PoolArgs`` of ``pool.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "pooled", "rows", "grad_x")),
        *((name, ctypes.c_void_p * 40) for name in ("weight", "grad_weight")),
        ("strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("b", "g", "n", "c", "m", "p")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
        *((name, ctypes.c_void_p) for name in ("spread", "pool")),
    )
