"""A chosen operator as a call of its torch operator in an FX graph."""

from __future__ import annotations

import operator as python_operator
from dataclasses import dataclass

import torch.fx

from fastattn_compile.lowering.sdpa import structured_sdpa
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure


@dataclass(frozen=True)
class CanonicalNodes:
    """The tensors of a site as graph nodes in canonical layout.

    Args:
        query: ``(batch, heads, query_len, head_dim)``.
        key: ``(batch, kv_heads, key_len, head_dim)``.
        value: ``(batch, kv_heads, key_len, value_dim)``.
        key_padding: ``(batch, key_len)`` boolean, or ``None``.
        segments: ``(batch, key_len)`` integer, or ``None``.
        bias: ``(heads,)`` slopes or ``(heads, 2 * key_len - 1)`` by distance, or ``None``.
        parameters: Learned parameters in the operator's order.
    """

    query: torch.fx.Node
    key: torch.fx.Node
    value: torch.fx.Node
    key_padding: torch.fx.Node | None = None
    segments: torch.fx.Node | None = None
    bias: torch.fx.Node | None = None
    parameters: tuple[torch.fx.Node, ...] = ()


def call_operator(
    graph: torch.fx.Graph,
    operator: Operator,
    nodes: CanonicalNodes,
    scale: float,
    mask: MaskStructure,
    site: str,
) -> torch.fx.Node:
    """Appends the call at the graph's insertion point.

    Returns:
        The node of the output, ``(batch, heads, query_len, value_dim)``.
    """
    result = graph.call_function(
        torch_op(operator.name),
        (
            nodes.query, nodes.key, nodes.value, nodes.key_padding, nodes.segments, nodes.bias, list(nodes.parameters),
            float(scale), str(mask), operator.token, site,
        ),
    )  # fmt: skip
    return graph.call_function(python_operator.getitem, (result, 0))


def call_sdpa(
    graph: torch.fx.Graph, nodes: CanonicalNodes, scale: float, mask: MaskStructure, dropout: float, site: str
) -> torch.fx.Node:
    """Appends exact attention by SDPA at the graph's insertion point; ``call_operator`` for a site without an operator."""
    return graph.call_function(
        structured_sdpa,
        (
            nodes.query, nodes.key, nodes.value, nodes.key_padding, nodes.segments, float(scale), str(mask), dropout,
            site,
        ),
    )  # fmt: skip
