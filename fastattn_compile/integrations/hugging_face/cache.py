"""Generation by an operator's own decoding: a cache that holds its state instead of all keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.operators.base import AttentionInputs, Decoder, Operator
from fastattn_compile.operators.observe import notify

_LAYER = "_fastattn_layer"
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class DecodingLayer(DynamicLayer):
    """The cache of one layer. Until an operator takes over with its first stretch of tokens it is transformers' own."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.decoder: Decoder | None = None
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of new tokens.

        Returns:
            All keys and values; under an operator's decoding those of the new token alone.

        Raises:
            UnsupportedSiteError: Several tokens at once under an operator's decoding, or a compiled call.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedSiteError(
                "a DecodingCache holds state that torch.compile cannot trace; run the model without compilation"
            )
        first, added = self.length == 0, key_states.shape[-2]
        self.length += added
        if self.decoder is not None:
            if added != 1:
                raise UnsupportedSiteError(
                    f"an operator decodes one token at a time, got {added}; give generate() a DynamicCache for assisted "
                    "decoding or a prompt in several parts"
                )
            setattr(key_states, _LAYER, self)
            return key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first:
            setattr(keys, _LAYER, self)
        return keys, values

    def take_over(self, decoder: Decoder) -> None:
        """Lets a decoder hold what later tokens need, and forgets the keys and values."""
        self.decoder = decoder
        self.keys = self.values = None

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys there will be with some new tokens, and the position of the first."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forgets everything."""
        self.decoder, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Puts sequences into another order; an operator's state cannot be.

        Raises:
            UnsupportedSiteError: An operator decodes here.
        """
        self._refuse("beam search")
        super().reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Takes tokens back; an operator's state cannot.

        Raises:
            UnsupportedSiteError: An operator decodes here.
        """
        self._refuse("assisted decoding")
        super().crop(*args, **kwargs)
        self.length = super().get_seq_length()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence; an operator's state cannot be repeated.

        Raises:
            UnsupportedSiteError: An operator decodes here.
        """
        self._refuse("several sequences of one prompt")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences; an operator's state cannot be divided.

        Raises:
            UnsupportedSiteError: An operator decodes here.
        """
        self._refuse("a choice among sequences")
        super().batch_select_indices(indices)

    def _refuse(self, what: str) -> None:
        if self.decoder is not None:
            raise UnsupportedSiteError(
                f"{what} needs keys and values that can be rearranged; give generate() a DynamicCache instead"
            )


class DecodingCache(Cache):
    """A cache for ``generate()`` of a routed model: sites whose operator has a decoding form decode by it.

    The operator's state replaces the keys and values. Where an operator has none, or did not serve the prompt, decoding is
    exact, as with a ``DynamicCache``.

    Args:
        model: A model that ``route`` was called on.
    """

    def __init__(self, model: Any) -> None:
        kinds, settings = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        layers = [
            DecodingLayer() if kind in _ATTENTION_LAYERS else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
            for kind, given in zip(kinds, settings)
        ]
        super().__init__(layers=layers)

    def stored_rows(self) -> list[int]:
        """For each layer, rows of keys (exact or pooled) it holds for one key head."""
        held = [layer for layer in self.layers if isinstance(layer, DecodingLayer)]
        return [layer.decoder.stored_rows() if layer.decoder is not None else layer.length for layer in held]


def start_decoding(
    key: Tensor, operator: Operator, parameters: tuple[Tensor, ...], inputs: AttentionInputs, site: str
) -> tuple[Tensor | None, str]:
    """Attends the prompt of a generation through an operator's decoder.

    Args:
        key: Keys as the cache returned them.
        operator: The operator that serves the prompt.
        parameters: Its learned parameters.
        inputs: The tensors of the prompt.
        site: Name of the site.

    Returns:
        The output, ``None`` where decoding will be exact; and words for the report.
    """
    layer = None if torch.compiler.is_compiling() else getattr(key, _LAYER, None)
    if layer is None:
        return None, ""
    decoder = operator.decoder(inputs.scale, parameters)
    if decoder is None:
        return None, f"; decoding is exact: {operator.name} has no decoding form"
    try:
        output = decoder.prefill(inputs)
    except (ValueError, NotImplementedError) as error:
        return None, f"; decoding is exact: {error}"
    notify(site, operator, inputs, output)
    layer.take_over(decoder)
    return output.out, f"; decoding by {operator.name}"


def decode_step(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The output for the next token where an operator decodes, else ``None``."""
    layer = None if torch.compiler.is_compiling() else getattr(key, _LAYER, None)
    if layer is None or layer.decoder is None:
        return None
    out: Tensor = layer.decoder.step(query, key, value).out
    return out
