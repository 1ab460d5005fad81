"""Tiny random models that the command line loads as ``tiny_models:function``."""

import torch
from torch import nn


class Attention(nn.Module):
    """Causal self-attention of a few heads."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Residual attention layers."""

    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack():
    return Stack(), (torch.randn(1, 300, 32),)


def poisoned():
    model, inputs = stack()
    with torch.no_grad():
        model.layers[1].qkv.weight[0, 0] = torch.nan
    return model, inputs


def no_attention():
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def not_a_model():
    return "weights"


def odd_inputs():
    return nn.Linear(4, 4), 7


def needs_inputs():
    return nn.Linear(4, 4)


class Dropped(Attention):
    """Attention with dropout that never rests."""

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = nn.functional.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, training=True)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def with_dropout():
    return Dropped(), (torch.randn(1, 60, 32),)


def small_language_model():
    """The same weights in every call."""
    torch.manual_seed(5)
    model = language_model()
    model.config.use_cache = False
    return model


def sharp_language_model():
    """The same weights in every call, and attention that loses something when it is cut."""
    model = small_language_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.mul_(20)
    return model
