"""Factors of the scores that are tensors: a learned temperature, a scale by head or position.

One that does not vary with both query and key is a factor of the queries or of the keys, and moves there.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
import torch.fx

from fastattn_compile.passes.emission import emit_fx
from fastattn_compile.passes.expression import axes_of
from fastattn_compile.passes.formula import ANY_AXIS, leaves
from fastattn_compile.passes.graph import Node, Size
from fastattn_compile.passes.mask_facts import name_of
from fastattn_compile.passes.mask_lift import Lifter
from fastattn_compile.passes.mask_structure import MaskTerm, depends_on, formula_of
from fastattn_compile.passes.relayout import Relayout
from fastattn_compile.passes.site import Factor, Groups


def read_factors(
    terms: Sequence[tuple[MaskTerm, int]],
    lifter: Lifter,
    sizes: Mapping[str, Size | None],
    repeats: bool,
    scores: Node | None,
) -> tuple[Factor, ...] | str:
    """Says where the factors of the scores of a site go.

    Args:
        terms: The tensors, each with its power.
        lifter: Of the graph.
        sizes: Of the four axes.
        repeats: Several query heads share a key head, so that a factor of heads cannot go to the keys.
        scores: The product of queries and keys, on which no factor may depend.

    Returns:
        The factors, or why one can go nowhere.
    """
    found = []
    for term, power in terms:
        formula = formula_of(term, lifter, sizes)
        axes = axes_of(formula)
        read = [leaf.node for leaf in leaves(formula)]
        if ANY_AXIS in axes:
            return f"the scores are scaled by {name_of(term.node)}, which cannot be followed"
        if scores is not None and any(depends_on(node, scores, lifter.order) for node in read):
            return f"the scores are scaled by {name_of(term.node)}, which depends on them"
        if axes <= {"batch", "head", "query"}:
            found.append(Factor("query", formula, power))
        elif axes <= {"batch", "key"} or (axes <= {"batch", "head", "key"} and not repeats):
            found.append(Factor("key", formula, power))
        else:
            return f"the scores are scaled by {name_of(term.node)}, which differs between queries and keys"
    return tuple(found)


def scaled(
    graph: torch.fx.Graph, layout: Relayout, groups: Groups, factors: Sequence[Factor], side: str,
    tensor: torch.fx.Node, dtype: torch.dtype | None, device: str,
) -> torch.fx.Node:  # fmt: skip
    """Writes the factors of one side into a graph.

    Args:
        graph: The graph, at its insertion point.
        layout: Knows the sizes of the axes.
        groups: The axes by role.
        factors: Of the site.
        side: ``"query"`` or ``"key"``.
        tensor: Queries or keys, ``(batch, heads, length, head_dim)``.
        dtype: Their type.
        device: Their device type.

    Returns:
        The tensor times its factors, of its own type.
    """
    by_role = {"batch": groups.batch, "head": groups.heads, side: getattr(groups, side)}
    mine = [factor for factor in factors if factor.side == side]
    for factor in mine:
        # Keys have fewer heads where query heads share them: a factor that varies with heads is not among them then.
        roles = ["batch", *(["head"] if "head" in axes_of(factor.formula) else []), side]
        sizes = [layout.product(by_role[role]) for role in roles]
        written = emit_fx(graph, factor.formula, roles, sizes, device)
        at = (slice(None), *([slice(None)] if "head" in roles else [None]), slice(None), None)
        written = graph.call_function(operator.getitem, (written, at))
        apply = operator.mul if factor.power > 0 else operator.truediv
        tensor = graph.call_function(apply, (tensor, written))
    return graph.call_method("to", (tensor, dtype)) if mine and dtype is not None else tensor
