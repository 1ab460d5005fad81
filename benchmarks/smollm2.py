"""SmolLM2-135M with every attention replaced by one operator, each layer with parameters of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.cli.demo import model_file
from fastattn_compile.cli.load import Loaded, load
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.text import CALIBRATION, stdlib_text

_NAME = "fastattn_direct"
Parameters = tuple[Tensor, ...]
# Layer, query, key, value and scale to the output of the attention.
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def loaded(length: int) -> Loaded:
    """The model and the evaluation text."""
    return load(str(model_file()), length=length)


def site(model: Any, length: int) -> SiteSpec:
    """One attention of the model over ``length`` tokens."""
    shape = model.config
    heads, kv_heads, d = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    return SiteSpec(1, heads, kv_heads, length, length, d, d, mask=CAUSAL)


@contextmanager
def attention(model: Any, served: Attention) -> Iterator[None]:
    """Every attention of a transformers model, causal, goes through a function."""
    import transformers

    def direct(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return served(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    # No mask function is registered for this name: the mask is not made, the operator knows it is causal.
    transformers.AttentionInterface.register(_NAME, direct)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def by_operator(operator: Operator, parameters: dict[int, Parameters]) -> Attention:
    """The operator with the parameters of each layer."""

    def served(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        given = parameters.get(layer, ())
        return attend(q, k, v, operator, scale=scale, mask=CAUSAL, parameters=given)[0]

    return served


@torch.no_grad()
def captured(model: Any, ids: Tensor) -> dict[int, AttentionInputs]:
    """Query, key and value of every layer, from one exact pass."""
    found: dict[int, AttentionInputs] = {}
    exact = by_operator(make_operator("exact"), {})

    def served(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found[layer] = AttentionInputs(q.contiguous(), k.contiguous(), v.contiguous(), scale, CAUSAL)
        return exact(layer, q, k, v, scale)

    with attention(model, served):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def started(operator: Operator, spec: SiteSpec, samples: dict[int, AttentionInputs]) -> dict[int, Parameters]:
    """Parameters of every layer as the operator starts them from the layer's sample."""
    return {
        layer: tuple(operator.initial_parameters(spec, sample).values()) for layer, sample in samples.items()
    }


def calibration_ids(length: int) -> Tensor:
    """Tokens of the calibration text, which shares no module with the evaluation text."""
    return text_ids(length, CALIBRATION)


def text_ids(length: int, modules: Sequence[str]) -> Tensor:
    """The first tokens of some modules of the standard library, ``(1, length)``."""
    from transformers import AutoTokenizer

    file = model_file()
    options = {} if file.is_dir() else {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file if file.is_dir() else file.parent), **options)
    ids = tokenizer(stdlib_text(16 * length, modules), verbose=False)["input_ids"][:length]
    return torch.tensor([ids])


def config_difference(operator: Operator) -> dict[str, Any]:
    """Options that are not the defaults."""
    default = type(operator)().config
    return {
        f.name: getattr(operator.config, f.name)
        for f in dataclasses.fields(operator.config)
        if getattr(operator.config, f.name) != getattr(default, f.name)
    }
