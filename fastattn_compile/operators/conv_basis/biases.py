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


def _sloped(slopes: Tensor, n: int) -> Tensor:
    """``-slope * |i - j|``: ``(h,)`` to ``(h, 2 n - 1)``."""
    return -slopes[:, None] * torch.arange(1 - n, n, dtype=slopes.dtype, device=slopes.device).abs()


def site_bias(bias: Tensor, heads: int, n: int) -> Tensor:
    """The bias of a site, which counts ``j - i``, as ``(h, 2 n - 1)`` by ``i - j``.

    Args:
        bias: ``(h,)`` slopes, or ``(h, 2 N - 1)`` with ``N >= n``.
        heads: Query heads.
        n: Tokens.

    Raises:
        ValueError: It is dense, or lists too few distances.
    """
    listed = bias.dim() == 2 and bias.shape[1] % 2 == 1 and bias.shape[1] >= 2 * n - 1
    if bias.shape[0] != heads or not (bias.dim() == 1 or listed):
        raise ValueError(
            f"a dense bias is not supported: it must be slopes, ({heads},), or numbers by distance, ({heads}, 2 N - 1) "
            f"with N >= {n}; got {tuple(bias.shape)}"
        )
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if wide.dim() == 1:
        return _sloped(wide, n)
    middle = wide.shape[1] // 2
    return wide[:, middle - n + 1 : middle + n].flip(-1)


def site_bias_gradient(bias: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``site_bias`` of numbers by distance, in their shape and type.

    Args:
        bias: ``(h, 2 N - 1)``.
        grad: ``(h, 2 n - 1)``.
    """
    result, n, middle = torch.zeros_like(bias), (grad.shape[1] + 1) // 2, bias.shape[1] // 2
    result[:, middle - n + 1 : middle + n] = grad.flip(-1)
    return result


def offset_biases(
    config: ConvBasisConfig, heads: int, n: int, causal: bool, parameters: tuple[Tensor, ...],
    bias: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Biases by offset, ``(h, 2 n - 1)``: that of the configuration and that of the site, where there are any.

    Args:
        config: Which the configuration has.
        heads: Query heads.
        n: Tokens.
        causal: Whether the mask is.
        parameters: The learned ones; that by offset is the first.
        bias: That of the site (``AttentionInputs.bias``).

    Raises:
        ValueError: A bias has another shape.
    """
    own = None
    if config.offset_bias == "learned":
        own = spread(parameters[0], heads, n, causal)
    elif config.offset_bias == "alibi":
        own = _sloped(alibi_slopes(heads), n)
    if bias is None:
        return own
    of_site = site_bias(bias, heads, n)
    return of_site if own is None else of_site + own.to(of_site.device)


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
    offset_bias = offset_biases(config, heads, n, inputs.mask.causal, parameters, inputs.bias)
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
