"""A small causal language model whose attention is any operator, and the loop that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn_compile.kernels.rotary import Rotary
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.window.cost import equal_window


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model.

    Args:
        vocabulary: Tokens there are.
        length: Tokens of a sequence.
        width: Channels.
        layers: Blocks.
        heads: Of an attention.
        rotary_base: Of a rotary embedding of queries and keys; 0, a learned vector for every position.
    """

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    rotary_base: float = 0.0

    @property
    def site(self) -> SiteSpec:
        """One attention of the model."""
        d = self.width // self.heads
        return SiteSpec(1, self.heads, self.heads, self.length, self.length, d, d, mask=CAUSAL)


class Attention(nn.Module):
    """Causal self-attention by an operator, whose learned parameters live here."""

    def __init__(self, sizes: Sizes, operator: Operator) -> None:
        super().__init__()
        self.operator, self.sizes = operator, sizes
        self.qkv, self.out = (nn.Linear(sizes.width, m * sizes.width, bias=False) for m in (3, 1))
        self.learned = nn.ParameterList()

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        shape = *x.shape[:2], 3, self.sizes.heads, -1
        q, k, v = (t.contiguous() for t in self.qkv(x).view(shape).permute(2, 0, 3, 1, 4))
        if self.sizes.rotary_base:
            turn = Rotary(self.sizes.rotary_base, q.shape[-1]).at(torch.arange(x.shape[1]), x.dtype)
            q, k = turn.redo(q), turn.redo(k)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out, _ = attend(q, k, v, self.operator, mask=CAUSAL, parameters=tuple(self.learned))
        return self.out(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Starts the operator's parameters from the queries, keys and values that ``x`` gives."""
        q, k, v = self.heads(x)
        sample = AttentionInputs(q, k, v, q.shape[-1] ** -0.5, CAUSAL)
        spec = dataclasses.replace(self.sizes.site, batch=len(x))
        made = self.operator.initial_parameters(spec, sample)
        self.learned = nn.ParameterList(nn.Parameter(value.clone()) for value in made.values())


class Block(nn.Module):
    def __init__(self, sizes: Sizes, operator: Operator) -> None:
        super().__init__()
        w = sizes.width
        self.before, self.attention = nn.LayerNorm(w), Attention(sizes, operator)
        self.mlp = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 4 * w), nn.GELU(), nn.Linear(4 * w, w))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Embedding, blocks, logits. ``forward(ids)`` maps ``(batch, n)`` to ``(batch, n, vocabulary)``."""

    def __init__(self, sizes: Sizes, operator: Operator) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Parameter(0.02 * torch.randn(sizes.length, sizes.width), not sizes.rotary_base)
        if sizes.rotary_base:
            nn.init.zeros_(self.places)
        self.blocks = nn.ModuleList(Block(sizes, operator) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def fit(self, ids: Tensor) -> None:
        """Starts every operator's parameters from a batch, layer by layer."""
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            block.attention.fit(block.before(x))
            x = block(x)


@dataclass(frozen=True)
class Trial:
    """A row of a table: an operator, and why it is there."""

    name: str
    operator: str
    options: dict[str, Any]

    def make(self) -> Operator:
        return make_operator(self.operator, **self.options)


def window_of(trial: Trial, sizes: Sizes, sinks: int = 4) -> Trial:
    """The narrowest window that meets at least as many keys as the trial's queries meet."""
    keys = trial.make().cost(sizes.site).keys_per_query
    width = equal_window(keys, sizes.site, sinks).width
    return Trial(f"window, keys of {trial.operator}", "window", {"width": width, "sinks": sinks})


def build(trial: Trial, sizes: Sizes, sample: Tensor, seed: int) -> Decoder:
    """The model with the operator's parameters started; weights depend on the seed alone."""
    torch.manual_seed(seed)
    model = Decoder(sizes, trial.make())
    model.fit(sample)
    return model


def train(
    model: Decoder,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    watch: Callable[[int, float], bool] = lambda step, loss: False,
) -> int:
    """AdamW with a short warm-up and a cosine to zero.

    Args:
        model: Changed in place.
        batches: Tokens and labels ``(batch, n)``; labels of -100 are not counted.
        steps: Steps.
        rate: Highest learning rate.
        watch: Told every step and its loss; true ends the training.

    Returns:
        Steps done.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warm, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * t / steps)).item())),
    )
    for step, (ids, labels) in zip(range(1, steps + 1), batches):
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if watch(step, loss.item()):
            return step
    return steps
