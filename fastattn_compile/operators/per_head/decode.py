"""Decoding with heads that are served by different operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.per_head.served import Served, together

if TYPE_CHECKING:
    from fastattn_compile.operators.per_head.operator import PerHeadAttention


class PerHeadDecoder(Decoder):
    """The decoder of every part, with its heads.

    Args:
        operator: The operator.
        scale: Factor on the scores.
        parameters: Learned parameters of the parts, in order.
    """

    def __init__(self, operator: PerHeadAttention, scale: float, parameters: tuple[Tensor, ...] = ()) -> None:
        self.operator, self.scale, self.parameters = operator, scale, parameters
        self._parts: list[tuple[Served, Decoder]] = []

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens.

        Raises:
            ValueError: A part has no decoding form, or not behind this prompt.
        """
        self._parts = []
        outputs = []
        for part, given, own in self.operator.split(inputs, self.parameters):
            decoder = part.operator.decoder(self.scale, own)
            if decoder is None:
                raise ValueError(f"{part.operator.name}, which serves some heads, has no decoding form")
            self._parts.append((part, decoder))
            outputs.append(decoder.prefill(given))
        return together([part for part, _ in self._parts], outputs)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.

        Raises:
            RuntimeError: ``prefill`` was not called.
        """
        if not self._parts:
            raise RuntimeError("call prefill before step")
        outputs = [
            decoder.step(query[:, part.query_heads], key[:, part.key_heads], value[:, part.key_heads])
            for part, decoder in self._parts
        ]
        return together([part for part, _ in self._parts], outputs)

    def stored_rows(self) -> int:
        """In the mean over key heads, rounded up."""
        rows = sum(decoder.stored_rows() * len(part.key_heads) for part, decoder in self._parts)
        return -(-rows // max(1, sum(len(part.key_heads) for part, _ in self._parts)))
