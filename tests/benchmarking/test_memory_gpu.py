"""What a million tokens hold on a GPU, counted without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory_gpu


def test_what_is_let_go_is_not_counted() -> None:
    with memory_gpu.Held() as held:
        x = torch.empty(1000, device="meta")
        view, more = x[:10], x.double()
        assert held.bytes == 12000
        del x, more
        assert held.bytes == 4000
        del view
    assert (held.bytes, held.most) == (0, 12000)


def test_a_million_tokens_and_their_gradients_fit_a_gpu() -> None:
    args = memory_gpu.parse([])
    row = memory_gpu.count(1 << 20, args)
    tokens = row["inputs_bytes"] // 3
    # Query, key, value, output, their gradients, and statistics: what is left is pooled rows and what they get.
    assert row["kept_bytes"] == pytest.approx(8 * tokens, rel=0.01)
    assert row["both_bytes"] < 9 * tokens
