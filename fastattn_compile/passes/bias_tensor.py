"""The bias of a site as the tensor operators read: slopes of the heads, or a number for every head and distance."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from fastattn_compile.passes.axes import leaves as atoms
from fastattn_compile.passes.emission import emit_fx
from fastattn_compile.passes.expression import Expression, constant, substitute
from fastattn_compile.passes.formula import leaves
from fastattn_compile.passes.fx_meta import value_of
from fastattn_compile.passes.relayout import Relayout
from fastattn_compile.passes.site import Site


def bias_node(
    graph: torch.fx.Graph, layout: Relayout, site: Site, made: dict[Any, torch.fx.Node]
) -> torch.fx.Node | None:
    """Writes the bias of a site, once for all sites that share it.

    Args:
        graph: The graph, at its insertion point.
        layout: Knows the sizes of the site's axes.
        site: The site; queries and keys stand at the same positions.
        made: What was written before.

    Returns:
        ``(heads,)`` for ALiBi whose slopes are not trained, else ``(heads, 2 n - 1)``; ``None`` without a bias.
    """
    mask = site.mask
    if mask.bias not in ("alibi", "bucketed") or mask.bias_expression is None:
        return None
    heads, keys = atoms(site.groups.heads), atoms(site.groups.key)
    identity = (mask.bias, mask.bias_expression, tuple(a.size for a in heads), tuple(a.size for a in keys))
    if identity not in made:
        writer = _Writer(graph, site, layout.product(heads), layout.product(keys))
        made[identity] = writer.write()
    return made[identity]


class _Writer:
    """Writes one bias.

    Args:
        graph: The graph.
        site: The site.
        heads: Number of heads, or its node.
        length: Number of keys, or its node.
    """

    def __init__(self, graph: torch.fx.Graph, site: Site, heads: Any, length: Any) -> None:
        self.graph, self.site, self.heads, self.length = graph, site, heads, length

    def write(self) -> torch.fx.Node:
        """The tensor, in float32 or float64."""
        mask = self.site.mask
        if mask.slope is None:
            found = self._by_distance()
        elif mask.bias == "alibi" and not _is_trained(mask.slope):
            found = self._emit(mask.slope, ("head",), (self.heads,))
        else:
            found = self._linear(mask.slope, mask.bias == "alibi")
        wide = torch.float64 if self.site.spec.dtype == torch.float64 else torch.float32
        return self.graph.call_method("to", (found, wide))

    def _by_distance(self) -> torch.fx.Node:
        """What is added at ``key - query`` from ``-(n - 1)`` to ``n - 1``: the first column and row of the scores."""
        formula = self.site.mask.bias_expression
        if formula is None:
            raise ValueError(f"{self.site.name} has no bias")
        first = constant(0)
        behind, ahead = (
            self._emit(substitute(formula, {other: first}), ("head", name), (self.heads, self.length))
            for other, name in (("key", "query"), ("query", "key"))
        )
        behind = self._call(torch.flip, behind, [1])
        behind = self._call(operator.getitem, behind, (slice(None), slice(None, -1)))
        return self._call(torch.cat, [behind, ahead], 1)

    def _linear(self, slope: Expression, symmetric: bool) -> torch.fx.Node:
        """``-slope * |distance|`` or ``slope * distance`` for every distance."""
        slopes = self._emit(slope, ("head",), (self.heads,))
        start = 1 - self.length if isinstance(self.length, int) else self._call(operator.sub, 1, self.length)
        distance = self.graph.call_function(
            torch.arange, (start, self.length), {"device": torch.device(self.site.spec.device)}
        )
        if symmetric:
            distance = self._call(torch.neg, self._call(torch.abs, distance))
        return self._call(operator.mul, self._call(operator.getitem, slopes, (slice(None), None)), distance)

    def _emit(self, formula: Expression, axes: tuple[str, ...], sizes: tuple[Any, ...]) -> torch.fx.Node:
        return emit_fx(self.graph, formula, axes, sizes, self.site.spec.device)

    def _call(self, function: Any, *arguments: Any) -> torch.fx.Node:
        return self.graph.call_function(function, arguments)


def _is_trained(slope: Expression) -> bool:
    """Whether gradients must reach the slopes: operators give one to a bias by distance only."""
    for leaf in leaves(slope):
        tensor = value_of(leaf.node)
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return True
    return False
