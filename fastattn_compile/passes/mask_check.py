"""Masks whose structure no graph tells, read from the first batch and checked on every later one.

A mask that comes from outside, as an input or a constant, is data to the graph: behind a graph break, or where a user makes
it. Its values may still be causal, a window, padding, packed documents. Where they are on the first batch, the site is given
that structure; before every call the values are compared with it (``mask_guard``), and where they differ the graph must run
as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.axes import length
from fastattn_compile.passes.expression import (
    ZERO,
    axes_of,
    compare,
    constant,
    logical_and,
    substitute,
)
from fastattn_compile.passes.formula import leaves
from fastattn_compile.passes.fx_meta import value_of
from fastattn_compile.passes.graph import GraphView, Node, dependencies
from fastattn_compile.passes.mask_bias import HIDDEN
from fastattn_compile.passes.mask_guard import Claim, Held, MaskCheck, MaskHistory, MaskReader
from fastattn_compile.passes.mask_lift import lifter_of
from fastattn_compile.passes.mask_structure import MaskAnalysis
from fastattn_compile.passes.mask_terms import axes_by_role
from fastattn_compile.passes.mask_values import structure_of
from fastattn_compile.passes.sequences import same_sequence
from fastattn_compile.passes.site import Site, Softmax

# What a mask must not be computed by for its values to be looked at before the graph runs: work, chance, the unknown.
_WORK = {
    "matmul", "linear", "baddbmm", "einsum", "softmax", "log_softmax", "sdpa", "mha", "flex_attention", "dropout",
    "embedding", "opaque",
}  # fmt: skip
# A site whose claims failed as often is left exact.
_CLAIMS = 2


def check_masks(
    gm: torch.fx.GraphModule,
    view: GraphView,
    softmaxes: Sequence[Softmax],
    inputs: Sequence[Any] | None,
    history: MaskHistory,
) -> tuple[list[Softmax], MaskCheck | None]:
    """Gives sites the structure that the values of their masks show.

    Args:
        gm: The graph the sites were found in.
        view: Its view.
        softmaxes: Its softmaxes.
        inputs: Its inputs on the first batch, ``None`` to leave masks unread. Under some wrappers they are no real tensors,
            and nothing is found.
        history: What earlier batches taught.

    Returns:
        The softmaxes, those with a structure found so as ``checked``; and what has to be checked before every call of a
        graph that was rewritten with them, ``None`` for nothing.
    """
    held = _held(gm, view, softmaxes)
    asked: dict[tuple[Any, ...], list[Softmax]] = {}
    for line in softmaxes:
        if line.site is not None and _may_be_read(line.site):
            asked.setdefault(_question(line.site), []).append(line)
    if inputs is None or any(isinstance(x, FakeTensor) for x in inputs):
        asked.clear()
    # The number behind a symbolic size, without making it the only one.
    given = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs or ()]
    claims = [
        Claim(tuple(line.name for line in lines), MaskStructure(), visible, bias, dict(sizes))
        for (visible, bias, sizes), lines in asked.items()
    ]
    read = [leaf.node for claim in claims for x in (claim.visible, claim.bias) for leaf in leaves(x)]
    reader = MaskReader(gm, list(dict.fromkeys(read))) if claims else None
    kept: list[Claim] = []
    found: dict[str, Softmax] = {}
    with unset_fake_temporarily():
        masks = reader.read(given, claims) if reader is not None else []
    for claim, lines, (visible, plain) in zip(claims, asked.values(), masks):
        structure, reason = _structure(claim, visible, history)
        if structure is None:
            found.update((line.name, _without_structure(line, reason)) for line in lines)
        else:
            kept.append(replace(claim, structure=structure, plain=plain))
            found.update((line.name, _with_structure(line, kept[-1])) for line in lines)
    check = MaskCheck(reader if kept else None, kept, held) if kept or held else None
    return [found.get(line.name, line) for line in softmaxes], check


def _held(gm: torch.fx.GraphModule, view: GraphView, softmaxes: Sequence[Softmax]) -> list[Held]:
    """The buffers that masks of sites are made of."""
    formulas, names = lifter_of(view).held, dict[Node, list[str]]()
    for line in softmaxes:
        for node in line.site.held if line.site is not None else ():
            names.setdefault(node, []).append(line.name)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [
        Held(tuple(sites), node, formulas[node], inputs.index(node.origin) if node.origin in inputs else None)
        for node, sites in names.items()
    ]


def _structure(
    claim: Claim, visible: Tensor | None, history: MaskHistory
) -> tuple[MaskStructure | None, str]:
    """The structure to claim of a mask, or why none."""
    claimed = [x for name in claim.names for x in history.claimed.get(name, ())]
    met = [x for name in claim.names for x in history.met.get(name, ())]
    structure = None
    if visible is not None and len(claimed) < _CLAIMS:
        # Of the keys that a single query sees (a step against a cache) each step says anew.
        padded = visible.shape[1] == 1 or "batch" in axes_of(claim.visible) | axes_of(claim.bias)
        known = (*claimed, *met)
        structure = structure_of(
            visible, padded or any(x.key_padding for x in known), any(x.segments for x in known)
        )
    if structure is not None and structure not in claimed:
        return structure, ""
    if not claimed:
        return None, "its values on the first batch show no structure"
    others = [str(x) for x in met if x not in claimed] or ["something without structure"]
    return None, f"its values were {claimed[0]} on one batch and {others[0]} on another"


def _question(site: Site) -> tuple[Any, ...]:
    sizes = tuple((role, length(group)) for role, group in axes_by_role(site.groups).items())
    return (*site.mask.data, sizes) if site.mask.data is not None else ()


def _may_be_read(site: Site) -> bool:
    """Whether the mask comes from the inputs without work, and with all that meets the scores in it."""
    if site.mask.data is None:
        return False
    read = [leaf.node for x in site.mask.data for leaf in leaves(x)]
    work, seen = list(read), set(read)
    while work:
        node = work.pop()
        if node.kind in _WORK or node.tainted or _trained(node):
            return False
        for operand in dependencies(node):
            if operand not in seen:
                seen.add(operand)
                work.append(operand)
    return bool(read)


def _trained(node: Node) -> bool:
    """Whether gradients go to a tensor: what is 0 now will be a bias."""
    return bool(getattr(value_of(node), "requires_grad", False))


def _with_structure(line: Softmax, claim: Claim) -> Softmax:
    site, structure = line.site, claim.structure
    assert site is not None
    # Both are read from the mask of every batch.
    seen = claim.visible
    if claim.bias != ZERO:
        seen = logical_and(seen, compare("gt", claim.bias, constant(HIDDEN)))
    seen = substitute(seen, {"head": constant(0)})
    kind = "self" if same_sequence(site.query.origin, site.key.origin, site.groups, structure) else "cross"
    mask = MaskAnalysis(
        structure, seen if structure.key_padding else None, seen if structure.segments else None
    )
    if not claim.plain:
        # What is added keeps its values, those that hide keys included.
        mask = replace(mask, bias="dense", bias_expression=claim.bias, reason=site.mask.reason)
    spec = dataclasses.replace(site.spec, mask=structure, bias=mask.bias, kind=kind)
    given = replace(site, mask=mask, spec=spec)
    return replace(line, site=given, mask=str(structure), kind=kind, checked=True)


def _without_structure(line: Softmax, reason: str) -> Softmax:
    """The line as it was, and what its values said."""
    site = line.site
    assert site is not None
    if site.mask.structure.understood:
        return line
    structure = MaskStructure(opaque=f"{site.mask.structure.opaque}; {reason}")
    site = replace(
        site,
        mask=replace(site.mask, structure=structure, reason=structure.opaque),
        spec=dataclasses.replace(site.spec, mask=structure),
    )
    return replace(line, site=site, mask=str(structure))
