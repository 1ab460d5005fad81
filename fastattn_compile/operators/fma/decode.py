"""Decoding by fast multipole attention: the last two blocks, the sinks, and of every level four groups of pooled rows.

A query meets at each level the groups of the parent before its own (specification 5.2). So a level keeps that parent's
pooled rows and those of its own parent while it fills, each at its number modulo 2: where a parent begins, the one that no
query will meet again makes room. O(block + rank * log n) rows in all, whatever was decoded before.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.dispatch import gpu_obstacle, select
from fastattn_compile.kernels.rotary import Turn
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.documents import refuse_decoding
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.fma.decode_bias import DecodeBias, DecodeSlopes, DecodeTable
from fastattn_compile.operators.fma.reference import sink_tokens

if TYPE_CHECKING:
    from fastattn_compile.operators.fma.operator import FastMultipoleAttention

LONGEST = 1 << 24


class FmaDecoder(Decoder):
    """Causal fast multipole attention, one token at a time.

    Sizes: ``b`` batch, ``g`` key heads, ``l`` levels, ``p`` rank, ``c`` channels. Pooled sums stand as ``(b, g, l, 2, 2, p,
    c)``: the parents of even and odd number, their two children. Under ALiBi every query head pools its own way, so that
    ``g`` counts query heads. Exact rows are kept in the type of the prompt's keys and values.

    Args:
        operator: The operator.
        scale: Factor on the scores.
        parameters: Learned parameters, in order; they bound the length.
        combinations: For the recursive basis what its parameters unfold to, which bounds the length instead.
    """

    def __init__(
        self,
        operator: FastMultipoleAttention,
        scale: float,
        parameters: tuple[Tensor, ...] = (),
        combinations: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.operator, self.scale, self.given = operator, scale, parameters
        self.parameters = parameters = parameters if combinations is None else combinations
        config = operator.config
        self.block, self.rank = config.block, config.rank
        self.levels = len(parameters) // 4 if operator.learned else (LONGEST // config.block).bit_length()
        self._length: int | None = None
        self._shifts: list[Tensor] | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens; its mask (causal, perhaps a sliding window, padding) stays in force.

        Raises:
            ValueError: The mask is not causal, queries and keys differ in number, or documents are packed.
        """
        refuse_decoding(inputs)
        if inputs.mask.right != 0 or inputs.query.shape[2] != inputs.key.shape[2]:
            raise ValueError(
                f"decoding needs a causal mask and as many queries as keys, got {inputs.mask}, "
                f"{inputs.query.shape[2]} queries and {inputs.key.shape[2]} keys"
            )
        output = self.operator.forward(inputs, self.given)
        batch, kv_heads, length, _ = inputs.key.shape
        device, dtype = inputs.key.device, torch.promote_types(inputs.value.dtype, torch.float32)
        self._bias, self._shared = self._make_bias(inputs, dtype), 1
        weighted = isinstance(self._bias, DecodeSlopes)
        if weighted:
            self._shared, kv_heads = inputs.group, inputs.query.shape[1]
        self._left, self._length, sinks = inputs.mask.left, length, self.operator.config.sinks
        self._prompt = length
        real = inputs.key_padding
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=device)
        first = sink_tokens(real, sinks)
        self._found = first.sum(-1)
        self._widths = self.block << torch.arange(self.levels, device=device)
        # The last two blocks as a ring, and the sinks; with the position of each, -1 where there is none.
        recent = torch.arange(max(0, length - 2 * self.block), length, device=device)
        self._ring_place = torch.full((batch, 2 * self.block), -1, device=device)
        self._ring_place[:, recent % (2 * self.block)] = torch.where(real[:, recent], recent, -1)
        self._sink_place = torch.full((batch, sinks), -1, device=device)
        self._rings: list[Tensor] = []
        self._sinks: list[Tensor] = []
        self._sums: list[Tensor] = []
        pooled = real & ~first
        self._rotary = self.operator.config.rotary(inputs.key.shape[3])
        positions = (real.cumsum(-1) - 1).clamp(min=0).double()[:, None]
        self._before = real.sum(-1)
        turn = Turn() if self._rotary is None else self._rotary.at(positions, dtype)
        for x, embedded in ((inputs.key, turn), (inputs.value, Turn())):
            x = x.masked_fill(~real[:, None, :, None], 0).repeat_interleave(self._shared, 1)
            ring = x.new_zeros(batch, kv_heads, 2 * self.block, x.shape[3])
            ring[:, :, recent % (2 * self.block)] = x[:, :, recent]
            held = x.new_zeros(batch, kv_heads, sinks, x.shape[3])
            for sequence in range(batch):
                place = first[sequence].nonzero().flatten()
                held[sequence, :, : len(place)] = x[sequence, :, place]
                self._sink_place[sequence, : len(place)] = place
            self._rings.append(ring)
            self._sinks.append(held)
            free = embedded.undo(x.to(dtype))
            self._sums.append(self._pooled(free * pooled[:, None, :, None], len(self._sums)))
        one = pooled[:, None, :, None].to(dtype)
        self._counts = self._pooled(one, None)
        # Rows get their rotary embedding at the mean position of their tokens.
        self._places = None if self._rotary is None else self._pooled(one * positions[..., None], None)
        # What a row's tokens weigh together: their number, unless a bias weighs them.
        self._masses = self._pooled(one.expand(-1, kv_heads, -1, -1), 0) if weighted else self._counts
        return output

    def _make_bias(self, inputs: AttentionInputs, dtype: torch.dtype) -> DecodeBias | None:
        """The bias as steps read it."""
        if inputs.bias is None:
            return None
        bias, learned = inputs.bias.to(dtype), self.operator.learned
        covers = (self.block if learned else self.block // self.rank) << torch.arange(
            self.levels, device=bias.device
        )
        if bias.dim() == 1 and not learned:
            return DecodeSlopes(bias, covers)
        if bias.dim() == 1:
            longest = 2 * self.block << self.levels
            bias = -bias[:, None] * torch.arange(1 - longest, longest, device=bias.device).abs()
        return DecodeTable(bias, covers, self.block)

    def _pooled(self, x: Tensor, side: int | None) -> Tensor:
        """Sums of the last token's parent and the one before, ``(b, g, l, 2, 2, p, c)``; counts without a ``side``."""
        length, stretches = x.shape[2], []
        for level in range(self.levels):
            width = 2 * self.block << level
            own = (length - 1) // width
            for parity in range(2):
                begin = (own - (own - parity) % 2) * width
                stretches.append(self._rows(x[:, :, max(0, begin) : max(0, begin + width)], level, side))
        return torch.stack(stretches, 2).unflatten(2, (self.levels, 2))

    def _rows(self, tokens: Tensor, level: int, side: int | None) -> Tensor:
        """The rows of one parent, ``(b, g, 2, p, c)``, from those of its tokens that exist."""
        width, count = self.block << level, tokens.shape[2]
        place = torch.arange(count, device=tokens.device)
        if not self.operator.learned:
            if (
                side is not None
                and self._bias is not None
                and (weights := self._bias.weights(place)) is not None
            ):
                tokens = tokens * weights[:, level, :, None]
            sums = tokens.new_zeros(*tokens.shape[:2], 2 * self.rank, tokens.shape[3])
            return sums.index_add_(2, place * self.rank // width, tokens).unflatten(2, (2, self.rank))
        if side is None:
            sums = tokens.new_zeros(*tokens.shape[:2], 2, tokens.shape[3]).index_add_(
                2, place // width, tokens
            )
            return sums[:, :, :, None].expand(-1, -1, -1, self.rank, -1)
        groups = F.pad(tokens, (0, 0, 0, 2 * width - count)).unflatten(2, (2, -1))
        weight = self.parameters[4 * level + 2 * side].to(tokens.dtype)
        if weight.dim() == 4:
            return torch.einsum("bgjtc,xrct->bgjrx", groups, weight)
        return torch.einsum("bgjtc,crt->bgjrc", groups, weight)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.

        Raises:
            RuntimeError: ``prefill`` was not called.
            ValueError: The learned parameters were created for shorter sequences, or the type is not the prompt's.
        """
        if self._length is None:
            raise RuntimeError("call prefill before step")
        now = self._length
        for name, x, held in zip(("key", "value"), (key, value), self._rings):
            if x.dtype != held.dtype:
                raise ValueError(
                    f"the prompt's {name}s were {held.dtype}, the {name} of this token is {x.dtype}"
                )
        if now >= 2 * self.block << self.levels:
            raise ValueError(
                f"the parameters of this fma were created for at most {now} tokens; create them for a longer length"
            )
        if isinstance(self._bias, DecodeTable) and now >= self._bias.longest:
            raise ValueError(
                f"the bias lists distances of {now} tokens; prefill with a longer one, (heads, 2 N - 1)"
            )
        self._length += 1
        if select("fma decode", {"triton": partial(self._triton_obstacle, query, key, value)}) == "triton":
            return self._by_triton(now, query, key, value)
        key, value = (x.repeat_interleave(self._shared, 1) for x in (key, value))
        self._take(now, key, value)
        return self._attend(now, query, value.dtype)

    def _take(self, now: int, key: Tensor, value: Tensor) -> None:
        """Puts a token into the ring, among the sinks or into the pooled rows of every level."""
        parents = 2 * self._widths
        own, fresh = now // parents % 2, now % parents == 0
        found = self._found + now - self._prompt  # every token after the prompt is real
        becomes_sink = found < self.operator.config.sinks
        slot = now % (2 * self.block)
        self._ring_place[:, slot] = now
        for sequence in becomes_sink.nonzero().flatten().tolist():
            self._sink_place[sequence, found[sequence]] = now
            for held, x in zip(self._sinks, (key, value)):
                held[sequence, :, found[sequence]] = x[sequence, :, 0]
        level = torch.arange(self.levels, device=parents.device)
        inside = now % parents
        child = inside // self._widths
        kept = (~becomes_sink).to(self._counts.dtype)
        place = (self._before + now - self._prompt).double()[:, None, None]
        turn = Turn() if self._rotary is None else self._rotary.at(place, self._sums[0].dtype)
        weights = (
            None if self._bias is None else self._bias.weights(torch.tensor([now], device=parents.device))
        )
        for side, (sums, ring, x) in enumerate(zip(self._sums, self._rings, (key, value))):
            ring[:, :, slot] = x[:, :, 0]
            sums[:, :, level[fresh], own[fresh]] = 0
            taken = (Turn() if side else turn).undo(x.to(sums.dtype))[:, :, 0] * kept[:, None, None]
            if self.operator.learned:
                for at in range(self.levels):
                    weight = self.parameters[4 * at + 2 * side].to(sums.dtype)
                    offset = int(inside[at]) % int(self._widths[at])
                    if weight.dim() == 4:
                        rows = torch.einsum("bgc,xrc->bgrx", taken, weight[..., offset])
                    else:
                        rows = taken[:, :, None] * weight[:, :, offset].T
                    sums[:, :, at, int(own[at]), int(child[at])] += rows
            else:
                row = inside % self._widths * self.rank // self._widths
                sums[:, :, level, own, child, row] += taken[:, :, None] * (1 if weights is None else weights)
        if weights is not None:
            self._masses[:, :, level[fresh], own[fresh]] = 0
            row = inside % self._widths * self.rank // self._widths
            self._masses[:, :, level, own, child, row] += kept[:, None, None, None] * weights
        row = inside % self._widths * self.rank // self._widths
        for totals, one in ((self._counts, 1), (self._places, place[..., None])):
            if totals is None:
                continue
            totals[:, :, level[fresh], own[fresh]] = 0
            counted = kept.to(totals.dtype)[:, None, None, None] * one
            if self.operator.learned:
                totals[:, :, level, own, child] += counted[..., None]
            else:
                totals[:, :, level, own, child, row] += counted

    def _triton_obstacle(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        if self.operator.learned and self.operator.config.basis != "depthwise":
            return "learned rows that mix channels"
        if self._bias is not None:
            return "it adds no bias by distance to the scores"
        if self._rotary is not None:
            return "it pools keys as they come, with their rotary embedding"
        reason = gpu_obstacle(query, key, value)
        if reason:
            return reason
        from fastattn_compile.kernels.gpu import fma_decode

        return fma_decode.obstacle(query, key, value, self.operator.config.sinks)

    def _learned(self, now: int) -> list[Tensor]:
        """Factors of learned rows at a position, and their shifts, ``(l, p, c)``; none without."""
        if not self.operator.learned:
            return []
        if self._shifts is None:
            self._shifts = [
                torch.stack([p.T.float() for p in self.parameters[1 + side :: 4]]) for side in (0, 2)
            ]
        factors = [
            torch.stack([p[:, :, now % p.shape[2]].T.float() for p in self.parameters[side::4]])
            for side in (0, 2)
        ]
        return [*factors, *self._shifts]

    def _by_triton(self, now: int, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        from fastattn_compile.kernels.gpu import fma_decode

        left = -1 if self._left is None else self._left
        return AttentionOutput(
            *fma_decode.step(
                query, key, value, *self._rings, self._ring_place, *self._sinks, self._sink_place, self._found, *self._sums,
                self._counts, self._learned(now), now, self._prompt, left, self.scale, self.operator.config.scale_attn,
            )
        )  # fmt: skip

    def _attend(self, now: int, query: Tensor, dtype: torch.dtype) -> AttentionOutput:
        config, learned = self.operator.config, self.operator.learned
        own = now // self.block
        near = self._ring_place
        seen_near = (near >= 0) & (near // self.block >= own - 1)
        seen_sinks = (self._sink_place >= 0) & (own - self._sink_place // self.block > 1)
        # The parent before, as far as it exists; its second child only for queries in a second child.
        parent = now // (2 * self._widths)
        level, before = torch.arange(self.levels, device=parent.device), (parent - 1) % 2
        second = now // self._widths % 2
        children = torch.arange(2, device=parent.device)
        met = (parent > 0)[:, None] & (children <= second[:, None])
        counts = self._counts[:, 0, level, before].squeeze(-1)  # (b, l, 2, p)
        seen_far = met[None, :, :, None] & (counts > 0)
        cover = self._widths if learned else self._widths // self.rank
        offset = torch.arange(self.rank, device=parent.device) * (0 if learned else 1)
        group = (2 * (parent - 1))[:, None] + children
        first = (group * self._widths[:, None])[..., None] + offset * cover[:, None, None]
        masses = self._masses[:, :, level, before].squeeze(-1)
        if isinstance(self._bias, DecodeSlopes):
            seen_far = seen_far & (masses > 0).any(1)  # else nothing of it is left to weigh
        if self._left is not None:
            seen_far = seen_far & (first >= now - self._left)
            seen_near, seen_sinks = (
                seen & (place >= now - self._left)
                for seen, place in ((seen_near, near), (seen_sinks, self._sink_place))
            )
        rows = []
        for side in range(2):
            sums = self._sums[side][:, :, level, before]
            if learned:
                gain = self._widths[:, None, None] / counts.clamp(min=1)
                bias = torch.stack([self.parameters[4 * at + 2 * side + 1].T for at in range(self.levels)])
                far = sums * gain[:, None, ..., None] + bias[:, None].to(sums.dtype)
            else:
                far = sums / masses.masked_fill(masses == 0, 1)[..., None]
            if side == 0 and self._rotary is not None and self._places is not None:
                centres = self._places[:, :, level, before].squeeze(-1) / counts.clamp(min=1)[:, None]
                far = self._rotary.at(centres, far.dtype).redo(far)
            fine = torch.cat([self._sinks[side], self._rings[side]], 2).to(sums.dtype)
            rows.append(torch.cat([fine, far.flatten(2, 4)], 2))
        mass = counts / self.rank if learned else counts
        weight = mass.clamp(min=1e-30).log() if config.scale_attn else torch.zeros_like(mass)
        seen = torch.cat([seen_sinks, seen_near, seen_far.flatten(1)], 1)
        none = torch.zeros(
            seen.shape[0], seen.shape[1] - weight[0].numel(), dtype=weight.dtype, device=weight.device
        )
        bias = torch.cat([none, weight.flatten(1)], 1)[:, None]
        if self._bias is not None:
            exact = self._bias.fine(torch.cat([self._sink_place, near], 1), now)
            pooled = (
                self._bias.far(first, now) + (masses / counts.clamp(min=1)[:, None]).clamp(min=1e-30).log()
            )
            bias = bias + torch.cat([exact, pooled.flatten(2).expand(len(exact), exact.shape[1], -1)], 2)
        wide = query.to(rows[0].dtype).squeeze(2).unflatten(1, (rows[0].shape[1], -1))
        groups = (1, 1) if bias.shape[1] == 1 else wide.shape[1:3]
        scores = self.scale * (wide @ rows[0].mT) + bias.unflatten(1, groups)
        weights, log_sum_exp = masked_softmax(scores, seen[:, None, None])
        out = (weights @ rows[1]).flatten(1, 2)[:, :, None]
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        return AttentionOutput(out.to(dtype), log_sum_exp.flatten(1, 2)[:, :, None].to(statistics))

    def stored_rows(self) -> int:
        """The ring, the sinks, and four groups of every level that the length has reached."""
        length = self._length or 0
        reached = min(self.levels, max(0, -(-length // self.block)).bit_length())
        return 2 * self.block + self.operator.config.sinks + 4 * self.rank * reached
