"""What fitting minimises at one site: the distance of an operator's output from exact attention on the same tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.library import torch_op


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss beside the output itself.

    Args:
        routing: Of what trains routers and surrogates towards the softmax mass (``Operator.routing_loss``).
        far: Of the far field alone.
        far_share: Share of the steps in which the near field is dropped and the far field has to match alone.
        rows: Query rows that routing and far field are compared on.
    """

    routing: float = 0.1
    far: float = 1.0
    far_share: float = 0.5
    rows: int = 64


def output_of(
    operator: Operator, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of an operator, differentiable in the parameters."""
    found: tuple[Tensor, Tensor] = torch_op(operator.name)(
        inputs.query, inputs.key, inputs.value, inputs.key_padding, inputs.segments, inputs.bias, list(parameters),
        inputs.scale, str(inputs.mask), operator.token, "",
    )  # fmt: skip
    return found


def squared_error(out: Tensor, exact: Tensor) -> Tensor:
    """Squared distance over the squared length of the exact output."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    out, exact = out.to(wide), exact.to(wide)
    return (out - exact).square().sum() / exact.square().sum().clamp(min=1e-30)


def matching_loss(
    operator: Operator,
    inputs: AttentionInputs,
    parameters: tuple[Tensor, ...],
    exact: Tensor,
    weights: Weights,
    generator: torch.Generator,
) -> Tensor:
    """The whole operator's output against exact attention, its far field alone in some steps, its routing.

    Matching only the sum with an exact near field lets the near field do all the work and leaves the far field untrained
    (arXiv 2510.05901), hence the steps in which the near field does not count.

    Args:
        operator: The operator.
        inputs: The tensors of the site, from the exact model.
        parameters: Its learned parameters.
        exact: Output of exact attention.
        weights: Of the parts.
        generator: Draws rows and steps.

    Returns:
        A scalar.
    """
    out, log_sum_exp = output_of(operator, inputs, parameters)
    loss = squared_error(out, exact)
    length = inputs.query.shape[2]
    rows = torch.randperm(length, generator=generator)[: weights.rows].sort().values.to(out.device)
    drops = float(torch.rand((), generator=generator)) < weights.far_share
    if weights.far and drops and operator.comes_apart:
        loss = loss + weights.far * far_error(operator, inputs, parameters, out, log_sum_exp, rows)
    if weights.routing:
        routing = operator.routing_loss(inputs, parameters, rows)
        if routing is not None:
            loss = loss + weights.routing * routing
    return loss


def far_error(
    operator: Operator,
    inputs: AttentionInputs,
    parameters: tuple[Tensor, ...],
    out: Tensor,
    log_sum_exp: Tensor,
    rows: Tensor,
) -> Tensor:
    """Squared error of what an operator's far field adds on some rows, over the squared length of the exact output there.

    The operator is one softmax over exact keys and summaries: with the near field's share ``z`` of the normaliser, the
    far field adds ``out - z near``, and so it does in exact attention. The difference is measured by the whole output: by
    the far field's own length it would outweigh the output wherever the far field hardly matters.

    Args:
        operator: One that comes apart.
        inputs: The tensors.
        parameters: Its learned parameters.
        out: Its output.
        log_sum_exp: Its log-sum-exp.
        rows: ``(r,)`` query positions.
    """
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    key, value = (x.to(wide).repeat_interleave(inputs.group, 1) for x in (inputs.key, inputs.value))
    if inputs.key_padding is not None:
        value = value.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    scores = inputs.scale * (inputs.query[:, :, rows].to(wide) @ key.mT) + inputs.added(rows).to(wide)
    visible = inputs.visible(rows)
    near_weights, near_sum = masked_softmax(scores, visible & operator.exact_keys(inputs, rows, parameters))
    weights, whole_sum = masked_softmax(scores, visible)
    near, whole = near_weights @ value, weights @ value
    share = (near_sum - log_sum_exp[:, :, rows].to(wide)).exp()[..., None]
    exact_share = (near_sum - whole_sum).exp().nan_to_num(0.0)[..., None]
    difference = (out[:, :, rows].to(wide) - share * near) - (whole - exact_share * near)
    return difference.square().sum() / whole.square().sum().clamp(min=1e-30)
