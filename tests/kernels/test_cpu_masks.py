"""Masks read in C++ and on ATen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.kernels import masks
from fastattn_compile.kernels.cpu import build
from fastattn_compile.kernels.dispatch import use_kernels

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 600), st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_rows_are_read_alike(
    batch: int, queries: int, keys: int, density: float, transposed: bool, seed: int
) -> None:
    visible = torch.rand(batch, queries, keys, generator=torch.Generator().manual_seed(seed)) < density
    if transposed:
        visible = visible.mT.contiguous().mT
    with use_kernels("cpp"):
        ours = masks.read(visible)
    with use_kernels("aten"):
        theirs = masks.read(visible)
    for field in dataclasses.fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert torch.equal(ours.count, visible.sum(2))
    assert torch.equal(ours.seen, visible.any(1))
    for b, i in [(0, 0), (batch - 1, queries - 1)]:
        places = visible[b, i].nonzero().flatten().tolist() or [keys, -1]
        assert (int(ours.first[b, i]), int(ours.last[b, i])) == (places[0], places[-1])


def test_many_queries_in_stretches() -> None:
    visible = torch.ones(2, 1300, 70, dtype=torch.bool).tril()
    visible[1, :, 60:] = False
    rows = masks.Rows(*masks.cpu.read(visible))
    assert torch.equal(rows.count, visible.sum(2))
    assert torch.equal(rows.seen, visible.any(1))
