"""A tiny causal language model with attention in modules of their own, and what it reads."""

import torch
from torch import nn

VOCABULARY, WIDTH, HEADS = 23, 16, 2
SITES = ["layers.0.attention", "layers.1.attention"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.attention(self.norm(x))


class Language(nn.Module):
    """The head is tied to the embedding."""

    def __init__(self, layers=2, tied=True):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x)}


def language(seed=0, **options):
    torch.manual_seed(seed)
    return Language(**options).eval()


def tokens(batch=2, n=40, seed=1):
    return torch.randint(0, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))
