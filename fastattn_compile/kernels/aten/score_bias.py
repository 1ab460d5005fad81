"""Biases on the scores that depend on the head and on the distance of key and query, as kernels read them.

Sizes: ``h`` query heads, ``g`` key heads, ``r = h // g`` query heads of a key head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ScoreBias(ABC):
    """A bias by distance, split into key heads and the query heads that share one."""

    @abstractmethod
    def at(self, heads: slice, distance: Tensor) -> Tensor:
        """What is added for some key heads.

        Args:
            heads: The key heads.
            distance: Integer, any shape: position of the key less that of the query.

        Returns:
            ``(heads, r, *distance.shape)``, the work type.
        """

    @abstractmethod
    def at_each(self, heads: Tensor, distance: Tensor) -> Tensor:
        """What is added for some key heads, each at distances of its own.

        Args:
            heads: ``(k,)`` numbers of key heads, in any order.
            distance: ``(k, *shape)``.

        Returns:
            ``(k, r, *shape)``.
        """

    def new_gradient(self, heads: slice) -> Tensor | None:
        """A place to add up gradients for some key heads; ``None`` when the bias gets no gradient."""
        return None

    def take(self, gradient: Tensor | None, grad_scores: Tensor, distance: Tensor) -> None:  # noqa: B027  not every bias is learned
        """Adds the gradients of scores to that of the bias.

        Args:
            gradient: From ``new_gradient``.
            grad_scores: ``(heads, r, *distance.shape)``.
            distance: As for ``at``.
        """

    def take_each(  # noqa: B027  not every bias is learned
        self, gradient: Tensor | None, heads: Tensor, grad_scores: Tensor, distance: Tensor
    ) -> None:
        """Adds the gradients of scores to that of the bias, in a fixed order.

        Args:
            gradient: From ``new_gradient`` of all heads.
            heads: As for ``at_each``.
            grad_scores: ``(k, r, *shape)``.
            distance: As for ``at_each``.
        """


class Slopes(ScoreBias):
    """ALiBi: ``-slope * |key - query|`` (Press, Smith, Lewis 2022). Its slopes get no gradient.

    Args:
        slopes: ``(g, r)``.
    """

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def at(self, heads: slice, distance: Tensor) -> Tensor:
        """What is added for some key heads."""
        slopes = self.slopes[heads].view(-1, self.slopes.shape[1], *[1] * distance.dim())
        return -slopes * distance.abs()

    def at_each(self, heads: Tensor, distance: Tensor) -> Tensor:
        """What is added for some key heads, each at distances of its own."""
        slopes = self.slopes[heads].view(len(heads), -1, *[1] * (distance.dim() - 1))
        return -slopes * distance[:, None].abs()


class Distances(ScoreBias):
    """One number for every distance; those beyond the list have that of the farthest one.

    Args:
        table: ``(g, r, 2 N - 1)``, for ``key - query`` from ``-(N - 1)`` to ``N - 1``.
    """

    def __init__(self, table: Tensor) -> None:
        self.table, self.most = table, table.shape[2] // 2

    def place(self, distance: Tensor) -> Tensor:
        """Where distances stand in the table."""
        return distance.clamp(-self.most, self.most) + self.most

    def at(self, heads: slice, distance: Tensor) -> Tensor:
        """What is added for some key heads."""
        found = self.table[heads].index_select(2, self.place(distance).flatten())
        return found.unflatten(2, distance.shape)

    def at_each(self, heads: Tensor, distance: Tensor) -> Tensor:
        """What is added for some key heads, each at distances of its own."""
        tables = self.table[heads]
        where = self.place(distance).flatten(1)[:, None].expand(-1, tables.shape[1], -1)
        return tables.gather(2, where).unflatten(2, distance.shape[1:])

    def new_gradient(self, heads: slice) -> Tensor:
        """Zeros, ``(2 N - 1, heads * r)``: rows of heads are added faster than single numbers."""
        part = self.table[heads]
        return part.new_zeros(part.shape[2], part.shape[0] * part.shape[1])

    def take(self, gradient: Tensor | None, grad_scores: Tensor, distance: Tensor) -> None:
        """Adds the gradients of scores to that of the bias, in a fixed order."""
        if gradient is not None:
            rows = grad_scores.flatten(2).flatten(0, 1).T
            gradient.index_add_(0, self.place(distance).flatten(), rows)

    def take_each(
        self, gradient: Tensor | None, heads: Tensor, grad_scores: Tensor, distance: Tensor
    ) -> None:
        """Adds the gradients of scores to that of the bias, in a fixed order."""
        if gradient is None:
            return
        group = self.table.shape[1]
        row = heads[:, None] * group + torch.arange(group, device=heads.device)
        where = self.place(distance).flatten(1)[:, None] * gradient.shape[1] + row[..., None]
        gradient.view(-1).index_add_(0, where.flatten(), grad_scores.flatten())


def score_bias(bias: Tensor | None, kv_heads: int, dtype: torch.dtype) -> ScoreBias | None:
    """The bias that a tensor describes.

    Args:
        bias: ``(h,)`` slopes, ``(h, 2 N - 1)`` by distance, or ``None``.
        kv_heads: Key heads.
        dtype: The work type.
    """
    if bias is None:
        return None
    split = bias.to(dtype).unflatten(0, (kv_heads, -1))
    return Slopes(split) if bias.dim() == 1 else Distances(split)
