from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import sympy
import torch
from capture import capture
from drawn import Drawn, Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.passes.emission import evaluate
from fastattn_compile.passes.expression import (
    TRUE,
    ZERO,
    Expression,
    Load,
    add,
    axes_of,
    axis,
    compare,
    constant,
    sub,
)
from fastattn_compile.passes.formula import ANY_AXIS, Unknown, leaves
from fastattn_compile.passes.fx_view import view
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.mask_lift import Lifter, lifter_of

N = sympy.Symbol("n", positive=True, integer=True)


def lift(drawn: Drawn) -> Expression:
    return Lifter(drawn.graph.view()).lift(drawn.node)


def agrees(drawn: Drawn) -> bool:
    """Whether the lifted formula gives every element of the real tensor."""
    value = drawn.value
    grids = {
        f"d{i}": torch.arange(n).reshape([-1 if i == j else 1 for j in range(value.dim())])
        for i, n in enumerate(value.shape)
    }
    got = evaluate(lift(drawn), grids, drawn.graph.values).expand(value.shape)
    return torch.equal(got.double(), value.double())


def opaque_leaf(drawn: Drawn) -> bool:
    """Whether the element is read from the very tensor."""
    formula = lift(drawn)
    return isinstance(formula, Load) and formula.node is drawn.node


# Each draws a tensor that is index arithmetic: its formula must not read it.
LIFTED: dict[str, Callable[[Graph], Drawn]] = {
    "arange": lambda g: g.arange(5, start=3, step=2),
    "full": lambda g: g.full((2, 3), -1e9),
    "constant scalar": lambda g: g.constant(torch.tensor(2.5)),
    "uniform constant": lambda g: g.constant(torch.ones(3, 4)),
    "reshape merges": lambda g: g.input(torch.randn(2, 3, 4)).reshape(6, 4),
    "reshape splits": lambda g: g.input(torch.randn(6, 4)).reshape(2, 3, 4),
    "reshape regroups": lambda g: g.input(torch.randn(4, 6)).reshape(8, 3),
    "reshape flattens": lambda g: g.input(torch.randn(2, 1, 3, 4)).reshape(24),
    "squeeze": lambda g: g.input(torch.randn(2, 1, 3)).reshape(2, 3),
    "permute": lambda g: g.input(torch.randn(2, 3, 4)).permute(2, 0, 1),
    "expand": lambda g: g.input(torch.randn(3, 1)).expand(2, 3, 5),
    "repeat": lambda g: g.input(torch.randn(2, 3)).repeat(2, 1, 2),
    "repeat_interleave": lambda g: g.input(torch.randn(2, 3)).repeat_interleave(2, 1),
    "repeat of one": lambda g: g.input(torch.randn(1, 3)).repeat(4, 1),
    "slice": lambda g: g.input(torch.randn(6, 7))[1:5:2, 3:],
    "slice from the end": lambda g: g.input(torch.randn(6, 7))[:, -3:],
    "number and new axis": lambda g: g.input(torch.randn(6, 7))[None, 2, :, None],
    "negative number": lambda g: g.input(torch.randn(6, 7))[-1],
    "ellipsis": lambda g: g.input(torch.randn(2, 3, 4))[..., None, 1],
    "index tensors": lambda g: g.input(torch.randn(2, 7))[
        g.arange(2)[:, None, None, None], g.arange(5)[None, None, :, None]
    ],
    "index tensor after slice": lambda g: g.input(torch.randn(3, 7))[:, g.arange(4)],
    "index tensors apart": lambda g: g.input(torch.randn(3, 2, 3))[g.arange(3), :, g.arange(3)],
    "number before index tensor": lambda g: g.input(torch.randn(2, 3, 4))[0, :, g.arange(3)],
    "index tensor before number": lambda g: g.input(torch.randn(2, 3, 4))[g.arange(2), :, 0],
    "new axis and index tensor": lambda g: g.input(torch.randn(5, 4))[None, :, g.arange(3)],
    "data as index": lambda g: g.input(torch.randn(9))[g.input(torch.tensor([3, -1, 0]))],
    "arange indexed by arange": lambda g: g.arange(9, start=2)[g.arange(4) + 1],
    "embedding": lambda g: g.embedding(g.input(torch.tensor([[0, 2], [1, 1]])), g.input(torch.randn(3, 4))),
    "tril": lambda g: g.full((4, 6), 1.0).tril(1),
    "triu": lambda g: g.full((2, 4, 6), -math.inf).triu(-1),
    "tril of data": lambda g: g.input(torch.randn(4, 4)).tril(),
    "bool tril": lambda g: g.full((4, 4), True, torch.bool).tril(),
    "diff": lambda g: g.arange(5).diff(0),
    "diff continued": lambda g: g.arange(6).reshape(1, 6).diff(1, g.full((1, 1), -1, torch.int64)),
    "cumsum of zeros": lambda g: g.full((2, 4), 0, torch.int64).cumsum(1),
    "cumsum of ones": lambda g: g.full((2, 4), 1, torch.int64).cumsum(1) - 1,
    "cumsum of nothing": lambda g: (g.arange(5).ne(g.arange(5))).cumsum(0),
    "cast to bool": lambda g: (g.input(torch.tensor([0, 2, 0])) - 0).to(torch.bool),
    "cast of truth": lambda g: (g.arange(4) <= 2).to(torch.float32) * 3.0,
    "cast to int": lambda g: (g.input(torch.tensor([0.5, -1.5, 2.0])) * 1.0).to(torch.int64),
    "cast half": lambda g: g.arange(2048).to(torch.float16),
    "inverted mask": lambda g: (1.0 - g.input(torch.tensor([0, 1, 1])).to(torch.float32)) * -1e9,
    "masked_fill": lambda g: g.full((4,), 0.0).masked_fill(g.arange(4) > 1, -math.inf),
    "where": lambda g: g.where(g.arange(4)[:, None] >= g.arange(5), 0.0, torch.finfo(torch.float32).min),
    "truth arithmetic": lambda g: g.call("maximum", g.arange(4) > 1, g.arange(4) < 1),
    "clamp": lambda g: (g.arange(9) - 4).clamp(-2, 3),
    "relu": lambda g: g.call("relu", g.arange(9) - 4),
    "alibi": lambda g: (
        g.call("pow", g.constant(torch.tensor(0.5)), g.arange(4, start=1)).reshape(4, 1) * g.arange(6)
    ),
    "band constant": lambda g: g.constant(torch.ones(1, 1, 6, 8).tril(2).triu(-1).bool()),
    "band constant in bfloat16": lambda g: g.constant(torch.ones(5, 5, dtype=torch.bfloat16).tril(-1)),
    "additive constant": lambda g: g.constant(torch.full((5, 5), -math.inf).triu(1)),
    "band constant, cut": lambda g: g.constant(torch.ones(1, 1, 9, 9).tril().bool())[:, :, 2:6, :6],
}  # fmt: skip


@pytest.mark.parametrize("name", LIFTED)
def test_formulas_give_every_element(name: str) -> None:
    torch.manual_seed(0)
    drawn = LIFTED[name](Graph())
    assert agrees(drawn)
    assert not opaque_leaf(drawn)


# What must be read, not computed: a formula would be wrong, or it is no index arithmetic.
READ: dict[str, Callable[[Graph], Drawn]] = {
    "input": lambda g: g.input(torch.randn(3)),
    "opaque": lambda g: g.opaque(torch.randn(3), g.input(torch.randn(3))),
    "cumsum of data": lambda g: g.input(torch.tensor([1, 0, 1])).cumsum(0),
    "diff of data": lambda g: g.input(torch.tensor([1, 0, 1])).diff(0),
    "diff with a jump": lambda g: g.arange(5).diff(0, g.full((1,), 3, torch.int64)),
    "negative indices wrap": lambda g: g.arange(9, start=2)[g.arange(4) - 2],
    "data may be negative": lambda g: (g.arange(9) + 1)[g.input(torch.tensor([3, -1]))],
    "half rounds positions": lambda g: g.arange(2050).to(torch.float16),
    "bfloat16 rounds data": lambda g: g.input(torch.tensor([257, 3])).to(torch.bfloat16),
    "uint8 wraps": lambda g: g.arange(4).to(torch.uint8) - 2,
    "bitwise and": lambda g: g.add(
        "and", (g.arange(4), 2), {}, torch.arange(4) & 2
    ),
    "noise": lambda g: g.constant(torch.randn(5, 5)),
    "near band": lambda g: g.constant(_with(torch.ones(6, 6).tril().bool(), (1, 4), True)),
    "three values": lambda g: g.constant(torch.tensor([[0.0, 1.0], [2.0, 0.0]])),
}  # fmt: skip


def _with(x: torch.Tensor, at: tuple[int, ...], value: object) -> torch.Tensor:
    x[at] = value
    return x


@pytest.mark.parametrize("name", READ)
def test_what_is_not_certain_is_read(name: str) -> None:
    drawn = READ[name](Graph())
    assert agrees(drawn)
    assert opaque_leaf(drawn)


def test_inputs_are_never_fitted() -> None:
    # The same values as in a constant: an input has other values in the next call.
    assert opaque_leaf(Graph().input(torch.ones(5, 5).tril()))


def test_what_is_changed_in_place_is_unknown() -> None:
    g = Graph()
    data = g.full((4,), 1, torch.int64)
    data.node.tainted = True
    held = (data + g.arange(4)) <= 2
    formula = lift(held)
    assert ANY_AXIS in axes_of(formula)
    assert [leaf.why for leaf in leaves(formula) if isinstance(leaf, Unknown)] == ["changed in place"]


def test_a_node_without_a_shape_is_unknown() -> None:
    lost = Node("lost", "opaque")
    assert isinstance(Lifter(GraphView([lost])).lift(lost), Unknown)


def test_symbolic_sizes() -> None:
    queries = Node("q", "arange", (), {"start": N, "step": 1}, (N,), torch.int64)
    keys = Node("k", "arange", (), {"start": 0, "step": 1}, (2 * N,), torch.int64)
    rows = Node("rows", "reshape", (queries,), {}, (N, 1), torch.int64)
    seen = Node("seen", "le", (keys, rows), {}, (N, 2 * N), torch.bool)
    flat = Node("flat", "reshape", (seen,), {}, (2 * N * N,), torch.bool)
    back = Node("back", "reshape", (flat,), {}, (1, N, 2 * N), torch.bool)
    lifter = Lifter(GraphView([queries, keys, rows, seen, flat, back]))
    q, k = axis("d0", N), axis("d1", 2 * N)
    assert lifter.lift(seen) == compare("le", sub(k, q), constant(N))
    assert "d0" in axes_of(lifter.lift(flat))
    every = Node("every", "lt", (keys, 2 * N), {}, (2 * N,), torch.bool)
    assert Lifter(GraphView([keys, every])).lift(every) == TRUE


def test_slices_with_symbolic_bounds() -> None:
    table = Node("table", "input", (), {}, (3 * N,), torch.int64)
    tail = Node("tail", "index", (table,), {"index": (slice(N, None, None),)}, (2 * N,), torch.int64)
    assert Lifter(GraphView([table, tail])).lift(tail) == Load(table, (add(axis("d0", 2 * N), constant(N)),))
    u = sympy.Symbol("u", integer=True)
    loose = Node("loose", "index", (table,), {"index": (slice(u, None, None),)}, (2 * N,), torch.int64)
    # A start of unknown sign may count from the end.
    assert Lifter(GraphView([table, loose])).lift(loose) == Load(loose, (axis("d0", 2 * N),))


def test_a_slice_that_does_not_fit_its_place_is_not_believed() -> None:
    table = Node("table", "input", (), {}, (2, 3, 4), torch.float32)
    picked = Node("picked", "input", (), {}, (2,), torch.int64)
    # torch gives x[0, :, i] the shape (3, 2): the slice keeps 3 elements, not 2.
    index = (0, slice(1, 3, None), picked)
    wrong = Node("wrong", "index", (table, picked), {"index": index}, (3, 2), torch.float32)
    formula = Lifter(GraphView([table, picked, wrong])).lift(wrong)
    assert isinstance(formula, Load) and formula.node is wrong


def test_boolean_selection_is_read() -> None:
    g = Graph()
    assert opaque_leaf(g.input(torch.randn(4))[g.input(torch.tensor([True, False, True, False]))])


def test_sizes_as_operands() -> None:
    keys = Node("k", "arange", (), {"start": 0, "step": 1}, (N,), torch.int64)
    size = Node("size", "input", (), {"symbol": N})
    shifted = Node("shifted", "sub", (keys, N), {}, (N,), torch.int64)
    assert Lifter(GraphView([keys, size, shifted])).lift(shifted) == sub(axis("d0", N), constant(N))


def test_dimensions_of_size_one_have_index_zero() -> None:
    g = Graph()
    assert lift(g.input(torch.zeros(1, 3))) == Load(g.nodes[0], (ZERO, axis("d1", 3)))


def test_long_chains_do_not_recurse() -> None:
    g = Graph()
    x = g.arange(4)
    for _ in range(5000):
        x = x + 1
    assert lift(x) == add(axis("d0", 4), constant(5000))


def test_large_formulas_are_read_instead() -> None:
    g = Graph()
    x = g.input(torch.ones(4))
    for _ in range(40):
        x = x.abs() * x  # doubles when written out
    began = time.perf_counter()
    formula = lift(x)
    assert time.perf_counter() - began < 5
    assert isinstance(formula, Expression)
    assert agrees(x)


def test_one_lifter_for_a_view() -> None:
    graph = Graph()
    graph.arange(3)
    graph_view = graph.view()
    assert lifter_of(graph_view) is lifter_of(graph_view)
    assert lifter_of(graph.view()) is not lifter_of(graph_view)


# Random compositions of layout and arithmetic.

STEPS = ("reshape", "permute", "slice", "math", "compare", "expand", "repeat", "gather")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_chains_give_every_element(data: st.DataObject) -> None:
    g = Graph()
    x = data.draw(st.sampled_from([g.arange(12), g.input(torch.arange(12) % 5 - 2)]))
    for _ in range(data.draw(st.integers(1, 7))):
        shape = tuple(x.value.shape)
        step = data.draw(
            st.sampled_from(["reshape", "permute", "slice", "math", "compare", "expand", "repeat", "gather"])
        )
        if step == "reshape":
            total = x.value.numel()
            first = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
            x = x.reshape(first, 1, total // first)
        elif step == "permute":
            x = x.permute(*data.draw(st.permutations(range(len(shape)))))
        elif step == "slice":
            start = data.draw(st.integers(0, shape[0] - 1))
            x = x[start :: data.draw(st.integers(1, 2)), ..., None]
        elif step == "math":
            x = data.draw(st.sampled_from([x + 3, x * 2, x // 3, x % 4, x.abs(), -x, 1 - x, x.clamp(0, 5)]))
        elif step == "compare":
            x = data.draw(
                st.sampled_from([(x <= 3).to(torch.int64), x.masked_fill(x.eq(2), 7), (x * (x > 1))])
            )
        elif step == "expand":
            x = x.reshape(1, *shape).expand(2, *shape)
        elif step == "repeat" and x.value.numel() < 200:
            x = data.draw(st.sampled_from([x.repeat(*[2] * len(shape)), x.repeat_interleave(2, 0)]))
        elif step == "gather":
            x = x[g.input(torch.tensor([0, shape[0] - 1, 0]))]
        if x.value.dim() > 5:
            x = x.reshape(x.value.numel())
    assert agrees(x)


# Through Dynamo.


def _chunked(mask: torch.Tensor) -> torch.Tensor:
    q = torch.arange(mask.shape[1])
    return (q[:, None] // 4 == q[None] // 4) & mask[:, None, :].bool()


def _additive(mask: torch.Tensor) -> torch.Tensor:
    extended = mask[:, None, None, :].to(torch.float32)
    return (1.0 - extended) * torch.finfo(torch.float32).min


def _triangle(mask: torch.Tensor) -> torch.Tensor:
    n = mask.shape[1]
    causal = torch.full((n, n), float("-inf")).triu(1)
    return causal[None, None].expand(mask.shape[0], 1, n, n)


def _packed(mask: torch.Tensor) -> torch.Tensor:
    position = torch.arange(mask.shape[1])[None].expand(mask.shape[0], -1)
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows, batch = torch.arange(mask.shape[1]), torch.arange(mask.shape[0])[:, None, None]
    return (document[batch, rows[None, :, None]] == document[batch, rows[None, None]]) & (
        rows[None] <= rows[:, None]
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [_chunked, _additive, _triangle, _packed])
def test_traced_functions(function: Callable[[torch.Tensor], torch.Tensor], dynamic: bool) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0, 1]])
    ((gm, inputs),) = capture(function, mask, dynamic=dynamic)
    graph = view(gm)
    values = dict(zip(gm.graph.nodes, inputs))
    (result,) = next(graph.of_kind("output")).operands
    formula = Lifter(graph).lift(result)
    read = {leaf.node: values[leaf.node.origin] for leaf in leaves(formula) if isinstance(leaf, Load)}
    real = function(mask)
    grids = {
        f"d{i}": torch.arange(n).reshape([-1 if i == j else 1 for j in range(real.dim())])
        for i, n in enumerate(real.shape)
    }
    symbols = {
        size: known
        for node in graph.of_kind("input")
        for size, known in zip(node.shape or (), mask.shape)
        if isinstance(size, sympy.Symbol)
    }
    got = evaluate(formula, grids, read, symbols).expand(real.shape)
    assert torch.equal(got.double(), real.double())
