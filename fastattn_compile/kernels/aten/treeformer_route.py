"""Routing vectors through binary trees of hyperplanes, and the straight-through gradients of that routing.

A tree of height ``h`` has ``2^h - 1`` planes in heap order: node ``j`` of level ``l`` stands at ``2^l - 1 +
j``, its children are the nodes ``2j`` and ``2j + 1`` of level ``l + 1``. A vector goes to the second child
where ``<w, x> + b > 0``. The leaf number of a vector holds its whole path: its node at level ``l`` is ``leaf
>> (h - l)``.

Sizes: ``b`` batch, ``h`` heads, ``t`` trees, ``n`` vectors, ``d`` channels, ``N = 2^height - 1`` planes of a
tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Levels with at most this many nodes are scored by one product and a pick; wider ones gather the plane of
# each vector.
_DENSE_NODES = 64
# Elements of the largest temporary.
_WORKING_SET = 1 << 22


@dataclass(frozen=True)
class Estimator:
    """How a gradient passes the hard decisions of a tree (specification section 6).

    Args:
        kind: ``"soft"``: the backward of the product of sigmoids along a path (6a). ``"sum"``: the backward
            of a sum over the decisions of a path, each by its own surrogate (6b).
        surrogate: Of ``"sum"``: ``"clip"``, slope 1 where ``|z| <= 1``; or ``"sigmoid"``.
        beta: Steepness of the sigmoid.
    """

    kind: str = "soft"
    surrogate: str = "clip"
    beta: float = 1.0

    def slope(self, scores: Tensor) -> Tensor:
        """Derivative of the surrogate decision of ``"sum"``."""
        if self.surrogate == "clip":
            return (scores.abs() <= 1).to(scores.dtype)
        chance = torch.sigmoid(self.beta * scores)
        return self.beta * chance * (1 - chance)


def height_of(weight: Tensor) -> int:
    """Height of trees with planes ``(..., N, d)``."""
    return (weight.shape[-2] + 1).bit_length() - 1


def follow(x: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Routes vectors from the root to a leaf.

    Args:
        x: ``(b, h, n, d)``, of the type of ``weight``.
        weight: ``(h, t, N, d)``, normals of the planes.
        offset: ``(h, t, N)``.

    Returns:
        Leaf numbers ``(b, h, t, n)``, int64; scores ``z`` at the nodes passed, ``(b, h, t, n, height)``.
    """
    batch, heads, length, channels = x.shape
    trees, height = weight.shape[1], height_of(weight)
    leaf = torch.empty(batch, heads, trees, length, dtype=torch.int64, device=x.device)
    scores = x.new_empty(batch, heads, trees, length, height)
    width = max(channels, _DENSE_NODES) * batch * heads * trees
    step = max(1, _WORKING_SET // max(1, width))
    for start in range(0, length, step):
        part = slice(start, start + step)
        leaf[..., part], scores[..., part, :] = _follow(x[:, :, None, part], weight, offset, height)
    return leaf, scores


def _follow(x: Tensor, weight: Tensor, offset: Tensor, height: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, length, _ = x.shape
    trees = weight.shape[1]
    node = torch.zeros(batch, heads, trees, length, dtype=torch.int64, device=x.device)
    scores = x.new_empty(batch, heads, trees, length, height)
    for level in range(height):
        first, last = (1 << level) - 1, (2 << level) - 1
        normals, offsets = weight[:, :, first:last], offset[:, :, first:last]
        if last - first <= _DENSE_NODES:
            every = torch.matmul(x, normals.mT) + offsets[:, :, None]
            here = every.gather(-1, node[..., None]).squeeze(-1)
        else:
            tree = torch.arange(heads * trees, device=x.device).view(heads, trees, 1) * (last - first)
            at = tree + node
            here = (x * normals.flatten(0, 2)[at]).sum(-1) + offsets.flatten()[at]
        scores[..., level] = here
        node = 2 * node + (here > 0)
    return node, scores


def score_gradients(
    scores: Tensor,
    estimator: Estimator,
    grad_member: Tensor,
    grad_log_mass: Tensor | None = None,
    grad_last: Tensor | None = None,
) -> Tensor:
    """Gradients of the scores at the nodes passed, when only those of a vector's own path carry any.

    Args:
        scores: From ``follow``.
        estimator: The straight-through estimator.
        grad_member: ``(b, h, t, n, height + 1)``, gradient of the membership in the path's node at each
            level.
        grad_log_mass: Same shape, gradient of the logarithm of the soft mass of that node.
        grad_last: ``(b, h, t, n)``, gradient of the scores at the deepest plane, by which it is reached
            directly.

    Returns:
        ``(b, h, t, n, height)``.
    """
    sign = torch.where(scores > 0, 1.0, -1.0).to(scores.dtype)
    refused = torch.sigmoid(-estimator.beta * scores.abs())
    below = grad_member[..., 1:]
    if estimator.kind == "soft":
        # The mass of the path's node at level l is the product of the chances of the l decisions before it.
        below = below * torch.log1p(-refused).cumsum(-1).exp()
        if grad_log_mass is not None:
            below = below + grad_log_mass[..., 1:]
        slope = estimator.beta * refused
        grad_scores = sign * slope * _suffix_sum(below)
    else:
        grad_scores = sign * estimator.slope(scores) * _suffix_sum(below)
        if grad_log_mass is not None:
            grad_scores = grad_scores + sign * estimator.beta * refused * _suffix_sum(grad_log_mass[..., 1:])
    if grad_last is not None:
        grad_scores[..., -1] += grad_last
    return grad_scores


def path_gradients(x: Tensor, weight: Tensor, leaf: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of vectors and planes from those of the scores at the nodes passed: O(n height d).

    Args:
        x: As in ``follow``.
        weight: As in ``follow``.
        leaf: From ``follow``.
        slopes: From ``score_gradients``.

    Returns:
        Gradients of ``x``, ``weight`` and the offsets.
    """
    height = slopes.shape[-1]
    heads, trees, planes, channels = weight.shape
    grad_x = torch.zeros_like(x)
    grad_weight, grad_offset = weight.new_zeros(weight.shape), weight.new_zeros(heads, trees, planes)
    tree = torch.arange(heads * trees, device=x.device).view(heads, trees, 1) * planes
    for level in range(height):
        at = (tree + (1 << level) - 1 + (leaf >> (height - level))).flatten()
        here = slopes[..., level]
        grad_offset.view(-1).index_add_(0, at, here.flatten())
        grad_x += (here[..., None] * weight.flatten(0, 2)[at].view(*leaf.shape, channels)).sum(2)
        spread = (here[..., None] * x[:, :, None]).flatten(0, 3)
        grad_weight.view(-1, channels).index_add_(0, at, spread)
    return grad_x, grad_weight, grad_offset


def _suffix_sum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def dense_backward(
    x: Tensor, weight: Tensor, offset: Tensor, estimator: Estimator, grad_levels: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes and vectors when the membership in every node carries one: O(n 2^height d).

    Args:
        x: ``(..., n, d)``.
        weight: ``(..., N, d)``, broadcastable in the leading dimensions.
        offset: ``(..., N)``.
        estimator: The straight-through estimator.
        grad_levels: For each level ``l`` from 0 to the height ``(..., n, 2^l)``, gradient of the membership
            in its nodes.

    Returns:
        Gradients of ``x``, of the planes ``(..., N, d)`` and of the offsets ``(..., N)``, leading dimensions
        not summed.
    """
    height = len(grad_levels) - 1
    scores = torch.matmul(x, weight.mT) + offset.unsqueeze(-2)
    soft = estimator.kind == "soft"
    if soft:
        chance = torch.sigmoid(estimator.beta * scores)
        slope = estimator.beta * chance * (1 - chance)
        mass = [torch.ones_like(scores[..., :1])]
        for level in range(height - 1):
            here = chance[..., (1 << level) - 1 : (2 << level) - 1]
            mass.append(torch.stack([mass[-1] * (1 - here), mass[-1] * here], -1).flatten(-2))
    else:
        slope = estimator.slope(scores)
    grad_scores = torch.empty_like(scores)
    below = grad_levels[height]
    for level in range(height - 1, -1, -1):
        at = slice((1 << level) - 1, (2 << level) - 1)
        left, right = below[..., 0::2], below[..., 1::2]
        difference = right - left
        if soft:
            grad_scores[..., at] = mass[level] * difference * slope[..., at]
            below = grad_levels[level] + left + chance[..., at] * difference
        else:
            grad_scores[..., at] = difference * slope[..., at]
            below = grad_levels[level] + left + right
    return torch.matmul(grad_scores, weight), torch.matmul(grad_scores.mT, x), grad_scores.sum(-2)
