"""Decoding with the causal form of CAST."""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels import cast_causal
from fastattn_compile.kernels.aten import cast_decode
from fastattn_compile.kernels.aten.cast_affinity import Rule
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.parameters import check, unpacked


class CastDecoder(Decoder):
    """A bucket and summaries for every cluster, however long the sequence is (specification 5.2).

    Args:
        config: A configuration of ``token_choice``.
        rule: The same as the kernels read it.
        scale: Factor on the scores.
        parameters: Learned parameters in order.
    """

    def __init__(self, config: CastConfig, rule: Rule, scale: float, parameters: tuple[Tensor, ...]) -> None:
        self._config, self._rule, self._scale, self._parameters = config, rule, scale, parameters
        self._state: cast_decode.ClusterState | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens and keeps what later tokens need of it.

        Raises:
            ValueError: The mask is not causal, tokens were attended before, or the parameters are not of this
                site.
        """
        check(self._config, self._parameters, inputs)
        if not inputs.mask.causal or inputs.mask.conflicts("right", "end_aligned", "key_padding"):
            raise ValueError(f"decoding is causal, the mask to prefill with is {inputs.mask}")
        if self._state is not None:
            raise ValueError("this decoder has attended tokens already; make a new one for a new sequence")
        tensors = inputs.query, inputs.key, inputs.value, self._scale, self._rule
        weights = unpacked(self._config, self._parameters, inputs.query.shape[1])
        self._state = cast_decode.prefilled(*tensors, weights, inputs.key_padding)
        return AttentionOutput(*cast_causal.forward(*tensors, weights, inputs.key_padding))

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token."""
        weights = unpacked(self._config, self._parameters, query.shape[1])
        self._state, *results = cast_decode.step(
            self._state, query, key, value, self._scale, self._rule, weights
        )
        return AttentionOutput(*results)

    def stored_rows(self) -> int:
        """Buckets and summaries; one softmax also keeps the mean of what left each bucket."""
        summaries = 2 if self._config.combine == "lse" else 1
        return self._rule.clusters * (self._rule.size + summaries)
