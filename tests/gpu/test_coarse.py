"""Sums and means along the paths of trees."""

import pytest
import torch
from oracle import assert_as_good_as

from fastattn_compile.kernels.aten import treeformer_tc as aten
from fastattn_compile.kernels.aten.treeformer_tc import Cut, Weighting
from fastattn_compile.kernels.gpu import coarse

CASES = {
    "causal": {},
    "bidirectional": {"causal": False, "queries": (2, 30), "chunks": 3},
    "softmax": {"softmax": True, "height": 4, "chunks": 3, "rows": 16, "units": 1},
    "without-root": {"root": False, "units": 1, "chunks": 1},
    "no-tree": {"height": 0, "units": 1},
}


def run(module, cut, value, weighting, seed):
    """Outputs, gradients, and the gradients of memberships in the order in which they come."""
    members = []

    def receive(chunks, levels):
        members.extend(levels)

    out, seen = module.forward(cut, value, weighting)
    found = module.backward(cut, value, weighting, seed, receive, receive)
    return [out, seen, found.value, found.learned, *members]


@pytest.mark.parametrize("case", CASES)
def test_means_along_paths(case, device, monkeypatch):
    sizes = {"units": 2, "group": 2, "chunks": 2, "rows": 40, "channels": 24, "height": 3, "causal": True,
             "softmax": False, "root": True, "queries": None, **CASES[case]}  # fmt: skip
    monkeypatch.setattr(coarse, "_ROWS", 16)
    units, group, chunks, rows = (sizes[x] for x in ("units", "group", "chunks", "rows"))
    of_queries = sizes["queries"] or (chunks, rows)
    real = (torch.rand(units, chunks, rows, device=device) > 0.2).float()
    key_leaf = torch.randint(0, 1 << sizes["height"], (units, chunks, rows), device=device)
    query_leaf = torch.randint(0, 1 << sizes["height"], (units, group, *of_queries), device=device)
    value = torch.randn(units, chunks, rows, sizes["channels"], device=device) * real[..., None]
    learned = torch.randn(units, group, sizes["height"] + 1, device=device)
    seed = torch.randn(*query_leaf.shape, sizes["channels"], device=device)

    def judge(module, dtype):
        cut = Cut(sizes["height"], sizes["causal"], key_leaf, query_leaf, real.to(dtype))
        weighting = Weighting(learned.to(dtype), sizes["softmax"], sizes["root"])
        return run(module, cut, value.to(dtype), weighting, seed.to(dtype))

    judged = judge(coarse, torch.float32), judge(aten, torch.float64), judge(aten, torch.float32)
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got, oracle=oracle, formula=formula)


def test_obstacles():
    leaf = torch.zeros(1, 1, 4, dtype=torch.int64)
    cut = Cut(3, True, leaf, leaf[:, None], torch.ones(1, 1, 4))
    assert coarse.obstacle(cut, torch.ones(1, 1, 4, 2)) == ""
    assert "float64" in coarse.obstacle(cut, torch.ones(1, 1, 4, 2, dtype=torch.float64))
    assert "height 9" in coarse.obstacle(
        Cut(9, True, leaf, leaf[:, None], torch.ones(1, 1, 4)), torch.ones(1, 1, 4, 2)
    )
