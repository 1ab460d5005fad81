"""The share of a site that one part serves, and the outputs of all put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator, SiteSpec


@dataclass(frozen=True)
class Served:
    """One part at a site.

    Args:
        operator: What serves.
        number: Number of the part in the configuration.
        key_heads: Its key heads.
        query_heads: Its query heads.
    """

    operator: Operator
    number: int
    key_heads: list[int]
    query_heads: list[int]

    def spec(self, spec: SiteSpec) -> SiteSpec:
        """The site with the part's heads alone."""
        return dataclasses.replace(spec, heads=len(self.query_heads), kv_heads=len(self.key_heads))

    def inputs(self, inputs: AttentionInputs) -> AttentionInputs:
        """The tensors of the part's heads."""
        bias = inputs.bias
        if bias is not None and bias.dim() == 4:
            bias = bias if bias.shape[1] == 1 else bias[:, self.query_heads]
        elif bias is not None:
            bias = bias[self.query_heads]
        return dataclasses.replace(
            inputs, query=inputs.query[:, self.query_heads], key=inputs.key[:, self.key_heads],
            value=inputs.value[:, self.key_heads], bias=bias,
        )  # fmt: skip


def together(parts: Sequence[Served], outputs: Sequence[AttentionOutput]) -> AttentionOutput:
    """The outputs of the parts in the order of the site's heads."""
    heads = torch.tensor([head for part in parts for head in part.query_heads])
    back = heads.argsort().to(outputs[0].out.device)
    return AttentionOutput(
        torch.cat([o.out for o in outputs], 1)[:, back].contiguous(),
        torch.cat([o.log_sum_exp for o in outputs], 1)[:, back].contiguous(),
    )
