"""The attention function of ``attn_implementation="fastattn"``: each module's attention by what its route says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.integrations.hugging_face.cache import decode_step, start_decoding
from fastattn_compile.integrations.hugging_face.mask import StructuredMask
from fastattn_compile.integrations.hugging_face.route import CROSS, ROUTE, Route, note, parameters_of
from fastattn_compile.lowering.sdpa import serves, structured_sdpa
from fastattn_compile.operators.base import AttentionInputs, SiteSpec
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator

_EXACT = make_operator("exact")
_UNROUTED = Route("", None, "no operator and no plan for this model: see fastattn_compile.route")


@dataclass(frozen=True)
class _Call:
    """One call of the attention function.

    Args:
        spec: The site as operators see it.
        structure: Its mask.
        mask: The mask object with the facts that travel along, ``None`` without one.
        key: Keys that any query may see.
        value: Values likewise.
        scale: Factor on the scores.
        why: What keeps every operator away, empty when nothing does.
    """

    spec: SiteSpec
    structure: MaskStructure
    mask: StructuredMask | None
    key: Tensor
    value: Tensor
    scale: float
    why: str


def fastattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in the signature of transformers' ``AttentionInterface``.

    Args:
        module: The attention module; its route was put there by ``route``.
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, kv_heads, keys, head_dim)``.
        value: ``(batch, kv_heads, keys, value_dim)``.
        attention_mask: What ``structured_mask`` made, a 4-D tensor of the model's own, or ``None``: then a causal module
            is causal, as with every implementation of transformers.
        dropout: Probability of dropout on the weights.
        scaling: Factor on the scores; ``head_dim ** -0.5`` when ``None``.
        is_causal: Overrides the module's own flag.
        **kwargs: ``softcap``, ``s_aux`` (sink logits) and ``position_bias`` change the scores; others are not read.

    Returns:
        Output ``(batch, queries, heads, value_dim)``, and attention weights where the model's own eager code computed it.

    Raises:
        UnsupportedSiteError: The route is strict, and its operator cannot serve the site; or the attention needs
            something that neither SDPA nor the model's own code computes.
    """
    route: Route = getattr(module, ROUTE, _UNROUTED)
    stepped = decode_step(query, key, value)
    if stepped is not None:
        return stepped.transpose(1, 2).contiguous(), None
    call = _read(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    operator, reason = route.operator, route.reason
    if operator is not None and operator.name != "exact":
        parameters = parameters_of(module, operator)
        refusal = call.why
        if not refusal and operator.learned and not parameters:
            refusal = f"{operator} has learned parameters and none are attached here; call fa.attach first"
        if not refusal:
            refusal = operator.supports(call.spec).reason
        if not refusal:
            out, how = start_decoding(key, operator, parameters, _inputs(query, call), route.name)
            note(route, operator, reason + how, call.spec)
            if out is None:
                out = _by_operator(route, operator.token, operator.name, parameters, query, call)
            return out.transpose(1, 2).contiguous(), None
        # A decoding step has one query: exact attention is linear there already, and nothing was asked of it.
        reason, decoding = refusal, query.shape[2] == 1 and key.shape[2] > 1
        if route.strict and query.shape[2] > 1:
            raise UnsupportedSiteError(f"strict: {route.name} cannot be served by {operator.name}: {refusal}")
        if decoding:
            return _as_it_was(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    note(route, None, reason, call.spec)
    if call.mask is not None and not call.why and serves(call.spec):
        out = _by_structure(route, query, call)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    return _as_it_was(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)


def _read(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: StructuredMask | Tensor | None,
    dropout: float, scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> _Call:  # fmt: skip
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    mask, why = None, ""
    cross = bool(getattr(module, CROSS, False))
    if isinstance(given, StructuredMask):
        mask, structure = given, given.structure
        if given.key_length > keys or given.query_length != queries:
            why = f"the mask is for {given.query_length} x {given.key_length}, the scores are {queries} x {keys}"
        key, value = key[:, :, : given.key_length], value[:, :, : given.key_length]
        if structure.end_aligned and key.shape[2] == queries:
            structure = MaskStructure(**{**vars(structure), "end_aligned": False})
    elif given is not None:
        structure = MaskStructure(opaque="it is a 4-D tensor")
    elif queries > 1 and causal and not cross:
        # Causality guard: no mask does not mean that the future is visible.
        structure = CAUSAL
        if queries != keys:
            why = f"{queries} causal queries and {keys} keys without a mask that says where the queries stand"
    else:
        structure = NO_MASK
    softcap, bias = kwargs.get("softcap"), kwargs.get("position_bias")
    spec = SiteSpec(
        query.shape[0], query.shape[1], key.shape[1], queries, key.shape[2], query.shape[3], value.shape[3],
        value.dtype, value.device.type,
        kind="cross" if cross or queries != key.shape[2] else "self",
        mask=structure,
        bias="none" if bias is None else "dense",
        softcap=0.0 if softcap is None else float(softcap),
        sink_logits=kwargs.get("s_aux") is not None,
        dropout=dropout,
        weights_used=bool(kwargs.get("output_attentions")),
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not why and not structure.understood:
        why = f"the mask is not understood as structure ({structure.opaque})"
    return _Call(spec, structure, mask, key, value, scale, why)


def _inputs(query: Tensor, call: _Call) -> AttentionInputs:
    facts = (None, None) if call.mask is None else (call.mask.key_padding, call.mask.segments)
    padding, segments = (None if fact is None else fact.to(query.device) for fact in facts)
    return AttentionInputs(query, call.key, call.value, call.scale, call.structure, padding, segments)


def _by_operator(
    route: Route, token: str, name: str, parameters: tuple[Tensor, ...], query: Tensor, call: _Call
) -> Tensor:
    x = _inputs(query, call)
    out: Tensor = torch_op(name)(
        x.query, x.key, x.value, x.key_padding, x.segments, None, list(parameters), x.scale, str(x.mask), token,
        route.name,
    )[0]  # fmt: skip
    return out


def _by_structure(route: Route, query: Tensor, call: _Call) -> Tensor | None:
    """Exact attention without a mask of the size of the scores; ``None`` where plain SDPA needs none either."""
    if call.structure in (NO_MASK, CAUSAL) and query.shape[2] == call.key.shape[2]:
        return None
    if not torch.compiler.is_compiling():
        x = _inputs(query, call)
        facts = x.key_padding, x.segments
        return structured_sdpa(x.query, x.key, x.value, *facts, x.scale, str(x.mask), call.spec.dropout)
    # The operator is one node of the graph, whatever the lengths.
    on_cpu = query.device.type == "cpu" and not call.spec.dropout
    return _by_operator(route, _EXACT.token, "exact", (), query, call) if on_cpu else None


def _as_it_was(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: StructuredMask | Tensor | None,
    dropout: float, scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention as the model computes it without us: by SDPA, or by its own eager code where SDPA cannot."""
    if isinstance(given, StructuredMask):
        key, value = key[:, :, : given.key_length], value[:, :, : given.key_length]
        plain = given.structure in (NO_MASK, CAUSAL) and query.shape[2] == key.shape[2]
        is_causal = given.structure.causal if plain else False
        given = None if plain else given.dense(query.device)
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, given, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return found
    eager = _eager_of(module)
    if (
        given is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        given = StructuredMask(CAUSAL, query.shape[0], query.shape[2], key.shape[2]).dense(query.device)
    if given is not None and given.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        given = torch.where(given, zero, torch.finfo(query.dtype).min)
    computed: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, given, dropout=dropout, scaling=scaling, **kwargs
    )
    return computed


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function beside the module's class."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedSiteError(
            f"{type(module).__name__} has a soft cap or sink logits, which SDPA does not compute, and no eager attention "
            'of its own; load the model with attn_implementation="eager" and use torch.compile(backend="fastattn")'
        )
    found: Callable[..., Any] = eager
    return found
