from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.passes.emission import emit, evaluate
from fastattn_compile.passes.expression import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Compare,
    Constant,
    Expression,
    Linear,
    Load,
    Not,
    add,
    axes_of,
    axis,
    binary,
    bounds,
    compare,
    constant,
    floordiv,
    logical_and,
    logical_not,
    logical_or,
    mod,
    mul,
    sub,
    substitute,
    truthy,
    unary,
    where,
)
from fastattn_compile.passes.formula import ANY_AXIS, Unknown, larger_than, leaves
from fastattn_compile.passes.graph import Node

N = sympy.Symbol("n", positive=True, integer=True)
Q, K = axis("query", 8), axis("key", 8)
MASK = Node("mask", "input", shape=(2, 8), dtype=torch.int64)
REAL = Node("real", "input", shape=(2, 8), dtype=torch.bool)
FLOAT = Node("float", "input", shape=(2, 8), dtype=torch.float32)
BATCH = axis("batch", 2)


def element(node: Node, at: Expression = K) -> Expression:
    return Load(node, (BATCH, at))


def test_equal_formulas_are_equal_and_hash_alike() -> None:
    a, b = compare("le", K, Q), compare("ge", Q, K)
    assert a == b and hash(a) == hash(b)
    assert Constant(True) != Constant(1) != Constant(1.0)
    assert len({Constant(True), Constant(1), Constant(1.0)}) == 3


def test_linear_forms_collect_terms() -> None:
    form = add(mul(K, constant(3)), sub(Q, mul(K, constant(3))))
    assert form == Q
    assert sub(K, K) == ZERO
    assert add(K, constant(N)) == Linear(K.terms, N)  # type: ignore[attr-defined]
    assert sub(add(K, constant(N + 1)), constant(N)) == add(K, ONE)


@pytest.mark.parametrize(
    ("op", "a", "b", "expected"),
    [
        ("le", K, add(Q, constant(7)), TRUE),
        ("lt", K, add(Q, constant(8)), TRUE),
        ("lt", K, sub(Q, constant(7)), FALSE),
        ("ge", K, ZERO, TRUE),
        ("eq", K, constant(8), FALSE),
        ("ne", K, constant(-1), TRUE),
        ("le", axis("key", N), constant(N - 1), TRUE),
        ("lt", axis("key", N), constant(N), TRUE),
        ("lt", axis("key", N), ZERO, FALSE),
        ("eq", axis("key", N), constant(N), FALSE),
        ("le", sub(K, Q), constant(7.5), TRUE),
        ("eq", K, constant(2.5), FALSE),
        ("lt", K, constant(math.inf), TRUE),
        ("gt", K, constant(math.nan), FALSE),
        ("eq", mul(K, constant(2)), constant(3), FALSE),
        ("le", mod(Load(MASK, (BATCH, K)), constant(4)), constant(3), TRUE),
        ("lt", unary("abs", Load(MASK, (BATCH, K))), ZERO, FALSE),
        ("eq", constant(N), constant(N), TRUE),
        ("le", constant(3), constant(3.5), TRUE),
    ],
)
def test_comparisons_that_extents_decide(op: str, a: Expression, b: Expression, expected: Expression) -> None:
    assert compare(op, a, b) == expected


@pytest.mark.parametrize("op", ["le", "lt", "ge", "gt", "eq", "ne"])
def test_unknown_extents_decide_nothing(op: str) -> None:
    # An extent that is not known must not count as 1: `key <= query` would fold to true and lose causality.
    q, k = axis("query", None), axis("key", None)
    for a, b in ((k, q), (k, add(q, constant(100))), (k, ZERO), (k, constant(N))):
        assert not isinstance(compare(op, a, b), Constant)


def test_a_symbol_of_unknown_sign_decides_nothing() -> None:
    free = sympy.Symbol("u", integer=True)
    assert isinstance(compare("le", K, constant(free)), Compare)
    assert isinstance(compare("le", axis("key", N), constant(2 * N - 3)), Compare)


def test_real_numbers_round_to_the_integer_that_decides() -> None:
    assert compare("le", sub(K, Q), constant(2.5)) == compare("le", sub(K, Q), constant(2))
    assert compare("lt", sub(K, Q), constant(2.5)) == compare("le", sub(K, Q), constant(2))
    assert compare("gt", sub(K, Q), constant(2.5)) == compare("ge", sub(K, Q), constant(3))


def test_comparisons_divide_by_the_common_factor() -> None:
    assert compare("le", mul(K, constant(2)), add(mul(Q, constant(2)), ONE)) == compare("le", K, Q)


def test_negation_respects_nan() -> None:
    below = compare("le", element(FLOAT), constant(0.0))
    assert logical_not(below) == Not(below)
    assert logical_not(logical_not(below)) == below
    assert logical_not(compare("le", K, Q)) == compare("gt", K, Q)
    # x == x is false for NaN.
    assert isinstance(compare("eq", element(FLOAT), element(FLOAT)), Compare)
    assert compare("eq", element(MASK), element(MASK)) == TRUE


def test_logic_folds() -> None:
    p, q = compare("le", K, Q), truthy(element(MASK))
    assert logical_and(p, TRUE, q, p) == logical_and(p, q)
    assert logical_and(p, FALSE) == FALSE
    assert logical_or(p, TRUE) == TRUE
    assert logical_or(q, logical_not(q)) == TRUE
    assert logical_and(q, logical_not(q)) == FALSE
    assert logical_not(logical_and(p, q)) == logical_or(logical_not(p), logical_not(q))


def test_choices_fold() -> None:
    p, q = compare("le", K, Q), truthy(element(MASK))
    choice = where(p, constant(0.0), constant(-1e9))
    assert where(TRUE, choice, ZERO) == choice
    assert where(logical_not(q), ONE, ZERO) == where(q, ZERO, ONE)
    assert compare("eq", choice, constant(0.0)) == p
    assert compare("lt", choice, constant(-1.0)) == logical_not(p)
    assert where(q, choice, constant(-1e9)) == where(logical_and(q, p), constant(0.0), constant(-1e9))
    assert where(p, q, FALSE) == logical_and(p, q)
    assert truthy(sub(ONE, where(p, ONE, ZERO))) == logical_not(p)
    assert truthy(mul(where(p, ONE, ZERO), where(q, ONE, ZERO))) == logical_and(p, q)
    # In the branch where x == 0 holds, x is 0.
    x = sub(ONE, element(MASK))
    assert where(compare("eq", x, ZERO), x, constant(-1e9)) == where(
        compare("eq", x, ZERO), ZERO, constant(-1e9)
    )


def test_sums_of_choices_meet_comparisons() -> None:
    p, q = compare("le", K, Q), truthy(element(MASK))
    masks = add(where(p, constant(0.0), constant(-1e9)), where(q, constant(0.0), constant(-1e9)))
    assert compare("eq", masks, constant(0.0)) in (logical_and(p, q), where(p, q, FALSE))


def test_folded_axes_unfold() -> None:
    for batch, heads in ((2, 4), (3, 1), (1, 5)):
        b, h = axis("batch", batch), axis("head", heads)
        flat = add(mul(b, constant(heads)), h)
        assert floordiv(flat, constant(heads)) == b
        assert mod(flat, constant(heads)) == h
    unbounded = add(mul(axis("batch", None), constant(4)), axis("head", None))
    assert floordiv(unbounded, constant(4)) != axis("batch", None)
    assert floordiv(axis("key", N), constant(N)) == ZERO
    assert mod(axis("key", N), constant(N)) == axis("key", N)


def test_abs_in_a_comparison_is_a_band() -> None:
    distance = sub(Q, K)
    assert compare("le", unary("abs", distance), constant(3)) == logical_and(
        compare("le", distance, constant(3)), compare("ge", distance, constant(-3))
    )
    assert unary("abs", K) == K
    assert unary("abs", sub(K, constant(7))) == sub(constant(7), K)


def test_unknown_values_are_never_believed() -> None:
    lost = Unknown(MASK, "changed in place")
    assert axes_of(compare("le", lost, K)) >= {ANY_AXIS}
    assert not isinstance(compare("eq", lost, lost), Constant)
    whole = unary("trunc", lost)
    assert not isinstance(compare("eq", whole, whole), Constant)
    fact = truthy(lost)
    assert not isinstance(logical_or(fact, logical_not(fact)), Constant)
    assert leaves(fact) == [lost]
    with pytest.raises(ValueError, match="varies over"):
        emit(fact, ("batch", "key"), (2, 8), torch.device("cpu"), _call, lambda node: torch.zeros(2, 8))


def test_substitution_is_simultaneous_and_folds() -> None:
    swapped = substitute(compare("le", K, Q), {"key": Q, "query": K})
    assert swapped == compare("le", Q, K)
    assert substitute(compare("le", K, Q), {"query": constant(7)}) == TRUE
    read = substitute(element(MASK), {"key": add(Q, ONE)})
    assert read == Load(MASK, (BATCH, add(Q, ONE)))


def test_size_is_bounded_work() -> None:
    x = truthy(element(MASK))
    for _ in range(200):
        x = Compare("eq", x, x)  # 2**200 parts when written out
    assert larger_than(x, 1000)
    assert not larger_than(compare("le", K, Q), 10)


# Folding never changes a value.

PLACES = {"query": Q, "key": K, "batch": BATCH}
TENSORS = {
    MASK: torch.tensor([[1, 1, 0, 2, 1, 0, 0, 3], [0, 1, 1, 1, 5, 1, 1, 0]]),
    REAL: torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1, 0]], dtype=torch.bool),
    FLOAT: torch.tensor([[0.5, 1, 0, -2, 1, 0, 0, 3], [0, 1, 1.5, 1, -5, 1, 1, 0]]),
}
GRIDS = {
    "batch": torch.arange(2).view(2, 1, 1),
    "query": torch.arange(8).view(1, 8, 1),
    "key": torch.arange(8).view(1, 1, 8),
}
Pair = tuple[Expression, torch.Tensor]

_ARITHMETIC = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "minimum": torch.minimum, "maximum": torch.maximum,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"), "mod": torch.remainder,
}  # fmt: skip
_COMPARISONS = {
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
}


def _numbers() -> st.SearchStrategy[Pair]:
    integers = st.integers(-9, 9).map(lambda i: (constant(i), torch.tensor(i)))
    reals = st.sampled_from([-2.5, 0.0, 1.5]).map(
        lambda x: (constant(x), torch.tensor(x, dtype=torch.float64))
    )
    places = st.sampled_from(sorted(PLACES)).map(lambda n: (PLACES[n], GRIDS[n]))
    data = st.sampled_from([(n, p) for n in (MASK, FLOAT) for p in ("query", "key")]).map(
        lambda c: (Load(c[0], (BATCH, PLACES[c[1]])), TENSORS[c[0]][GRIDS["batch"], GRIDS[c[1]]].double()
                   if c[0] is FLOAT else TENSORS[c[0]][GRIDS["batch"], GRIDS[c[1]]])
    )  # fmt: skip
    return st.one_of(integers, reals, places, data)


def _compound(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    def arithmetic(drawn: tuple[str, Pair, Pair]) -> Pair:
        op, (a, x), (b, y) = drawn
        if op in ("floordiv", "mod"):
            b, y = constant(3), torch.tensor(3)
        return binary(op, a, b), _ARITHMETIC[op](*torch.broadcast_tensors(x, y))

    def choice(drawn: tuple[str, Pair, Pair, Pair, Pair, bool]) -> Pair:
        op, (a, x), (b, y), (c, u), (d, v), negated = drawn
        held, real = compare(op, a, b), _COMPARISONS[op](x, y)
        if negated:
            held, real = logical_not(held), ~real
        joint = torch.promote_types(u.dtype, v.dtype)
        return where(held, c, d), torch.where(real, u.to(joint), v.to(joint))

    return st.one_of(
        st.tuples(st.sampled_from(sorted(_ARITHMETIC)), inner, inner).map(arithmetic),
        inner.map(lambda p: (unary("abs", p[0]), p[1].abs())),
        st.tuples(st.sampled_from(sorted(_COMPARISONS)), inner, inner, inner, inner, st.booleans()).map(
            choice
        ),
    )


NUMBERS = st.recursive(_numbers(), _compound, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(NUMBERS, NUMBERS, st.sampled_from(sorted(_COMPARISONS)))
def test_folding_keeps_values(left: Pair, right: Pair, op: str) -> None:
    loads = {node: value.double() if node is FLOAT else value for node, value in TENSORS.items()}
    for formula, real in (left, right, (compare(op, left[0], right[0]), _COMPARISONS[op](left[1], right[1]))):
        got = evaluate(formula, GRIDS, loads)
        # All values are small multiples of 1/2**k: float64 holds them, so equality is exact.
        assert torch.equal(*torch.broadcast_tensors(got.double(), real.double()))
        low, high = bounds(formula)
        assert low is None or bool((real.double() >= float(low)).all())
        assert high is None or bool((real.double() <= float(high)).all())


# Emission.


def _call(function: object, args: tuple, kwargs: dict) -> torch.Tensor:
    return function(*args, **kwargs)  # type: ignore[operator]


@settings(max_examples=100, deadline=None)
@given(NUMBERS)
def test_emitted_tensors_equal_evaluated_ones(pair: Pair) -> None:
    formula = substitute(pair[0], {"query": K})
    loads = {node: value.double() if node is FLOAT else value for node, value in TENSORS.items()}
    got = emit(formula, ("batch", "key"), (2, 8), torch.device("cpu"), _call, loads.__getitem__)
    grids = {"batch": torch.arange(2)[:, None], "key": torch.arange(8)[None]}
    assert got.shape == (2, 8)
    assert torch.equal(got.double(), evaluate(formula, grids, loads).double().expand(2, 8))


def _calls(formula: Expression, loads: dict[Node, torch.Tensor]) -> tuple[list[str], torch.Tensor]:
    names: list[str] = []

    def call(function: object, args: tuple, kwargs: dict) -> torch.Tensor:
        names.append(function.__name__)  # type: ignore[attr-defined]
        return _call(function, args, kwargs)

    return names, emit(formula, ("batch", "key"), (2, 8), torch.device("cpu"), call, loads.__getitem__)


def test_data_at_its_own_place_costs_no_gather() -> None:
    assert _calls(element(MASK), TENSORS)[0] == []
    assert _calls(compare("ne", element(MASK), ZERO), TENSORS)[0] == ["ne"]
    wide = Node("wide", "input", shape=(2, 1, 1, 20), dtype=torch.int64)
    values = {wide: torch.arange(40).view(2, 1, 1, 20)}
    names, got = _calls(Load(wide, (BATCH, ZERO, ZERO, add(K, constant(3)))), values)
    assert names == ["getitem"] and torch.equal(got, values[wide][:, 0, 0, 3:11])
    shared = Node("shared", "input", shape=(8,), dtype=torch.int64)
    names, got = _calls(Load(shared, (K,)), {shared: torch.arange(8)})
    assert names == ["getitem", "broadcast_to"] and torch.equal(got, torch.arange(8).expand(2, 8))


def test_computed_places_are_gathered() -> None:
    backward = Load(MASK, (BATCH, sub(constant(7), K)))
    assert torch.equal(_calls(backward, TENSORS)[1], TENSORS[MASK].flip(1))


def test_constants_fill() -> None:
    assert torch.equal(_calls(TRUE, {})[1], torch.ones(2, 8, dtype=torch.bool))


def test_emission_writes_graph_nodes_with_symbolic_sizes() -> None:
    graph = torch.fx.Graph()
    mask = graph.placeholder("mask")
    sizes = tuple(graph.call_method("size", (mask, d)) for d in (0, 1))
    node = Node("mask", "input", shape=(N, 2 * N), dtype=torch.int64, origin=mask)
    batch, key = axis("batch", N), axis("key", 2 * N)
    late = compare("ge", key, constant(N))
    formula = logical_and(truthy(Load(node, (batch, key))), late)
    graph.output(
        emit(formula, ("batch", "key"), sizes, torch.device("cpu"), graph.call_function, lambda n: n.origin)
    )
    run = torch.fx.GraphModule(torch.nn.Module(), graph)
    value = torch.randint(0, 2, (3, 6))
    assert torch.equal(run(value), (value != 0) & (torch.arange(6) >= 3))


def test_a_size_that_no_axis_has_is_refused() -> None:
    other = sympy.Symbol("m", positive=True, integer=True)
    late = compare("ge", axis("key", N), constant(other))
    with pytest.raises(ValueError, match="size of an axis"):
        emit(late, ("batch", "key"), (2, 8), torch.device("cpu"), _call, TENSORS.__getitem__)
