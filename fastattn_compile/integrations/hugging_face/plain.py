"""A routed model as it was, for a while: to look for its softmaxes, or to measure against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "fastattn"


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Gives a model with ``attn_implementation="fastattn"`` transformers' ``sdpa`` attention inside the block.

    Args:
        model: Any model; one with another attention is left alone.
    """
    inner = getattr(model, "_orig_mod", model)
    routed = getattr(getattr(inner, "config", None), "_attn_implementation", None) == NAME
    if not routed or not hasattr(inner, "set_attn_implementation"):
        yield
        return
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(NAME)
