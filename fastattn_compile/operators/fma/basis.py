"""The learned bases of fast multipole attention: their parameters, and how the recursive one unfolds to combinations.

Every basis is a list of tensors, the same for keys and for values. Depthwise and dense have a weight and a bias for each
level. The recursive one has a weight and a bias for the finest level and one table that merges the rows of two children,
the same at every level: a row of a level is a combination of the group's tokens as in the depthwise basis, whose weights
are products of those tables (specification 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.operators.fma.config import FmaConfig


def parameter_layout(
    config: FmaConfig, levels: int, head_dim: int, value_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the learned parameters, in order.

    Args:
        config: The configuration.
        levels: Pooled levels they serve; the recursive basis serves any number.
        head_dim: Channels of a key.
        value_dim: Channels of a value.
    """
    rank, sides = config.rank, (("key", head_dim), ("value", value_dim))
    if config.basis == "recursive":
        for side, channels in sides:
            yield f"{side}_weight", (channels, rank, config.block)
            yield f"{side}_bias", (channels, rank)
            yield f"{side}_merge", (channels, rank, 2 * rank)
    elif config.basis != "mean":
        for level in range(levels):
            for side, channels in sides:
                mixed = (channels,) if config.basis == "dense" else ()
                yield f"{side}_weight_{level + 1}", (channels, rank, *mixed, config.block << level)
                yield f"{side}_bias_{level + 1}", (channels, rank)


def mean_start(shape: tuple[int, ...]) -> Tensor:
    """What makes the rows means of the parts of a group, without bias (specification 5.1).

    Args:
        shape: Of a weight, a merging table or a bias, as ``parameter_layout`` gives it.
    """
    start = torch.zeros(shape)
    if len(shape) > 2:
        rank, width = shape[1], shape[-1]
        row = torch.arange(width) * rank // width
        means = (row == torch.arange(rank)[:, None]) * (rank / width)
        if len(shape) == 3:
            start[:] = means
        else:
            start.diagonal(dim1=0, dim2=2).copy_(means[..., None])
    return start


def unfold(parameters: tuple[Tensor, ...], levels: int) -> tuple[Tensor, ...]:
    """The recursive basis as a depthwise one: weight and bias of keys and of values for every level.

    Args:
        parameters: Weight ``(c, rank, block)``, bias ``(c, rank)`` and merging table ``(c, rank, 2 * rank)`` of keys, then
            of values.
        levels: How many levels.

    Returns:
        Four tensors a level, at least float32; differentiable.
    """
    wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    unfolded: list[Tensor] = []
    weights = [wide[0], wide[3]]
    for _ in range(levels):
        unfolded += [weights[0], wide[1], weights[1], wide[4]]
        weights = [
            # The rows of the first child, then those of the second, on the tokens of each.
            torch.einsum("crjs,cst->crjt", merge.unflatten(2, (2, -1)), weight).flatten(2)
            for merge, weight in ((wide[2], weights[0]), (wide[5], weights[1]))
        ]
    return tuple(unfolded)


def unfold_backward(
    parameters: tuple[Tensor, ...], levels: int, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of ``unfold``.

    Args:
        parameters: As in ``unfold``.
        levels: As in ``unfold``, at least 1.
        grads: Gradients of its results.
    """
    weights, found = unfold(parameters, levels), []
    for side in (0, 1):
        merge = parameters[3 * side + 2].to(weights[0].dtype).unflatten(2, (2, -1))
        of_bias = sum(grads[4 * level + 2 * side + 1] for level in range(levels))
        of_weight, of_merge = grads[4 * (levels - 1) + 2 * side], torch.zeros_like(merge)
        for level in reversed(range(levels - 1)):
            children = of_weight.unflatten(2, (2, -1))
            of_merge += torch.einsum("crjt,cst->crjs", children, weights[4 * level + 2 * side])
            of_weight = grads[4 * level + 2 * side] + torch.einsum("crjt,crjs->cst", children, merge)
        found += [of_weight, of_bias, of_merge.flatten(2)]
    return tuple(torch.as_tensor(g).to(p.dtype) for g, p in zip(found, parameters))
