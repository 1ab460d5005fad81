"""What the zoo knows of a model: how to build it, what to feed it, and which attention it truly has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY, PADDED = 2, 40, 128, 7
Inputs = Callable[[bool], dict[str, Any]]
Masks = Mapping[str, int]
PADDING = "key_padding"


@dataclass(frozen=True)
class Entry:
    """One model.

    Args:
        name: Of the model.
        family: What kind of model it is.
        sites: Softmax attentions of one forward pass, counted from its configuration, never by a matcher. 0 for a negative
            control.
        build: Makes it, with random weights, for an implementation of attention.
        inputs: Arguments of a call, with a padding mask or without.
        plain: Structure of the masks of its sites without padding, each with its number; ``"opaque"`` where no structure
            can say it.
        masked: The same with padding; ``None`` when it takes no padding mask.
        implementations: What ``build`` takes.
        kept: Sites, of ``sites``, that no rewrite can serve, and ``because`` of what: a part of the reason.
        because: See ``kept``.
        untraceable: Why Dynamo cannot show the attention, empty when it can.
    """

    name: str
    family: str
    sites: int
    build: Callable[[str], nn.Module]
    inputs: Inputs
    plain: Masks
    masked: Masks | None = None
    implementations: tuple[str, ...] = ("eager", "sdpa")
    kept: int = 0
    because: str = ""
    untraceable: str = ""

    def expected(self, padded: bool) -> Masks:
        """The structures of the masks of a call."""
        return (self.masked or {}) if padded else self.plain


@dataclass
class Zoo:
    """Entries by name."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Adds an entry.

        Raises:
            ValueError: The name is taken.
        """
        if entry.name in self.entries:
            raise ValueError(f"two models are called {entry.name!r}")
        self.entries[entry.name] = entry


def padding() -> Tensor:
    """A mask whose first sequence ends early."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, LENGTH - PADDED :] = 0
    return mask


def tokens(length: int = LENGTH) -> Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(5, VOCABULARY, (BATCH, length))


def text(padded: bool) -> dict[str, Any]:
    """Token ids, with a padding mask when asked."""
    return {"input_ids": tokens()} | ({"attention_mask": padding()} if padded else {})


def text_to_text(padded: bool) -> dict[str, Any]:
    """Token ids of an encoder and a decoder."""
    return text(padded) | {"decoder_input_ids": tokens(24)}


def image(size: int = 32, **more: int) -> Inputs:
    """Pixels of square images."""
    return lambda _: {"pixel_values": torch.randn(BATCH, *more.values(), 3, size, size)}


def tensor(name: str, *shape: int) -> Inputs:
    """One random tensor."""
    return lambda _: {name: torch.randn(BATCH, *shape)}


@dataclass(frozen=True)
class Kind:
    """The masks of all sites of a model whose layers are alike.

    Args:
        plain: Structure and its share of the sites.
        masked: The same with padding.
    """

    plain: Mapping[str, float]
    masked: Mapping[str, float] | None

    def of(self, sites: int) -> tuple[Masks, Masks | None]:
        """Structures with their numbers, for so many sites."""

        def counted(shares: Mapping[str, float]) -> Masks:
            return {name: round(share * sites) for name, share in shares.items()} if sites else {}

        return counted(self.plain), None if self.masked is None else counted(self.masked)


ENCODER = Kind({"none": 1}, {PADDING: 1})
DECODER = Kind({"causal": 1}, {f"causal & {PADDING}": 1})
# An encoder, a causal decoder, and its attention to the encoder.
BOTH = Kind({"none": 2 / 3, "causal": 1 / 3}, {PADDING: 2 / 3, "causal": 1 / 3})
FREE = Kind({"none": 1}, None)


def sliding(width: int, share: float = 1.0) -> Kind:
    """A decoder, a share of whose layers see a window."""
    local, full = f"causal & window({width})", 1 - share
    plain = {local: share} | ({"causal": full} if full else {})
    return Kind(plain, {f"{name} & {PADDING}": part for name, part in plain.items()})
