"""Whether queries and keys stand at the same positions: self attention, or cross attention of equal lengths."""

from __future__ import annotations

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.axes import length
from fastattn_compile.passes.contraction import CONTRACTION_KINDS
from fastattn_compile.passes.graph import Node, same_size
from fastattn_compile.passes.scores import is_weight
from fastattn_compile.passes.site import Groups

_MIXERS = CONTRACTION_KINDS | {"linear", "sdpa", "softmax", "mha", "flex_attention"}
_FACTS = frozenset(
    {"parameter", "constant", "full", "arange", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "not"}
)
# A projection lies within a few steps of the product; a norm or a position embedding within a few of the projection.
_NEAR = 64


def same_sequence(query: Node, key: Node, groups: Groups, mask: MaskStructure) -> bool:
    """Whether an attention is self attention.

    Equal lengths are needed but do not prove it: a decoder may read an encoder of its own length. Position terms in the
    mask do (they compare query positions with key positions), and so does a common activation before the projections.
    Raw tensors that are given from outside, with no projection in the graph, are taken at their length.

    Args:
        query: Origin of the queries.
        key: Origin of the keys.
        groups: Axes by role.
        mask: Structure of the mask.
    """
    if not same_size(length(groups.query), length(groups.key)):
        return False
    if mask.left is not None or mask.right is not None or mask.chunk is not None or mask.segments:
        return True
    of_query, of_key = _projected(query), _projected(key)
    if of_query & of_key:
        return True
    if not of_query and not of_key:
        return True
    return bool(_activations(of_query) & _activations(of_key))


def _projected(node: Node) -> set[Node]:
    """The activations that the projections behind ``node`` read. Empty when there is no projection."""
    found: set[Node] = set()
    seen: set[Node] = set()
    work = [node]
    while work and len(seen) < _NEAR:
        current = work.pop()
        if current in seen or current.kind in _FACTS:
            continue
        seen.add(current)
        if current.kind in _MIXERS:
            operands = current.operands
            if current.kind == "linear" or any(is_weight(x) for x in operands):
                found.update(x for x in operands[:2] if not is_weight(x))
            continue
        if current.kind == "embedding":
            continue
        work.extend(current.operands)
    return found


def _activations(nodes: set[Node]) -> set[Node]:
    """The given nodes and what they were made of by norms and sums, up to the next projection."""
    found: set[Node] = set()
    work = list(nodes)
    while work and len(found) < _NEAR:
        current = work.pop()
        if current in found or current.kind in _FACTS:
            continue
        found.add(current)
        if current.kind not in _MIXERS and current.kind != "embedding":
            work.extend(current.operands)
    return found
