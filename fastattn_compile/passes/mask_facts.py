"""What one condition of a mask says: a bound on the distance, a chunk, real tokens, documents.

A mask is a conjunction. Each of its conditions is read on its own into facts; ``mask_structure`` joins them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastattn_compile.passes.expression import (
    Binary,
    Compare,
    Constant,
    Expression,
    Linear,
    Load,
    Logic,
    axes_of,
    axis,
    constant,
    is_constant,
    rewrite,
    sub,
    substitute,
)
from fastattn_compile.passes.formula import ANY_AXIS, Unknown, leaves
from fastattn_compile.passes.graph import Node, Size
from fastattn_compile.passes.mask_lift import Lifter

Places = Mapping[str, Expression]


@dataclass(frozen=True)
class Bound:
    """A bound on ``key - query``: at most ``most`` to the right, at least ``most`` to the left.

    With ``prefix`` the first keys are exempt.
    """

    side: str
    most: Size
    prefix: int | None = None


@dataclass(frozen=True)
class Chunk:
    """``key // size == (query + shift) // size``."""

    size: int
    shift: Size


@dataclass(frozen=True)
class Keys:
    """A condition on batch and key alone."""

    condition: Expression


@dataclass(frozen=True)
class Rows:
    """A condition on batch and query alone: where it fails the whole row is hidden."""

    condition: Expression


@dataclass(frozen=True)
class Segment:
    """``at_key`` equals ``at_query``, one formula at two positions; the query is at ``query + shift``."""

    at_key: Expression
    at_query: Expression
    shift: Size


@dataclass(frozen=True)
class Opaque:
    """A condition that was not understood."""

    reason: str


Fact = Bound | Chunk | Keys | Rows | Segment | Opaque


def name_of(node: Node) -> str:
    """A node and the line that made it, for a reader."""
    return node.located(node.name)


def read_condition(condition: Expression, places: Places, offset: Size | None) -> list[Fact]:
    """Reads one condition of a conjunction.

    Args:
        condition: A truth value over batch, head, query and key.
        places: The four axes.
        offset: ``key_len - query_len``, ``None`` when unknown.

    Returns:
        What it says; all facts hold together.
    """
    axes = axes_of(condition)
    if ANY_AXIS in axes:
        unknown = next(leaf for leaf in leaves(condition) if isinstance(leaf, Unknown))
        return [Opaque(f"the mask depends on {name_of(unknown.node)}, {unknown.why}")]
    if axes <= {"batch", "key"}:
        return [Keys(condition)]
    if "head" in axes:
        return [Opaque("the mask differs between heads")]
    if axes <= {"batch", "query"}:
        return [Rows(condition)]
    if (bounds := _bounds(condition)) is not None:
        return list(bounds)
    if isinstance(condition, Logic) and condition.op == "or":
        with_prefix = _prefix(condition)
        if with_prefix is not None:
            return list(with_prefix)
    if isinstance(condition, Compare) and condition.op == "eq":
        same = _same(condition.a, condition.b, places, offset) or _same(
            condition.b, condition.a, places, offset
        )
        if same is not None:
            return [same]
    loads = [leaf.node for leaf in leaves(condition)]
    if loads:
        return [Opaque(f"the mask is data over queries and keys, read from {name_of(loads[0])}")]
    return [Opaque("the mask is a pattern of positions that is no band, chunk or prefix")]


def _bounds(condition: Expression) -> list[Bound] | None:
    """A comparison of ``key - query`` with a size."""
    if (
        not isinstance(condition, Compare)
        or not isinstance(condition.a, Linear)
        or not is_constant(condition.b, 0)
    ):
        return None
    form = condition.a
    step = form.coefficient("key")
    if axes_of(form) != {"query", "key"} or abs(step) != 1 or form.coefficient("query") != -step:
        return None
    most = -form.offset if step == 1 else form.offset
    if condition.op == "eq":
        return [Bound("left", most), Bound("right", most)]
    return [Bound("right" if step == 1 else "left", most)]


def _prefix(condition: Logic) -> list[Bound] | None:
    """Bounds on the distance, or a key before ``prefix``."""
    lengths: list[int] = []
    bounds: list[Bound] = []
    pairs: list[int] = []
    for term in condition.terms:
        if (length := _before(term, "key")) is not None:
            lengths.append(length)
            continue
        parts = term.terms if isinstance(term, Logic) else (term,)
        if len(parts) == 2 and (pair := _pair(parts)) is not None:
            pairs.append(pair)
            continue
        found = [_bounds(part) for part in parts]
        if bounds or any(f is None for f in found):
            return None  # an alternative that is neither, or a second one
        bounds = [b for f in found if f is not None for b in f]
    if len(lengths) + len(pairs) != 1 or not bounds:
        return None
    if pairs and not all(b.side == "right" and isinstance(b.most, int) and b.most >= -1 for b in bounds):
        return None
    prefix = (lengths + pairs)[0]
    return [Bound(b.side, b.most, prefix) for b in bounds] if prefix > 0 else None


def _before(condition: Expression, name: str) -> int | None:
    """``p`` when the condition is ``index < p`` along the named axis."""
    if not isinstance(condition, Compare) or condition.op != "le" or not isinstance(condition.a, Linear):
        return None
    form = condition.a
    alone = axes_of(form) == {name} and form.coefficient(name) == 1 and isinstance(form.offset, int)
    return 1 - form.offset if alone and is_constant(condition.b, 0) else None


def _pair(parts: tuple[Expression, ...]) -> int | None:
    """``p`` when the conditions are ``key < p`` and ``query < r`` with ``r >= p``.

    As an alternative to ``key <= query - 1`` or looser it says no more than ``key < p``: queries from ``r``
    on see those keys anyway.
    """
    for first, second in (parts, parts[::-1]):
        key, query = _before(first, "key"), _before(second, "query")
        if key is not None and query is not None:
            return key if query >= key else None
    return None


def _same(
    at_key: Expression, at_query: Expression, places: Places, offset: Size | None
) -> Chunk | Segment | None:
    """One formula at the key and at the query."""
    if not (axes_of(at_key) <= {"batch", "key"} and axes_of(at_query) <= {"batch", "query"}):
        return None
    if (chunk := _chunk(at_key, at_query)) is not None:
        return chunk
    if at_key.domain == "real" or not leaves(at_key):
        return None
    for shift in (0,) if offset is None or offset == 0 else (0, offset):
        here = places["query"] if shift == 0 else sub(places["query"], constant(-shift))
        if substitute(at_key, {"key": here}) == at_query:
            return Segment(at_key, at_query, shift)
    return None


def _chunk(at_key: Expression, at_query: Expression) -> Chunk | None:
    sizes = []
    starts: list[Size] = []
    for x, name in ((at_key, "key"), (at_query, "query")):
        if not isinstance(x, Binary) or x.op != "floordiv" or not isinstance(x.a, Linear):
            return None
        if axes_of(x.a) != {name} or x.a.coefficient(name) != 1 or not isinstance(x.b, Constant):
            return None
        sizes.append(x.b.value)
        starts.append(x.a.offset)
    whole = isinstance(sizes[0], int) and sizes[0] == sizes[1] and isinstance(starts[0], int)
    if not whole or starts[0] % sizes[0]:
        return None  # a grid that does not begin at the first key
    return Chunk(sizes[0], starts[1] - starts[0])


def restart_positions(segment: Segment, lifter: Lifter, places: Places) -> dict[Expression, Expression]:
    """What positions may stand for inside one document.

    Packed documents are told apart by ``(diff(positions) != 1).cumsum()``. Where that number is the same for
    a key and a query, the difference of their positions is the difference of their places.

    Args:
        segment: The documents.
        lifter: Lifter of the graph.
        places: The four axes.

    Returns:
        The formulas of the two positions, each with the axis that may replace it in a difference.
    """
    if not isinstance(segment.at_key, Load) or not isinstance(segment.at_query, Load):
        return {}
    counted = segment.at_key.node
    if counted.kind != "cumsum" or counted.tainted or counted.dtype not in (torch.int32, torch.int64):
        return {}
    changed = _through(counted.inputs[0], "cast", "identity")
    if (
        changed is None
        or changed.kind != "ne"
        or changed.inputs[1] != 1
        or not isinstance(changed.inputs[0], Node)
    ):
        return {}
    step = _through(changed.inputs[0], "cast", "identity")
    along = counted.attributes.get("dim")
    if (
        step is None
        or step.kind != "diff"
        or step.attributes.get("dim") != along
        or not isinstance(along, int)
    ):
        return {}
    if len(step.inputs) < 2 or step.inputs[1] is None or not isinstance(step.inputs[0], Node):
        return {}  # without a value before the first, the count is one shorter than the positions
    position = lifter.lift(step.inputs[0])
    replaced: dict[Expression, Expression] = {}
    for name, at in (("key", segment.at_key), ("query", segment.at_query)):
        if at.indices[along] != places[name]:
            return {}
        where = {f"d{i}": index for i, index in enumerate(at.indices)}
        replaced[substitute(position, where)] = axis(name)
    return replaced if all(isinstance(x, Load) for x in replaced) else {}


def _through(node: object, *kinds: str) -> Node | None:
    while isinstance(node, Node) and node.kind in kinds and not node.tainted:
        node = node.inputs[0]
    return node if isinstance(node, Node) and not node.tainted else None


def with_places(
    condition: Expression, positions: Mapping[Expression, Expression], places: Places
) -> Expression:
    """A comparison of the difference of positions inside one document, as one of places.

    Args:
        condition: Any condition; one of another kind is returned as it is.
        positions: From ``restart_positions``.
        places: The four axes.
    """
    if not positions or not isinstance(condition, Compare):
        return condition
    # The axes put in have no extent yet: nothing may fold that holds of places but not of positions.
    swapped = rewrite(condition, positions.get)
    if isinstance(swapped, Compare) and _bounds(swapped) is not None:
        return substitute(swapped, places)
    return condition
