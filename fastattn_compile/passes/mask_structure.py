"""Which keys a query may see, read from the graph: a ``MaskStructure`` and what travels beside it.

Every tensor that meets the scores before the softmax becomes a formula of batch, head, query and key. Their
conjunction is read condition by condition. What is claimed is proven for all sizes and inputs; what is not
understood makes the whole mask opaque and is named.

A query that sees no key gives 0, while a softmax over additive masks spreads such a row over hidden keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.emission import emit, evaluate
from fastattn_compile.passes.expression import (
    FALSE,
    TRUE,
    ZERO,
    Constant,
    Expression,
    Load,
    Logic,
    add,
    axes_of,
    axis,
    compare,
    constant,
    logical_and,
    logical_not,
    mul,
    nonnegative,
    number,
    rewrite,
    substitute,
    truthy,
)
from fastattn_compile.passes.formula import ANY_AXIS, Linear, Unknown, leaves, places_of
from fastattn_compile.passes.graph import Node, Size, dependencies, same_size
from fastattn_compile.passes.mask_bias import (
    HIDDEN,
    classify_bias,
    counted_slope,
    indicator,
    is_hiding,
    read_additive,
    summands,
)
from fastattn_compile.passes.mask_facts import (
    Bound,
    Chunk,
    Fact,
    Keys,
    Opaque,
    Rows,
    Segment,
    name_of,
    read_condition,
    restart_positions,
    with_places,
)
from fastattn_compile.passes.mask_lift import Lifter

__all__ = ["AXES", "HIDDEN", "MaskAnalysis", "MaskTerm", "emit", "recognise", "verify"]

AXES = ("batch", "head", "query", "key")


@dataclass(frozen=True)
class MaskTerm:
    """A tensor that meets the scores.

    Args:
        node: The tensor.
        role: ``"add"``: it is added. ``"keep"``: false makes a score ``fill``, true leaves it. ``"fill"``:
            true makes it ``fill``. ``"gate"``: the score is multiplied by it, which a later term must make good:
            where it is not 1 the key must be hidden.
        fill: What a replaced score becomes.
        axes: For each dimension of the tensor its index as a formula of ``batch``, ``head``, ``query`` and
            ``key``: the first of a folded score is ``batch * heads + head``. That of a dimension of size 1 is
            not read.
        factor: What the tensor is multiplied by before it is added.
    """

    node: Node
    role: str
    fill: float
    axes: tuple[Expression, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class MaskAnalysis:
    """What the mask and bias of an attention are.

    Args:
        structure: The mask. With ``opaque`` set the other fields say nothing.
        key_padding: Truth value of batch and key, true for a real token; set when ``structure.key_padding``. One of query,
            too, is the whole mask: a key is real when any query sees it.
        segments: Integer formula of batch and key, the document of a token; set when ``structure.segments``. A truth value
            of query, too, is the whole mask: documents are what it does not join (``mask_values.documents_of``).
        bias: ``"none"``; ``"alibi"``: ``-slope * |key - query|`` for visible keys; ``"bucketed"``: a function of
            head and ``key - query``; both up to a constant of each row; ``"dense"``: anything else, data that may
            hide keys included.
        bias_expression: The bias on the scores of visible keys over the four axes, ``None`` without one.
        slope: Of a linear bias, a formula of head: that of ALiBi, or of a bucketed ``slope * (key - query)``.
        reason: What kept the mask or bias from being understood, empty when nothing did.
        counted: The distances of an ALiBi bias are counted in real tokens: padding between two does not part them.
        data: Which keys are visible and what is added to their scores, as formulas of the four axes, where structure could
            not be read from them: tensors may still show it (``mask_check``).
    """

    structure: MaskStructure
    key_padding: Expression | None = None
    segments: Expression | None = None
    bias: str = "none"
    bias_expression: Expression | None = None
    slope: Expression | None = None
    reason: str = ""
    counted: bool = False
    data: tuple[Expression, Expression] | None = None

    def reads(self) -> list[Node]:
        """The tensors of the graph that its formulas read."""
        formulas = (self.key_padding, self.segments, self.bias_expression)
        return list({leaf.node: None for x in formulas if x is not None for leaf in leaves(x)})


def recognise(
    terms: Sequence[MaskTerm],
    lifter: Lifter,
    sizes: Mapping[str, Size | None],
    causal: bool = False,
    scores: Node | None = None,
    trust_added: bool = False,
) -> MaskAnalysis:
    """Understands the mask of an attention.

    Args:
        terms: What meets the scores.
        lifter: The lifter of the graph, ``lifter_of(view)``. Equal questions are answered once.
        sizes: Extents of ``"batch"``, ``"head"``, ``"query"`` and ``"key"``; one that is missing is unknown.
        causal: A fused call's own causal flag: a key is visible up to the index of the query.
        scores: The product of queries and keys. A mask that depends on it is opaque.
        trust_added: Take floating-point data of batch and key that is added to the scores for key padding, 0
            or hiding. Nothing in a graph can prove it; by default it is a dense bias.

    Raises:
        ValueError: A term has a role that does not exist, or not one index for each dimension.
    """
    question = (tuple(terms), tuple(sizes.get(name) for name in AXES), causal, trust_added)
    analysis = lifter.cache.get(question)
    if analysis is None:
        analysis = lifter.cache[question] = _analyse(terms, lifter, sizes, causal, trust_added)
    if scores is not None:
        # An opaque mask stays opaque whatever it reads.
        for node in analysis.reads():
            if depends_on(node, scores, lifter.order):
                return _opaque(f"the mask depends on the scores through {name_of(node)}")
    return analysis


def _opaque(reason: str) -> MaskAnalysis:
    return MaskAnalysis(MaskStructure(opaque=reason), reason=reason)


def _analyse(
    terms: Sequence[MaskTerm],
    lifter: Lifter,
    sizes: Mapping[str, Size | None],
    causal: bool,
    trust_added: bool,
) -> MaskAnalysis:
    places = {name: axis(name, sizes.get(name)) for name in AXES}
    offset = _offset(sizes)
    visible: Expression = compare("le", places["key"], places["query"]) if causal else TRUE
    bias: Expression = ZERO
    gates: list[tuple[MaskTerm, Expression, Expression]] = []
    for term in terms:
        met = _formula(term, lifter, places)
        if term.role == "gate":
            gates.append((term, met, visible))
            visible = TRUE
            continue
        kept, added = _read(term, met)
        if kept is None:
            return _opaque(f"masked scores become {term.fill:g}, not -inf, in {name_of(term.node)}")
        visible, bias = logical_and(visible, kept), add(bias, added)
    for term, met, before in reversed(gates):
        # A factor that is real data is not known to be 0 or 1.
        passed = None if any(leaf.domain == "real" for leaf in leaves(met)) else indicator(met)
        if passed is None or logical_and(visible, passed) != visible:
            return _opaque(
                f"the scores are multiplied by {name_of(term.node)}, and not hidden wherever it is not 1"
            )
        visible = logical_and(before, visible)
    if trust_added:
        visible, bias = _trusted(visible, bias)
    if visible == FALSE:
        return _opaque("no key is visible")
    if ANY_AXIS in axes_of(bias):
        unknown = next(leaf for leaf in leaves(bias) if isinstance(leaf, Unknown))
        return _opaque(f"what is added to the scores depends on {name_of(unknown.node)}, {unknown.why}")
    data = None if ANY_AXIS in axes_of(visible) else (visible, bias)
    conditions = list(visible.terms) if isinstance(visible, Logic) and visible.op == "and" else [visible]
    facts = _facts([c for c in conditions if c != TRUE], lifter, places, offset)
    analysis = _join(facts, offset)
    if not analysis.structure.understood:
        named = [name_of(term.node) for term in terms]
        known = any(name in analysis.reason for name in named) or not named
        if not known:
            analysis = _opaque(f"{analysis.reason}, in {', '.join(named)}")
        return replace(analysis, data=data)
    kind, kept_bias, slope = classify_bias(bias, offset, analysis.structure.causal)
    if kind == "none":
        return analysis
    reason = ""
    structure, padding = analysis.structure, analysis.key_padding
    if kind == "dense" and padding is not None and structure.causal and not structure.segments:
        counted = counted_slope(bias, padding)
        if counted is not None:
            return replace(analysis, bias="alibi", bias_expression=kept_bias, slope=counted, counted=True)
    if kind == "dense":
        read = leaves(kept_bias)
        reason = (
            f"a dense bias is added to the scores, read from {name_of(read[0].node)}"
            if read
            else "a dense bias"
        )
    given = data if kind == "dense" else None
    return replace(analysis, bias=kind, bias_expression=kept_bias, slope=slope, reason=reason, data=given)


def _offset(sizes: Mapping[str, Size | None]) -> Size | None:
    query, key = sizes.get("query"), sizes.get("key")
    if query is None or key is None:
        return None
    return 0 if same_size(query, key) else key - query


def formula_of(term: MaskTerm, lifter: Lifter, sizes: Mapping[str, Size | None]) -> Expression:
    """The tensor of a term as a formula of the four axes, whose extents are ``sizes``."""
    return _formula(term, lifter, {name: axis(name, sizes.get(name)) for name in AXES})


def _formula(term: MaskTerm, lifter: Lifter, places: Mapping[str, Expression]) -> Expression:
    if term.node.shape is None:
        return Unknown(term.node, "of unknown shape")
    if len(term.axes) != len(term.node.shape):
        raise ValueError(
            f"mask {term.node.name} has {len(term.node.shape)} dimensions and {len(term.axes)} indices; "
            "give one index for each dimension"
        )
    indices = {f"d{i}": substitute(index, places) for i, index in enumerate(term.axes)}
    return substitute(lifter.lift(term.node), indices)


def _read(term: MaskTerm, met: Expression) -> tuple[Expression | None, Expression]:
    """Which keys a term leaves visible, and what it adds; ``None`` when replaced scores stay visible."""
    if term.role == "add":
        return read_additive(met if term.factor == 1 else mul(met, constant(term.factor)))
    if term.role not in ("keep", "fill"):
        raise ValueError(f"a mask term is of role add, keep or fill, got {term.role!r}")
    kept = truthy(met) if term.role == "keep" else logical_not(truthy(met))
    return (kept if is_hiding(constant(float(term.fill))) or kept == TRUE else None), ZERO


def _facts(
    conditions: list[Expression], lifter: Lifter, places: Mapping[str, Expression], offset: Size | None
) -> list[Fact]:
    """Reads all conditions, those that need it in the light of the documents."""
    facts = [fact for c in conditions for fact in read_condition(c, places, offset)]
    segments = [fact for fact in facts if isinstance(fact, Segment)]
    if len(segments) != 1:
        return facts
    positions = restart_positions(segments[0], lifter, places)
    at_key, at_query = segments[0].at_key, segments[0].at_query
    result: list[Fact] = []
    for condition in conditions:
        for fact in read_condition(with_places(condition, positions, places), places, offset):
            if isinstance(fact, Rows):
                # Inside one document, what holds of the document of the query holds of that of the key.
                moved = rewrite(fact.condition, lambda e: at_key if e == at_query else None)
                fact = Keys(moved) if "query" not in axes_of(moved) else fact
            result.append(fact)
    return result


def _trusted(visible: Expression, bias: Expression) -> tuple[Expression, Expression]:
    """Takes what is added for each key, and read as it is, for padding."""
    rest: Expression = ZERO
    for part in summands(bias):
        if isinstance(part, Load) and part.domain == "real" and axes_of(part) <= {"batch", "key"}:
            visible = logical_and(visible, compare("gt", part, constant(HIDDEN)))
        else:
            rest = add(rest, part)
    return visible, rest


def _join(facts: list[Fact], offset: Size | None) -> MaskAnalysis:
    """One structure from facts that all hold."""
    for fact in facts:
        if isinstance(fact, Opaque):
            return _opaque(fact.reason)
        if isinstance(fact, Rows):
            read = leaves(fact.condition)
            through = f", by {name_of(read[0].node)}" if read else ""
            return _opaque(f"the mask hides whole rows of queries{through}")
    bounds = [fact for fact in facts if isinstance(fact, Bound)]
    chunks = list({fact for fact in facts if isinstance(fact, Chunk)})
    segments = list({fact for fact in facts if isinstance(fact, Segment)})
    if len({b.prefix for b in bounds}) > 1:
        return _opaque("a prefix is exempt from one bound on the distance and not from another")
    if len(chunks) > 1 or len(segments) > 1:
        return _opaque("two partitions of the tokens hold at once")
    aligned = _alignment(bounds, chunks, segments, offset)
    if isinstance(aligned, str):
        return _opaque(aligned)
    end_aligned, left, right = aligned
    padding = logical_and(*(fact.condition for fact in facts if isinstance(fact, Keys)))
    ids = number(segments[0].at_key) if segments else None
    for formula in (padding, ids):
        if formula is not None and (strange := _strange_size(formula)) is not None:
            return _opaque(f"the mask depends on the size {strange}, which no axis has")
    try:
        structure = MaskStructure(
            left=left, right=right, end_aligned=end_aligned,
            chunk=chunks[0].size if chunks else None,
            prefix=bounds[0].prefix if bounds else None, key_padding=padding != TRUE,
            segments=ids is not None,
        )  # fmt: skip
    except ValueError as error:
        return _opaque(str(error))
    return MaskAnalysis(structure, padding if structure.key_padding else None, ids)


def _alignment(
    bounds: list[Bound], chunks: list[Chunk], segments: list[Segment], offset: Size | None
) -> tuple[bool, int | None, int | None] | str:
    """Whether queries stand at the first keys or at the last, and the distances seen from there."""
    shifts = [chunk.shift for chunk in chunks] + [segment.shift for segment in segments]
    found: dict[bool, tuple[int | None, int | None]] = {}
    for end, move in ((False, 0), (True, offset)):
        if move is None or (end and move == 0):
            continue
        if not all(same_size(shift, move) for shift in shifts):
            continue
        ends: dict[str, list[int]] = {"left": [], "right": []}
        for bound in bounds:
            distance = sympy.sympify(bound.most - move)
            if not distance.is_Integer:
                break
            ends[bound.side].append(int(distance))
        else:
            left = -max(ends["left"]) if ends["left"] else None
            right = min(ends["right"]) if ends["right"] else None
            found[end] = (left, right)
    if segments and found.get(False) and offset is not None and not nonnegative(offset):
        del found[False]  # a query past the last key has no document
    if not found:
        return "the position of the queries among the keys is not known"
    # With both, what is causal or symmetric seen from the end is clearer from there.
    left, right = found.get(True, (None, None))
    end = False not in found or right == 0 or (right is not None and left == right)
    return (end, *found[end])


def _strange_size(x: Expression) -> sympy.Expr | None:
    """A symbolic size in a formula that is not the extent of one of its axes, and so cannot be written."""
    known = {place.extent for place in places_of(x)}
    symbols = set().union(*(k.free_symbols for k in known if isinstance(k, sympy.Symbol)))
    strange: list[sympy.Expr] = []

    def look(e: Expression) -> Expression | None:
        value = e.value if isinstance(e, Constant) else e.offset if isinstance(e, Linear) else None
        if isinstance(value, sympy.Expr) and not value.free_symbols <= symbols:
            strange.append(value)
        return None

    rewrite(x, look)
    return strange[0] if strange else None


def depends_on(node: Node, other: Node, order: Mapping[Node, int]) -> bool:
    """Whether ``node`` is computed from ``other``. What stands before it in the graph is not."""
    first = order.get(other, -1)
    work, seen = [node], set()
    while work:
        current = work.pop()
        if current is other:
            return True
        if current not in seen and order.get(current, first) >= first:
            seen.add(current)
            work.extend(dependencies(current))
    return False


def verify(
    analysis: MaskAnalysis, terms: Sequence[MaskTerm], values: Mapping[Node, Tensor], causal: bool = False
) -> bool:
    """Whether an analysis says of real tensors what they are. Costs the size of the scores: for tests.

    Args:
        analysis: What ``recognise`` answered.
        terms: What it was asked.
        values: Tensors of the terms and of what the formulas read.
        causal: As for ``recognise``.

    Returns:
        Whether the same keys are visible to every query, with the same bias up to a constant of each row.

    Raises:
        ValueError: The mask is opaque.
    """
    symbols = {
        size: value.shape[i]
        for node, value in values.items()
        for i, size in enumerate(node.shape or ())
        if isinstance(size, sympy.Symbol)
    }
    extents = {place.name: place.extent for term in terms for x in term.axes for place in places_of(x)}
    sizes = [int(sympy.sympify(extents.get(name) or 1).subs(symbols)) for name in AXES]
    grids = {
        name: torch.arange(size).reshape([-1 if i == j else 1 for j in range(4)])
        for i, (name, size) in enumerate(zip(AXES, sizes))
    }
    visible = grids["key"] <= grids["query"] if causal else torch.ones(sizes, dtype=torch.bool)
    added = torch.zeros(sizes, dtype=torch.float64)
    for term in terms:
        value = values[term.node]
        index = [
            torch.zeros((), dtype=torch.int64) if n == 1 else evaluate(x, grids, values, symbols)
            for n, x in zip(value.shape, term.axes)
        ]
        met = value[tuple(index)] if index else value
        if term.role == "add":
            added = added + met.double() * term.factor
        else:
            visible = visible & (met.bool() == (term.role == "keep"))
    bias = torch.zeros((), dtype=torch.float64)
    if analysis.bias_expression is not None:
        bias = evaluate(analysis.bias_expression, grids, values, symbols).double()
    hidden = (added <= HIDDEN) | (added - bias <= HIDDEN / 2)
    visible = (visible & ~hidden).expand(sizes)
    structure = analysis.structure
    seen = structure.visible(grids["query"], grids["key"], sizes[2], sizes[3]) & (bias > HIDDEN)
    if analysis.key_padding is not None:
        seen = seen & evaluate(analysis.key_padding, grids, values, symbols)
    if analysis.segments is not None:
        ids = evaluate(analysis.segments, grids, values, symbols).expand(sizes[0], 1, 1, sizes[3])
        rows = torch.arange(sizes[2]) + (sizes[3] - sizes[2] if structure.end_aligned else 0)
        seen = seen & (ids == ids[..., rows].transpose(2, 3))
    if not torch.equal(seen.expand(sizes), visible):
        return False
    eps = [torch.finfo(values[t.node].dtype).eps for t in terms if values[t.node].is_floating_point()]
    tolerance = 8 * max(eps, default=0.0) * torch.where(visible, added.abs(), 0.0).max()

    def equal_in_rows(a: Tensor, b: Tensor) -> bool:
        # Softmax does not see a constant of a row: compare with the first visible key of each.
        rest = torch.where(visible, a - b, 0.0)
        first = rest.gather(3, visible.to(torch.uint8).argmax(3, keepdim=True))
        return bool((torch.where(visible, rest - first, 0.0).abs() <= tolerance).all())

    if analysis.slope is not None:
        slope = evaluate(analysis.slope, grids, values, symbols).double()
        distance = grids["key"] - grids["query"]
        starts = (0, sizes[3] - sizes[2])
        shapes = [-(distance - start).abs() for start in starts]
        if analysis.counted and analysis.key_padding is not None:
            shapes = [
                evaluate(analysis.key_padding, grids, values, symbols).expand(sizes[0], 1, 1, -1).cumsum(3)
            ]
        if analysis.bias == "bucketed":
            shapes = [distance]
        if not any(equal_in_rows(bias, slope * shape) for shape in shapes):
            return False
    return equal_in_rows(added, bias)
