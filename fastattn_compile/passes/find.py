"""The finder: every softmax of a graph, and of each what it is.

It anchors on softmaxes (an op, a fused call, exp / sum written out), reads the scores backward to the product of queries
and keys and the weights forward to the product with the values, and sorts the axes into roles. It never compares against
patterns: what happens between the anchors is understood, or the site is kept with the first thing that was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastattn_compile.operators.base import SiteSpec
from fastattn_compile.passes.anchors import Anchor, anchor_of, normalised_axes
from fastattn_compile.passes.axes import Atom, Axes, Axis, fresh, leaves, length
from fastattn_compile.passes.contraction import Operand, trace
from fastattn_compile.passes.features import counts_features
from fastattn_compile.passes.fx_meta import value_of
from fastattn_compile.passes.graph import GraphView, Node, Size, same_size
from fastattn_compile.passes.mask_lift import lifter_of
from fastattn_compile.passes.mask_structure import MaskAnalysis, recognise
from fastattn_compile.passes.mask_terms import axes_by_role, canonical_terms
from fastattn_compile.passes.scores import Scores, ScoreTerm, number, read_scores
from fastattn_compile.passes.sequences import same_sequence
from fastattn_compile.passes.site import EXACT, NOT_ATTENTION, TAKEN, Groups, Site, Softmax
from fastattn_compile.passes.temperature import read_factors
from fastattn_compile.passes.weights import live_nodes, read_weights


class _Kept(Exception):
    """An attention that must stay as it is; the text says why."""


class _NotAttention(Exception):
    """A softmax that is no attention; the text says why."""


def find(view: GraphView) -> list[Softmax]:
    """Lists every softmax of a graph in execution order.

    Args:
        view: The normalised graph.

    Returns:
        One ``Softmax`` each: with ``site`` set where a rewrite is possible (``status`` is ``taken``; an operator may
        still refuse it), else ``exact`` or ``not_attention`` with the reason.
    """
    live = live_nodes(view)
    found: list[Softmax] = []
    for node in view.nodes:
        if node not in live:
            continue
        anchor = anchor_of(node)
        if anchor is None and node.kind not in ("sdpa", "mha", "flex_attention", "log_softmax"):
            continue
        name = node.module or node.source or node.name
        try:
            if node.kind == "sdpa":
                site = _read_fused(view, node, name)
            elif anchor is not None:
                site = _read_anchor(view, live, anchor, name)
            elif node.kind == "log_softmax":
                if all(anchor_of(user) for user in view.users(node) if user in live):
                    continue  # its exponential is the softmax
                raise _NotAttention("a log-softmax: its result is no weighting of values")
            else:
                call = f"a {node.attributes.get('target', node.kind)} call that was not expanded"
                raise _Kept(node.attributes.get("reason", call))
        except _Kept as reason:
            found.append(Softmax(name, EXACT, str(reason), node.source, node=node))
        except _NotAttention as reason:
            found.append(Softmax(name, NOT_ATTENTION, str(reason), node.source, node=node))
        else:
            found.append(_line(site))
    return found


def channel_sizes(view: GraphView) -> list[Size]:
    """Sizes that operators need as numbers: heads and channels of every attention-like product.

    They are constants of a model; in a function of bare tensors Dynamo may have made them symbolic.
    """
    sizes: list[Size] = []
    for node in view.of_kind("sdpa"):
        for operand in node.inputs[:3]:
            if isinstance(operand, Node) and operand.shape is not None:
                sizes += [operand.shape[-1], *operand.shape[-3:-2]]
    for node in view.nodes:
        anchor = anchor_of(node)
        scores = read_scores(anchor.scores, anchor.dim) if anchor is not None else ""
        if not isinstance(scores, str) and scores.product is not None:
            shape = scores.product.node.shape or ()
            sizes += [length(scores.product.contracted), *(shape[-3:-2] if len(shape) > 3 else ())]
    return sizes


def _line(site: Site) -> Softmax:
    spec = site.spec
    return Softmax(
        site.name, TAKEN, "", site.node.source, spec.kind, str(spec.mask), _hint(spec.heads), _hint(spec.kv_heads),
        _hint(spec.head_dim), site, site.node,
    )  # fmt: skip


def _hint(size: Size) -> int:
    return size if isinstance(size, int) else 0


def _read_anchor(view: GraphView, live: set[Node], anchor: Anchor, name: str) -> Site:
    scores = read_scores(anchor.scores, anchor.dim)
    if isinstance(scores, str):
        raise _NotAttention(scores)
    product = scores.product
    if product is None:
        raise _NotAttention("the scores are not a product of two tensors")
    if len(scores.axes) <= anchor.dim:
        raise _Kept(scores.problem or "the axes of the scores are not known")
    keys = leaves(scores.axes[anchor.dim])
    in_a, in_b = product.a.atoms(), product.b.atoms()
    contracted = set(leaves(product.contracted))
    if not keys or set(keys) & contracted:
        raise _NotAttention("the softmax does not run over an axis of the product")
    of_a, of_b = all(k in in_a for k in keys), all(k in in_b for k in keys)
    if of_a == of_b:
        raise _NotAttention("the softmax axis does not belong to one side of the product alone")
    query, key = (product.b, product.a) if of_a else (product.a, product.b)
    own_query, own_key = query.atoms() - key.atoms(), key.atoms() - query.atoms() - set(keys)
    if counts_features(key, keys):
        raise _NotAttention("the softmax runs over the features of a projection, not over positions")
    if own_key - contracted:
        raise _NotAttention("the keys have an axis that the softmax does not run over")
    weights = read_weights(
        view, live, anchor.weights, scores.axes, keys, own_query, scores.sink is not None, anchor.divisor
    )
    if not weights.products:
        lost = f": they go into {weights.lost}" if weights.lost else ""
        raise _NotAttention(weights.problem or f"the weights are not summed over values{lost}")
    problem = scores.problem or weights.problem
    if problem:
        raise _Kept(problem)
    if len(weights.products) > 1:
        raise _Kept("the same weights are summed over several values")
    output, value = weights.products[0]
    out, out_axes = output.node, output.axes
    if anchor.division is not None:
        divided = normalised_axes(view, live, anchor, output, scores.axes)
        if divided is None:
            raise _Kept(
                "the weights are normalised after the product with the values, by something else than their sum"
            )
        out, out_axes = anchor.division, divided
    # Atoms may have been split by the products met on the way: resolve again.
    keys = leaves(keys)
    queries = _query_axis(scores.axes, anchor.dim, leaves(query.atoms()), leaves(key.atoms()), keys)
    batch_axes = [axis for d, axis in enumerate(scores.axes) if d != anchor.dim]
    groups = _groups(batch_axes, queries, keys, leaves(product.contracted), query, key, value)
    return _site(
        view, name, anchor.weights, query, key, value, groups, scores, weights.dropout, weights.used,
        out, out_axes,
    )  # fmt: skip


def _query_axis(axes: Axes, dim: int, query: list[Atom], key: list[Atom], keys: list[Atom]) -> list[Atom]:
    """Which of the axes that only queries have is the sequence. The others are heads that share keys."""
    shared = set(key)
    candidates = [atom for axis in axes for atom in leaves(axis) if atom in set(query) and atom not in shared]
    if len(candidates) <= 1:
        return candidates
    alike = [atom for atom in candidates if same_size(atom.size, length(keys))]
    if len(alike) == 1:
        return alike
    beside = leaves(axes[dim - 1]) if dim else []
    if len(beside) == 1 and beside[0] in candidates:
        return beside
    raise _Kept("several axes could be the positions of the queries")


def _groups(
    batch_axes: Axes, queries: list[Atom], keys: list[Atom], channels: list[Atom],
    query: Operand, key: Operand, value: Operand,
) -> Groups:  # fmt: skip
    """Sorts the remaining axes of the scores into sequences and heads."""
    sequence = set(queries)
    remaining = [[atom for atom in leaves(axis) if atom not in sequence] for axis in batch_axes]
    # The dimension that held the queries alone is not a batch dimension; what it held besides (folded heads) is.
    dims = [axis for axis, source in zip(remaining, batch_axes) if axis or not set(leaves(source)) & sequence]
    batch: Axis
    if len(dims) >= 2:
        batch, heads = [a for axis in dims[:-1] for a in axis], dims[-1]
    else:
        flat = dims[0] if dims else []
        batch, heads = flat[:1], flat[1:]
    in_keys = {a for axis in key.origin_axes for a in leaves(axis)}
    in_values = {a for axis in value.origin_axes for a in leaves(axis)}
    in_queries = {a for axis in query.origin_axes for a in leaves(axis)}
    shared = in_keys | in_values
    # Keys without a head axis that queries have: one key head serves several query heads.
    repeated = [a for a in heads if a not in shared and a in in_queries]
    kept = [a for a in heads if a in shared or a not in in_queries]
    all_known = in_queries | shared | sequence | set(keys)
    known = set(batch) | set(heads) | set(channels) | sequence | set(keys)
    value_channels = [a for axis in value.axes for a in leaves(axis) if a not in known]
    if not all_known:
        raise _Kept("the operands have no axes")
    return Groups(batch, [*kept, *repeated], repeated, queries, keys, channels, value_channels)


def _read_fused(view: GraphView, node: Node, name: str) -> Site:
    """A scaled_dot_product_attention call: the roles are given, only the layout is to be traced."""
    query, key, value = node.inputs[:3]
    if any(not isinstance(x, Node) or x.shape is None or len(x.shape) < 2 for x in (query, key, value)):
        raise _Kept("the operands of the fused call have no known shape")
    batch = fresh(node.shape[:-2] if node.shape else ())
    queries, keys = [Atom(query.shape[-2])], [Atom(key.shape[-2])]
    channels, value_channels = [Atom(query.shape[-1])], [Atom(value.shape[-1])]
    grouped = node.attributes.get("enable_gqa") and not same_size(query.shape[-3], key.shape[-3])
    if grouped:
        # Query head h reads key head h // repeats.
        batch[-1] = [Atom(key.shape[-3]), Atom(query.shape[-3] // key.shape[-3])]

    def outer(operand: Node, is_query: bool) -> Axes:
        shape = operand.shape[:-2]  # type: ignore[index]
        mine: Axes = []
        for size, axis in zip(shape, batch[len(batch) - len(shape) :]):
            if size == 1 and length(axis) != 1:
                mine.append([])
            elif grouped and not is_query and axis is batch[-1]:
                mine.append(axis[:1])
            else:
                mine.append(axis)
        return mine

    traced_query = trace(query, [*outer(query, True), queries, channels])
    traced_key = trace(key, [*outer(key, False), keys, channels])
    traced_value = trace(value, [*outer(value, False), keys, value_channels])
    groups = _groups(
        [*batch, queries],
        leaves(queries),
        leaves(keys),
        leaves(channels),
        traced_query,
        traced_key,
        traced_value,
    )
    axes: Axes = [*batch, queries, keys]
    scale = node.attributes.get("scale")
    scale = number(scale) if scale is not None else float(number(query.shape[-1]) or 0) ** -0.5
    if scale is None:
        raise _Kept("the scale of the fused call is not a number")
    scores = Scores(None, axes, scale)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if isinstance(mask, Node):
        role = "keep" if mask.dtype is not None and not mask.dtype.is_floating_point else "add"
        scores.terms.append(ScoreTerm(mask, role, float("-inf"), axes))
    return _site(
        view, name, node, traced_query, traced_key, traced_value, groups, scores,
        float(node.attributes.get("dropout", 0.0)), False, node, [*batch, queries, value_channels],
        causal=bool(node.attributes.get("is_causal")),
    )  # fmt: skip


def _site(
    view: GraphView, name: str, node: Node, query: Operand, key: Operand, value: Operand, groups: Groups,
    scores: Scores, dropout: float, weights_used: bool, out: Node, out_axes: Axes, causal: bool = False,
) -> Site:  # fmt: skip
    sizes = {role: length(group) for role, group in axes_by_role(groups).items()}
    product = scores.product.node if scores.product is not None else None
    mask = recognise(canonical_terms(scores.terms, groups), lifter_of(view), sizes, causal, product)
    tensors, powers = [term for term, _ in scores.factors], [power for _, power in scores.factors]
    factors = read_factors(
        list(zip(canonical_terms(tensors, groups), powers)),
        lifter_of(view),
        sizes,
        bool(groups.repeated),
        product,
    )
    if isinstance(factors, str):
        raise _Kept(factors)
    for operand in (query, key, value):
        if operand.origin.tainted:
            raise _Kept(f"{operand.origin.name} is changed in place elsewhere")
    kind = "self" if same_sequence(query.origin, key.origin, groups, mask.structure) else "cross"
    q, v = query.node, value.node
    spec = SiteSpec(
        batch=length(groups.batch),
        heads=length(groups.heads),
        kv_heads=length([a for a in groups.heads if a not in groups.repeated]),
        query_len=length(groups.query),
        key_len=length(groups.key),
        head_dim=length(groups.channels),
        value_dim=length(groups.value_channels),
        dtype=v.dtype or q.dtype,  # type: ignore[arg-type]
        device=getattr(getattr(value_of(v), "device", None), "type", "cpu"),
        kind=kind,
        # Real tokens that stand apart will become a document of their own, if there are any.
        mask=replace(mask.structure, segments=True) if mask.counted else mask.structure,
        bias=_bias_kind(mask, sizes),
        softcap=scores.softcap,
        sink_logits=scores.sink is not None,
        dropout=dropout,
        weights_used=weights_used,
    )
    held = lifter_of(view).held_behind(term.node for term in (*scores.terms, *tensors))
    return Site(name, node, query, key, value, groups, scores.scale, mask, out, out_axes, spec, factors, held)


def _bias_kind(mask: MaskAnalysis, sizes: Mapping[str, Size]) -> str:
    """The kind of a bias; by distance only where queries and keys stand at the same positions."""
    if mask.bias != "none" and not same_size(sizes["query"], sizes["key"]):
        return "dense"
    return mask.bias
