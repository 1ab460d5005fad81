"""Decoding by conv-basis attention, one token at a time: profiles of fixed anchors that grow with every query."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.conv_anchors import anchor_offsets
from fastattn_compile.kernels.tiles import work_dtype
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.conv_basis.biases import offset_biases
from fastattn_compile.operators.documents import refuse_decoding
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.growing import GrowingRows

if TYPE_CHECKING:
    from fastattn_compile.operators.conv_basis.operator import ConvBasisAttention

_SPARE = 64


class ConvBasisDecoder(Decoder):
    """Every token adds one score to each anchor's profile and reads its own row off them (specification 13).

    Keys are needed for the anchors alone and queries for none, so a step costs ``O(k d + n e)`` in place of ``O(n (d +
    e))``; the profiles hold ``k n`` numbers a query head, so memory is saved only while ``k`` is below the channels of
    a key times the key heads over the query heads.

    Args:
        operator: The operator; its anchors stand at a fixed ``stride``.
        scale: Factor on the scores.
        parameters: Learned parameters, in order.
    """

    def __init__(self, operator: ConvBasisAttention, scale: float, parameters: tuple[Tensor, ...]) -> None:
        self.operator, self.scale, self.parameters = operator, scale, parameters
        self._length: int | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens; its mask (causal, perhaps a sliding window, padding) stays in force.

        Raises:
            ValueError: The mask is not causal, or tokens were attended before.
        """
        refuse_decoding(inputs)
        if inputs.mask.right != 0 or inputs.query.shape[2] != inputs.key.shape[2]:
            raise ValueError(
                f"decoding needs a causal mask and as many queries as keys, got {inputs.mask}, "
                f"{inputs.query.shape[2]} queries and {inputs.key.shape[2]} keys"
            )
        if self._length is not None:
            raise ValueError("this decoder has attended tokens already; make a new one for a new sequence")
        batch, kv_heads, length, channels = inputs.key.shape
        config, device = self.operator.config, inputs.key.device
        # A prompt shorter than k has an anchor at every place that a longer one has it.
        output = self.operator.shortened(length).forward(inputs, self.parameters)
        dtype = work_dtype(inputs.query, inputs.key, inputs.value)
        hidden = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if inputs.key_padding is not None:
            hidden = ~inputs.key_padding
        first = torch.where(hidden.all(1), length, (~hidden).int().argmax(1))
        offsets = anchor_offsets(config.k, config.sinks * (config.anchors == "sink_strided"), config.stride)
        self._start = first[:, None] + torch.tensor(offsets, device=device)
        self._left, self._dtype, self._group = inputs.mask.left, dtype, inputs.group
        self._bias = inputs.bias
        self._hidden, self._value = GrowingRows(1, hidden), GrowingRows(2, inputs.value)
        self._anchor = torch.zeros(batch, kv_heads, config.k, channels, dtype=dtype, device=device)
        self._profile = torch.zeros(
            batch, kv_heads, inputs.group, config.k, length + _SPARE, dtype=dtype, device=device
        )
        query, key = (
            x.to(dtype).masked_fill(hidden[:, None, :, None], 0) for x in (inputs.query, inputs.key)
        )
        place = self._start.clamp(max=length - 1)
        chosen = key.gather(2, place[:, None, :, None].expand(-1, kv_heads, -1, channels))
        self._anchor.copy_(torch.where((self._start < length)[:, None, :, None], chosen, 0))
        columns = self.scale * (self._anchor[:, :, None] @ query.unflatten(1, (kv_heads, inputs.group)).mT)
        rows = self._start[:, :, None] + torch.arange(length, device=device)
        at = rows.clamp(max=length - 1)[:, None, None].expand(columns.shape)
        self._profile[..., :length] = columns.gather(-1, at)
        self._length = length
        return output

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.

        Raises:
            RuntimeError: ``prefill`` was not called.
            ValueError: A bias by distance, learned or of the site, does not reach as far as the sequence.
        """
        if self._length is None:
            raise RuntimeError("call prefill before step")
        now, kv_heads, bias = self._length, key.shape[1], self._bias
        if bias is not None and bias.dim() == 2 and now > bias.shape[1] // 2:
            raise ValueError(
                f"the bias lists distances of {now} tokens; prefill with a longer one, (heads, 2 N - 1)"
            )
        self._length = length = now + 1
        self._value.append(value)
        self._hidden.append(torch.zeros(len(value), 1, dtype=torch.bool, device=value.device))
        if length > self._profile.shape[-1]:
            self._profile = torch.nn.functional.pad(self._profile, (0, length))
        opens = (self._start == now)[:, None, :, None]
        self._anchor = torch.where(opens, key.to(self._dtype), self._anchor)
        grouped = query.to(self._dtype).unflatten(1, (kv_heads, self._group))
        newest = self.scale * (self._anchor[:, :, None] @ grouped.mT)
        since = now - self._start
        at = since.clamp(min=0)[:, None, None, :, None].expand(newest.shape)
        begun = (since >= 0)[:, None, None, :, None]
        self._profile.scatter_(-1, at, torch.where(begun, newest, self._profile.gather(-1, at)))

        offset = now - torch.arange(length, device=key.device)
        segment = torch.searchsorted(
            self._start, (now - offset).expand(len(self._start), -1).contiguous(), right=True
        )
        index = (segment - 1).clamp(min=0) * self._profile.shape[-1] + offset
        flat = self._profile.flatten(-2)
        scores = flat.gather(-1, index[:, None, None].expand(*flat.shape[:3], length))
        heads = self._group * kv_heads
        bias = offset_biases(self.operator.config, heads, length, True, self.parameters, bias)
        if bias is not None:
            by_offset = bias[:, length - 1 :].to(scores).unflatten(0, (kv_heads, self._group))
            scores = scores + by_offset[..., offset]
        seen = ~self._hidden.rows & (segment > 0)
        if self._left is not None:
            seen &= offset <= self._left
        weights, log_sum_exp = masked_softmax(scores, seen[:, None, None])
        out = (weights @ self._value.rows.to(self._dtype)).flatten(1, 2)[:, :, None]
        statistics = torch.float64 if value.dtype == torch.float64 else torch.float32
        return AttentionOutput(out.to(value.dtype), log_sum_exp.flatten(1, 2)[:, :, None].to(statistics))

    def stored_rows(self) -> int:
        """The values of all tokens and the keys of the anchors; the profiles are ``k`` numbers a token besides."""
        return (self._length or 0) + self.operator.config.k
