"""A loss that trains the surrogates of CAST: the softmax mass of a query should lie in its own clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.parameters import unpacked
from fastattn_compile.operators.cast.reference import Products
from fastattn_compile.operators.exact.reference import compute_dtype, masked_softmax

_BALANCE = 0.01


def routing_loss(
    config: CastConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
) -> Tensor:
    """``-sum_j P_ij log(sum_c A_ic A_jc)``, mean over rows, plus how unevenly tokens fill the clusters.

    ``P`` is the softmax attention of the inputs, ``A`` the affinity of a token to the clusters (specification 1.2): the sum
    over clusters is the chance that query and key fall into the same one. Up to the entropy of ``P`` this is the
    divergence of that chance from the softmax mass, as routers are trained in sparse attention with a learned index
    (DeepSeek-V3.2, SeerAttention arXiv 2410.13276). The balance ``clusters * sum_c f_c m_c - 1`` with the share ``f`` of
    tokens that a cluster holds and their mean affinity ``m`` keeps one cluster from taking all.

    Args:
        config: Of the operator.
        inputs: Tensors of the site.
        parameters: The learned parameters, in order.
        rows: ``(r,)`` query positions to sample.

    Returns:
        A scalar, differentiable in surrogates and gate.
    """
    dtype = torch.promote_types(compute_dtype(inputs), torch.float32)
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    weights = unpacked(config, parameters, query.shape[1]).to(dtype)
    real = inputs.key_padding
    scores = inputs.scale * (query[:, :, rows] @ key.repeat_interleave(inputs.group, 1).mT)
    scores = scores + inputs.added(rows).to(dtype)
    teacher, log_sum_exp = masked_softmax(scores, inputs.visible(rows))
    counted = (log_sum_exp > -torch.inf).any(1)
    total = query.new_zeros(())
    for b in range(query.shape[0]):
        affinity, _ = Products.of(query[b], key[b], weights).affinity(config, query.shape[-1])
        together = affinity[rows] @ affinity.mT
        cross = -(teacher[b].detach().mean(0) * together.clamp(min=1e-12).log()).sum(-1)
        total = total + (cross * counted[b]).sum() / counted[b].sum().clamp(min=1)
        tokens = affinity if real is None else affinity[real[b]]
        share = torch.nn.functional.one_hot(tokens.argmax(-1), config.clusters).to(dtype).mean(0)
        total = total + _BALANCE * (config.clusters * (share * tokens.mean(0)).sum() - 1)
    return total / query.shape[0]
