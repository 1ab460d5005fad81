"""Makes entries of transformers architectures from a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.entry import DECODER, ENCODER, VOCABULARY, Entry, Inputs, Kind, Masks, Zoo, text

WIDTH, HEADS, LAYERS, INNER = 64, 4, 2, 96
EAGER = ("eager",)
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "max_position_embeddings": 128,
}  # fmt: skip
# Two query heads share a key head.
GROUPED = TEXT | {"num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128,
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "image_size": 32, "patch_size": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def builder(config: str, model: str, sizes: dict[str, Any]) -> Callable[[str], nn.Module]:
    """Makes a model of random weights, without a cache of keys."""

    def build(implementation: str) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**sizes)
        if hasattr(made, "use_cache"):
            made.use_cache = False
        if hasattr(
            made, "_experts_implementation"
        ):  # grouped products have no float64, in which models are judged
            made._experts_implementation = "batched_mm"
        built: nn.Module = getattr(transformers, model)._from_config(made, attn_implementation=implementation)
        return built

    return build


def entry(
    zoo: Zoo, name: str, stem: str, sizes: dict[str, Any], *, sites: int = LAYERS, kind: Kind = ENCODER,
    family: str = "encoder", model: str = "", config: str = "", inputs: Inputs = text,
    implementations: tuple[str, ...] = ("eager", "sdpa"), plain: Masks | None = None, masked: Masks | None = None,
    **more: Any,
) -> None:  # fmt: skip
    """Adds an architecture.

    Args:
        zoo: Where to.
        name: Its name.
        stem: What the names of its classes begin with.
        sizes: Arguments of its configuration.
        sites: Softmax attentions of a pass.
        kind: The masks, unless ``plain`` and ``masked`` say them one by one.
        family: Of the entry.
        model: Class of the model; ``stem + "Model"`` when empty.
        config: Class of its configuration; ``stem + "Config"`` when empty.
        inputs: Arguments of a call.
        implementations: The attention implementations it has.
        plain: Masks without padding.
        masked: Masks with padding.
        **more: Further fields of the entry.
    """
    usual, usual_masked = kind.of(sites)
    zoo.add(Entry(
        name, family, sites, builder(config or f"{stem}Config", model or f"{stem}Model", sizes), inputs,
        usual if plain is None else plain, usual_masked if plain is None else masked, implementations, **more,
    ))  # fmt: skip


def decoder(zoo: Zoo, name: str, stem: str, sizes: dict[str, Any], **more: Any) -> None:
    """Adds a causal language model."""
    entry(
        zoo,
        name,
        stem,
        sizes,
        **({"kind": DECODER, "family": "decoder", "model": f"{stem}ForCausalLM"} | more),
    )
