"""Masks that are data to the graph: read from the first batch, compared before every later call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn_compile as fa
from fastattn_compile import backend
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.mask_values import has_structure, structure_of

N = 48
FMA = {"operator": "fma", "block": 4, "rank": 2, "sinks": 2}


class Attention(nn.Module):
    """Self-attention whose mask is an argument, or a buffer."""

    def __init__(self, how: str, held: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.how = nn.Linear(16, 48), how
        self.register_buffer("held", held)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = self.held if mask is None else mask
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.how == "sdpa":
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.mT / 8**0.5
            scores = scores + mask if self.how == "add" else scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


def visible(text: str, batch: int = 2, n: int = N, keys: int | None = None) -> Tensor:
    """``(batch, 1, n, keys)``; padding on the right, of another length in every sequence."""
    structure = MaskStructure.parse(text)
    keys = keys or n
    seen = structure.visible(torch.arange(n)[:, None], torch.arange(keys), n, keys)[None, None]
    if structure.key_padding:
        real = torch.arange(keys) < torch.tensor([[keys - 3 * at] for at in range(batch)])
        seen = seen & real[:, None, None]
    return seen.expand(batch if structure.key_padding else 1, 1, n, keys).contiguous()


def added(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def compiled(model: Any, **options: object) -> Any:
    torch.compiler.reset()
    backend.reset()
    return torch.compile(model, backend="fastattn", options={"compiler": "eager", "quiet": True, **options})


PATTERNS = [
    "none", "causal", "causal & window(9)", "left(5)", "right(7) & left(4)",
    "causal & prefix(5)", "key_padding", "causal & key_padding", "causal & window(9) & key_padding",
]  # fmt: skip


@pytest.mark.parametrize("text", PATTERNS)
def test_patterns_are_told_from_their_values(text: str) -> None:
    seen = visible(text)[:, 0]
    assert str(structure_of(seen, padded="key_padding" in text)) == text


@pytest.mark.parametrize(
    "text", ["causal & end_aligned", "causal & window(9) & end_aligned", "causal & end_aligned & key_padding"]
)
def test_patterns_of_queries_that_continue(text: str) -> None:
    seen = visible(text, n=20, keys=50)[:, 0]
    assert structure_of(seen, padded="key_padding" in text) == MaskStructure.parse(text)


def test_what_has_no_structure_is_told() -> None:
    torch.manual_seed(0)
    assert structure_of(torch.rand(2, 30, 30) > 0.5, padded=True) is None
    assert structure_of(torch.zeros(2, 30, 30, dtype=torch.bool), padded=True) is None
    holed = visible("causal")[:, 0].clone()
    holed[0, 20, 7] = False
    assert structure_of(holed, padded=False) is None
    assert not has_structure(holed, MaskStructure(right=0))


@pytest.mark.parametrize("how", ["add", "fill", "sdpa"])
@pytest.mark.parametrize("text", ["causal", "causal & key_padding", "key_padding", "causal & window(9)"])
def test_a_mask_that_is_an_argument_is_understood(how: str, text: str) -> None:
    model, x = Attention(how), torch.randn(2, N, 16)
    seen = visible(text)
    mask = added(seen) if how == "add" else seen
    (line,) = fa.scan(model, x, mask).softmaxes
    assert (line.status, line.mask, line.checked) == ("taken", text, True)
    exact = compiled(model, operator="exact")
    assert torch.allclose(exact(x, mask), model(x, mask), atol=1e-6)
    assert backend.decisions(exact)[0].operator == "exact" and backend.records(exact)[0].guard is not None
    fast = compiled(model, **FMA)
    near = fast(x, mask)
    assert backend.decisions(fast)[0].operator == "fma"
    # The keys are no longer met one by one, but their padding stays without influence.
    assert not torch.equal(near, model(x, mask)) and torch.isfinite(near).all()
    if "key_padding" in text:
        hidden = x.clone()
        hidden[1, N - 3 :] = 50.0
        assert torch.allclose(fast(hidden, mask)[1, : N - 3], near[1, : N - 3], atol=1e-5)


def test_padding_is_that_of_every_batch() -> None:
    model, x = Attention("add"), torch.randn(2, N, 16)
    fast = compiled(model, operator="exact")
    for padding in (0, 5, 11):
        seen = visible("causal").repeat(2, 1, 1, 1)
        seen[1, :, :, N - padding :] = False
        mask = added(seen)
        assert torch.allclose(fast(x, mask), model(x, mask), atol=1e-6)
    (record,) = backend.records(fast)
    assert record.guard is not None and record.guard.calls == 3 and not record.guard.broken
    assert record.decisions[0].softmax.mask == "causal & key_padding"


def test_another_mask_runs_the_graph_as_it_was() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16, requires_grad=True)
    fast = compiled(model, **FMA)
    fast(x, visible("causal"))
    torch.manual_seed(1)
    noise = (torch.rand(1, 1, N, N) > 0.5) | torch.eye(N, dtype=torch.bool)
    with pytest.warns(UserWarning, match="no longer causal"):
        got = fast(x, noise)
    assert torch.equal(got, model(x, noise))
    ours, own = (torch.autograd.grad(out.sum(), x)[0] for out in (got, model(x, noise)))
    assert torch.equal(ours, own)
    (record,) = backend.records(fast)
    assert record.guard is not None and record.guard.broken == {record.decisions[0].name: 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        fast(x, noise)
        again = fast(x, visible("causal"))
    assert not torch.equal(again, model(x, visible("causal")))


@pytest.mark.parametrize("where", ["argument", "buffer", "another name"])
def test_a_mask_that_is_changed_in_place_is_noticed(where: str) -> None:
    mask = added(visible("causal & key_padding"))
    model, x = Attention("add", mask if where == "buffer" else None), torch.randn(2, N, 16)
    given = () if where == "buffer" else (mask,)
    fast = compiled(model, **FMA)
    for _ in range(2):
        assert not torch.equal(fast(x, *given), model(x, *given))
    alias = model.held if where == "buffer" else mask[0] if where == "another name" else mask
    with torch.no_grad():
        alias[..., 30, 4] = torch.finfo(torch.float32).min
    with pytest.warns(UserWarning, match="no longer causal"):
        assert torch.equal(fast(x, *given), model(x, *given))


def test_a_mask_without_structure_stays_exact() -> None:
    model, x = Attention("fill"), torch.randn(2, N, 16)
    noise = torch.rand(1, 1, N, N) > 0.5
    noise |= torch.eye(N, dtype=torch.bool)
    fast = compiled(model, **FMA)
    assert torch.equal(fast(x, noise), model(x, noise))
    (decision,) = backend.decisions(fast)
    assert decision.operator == "exact" and "data over queries and keys" in decision.reason
    assert backend.records(fast)[0].guard is None


def test_a_bias_stays_a_bias() -> None:
    """Values that are added to visible keys: the structure is told, no operator takes the site."""
    model, x = Attention("add"), torch.randn(2, N, 16)
    mask = added(visible("causal")) + torch.randn(N, N)
    (line,) = fa.scan(model, x, mask).softmaxes
    assert (line.status, line.mask, line.site.spec.bias) == ("exact", "causal", "dense")
    fast = compiled(model, **FMA)
    assert torch.equal(fast(x, mask), model(x, mask))


def test_the_check_can_be_left_out() -> None:
    model, x, mask = Attention("fill"), torch.randn(2, N, 16), visible("causal")
    fast = compiled(model, check_masks=False, **FMA)
    assert torch.equal(fast(x, mask), model(x, mask))
    assert backend.decisions(fast)[0].operator == "exact"


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_lengths_that_change_and_gradients(compiler: str) -> None:
    model = Attention("add")
    fast = torch.compile(
        model,
        backend="fastattn",
        dynamic=True,
        options={"operator": "exact", "compiler": compiler, "quiet": True},
    )
    torch.compiler.reset()
    backend.reset()
    for n in (40, 33, 57):
        x = torch.randn(2, n, 16, requires_grad=True)
        mask = added(visible("causal & key_padding", n=n))
        results = [
            (out, *torch.autograd.grad(out.sum(), [x, *model.parameters()]))
            for out in (fast(x, mask), model(x, mask))
        ]
        for got, wanted in zip(*results):
            assert torch.allclose(got, wanted, atol=1e-5)
    assert len(backend.records(fast)) == 1 and backend.records(fast)[0].guard.calls == 3


def test_masks_behind_a_graph_break() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention("add")

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            mask = torch.full((n, n), -torch.inf).triu(1)
            torch._dynamo.graph_break()
            return self.attention(x, mask)

    model, x = Broken(), torch.randn(2, N, 16)
    fast = compiled(model, operator="exact")
    assert torch.allclose(fast(x), model(x), atol=1e-6)
    (decision,) = backend.decisions(fast)
    assert decision.softmax.mask == "causal" and decision.softmax.checked


def test_one_buffer_at_two_lengths_is_looked_at_twice() -> None:
    """A window that holds up to 40 tokens, of which a shorter sequence reads the corner."""

    class Sliced(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            n = x.shape[1]
            return super().forward(x, mask[:n, :n])

    whole = visible("causal")[0, 0].clone()
    whole[45, 3] = False
    model = Sliced("add")
    mask = added(whole)
    torch.compiler.reset()
    backend.reset()
    options = {"compiler": "eager", "quiet": True, "operator": "exact"}
    fast = torch.compile(model, backend="fastattn", dynamic=True, options=options)
    short, long = torch.randn(2, 40, 16), torch.randn(2, 47, 16)
    assert torch.allclose(fast(short, mask), model(short, mask), atol=1e-6)
    with pytest.warns(UserWarning, match="no longer causal"):
        assert torch.equal(fast(long, mask), model(long, mask))
    (record,) = backend.records(fast)
    assert record.decisions[0].softmax.checked


def test_a_bias_that_is_trained_is_no_mask() -> None:
    model, x = Attention("add"), torch.randn(2, N, 16)
    bias = torch.zeros(1, 1, N, N, requires_grad=True)
    fast = compiled(model, operator="exact")
    (gradient,) = torch.autograd.grad(fast(x, bias).square().sum(), bias)
    assert gradient.abs().max() > 0
    assert backend.records(fast)[0].guard is None


def test_steps_against_a_cache_say_their_keys_anew() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    fast = compiled(step, operator="exact")
    q, k, v = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 30, 8)
    for seen in (7, 8, 9):
        mask = added((torch.arange(30) < seen)[None, None, None])
        assert torch.allclose(fast(q, k, v, mask), step(q, k, v, mask), atol=1e-6)
    (record,) = backend.records()
    assert record.decisions[0].softmax.mask == "key_padding"
    assert record.guard is not None and record.guard.calls == 3 and not record.guard.broken
