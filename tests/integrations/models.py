"""Tiny models of transformers, each with another kind of attention."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}


def configuration(kind: str) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model."""
    x = transformers
    return {
        "llama": lambda: x.LlamaConfig(**GROUPED),
        "mistral": lambda: x.MistralConfig(**GROUPED, sliding_window=16),
        "gemma2": lambda: x.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
        "gemma3": lambda: x.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        "gpt_oss": lambda: x.GptOssConfig(
            **GROUPED, head_dim=8, sliding_window=16, num_local_experts=2, num_experts_per_tok=1
        ),
        "llama4": lambda: x.Llama4TextConfig(
            **GROUPED, intermediate_size_mlp=64, head_dim=8, attention_chunk_size=16, num_local_experts=2,
            layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
        ),
        "bert": lambda: x.BertConfig(**SIZES),
        "modernbert": lambda: x.ModernBertConfig(**SIZES, pad_token_id=0, local_attention=16, global_attn_every_n_layers=2),
        "bart": lambda: x.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99,
        ),
        "gpt2": lambda: x.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=None, pad_token_id=0
        ),
        "t5": lambda: x.T5Config(
            d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=64, vocab_size=99, decoder_start_token_id=0
        ),
        "vit": lambda: x.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4
        ),
        "swin": lambda: x.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
        ),
    }[kind]()  # fmt: skip


def build(kind: str, attention: str = "eager", seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny model without a head, in evaluation mode."""
    torch.manual_seed(seed)
    return transformers.AutoModel.from_config(configuration(kind), attn_implementation=attention).eval()


def causal_lm(kind: str = "llama", attention: str = "sdpa", seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny language model, or one with an encoder, in evaluation mode, that no token ends."""
    torch.manual_seed(seed)
    config = configuration(kind)
    auto = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def inputs_of(kind: str, length: int, padding: str = "") -> dict[str, Tensor]:
    """Inputs of a tiny model: two sequences, with padding ``"left"``, ``"right"`` or none."""
    generator = torch.Generator().manual_seed(1)
    if kind in ("vit", "swin"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    given = {"input_ids": torch.randint(1, 99, (2, length), generator=generator)}
    if padding:
        real = torch.ones(2, length, dtype=torch.long)
        real[0, slice(None, 9) if padding == "left" else slice(length - 9, None)] = 0
        given["attention_mask"] = real
    return given
