"""Closed nodes as rows of Barnes-Hut attention in Triton: one mean key and value each, and the way of their gradients back
to tokens.

Sizes as in ``barnes_hut_tree``; ``e`` channels of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastattn_compile.kernels.gpu.barnes_hut_tree import SUM, Closed, NodeTree, merged
from fastattn_compile.kernels.gpu.launch import step

# What kernels that own a group take where no node is met: no number either, or the kernel would hold it in vain.
NO_NODES = (None,) * 8


@dataclass(frozen=True)
class Pooled:
    """All nodes as rows, and who meets which.

    Args:
        tree: The tree.
        key: ``(u, N, d)`` mean keys in the type of the tokens, which products on tensor cores take; summed in float32.
        value: ``(u, N, e)`` mean values likewise.
        weight: ``(b or 1, N)`` float32 log2 of the tokens of a node, -inf for none.
        closed: The nodes that groups meet.
    """

    tree: NodeTree
    key: Tensor
    value: Tensor
    weight: Tensor
    closed: Closed

    @property
    def room(self) -> int:
        """Most nodes of a group."""
        return self.closed.nodes.shape[2]

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What kernels that own a group take."""
        return (
            self.key, self.value, self.weight, self.closed.nodes, self.closed.count, self.room, self.tree.nodes,
            step(self.weight),
        )  # fmt: skip

    def to_tokens(self, grads: Tensor, taken: Tensor) -> Tensor:
        """Gradients of the rows as those of tokens: a mean hands its own to its tokens in equal parts.

        Goes down level by level, so that the work is O(n).

        Args:
            grads: ``(u, N, channels)``.
            taken: ``(b or 1, n)`` boolean, the tokens that belong to nodes.

        Returns:
            ``(u, n, channels)``.
        """
        tree, units = self.tree, grads.shape[0]
        parts = grads / _of_units(tree.count, units).clamp(min=1)[..., None]
        carried = parts[:, tree.first[-1] :]
        for first, total in zip(tree.first[-2::-1], tree.total[-2::-1]):
            above = carried.repeat_interleave(tree.pattern.fanout, 1)[:, :total]
            carried = parts[:, first : first + total] + above
        tokens = carried.repeat_interleave(tree.pattern.leaf, 1)[:, : taken.shape[1]]
        return tokens.masked_fill(~_of_units(taken, units)[..., None], 0)


def pool_nodes(tree: NodeTree, key: Tensor, value: Tensor, taken: Tensor, closed: Closed) -> Pooled:
    """The rows of all nodes.

    Args:
        tree: The tree.
        key: ``(b, g, n, d)``, any strides.
        value: ``(b, g, n, e)`` likewise.
        taken: ``(b or 1, n)`` boolean, the tokens that belong to nodes.
        closed: The nodes that groups meet.
    """
    pattern, total, first = tree.pattern, tree.total, tree.first
    sums = tree.main
    if pattern.statistic == "bound":
        sums = merged(pattern, key, taken, total, first, SUM)
    count = _of_units(tree.count, sums.shape[0]).clamp(min=1)[..., None]
    value_sums = merged(pattern, value, taken, total, first, SUM)
    keys, values = ((x / count).to(key.dtype) for x in (sums, value_sums))
    return Pooled(tree, keys, values, tree.count.log2(), closed)


def _of_units(x: Tensor, units: int) -> Tensor:
    """``(b or 1, k)`` as ``(u, k)``."""
    return x.repeat_interleave(units // x.shape[0], 0)
