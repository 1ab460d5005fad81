"""Biases by distance in leaf attention on ATen: a tile holds queries of several heads, and its keys stand anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBias:
    """What is added to the scores of pairs by the distance of key and query.

    Args:
        bias: ``(h,)`` slopes of ALiBi, or ``(h, 2 N - 1)`` numbers for ``key - query`` from ``-(N - 1)`` to ``N - 1``;
            those beyond have that of the farthest one. The work type.
        query_place: ``(b * h * n,)`` int64, where queries stand.
        key_place: ``(b * g * m,)`` int64, where keys stand.
        queries: Queries of a head, ``n``.
    """

    bias: Tensor
    query_place: Tensor
    key_place: Tensor
    queries: int

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The bias of rows of queries ``(t, r)`` and rows of keys ``(t, c)``, ``(t, r, c)``."""
        if self.bias.dim() == 1:
            return -self.bias[self._head(queries)][:, :, None] * self._distance(queries, keys).abs()
        return self.bias.flatten()[self._listed(queries, keys)]

    def new_gradient(self) -> Tensor | None:
        """Zeros like the numbers; ``None`` for slopes, which get no gradient."""
        return None if self.bias.dim() == 1 else torch.zeros_like(self.bias)

    def add_gradient(self, total: Tensor | None, queries: Tensor, keys: Tensor, grad_scores: Tensor) -> None:
        """Adds the gradients of scores ``(t, r, c)`` to that of the bias."""
        if total is not None:
            total.view(-1).index_add_(0, self._listed(queries, keys).flatten(), grad_scores.flatten())

    def _head(self, queries: Tensor) -> Tensor:
        return torch.div(queries, self.queries, rounding_mode="floor") % self.bias.shape[0]

    def _distance(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.key_place[keys][:, None] - self.query_place[queries][:, :, None]

    def _listed(self, queries: Tensor, keys: Tensor) -> Tensor:
        most = self.bias.shape[1] // 2
        first = self._head(queries) * self.bias.shape[1] + most
        return self._distance(queries, keys).clamp_(-most, most) + first[:, :, None]
