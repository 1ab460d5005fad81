"""The low-rank approximation of conv-basis attention: its masks, its definition, and its driver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import conv_lowrank
from fastattn_compile.kernels.aten.conv_lowrank import Documents, Ranges
from fastattn_compile.kernels.tiles import statistics_dtype, without_nonfinite, work_dtype
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Gradients
from fastattn_compile.operators.conv_basis.config import ConvBasisConfig
from fastattn_compile.operators.exact.reference import grouped, ungrouped
from fastattn_compile.operators.mask import MaskStructure


def refusal(mask: MaskStructure) -> str:
    """Why a mask is neither ranges of keys nor documents; empty when it is one of them."""
    if mask.prefix is not None and mask.left is not None:
        return f"a prefix beside a window gives a row two ranges of keys, the low-rank form has one ({mask})"
    if mask.segments and mask.positional != MaskStructure(end_aligned=mask.end_aligned):
        return f"packed documents are served in the low-rank form only without any other bound ({mask})"
    return ""


def row_ranges(mask: MaskStructure, n: int, device: torch.device) -> Ranges:
    """The keys every row may see by the position terms of a mask that is not refused.

    Args:
        mask: The mask.
        n: Queries and keys.
        device: Where.
    """
    place = torch.arange(n, device=device)
    first = torch.zeros_like(place) if mask.left is None else (place - mask.left).clamp(0, n)
    last = torch.full_like(place, n) if mask.right is None else (place + mask.right + 1).clamp(0, n)
    if mask.prefix is not None:
        last = last.clamp(min=min(mask.prefix, n))
    if mask.chunk is not None:
        begin = torch.div(place, mask.chunk, rounding_mode="floor") * mask.chunk
        first, last = torch.maximum(first, begin), torch.minimum(last, begin + mask.chunk)
    return Ranges(first, last)


def low_rank_attention(
    degree: int, inputs: AttentionInputs, key_bias: Tensor | None = None
) -> AttentionOutput:
    """Dense attention with the Taylor polynomial of the exponential in its place, differentiable.

    Args:
        degree: Of the polynomial, even.
        inputs: The tensors.
        key_bias: ``(b or 1, h or 1, n)`` added to the logarithms of the weights of every key.
    """
    query, key, value = grouped(inputs)
    groups, group, n = query.shape[1], query.shape[2], query.shape[3]
    if inputs.key_padding is not None:
        hidden = ~inputs.key_padding[:, None, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    visible = inputs.visible(torch.arange(n, device=query.device)).unsqueeze(2)
    weights = conv_lowrank.polynomial(inputs.scale * (query @ key.mT), degree)
    if key_bias is not None:
        spread = key_bias.to(weights.dtype).expand(-1, groups * group, -1).unflatten(1, (groups, group))
        weights = weights * spread.unsqueeze(-2).exp()
    weights = weights.masked_fill(~visible, 0)
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    out = (weights / mass.masked_fill(empty, 1)) @ value
    log_sum_exp = mass.masked_fill(empty, 1).log().masked_fill(empty, -torch.inf)
    return ungrouped(inputs, out, log_sum_exp[..., 0])


@dataclass(frozen=True)
class _Heads:
    """The query heads of one key head of one sequence: lanes of ``masked_sums``."""

    batch: int
    heads: slice
    kv_head: int
    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    shift: Tensor
    mask: Ranges | Documents
    dtype: torch.dtype

    def part(self, x: Tensor) -> Tensor:
        """These heads of a ``(b, h, ...)`` tensor in the type of the work."""
        return x[self.batch, self.heads].to(self.dtype)


def _heads(config: ConvBasisConfig, inputs: AttentionInputs, key_bias: Tensor | None) -> Iterator[_Heads]:
    q, k, v, group, n = inputs.query, inputs.key, inputs.value, inputs.group, inputs.key.shape[2]
    dtype = torch.promote_types(work_dtype(q, k, v), getattr(torch, config.transform))
    ranges = row_ranges(inputs.mask, n, q.device)
    for b in range(k.shape[0]):
        mask: Ranges | Documents = ranges
        if inputs.segments is not None:
            numbers = inputs.segments[b].unique()
            mask = Documents(tuple((inputs.segments[b] == s).nonzero()[:, 0] for s in numbers))
        hidden = torch.zeros(n, dtype=torch.bool, device=q.device)
        if inputs.key_padding is not None:
            hidden = ~inputs.key_padding[b]
        for g in range(k.shape[1]):
            heads = slice(g * group, (g + 1) * group)
            log_weight = torch.zeros(group, n, dtype=dtype, device=q.device)
            if key_bias is not None:
                rows = key_bias[b if key_bias.shape[0] > 1 else 0]
                log_weight = log_weight + rows[heads if rows.shape[0] > 1 else slice(None)].to(dtype)
            log_weight = log_weight.masked_fill(hidden, -torch.inf)
            shift = log_weight.amax(-1, keepdim=True)
            shift = shift.masked_fill(shift == -torch.inf, 0)
            key, value = (
                x[b, g].to(dtype).masked_fill(hidden[:, None], 0).expand(group, -1, -1) for x in (k, v)
            )
            weight = (log_weight - shift).exp()
            yield _Heads(b, heads, g, q[b, heads].to(dtype), key, value, weight, shift, mask, dtype)


def forward(config: ConvBasisConfig, inputs: AttentionInputs, key_bias: Tensor | None) -> AttentionOutput:
    """Low-rank attention in O(n) products with features.

    A key or value that is not finite makes NaN exactly the rows that see it.

    Args:
        config: The configuration.
        inputs: The tensors.
        key_bias: ``(b or 1, h or 1, n)``.
    """
    value = inputs.value
    out = value.new_empty(*inputs.query.shape[:3], value.shape[3])
    log_sum_exp = value.new_empty(inputs.query.shape[:3], dtype=statistics_dtype(value))
    for h in _heads(config, inputs, key_bias):
        bad_key = (~torch.isfinite(h.key).all(-1, keepdim=True)).to(h.dtype)
        bad_value = (~torch.isfinite(h.value).all(-1, keepdim=True)).to(h.dtype)
        key, clean = (
            without_nonfinite(x) if bool(bad.any()) else x
            for x, bad in ((h.key, bad_key), (h.value, bad_value))
        )
        part, mass = conv_lowrank.forward(h.query, key, clean, inputs.scale, h.weight, config.degree, h.mask)
        lse = mass.log() + h.shift
        if bool((bad_key + bad_value).any()):
            met_key, met_value = (
                conv_lowrank.masked_sums(h.query, key, x, 0, h.mask) > 0 for x in (bad_key, bad_value)
            )
            part = part.masked_fill(met_key | met_value, torch.nan)
            lse = lse.masked_fill(met_key[..., 0], torch.nan)
        out[h.batch, h.heads] = part.to(out.dtype)
        log_sum_exp[h.batch, h.heads] = lse.to(log_sum_exp.dtype)
    return AttentionOutput(out, log_sum_exp)


def backward(
    config: ConvBasisConfig,
    inputs: AttentionInputs,
    output: AttentionOutput,
    grad_out: Tensor,
    grad_log_sum_exp: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Gradients, Tensor]:
    """Gradients of ``forward``, and of the logarithms of the key weights as ``(b, h, n)``.

    Args:
        config: The configuration.
        inputs: The tensors.
        output: What ``forward`` gave.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
        key_bias: ``(b or 1, h or 1, n)``.
    """
    q, k, v = inputs.query, inputs.key, inputs.value
    grad_query, grad_key, grad_value = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    grad_weight = torch.zeros(q.shape[:3], dtype=work_dtype(q, k, v), device=q.device)
    for h in _heads(config, inputs, key_bias):
        rho = (h.part(grad_out) * h.part(output.out)).sum(-1)
        if grad_log_sum_exp is not None:
            rho = rho - h.part(grad_log_sum_exp)
        lse = h.part(output.log_sum_exp)
        mass = (lse - h.shift).exp()
        key, value = without_nonfinite(h.key), without_nonfinite(h.value)
        dq, dk, dv, dw = conv_lowrank.backward(
            h.query, key, value, inputs.scale, h.weight, config.degree, h.mask, mass, h.part(grad_out), rho
        )
        shown = (h.weight > 0)[..., None]
        grad_query[h.batch, h.heads] = dq.to(q.dtype)
        grad_key[h.batch, h.kv_head] = (dk * shown).sum(0).to(k.dtype)
        grad_value[h.batch, h.kv_head] = dv.sum(0).to(v.dtype)
        grad_weight[h.batch, h.heads] = dw.to(grad_weight.dtype)
    return Gradients(grad_query, grad_key, grad_value), grad_weight


def score_error(degree: int, inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """Largest difference of ``log p(score)`` from a visible score at some rows: ``(b, h)``, float64.

    Args:
        degree: Of the polynomial.
        inputs: The tensors.
        rows: ``(m,)`` row numbers.
    """
    query, key = inputs.query.double(), inputs.key.double().repeat_interleave(inputs.group, 1)
    worst = torch.zeros(query.shape[:2], dtype=torch.float64, device=query.device)
    for some in rows.split(64):
        scores = inputs.scale * (query[:, :, some] @ key.mT)
        difference = (conv_lowrank.polynomial(scores, degree).log() - scores).abs()
        worst = torch.maximum(worst, difference.masked_fill(~inputs.visible(some), 0).amax((-2, -1)))
    return worst
