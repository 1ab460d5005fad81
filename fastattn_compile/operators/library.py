"""Every operator as a torch operator: ``torch.ops.fastattn.<name>``, with its gradient, its fake kernel, its observers.

All operators share one schema, so that the graph rewrite, the fakes and autograd are written once:

    (query, key, value, key_padding?, segments?, bias?, parameters[], scale, mask, config, site) -> (out, log_sum_exp)

``mask`` is the text of a ``MaskStructure``, ``config`` the operator's token (it carries implementation version and
configuration into compile caches, which do not hash code), ``site`` the name under which reports know the attention.
Autocast needs no rule: inputs of mixed types are allowed, the work is done in float32 or wider, the output has the type
of the values.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.errors import NumericError
from fastattn_compile.kernels.dispatch import chosen_kernels
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.check import LONGEST, insist
from fastattn_compile.operators.mask import NO_MASK, MaskStructure
from fastattn_compile.operators.observe import notify, substituted
from fastattn_compile.operators.registry import operator_from_token, operator_names

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_padding, Tensor? segments, Tensor? bias, "
    "Tensor[] parameters, float scale, str mask, str config, str site"
)
_FORWARD = f"({_INPUTS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_log_sum_exp, Tensor out, Tensor log_sum_exp, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)


def statistics_dtype(value: Tensor) -> torch.dtype:
    """Type of the log-sum-exp that goes with values of this type."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
    bias: Tensor | None, scale: float, mask: str,
) -> AttentionInputs:  # fmt: skip
    return AttentionInputs(
        query, key, value, scale, MaskStructure.parse(mask), key_padding, segments, bias
    ).validated()


def _empty(inputs: AttentionInputs) -> bool:
    """Whether there is no query at all, or no key: the output is then empty, or that of rows which see nothing."""
    return inputs.query.numel() == 0 or inputs.key.shape[2] == 0


_checked: set[tuple[Any, ...]] = set()


def _check(
    site: str,
    operator: Operator,
    inputs: AttentionInputs,
    parameters: tuple[Tensor, ...],
    output: AttentionOutput,
) -> None:
    """FASTATTN_CHECK=1: a site that turns finite inputs into NaN or Inf stops the run with its name.

    At the first use of an operator with a type, a mask and a class of shapes its kernel is held against its definition.
    """
    finite = all(bool(torch.isfinite(x).all()) for x in (inputs.query, inputs.key, inputs.value))
    if not bool(torch.isfinite(output.out).all()):
        blame = "from finite inputs" if finite else "its inputs already held them"
        raise NumericError(f"NaN or Inf in the output of site {site or '(unnamed)'}, {operator}: {blame}")
    q, k = inputs.query, inputs.key
    shapes = inputs.group, q.shape[3], inputs.value.shape[3], min(q.shape[2], LONGEST).bit_length()
    use = (operator.token, chosen_kernels(), q.device.type, q.dtype, k.dtype, str(inputs.mask), *shapes)
    if finite and use not in _checked:
        _checked.add(use)
        insist(operator, inputs, parameters, site)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
    bias: Tensor | None, parameters: list[Tensor], scale: float, mask: str, config: str, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operator = operator_from_token(config)
    inputs = _inputs(query, key, value, key_padding, segments, bias, scale, mask)
    if _empty(inputs):
        out = value.new_zeros(*query.shape[:3], value.shape[3])
        return out, value.new_full(query.shape[:3], -torch.inf, dtype=statistics_dtype(value))
    # Below autograd an autocast region would still turn the kernels' float32 products into half precision.
    with torch.autocast(query.device.type, enabled=False):
        output = operator.forward(inputs, tuple(parameters))
    if os.environ.get("FASTATTN_CHECK") == "1":
        _check(site, operator, inputs, tuple(parameters), output)
    output = substituted(site, operator, inputs, tuple(parameters), output)
    notify(site, operator, inputs, output)
    return output.out, output.log_sum_exp


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
    bias: Tensor | None, parameters: list[Tensor], scale: float, mask: str, config: str, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, query_len, _ = query.shape
    out = value.new_empty(batch, heads, query_len, value.shape[-1])
    return out, value.new_empty(batch, heads, query_len, dtype=statistics_dtype(value))


def _backward(
    grad_out: Tensor, grad_log_sum_exp: Tensor | None, out: Tensor, log_sum_exp: Tensor,
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
    bias: Tensor | None, parameters: list[Tensor], scale: float, mask: str, config: str, site: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    inputs = _inputs(query, key, value, key_padding, segments, bias, scale, mask)
    if _empty(inputs):
        grad_query, grad_key, grad_value = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        none = (query if bias is None else bias).new_zeros(_bias_gradient_shape(bias))
        return grad_query, grad_key, grad_value, none, [torch.zeros_like(p) for p in parameters]
    with torch.autocast(query.device.type, enabled=False):
        gradients = operator_from_token(config).backward(
            inputs, tuple(parameters), AttentionOutput(out, log_sum_exp), grad_out, grad_log_sum_exp
        )
    of_bias = gradients.bias
    if of_bias is None:
        of_bias = (query if bias is None else bias).new_zeros(_bias_gradient_shape(bias))
    return gradients.query, gradients.key, gradients.value, of_bias, list(gradients.parameters)


def _bias_gradient_shape(bias: Tensor | None) -> tuple[int, ...]:
    """A bias by distance gets a gradient; otherwise an empty tensor stands for it."""
    return tuple(bias.shape) if bias is not None and bias.dim() == 2 else (0,)


def _backward_fake(
    grad_out: Tensor, grad_log_sum_exp: Tensor | None, out: Tensor, log_sum_exp: Tensor,
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
    bias: Tensor | None, parameters: list[Tensor], scale: float, mask: str, config: str, site: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    query_like, key_like, value_like = (x.new_empty(x.shape) for x in (query, key, value))
    of_bias = (query if bias is None else bias).new_empty(_bias_gradient_shape(bias))
    return query_like, key_like, value_like, of_bias, [p.new_empty(p.shape) for p in parameters]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_padding, segments, bias, parameters, ctx.scale, ctx.mask, ctx.config, ctx.site = (
        inputs
    )
    if bias is not None and bias.dim() == 1 and ctx.needs_input_grad[5]:
        raise ValueError(
            "slopes of ALiBi get no gradient; a bias by distance, of shape (heads, 2 N - 1), gets one"
        )
    ctx.save_for_backward(query, key, value, key_padding, segments, bias, *output, *parameters)


@cache
def _register(name: str) -> Any:
    forward = torch.library.custom_op(f"fastattn::{name}", _forward, mutates_args=(), schema=_FORWARD)
    forward.register_fake(_forward_fake)
    backward = torch.library.custom_op(
        f"fastattn::{name}_backward", _backward, mutates_args=(), schema=_BACKWARD
    )
    backward.register_fake(_backward_fake)

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_log_sum_exp: Tensor | None) -> tuple[Any, ...]:
        query, key, value, key_padding, segments, bias, out, log_sum_exp, *parameters = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        # Strides of incoming gradients are anything (an expanded sum has stride 0); kernels get them dense.
        gradients = backward(
            grad_out.contiguous(), grad_log_sum_exp, out, log_sum_exp,
            query, key, value, key_padding, segments, bias, parameters, ctx.scale, ctx.mask, ctx.config, ctx.site,
        )  # fmt: skip
        grad_query, grad_key, grad_value, of_bias, grad_parameters = gradients
        grad_bias = of_bias if bias is not None and bias.dim() == 2 else None
        return (
            grad_query,
            grad_key,
            grad_value,
            None,
            None,
            grad_bias,
            grad_parameters,
            None,
            None,
            None,
            None,
        )

    forward.register_autograd(differentiate, setup_context=_setup_context)
    return forward


for _name in operator_names():
    _register(_name)


def torch_op(name: str) -> Any:
    """The ``torch.ops.fastattn`` overload of an operator, as it stands in a rewritten graph."""
    return getattr(torch.ops.fastattn, name).default


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operator: Operator,
    *,
    scale: float | None = None,
    mask: MaskStructure | str = NO_MASK,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    bias: Tensor | None = None,
    parameters: tuple[Tensor, ...] = (),
    site: str = "",
) -> tuple[Tensor, Tensor]:
    """Attention by an operator, called directly; differentiable, compilable.

    Args:
        query: ``(batch, heads, n, d)``.
        key: ``(batch, kv_heads, n, d)``; ``kv_heads`` divides ``heads``.
        value: ``(batch, kv_heads, n, e)``.
        operator: From ``make_operator``.
        scale: Factor on the scores; ``d ** -0.5`` when ``None``.
        mask: Structure of the mask, or its text (``"causal & window(128)"``).
        key_padding: ``(batch, n)`` boolean, true where a token is real; turns ``key_padding`` of the mask on.
        segments: ``(batch, n)`` integer document numbers; turns ``segments`` of the mask on.
        bias: Added to the scores by distance: ``(heads,)`` slopes of ALiBi, ``-slope * |key - query|``, without a gradient;
            or ``(heads, 2 N - 1)`` with ``N >= n``, for every ``key - query`` from ``-(N - 1)`` to ``N - 1``.
        parameters: The operator's learned parameters, in its order.
        site: Name for observers and error texts.

    Returns:
        Output ``(batch, heads, n, e)`` and log-sum-exp ``(batch, heads, n)``.

    Raises:
        ValueError: Shapes do not agree, or the operator cannot serve this attention (the text says why).
    """
    structure = MaskStructure.parse(mask) if isinstance(mask, str) else mask
    if (key_padding is not None) != structure.key_padding or (segments is not None) != structure.segments:
        structure = dataclasses.replace(
            structure, key_padding=key_padding is not None, segments=segments is not None
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    support = operator.supports(AttentionInputs(query, key, value, scale, structure, bias=bias).spec())
    if not support:
        raise ValueError(f"{operator.name} cannot serve this attention: {support.reason}")
    result: tuple[Tensor, Tensor] = torch_op(operator.name)(
        query,
        key,
        value,
        key_padding,
        segments,
        bias,
        list(parameters),
        scale,
        str(structure),
        operator.token,
        site,
    )
    return result
