"""Compositions of random choices are found, their masks read, and their rewrites equal to them: none missed, none wrong."""

from __future__ import annotations

import pytest
import torch
from composed import Composition, compositions
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as

import fastattn_compile.backend as backend

CASES, TOGETHER, PARTS = 2000, 8, 5  # compositions in all, of one graph, and tests they are spread over


def check(cases: list[Composition]) -> None:
    """Compiles several compositions as one graph."""
    torch.compiler.reset()
    backend.reset()
    options = {"operator": "exact", "compiler": "eager", "quiet": True}

    @torch.compile(backend="fastattn", options=options, dynamic=False)
    def together(inputs):
        return [case(*x) for case, x in zip(cases, inputs)]

    given = [case.inputs() for case in cases]
    decisions, results = backend.decisions, together(given)
    assert len(decisions()) == len(cases), [d.softmax for d in decisions()]
    for case, inputs, got, decision in zip(cases, given, results, decisions()):
        softmax = decision.softmax
        assert softmax.status == "taken", (case, softmax.reason)
        assert softmax.mask == case.structure, (case, softmax.mask)
        # What exact attention does not compute stays as it is: capped scores, and weights that are read.
        stays = case.cap != "none" or case.returned
        assert (decision.reason == "named by the user") != stays, (case, decision.reason)
        oracle, formula = case(*case.inputs(torch.float64)), case(*inputs)
        parts = [x if case.returned else (x,) for x in (got, oracle, formula)]
        for name, a, b, c in zip(("output", "weights"), *parts):
            assert_as_good_as(a, oracle=b, formula=c, name=f"{name} of {case}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_compositions(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=CASES // TOGETHER // PARTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(compositions, min_size=TOGETHER, max_size=TOGETHER))
    def run(cases: list[Composition]) -> None:
        check(cases)

    run()


def test_a_composition_of_everything() -> None:
    """The same judge, on a few in the fast stage."""
    check([
        Composition(), Composition("multiply_sum", "temperature", "causal", "gate", "after_values", group="expand"),
        Composition("einsum_bnhd", "key", "causal_padding", "log", "log_exp", "eval", "interleave", returned=True),
    ])  # fmt: skip
