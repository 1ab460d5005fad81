"""Attention as people write it, and softmaxes that are no attention. Each spelling takes q, k, v of shape (b, h, n, d)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]

POSITIVE: dict[str, tuple[Spelling, str]] = {}
NEGATIVE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}


def spelled(mask: str = "none") -> Callable[[Spelling], Spelling]:
    """Registers a spelling with the mask structure it has."""

    def register(fn: Spelling) -> Spelling:
        POSITIVE[fn.__name__] = (fn, mask)
        return fn

    return register


def no_attention(fn: Spelling) -> Spelling:
    NEGATIVE[fn.__name__] = fn
    return fn


def causal_mask(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@spelled()
def matmul_div(q, k, v):
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]), dim=-1), v)


@spelled()
def at_mul(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@spelled()
def scale_on_query(q, k, v):
    q = q * q.shape[-1] ** -0.5
    return torch.softmax(q @ k.transpose(2, 3), -1) @ v


@spelled()
def einsum(q, k, v):
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bhkd->bhqd", s.softmax(dim=-1), v)


@spelled()
def einsum_bnhd(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    a = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", a, v).transpose(1, 2)


@spelled()
def bmm_folded(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    a = torch.bmm(q * d**-0.5, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(F.dropout(a, 0.5, training=False), v).view(b, h, n, d)


@spelled()
def written_out(q, k, v):
    s = q @ k.mT * q.shape[-1] ** -0.5
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


@spelled()
def upcast(q, k, v):
    s = torch.matmul(q, k.transpose(2, 3)) * 0.25
    return torch.matmul(F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype), v)


@spelled("causal")
def causal_masked_fill(q, k, v):
    n = q.shape[2]
    s = q @ k.mT / math.sqrt(q.shape[-1])
    s = s.masked_fill(~causal_mask(n), float("-inf"))
    return s.softmax(-1) @ v


@spelled("causal")
def causal_inplace(q, k, v):
    s = q @ k.mT
    s /= math.sqrt(q.shape[-1])
    s.masked_fill_(
        torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), 1), torch.finfo(s.dtype).min
    )
    return s.softmax(-1) @ v


@spelled("causal")
def causal_additive(q, k, v):
    n = q.shape[2]
    bias = torch.full((n, n), float("-inf")).triu(1)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@spelled("causal")
def causal_where_arange(q, k, v):
    n = q.shape[2]
    i = torch.arange(n)
    s = q @ k.mT * 0.25
    s = torch.where(i[:, None] >= i[None, :], s, torch.tensor(-1e9))
    return s.softmax(-1) @ v


@spelled("causal & window(8)")
def sliding_window(q, k, v):
    i = torch.arange(q.shape[2])
    keep = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 8)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelled("causal")
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled()
def sdpa_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.4)


@spelled("causal")
def grouped_expand(q, k, v):
    b, h, n, d = q.shape
    k, v = (x[:, : h // 2, None].expand(b, h // 2, 2, n, d).reshape(b, h, n, d) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled()
def grouped_repeat_interleave(q, k, v):
    h = q.shape[1]
    k, v = (x[:, : h // 2].repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


@spelled("causal")
def grouped_flag(q, k, v):
    h = q.shape[1]
    return F.scaled_dot_product_attention(q, k[:, : h // 2], v[:, : h // 2], is_causal=True, enable_gqa=True)


@spelled()
def multi_query(q, k, v):
    return (q @ k[:, :1].mT * 0.25).softmax(-1) @ v[:, :1]


@spelled("causal")
def single_head(q, k, v):
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    n = q.shape[1]
    s = (q @ k.transpose(1, 2)) * 0.25 + torch.zeros(n, n).masked_fill(~causal_mask(n), float("-inf"))
    return s.softmax(-1) @ v


@spelled()
def tuple_transposed_output(q, k, v):
    b, h, n, d = q.shape
    a = (q @ k.permute(0, 1, 3, 2) * d**-0.5).softmax(-1)
    return (a @ v).transpose(1, 2).contiguous().view(b, n, h * d)


@spelled()
def multiply_and_sum(q, k, v):
    a = ((q[..., :, None, :] * k[..., None, :, :]).sum(-1) * 0.25).softmax(-1)
    return (a[..., None] * v[..., None, :, :]).sum(-2)


@spelled()
def normalised_after_the_values(q, k, v):
    e = torch.exp(q @ k.mT * 0.25)
    return (e @ v) / e.sum(-1, keepdim=True)


@spelled()
def exponential_of_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * 0.25, -1).exp() @ v


@spelled()
def temperature_of_heads(q, k, v):
    temperature = torch.linspace(0.1, 0.4, q.shape[1], dtype=q.dtype)[:, None, None]
    return (q @ k.mT / temperature.reciprocal()).softmax(-1) @ v


@spelled()
def temperature_of_queries(q, k, v):
    length = torch.arange(1, q.shape[2] + 1, dtype=q.dtype).log()
    return (q @ k.mT * (0.1 * length[:, None])).softmax(-1) @ v


@spelled("causal")
def gated_and_masked(q, k, v):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=q.dtype).tril()
    return (q @ k.mT * 0.25 * seen - 1e9 * (1 - seen)).softmax(-1) @ v


@no_attention
def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class _Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 7 * 16).view(7, 16))

    def forward(self, q, k, v):
        return (q @ self.weight.T).softmax(-1) @ self.weight


NEGATIVE["codebook"] = _Codebook()


@no_attention
def mixture_of_experts(q, k, v):
    gate = q.mean(-1, keepdim=True).expand(*q.shape[:-1], 2).softmax(-1)
    return gate[..., :1] * k + gate[..., 1:] * v


@no_attention
def sigmoid_attention(q, k, v):
    return torch.sigmoid(q @ k.mT) @ v


@no_attention
def slot_attention(q, k, v):
    a = (k @ q.mT * 0.25).softmax(-1)
    a = a / a.sum(-2, keepdim=True)
    return a.mT @ v


@no_attention
def classifier(q, k, v):
    return F.linear(q, torch.ones(5, q.shape[-1])).softmax(-1)


class Block(nn.Module):
    """A transformer block with one spelling of attention inside, for training and naming tests."""

    def __init__(self, dim: int, heads: int, spelling: Spelling) -> None:
        super().__init__()
        self.heads = heads
        self.spelling = spelling
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4)
        y = self.spelling(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, e))


class Stack(nn.Module):
    """Several blocks."""

    def __init__(self, depth: int, dim: int, heads: int, spelling: Spelling) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, spelling) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
