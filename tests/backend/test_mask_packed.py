"""Packed documents in a mask that is data: told on the first batch, their boundaries read from every later one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend.test_mask_check import FMA, Attention, N, added, compiled
from oracle import relative_error
from torch import Tensor, nn

import fastattn_compile as fa
from fastattn_compile import backend
from fastattn_compile.kernels.masks import any_along
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.mask_values import documents_of, has_structure, structure_of

LENGTHS = [[7, 25, 1, 15], [30, 18]]
OTHERS = [[20, 20, 8], [3, 5, 40]]
OPERATORS = {
    "fma": FMA,
    "window": {"operator": "window", "width": 6, "sinks": 2},
    "barnes_hut": {
        "operator": "barnes_hut", "block": 8, "leaf": 2, "fanout": 2, "open": 3, "beam": 4, "sinks": 2,
    },
}  # fmt: skip


def numbers(lengths: list[list[int]]) -> Tensor:
    """``(batch, n)``: the document of every token."""
    return torch.stack([torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in lengths])


def packed(text: str, lengths: list[list[int]], padding: int = 0) -> Tensor:
    """``(batch, 1, n, n)``: a structure inside each document; padding at the end is a document that nobody sees."""
    structure, ids = MaskStructure.parse(text), numbers(lengths)
    n = ids.shape[1]
    seen = structure.visible(torch.arange(n)[:, None], torch.arange(n), n, n)
    seen = seen & (ids[:, :, None] == ids[:, None])
    return (seen & (torch.arange(n) < n - padding))[:, None]


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("text", ["none", "causal", "causal & window(5)", "left(3) & right(2)"])
def test_documents_are_told_from_values(text: str, padding: int) -> None:
    seen = packed(text, LENGTHS, padding)[:, 0]
    for padded in (False, True):
        wanted = {"segments": True, "key_padding": padded or bool(padding)}
        (structure,) = {structure_of(x, padded) for x in (seen, seen.clone())}
        position = MaskStructure.parse(text)
        assert structure == MaskStructure(position.left, position.right, **wanted)
        assert has_structure(seen, structure)
    real = N - padding
    assert torch.equal(documents_of(seen)[:, :real], numbers(LENGTHS)[:, :real])
    other = packed(text, OTHERS, padding)[:, 0]
    assert has_structure(other, structure)
    other[1, 30, 2] = ~other[1, 30, 2]
    assert not has_structure(other, structure)


def test_documents_are_what_a_mask_does_not_join() -> None:
    """Against the definition, on masks without any order: a stretch ends where nobody sees across."""
    torch.manual_seed(0)
    for share in (0.02, 0.05, 0.1):
        seen = torch.rand(20, 24, 24) < share
        joined = (seen | seen.mT).long()
        across = torch.stack(
            [joined[:, :at, at:].sum((1, 2)) > 0 for at in range(1, 24)], 1
        )  # between two neighbours
        alone = joined.sum(2) == 0
        wanted = (~across & ~(alone[:, 1:] & alone[:, :-1])).long().cumsum(1)
        assert torch.equal(documents_of(seen)[:, 1:], wanted)


def test_one_document_is_no_packing() -> None:
    seen = packed("causal", [[N]])[:, 0]
    assert str(structure_of(seen, False)) == "causal"
    assert str(structure_of(seen, False, packed=True)) == "causal & segments"


FORMS = ["add", "fill", "sdpa", "sdpa, float", "three dimensions", "one sequence", "no batch"]


def given(form: str, mask: Tensor) -> tuple[Any, Tensor]:
    """A model and its mask in a form."""
    if form in ("add", "sdpa, float"):
        mask = added(mask)
    if form == "one sequence":
        mask = mask[:1]
    if form == "no batch":
        mask = mask[0, 0]
    model = Attention(form if form in ("add", "fill") else "sdpa")
    if form == "three dimensions":

        class Unsqueezed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = model

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return self.attention(x, mask[:, None])

        return Unsqueezed(), mask[:, 0]
    return model, mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["none", "causal"])
def test_a_packed_mask_that_is_an_argument(form: str, text: str) -> None:
    """Exact attention by its structure is the model's, on the first batch and on one with other documents."""
    x = torch.randn(2, N, 16)
    exact: Any = None
    for lengths in (LENGTHS, OTHERS):
        model, mask = given(form, packed(text, lengths))
        if exact is None:
            (line,) = fa.scan(model, x, mask).softmaxes
            assert (line.status, line.checked) == ("taken", True)
            assert "segments" in line.mask and line.mask.startswith("causal") == (text == "causal")
            exact = compiled(model, operator="exact")
        assert relative_error(exact(x, mask), model(x, mask)) < 1e-6
    (record,) = backend.records(exact)
    assert record.decisions[0].operator == "exact" and record.guard is not None
    assert record.guard.calls == 2 and not record.guard.broken


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("held", [False, True])
def test_each_document_gives_what_it_gives_alone(name: str, held: bool) -> None:
    mask = added(packed("causal", LENGTHS[:1]))
    model, x = Attention("add", mask if held else None), torch.randn(1, N, 16)
    together = compiled(model, **OPERATORS[name])
    results = [together(x) if held else together(x, mask)]
    assert backend.decisions(together)[0].operator == name
    assert relative_error(results[0], model(x, mask)) > 1e-6
    if not held:
        results.append(together(x, added(packed("causal", OTHERS[:1]))))
    for lengths, result in zip((LENGTHS[0], OTHERS[0]), results):
        start = 0
        for n in lengths:
            span = slice(start, start := start + n)
            alone = compiled(model, **OPERATORS[name])(x[:, span], added(packed("causal", [[n]])))
            assert relative_error(result[:, span], alone) < 1e-5


def test_padding_beside_documents() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16)
    fast = compiled(model, operator="exact")
    for padding in (6, 0, 3):
        mask = packed("causal", LENGTHS, padding)
        real = slice(0, N - padding)
        assert relative_error(fast(x, mask)[:, real], model(x, mask)[:, real]) < 1e-6
    (record,) = backend.records(fast)
    assert record.decisions[0].softmax.mask == "causal & key_padding & segments"
    assert record.guard is not None and not record.guard.broken


def test_an_operator_without_documents_says_so() -> None:
    model, x, mask = Attention("sdpa"), torch.randn(2, N, 16), packed("none", LENGTHS)
    scan = fa.scan(model, x, mask)
    answers = scan.explain(scan.softmaxes[0].name).operators
    assert answers["fma"] == answers["window"] == answers["barnes_hut"] == ""
    assert "segments is not supported" in answers["linformer"]
    fast = compiled(model, **{**FMA, "sinks": 0}, grid=(6, 8))
    assert torch.equal(fast(x, mask), model(x, mask))
    (decision,) = backend.decisions(fast)
    assert decision.operator == "exact" and "segments" in decision.reason


def test_documents_that_are_mixed_run_exact() -> None:
    model, x = Attention("sdpa"), torch.randn(2, N, 16)
    fast = compiled(model, **FMA)
    fast(x, packed("causal", LENGTHS))
    mixed = packed("causal", OTHERS)
    mixed[1, 0, 40, 4] = True  # one token looks into another document
    with pytest.warns(UserWarning, match="no longer causal & key_padding & segments"):
        assert torch.equal(fast(x, mixed), model(x, mixed))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [256, 512])
def test_inductor_counts_the_same_documents(bits: int, dtype: torch.dtype) -> None:
    """For every width of vectors; wider ones than the machine has are as narrow as it has."""

    def numbered(mask: Tensor) -> tuple[Tensor, Tensor]:
        seen = mask if dtype == torch.bool else mask > -1e4
        return documents_of(seen), any_along(seen, 1)

    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.simdlen": bits}):
        fast = torch.compile(numbered, dynamic=True)
        for lengths in ([[7, 33]], [[10, 20, 3]], [[100, 3, 9, 150]]):
            mask = packed("causal", lengths, padding=5)[:, 0]
            mask = mask if dtype == torch.bool else added(mask).to(dtype)
            for ours, wanted in zip(fast(mask), numbered(mask)):
                assert torch.equal(ours, wanted)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_documents_through_the_compiler(compiler: str) -> None:
    """Gradients, and lengths that change."""
    model = Attention("add").double()
    torch.compiler.reset()
    backend.reset()
    options = {"operator": "exact", "compiler": compiler, "quiet": True}
    fast = torch.compile(model, backend="fastattn", dynamic=True, options=options)
    for lengths in ([[7, 33]], [[10, 20, 3]], [[50, 7]]):
        x = torch.randn(1, sum(lengths[0]), 16, dtype=torch.float64, requires_grad=True)
        mask = added(packed("causal", lengths)).double()
        ours, own = (torch.autograd.grad(m(x, mask).square().sum(), x)[0] for m in (fast, model))
        assert relative_error(ours, own) < 1e-12
    (record,) = backend.records(fast)
    assert record.decisions[0].softmax.mask == "causal & segments"
    assert record.guard is not None and record.guard.calls == 3 and not record.guard.broken
