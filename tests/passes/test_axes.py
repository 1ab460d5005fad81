"""Axes that survive reshapes, and their unification, with numbers and with symbols."""

from __future__ import annotations

import itertools

import sympy
from hypothesis import given
from hypothesis import strategies as st

from fastattn_compile.passes.axes import Atom, fresh, leaves, length, regroup, unify

B, N = sympy.symbols("b n", integer=True, positive=True)


def sizes(axes):
    return [[atom.size for atom in leaves(axis)] for axis in axes]


def test_folding_and_unfolding_heads_gives_the_same_atoms() -> None:
    axes = fresh((2, 4, 24, 16))
    folded = regroup(axes, (8, 24, 16))
    assert sizes(folded) == [[2, 4], [24], [16]]
    unfolded = regroup(folded, (2, 4, 24, 16))
    assert [leaves(a) for a in unfolded] == [leaves(a) for a in axes]


def test_a_split_is_seen_everywhere() -> None:
    (axis,) = fresh((64,))
    regroup([axis], (4, 16))
    assert [atom.size for atom in leaves(axis)] == [4, 16]


def test_a_border_that_cannot_be_expressed() -> None:
    assert regroup(fresh((6, 4)), (8, 3)) is None
    assert regroup(fresh((6, 4)), (6, 5)) is None


def test_symbolic_sizes() -> None:
    axes = fresh((B, 4, N, 16))
    assert sizes(regroup(axes, (4 * B, N, 16))) == [[B, 4], [N], [16]]
    assert sizes(regroup(fresh((B, N, 64)), (B, N, 4, 16))) == [[B], [N], [4], [16]]
    assert regroup(fresh((B, N)), (B + N,)) is None
    assert regroup(fresh((N,)), (2, sympy.floor(N / 2))) is None


def test_unify_finds_the_common_refinement() -> None:
    a, b = [Atom(12), Atom(5)], [Atom(3), Atom(20)]
    assert unify(a, b)
    assert leaves(a) == leaves(b) and [x.size for x in leaves(a)] == [3, 4, 5]
    assert not unify([Atom(6)], [Atom(4)]) and not unify([Atom(N)], [Atom(B)])
    assert unify([Atom(4 * B)], [Atom(B), Atom(4)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_regrouping_keeps_the_order_of_elements(factors: list[int], data: st.DataObject) -> None:
    """However a tensor is cut into dimensions, the atoms of all dimensions in a row stay the same."""

    def cut() -> list[int]:
        borders = sorted(data.draw(st.sets(st.integers(0, len(factors)))) | {0, len(factors)})
        parts = [factors[i:j] for i, j in itertools.pairwise(borders)]
        return [int(sympy.prod(part)) for part in parts]

    axes = fresh(cut())
    for _ in range(4):
        shape = cut()
        again = regroup(axes, shape)
        assert again is not None and [length(axis) for axis in again] == shape
        assert [x for axis in again for x in leaves(axis)] == [x for axis in axes for x in leaves(axis)]
        axes = again
