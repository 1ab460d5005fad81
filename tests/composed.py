"""Attention composed of random choices: every step in one of the ways in which people write it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

BATCH, HEADS, LENGTH, DIM, REPEATS, WINDOW = 2, 4, 24, 8, 2, 7
SCALE = 0.3

PRODUCTS = ("matmul", "at", "einsum", "einsum_bnhd", "bmm", "baddbmm", "multiply_sum", "keys_first")
SCALES = (
    "none", "mul", "div", "query", "key", "both", "tensor", "number_tensor", "sqrt_dim", "temperature", "in_place", "after",
)  # fmt: skip
MASKS = ("none", "causal", "window", "padding", "causal_padding")
MASKED_BY = ("fill", "where", "add_inf", "add_min", "add_big", "fill_in_place", "fill_min", "log", "gate")
SOFTMAXES = (
    "functional", "torch", "method", "float32", "log_exp", "exp_sum", "exp_max_sum", "after_values", "transposed",
)  # fmt: skip
DROPOUTS = ("none", "zero", "eval", "scaled_by_one")
GROUPS = ("none", "interleave", "expand", "stack")
CAPS = ("none", "tanh")


@dataclass(frozen=True)
class Composition:
    """One choice of each step.

    Args:
        product: How queries meet keys, and weights meet values.
        scale: Where the scores are scaled.
        mask: What is hidden.
        masked_by: How it is hidden.
        softmax: How the weights are made.
        dropout: A dropout that does nothing.
        group: How shared keys are repeated over heads.
        cap: Whether scores are capped.
        dtype: Type of the tensors.
        returned: The weights are returned too.
    """

    product: str = "matmul"
    scale: str = "mul"
    mask: str = "none"
    masked_by: str = "fill"
    softmax: str = "functional"
    dropout: str = "none"
    group: str = "none"
    cap: str = "none"
    dtype: torch.dtype = torch.float32
    returned: bool = False

    @property
    def structure(self) -> str:
        """The mask as the finder must read it."""
        return {
            "none": "none", "causal": "causal", "window": f"causal & window({WINDOW})", "padding": "key_padding",
            "causal_padding": "causal & key_padding",
        }[self.mask]  # fmt: skip

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Queries, keys, values and padding; the numbers are those of ``self.dtype``."""
        generator = torch.Generator().manual_seed(0)
        kv_heads = HEADS if self.group == "none" else HEADS // REPEATS
        made = [
            (0.7 * torch.randn(BATCH, h, LENGTH, DIM, generator=generator))
            .to(self.dtype)
            .to(dtype or self.dtype)
            for h in (HEADS, kv_heads, kv_heads)
        ]
        real = torch.ones(BATCH, LENGTH, dtype=torch.long)
        real[0, LENGTH - 5 :] = 0
        return (*made, real)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Any:
        k, v = self._repeat(k), self._repeat(v)
        q, k = self._scaled_before(q, k)
        scores = self._scores(q, k)
        scores = self._masked(self._capped(self._scaled(scores)), real)
        if self.scale == "after":
            scores = scores * SCALE
        if self.softmax == "after_values":
            weights = torch.exp(scores)
            out = self._sum(weights, v) / self._rows(weights)
        else:
            weights = self._dropped(self._softmax(scores).to(v.dtype))
            out = self._sum(weights, v)
        return (out, weights) if self.returned else out

    def _repeat(self, x: Tensor) -> Tensor:
        if self.group == "interleave":
            return x.repeat_interleave(REPEATS, dim=1)
        if self.group == "expand":
            b, h, n, d = x.shape
            return x[:, :, None].expand(b, h, REPEATS, n, d).reshape(b, h * REPEATS, n, d)
        if self.group == "stack":
            return x.unsqueeze(2).repeat(1, 1, REPEATS, 1, 1).flatten(1, 2)
        return x

    def _scaled_before(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale == "query":
            return q * SCALE, k
        if self.scale == "key":
            return q, k / (1 / SCALE)
        if self.scale == "both":
            return q * math.sqrt(SCALE), k * math.sqrt(SCALE)
        return q, k

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        b, h, n, d = q.shape
        if self.product == "at":
            return q @ k.mT
        if self.product == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if self.product == "einsum_bnhd":
            return torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2))
        if self.product == "bmm":
            return torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2)).view(b, h, n, n)
        if self.product == "baddbmm":
            base = torch.empty(b * h, n, n, dtype=q.dtype)
            return torch.baddbmm(base, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0).unflatten(0, (b, h))
        if self.product == "multiply_sum":
            return (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
        if self.product == "keys_first":
            return torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2)
        return torch.matmul(q, k.transpose(-1, -2))

    def _scaled(self, scores: Tensor) -> Tensor:
        if self.scale == "mul":
            return scores * SCALE
        if self.scale == "div":
            return scores / (1 / SCALE)
        if self.scale == "number_tensor":
            return scores / torch.tensor(1 / SCALE, dtype=scores.dtype)
        if self.scale == "tensor":
            return torch.mul(scores, torch.full((), SCALE, dtype=scores.dtype))
        if self.scale == "sqrt_dim":
            return scores / math.sqrt(DIM)
        if self.scale == "temperature":
            return scores * torch.linspace(0.1, 0.4, HEADS, dtype=scores.dtype).view(HEADS, 1, 1)
        if self.scale == "in_place":
            scores *= SCALE
        return scores

    def _capped(self, scores: Tensor) -> Tensor:
        return torch.tanh(scores / 2.0) * 2.0 if self.cap == "tanh" else scores

    def _seen(self, real: Tensor) -> Tensor | None:
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        causal, padding = j <= i, (real > 0)[:, None, None, :]
        return {
            "none": None, "causal": causal, "window": causal & (i - j < WINDOW), "padding": padding,
            "causal_padding": causal & padding,
        }[self.mask]  # fmt: skip

    def _masked(self, scores: Tensor, real: Tensor) -> Tensor:
        seen = self._seen(real)
        if seen is None:
            return scores
        least = torch.finfo(scores.dtype).min
        big = -6e4 if self.dtype == torch.float16 else -1e9
        if self.masked_by == "where":
            return torch.where(seen, scores, torch.tensor(float("-inf"), dtype=scores.dtype))
        if self.masked_by == "add_inf":
            return scores + torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, float("-inf"))
        if self.masked_by == "add_min":
            return scores + torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, least)
        if self.masked_by == "add_big":
            return scores + (1.0 - seen.to(scores.dtype)) * big
        if self.masked_by == "fill_min":
            return scores.masked_fill(seen == 0, least)
        if self.masked_by == "fill_in_place":
            return scores.contiguous().masked_fill_(torch.logical_not(seen), big)
        if self.masked_by == "log":
            return scores + seen.to(scores.dtype).log()
        if self.masked_by == "gate":
            kept = seen.to(scores.dtype)
            return scores * kept + big * (1 - kept)
        return scores.masked_fill(~seen, float("-inf"))

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.softmax == "torch":
            return torch.softmax(scores, -1)
        if self.softmax == "method":
            return scores.softmax(dim=3)
        if self.softmax == "float32":
            wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
            return F.softmax(scores, dim=-1, dtype=wide)
        if self.softmax == "log_exp":
            return F.log_softmax(scores, dim=-1).exp()
        if self.softmax == "exp_sum":
            e = scores.exp()
            return e / e.sum(dim=-1, keepdim=True)
        if self.softmax == "exp_max_sum":
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            return torch.div(e, torch.sum(e, -1, keepdim=True))
        if self.softmax == "transposed":
            return scores.transpose(-1, -2).softmax(-2).transpose(-1, -2)
        return F.softmax(scores, dim=-1)

    def _dropped(self, weights: Tensor) -> Tensor:
        if self.dropout == "zero":
            return F.dropout(weights, p=0.0, training=True)
        if self.dropout == "eval":
            return F.dropout(weights, p=0.5, training=False)
        return weights * 1.0 if self.dropout == "scaled_by_one" else weights

    def _rows(self, weights: Tensor) -> Tensor:
        total = weights.sum(-1)
        return total.unsqueeze(-1)

    def _sum(self, weights: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = v.shape
        if self.product == "at":
            return weights @ v
        if self.product == "einsum":
            return torch.einsum("...ij,...jd->...id", weights, v)
        if self.product == "einsum_bnhd":
            return torch.einsum("bhij,bjhd->bihd", weights, v.transpose(1, 2)).transpose(1, 2)
        if self.product in ("bmm", "baddbmm"):
            out = torch.bmm(weights.reshape(b * h, n, n), v.reshape(b * h, n, d))
            return out.view(b, h, n, d)
        if self.product == "multiply_sum":
            return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
        return torch.matmul(weights, v)


compositions = st.builds(
    Composition,
    product=st.sampled_from(PRODUCTS),
    scale=st.sampled_from(SCALES),
    mask=st.sampled_from(MASKS),
    masked_by=st.sampled_from(MASKED_BY),
    softmax=st.sampled_from(SOFTMAXES),
    dropout=st.sampled_from(DROPOUTS),
    group=st.sampled_from(GROUPS),
    cap=st.sampled_from(CAPS),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    returned=st.booleans(),
)
