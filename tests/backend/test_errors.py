"""What a user sees of an error inside torch.compile: our type and our words, not those of the compiler."""

from __future__ import annotations

import pytest
import torch
from backend.common import compiled
from torch import nn
from torch.nn import functional as F

from fastattn_compile import backend
from fastattn_compile.errors import InternalError, OptionError, UnsupportedSiteError


class Attends(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.randn(16, 16))


Q = torch.randn(1, 2, 16, 8)


def test_a_bad_option_keeps_its_type() -> None:
    with pytest.raises(OptionError, match=r"^unknown option blok"):
        compiled(Attends(), blok=3)(Q)


def test_a_refusal_keeps_its_type() -> None:
    with pytest.raises(UnsupportedSiteError, match=r"^strict: 1 attention site"):
        compiled(Attends(), operator="fma", strict=True)(Q)


def test_a_bug_says_that_it_is_one(monkeypatch) -> None:
    def broken(*_, **__):
        raise IndexError("list index out of range")

    monkeypatch.setattr(backend, "analyse", broken)
    with pytest.raises(InternalError, match=r"find and replace.*IndexError: list index.*please report"):
        compiled(Attends(), operator="fma")(Q)


def test_what_torch_raises_to_steer_itself_passes(monkeypatch) -> None:
    class Steering(Exception):
        __module__ = "torch.fx.experimental.symbolic_shapes"

    def guarded(*_, **__):
        raise Steering("data-dependent")

    monkeypatch.setattr(backend, "analyse", guarded)
    with pytest.raises(Exception, match="data-dependent") as caught:
        compiled(Attends(), operator="fma")(Q)
    assert not isinstance(caught.value, InternalError)
