"""The boundary of the published code: keys and values of 0 before the first token, attended with score 0.

They add to the normaliser alone. So what they do follows from the clean result: with ``Z' = Z + c_i`` the output shrinks
by ``Z / Z'``, whoever computed it; and the gradients are those of the clean lists with the new normaliser (specification
1.5, 1.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionOutput, SiteSpec
from fastattn_compile.operators.fma.config import FmaConfig, level_count


def obstacle(config: FmaConfig, spec: SiteSpec) -> str:
    """Why a site cannot have that boundary, empty when it can.

    Args:
        config: The configuration.
        spec: The site.
    """
    if not spec.mask.causal or spec.mask.conflicts("right", "end_aligned") or spec.bias != "none":
        return (
            "boundary 'zero_pad' is defined for causal attention without window, padding, documents and bias, "
            f"not {spec.mask} with bias {spec.bias!r}; use boundary 'clean'"
        )
    if not any(spec.key_len == config.block << power for power in range(1, 32)):
        return (
            f"boundary 'zero_pad' needs block ({config.block}) times a power of two tokens, at least twice the block; "
            f"got {spec.key_len}; use boundary 'clean'"
        )
    return ""


def phantoms(config: FmaConfig, length: int) -> Tensor:
    """What the zero keys that each query meets weigh together, ``(n,)`` float64.

    Args:
        config: The configuration.
        length: Tokens, ``block`` times a power of two.
    """
    place = torch.arange(length)
    mass = config.block * (place < config.block).double()
    for level in range(level_count(length, config.block)):
        width = config.block << level
        weight = width if config.scale_attn else config.rank
        mass += weight * (1 + place // width % 2) * (place < 2 * width)
    return mass


def with_phantoms(config: FmaConfig, output: AttentionOutput) -> AttentionOutput:
    """The clean result with the zero keys in its normaliser.

    Args:
        config: The configuration.
        output: The clean result.
    """
    mass = phantoms(config, output.out.shape[2]).to(output.log_sum_exp)
    log_sum_exp = torch.logaddexp(output.log_sum_exp, mass.log())
    kept = (output.log_sum_exp - log_sum_exp).exp().unsqueeze(-1)
    return AttentionOutput((output.out * kept).to(output.out.dtype), log_sum_exp)
