"""Decoding by a local window, one token at a time: a ring of the last tokens, and the sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.score_bias import score_bias
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.documents import refuse_decoding
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.window.reference import sink_tokens

if TYPE_CHECKING:
    from fastattn_compile.operators.window.operator import WindowAttention


class WindowDecoder(Decoder):
    """Causal local attention with O(width + sinks) memory and work a token.

    Args:
        operator: The operator.
        scale: Factor on the scores.
    """

    def __init__(self, operator: WindowAttention, scale: float) -> None:
        self.operator, self.scale = operator, scale
        self._width = operator.config.width
        self._length: int | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens; its mask (causal, perhaps a sliding window, padding) stays in
        force.

        Raises:
            ValueError: The mask is not causal, queries and keys differ in number, or documents are packed.
        """
        refuse_decoding(inputs)
        if inputs.mask.right != 0 or inputs.query.shape[2] != inputs.key.shape[2]:
            raise ValueError(
                f"decoding needs a causal mask and as many queries as keys, got {inputs.mask}, "
                f"{inputs.query.shape[2]} queries and {inputs.key.shape[2]} keys"
            )
        output = self.operator.forward(inputs)
        sinks = self.operator.config.sinks
        batch, kv_heads, length, _ = inputs.key.shape
        self._left = inputs.mask.left
        dtype = torch.promote_types(inputs.value.dtype, torch.float32)
        self._bias = score_bias(inputs.bias, kv_heads, dtype)
        self._listed = (
            None if inputs.bias is None or inputs.bias.dim() == 1 else inputs.bias.shape[1] // 2 + 1
        )
        self._width = self.operator.config.width if self._left is None else min(self._width, self._left + 1)
        self._length = length
        self._ring = [
            x.new_zeros(batch, kv_heads, self._width, x.shape[3]) for x in (inputs.key, inputs.value)
        ]
        self._sinks = [x.new_zeros(batch, kv_heads, sinks, x.shape[3]) for x in (inputs.key, inputs.value)]
        device = inputs.key.device
        # Position of what stands in each place of the ring, -1 for nothing; and of the sinks.
        self._ring_place = torch.full((batch, self._width), -1, device=device)
        self._sink_place = torch.full((batch, sinks), -1, device=device)
        real = inputs.key_padding
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=device)
        self._found = (real.sum(-1)).clamp(max=sinks)
        first = sink_tokens(inputs, sinks).expand(batch, length)
        recent = torch.arange(max(0, length - self._width), length, device=device)
        kept = real[:, recent] & ~first[:, recent]
        self._ring_place[:, recent % self._width] = torch.where(kept, recent, -1)
        for held, sink, x in zip(self._ring, self._sinks, (inputs.key, inputs.value)):
            held[:, :, recent % self._width] = x[:, :, recent].masked_fill(~kept[:, None, :, None], 0)
            for sequence in range(batch):
                place = first[sequence].nonzero().flatten()
                sink[sequence, :, : len(place)] = x[sequence, :, place]
                self._sink_place[sequence, : len(place)] = place
        return output

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.

        Raises:
            RuntimeError: ``prefill`` was not called.
            ValueError: The bias lists fewer distances than tokens.
        """
        if self._length is None:
            raise RuntimeError("call prefill before step")
        now = self._length
        if self._listed is not None and now >= self._listed:
            raise ValueError(
                f"the bias lists distances of {now} tokens; prefill with a longer one, (heads, 2 N - 1)"
            )
        self._length += 1
        slot = now % self._width
        becomes_sink = self._found < self.operator.config.sinks
        self._ring_place[:, slot] = torch.where(becomes_sink, -1, now)
        for held, sink, x in zip(self._ring, self._sinks, (key, value)):
            held[:, :, slot] = x[:, :, 0]
            for sequence in becomes_sink.nonzero().flatten().tolist():
                sink[sequence, :, self._found[sequence]] = x[sequence, :, 0]
        for sequence in becomes_sink.nonzero().flatten().tolist():
            self._sink_place[sequence, self._found[sequence]] = now
        self._found = self._found + becomes_sink
        places = torch.cat([self._sink_place, self._ring_place], 1)
        seen = places >= 0
        if self._left is not None:
            seen &= places >= now - self._left
        keys, values = (torch.cat(pair, 2) for pair in zip(self._sinks, self._ring))
        bias = None
        if self._bias is not None:
            bias = torch.stack([self._bias.at(slice(None), at - now) for at in places])
        return attend_rows(query, keys, values, self.scale, seen, bias)

    def stored_rows(self) -> int:
        """The ring and the sinks."""
        return self._width + self.operator.config.sinks


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor, bias: Tensor | None = None
) -> AttentionOutput:
    """Softmax attention of one query a head over some rows.

    Args:
        query: ``(batch, heads, 1, d)``.
        keys: ``(batch, kv_heads, rows, d)``.
        values: ``(batch, kv_heads, rows, e)``.
        scale: Factor on the scores.
        seen: ``(batch, rows)`` boolean, or ``(batch, kv_heads, heads // kv_heads, rows)``.
        bias: ``(batch, kv_heads, heads // kv_heads, rows)``, added to the scores, or ``None``.
    """
    dtype = torch.float64 if torch.float64 in (query.dtype, keys.dtype, values.dtype) else torch.float32
    wide = query.to(dtype).squeeze(2).unflatten(1, (keys.shape[1], -1))
    scores = scale * (wide @ keys.to(dtype).mT)
    if bias is not None:
        scores = scores + bias.to(dtype)
    visible = seen[:, None, None] if seen.dim() == 2 else seen
    weights, log_sum_exp = masked_softmax(scores, visible)
    out = (weights @ values.to(dtype)).flatten(1, 2)[:, :, None]
    statistics = torch.float64 if values.dtype == torch.float64 else torch.float32
    return AttentionOutput(out.to(values.dtype), log_sum_exp.flatten(1, 2)[:, :, None].to(statistics))
