"""Models with attention of every kind, and without: what a finder is judged by."""

from __future__ import annotations

from zoo import handwritten, libraries, perception, text_models
from zoo.entry import Entry, Zoo


def models() -> dict[str, Entry]:
    """All entries by name. Nothing is built yet."""
    zoo = Zoo()
    for register in (
        text_models.encoders, text_models.decoders, text_models.both, perception.vision, perception.text_towers,
        perception.audio_and_series, libraries.torch_modules, libraries.x_transformers, libraries.vit_pytorch, libraries.timm,
        libraries.diffusers, handwritten.spellings,
    ):  # fmt: skip
        register(zoo)
    return zoo.entries
