"""Attention hidden in one opaque call, written out in ordinary torch functions.

``nn.MultiheadAttention`` reaches Dynamo as one ``multi_head_attention_forward`` (in inference often as
``_native_multi_head_attention``), ``nn.TransformerEncoderLayer`` in inference as
``_transformer_encoder_layer_fwd``. Each is replaced by the graph of an equivalent function below, run on
proxies: with ``scaled_dot_product_attention`` where nobody reads the attention weights, with a softmax where
somebody does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch.fx.proxy import GraphAppendingTracer, Proxy

from fastattn_compile.passes.fx_meta import example, fake_mode, propagate
from fastattn_compile.passes.fx_vocabulary import bind_arguments, target_name


class _NotExpanded(Exception):
    """The call stays as it is; the text says why."""


@dataclass(frozen=True)
class _Opaque:
    """A call to be expanded.

    Args:
        arguments: By name; tensors and symbolic numbers are proxies.
        values: The fake values of the same arguments.
        weights_read: Something reads the attention weights it returns.
    """

    arguments: Mapping[str, Any]
    values: Mapping[str, Any]
    weights_read: bool

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def take(self, *names: str) -> Any:
        """Several arguments, ``None`` for those that are absent."""
        return tuple(self.arguments.get(name) for name in names)

    def is_boolean(self, name: str) -> bool:
        """Whether a mask is boolean."""
        return self.values[name].dtype == torch.bool

    def rank(self, name: str) -> int:
        """Number of dimensions of a tensor argument."""
        return int(self.values[name].dim())


def expand(gm: torch.fx.GraphModule) -> list[tuple[torch.fx.Node, str]]:
    """Replaces opaque attention calls by equivalent graphs. Results agree to rounding.

    Args:
        gm: A Dynamo or ATen graph with fake values; changed in place and recompiled.

    Returns:
        The opaque calls that stay, each with the reason.
    """
    kept: list[tuple[torch.fx.Node, str]] = []
    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        name, known = target_name(node)
        expansion = _EXPANSIONS.get(name) if known else None
        if expansion is None:
            continue
        try:
            made = _replace(node, expansion)
            if name in _INSIDE:
                _deepen(made, _INSIDE[name])
            changed = True
        except _NotExpanded as reason:
            kept.append((node, str(reason)))
    if changed:
        gm.graph.lint()
        gm.recompile()
    return kept


def _deepen(nodes: list[torch.fx.Node], child: str) -> None:
    """Says of nodes that a child of their module made them, as it would where the module is not one call."""
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()), ("",))[0]
        inner = (f"{path}.{child}" if path else child, torch.nn.MultiheadAttention)
        node.meta["nn_module_stack"] = {**stack, inner[0]: inner}


def _replace(node: torch.fx.Node, expansion: Callable[[_Opaque], Any]) -> list[torch.fx.Node]:
    mode = fake_mode(node.all_input_nodes)
    if mode is None:
        raise _NotExpanded("the graph has no fake tensors to take shapes from")
    arguments = {name: value for name, value in bind_arguments(node).items() if value is not None}
    values = {k: example(v) if isinstance(v, torch.fx.Node) else v for k, v in arguments.items()}
    if any(x.is_nested or x.layout != torch.strided for x in values.values() if isinstance(x, torch.Tensor)):
        raise _NotExpanded("its inputs are nested or sparse tensors")
    elements = isinstance(example(node), tuple)
    if elements and any(user.target is not operator.getitem for user in node.users):
        raise _NotExpanded("its result is passed on as a whole")
    weights_read = elements and any(user.args[1] in (1, -1) and user.users for user in node.users)
    graph = node.graph
    tracer = GraphAppendingTracer(graph)
    before = set(graph.nodes)
    try:
        with graph.inserting_before(node):
            # One proxy a node: the expansions ask whether query, key and value are the same tensor.
            proxies = {v: Proxy(v, tracer) for v in arguments.values() if isinstance(v, torch.fx.Node)}
            operands = {k: proxies[v] if isinstance(v, torch.fx.Node) else v for k, v in arguments.items()}
            result = expansion(_Opaque(operands, values, weights_read))
        if weights_read and result[1] is None:
            raise _NotExpanded("weights are read that it was not asked for")
        made = [n for n in graph.nodes if n not in before]
        propagate(made, node, mode)
    except Exception as error:
        for new in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(new)
        if isinstance(error, _NotExpanded):
            raise
        raise _NotExpanded(f"its expansion does not run: {error}") from error
    if not elements:
        node.replace_all_uses_with(result[0].node)
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(result[user.args[1]].node)
        graph.erase_node(user)
    graph.erase_node(node)
    return made


def _split_heads(x: Any, heads: int) -> Any:
    """``(batch, n, heads * d)`` to ``(batch, heads, n, d)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Any) -> Any:
    """``(batch, heads, n, d)`` to ``(batch, n, heads * d)``."""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class _Mask:
    """A mask that broadcasts with ``(batch, heads, n, m)``.

    Args:
        tensor: Boolean, true hides; or added to the scores; ``None`` for no mask.
        boolean: Which of the two.
        causal: Keys after the query are hidden too.
    """

    tensor: Any = None
    boolean: bool = False
    causal: bool = False


def _attend(
    qkv: tuple[Any, Any, Any], head_dim: int, mask: _Mask, dropout: Any, weights_read: bool
) -> tuple[Any, Any]:
    """Attention on ``(batch, heads, n, d)``.

    Args:
        qkv: Queries, keys and values.
        head_dim: Their channels: the scale is its inverse square root.
        mask: Which scores count; never causal where the weights are read.
        dropout: On the weights; a number or a proxy of one.
        weights_read: The weights are asked for too.

    Returns:
        Output ``(batch, heads, n, d)``, and the weights or ``None``.
    """
    q, k, v = qkv
    bias, scale = mask.tensor, head_dim**-0.5
    if not weights_read:
        bias = torch.logical_not(bias) if mask.boolean else bias
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout, mask.causal, scale=scale)
        return out, None
    scores = torch.matmul(q * scale, k.transpose(-2, -1))
    if mask.boolean:
        scores = scores.masked_fill(bias, -math.inf)
    elif bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    if not (isinstance(dropout, float) and dropout == 0.0):
        weights = F.dropout(weights, dropout, training=True)
    return torch.matmul(weights, v), weights


def _joint_mask(call: _Opaque) -> _Mask:
    """The masks of ``multi_head_attention_forward`` as one."""
    masks = {}
    if call["attn_mask"] is not None:
        mask = call["attn_mask"]
        # (n, m) for all, or (batch * heads, n, m).
        flat = call.rank("attn_mask") == 2
        masks["attn_mask"] = mask if flat else mask.unflatten(0, (-1, call["num_heads"]))
    if call["key_padding_mask"] is not None:
        mask = call["key_padding_mask"]
        mask = mask[None] if call.rank("key_padding_mask") == 1 else mask
        masks["key_padding_mask"] = mask[:, None, None, :]
    if not masks:
        return _Mask()
    boolean = all(call.is_boolean(name) for name in masks)
    if not boolean:
        dtype = call.values["query"].dtype
        for name, mask in masks.items():
            if call.is_boolean(name):
                masks[name] = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    first, *rest = masks.values()
    if not rest:
        return _Mask(first, boolean)
    return _Mask(torch.logical_or(first, rest[0]) if boolean else first + rest[0], boolean)


def _project(call: _Opaque, inputs: tuple[Any, Any, Any], weights: Any, biases: Any) -> Any:
    """Queries, keys and values ``(batch, n, width)`` from inputs: as few products as equal inputs allow.

    Args:
        call: The call.
        inputs: What to project.
        weights: All three weights in one, ``(3 * width, width)``, or a tuple of three.
        biases: All three biases in one, or ``None``.
    """
    query, key, value = inputs
    if not isinstance(weights, tuple):
        width = call["embed_dim"] or call["embed_dim_to_check"]
        if query is key and key is value:
            return F.linear(query, weights, biases).chunk(3, -1)
        if key is value:
            sizes = [width, 2 * width]
            weights, biases = (
                weights.split(sizes),
                biases.split(sizes) if biases is not None else (None, None),
            )
            packed = F.linear(key, weights[1], biases[1]).chunk(2, -1)
            return F.linear(query, weights[0], biases[0]), packed[0], packed[1]
        weights = weights.chunk(3)
    biases = biases.chunk(3) if biases is not None else (None, None, None)
    return tuple(F.linear(x, weights[i], biases[i]) for i, x in enumerate(inputs))


def _multi_head_attention_forward(call: _Opaque) -> tuple[Any, Any]:
    """``torch.nn.functional.multi_head_attention_forward``: sequences first, ``(n, batch, width)``."""
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if call[name] is not None:
            raise _NotExpanded(f"{name} replaces or adds keys that are no positions of the sequence")
    if call["add_zero_attn"]:
        raise _NotExpanded("add_zero_attn adds a key that is no position of the sequence")
    width, heads = call["embed_dim_to_check"], call["num_heads"]
    batched = call.rank("query") == 3
    # Equal inputs stay equal.
    first = {x: x.transpose(0, 1) if batched else x[None] for x in call.take("query", "key", "value")}
    inputs = tuple(first[x] for x in call.take("query", "key", "value"))
    weights = call["in_proj_weight"]
    if call["use_separate_proj_weight"]:
        weights = call.take("q_proj_weight", "k_proj_weight", "v_proj_weight")
    packed = _project(call, inputs, weights, call["in_proj_bias"])
    training = call["training"] is not False
    dropout = call["dropout_p"] if training else 0.0
    need_weights = call["need_weights"] is not False
    # As a hint, is_causal stands for the mask only where no other mask joins in and no weights are asked for.
    causal = bool(call["is_causal"]) and call["key_padding_mask"] is None and not need_weights
    out, attention = _attend(
        tuple(_split_heads(packed[i], heads) for i in range(3)),
        width // heads,
        _Mask(causal=True) if causal else _joint_mask(call),
        dropout,
        call.weights_read and need_weights,
    )
    out = F.linear(_merge_heads(out), call["out_proj_weight"], call["out_proj_bias"])
    if attention is not None and call["average_attn_weights"] is not False:
        attention = attention.mean(1)
    if batched:
        return out.transpose(0, 1), attention
    return out[0], attention[0] if attention is not None else None


def _hidden(call: _Opaque) -> _Mask:
    """The mask of the inference fast paths: what is not zero hides, whatever its type."""
    mask, kind = call["mask"], call["mask_type"]
    if mask is None:
        return _Mask()
    if kind not in (0, 1, 2):
        raise _NotExpanded(f"mask_type {kind} is none of 0 (queries by keys), 1 (padding), 2 (full)")
    if not call.is_boolean("mask"):
        mask = mask.to(torch.bool)
    return _Mask(mask[:, None, None, :] if kind == 1 else mask, boolean=True)


def _fast_attention(
    call: _Opaque, inputs: tuple[Any, Any, Any], heads: int, weights_read: bool
) -> tuple[Any, Any]:
    """The attention of the fast paths on ``(batch, n, width)``, projections included."""
    packed = _project(call, inputs, call["qkv_weight"], call["qkv_bias"])
    out, attention = _attend(
        tuple(_split_heads(packed[i], heads) for i in range(3)),
        call["embed_dim"] // heads, _hidden(call), 0.0, weights_read,
    )  # fmt: skip
    return F.linear(_merge_heads(out), call["proj_weight"], call["proj_bias"]), attention


def _native_multi_head_attention(call: _Opaque) -> tuple[Any, Any]:
    """``torch._native_multi_head_attention``, the inference path of ``nn.MultiheadAttention``."""
    inputs = call.take("query", "key", "value")
    need_weights = call["need_weights"] is not False
    out, weights = _fast_attention(call, inputs, call["num_head"], call.weights_read and need_weights)
    if weights is not None and call["average_attn_weights"] is not False:
        weights = weights.mean(1)
    return out, weights


def _transformer_encoder_layer_fwd(call: _Opaque) -> tuple[Any]:
    """``torch._transformer_encoder_layer_fwd``, the inference path of ``nn.TransformerEncoderLayer``."""
    source, width, eps = call["src"], call["embed_dim"], call["eps"]

    def norm(x: Any, which: int) -> Any:
        return F.layer_norm(x, (width,), call[f"norm_weight_{which}"], call[f"norm_bias_{which}"], eps)

    def feed_forward(x: Any) -> Any:
        inner = F.linear(x, call["ffn_weight_1"], call["ffn_bias_1"])
        inner = F.gelu(inner) if call["use_gelu"] else F.relu(inner)
        return F.linear(inner, call["ffn_weight_2"], call["ffn_bias_2"])

    x = norm(source, 1) if call["norm_first"] else source
    attended, _ = _fast_attention(call, (x, x, x), call["num_heads"], False)
    x = attended + source
    if call["norm_first"]:
        return (x + feed_forward(norm(x, 2)),)
    x = norm(x, 1)
    return (norm(x + feed_forward(x), 2),)


_EXPANSIONS: dict[str, Callable[[_Opaque], Any]] = {
    "multi_head_attention_forward": _multi_head_attention_forward,
    "_native_multi_head_attention": _native_multi_head_attention,
    "_transformer_encoder_layer_fwd": _transformer_encoder_layer_fwd,
}

# Where the attention is inside the module whose call is opaque.
_INSIDE = {"_transformer_encoder_layer_fwd": "self_attn"}
