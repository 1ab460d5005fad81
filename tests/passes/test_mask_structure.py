from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from drawn import DOCUMENTS, LOW, PADDING, B, Case, Drawn, Graph, H, N, additive, padding, places, rows

from fastattn_compile.passes.expression import (
    Load,
    add,
    axes_of,
    axis,
    constant,
    mul,
)
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.mask_lift import Lifter
from fastattn_compile.passes.mask_structure import AXES, MaskAnalysis, MaskTerm, emit, recognise

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
    "padding, log": (
        lambda g: g.call("log", padding(g, torch.bool).reshape(B, 1, 1, N).to(torch.float32)),
        "add", "key_padding",
    ),
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
