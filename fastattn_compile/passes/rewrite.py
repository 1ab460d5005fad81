"""Replacing a site by a call of its operator. All or nothing per site; a rewritten graph always runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fastattn_compile.kernels.masks import any_along
from fastattn_compile.lowering.torch_call import CanonicalNodes, call_operator, call_sdpa
from fastattn_compile.operators.base import Operator
from fastattn_compile.passes.axes import Axes, leaves
from fastattn_compile.passes.bias_tensor import bias_node
from fastattn_compile.passes.contraction import Operand
from fastattn_compile.passes.emission import emit_fx
from fastattn_compile.passes.expression import Expression, axes_of
from fastattn_compile.passes.functionalize import erase_dead
from fastattn_compile.passes.mask_values import documents_of
from fastattn_compile.passes.relayout import FxWriter, Relayout
from fastattn_compile.passes.site import Site
from fastattn_compile.passes.temperature import scaled


@dataclass(frozen=True)
class Replacement:
    """A site and what is to serve it.

    Args:
        site: The site.
        operator: Its operator; ``None`` for SDPA with the mask as structure.
        parameters: Nodes of the operator's learned parameters.
    """

    site: Site
    operator: Operator | None
    parameters: tuple[torch.fx.Node, ...] = ()


def rewrite(gm: torch.fx.GraphModule, replacements: Sequence[Replacement]) -> None:
    """Rewrites a graph in place.

    Args:
        gm: The graph the sites were found in.
        replacements: In execution order.
    """
    facts: dict[Any, torch.fx.Node] = {}
    results = [_serve(gm.graph, replacement, facts) for replacement in replacements]
    # A site may read the output of another as it comes: outputs stand until all sites have been served.
    for replacement, result in zip(replacements, results):
        out = replacement.site.out.origin
        out.replace_all_uses_with(result)
        gm.graph.erase_node(out)
    if replacements:
        erase_dead(gm)
    gm.graph.lint()
    gm.recompile()


def _serve(graph: torch.fx.Graph, replacement: Replacement, facts: dict[Any, torch.fx.Node]) -> torch.fx.Node:
    """Writes what serves a site before the site's output, and gives the node that is to stand for it."""
    site, out = replacement.site, replacement.site.out.origin
    groups = site.groups
    kept_heads = [atom for atom in leaves(groups.heads) if atom not in leaves(groups.repeated)]
    with graph.inserting_before(out):
        layout = Relayout(
            FxWriter(graph), [(x.origin.origin, x.origin_axes) for x in (site.query, site.key, site.value)]
        )

        def canonical(operand: Operand, heads: Axes, length: Axes, channels: Axes) -> torch.fx.Node:
            wanted = [groups.batch, *heads, *length, *channels]
            return layout.emit(operand.origin.origin, operand.origin_axes, wanted)

        query = canonical(site.query, [groups.heads], [groups.query], [groups.channels])
        key = canonical(site.key, [kept_heads], [groups.key], [groups.channels])
        value = canonical(site.value, [kept_heads], [groups.key], [groups.value_channels])
        device, factors = site.spec.device, site.factors
        query = scaled(graph, layout, groups, factors, "query", query, site.query.origin.dtype, device)
        key = scaled(graph, layout, groups, factors, "key", key, site.key.origin.dtype, device)
        nodes = CanonicalNodes(
            query, key, value,
            _fact(graph, layout, site, "key_padding", facts), _segments(graph, layout, site, facts),
            bias_node(graph, layout, site, facts), replacement.parameters,
        )  # fmt: skip
        structure = site.spec.mask
        if replacement.operator is None:
            result = call_sdpa(graph, nodes, site.scale, structure, site.spec.dropout, site.name)
        else:
            result = call_operator(graph, replacement.operator, nodes, site.scale, structure, site.name)
        result = layout.emit(
            result, [groups.batch, groups.heads, groups.query, groups.value_channels], site.out_axes
        )
        if site.out.dtype is not None and site.out.dtype != site.spec.dtype:
            result = graph.call_method("to", (result, site.out.dtype))
    result.meta = dict(out.meta)
    return result


def _segments(
    graph: torch.fx.Graph, layout: Relayout, site: Site, facts: dict[Any, torch.fx.Node]
) -> torch.fx.Node | None:
    """The documents of the tokens. Where a bias counts distances in real tokens, those that stand apart are one.

    A document's positions are its own, so that padding between its tokens does not part them. Queries at padding then see
    nothing; in a sequence without gaps nothing changes.
    """
    real = _fact(graph, layout, site, "key_padding", facts)
    if not site.mask.counted or real is None:
        return _fact(graph, layout, site, "segments", facts)
    identity = ("counted", real)
    if identity not in facts:
        call = graph.call_function
        later, earlier = (
            call(operator.getitem, (real, (slice(None), at))) for at in (slice(1, None), slice(-1))
        )
        begins = call(torch.logical_and, (later, call(torch.logical_not, (earlier,))))
        first = call(operator.getitem, (real, (slice(None), 0)))
        stretches = call(torch.add, (call(torch.sum, (begins, 1)), first))
        apart = call(operator.getitem, (call(torch.gt, (stretches, 1)), (slice(None), None)))
        facts[identity] = graph.call_method("to", (call(torch.logical_and, (real, apart)), torch.int64))
    return facts[identity]


def _fact(
    graph: torch.fx.Graph, layout: Relayout, site: Site, name: str, facts: dict[Any, torch.fx.Node]
) -> torch.fx.Node | None:
    """A ``(batch, key_len)`` tensor of the mask, made once for all sites that share it."""
    expression = getattr(site.mask, name)
    if expression is None:
        return None
    batch, keys = leaves(site.groups.batch), leaves(site.groups.key)
    identity = (name, expression, tuple(a.size for a in batch), tuple(a.size for a in keys))
    if identity not in facts:
        sizes = (layout.product(batch), layout.product(keys))
        if "query" in axes_of(expression):
            # What was read from the values of a mask: a key is real when any query sees it.
            whole = (sizes[0], layout.product(leaves(site.groups.query)), sizes[1])
            facts[identity] = _from_mask(graph, expression, whole, site.spec.device, name, facts)
        else:
            facts[identity] = emit_fx(graph, expression, ("batch", "key"), sizes, site.spec.device)
    return facts[identity]


def _from_mask(
    graph: torch.fx.Graph, visible: Expression, sizes: tuple[Any, Any, Any], device: str, name: str,
    facts: dict[Any, torch.fx.Node],
) -> torch.fx.Node:  # fmt: skip
    """Which keys are real, or the documents of the tokens, from a mask: once for all sequences where they share it."""
    shared = "batch" not in axes_of(visible)
    identity = ("visible", visible, sizes)
    if identity not in facts:
        whole = (1, *sizes[1:]) if shared else sizes
        facts[identity] = emit_fx(graph, visible, ("batch", "query", "key"), whole, device)
    seen = facts[identity]
    fact = (
        graph.call_function(documents_of, (seen,))
        if name == "segments"
        else graph.call_function(any_along, (seen, 1))
    )
    return graph.call_function(torch.broadcast_to, (fact, [sizes[0], sizes[2]])) if shared else fact
