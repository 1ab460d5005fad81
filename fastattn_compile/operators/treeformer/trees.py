"""The trees of a site: their planes as learned parameters, and the vectors that are routed through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels.rotary import Rotary, Turn
from fastattn_compile.kernels.tiles import work_dtype
from fastattn_compile.kernels.treeformer_route import follow
from fastattn_compile.operators.base import AttentionInputs, SiteSpec
from fastattn_compile.operators.treeformer.config import TcConfig, TreeConfig


def parameter_shapes(config: TreeConfig, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the learned parameters, in order.

    Planes belong to key heads, since keys are routed once a key head; planes of their own for queries, and
    weights of the levels, to query heads.

    Args:
        config: The configuration.
        spec: The site.
    """
    trees, planes = config.n_trees, config.leaves - 1
    shapes: dict[str, tuple[int, ...]] = {}
    if config.height:
        shapes["key_planes"] = (spec.kv_heads, trees, planes, spec.head_dim)
        shapes["key_offsets"] = (spec.kv_heads, trees, planes)
        if not config.shared:
            shapes["query_planes"] = (spec.heads, trees, planes, spec.head_dim)
            shapes["query_offsets"] = (spec.heads, trees, planes)
    if isinstance(config, TcConfig):
        shapes["level_weights"] = (spec.heads, trees, config.height + 1)
    return shapes


@dataclass(frozen=True)
class Trees:
    """The learned parameters of a site by name, in the type of the computation.

    Args:
        key_planes: ``(g, t, N, d)``.
        key_offsets: ``(g, t, N)``.
        query_planes: ``(h, t, N, d)``; those of the key head when shared.
        query_offsets: ``(h, t, N)``.
        level_weights: ``(h, t, height + 1)``; ``None`` for leaf attention.
    """

    key_planes: Tensor
    key_offsets: Tensor
    query_planes: Tensor
    query_offsets: Tensor
    level_weights: Tensor | None

    @staticmethod
    def of(
        config: TreeConfig, inputs: AttentionInputs, parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> Trees:
        """Names the parameters.

        Raises:
            ValueError: There are too few or too many, or one has the wrong shape.
        """
        shapes = parameter_shapes(config, inputs.spec())
        got = [tuple(p.shape) for p in parameters]
        if got != list(shapes.values()):
            raise ValueError(
                f"tree attention expects the parameters {shapes}, got shapes {got}; make them with "
                "operator.initial_parameters(spec, sample), or attach them to the model before compiling"
            )
        named = {name: p.to(dtype) for name, p in zip(shapes, parameters)}
        spec = inputs.spec()
        empty = inputs.query.new_zeros(spec.kv_heads, config.n_trees, 0, spec.head_dim, dtype=dtype)
        planes = named.get("key_planes", empty)
        offsets = named.get("key_offsets", empty[..., 0])
        own = "query_planes" in named
        return Trees(
            planes, offsets,
            named["query_planes"] if own else planes.repeat_interleave(inputs.group, 0),
            named["query_offsets"] if own else offsets.repeat_interleave(inputs.group, 0),
            named.get("level_weights"),
        )  # fmt: skip


def plane_gradients(
    config: TreeConfig, group: int, keys: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Gradients of the planes in the order of ``parameter_shapes``.

    Args:
        config: The configuration.
        group: Query heads of a key head.
        keys: Gradients of ``key_planes`` and ``key_offsets``.
        queries: Gradients of ``query_planes`` and ``query_offsets``, a query head each.
    """
    if not config.height:
        return []
    if not config.shared:
        return [*keys, *queries]
    return [own + shared.unflatten(0, (-1, group)).sum(1) for own, shared in zip(keys, queries)]


def turns(
    config: TreeConfig, inputs: AttentionInputs, dtype: torch.dtype, before: Tensor | None = None
) -> tuple[Turn, Turn]:
    """What undoes the rotary embedding of queries and of keys.

    Args:
        config: The configuration.
        inputs: The tensors.
        dtype: Type of the rotations.
        before: ``(b,)`` real tokens that came before these, where a sequence is decoded.
    """
    if not config.rotary_base:
        return Turn(), Turn()
    query_len, key_len, channels = inputs.query.shape[2], inputs.key.shape[2], inputs.query.shape[3]
    device = inputs.query.device
    if inputs.key_padding is not None:
        place = (inputs.key_padding.long().cumsum(1) - 1).clamp(min=0)
    else:
        place = torch.arange(key_len, device=device)[None]
    if before is not None:
        place = place + before[:, None]
    rotary, place = Rotary(config.rotary_base, channels), place[:, None]
    offset = key_len - query_len if inputs.mask.end_aligned else 0
    return rotary.at(place[..., offset : offset + query_len], dtype), rotary.at(place, dtype)


@dataclass(frozen=True)
class Routed:
    """Queries and keys with their leaves.

    Args:
        query: ``(b, h, n, d)``, as routed.
        key: ``(b, g, m, d)``, as routed.
        query_leaf: ``(b, h, t, n)``.
        query_scores: ``(b, h, t, n, height)``.
        key_leaf: ``(b, g, t, m)``.
        key_scores: ``(b, g, t, m, height)``.
        turns: What was undone before routing.
    """

    query: Tensor
    key: Tensor
    query_leaf: Tensor
    query_scores: Tensor
    key_leaf: Tensor
    key_scores: Tensor
    turns: tuple[Turn, Turn]


def routing_dtype(inputs: AttentionInputs) -> torch.dtype:
    """Decisions are taken in float32 or wider, whatever the types of the inputs."""
    return work_dtype(inputs.query, inputs.key, inputs.value)


def real_keys(inputs: AttentionInputs) -> Tensor:
    """The keys, 0 where a token is padding: what stands there (NaN) is routed nowhere and has no gradient."""
    if inputs.key_padding is None:
        return inputs.key
    return inputs.key.masked_fill(~inputs.key_padding[:, None, :, None], 0)


def route(config: TreeConfig, inputs: AttentionInputs, trees: Trees) -> Routed:
    """Routes queries and keys."""
    dtype = routing_dtype(inputs)
    of_query, of_key = turns(config, inputs, dtype)
    query, key = of_query.undo(inputs.query.to(dtype)), of_key.undo(real_keys(inputs).to(dtype))
    query_leaf, query_scores = follow(query, trees.query_planes, trees.query_offsets)
    key_leaf, key_scores = follow(key, trees.key_planes, trees.key_offsets)
    return Routed(query, key, query_leaf, query_scores, key_leaf, key_scores, (of_query, of_key))
