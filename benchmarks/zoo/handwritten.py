"""Attention as people write it by hand, and what looks like it and is none."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import BATCH, LENGTH, Zoo
from zoo.hugging_face import HEADS, WIDTH
from zoo.libraries import SEQUENCE, add

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Projected(nn.Module):
    """Queries, keys and values of one projection, a hand-written core, and an output projection."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.project, self.out, self.core = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), core

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.core(*self.project(x).chunk(3, -1)))
        return out


def heads(t: Tensor) -> Tensor:
    return t.view(t.shape[0], t.shape[1], HEADS, -1).transpose(1, 2)


def together(t: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def nanogpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    seen = torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH)
    return together(F.softmax(weights.masked_fill(seen == 0, float("-inf")), dim=-1) @ v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.view(BATCH, LENGTH, HEADS, -1) for t in (q, k, v))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(BATCH, LENGTH, WIDTH)


def folded_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(t).reshape(BATCH * HEADS, LENGTH, -1) for t in (q, k, v))
    scores = torch.baddbmm(
        torch.empty(BATCH * HEADS, LENGTH, LENGTH), q, k.transpose(1, 2), beta=0, alpha=0.25
    )
    return together(torch.bmm(scores.softmax(-1), v).view(BATCH, HEADS, LENGTH, -1))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    scores = q @ k.mT / 4
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return together((weights / weights.sum(-1, keepdim=True)) @ v)


def normalised_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    weights = torch.exp(q @ k.mT / 4)
    return together((weights @ v) / weights.sum(-1, keepdim=True))


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    weights = ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / 4).softmax(-1)
    return together((weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2))


def exp_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    return together(F.log_softmax(q @ k.mT / 4, dim=-1).exp() @ v)


def distance_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(q, k), -1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return together((q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT))


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads, (q, k, v))
    return together(q.softmax(-1) @ (k.softmax(-2).mT @ v))


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT / 8) @ v


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.relu(q @ k.mT / 8)
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


def mixture(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gates = (q @ k[0, :8].T).softmax(-1)
    return torch.einsum("bne,bned->bnd", gates, torch.stack([v * i for i in range(8)], 2))


def contrast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v * (q @ k.mT).softmax(-1).diagonal(dim1=-2, dim2=-1)[..., None]


def channel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(t).mT for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return together(((q @ k.mT).softmax(-1) @ v).mT)


def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slots = q[:, :8]
    share = (slots @ k.mT / 8).softmax(1)
    share = share / share.sum(-1, keepdim=True)
    return q + F.pad(share @ v, (0, 0, 0, LENGTH - 8))


def spellings(zoo: Zoo) -> None:
    """Adds all of them."""
    for core in (
        einsum,
        folded_baddbmm,
        written_out,
        normalised_last,
        multiplied_and_summed,
        exp_of_log_softmax,
    ):
        add(zoo, f"by hand: {core.__name__}", "by hand", 1, lambda core=core: Projected(core), SEQUENCE)  # type: ignore[misc]
    add(zoo, "by hand: nanogpt", "by hand", 1, lambda: Projected(nanogpt), SEQUENCE, {"causal": 1})
    for core in (
        distance_kernel, linear_attention, efficient_attention, sigmoid_attention, relu_attention, mixture, contrast,
        channel_attention, slot_attention,
    ):  # fmt: skip
        add(zoo, f"negative: {core.__name__}", "negative", 0, lambda core=core: Projected(core), SEQUENCE)  # type: ignore[misc]
