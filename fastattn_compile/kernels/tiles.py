"""What the tiled kernels on ATen share: work types, sizes of working sets, values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one score tile: with its probabilities, keys and values it stays in the second-level cache of a
# core.
SCORE_TILE = 1 << 18

# Far above the numbers at which float32 loses digits.
_SAFE_WEIGHT = 1e-20


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The type in which attention is computed: float64 when an input is, else float32.

    Half precision is never multiplied as such: CPUs without a unit for it are 20 times slower on it.
    """
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def statistics_dtype(value: Tensor) -> torch.dtype:
    """Type of the log-sum-exp that goes with values of this type."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def all_finite(*tensors: Tensor) -> bool:
    """Whether the tensors hold neither NaN nor infinity, in one read.

    May say no for finite values of a size near the overflow of float32; callers then only take a slower path.
    """
    return all(bool(torch.isfinite(x.sum(dtype=work_dtype(x)))) for x in tensors)


def without_nonfinite(x: Tensor) -> Tensor:
    """``x`` with 0 in place of NaN and infinity."""
    return x.masked_fill(~torch.isfinite(x), 0)


def poison(out: Tensor, log_sum_exp: Tensor, visible: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes NaN into the results of exactly those queries that see a key or value that is not finite.

    A tile is computed with such values set to 0, since ``0 * NaN`` would reach queries that do not see them.

    Args:
        out: ``(tiles, rows, value_dim)``.
        log_sum_exp: ``(tiles, rows, 1)``.
        visible: ``(tiles, rows, keys)`` boolean.
        key: ``(tiles, keys, head_dim)``, as given.
        value: ``(tiles, keys, value_dim)``, as given.
    """
    seen = visible.to(out.dtype)
    bad_key = ~torch.isfinite(key).all(-1, keepdim=True)
    bad_value = ~torch.isfinite(value)
    sees_key = torch.bmm(seen, bad_key.to(out.dtype)) > 0
    sees_value = torch.bmm(seen, bad_value.to(out.dtype)) > 0
    log_sum_exp.masked_fill_(sees_key, torch.nan)
    out.masked_fill_(sees_key | sees_value, torch.nan)


def of_key_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Where every query head was given keys of its own: their gradients, handed back to the heads they stand for.

    Args:
        grad: ``(b, g or h, n, c)``.
        kv_heads: ``g``.
    """
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)


def probabilities_(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    """Turns scores into attention weights in place, given the saved log-sum-exp; queries without keys get 0.

    Args:
        scores: ``(tiles, rows, keys)``, -inf where a key is not visible.
        log_sum_exp: ``(tiles, rows, 1)``, -inf where a query sees no key.
    """
    return scores.sub_(log_sum_exp.masked_fill(log_sum_exp == -torch.inf, torch.inf)).exp_()


def normalise(scores: Tensor, weights: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Softmax of a score tile into ``weights``, NaN in rows without a visible key; returns the log-sum-exp.

    For any one key, ``lse = score - log(weight)``: no second pass of exponentials. The largest weight always
    serves; a key of each row that the caller names saves the search for it, unless its weight nearly vanishes.

    Args:
        scores: ``(tiles, rows, keys)``, -inf where a key is not visible.
        weights: Receives the attention weights, same shape.
        own: Of scores and of weights, one key of each row: views of ``tiles * rows`` elements in that order.

    Returns:
        ``(tiles, rows, 1)``; -inf where a query sees no key.
    """
    torch.ops.aten._softmax.out(scores, -1, False, out=weights)
    # On a GPU the question would wait for the device, and the search costs little.
    if own is not None and scores.device.type == "cpu" and float(own[1].amin()) > _SAFE_WEIGHT:
        return (own[0] - own[1].log()).view(*scores.shape[:2], 1)
    largest = scores.amax(-1, keepdim=True)
    return torch.where(largest == -torch.inf, largest, largest - weights.amax(-1, keepdim=True).log())
