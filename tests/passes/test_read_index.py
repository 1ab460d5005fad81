"""Subscripts are read as PyTorch applies them: integers select first, then index tensors meet each other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastattn_compile.passes.fx_layout import read_index
from fastattn_compile.passes.fx_rules import Result
from fastattn_compile.passes.graph import Node


def node(x: torch.Tensor) -> Node:
    return Node("x", "input", (), {}, tuple(x.shape), x.dtype, "", "", False, None)


def read(x: torch.Tensor, entries: list[Any]) -> tuple[Any, ...] | None:
    given = [node(e) if isinstance(e, torch.Tensor) else e for e in entries]
    wanted = x[tuple(entries)]
    return read_index(node(x), given, Result(tuple(wanted.shape), wanted.dtype))


def same(got: tuple[Any, ...], x: torch.Tensor, entries: list[Any]) -> bool:
    """Every slice keeps what the written one keeps, every integer is the same place."""
    entries = [*entries, *[slice(None)] * (x.dim() - sum(e is not None for e in entries))]
    sizes = iter(x.shape)
    for found, written in zip(got, entries):
        if written is None:
            if found is not None:
                return False
            continue
        places = list(range(next(sizes)))
        if (
            isinstance(written, (int, slice))
            and not isinstance(found, Node)
            and places[found] != places[written]
        ):
            return False
    return len(got) == len(entries)


@pytest.mark.parametrize(
    "entries",
    [[0, slice(None), torch.tensor([0, 2])], [slice(0, 0, 2)], [torch.tensor([1, 0]), 1, slice(1, 3)]],
)
def test_integers_select_before_index_tensors_meet(entries: list[Any]) -> None:
    x = torch.zeros(2, 3, 4)
    got = read(x, entries)
    assert got is not None and same(got, x, entries), got


def test_random_subscripts() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        x = torch.zeros([draw.randint(1, 5) for _ in range(draw.randint(1, 4))])
        shape, entries = draw.choice([(2,), (2, 3), (1,)]), []
        for size in x.shape[: draw.randint(1, x.dim())]:
            ends = sorted(draw.randint(-size, size) for _ in range(2))
            entries.append(draw.choice([
                draw.randint(-size, size - 1), torch.zeros(shape, dtype=torch.long), slice(None),
                slice(*ends, draw.choice([None, 2])),
            ]))  # fmt: skip
            if draw.random() < 0.1:
                entries.append(None)
        got = read(x, entries)
        assert got is None or same(got, x, entries), (tuple(x.shape), entries, got)
