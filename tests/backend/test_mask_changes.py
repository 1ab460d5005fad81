"""Masks that change while a model runs: each batch is right, and what keeps coming is compiled for."""

from __future__ import annotations

import warnings

import pytest
import torch
from backend.test_mask_check import FMA, Attention, N, added, compiled, visible
from backend.test_mask_packed import LENGTHS, OTHERS, packed
from oracle import relative_error
from torch import Tensor, nn

import fastattn_compile as fa
from fastattn_compile import backend


def masks(model: object) -> list[str]:
    """What was read at each compilation."""
    return [record.decisions[0].softmax.mask for record in backend.records(model)]


@pytest.mark.filterwarnings("ignore:fastattn")
def test_what_keeps_coming_is_recognised_anew() -> None:
    """The first batch is one document, later ones are packed: the second compilation serves both."""
    model, x = Attention("fill"), torch.randn(2, N, 16)
    fast = compiled(model, operator="exact")
    batches = (
        [visible("causal")] + [packed("causal", x) for x in (LENGTHS, OTHERS, LENGTHS)] + [visible("causal")]
    )
    for mask in batches:
        mask = mask.expand(2, 1, N, N).clone()
        assert relative_error(fast(x, mask), model(x, mask)) < 1e-6
    assert masks(fast) == ["causal & key_padding", "causal & key_padding & segments"]
    first, second = (record.guard for record in backend.records(fast))
    assert (first.calls, first.failures) == (3, 2) and not first.lasts()
    assert (second.calls, second.failures) == (2, 0)


@pytest.mark.filterwarnings("ignore:fastattn")
def test_padding_that_comes_later_is_recognised() -> None:
    """Of one sequence a mask looks as if it were shared."""
    model, x = Attention("add"), torch.randn(1, N, 16)
    fast = compiled(model, operator="exact")
    for padding in (0, 5, 9, 7, 0):
        seen = visible("causal") & (torch.arange(N) < N - padding)
        mask = added(seen)
        assert relative_error(fast(x, mask), model(x, mask)) < 1e-6
    assert masks(fast) == ["causal", "causal & key_padding"]


@pytest.mark.filterwarnings("ignore:fastattn")
def test_masks_that_go_to_and_fro_end_exact() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16)
    fast = compiled(model, **FMA)
    kinds = [visible("causal"), visible("causal & window(9)")]
    for at in range(8):
        mask = kinds[at % 2]
        result = fast(x, mask)
        if at % 2:
            assert torch.equal(result, model(x, mask))
    last = backend.decisions(fast)[0]
    assert last.operator == "exact"
    assert "its values were causal on one batch and causal & window(9) on another" in last.reason
    assert len(backend.records(fast)) == 2 and backend.records(fast)[-1].guard is None
    (site,) = fa.report(fast).sites
    assert (site.operator, site.mask_checked, site.mask_broken) == ("exact", False, 2)


@pytest.mark.filterwarnings("ignore:fastattn")
def test_masks_without_structure_end_exact() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16)
    fast = compiled(model, **FMA)
    fast(x, visible("causal"))
    torch.manual_seed(0)
    for _ in range(12):
        noise = (torch.rand(1, 1, N, N) > 0.5) | torch.eye(N, dtype=torch.bool)
        assert torch.equal(fast(x, noise), model(x, noise))
    first, second = backend.records(fast)
    assert first.guard is not None and first.guard.failures == 9 and second.guard is None
    assert "causal on one batch and something without structure on another" in second.decisions[0].reason


def test_a_stray_mask_changes_nothing() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16)
    fast = compiled(model, **FMA)
    causal = visible("causal").repeat(2, 1, 1, 1)
    near = fast(x, causal)
    with pytest.warns(UserWarning, match="no longer causal"):
        fast(x, packed("causal", LENGTHS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x, causal), near)
    assert len(backend.records(fast)) == 1
    (site,) = fa.report(fast).sites
    assert (site.operator, site.mask, site.mask_checked) == ("fma", "causal & key_padding", True)
    assert site.mask_broken == 1 and fa.report(fast).to_json()["sites"][0]["mask_broken"] == 1


class Buffers(nn.Module):
    """A mask that is a buffer: ``masked_fill`` with all of it, a corner of it, or what is added for it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.how = nn.Linear(16, 48), how
        self.register_buffer("keep", torch.ones(2 * N, 2 * N, dtype=torch.bool).tril())
        self.register_buffer("add", added(self.keep))
        self.register_buffer("hidden", torch.full((1, 1), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        n, scores = x.shape[1], q @ k.mT / 8**0.5
        if self.how == "fill":
            scores = scores.masked_fill(~self.keep[:n, :n], -torch.inf)
        elif self.how == "add":
            scores = scores + self.add[:n, :n]
        else:
            later = torch.arange(n) > torch.arange(n)[:, None]
            scores = scores + torch.where(later, self.hidden, 0.0)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("way", ["in place", "state", "another tensor"])
@pytest.mark.parametrize("how", ["fill", "add", "value"])
def test_a_buffer_that_is_written_to(how: str, way: str) -> None:
    """What a buffer held is part of the graph: another mask is never served by it."""
    model, x = Buffers(how), torch.randn(2, N, 16)
    fast = compiled(model, operator="exact")
    for _ in range(2):
        assert relative_error(fast(x), model(x)) < 1e-6
    assert masks(fast) == ["causal"] and not backend.decisions(fast)[0].softmax.checked
    name = {"fill": "keep", "add": "add", "value": "hidden"}[how]
    old = getattr(model, name)
    if how == "value":
        new = torch.zeros_like(old)
    else:
        band = torch.ones(2 * N, 2 * N, dtype=torch.bool).tril().triu(-4)
        new = band if how == "fill" else added(band)
    with torch.no_grad():
        if way == "in place":
            old.copy_(new)
        elif way == "state":
            model.load_state_dict({**model.state_dict(), name: new})
        else:
            setattr(model, name, new)
    (record,) = backend.records(fast)
    with pytest.warns(UserWarning, match=f"the buffer {name}, which the mask of"):
        assert torch.equal(fast(x), model(x))
    assert record.guard is not None and sum(record.guard.broken.values()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert relative_error(fast(x), model(x)) < 1e-6
    # Compiled anew, the buffer is data: a mask is read and compared, what is added by distance is read where it is needed.
    again = backend.records(fast)[-1]
    softmax = again.decisions[0].softmax
    assert again is not record
    if how == "value":
        assert softmax.site.spec.bias == "bucketed" and again.guard is None
    else:
        assert (softmax.mask, softmax.checked) == ("causal & window(5)", True)
        assert again.guard is not None and not again.guard.broken


def test_buffers_are_looked_at_without_masks_that_are_read() -> None:
    model, x = Buffers("fill"), torch.randn(2, N, 16)
    fast = compiled(model, check_masks=False, **FMA)
    fast(x)
    model.keep.copy_(torch.ones_like(model.keep).tril().triu(-4))
    with pytest.warns(UserWarning, match="the buffer keep"):
        assert torch.equal(fast(x), model(x))
    for _ in range(3):
        assert torch.equal(fast(x), model(x))
    (last,) = backend.decisions(fast)
    assert last.operator == "exact" and "data over queries and keys" in last.reason
