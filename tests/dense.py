"""Attention by its dense formula with an explicit mask: the oracle in float64, and what a type itself costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import assert_as_good_as
from torch import Tensor


def dense(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``(b, h, n, d)`` to ``(b, g, m, d)`` as far as ``visible`` ``(b, h, n, m)``; out and lse."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.mT * scale + bias).masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return weights @ value, scores.masked_fill(blind, 0).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)


# All keys and values that are met, made from those given in their type, and the bias on their scores.
Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def with_gradients(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor, seeds: tuple[Tensor, Tensor],
    dtype: torch.dtype, rows: Rows | None = None,
) -> list[Tensor]:  # fmt: skip
    """Output, log-sum-exp and the gradients of query, key and value, all evaluated in one type."""
    given = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    keys, values, bias = (*given[1:], 0.0) if rows is None else rows(*given[1:])
    out, lse = dense(given[0], keys, values, scale, visible, bias)
    total = (out * seeds[0].to(dtype)).sum()
    total = total + (lse.masked_fill(lse == -torch.inf, 0) * seeds[1].to(dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, given)]


NAMES = "output", "log_sum_exp", "query gradient", "key gradient", "value gradient"


def check(
    got: list[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor,
    seeds: tuple[Tensor, Tensor], rows: Rows | None = None,
) -> None:  # fmt: skip
    """Holds results of a kernel against the oracle, and its error against that of the formula in its type."""
    given = query, key, value, scale, visible, seeds
    oracle, formula = (with_gradients(*given, dtype, rows) for dtype in (torch.float64, value.dtype))
    for name, x, exact, typical in zip(NAMES, got, oracle, formula, strict=True):
        assert_as_good_as(x, oracle=exact, formula=typical, name=name)
