"""Sites that stay exact, written as SDPA with their mask as structure: the same attention, nothing of the scores' size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backend.common import compiled
from capture import capture
from oracle import assert_as_good_as, cast, make_inputs
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn_compile.backend as backend
from fastattn_compile.lowering.sdpa import structured_sdpa
from fastattn_compile.operators.exact.reference import exact_attention

MASKS = (
    "none", "causal", "key_padding", "causal & key_padding", "causal & window(40)", "right(9) & left(30)",
    "causal & chunk(100)", "causal & segments", "causal & prefix(50) & key_padding", "causal & end_aligned",
)  # fmt: skip


def served(x, dropout: float = 0.0) -> torch.Tensor:
    return structured_sdpa(x.query, x.key, x.value, x.key_padding, x.segments, x.scale, str(x.mask), dropout)


@pytest.mark.parametrize("mask", MASKS)
def test_forward_and_gradients(mask: str) -> None:
    # Several stretches, the last of them short.
    length = 600
    x = make_inputs(mask, length=length, key_len=700 if "end" in mask else None)

    def everything(inputs, call) -> list[torch.Tensor]:
        given = [t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
        inputs = type(inputs)(*given, inputs.scale, inputs.mask, inputs.key_padding, inputs.segments)
        out = call(inputs)
        seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).sin().to(out.dtype)
        return [out.detach(), *torch.autograd.grad((out * seed).sum(), given)]

    def formula(inputs):
        return exact_attention(inputs).out

    def library(inputs):
        # Without a mask tensor the site becomes one call of PyTorch's flash kernel: its own error is the measure.
        key, value = (t.repeat_interleave(inputs.group, 1) for t in (inputs.key, inputs.value))
        flags = {"is_causal": inputs.mask.causal, "scale": inputs.scale}
        return F.scaled_dot_product_attention(inputs.query, key, value, **flags)

    got, typical = everything(x, served), everything(x, library if mask in ("none", "causal") else formula)
    oracle = everything(cast(x, torch.float64), formula)
    for name, a, b, c in zip(("output", "query", "key", "value"), got, oracle, typical):
        assert_as_good_as(a, oracle=b, formula=c, name=f"{mask}: {name}")


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = make_inputs("causal & window(8)", batch=1, length=300)
    many = dataclasses.replace(
        x, **{name: getattr(x, name).expand(400, -1, -1, -1) for name in ("query", "key", "value")}
    )
    wanted, drawn = served(x)[0], served(many, dropout=0.5)
    assert not torch.equal(drawn[0], drawn[1])
    # The mean of 400 draws is as far from the expectation as its own standard error says.
    error = (drawn.mean(0) - wanted).abs().mean() / (drawn.std(0).mean() / 400**0.5)
    assert 0.5 < float(error) < 1.1


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that was made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.elements = max(self.elements, x.numel())
        return result


class Written(nn.Module):
    """Grouped-query attention as model code spells it, with a mask of the size of the scores."""

    def __init__(self, window: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 64)
        self.window, self.dropout = window, dropout

    def forward(self, x, real=None):
        batch, n, _ = x.shape
        q, k, v = self.qkv(x).split([32, 16, 16], -1)
        q, k, v = (y.view(batch, n, -1, 8).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        i = torch.arange(n)
        seen = (i[None] <= i[:, None])[None, None]
        if self.window:
            seen = seen & (i[None] > i[:, None] - self.window)
        if real is not None:
            seen = seen & real[:, None, None]
        scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, torch.finfo(x.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return (weights @ v).transpose(1, 2).reshape(batch, n, 32)


EXACT = {"exact_fuse": True, "quiet": True, "plan": {"schema": "fastattn.plan/1", "sites": {}}}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 50])
def test_no_tensor_of_the_size_of_the_scores(window: int | None, padded: bool) -> None:
    n = 2048
    model, x = Written(window), torch.randn(2, n, 32)
    real = torch.ones(2, n, dtype=torch.bool)
    real[0, 2010:] = False  # fewer than the window: every query sees a key
    given = (x, real) if padded else (x,)
    with torch.no_grad():
        ((gm, inputs),) = capture(model, *given)
        with Largest() as before:
            (wanted,) = gm(*inputs)
        backend.reset()
        # Dynamo steps aside under a dispatch mode, so the backend is called on the graph it would get.
        fast = backend.fastattn(gm, inputs, options={"compiler": "eager", **EXACT})
        with Largest() as after:
            (got,) = fast(*inputs)
    torch.testing.assert_close(got, wanted)
    assert before.elements >= n * n > after.elements
    (decision,) = backend.decisions()
    assert decision.operator == "exact" and "written as SDPA, mask causal" in decision.reason


def test_gradients_through_inductors_front_end() -> None:
    model, x = Written(50).double(), torch.randn(2, 300, 32, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    fast = compiled(model, exact_fuse=True, compiler="aot_eager")
    got = torch.autograd.grad(fast(x).sin().sum(), list(model.parameters()))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_lengths_that_vary(compiler: str) -> None:
    model, graphs = Written(50), []
    for fuse in (False, True):
        fast = compiled(model, dynamic=True, **{**EXACT, "compiler": compiler, "exact_fuse": fuse})
        with torch.no_grad():
            for n in (300, 400, 700):
                x = torch.randn(1, n, 32)
                torch.testing.assert_close(fast(x), model(x))
        graphs.append(len(backend.records()))
    assert graphs[1] == graphs[0] < 3


def test_dropout_is_kept() -> None:
    model, x = Written(dropout=0.5).train(), torch.randn(2, 64, 32)
    fast = compiled(model, exact_fuse=True)
    with torch.no_grad():
        assert not torch.equal(fast(x), fast(x))
    assert "written as SDPA" in backend.decisions()[0].reason


def test_an_operator_that_serves_comes_first() -> None:
    model, x = Written(), torch.randn(2, 256, 32)
    with torch.no_grad():
        compiled(model, exact_fuse=True, operator="fma", block=16)(x)
    assert [d.operator for d in backend.decisions()] == ["fma"]
