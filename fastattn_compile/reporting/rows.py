"""Softmax attention of a few query rows, from the scores of those rows alone: never n x n."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput

_CHUNK_ELEMENTS = 1 << 23


def score_chunks(inputs: AttentionInputs, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores of some query rows, a chunk at a time.

    Args:
        inputs: The tensors of the site.
        rows: ``(r,)`` query positions.

    Yields:
        Positions of a chunk, and its scores ``(batch, heads, part, key_len)``, float32 or wider.
    """
    batch, heads, _, channels = inputs.query.shape
    kv_heads, key_len = inputs.key.shape[1:3]
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    keys = inputs.key.to(wide).transpose(-1, -2)
    for part in rows.to(inputs.query.device).split(max(1, _CHUNK_ELEMENTS // (batch * heads * key_len))):
        queries = inputs.query[:, :, part].to(wide).reshape(batch, kv_heads, -1, channels)
        scores = (queries @ keys * inputs.scale).reshape(batch, heads, part.numel(), key_len)
        if inputs.bias is not None:
            scores = scores + inputs.added(part).to(wide)
        yield part, scores


def softmax_over(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed keys; a row that may see none weighs nothing.

    Args:
        scores: ``(batch, heads, r, key_len)``.
        allowed: Boolean, broadcastable to it.
    """
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.nan_to_num(0.0) if not bool(allowed.any(-1).all()) else weights


def mix(weights: Tensor, inputs: AttentionInputs) -> Tensor:
    """Weights times the values, query heads in groups that share a value head.

    Args:
        weights: ``(batch, heads, r, key_len)``.
        inputs: The tensors of the site.

    Returns:
        ``(batch, heads, r, value_dim)``.
    """
    batch, heads, rows, key_len = weights.shape
    values = inputs.value.to(weights.dtype)
    if inputs.key_padding is not None:  # what stands at padding may be NaN, and 0 * NaN is NaN
        values = values.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    mixed = weights.reshape(batch, values.shape[1], -1, key_len) @ values
    return mixed.reshape(batch, heads, rows, values.shape[-1])


def near_and_far(
    inputs: AttentionInputs, scores: Tensor, exact_keys: Tensor, output: AttentionOutput, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The two halves of an operator that is one softmax over near keys and summaries of the rest.

    ``out exp(lse) = near exp(lse_near) + far exp(lse_far)`` is solved for ``far``. Where the far half has less than
    the square root of the rounding error of the mass, what is left of it is rounding, and it counts as 0.

    Args:
        inputs: The tensors of the site.
        scores: ``(batch, heads, r, key_len)``, from ``score_chunks``.
        exact_keys: Boolean, broadcastable to it: the keys met one by one.
        output: What the operator returned, for all rows.
        rows: ``(r,)`` query positions.

    Returns:
        Output of the near half alone, and of the far half alone, ``(batch, heads, r, value_dim)``.
    """
    near = mix(softmax_over(scores, exact_keys), inputs)
    whole, lse = output.out[:, :, rows].to(near.dtype), output.log_sum_exp[:, :, rows].to(near.dtype)
    near_lse = scores.masked_fill(~exact_keys, -math.inf).logsumexp(-1)
    share = (near_lse - lse).exp().nan_to_num(0.0)[..., None]
    rest = 1 - share
    least = torch.finfo(output.out.dtype).eps ** 0.5
    return near, torch.where(rest > least, (whole - share * near) / rest.clamp(min=least), 0)
