from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from drawn import Drawn, Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.expression import (
    Expression,
    Load,
    add,
    axes_of,
    axis,
    constant,
    floordiv,
    mul,
    substitute,
)
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.mask_lift import Lifter
from fastattn_compile.passes.mask_structure import AXES, MaskAnalysis, MaskTerm, emit, recognise, verify

B, H, N = 2, 3, 8
LOW = torch.finfo(torch.float32).min
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 7, 7]])


def places(sizes: tuple[int, ...]) -> dict[str, Expression]:
    return {name: axis(name, size) for name, size in zip(AXES, sizes)}


@dataclass
class Case:
    """An attention of a drawn graph."""

    graph: Graph
    sizes: tuple[int, int, int, int] = (B, H, N, N)
    causal: bool = False
    trust_added: bool = False

    def term(self, x: Drawn, role: str, fill: float = -math.inf, factor: float = 1.0) -> MaskTerm:
        """A term aligned at the last dimensions of the scores."""
        at = list(places(self.sizes).values())[4 - x.value.dim() :]
        return MaskTerm(x.node, role, fill, tuple(at), factor)

    def analyse(self, *terms: MaskTerm, verified: bool = True) -> MaskAnalysis:
        lifter = Lifter(self.graph.view())
        sizes = dict(zip(AXES, self.sizes))
        analysis = recognise(terms, lifter, sizes, self.causal, trust_added=self.trust_added)
        if verified and analysis.structure.understood:
            assert verify(analysis, terms, self.graph.values, self.causal)
        return analysis


def rows(g: Graph, n: int = N) -> Drawn:
    return g.arange(n).reshape(n, 1)


def padding(g: Graph, dtype: torch.dtype = torch.int64) -> Drawn:
    return g.input(PADDING.to(dtype))


def additive(g: Graph, keep: Drawn, low: float = LOW) -> Drawn:
    return g.where(keep, 0.0, low)


# Spellings: what is drawn, its role, and the structure it has.

Spelling = tuple[Callable[[Graph], Drawn], str, str]
SPELLINGS: dict[str, Spelling] = {
    "no mask": (lambda g: g.full((N, N), True, torch.bool), "keep", "none"),
    "zeros added": (lambda g: g.full((B, 1, N, N), 0.0), "add", "none"),
    "arange compare": (lambda g: g.arange(N) <= rows(g), "keep", "causal"),
    "arange compare, turned": (lambda g: rows(g) >= g.arange(N), "keep", "causal"),
    "future filled": (lambda g: g.arange(N) > rows(g), "fill", "causal"),
    "tril of ones": (lambda g: g.full((N, N), 1.0).tril().eq(0), "fill", "causal"),
    "bool tril": (lambda g: g.full((N, N), True, torch.bool).tril(), "keep", "causal"),
    "triu of infinities": (lambda g: g.full((N, N), -math.inf).triu(1), "add", "causal"),
    "triu times low": (lambda g: g.full((N, N), 1.0).triu(1) * -1e9, "add", "causal"),
    "inverted tril times low": (lambda g: (1.0 - g.full((N, N), 1.0).tril()) * LOW, "add", "causal"),
    "tril less one times high": (lambda g: (g.full((N, N), 1.0).tril() - 1.0) * 1e9, "add", "causal"),
    "where": (lambda g: additive(g, g.arange(N) <= rows(g)), "add", "causal"),
    "masked_fill of zeros": (
        lambda g: g.full((N, N), 0.0).masked_fill(g.arange(N) > rows(g), -math.inf), "add", "causal"
    ),
    "log of tril": (lambda g: g.call("log", g.full((N, N), True, torch.bool).tril().to(torch.float32)),
                    "add", "causal"),
    "expanded": (
        lambda g: (g.arange(N) <= rows(g)).reshape(1, 1, N, N).expand(B, 1, N, N), "keep", "causal"
    ),
    "buffer": (lambda g: g.constant(torch.ones(1, 1, 16, 16).tril().bool())[:, :, :N, :N], "keep", "causal"),
    "buffer of floats": (lambda g: g.constant(torch.full((N, N), -math.inf).triu(1)), "add", "causal"),
    "local buffer": (
        lambda g: g.constant(torch.ones(1, 1, 16, 16).tril().triu(-3).bool())[:, :, :N, :N],
        "keep", "causal & window(4)",
    ),
    "clamped at the least number": (
        lambda g: (additive(g, g.arange(N) <= rows(g)) + additive(g, g.arange(N) > rows(g) - 3)).clamp(LOW),
        "add", "causal & window(3)",
    ),
    "window": (
        lambda g: (g.arange(N) <= rows(g)) & (g.arange(N) > rows(g) - 3), "keep", "causal & window(3)"
    ),
    "window, inclusive": (
        lambda g: (g.arange(N) <= rows(g)) & (g.arange(N) >= rows(g) - 2), "keep", "causal & window(3)"
    ),
    "window by triangles": (
        lambda g: g.full((N, N), 1, torch.int64).tril() * g.full((N, N), 1, torch.int64).triu(-2),
        "keep", "causal & window(3)",
    ),
    "window as sum of masks": (
        lambda g: additive(g, g.arange(N) <= rows(g), -1e9) + additive(g, g.arange(N) > rows(g) - 3, -1e9),
        "add", "causal & window(3)",
    ),
    "band": (lambda g: (rows(g) - g.arange(N)).abs() <= 2, "keep", "right(2) & left(2)"),
    "band in floats": (
        lambda g: (rows(g).to(torch.float32) - g.arange(N).to(torch.float32)).abs() < 2.5,
        "keep", "right(2) & left(2)",
    ),
    "chunks": (lambda g: (rows(g) // 3).eq(g.arange(N) // 3), "keep", "chunk(3)"),
    "causal chunks": (
        lambda g: (rows(g) // 4).eq(g.arange(N) // 4) & (g.arange(N) <= rows(g)), "keep", "causal & chunk(4)"
    ),
    "prefix": (lambda g: (g.arange(N) <= rows(g)) | (g.arange(N) < 3), "keep", "causal & prefix(3)"),
    "prefix seen by itself": (
        lambda g: (g.arange(N) <= rows(g)) | ((g.arange(N) < 3) & (rows(g) < 3)), "keep", "causal & prefix(3)"
    ),
    "prefix and window": (
        lambda g: ((g.arange(N) <= rows(g)) & (g.arange(N) > rows(g) - 3)) | (g.arange(N) < 2),
        "keep", "causal & window(3) & prefix(2)",
    ),
    "prefix in additive form": (
        lambda g: g.full((N, N), -1e9).triu(1).masked_fill(g.arange(N) < 3, 0.0), "add", "causal & prefix(3)"
    ),
    "strictly earlier": (lambda g: g.arange(N) < rows(g), "keep", "right(-1)"),
    "itself only": (lambda g: g.arange(N).eq(rows(g)), "keep", "causal & window(1)"),
    "padding": (lambda g: padding(g).reshape(B, 1, 1, N).to(torch.bool), "keep", "key_padding"),
    "padding, inverted int": (
        lambda g: (1 - padding(g).reshape(B, 1, 1, N)).to(torch.float32) * LOW, "add", "key_padding"
    ),
    "padding, inverted float": (
        lambda g: (1.0 - padding(g).reshape(B, 1, 1, N).to(torch.float32)) * -10000.0, "add", "key_padding"
    ),
    "padding, inverted half": (
        lambda g: (1.0 - padding(g).reshape(B, 1, 1, N).to(torch.float16)) * -65504.0, "add", "key_padding"
    ),
    "padding, filled by its inverse": (
        lambda g: (lambda m: m.masked_fill(m.to(torch.bool), LOW))(
            1.0 - padding(g).reshape(B, 1, 1, N).to(torch.float32)
        ),
        "add", "key_padding",
    ),
    "padding, equal to zero": (lambda g: padding(g).reshape(B, 1, 1, N).eq(0), "fill", "key_padding"),
    "padding, log": (lambda g: g.call("log", padding(g).reshape(B, 1, 1, N)), "add", "key_padding"),
    "padding by index": (
        lambda g: padding(g, torch.bool)[
            g.arange(B).reshape(B, 1, 1, 1), g.arange(N).reshape(1, 1, 1, N)
        ].expand(B, 1, N, N),
        "keep", "key_padding",
    ),
    "length": (lambda g: g.arange(N) < g.input(torch.tensor([[5], [8]])).reshape(B, 1, 1, 1),
               "keep", "key_padding"),
    "documents": (
        lambda g: (lambda d: d.reshape(B, 1, N, 1).eq(d.reshape(B, 1, 1, N)))(g.input(DOCUMENTS)),
        "keep", "segments",
    ),
    "documents, padded by zero": (
        lambda g: (lambda d: d.reshape(B, 1, N, 1).eq(d.reshape(B, 1, 1, N)) & d.reshape(B, 1, N, 1).ne(0))(
            g.input(DOCUMENTS)
        ),
        "keep", "key_padding & segments",
    ),
    "causal documents with padding": (
        lambda g: additive(g, (lambda d: d.reshape(B, 1, N, 1).eq(d.reshape(B, 1, 1, N)))(g.input(DOCUMENTS))
                           & (g.arange(N) <= rows(g)) & padding(g).reshape(B, 1, 1, N).to(torch.bool)),
        "add", "causal & key_padding & segments",
    ),
    "chunks after padding": (
        lambda g: (lambda s: ((rows(g) - s) // 4).eq((g.arange(N) - s) // 4))(
            g.input(torch.tensor([0, 2])).reshape(B, 1, 1, 1)
        ),
        "keep", "segments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    draw, role, expected = SPELLINGS[name]
    case = Case(Graph())
    analysis = case.analyse(case.term(draw(case.graph), role))
    assert str(analysis.structure) == expected
    assert (analysis.bias, analysis.reason) == ("none", "")


def test_there_are_many_spellings() -> None:
    assert len(SPELLINGS) >= 25


def test_terms_combine() -> None:
    case = Case(Graph())
    g = case.graph
    causal = case.term(additive(g, g.arange(N) <= rows(g)), "add")
    window = case.term(g.arange(N) <= rows(g) - 4, "fill", LOW)
    pad = case.term((1.0 - padding(g).reshape(B, 1, 1, N).to(torch.float32)) * LOW, "add")
    assert str(case.analyse(causal, window, pad).structure) == "causal & window(4) & key_padding"


def test_a_fused_call_brings_its_causal_flag() -> None:
    case = Case(Graph(), causal=True)
    assert str(case.analyse().structure) == "causal"


def test_a_subtracted_mask() -> None:
    case = Case(Graph())
    mask = padding(case.graph, torch.float32).reshape(B, 1, 1, N)
    hidden = 1.0 - mask
    assert str(case.analyse(case.term(hidden, "add", factor=-1e30)).structure) == "key_padding"


def test_folded_batch_and_heads() -> None:
    g = Graph()
    mask = padding(g).reshape(B, 1, 1, N).to(torch.bool).expand(B, H, 1, N).reshape(B * H, 1, N)
    at = places((B, H, N, N))
    folded = add(mul(at["batch"], constant(H)), at["head"])
    term = MaskTerm(mask.node, "keep", -math.inf, (folded, at["query"], at["key"]))
    analysis = Case(g).analyse(term)
    assert str(analysis.structure) == "key_padding"
    assert axes_of(analysis.key_padding) == {"batch", "key"}
    # Without the extents the fold cannot be proven, and nothing is claimed.
    loose = {name: axis(name) for name in AXES}
    unfolded = add(mul(loose["batch"], constant(H)), loose["head"])
    term = MaskTerm(mask.node, "keep", -math.inf, (unfolded, loose["query"], loose["key"]))
    assert not recognise([term], Lifter(g.view()), {}).structure.understood


def test_unknown_extents_are_unbounded() -> None:
    g = Graph()
    term = Case(g).term(g.arange(N) <= rows(g), "keep")
    loose = replace(term, axes=(axis("query"), axis("key")))
    assert str(recognise([loose], Lifter(g.view()), {}).structure) == "causal"


# Data in every type.


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16]
)
def test_key_padding_is_true_for_real_tokens(dtype: torch.dtype) -> None:
    kept, inverted = Case(Graph()), Case(Graph())
    seen = kept.analyse(kept.term(padding(kept.graph, dtype).reshape(B, 1, 1, N), "keep"))
    mask = padding(inverted.graph, dtype).reshape(B, 1, 1, N).to(torch.float32)
    added = inverted.analyse(inverted.term((1.0 - mask) * LOW, "add"))
    for case, analysis in ((kept, seen), (inverted, added)):
        assert str(analysis.structure) == "key_padding"
        values = case.graph.values
        made = emit(
            analysis.key_padding, ("batch", "key"), (B, N), torch.device("cpu"),
            lambda f, args, kwargs: f(*args, **kwargs), values.__getitem__,
        )  # fmt: skip
        assert made.dtype == torch.bool and torch.equal(made, PADDING.bool())


def test_added_data_is_a_bias_unless_it_is_trusted() -> None:
    for trusted in (False, True):
        case = Case(Graph(), trust_added=trusted)
        mask = case.graph.input(torch.where(PADDING.bool(), 0.0, -math.inf).reshape(B, 1, 1, N))
        analysis = case.analyse(case.term(mask, "add"), verified=trusted)
        assert str(analysis.structure) == ("key_padding" if trusted else "none")
        assert analysis.bias == ("none" if trusted else "dense")
        assert ("input_0" in analysis.reason) is not trusted


def test_segments_are_the_ids_at_the_key() -> None:
    case = Case(Graph())
    ids = case.graph.input(DOCUMENTS)
    same = ids.reshape(B, 1, N, 1).eq(ids.reshape(B, 1, 1, N))
    analysis = case.analyse(case.term(same, "keep"))
    at = places((B, H, N, N))
    assert analysis.segments == Load(ids.node, (at["batch"], at["key"]))


def _packed(g: Graph, position: Drawn) -> tuple[Drawn, Drawn, Drawn]:
    """As transformers 5 tells packed sequences apart: positions at query and key, and the condition."""
    before = position[:, :1] - 1
    document = position.diff(1, before).ne(1).cumsum(1)
    batch, row = g.arange(B).reshape(B, 1, 1, 1), g.arange(N).reshape(1, 1, N, 1)
    column = g.arange(N).reshape(1, 1, 1, N)
    same = document[batch, row].eq(document[batch, column])
    return position[batch, row], position[batch, column], same


def test_packed_mask_of_one_sequence_is_plain_causal() -> None:
    case = Case(Graph())
    at_query, at_key, same = _packed(case.graph, case.graph.arange(N).reshape(1, N).expand(B, N))
    assert str(case.analyse(case.term(same & (at_key <= at_query), "keep")).structure) == "causal"


@pytest.mark.parametrize("window", [None, 2])
def test_positions_that_restart_are_causal_documents(window: int | None) -> None:
    case = Case(Graph())
    position = case.graph.input(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [3, 4, 5, 9, 10, 0, 1, 2]]))
    at_query, at_key, same = _packed(case.graph, position)
    seen = same & (at_key <= at_query)
    if window is not None:
        seen = seen & (at_key > at_query - window)
    analysis = case.analyse(case.term(seen, "keep"))
    assert str(analysis.structure) == (
        "causal & segments" if window is None else "causal & window(2) & segments"
    )


def test_positions_alone_prove_nothing() -> None:
    case = Case(Graph())
    position = case.graph.input(torch.arange(N).expand(B, N).clone())
    at_query, at_key, _ = _packed(case.graph, position)
    assert not case.analyse(case.term(at_key <= at_query, "keep")).structure.understood


def test_positions_of_another_tensor_prove_nothing() -> None:
    case = Case(Graph())
    one = case.graph.input(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]] * B))
    other = case.graph.input(torch.tensor([[7, 6, 5, 4, 3, 2, 1, 0]] * B))
    _, _, same = _packed(case.graph, one)
    at_query, at_key, _ = _packed(case.graph, other)
    assert not case.analyse(case.term(same & (at_key <= at_query), "keep")).structure.understood


# Queries and keys of different numbers.


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda g: g.arange(12) <= rows(g, 5) + 7, "causal & end_aligned"),
        (lambda g: g.arange(12) <= rows(g, 5), "causal"),
        (lambda g: g.full((5, 12), True, torch.bool).tril(7), "causal & end_aligned"),
        (lambda g: (g.arange(12) - rows(g, 5) - 7).abs() <= 2, "right(2) & left(2) & end_aligned"),
        (
            lambda g: (g.arange(12) <= rows(g, 5) + 7) & (g.arange(12) > rows(g, 5) + 4),
            "causal & window(3) & end_aligned",
        ),
        (lambda g: ((rows(g, 5) + 7) // 4).eq(g.arange(12) // 4), "end_aligned & chunk(4)"),
        (lambda g: (rows(g, 5) // 4).eq(g.arange(12) // 4), "chunk(4)"),
        (lambda g: g.constant(torch.ones(20, 20).tril().bool())[7:12, :12], "causal & end_aligned"),
    ],
)  # fmt: skip
def test_queries_at_the_end_of_keys(draw: Callable[[Graph], Drawn], expected: str) -> None:
    case = Case(Graph(), sizes=(B, H, 5, 12))
    assert str(case.analyse(case.term(draw(case.graph), "keep")).structure) == expected


def test_documents_of_queries_at_the_end() -> None:
    case = Case(Graph(), sizes=(1, 1, 3, N))
    ids = case.graph.input(DOCUMENTS[:1])
    same = ids[:, 5:].reshape(1, 1, 3, 1).eq(ids.reshape(1, 1, 1, N))
    analysis = case.analyse(case.term(same, "keep"))
    assert str(analysis.structure) == "end_aligned & segments"


SYMBOL = sympy.Symbol("s0", positive=True, integer=True)
OTHER = sympy.Symbol("s1", positive=True, integer=True)


def _symbolic(query: object, key: object, shift: object) -> MaskAnalysis:
    """``key <= query + shift`` with symbolic sizes."""
    q = Node("q", "arange", (), {"start": shift, "step": 1}, (query,), torch.int64)
    k = Node("k", "arange", (), {"start": 0, "step": 1}, (key,), torch.int64)
    column = Node("column", "reshape", (q,), {}, (query, 1), torch.int64)
    seen = Node("seen", "le", (k, column), {}, (query, key), torch.bool)
    term = MaskTerm(seen, "keep", -math.inf, (axis("query", query), axis("key", key)))
    sizes = {"batch": 1, "head": 1, "query": query, "key": key}
    return recognise([term], Lifter(GraphView([q, k, column, seen])), sizes)


def test_symbolic_sizes() -> None:
    assert str(_symbolic(SYMBOL, SYMBOL, 0).structure) == "causal"
    assert str(_symbolic(SYMBOL, OTHER, OTHER - SYMBOL).structure) == "causal & end_aligned"
    assert str(_symbolic(SYMBOL, SYMBOL + 16, 16).structure) == "causal & end_aligned"
    assert str(_symbolic(SYMBOL, OTHER, 0).structure) == "causal"
    assert str(_symbolic(SYMBOL, SYMBOL, SYMBOL).structure) == "none"
    assert not _symbolic(SYMBOL, OTHER, 2 * SYMBOL).structure.understood


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
