"""Every spelling of attention is found, its mask understood, and its rewrite equals the original; nothing else is taken."""

from __future__ import annotations

import pytest
import spellings
import torch
from oracle import assert_as_good_as

import fastattn_compile as fa
from fastattn_compile.backend import decisions, reset

N, HEADS, DIM = 40, 4, 16


def tensors(n: int = N, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, HEADS, n, DIM, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    )


def compiled(fn, dynamic: bool = False, **options):
    torch.compiler.reset()
    reset()
    options = {"compiler": "eager", "quiet": True, **options}
    return torch.compile(fn, backend="fastattn", options=options, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", spellings.POSITIVE)
def test_rewrite_is_exact(name: str, dynamic: bool) -> None:
    fn, mask = spellings.POSITIVE[name]
    fast = compiled(fn, dynamic, operator="exact", strict=True)
    for n in (N, N + 17) if dynamic else (N,):
        q, k, v = tensors(n)
        assert_as_good_as(fast(q, k, v), oracle=fn(*tensors(n, torch.float64)), formula=fn(q, k, v))
    (decision,) = {d.name: d for d in decisions()}.values()
    assert decision.operator == "exact" and decision.softmax.status == "taken"
    assert decision.softmax.mask == mask
    assert decision.softmax.source.startswith("spellings.py:") or "spellings.py:" in decision.softmax.source


@pytest.mark.parametrize("name", spellings.POSITIVE)
def test_gradients_of_the_rewrite(name: str) -> None:
    fn, _ = spellings.POSITIVE[name]

    def gradients(run, dtype=torch.float32):
        inputs = [x.requires_grad_() for x in tensors(dtype=dtype)]
        out = run(*inputs)
        return torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum(), inputs
        )

    fast = compiled(fn, operator="exact", strict=True, compiler="aot_eager")
    for got, oracle, formula in zip(gradients(fast), gradients(fn, torch.float64), gradients(fn)):
        assert_as_good_as(got, oracle=oracle, formula=formula)


@pytest.mark.parametrize("name", spellings.NEGATIVE)
def test_nothing_else_is_taken(name: str) -> None:
    fn = spellings.NEGATIVE[name]
    found = fa.scan(fn, *tensors())
    assert found.counts["taken"] == found.counts["exact"] == 0
    for line in found.softmaxes:
        assert line.status == "not_attention" and line.reason and line.source
    torch.testing.assert_close(compiled(fn, operator="exact")(*tensors()), fn(*tensors()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["matmul_div", "causal_inplace", "sdpa_causal", "grouped_expand", "sliding_window"]
)
def test_an_approximating_operator_really_runs(name: str) -> None:
    """With blocks that leave a far field, FMA changes the output: the replaced path is the one that runs."""
    fn, _ = spellings.POSITIVE[name]
    q, k, v = tensors()
    out = compiled(fn, operator="fma", block=4, rank=1, sinks=0, strict=True)(q, k, v)
    assert not torch.allclose(out, fn(q, k, v), atol=1e-4)
    whole = compiled(fn, operator="fma", block=64, rank=1, sinks=0, strict=True)(q, k, v)
    assert_as_good_as(whole, oracle=fn(*tensors(dtype=torch.float64)), formula=fn(q, k, v))


def test_weights_that_are_read_keep_the_site() -> None:
    def returns_weights(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    (line,) = fa.scan(returns_weights, *tensors()).softmaxes
    assert line.status == "exact" and "weights" in line.reason


def test_talking_heads_are_kept() -> None:
    mix = torch.randn(HEADS, HEADS)

    def talking(q, k, v):
        s = torch.einsum("bhqk,hg->bgqk", q @ k.mT, mix)
        return s.softmax(-1) @ v

    (line,) = fa.scan(talking, *tensors()).softmaxes
    assert line.status in ("exact", "not_attention") and line.reason


def test_cross_attention_of_equal_length_is_not_self_attention() -> None:
    class Cross(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(DIM, DIM), torch.nn.Linear(DIM, DIM)

        def forward(self, x, memory):
            k = self.k(memory)
            return torch.nn.functional.scaled_dot_product_attention(self.q(x), k, k)

    x, memory = torch.randn(2, N, DIM), torch.randn(2, N, DIM)
    (line,) = fa.scan(Cross(), x, memory).softmaxes
    assert line.kind == "cross" and line.status == "exact"
    (line,) = fa.scan(Cross(), x, x).softmaxes
    assert line.kind == "self"
