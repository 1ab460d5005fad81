from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drawn import LOW, B, Case, Drawn, Graph, H, N, additive, padding, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.emission import evaluate
from fastattn_compile.passes.expression import (
    axes_of,
    axis,
    constant,
    floordiv,
    mul,
    substitute,
)
from fastattn_compile.passes.mask_lift import Lifter
from fastattn_compile.passes.mask_structure import AXES, MaskTerm, recognise, verify

# Biases.


def test_alibi() -> None:
    def slopes(g: Graph) -> Drawn:
        return g.call("pow", g.constant(torch.tensor(0.25)), g.arange(4, start=1)).reshape(1, 4, 1, 1)

    spellings: list[Callable[[Graph], Drawn]] = [
        lambda g: slopes(g) * g.arange(N),
        lambda g: slopes(g) * (g.arange(N) - (N - 1)).to(torch.float32),
        lambda g: slopes(g) * (g.arange(N) - rows(g)),
        lambda g: (rows(g) - g.arange(N)).abs() * slopes(g) * -1.0,
        lambda g: g.input(torch.rand(4)).reshape(4, 1, 1) * (g.arange(N) - rows(g)) / 8.0,
        lambda g: slopes(g) * ((g.full((B, N), 1, torch.int64).cumsum(1) - 1).reshape(B, 1, 1, N)),
    ]
    for draw in spellings:
        case = Case(Graph(), sizes=(B, 4, N, N))
        causal = case.term(additive(case.graph, case.graph.arange(N) <= rows(case.graph)), "add")
        analysis = case.analyse(causal, case.term(draw(case.graph), "add"))
        assert (str(analysis.structure), analysis.bias) == ("causal", "alibi")
        assert axes_of(analysis.slope) == {"head"}


def counted_bias(g: Graph, mask: Drawn, counted: Drawn, dim: int = 1) -> Drawn:
    slopes = g.input(torch.rand(H)).reshape(1, H, 1, 1)
    return slopes * ((counted.cumsum(dim) - 1) * mask).reshape(B, 1, 1, N)


def hides(g: Graph, mask: Drawn) -> Drawn:
    return (mask.eq(0)).reshape(B, 1, 1, N)


def test_alibi_counted_over_real_tokens() -> None:
    case = Case(Graph())
    g, mask = case.graph, padding(case.graph)
    causal = case.term(additive(g, g.arange(N) <= rows(g)), "add")
    bias = case.term(counted_bias(g, mask, mask), "add")
    analysis = case.analyse(causal, case.term(hides(g, mask), "fill"), bias)
    assert (str(analysis.structure), analysis.bias) == ("causal & key_padding", "alibi")
    assert analysis.counted and axes_of(analysis.slope) == {"head"}


def test_other_counts_are_dense() -> None:
    """Without the causal mask, of another tensor, along another dimension, of a mask that hides nothing."""
    for kind in ("both ways", "another", "across", "shown"):
        case = Case(Graph())
        g, mask = case.graph, padding(case.graph)
        causal = case.term(additive(g, g.arange(N) <= rows(g)), "add")
        counted = padding(g) if kind == "another" else mask
        bias = case.term(counted_bias(g, mask, counted, 0 if kind == "across" else 1), "add")
        hidden = case.term(hides(g, padding(g) if kind == "shown" else mask), "fill")
        analysis = case.analyse(*([] if kind == "both ways" else [causal]), hidden, bias)
        assert (analysis.bias, analysis.counted) == ("dense", False), kind


def test_a_slope_is_what_a_step_away_costs() -> None:
    """Also where later keys are visible; there a bias that favours them is a number by distance."""
    slope = torch.tensor([0.5, 0.25, 2.0])
    for draw, causal, kind in (
        (lambda g, s: s * (g.arange(N) - rows(g)), True, "alibi"),
        (lambda g, s: s * g.arange(N), True, "alibi"),
        (lambda g, s: s * (g.arange(N) - rows(g)).abs() * -1.0, True, "alibi"),
        (lambda g, s: s * (g.arange(N) - rows(g)).abs() * -1.0, False, "alibi"),
        (lambda g, s: s * (g.arange(N) - rows(g)), False, "bucketed"),
    ):
        case = Case(Graph())
        g = case.graph
        slopes = g.input(slope)
        terms = [case.term(draw(g, slopes.reshape(H, 1, 1)), "add")]
        if causal:
            terms.append(case.term(additive(g, g.arange(N) <= rows(g)), "add"))
        analysis = case.analyse(*terms)
        grids = {"head": torch.arange(H)}
        found = evaluate(analysis.slope, grids, {slopes.node: slope})
        assert analysis.bias == kind and torch.equal(found.expand(H), slope)


def test_bucketed_bias_as_in_t5() -> None:
    case = Case(Graph())
    g = case.graph
    distance = g.arange(N) - rows(g)
    far = g.call("log", distance.abs().to(torch.float32) / 4.0) / math.log(4.0) * 4.0
    most = g.full((N, N), 7, torch.int64)
    bucket = g.where(distance.abs() < 4, distance.abs(), g.call("minimum", far.to(torch.int64) + 4, most))
    bucket = bucket + (distance > 0).to(torch.int64) * 8
    table = g.add("parameter", (), {}, torch.randn(16, H))
    bias = g.embedding(bucket, table).permute(2, 0, 1).reshape(1, H, N, N)
    pad = (1.0 - padding(g).reshape(B, 1, 1, N).to(torch.float32)) * LOW
    for terms in ([case.term(bias, "add"), case.term(pad, "add")], [case.term(bias + pad, "add")]):
        analysis = case.analyse(*terms)
        assert (str(analysis.structure), analysis.bias, analysis.slope) == ("key_padding", "bucketed", None)
        assert axes_of(analysis.bias_expression) == {"head", "query", "key"}


def test_other_biases_are_dense() -> None:
    g = Graph()
    case = Case(g)
    for bias in (
        g.input(torch.randn(B, H, N, N)),
        g.input(torch.randn(H, N, N)),
        g.where(g.input(torch.randn(N, N)) > 0, 0.0, -100.0),
        g.input(torch.randn(B, 1, 1, N)),
        g.input(torch.rand(B, H, 1, 1)) * g.arange(N),
        g.input(torch.full((N, N), -math.inf).triu(1)),
    ):
        analysis = case.analyse(case.term(bias, "add"))
        assert (str(analysis.structure), analysis.bias) == ("none", "dense")
        assert analysis.reason


def test_constants_of_a_row_are_no_bias() -> None:
    case = Case(Graph())
    analysis = case.analyse(
        case.term(case.graph.full((N, N), 3.0), "add"), case.term(rows(case.graph), "add")
    )
    assert (analysis.bias, str(analysis.structure)) == ("none", "none")


@pytest.mark.parametrize(("low", "mask"), [(-1e4, True), (-65504.0, True), (-9999.0, False), (-100.0, False)])
def test_what_counts_as_hidden(low: float, mask: bool) -> None:
    case = Case(Graph())
    analysis = case.analyse(
        case.term(additive(case.graph, case.graph.arange(N) <= rows(case.graph), low), "add")
    )
    assert str(analysis.structure) == ("causal" if mask else "none")
    assert analysis.bias == ("none" if mask else "bucketed")


# What must stay opaque.

OPAQUE: dict[str, tuple[Callable[[Graph], Drawn], str]] = {
    "dense data": (lambda g: g.input(torch.rand(B, 1, N, N) > 0.5), "input_0"),
    "data of each head": (lambda g: g.input(torch.rand(B, H, N, N) > 0.5), "heads"),
    "each head another window": (
        lambda g: (rows(g) - g.arange(N)) <= g.arange(H).reshape(H, 1, 1), "heads"
    ),
    "padded rows": (
        lambda g: (lambda m: m.reshape(B, 1, N, 1) & m.reshape(B, 1, 1, N))(padding(g, torch.bool)), "rows"
    ),
    "dilated": (lambda g: ((rows(g) - g.arange(N)) % 2).eq(0), "pattern"),
    "noise constant": (lambda g: g.constant(torch.rand(N, N) > 0.5), "constant_0"),
    "causal to the length in a tensor": (
        lambda g: g.arange(N) <= rows(g) + g.input(torch.tensor(2)), "input"
    ),
    "two partitions": (
        lambda g: (rows(g) // 3).eq(g.arange(N) // 3) & (rows(g) // 2).eq(g.arange(N) // 2), "partitions"
    ),
    "shifted chunks": (lambda g: ((rows(g) + 1) // 3).eq((g.arange(N) + 1) // 3), "pattern"),
    "block causal": (lambda g: g.arange(N) // 4 <= rows(g) // 4, "pattern"),
    "documents of floats": (
        lambda g: (lambda d: d.reshape(B, 1, N, 1).eq(d.reshape(B, 1, 1, N)))(g.input(torch.rand(B, N))),
        "data",
    ),
    "images see themselves": (
        lambda g: (lambda t: (g.arange(N) <= rows(g)) | (t.reshape(B, 1, N, 1) & t.reshape(B, 1, 1, N)))(
            padding(g, torch.bool)
        ),
        "data",
    ),
    "prefix of a window only": (
        lambda g: ((g.arange(N) <= rows(g)) | (g.arange(N) < 4)) & (g.arange(N) > rows(g) - 3), "prefix"
    ),
    "nothing visible": (lambda g: g.full((N, N), False, torch.bool), "no key"),
    "empty band": (lambda g: (g.arange(N) > rows(g) + 1) & (g.arange(N) < rows(g) - 1), "no key"),
    "position half rounded": (
        lambda g: g.arange(300).to(torch.bfloat16)[:N] <= rows(g).to(torch.float32), "cast"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_understood_is_opaque(name: str) -> None:
    draw, word = OPAQUE[name]
    case = Case(Graph())
    analysis = case.analyse(case.term(draw(case.graph), "keep"))
    assert not analysis.structure.understood
    assert (word in analysis.reason and "model.py:" in analysis.reason) or word == "no key"
    assert analysis.key_padding is None and analysis.segments is None
    assert MaskStructure.parse(str(analysis.structure)) == analysis.structure


def test_changed_in_place_is_opaque() -> None:
    for tainted, role in ((0, "keep"), (0, "fill"), (0, "add")):
        case = Case(Graph())
        g = case.graph
        base = g.full((N, N), 1.0)
        mask = base.tril() if role == "keep" else base.triu(1) * -1e9 if role == "add" else base.triu(1)
        g.nodes[tainted].tainted = True
        analysis = case.analyse(case.term(mask, role))
        assert "full_0" in analysis.reason and "changed in place" in analysis.reason


def test_scores_replaced_by_something_visible() -> None:
    case = Case(Graph())
    analysis = case.analyse(case.term(case.graph.arange(N) > rows(case.graph), "fill", fill=-5.0))
    assert "-5" in analysis.structure.opaque


def test_masks_that_depend_on_the_scores() -> None:
    g = Graph()
    scores = g.opaque(torch.rand(B, 1, 1, N))
    strong = scores > 0.5
    outside = g.input(torch.rand(B, 1, 1, N) > 0.5)
    case = Case(g)
    for mask, understood in ((strong, False), (outside, True)):
        lifter = Lifter(g.view())
        analysis = recognise(
            [case.term(mask, "keep")], lifter, dict(zip(AXES, case.sizes)), scores=scores.node
        )
        assert analysis.structure.understood is understood
    assert (
        "depends on the scores"
        in recognise(
            [case.term(strong, "keep")], Lifter(g.view()), dict(zip(AXES, case.sizes)), scores=scores.node
        ).reason
    )


def test_malformed_terms_are_refused() -> None:
    case = Case(Graph())
    mask = case.graph.arange(N) <= rows(case.graph)
    with pytest.raises(ValueError, match="role"):
        case.analyse(replace(case.term(mask, "keep"), role="hide"))
    with pytest.raises(ValueError, match="one index for each dimension"):
        case.analyse(replace(case.term(mask, "keep"), axes=(axis("key", N),)))


def test_verification_can_fail() -> None:
    case = Case(Graph())
    g = case.graph
    causal = case.term(g.arange(N) <= rows(g), "keep")
    bias = case.term(g.input(torch.rand(H, 1, 1)) * g.arange(N), "add")
    right = case.analyse(causal, bias)
    assert verify(right, [causal, bias], g.values)
    assert not verify(replace(right, structure=MaskStructure(right=1)), [causal, bias], g.values)
    assert not verify(replace(right, structure=MaskStructure(left=6, right=0)), [causal, bias], g.values)
    doubled = mul(right.bias_expression, constant(2))
    assert not verify(replace(right, bias_expression=doubled), [causal, bias], g.values)
    pad = case.term(padding(g).reshape(B, 1, 1, N).to(torch.bool), "keep")
    padded = case.analyse(pad)
    ahead = substitute(padded.key_padding, {"key": floordiv(axis("key", N), constant(2))})
    assert not verify(replace(padded, key_padding=ahead), [pad], g.values)


def test_equal_questions_are_answered_once() -> None:
    g = Graph()
    case = Case(g)
    term = case.term((g.arange(N) <= rows(g)) & padding(g).reshape(B, 1, 1, N).to(torch.bool), "keep")
    lifter, sizes = Lifter(g.view()), dict(zip(AXES, case.sizes))
    answers = [recognise([replace(term)], lifter, sizes) for _ in range(30)]
    assert all(answer is answers[0] for answer in answers)


# Random conjunctions, spelled at random.


def _spell(
    data: st.DataObject, g: Graph, q: Drawn, k: Drawn, size: tuple[int, int], c: int, lower: bool
) -> Drawn:
    """``k <= q + c`` when ``lower`` is false, else ``k >= q + c``, in one of many ways."""
    way = data.draw(st.integers(0, 4))
    if way == 0:
        return k >= q + c if lower else k <= q + c
    if way == 1:
        return ~(k < q + c) if lower else ~(k > q + c)
    if way == 2:
        ones = g.full(size, True, torch.bool)
        return ones.triu(c) if lower else ones.tril(c)
    if way == 3:
        return (q - k) * 2 <= -2 * c if lower else (k - q).to(torch.float32) < c + 0.5
    return g.where(k < q + c if lower else k > q + c, 0, 1).to(torch.bool)


def _represent(data: st.DataObject, g: Graph, conditions: list[Drawn], case: Case) -> list[MaskTerm]:
    """Conditions as terms: joined or apart, boolean or added or filled."""
    terms = []
    while conditions:
        take = data.draw(st.integers(1, len(conditions)))
        joined = conditions[0]
        for condition in conditions[1:take]:
            joined = joined & condition
        conditions = conditions[take:]
        way = data.draw(st.integers(0, 4))
        low = data.draw(st.sampled_from([-1e4, -1e9, LOW, -math.inf]))
        if way == 0:
            terms.append(case.term(joined, "keep", low))
        elif way == 1:
            terms.append(case.term(~joined, "fill", low))
        elif way == 2:
            terms.append(case.term(additive(g, joined, low), "add"))
        elif way == 3:
            terms.append(case.term((1.0 - joined.to(torch.float32)) * max(low, LOW), "add"))
        else:
            shape = tuple(joined.value.shape)
            terms.append(case.term(g.full(shape, 0.0).masked_fill(~joined, low), "add"))
    return terms


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_conjunctions(data: st.DataObject) -> None:
    g = Graph()
    queries, keys = data.draw(st.sampled_from([(7, 7), (8, 8), (4, 9), (9, 9)]))
    case = Case(g, sizes=(B, H, queries, keys))
    q, k = rows(g, queries), g.arange(keys)
    right = data.draw(st.none() | st.integers(0, 2))
    left = data.draw(st.none() | st.integers(0, 3))
    prefix = data.draw(st.none() | st.integers(1, 3))
    chunk = data.draw(st.none() | st.integers(2, 4))
    bands = []
    if right is not None:
        bands.append(_spell(data, g, q, k, (queries, keys), right, lower=False))
    if left is not None:
        bands.append(_spell(data, g, q, k, (queries, keys), -left, lower=True))
    if prefix is not None:
        bands = [band | (k < prefix) for band in bands]
    if chunk is not None:
        bands.append((q // chunk).eq(k // chunk))
    if data.draw(st.booleans()):
        mask = g.input(torch.rand(B, keys) > 0.3)
        bands.append(mask.reshape(B, 1, 1, keys))
    conditions = data.draw(st.permutations(bands))
    terms = _represent(data, g, conditions, case)
    analysis = recognise(terms, Lifter(g.view()), dict(zip(AXES, case.sizes)))
    assert analysis.structure.understood, analysis.reason
    assert analysis.bias == "none"
    assert verify(analysis, terms, g.values)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from(["input", "opaque", "constant"]))
def test_random_masks_claim_nothing_false(seed: int, per_batch: bool, kind: str) -> None:
    torch.manual_seed(seed)
    g = Graph()
    value = torch.rand(B if per_batch else 1, 1, N, N) > 0.5
    mask = g.add(kind, (), {"value": value} if kind == "constant" else {}, value)
    case = Case(g)
    analysis = case.analyse(case.term(mask & (g.arange(N) <= rows(g)), "keep"))
    assert not analysis.structure.understood
