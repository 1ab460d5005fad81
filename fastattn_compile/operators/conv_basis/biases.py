"""Scores added by distance and by key: Toeplitz and rank one, so they cost conv-basis attention no term."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.conv_basis.config import ConvBasisConfig


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of linear biases, one a head (Press, Smith, Lewis 2022); interleaved if not a power of two.

    Args:
        heads: Query heads.
    """
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(first + between, dtype=torch.float64)


def spread(parameter: Tensor, heads: int, n: int, causal: bool) -> Tensor:
    """A learned bias by distance as ``(h, 2 n - 1)``.

    Args:
        parameter: ``(h, n or more)`` from distance 0 when causal, else ``(h, 2 n - 1 or more)`` around 0.
        heads: Query heads.
        n: Tokens.
        causal: Whether the mask is; what a causal mask hides gets 0.

    Raises:
        ValueError: The shape is another.
    """
    wanted = n if causal else 2 * n - 1
    if parameter.dim() != 2 or parameter.shape[0] != heads or parameter.shape[1] < wanted:
        raise ValueError(
            f"offset_bias must have shape ({heads}, {wanted} or more) for {n} tokens"
            f"{' under a causal mask' if causal else ''}, got {tuple(parameter.shape)}"
        )
    if causal:
        return F.pad(parameter[:, :n], (n - 1, 0))
    middle = parameter.shape[1] // 2
    return parameter[:, middle - n + 1 : middle + n]


def unspread(parameter: Tensor, grad: Tensor, causal: bool) -> Tensor:
    """The gradient of ``spread``, in the shape of the parameter.

    Args:
        parameter: The learned bias.
        grad: ``(h, 2 n - 1)``.
        causal: As given to ``spread``.
    """
    n = (grad.shape[1] + 1) // 2
    result = torch.zeros_like(parameter)
    if causal:
        result[:, :n] = grad[:, n - 1 :]
    else:
        middle = parameter.shape[1] // 2
        result[:, middle - n + 1 : middle + n] = grad
    return result


def offset_biases(
    config: ConvBasisConfig, heads: int, n: int, causal: bool, parameters: tuple[Tensor, ...]
) -> Tensor | None:
    """Biases by offset, ``(h, 2 n - 1)``, where the configuration has any.

    Args:
        config: Which.
        heads: Query heads.
        n: Tokens.
        causal: Whether the mask is.
        parameters: The learned ones; that by offset is the first.

    Raises:
        ValueError: The learned bias has another shape.
    """
    if config.offset_bias == "learned":
        return spread(parameters[0], heads, n, causal)
    if config.offset_bias == "alibi":
        distance = torch.arange(1 - n, n, dtype=torch.float64).abs()
        return -alibi_slopes(heads)[:, None] * distance
    return None


def biases(
    config: ConvBasisConfig, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Biases by offset ``(h, 2 n - 1)`` and by key ``(b or 1, h or 1, n)`` of some tensors.

    Args:
        config: Which biases there are.
        inputs: The tensors.
        parameters: The learned ones, by offset before by key.

    Raises:
        ValueError: Number or shapes of the parameters are others.
    """
    batch, heads, n = inputs.key.shape[0], inputs.query.shape[1], inputs.key.shape[2]
    wanted = ["offset_bias"] * (config.offset_bias == "learned") + ["key_bias"] * config.key_bias
    if len(parameters) != len(wanted):
        raise ValueError(
            f"conv_basis with offset_bias={config.offset_bias!r}, key_bias={config.key_bias} takes "
            f"{len(wanted)} parameters ({', '.join(wanted) or 'none'}), got {len(parameters)}"
        )
    given = dict(zip(wanted, parameters))
    key_bias = None
    offset_bias = offset_biases(config, heads, n, inputs.mask.causal, parameters)
    if offset_bias is not None:
        offset_bias = offset_bias.to(inputs.query.device)
    if "key_bias" in given:
        key_bias = given["key_bias"]
        fits = key_bias.dim() == 3 and key_bias.shape[0] in (1, batch) and key_bias.shape[1] in (1, heads)
        if not fits or key_bias.shape[2] < n:
            shape = tuple(key_bias.shape)
            raise ValueError(
                f"key_bias must have shape ({batch} or 1, {heads} or 1, {n} or more), got {shape}"
            )
        key_bias = key_bias[..., :n]
    return offset_bias, key_bias
