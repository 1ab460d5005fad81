"""The position terms of a mask as intervals of keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn_compile.operators.mask import MaskStructure


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 30), st.none() | st.integers(-5, 40), st.none() | st.integers(-5, 40), st.booleans(),
    st.none() | st.integers(1, 12), st.none() | st.integers(1, 12),
)  # fmt: skip
def test_an_interval_is_what_is_visible(
    queries: int, keys: int, left: int | None, right: int | None, end_aligned: bool, chunk: int | None,
    prefix: int | None,
) -> None:  # fmt: skip
    if left is not None and right is not None and left + right < 0:
        right = -left
    mask = MaskStructure(left, right, end_aligned, chunk, prefix if left is None else None)
    low, high = mask.interval(queries, keys, torch.device("cpu"))
    place = torch.arange(keys)
    visible = mask.visible(torch.arange(queries)[:, None], place, queries, keys)
    assert torch.equal((place >= low[:, None]) & (place < high[:, None]), visible)
    assert bool((low <= high).all())


def test_two_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="a prefix outside a sliding window is not one interval"):
        MaskStructure(left=3, right=0, prefix=2).interval(8, 8, torch.device("cpu"))
