"""Losses that train the planes beside the model's own: balance of the leaves, and attention mass inside
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.treeformer.config import TreeConfig
from fastattn_compile.operators.treeformer.reference import Members, members
from fastattn_compile.operators.treeformer.trees import Trees, routing_dtype


def _trees(config: TreeConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> Trees:
    return Trees.of(config, inputs, parameters, routing_dtype(inputs))


def balance_loss(config: TreeConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> Tensor:
    """How unevenly keys fill the nodes: mean over levels of ``2^l sum_j f_j m_j - 1`` (specification section
    6).

    ``f`` is the share of keys in a node, ``m`` their mean soft mass there. 0 for even leaves; differentiable
    in the planes and, where the inputs want it, in the keys. A weight of 0.01 is the specification's.

    Args:
        config: Of the operator.
        inputs: Tensors of the site.
        parameters: The learned parameters, in the operator's order.

    Returns:
        A scalar.
    """
    total = inputs.query.new_zeros((), dtype=routing_dtype(inputs))
    if not config.height:
        return total
    for _, keys in members(config, inputs, _trees(config, inputs, parameters)):
        total = total + _imbalance(keys, inputs)
    return total / (config.n_trees * config.height)


def _imbalance(keys: Members, inputs: AttentionInputs) -> Tensor:
    real = torch.ones_like(keys.leaf, dtype=keys.scores.dtype)
    if inputs.key_padding is not None:
        real = real * inputs.key_padding[:, None]
    share = (real / real.sum((0, 2), keepdim=True).clamp(min=1))[..., None]
    total = keys.scores.new_zeros(())
    for level, mass in enumerate(keys.mass()[1:], start=1):
        hard = torch.nn.functional.one_hot(keys.nodes[level], 1 << level)
        filled = (hard * share).sum((0, 2))
        total = total + ((1 << level) * (filled * (mass * share).sum((0, 2))).sum(-1) - 1).mean()
    return total


def mass_loss(
    config: TreeConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
) -> Tensor:
    """Teacher attention that falls outside the query's leaf: ``-sum_j P_ij log(sum_leaf Pi(q_i) Pi(k_j))``,
    mean over rows.

    ``P`` is the softmax attention of the inputs. One of the remedies for the gradient that softmax over a
    leaf does not give to the queries' planes (specification section 6, iii). O(rows keys leaves).

    Args:
        config: Of the operator.
        inputs: Tensors of the site.
        parameters: The learned parameters, in the operator's order.
        rows: ``(r,)`` query positions to sample.

    Returns:
        A scalar, the mean over trees.
    """
    dtype = routing_dtype(inputs)
    key = inputs.key.to(dtype).repeat_interleave(inputs.group, 1)
    scores = inputs.scale * (inputs.query[:, :, rows].to(dtype) @ key.mT) + inputs.added(rows).to(dtype)
    teacher, log_sum_exp = masked_softmax(scores, inputs.visible(rows))
    counted = log_sum_exp > -torch.inf
    total = scores.new_zeros(())
    for query, keys in members(config, inputs, _trees(config, inputs, parameters)):
        shared = query.mass()[-1][:, :, rows] @ keys.mass()[-1].mT
        cross = -(teacher.detach() * shared.clamp(min=1e-12).log()).sum(-1)
        total = total + (cross * counted).sum() / counted.sum().clamp(min=1)
    return total / config.n_trees
