"""Leaf attention as an operator: softmax over the keys of the query's leaf (Treeformer, TF-Attention).

A patent application covers the mechanism; see the notice in ``fastattn_compile.operators.treeformer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastattn_compile.kernels import treeformer_tf as kernel
from fastattn_compile.kernels.aten.treeformer_bias import PairBias
from fastattn_compile.kernels.aten.treeformer_ranges import Ranges, Sight, near_ranges, node_ranges, sink_keys
from fastattn_compile.kernels.aten.treeformer_route import score_gradients
from fastattn_compile.kernels.aten.treeformer_tf import Gate, Hidden, NearPairs, Part, PartGradients
from fastattn_compile.kernels.treeformer_route import path_gradients
from fastattn_compile.operators.base import (
    AttentionInputs,
    AttentionOutput,
    Cost,
    Decoder,
    Gradients,
    SiteSpec,
    Support,
    no,
)
from fastattn_compile.operators.treeformer.common import TreeOperator, finished, pair_bias, sight_of
from fastattn_compile.operators.treeformer.config import TfConfig
from fastattn_compile.operators.treeformer.cost import leaf_cost
from fastattn_compile.operators.treeformer.decode import LeafDecoder
from fastattn_compile.operators.treeformer.reference import leaf_attention, leaf_keys, members, near_keys
from fastattn_compile.operators.treeformer.trees import Routed, Trees, plane_gradients, route, routing_dtype


@dataclass(frozen=True)
class RoutingStatistics:
    """How even the trees of a site are, over all sequences and heads.

    Args:
        imbalance: Pairs met through the trees over those of even leaves (specification section 10); 1 is
            even.
        fallback: Share of queries, over all trees, whose own leaf shows them no key.
        dropped: Share of the pairs found through the trees that a capacity dropped.
    """

    imbalance: float
    fallback: float
    dropped: float


@dataclass(frozen=True)
class _Plan:
    """Who meets whom at a site.

    Args:
        routed: Queries and keys with their leaves.
        near: Window and sinks.
        leaves: One part a tree.
    """

    routed: Routed
    near: list[list[Part]]
    leaves: list[Part]


class TreeLeafAttention(TreeOperator[TfConfig]):
    """Every query attends the keys that its own decision tree puts into its leaf; windows and sinks may be
    added exactly.

    Serves self- and cross-attention, every understood mask but a prefix behind a window, grouped queries, key
    padding, packed documents, and biases by distance (ALiBi, buckets) on what is met. A trained operator: without
    training expect large losses.
    """

    name = "tf_attention"
    config_type = TfConfig

    def __init__(self, config: TfConfig | None = None) -> None:
        super().__init__(config)
        self._ranks_keys = self.config.capacity > 0 and self.config.overflow == "margin"

    def supports(self, spec: SiteSpec) -> Support:
        """Every understood mask, self and cross; refuses trees with more leaves than keys, and what changes
        the scores.
        """
        mask = spec.mask
        if mask.prefix is not None and mask.left is not None:
            return no(f"a prefix outside a sliding window is not one interval of keys ({mask})")
        if self._ranks_keys and mask.causal:
            return no(
                "overflow='margin' ranks the keys of the whole sequence; with a causal mask use 'oldest'"
            )
        return self.refusal(spec, "alibi", "bucketed")

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        return leaf_attention(self.config, inputs, self._trees(inputs, parameters))

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Queries and keys sorted by leaf, tiles of queries against the keys of their leaves; no n x n
        tensor.
        """
        plan = self._plan(inputs, self._trees(inputs, parameters))
        tensors = inputs.query, inputs.key, inputs.value, inputs.scale
        outs = [kernel.attend(*tensors, parts) for parts in self._softmaxes(plan)]
        out = torch.stack([o for o, _ in outs]).mean(0) if len(outs) > 1 else outs[0][0]
        lse = outs[0][1].squeeze(-1)
        if len(outs) > 1:
            blind = torch.stack([x.squeeze(-1) == -torch.inf for _, x in outs]).all(0)
            lse = torch.full_like(lse, torch.nan).masked_fill(blind, -torch.inf)
        return finished(inputs, out, lse)

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of the retained pairs, and straight-through gradients of the planes (specification
        sections 4, 6).
        """
        trees = self._trees(inputs, parameters)
        plan = self._plan(inputs, trees)
        tensors = inputs.query, inputs.key, inputs.value, inputs.scale
        dtype = routing_dtype(inputs)
        softmaxes = self._softmaxes(plan)
        several = len(softmaxes) > 1
        grad_out = grad_out.to(dtype) / len(softmaxes)
        saved = output.out.to(dtype), output.log_sum_exp.unsqueeze(-1)
        grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in tensors[:3]]
        said: list[PartGradients] = []
        of_bias: list[Tensor] = []
        log_mass: list[Tensor] = []
        for parts in softmaxes:
            out, lse = kernel.attend(*tensors, parts) if several else saved
            *main, of_parts = kernel.backward(
                *tensors, parts, out, lse, grad_out, None if several else grad_log_sum_exp
            )
            for total, part in zip(grads, main):
                total += part
            of_bias += [part.bias for part in of_parts if part.bias is not None]
            trees_here = 1 if several else len(plan.leaves)
            said += of_parts[len(parts) - trees_here :]
            log_mass += [(grad_out * out).sum(-1)] * trees_here
        planes = self._tree_gradients(inputs, trees, plan, said, log_mass, grads)
        to_query, to_key, to_value = (g.to(x.dtype) for g, x in zip(grads, tensors[:3]))
        learned = tuple(g.to(p.dtype) for g, p in zip(planes, parameters))
        bias = (
            torch.stack(of_bias).sum(0).to(inputs.bias.dtype) if inputs.bias is not None and of_bias else None
        )
        return Gradients(to_query, to_key, to_value, learned, bias)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The keys of the query's leaf in every tree, window and sinks.

        Without the learned parameters only window and sinks are known; they alone are returned, which is too
        few.
        """
        empty = torch.zeros(*inputs.query.shape[:2], rows.numel(), dtype=torch.bool, device=rows.device)
        if not parameters and self.config.height:
            return near_keys(self.config, inputs, rows, empty)
        met = torch.zeros(1, dtype=torch.bool, device=rows.device)
        for query, key in members(self.config, inputs, self._trees(inputs, parameters)):
            found, _ = leaf_keys(self.config, inputs, rows, query, key)
            met, empty = met | found, empty | ~found.any(-1)
        return met | near_keys(self.config, inputs, rows, empty)

    def cost(self, spec: SiteSpec) -> Cost:
        """Counted for even leaves; ``routing_statistics`` says how even they are."""
        return leaf_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """Keys by leaf, one token at a time; none with a capacity, which depends on the final length."""
        if self.config.capacity:
            return None
        return LeafDecoder(self, scale, parameters)

    def routing_statistics(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
    ) -> RoutingStatistics:
        """Balance of the trees, empty leaves and pairs dropped for capacity on some tensors."""
        plan = self._plan(inputs, self._trees(inputs, parameters))
        found = float(sum(part.ranges.found() for part in plan.leaves))
        kept = float(sum((part.ranges.stop - part.ranges.start).sum() for part in plan.leaves))
        sight = sight_of(inputs)
        pairs = float((sight.high - sight.low).sum()) * inputs.query.shape[0] * inputs.query.shape[1]
        if inputs.key_padding is not None or inputs.segments is not None:
            rows = torch.arange(inputs.query.shape[2], device=inputs.query.device)
            pairs = float(sum(inputs.visible(r[None]).sum() for r in rows)) * inputs.query.shape[1]
        deepest = self.config.height - (self.config.query_gradient == "sibling")
        even = max(1.0, self.config.n_trees * pairs / (1 << deepest))
        climbed = [(p.ranges.level < deepest) | (p.ranges.stop == p.ranges.start) for p in plan.leaves]
        return RoutingStatistics(
            found / even, float(torch.stack(climbed).double().mean()), 1 - kept / found if found else 0.0
        )

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """The numbers of ``routing_statistics``."""
        return dataclasses.asdict(self.routing_statistics(inputs, parameters))

    def _trees(self, inputs: AttentionInputs, parameters: Sequence[Tensor]) -> Trees:
        return Trees.of(self.config, inputs, parameters, routing_dtype(inputs))

    def _softmaxes(self, plan: _Plan) -> list[list[Part]]:
        """The parts that share a softmax."""
        if self.config.combine == "mean":
            return [[*near, leaf] for near, leaf in zip(plan.near, plan.leaves)]
        return [[*plan.near[0], *plan.leaves]]

    def _plan(self, inputs: AttentionInputs, trees: Trees) -> _Plan:
        config, sight = self.config, sight_of(inputs)
        routed = route(config, inputs, trees)
        ranges = [self._leaf_ranges(sight, routed, tree) for tree in range(config.n_trees)]
        sibling = config.query_gradient == "sibling"
        gates = [self._gate(routed, tree, r) if sibling else None for tree, r in enumerate(ranges)]
        empty = [r.stop == r.start for r in ranges]
        if config.combine == "union":
            empty = [torch.stack(empty).any(0)]
        bias = pair_bias(inputs, sight)
        near = [_Near(config, inputs, sight, e, bias) for e in empty]
        leaves = []
        for tree, (found, gate) in enumerate(zip(ranges, gates)):
            own = near[tree if config.combine == "mean" else 0]
            earlier = [] if config.combine == "mean" else [(t, ranges[t]) for t in range(tree)]
            hidden: Hidden = own.pairs
            if earlier:
                hidden = _Elsewhere(self, own.pairs, sight, routed, earlier)
            width = 1 << (config.height - sibling)
            sizes = -(-sight.length // width), -(-inputs.group * inputs.query.shape[2] // width)
            leaves.append(Part(found, *sizes, hidden if own.parts or earlier else None, gate, bias))
        return _Plan(routed, [n.parts for n in near], leaves)

    def _leaf_ranges(self, sight: Sight, routed: Routed, tree: int) -> Ranges:
        config = self.config
        return node_ranges(
            routed.key_leaf[:, :, tree].contiguous(), routed.query_leaf[:, :, tree], config.height, sight,
            deepest=config.height - (config.query_gradient == "sibling"),
            ancestors=config.fallback == "ancestor",
            capacity=config.keys_of_leaf(sight.length),
            dropped=self._dropped(sight, routed, tree),
        )  # fmt: skip

    def _dropped(self, sight: Sight, routed: Routed, tree: int) -> Tensor | None:
        """Keys that full leaves drop because they are nearest to a plane, ``(b, g, m)``."""
        config = self.config
        if not config.capacity or config.overflow != "margin" or not config.height:
            return None
        code = routed.key_leaf[:, :, tree]
        if sight.key_segment is not None:
            code = code + sight.key_segment[:, None] * config.leaves
        if sight.real is not None:
            code = code.masked_fill(~sight.real[:, None], sight.segments * config.leaves)
        margin = routed.key_scores[:, :, tree].abs().amin(-1)
        order = margin.argsort(dim=-1, descending=True, stable=True)
        ordered, by_code = torch.sort(code.gather(-1, order), dim=-1, stable=True)
        order = order.gather(-1, by_code)
        rank = torch.arange(sight.length, device=code.device) - torch.searchsorted(ordered, ordered)
        full = rank >= config.keys_of_leaf(sight.length)
        return torch.zeros_like(full).scatter(-1, order, full)

    def _gate(self, routed: Routed, tree: int, ranges: Ranges) -> Gate:
        sure = self.config.beta * routed.query_scores[:, :, tree, :, -1].abs()
        gated = ranges.level == self.config.height - 1
        return Gate(
            torch.where(gated, logsigmoid(sure), 0.0).flatten(),
            torch.where(gated, logsigmoid(-sure), 0.0).flatten(),
            routed.query_leaf[:, :, tree].flatten(),
            routed.key_leaf[:, :, tree].flatten(),
        )

    def _tree_gradients(
        self, inputs: AttentionInputs, trees: Trees, plan: _Plan, said: list[PartGradients],
        log_mass: list[Tensor], grads: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        """Carries the gradients of memberships to the planes, and adds what vectors get to ``grads``."""
        config, routed = self.config, plan.routed
        if not config.height:
            return []
        depth = config.height + 1
        of_query = torch.zeros(
            *routed.query_leaf.shape, depth, dtype=routed.query.dtype, device=routed.query.device
        )
        of_key = torch.zeros(
            *routed.key_leaf.shape, depth, dtype=routed.query.dtype, device=routed.query.device
        )
        of_mass = torch.zeros_like(of_query) if config.query_gradient == "gate" else None
        of_last = torch.zeros_like(of_query[..., 0]) if config.query_gradient == "sibling" else None
        for tree, (part, gradient) in enumerate(zip(plan.leaves, said)):
            level = part.ranges.level[..., None]
            of_query[:, :, tree].scatter_(-1, level, gradient.query.view(level.shape))
            columns = gradient.key.view(*routed.key_leaf.shape[:2], -1, len(part.ranges.levels))
            for column, at in enumerate(part.ranges.levels):
                # Behind a gate a key is met as a member of its own leaf, wherever the query's is.
                key_level = config.height if part.gate is not None and at == config.height - 1 else at
                of_key[:, :, tree, :, key_level] += columns[..., column]
            if of_mass is not None:
                of_mass[:, :, tree].scatter_(-1, level, log_mass[tree][..., None])
            if of_last is not None and gradient.same is not None and gradient.other is not None:
                score = routed.query_scores[:, :, tree, :, -1]
                slope = torch.where(score > 0, config.beta, -config.beta)
                sure = torch.sigmoid(config.beta * score.abs())
                same, other = gradient.same.view(score.shape), gradient.other.view(score.shape)
                gated = part.ranges.level == config.height - 1
                of_last[:, :, tree] = gated * slope * (same * (1 - sure) - other * sure)
        estimator = config.straight_through()
        slopes = score_gradients(routed.query_scores, estimator, of_query, of_mass, of_last)
        query_x, *of_queries = path_gradients(routed.query, trees.query_planes, routed.query_leaf, slopes)
        slopes = score_gradients(routed.key_scores, estimator, of_key)
        key_x, *of_keys = path_gradients(routed.key, trees.key_planes, routed.key_leaf, slopes)
        grads[0] += routed.turns[0].redo(query_x)
        grads[1] += routed.turns[1].redo(key_x)
        return plane_gradients(config, inputs.group, (of_keys[0], of_keys[1]), (of_queries[0], of_queries[1]))


class _Near:
    """Window and sinks as parts: they are met first, trees leave them out."""

    def __init__(
        self, config: TfConfig, inputs: AttentionInputs, sight: Sight, empty: Tensor, bias: PairBias | None
    ) -> None:
        batch, heads, queries, _ = inputs.query.shape
        kv_heads, keys = inputs.key.shape[1:3]
        place = torch.arange(queries, device=inputs.query.device)
        place = place + (keys - queries if inputs.mask.end_aligned else 0)
        width = torch.full_like(empty, config.window, dtype=torch.int64)
        if config.fallback == "self+window":
            width = torch.where(empty, max(config.window, config.fallback_window), width)
        self.low, self.high = place - width + 1, place + width
        self.sinks = sink_keys(sight, batch, config.sinks) if config.sinks else None
        self.parts: list[Part] = []
        if bool((width > 0).any()):
            ranges = near_ranges(heads, kv_heads, batch, sight, self.low, self.high)
            self.parts.append(Part(ranges, 2 * config.window, 128, bias=bias))
        if self.sinks is not None:
            every = torch.zeros_like(width), torch.full_like(width, keys)
            ranges = near_ranges(heads, kv_heads, batch, sight, *every, only=self.sinks[:, None])
            window = NearPairs(self.low, self.high, keys, kv_heads)
            self.parts.append(Part(ranges, config.sinks, 128, window if self.parts else None, bias=bias))
        self.pairs = NearPairs(self.low, self.high, keys, kv_heads, self.sinks)


class _Elsewhere:
    """Which pairs of a tree are met already: near, or in an earlier tree."""

    def __init__(
        self,
        operator: TreeLeafAttention,
        near: NearPairs,
        sight: Sight,
        routed: Routed,
        earlier: list[tuple[int, Ranges]],
    ) -> None:
        height = operator.config.height
        self.near, self.keys = near, sight.length
        self.earlier = []
        for tree, ranges in earlier:
            code = routed.key_leaf[:, :, tree]
            if sight.key_segment is not None:
                code = code + (sight.key_segment << height)[:, None]
            dropped = operator._dropped(sight, routed, tree)
            if dropped is not None:
                code = code.masked_fill(dropped, -1)
            fields = (height - ranges.level, ranges.node, ranges.first(sight.length))
            self.earlier.append((code.flatten(), [x.flatten() for x in fields]))

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        found = self.near(queries, keys)
        for code, fields in self.earlier:
            shift, node, first = (x[queries][:, :, None] for x in fields)
            same = (code[keys][:, None] >> shift) == node
            found = found | (same & ((keys % self.keys)[:, None] >= first))
        return found
