"""Buckets of causal CAST: the last members of a token's cluster exactly, those before as one mean.

Tokens sorted by cluster stand beside the members of their cluster in order of time. A bucket is then a
sliding window that ends at the cluster's first token, and what fell out of it a difference of prefix sums.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.aten.treeformer_ranges import Ranges
from fastattn_compile.kernels.aten.treeformer_tf import Part
from fastattn_compile.kernels.dispatch import gpu_obstacle, select


class Buckets:
    """Where the members of clusters stand when tokens are sorted by cluster.

    Args:
        assigned: ``(b, n)`` cluster of each token, -1 for none.
        clusters: Number of clusters.
        size: Members a token meets exactly, itself among them.
    """

    def __init__(self, assigned: Tensor, clusters: int, size: int) -> None:
        self.size, self.length = size, assigned.shape[1]
        keyed = assigned.masked_fill(assigned < 0, clusters)
        self.order = keyed.sort(dim=1, stable=True).indices
        self.back = self.order.argsort(dim=1)
        self.sorted = keyed.gather(1, self.order)
        place = torch.arange(self.length, device=assigned.device).expand_as(keyed)
        self.start = torch.searchsorted(self.sorted, self.sorted)
        self.stop = torch.searchsorted(self.sorted, self.sorted, right=True)
        self.real = self.sorted < clusters
        self.evicted = (place - size - self.start + 1).clamp(min=0) * self.real

    def _mask(self) -> dict[str, Any]:
        def visible(batch: int, rows: Tensor, keys: Tensor) -> Tensor:
            behind = rows[:, None] - keys
            same = self.start[batch, rows, None] <= keys
            return same & (behind >= 0) & (behind < self.size) & self.real[batch, rows, None]

        def span(start: int, stop: int) -> tuple[int, int]:
            return max(0, start - self.size + 1), stop

        return {"visible": visible, "span": span}

    def part(self, heads: int, kv_heads: int) -> Part:
        """Who meets whom, as ranges of the list of keys by cluster."""
        batch, length, device = self.order.shape[0], self.length, self.order.device
        unit = torch.arange(batch * kv_heads, device=device).view(batch, kv_heads, 1) * length
        begin = unit.repeat_interleave(heads // kv_heads, 1)
        stop = self.back + 1
        start = torch.maximum(self.start.gather(1, self.back), stop - self.size)
        start = torch.where(self.real.gather(1, self.back), start, stop)
        node, zero = (
            self.sorted.gather(1, self.back)[:, None].expand(-1, heads, -1),
            torch.zeros_like(begin + stop[:, None]),
        )
        order = (self.order[:, None] + unit).flatten()
        ranges = Ranges(order, start[:, None] + begin, stop[:, None] + begin, zero, (0,), node)
        return Part(ranges, self.size, self.size)

    @staticmethod
    def _take(x: Tensor, order: Tensor) -> Tensor:
        """Reorders the tokens of ``(b, heads, n, *)`` or ``(b, heads, n)``."""
        index = order[:, None].expand(-1, x.shape[1], -1)
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]) if x.dim() == 4 else index)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of every token over its bucket.

        Args:
            query: ``(b, h, n, d)``.
            key: ``(b, g, n, d)``.
            value: ``(b, g, n, e)``.
            scale: Factor on the scores.

        Returns:
            Output ``(b, h, n, e)``, 0 for tokens without a cluster; log-sum-exp ``(b, h, n)``, -inf for them.
        """
        if select("cast buckets forward", {"triton": partial(_obstacle, query, key, value)}) == "triton":
            from fastattn_compile.kernels.gpu import leaf

            out, lse = leaf.attend(query, key, value, scale, [self.part(query.shape[1], key.shape[1])])
            return out, lse.squeeze(-1)
        q, k, v = (self._take(x, self.order) for x in (query, key, value))
        out, lse = exact_aten.forward(q, k, v, scale, **self._mask())
        return self._take(out, self.back), self._take(lse, self.back)

    def attend_backward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float,
        out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Gradients of ``attend`` with respect to query, key and value.

        Args:
            query: As in ``attend``.
            key: As in ``attend``.
            value: As in ``attend``.
            scale: As in ``attend``.
            out: Output of ``attend``.
            lse: Log-sum-exp of ``attend``.
            grad_out: Gradient of the output.
            grad_lse: Gradient of the log-sum-exp; ``None`` is zero.
        """
        if select("cast buckets backward", {"triton": partial(_obstacle, query, key, value)}) == "triton":
            from fastattn_compile.kernels.gpu import leaf

            part = self.part(query.shape[1], key.shape[1])
            return leaf.backward(query, key, value, scale, [part], out, lse[..., None], grad_out, grad_lse)[
                :3
            ]
        q, k, v = (self._take(x, self.order) for x in (query, key, value))
        o, z, grad_o = (self._take(x, self.order) for x in (out, lse, grad_out))
        grad_z = None if grad_lse is None else self._take(grad_lse, self.order)
        *gradients, _ = exact_aten.backward(q, k, v, scale, o, z, grad_o, grad_z, **self._mask())
        return tuple(self._take(x, self.back) for x in gradients if x is not None)

    def evicted_count(self) -> Tensor:
        """Members of a token's cluster that fell out of its bucket, ``(b, n)``."""
        return self.evicted.gather(1, self.back)

    def evicted_mean(self, x: Tensor) -> Tensor:
        """Mean of those members, ``(b, g, n, *)`` for ``(b, g, n, *)``; 0 where there are none."""
        sums = _prefix_sums(self._take(x, self.order))
        begin, end = self.start, self.start + self.evicted
        total = self._take(sums, end) - self._take(sums, begin)
        mean = total / self.evicted[:, None, :, None].clamp(min=1)
        return self._take(mean.to(x.dtype), self.back)

    def evicted_mean_backward(self, grad: Tensor) -> Tensor:
        """Gradient of ``x`` from that of ``evicted_mean(x)``."""
        sums = _prefix_sums(self._take(grad, self.order) / self.evicted[:, None, :, None].clamp(min=1))
        # A member is in the mean of every later one that stands at least a bucket behind it.
        place = torch.arange(self.length, device=grad.device).expand_as(self.order)
        begin = torch.minimum(place + self.size, self.stop)
        total = (self._take(sums, self.stop) - self._take(sums, begin)) * self.real[:, None, :, None]
        return self._take(total.to(grad.dtype), self.back)


def _obstacle(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why Triton cannot serve a call; empty when it can."""
    reason = gpu_obstacle(query, key, value)
    if reason:
        return reason
    from fastattn_compile.kernels.gpu.launch import tensor_obstacle

    return tensor_obstacle(query, key, value)


def _prefix_sums(x: Tensor) -> Tensor:
    """Sums of the first ``0..n`` tokens of ``(b, g, n, *)``; float64, since differences of them are taken."""
    sums = x.double().cumsum(2)
    return torch.cat([torch.zeros_like(sums[:, :, :1]), sums], 2)
