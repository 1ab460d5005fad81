"""CAST in Triton: attention inside clusters through lists, the mixture of clusters in one pass over the tokens.

What is a plain product (affinities, summaries) stays one. ``cast_mix`` owns a tile of tokens: the softmax over their
clusters, the sum of foreign summaries, and the attention inside the own clusters, added slot by slot in order.
``cast_sum`` brings gradients of slots home to their tokens the same way. A token's slots are found by sorting slots by
token; nothing is added atomically.

Layout as in ``kernels/aten/cast_affinity.py``: queries ``(g, b, n, r, d)``; ``c`` clusters of ``s`` slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_compile.kernels.aten import cast as aten
from fastattn_compile.kernels.aten.cast_affinity import Rule, Weights
from fastattn_compile.kernels.gpu import leaf
from fastattn_compile.kernels.gpu.launch import LIGHT, padded, precision
from fastattn_compile.kernels.gpu.online import COUNTS

_ROWS, _CHANNELS, _MOST_CLUSTERS = 32, 64, 512


@triton.jit(do_not_specialize=COUNTS)
def cast_mix(
    LOGITS, SUMMARY, INSIDE, FIRST, SLOT, MIXTURE, LSE, OUT, rows, slots, batch,
    C: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, OWN_SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Softmax over clusters of one tile of the ``rows = n R`` queries of a sequence, and what it mixes."""
    lane, c, e = tl.program_id(1).to(tl.int64), tl.arange(0, BC), tl.program_id(2) * BE + tl.arange(0, BE)
    head, sequence, i = lane // batch, lane % batch, tl.program_id(0) * BT + tl.arange(0, BT)
    real, row = i < rows, lane * rows + i
    z = tl.load(
        LOGITS + row[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=float("-inf")
    )
    largest = tl.max(z, 1)
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    p = tl.exp(z - anchor[:, None])
    mass = tl.sum(p, 1)
    p = p / tl.where(mass == 0, 1.0, mass)[:, None]
    if tl.program_id(2) == 0:
        tl.store(MIXTURE + row[:, None] * C + c[None, :], p, mask=real[:, None] & (c < C)[None, :])
        lse = tl.where(mass == 0, float("-inf"), anchor + tl.log(tl.where(mass == 0, 1.0, mass)))
        tl.store(LSE + row, lse, mask=real)
    token = sequence * (rows // R) + i // R
    first = tl.load(FIRST + token, mask=real, other=0)
    count = tl.load(FIRST + token + 1, mask=real, other=0) - first
    acc, foreign = tl.zeros([BT, BE], tl.float32), p
    for step in range(tl.max(count, 0)):
        slot = tl.load(SLOT + first + step, mask=step < count, other=0)
        mine = (step < count)[:, None] & (c[None, :] == (slot // S % C)[:, None])
        share = tl.sum(tl.where(mine, p, 0.0), 1)
        at = ((head * slots + slot) * R + i % R) * E
        inside = tl.load(
            INSIDE + at[:, None] + e[None, :], mask=(step < count)[:, None] & (e < E)[None, :], other=0.0
        )
        acc += share[:, None] * inside.to(tl.float32)
        if not OWN_SUMMARY:
            foreign = tl.where(mine, 0.0, foreign)
    at = (lane * C + c[:, None]) * E + e[None, :]
    summary = tl.load(SUMMARY + at, mask=(c < C)[:, None] & (e < E)[None, :], other=0.0)
    acc = tl.dot(foreign, summary, acc, input_precision=PRECISION)
    tl.store(OUT + row[:, None] * E + e[None, :], acc, mask=real[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def cast_sum(X, ROWS, FIRST, SLOT, tokens, slots, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Adds the rows ``(g, slots, W)`` of every token's slots, in order, to its own ``(g, tokens, W)``."""
    head, w = tl.program_id(1).to(tl.int64), tl.program_id(2) * BW + tl.arange(0, BW)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real, channel = token < tokens, (w < W)[None, :]
    first = tl.load(FIRST + token, mask=real, other=0)
    count = tl.load(FIRST + token + 1, mask=real, other=0) - first
    at = X + (head * tokens + token)[:, None] * W + w[None, :]
    total = tl.load(at, mask=real[:, None] & channel, other=0.0)
    for step in range(tl.max(count, 0)):
        slot = tl.load(SLOT + first + step, mask=step < count, other=0)
        row = ROWS + (head * slots + slot)[:, None] * W + w[None, :]
        total += tl.load(row, mask=(step < count)[:, None] & channel, other=0.0)
    tl.store(at, total, mask=real[:, None] & channel)


class Pass(aten.Pass):
    """``kernels.aten.cast.Pass`` with its gathered attention, its mixture and its sums in Triton."""

    def _attend(self) -> tuple[Tensor, Tensor]:
        tokens = self.tokens
        return leaf.cluster_forward(
            tokens.query, tokens.key, tokens.value, self.scale, self._members_of(), self.offset
        )  # fmt: skip

    def _attend_backward(
        self, grad_inside: Tensor, grad_inside_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.tokens
        return leaf.cluster_backward(
            tokens.query, tokens.key, tokens.value, self.scale, self._members_of(), self.offset,
            self.inside.flatten(2, 3), self.inside_lse, grad_inside, grad_inside_lse,
        )  # fmt: skip

    def _members_of(self) -> Tensor:
        return self.slots.token.view(self.slots.filled.flatten(0, 1).shape)

    def _mix(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        heads, batch, length, group, clusters = logits.shape
        channels, size = self.value.shape[-1], self.slots.filled.shape[2]
        self._first, self._slot = self._slots_of_tokens()
        mixture, lse = torch.empty_like(logits), logits.new_empty(logits.shape[:-1])
        self._out = logits.new_empty(heads, batch, length, group, channels)
        block = min(_CHANNELS, padded(channels))
        grid = -(-length * group // _ROWS), heads * batch, -(-channels // block)
        cast_mix[grid](
            logits, self.summary.contiguous(), self.inside, self._first, self._slot, mixture, lse, self._out,
            length * group, self.slots.token.numel(), batch, C=clusters, E=channels, R=group, S=size,
            OWN_SUMMARY=self.rule.own_summary, PRECISION=precision(logits.dtype), BT=_ROWS,
            BC=padded(clusters), BE=block, **LIGHT,
        )  # fmt: skip
        return mixture, lse

    def _slots_of_tokens(self) -> tuple[Tensor, Tensor]:
        """The filled slots by token, in order, and where those of each token begin; int32."""
        tokens = self.batch * self.length
        owner = self.slots.token.masked_fill(~self.slots.filled.flatten(), tokens)
        sorted_owner, slot = torch.sort(owner, stable=True)
        numbers = torch.arange(tokens + 1, device=owner.device)
        return torch.searchsorted(sorted_owner, numbers, out_int32=True), slot.int()

    def out(self) -> Tensor:
        """The mixture, ``(g, b, n, r, e)``."""
        return self._out

    def _add_(self, x: Tensor, slots: Tensor) -> None:
        tokens, width = self.batch * self.length, x[0, 0, 0].numel()
        block = min(_CHANNELS, padded(width))
        # Gradients out of products have the strides that suited the product.
        dense = x.contiguous()
        cast_sum[(-(-tokens // _ROWS), x.shape[0], -(-width // block))](
            dense, slots.contiguous(), self._first, self._slot, tokens, self.slots.token.numel(), W=width, BT=_ROWS,
            BW=block, **LIGHT,
        )  # fmt: skip
        if dense is not x:
            x.copy_(dense)


def obstacle(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> str:
    """Why these kernels cannot serve a call of ``kernels.aten.cast``; empty when they can."""
    if rule.clusters > _MOST_CLUSTERS:
        return f"{rule.clusters} clusters, a tile holds the shares of at most {_MOST_CLUSTERS}"
    if any(x.dtype == torch.float64 for x in (query, key, value)):
        return "float64"
    return ""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rule: Rule,
    weights: Weights,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``kernels.aten.cast.forward`` with Triton's ``Pass``."""
    return aten.forward(query, key, value, scale, rule, weights, real, Pass)


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rule: Rule, weights: Weights,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Weights | None]:  # fmt: skip
    """``kernels.aten.cast.backward`` with Triton's ``Pass``."""
    return aten.backward(query, key, value, scale, rule, weights, grad_out, grad_log_sum_exp, real, Pass)
