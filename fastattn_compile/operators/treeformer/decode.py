"""Tree attention one token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastattn_compile.kernels.aten.treeformer_tc import Weighting
from fastattn_compile.kernels.dispatch import gpu_obstacle, select
from fastattn_compile.kernels.treeformer_route import follow
from fastattn_compile.kernels.treeformer_tf import BIASED
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.growing import GrowingRows
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.treeformer.config import TreeConfig
from fastattn_compile.operators.treeformer.trees import Trees, real_keys, routing_dtype, turns

if TYPE_CHECKING:
    from fastattn_compile.kernels.gpu.leaf_decode import Sorted
    from fastattn_compile.operators.treeformer.tc import TreeCoarseAttention
    from fastattn_compile.operators.treeformer.tf import TreeLeafAttention


def _check_prefill(inputs: AttentionInputs) -> None:
    if inputs.mask.conflicts("right", "end_aligned", "key_padding") or not inputs.mask.causal:
        raise ValueError(
            f"a decoder of tree attention continues a causal prefill, padded or not; got {inputs.mask}"
        )


class _Unrotated:
    """Tokens as they are routed: their rotary embedding undone, by the number of real tokens before each.

    Args:
        config: The configuration.
    """

    def __init__(self, config: TreeConfig) -> None:
        self.config = config
        self.real: Tensor | None = None

    def add(self, inputs: AttentionInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The next queries and keys, in the type of the routing."""
        of_query, of_key = turns(self.config, inputs, dtype, self.real)
        batch, length = inputs.key.shape[0], inputs.key.shape[2]
        count = torch.full((batch,), length, device=inputs.key.device)
        if inputs.key_padding is not None:
            count = inputs.key_padding.sum(1)
        self.real = count if self.real is None else self.real + count
        return of_query.undo(inputs.query.to(dtype)), of_key.undo(real_keys(inputs).to(dtype))


class CoarseDecoder(Decoder):
    """Sums and counts of the values below every node: ``2^(height + 1) - 1`` rows a tree, whatever the
    length.

    Args:
        operator: The operator.
        parameters: Its learned parameters.
    """

    def __init__(self, operator: TreeCoarseAttention, parameters: tuple[Tensor, ...]) -> None:
        self.operator, self.parameters = operator, parameters
        self.routed = _Unrotated(operator.config)
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a prompt and keeps the sums of its nodes."""
        _check_prefill(inputs)
        self.sums = self.counts = None
        self.routed = _Unrotated(self.operator.config)
        self._add(inputs)
        return self.operator.forward(inputs, self.parameters)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Adds the token to the nodes of its path, then reads those of the query's."""
        inputs = AttentionInputs(query, key, value, 1.0, CAUSAL).validated()
        trees, routed = self._add(inputs)
        if self.sums is None or self.counts is None or trees.level_weights is None:
            raise ValueError("tc_attention has weights of the levels among its parameters; none were given")
        config, group = self.operator.config, inputs.group
        leaf, _ = follow(routed, trees.query_planes, trees.query_offsets)
        sums, counts = (x.repeat_interleave(group, 1) for x in (self.sums, self.counts))
        out = self.sums.new_zeros(*query.shape[:3], value.shape[3])
        levels = [(1 << level) - 1 + (leaf >> (config.height - level)) for level in range(config.height + 1)]
        at = torch.cat(levels, -1)
        mean = sums.gather(3, at[..., None].expand(*at.shape, sums.shape[-1]))
        count = counts.gather(3, at)
        for tree in range(config.n_trees):
            weighting = Weighting(
                trees.level_weights[None, :, tree], config.level_weights == "softmax", config.include_root,
                1 / config.n_trees,
            )  # fmt: skip
            weights = weighting.weights(count[:, :, None, tree, None])[:, :, 0, 0]
            out[:, :, 0] += ((weights / count[:, :, tree].clamp(min=1))[..., None] * mean[:, :, tree]).sum(2)
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        return AttentionOutput(out.to(value.dtype), count[:, :, 0, :1].log().to(wide))

    def stored_rows(self) -> int:
        """Rows of sums."""
        return 0 if self.sums is None else self.sums.shape[2] * self.sums.shape[3]

    def _add(self, inputs: AttentionInputs) -> tuple[Trees, Tensor]:
        """Files keys and values; the trees, and the queries as they are routed."""
        config, dtype = self.operator.config, routing_dtype(inputs)
        trees = Trees.of(config, inputs, self.parameters, dtype)
        batch, kv_heads, _, channels = inputs.value.shape
        if self.sums is None or self.counts is None:
            nodes = 2 * config.leaves - 1
            self.sums = torch.zeros(
                batch, kv_heads, config.n_trees, nodes, channels, dtype=dtype, device=inputs.value.device
            )
            self.counts = torch.zeros_like(self.sums[..., 0])
        query, key = self.routed.add(inputs, dtype)
        leaf, _ = follow(key, trees.key_planes, trees.key_offsets)
        value = inputs.value.to(dtype)[:, :, None].expand(*leaf.shape, channels)
        one = torch.ones_like(leaf, dtype=dtype)
        if inputs.key_padding is not None:
            hidden = ~inputs.key_padding[:, None, None]
            value, one = value.masked_fill(hidden[..., None], 0), one.masked_fill(hidden, 0)
        for level in range(config.height + 1):
            at = (1 << level) - 1 + (leaf >> (config.height - level))
            self.sums.scatter_add_(3, at[..., None].expand_as(value), value)
            self.counts.scatter_add_(3, at, one)
        return trees, query


class LeafDecoder(Decoder):
    """All keys and values with their leaves; a step compares leaf numbers and reads the rows of its own
    leaves only.

    Args:
        operator: The operator.
        scale: Factor on the scores.
        parameters: Its learned parameters.
    """

    def __init__(self, operator: TreeLeafAttention, scale: float, parameters: tuple[Tensor, ...]) -> None:
        self.operator, self.scale, self.parameters = operator, scale, parameters
        self._clear()

    def _clear(self) -> None:
        self.key, self.value, self.leaf, self.real = (GrowingRows(dim) for dim in (2, 2, 3, 1))
        self.routed = _Unrotated(self.operator.config)
        # Keys by their leaves, for each softmax of Triton.
        self.sorted: list[Sorted] = []
        self.bias: Tensor | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a prompt and keeps its keys, values and leaves."""
        _check_prefill(inputs)
        self._clear()
        self.bias = inputs.bias
        self._add(inputs)
        return self.operator.forward(inputs, self.parameters)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Files the token under its leaf, then attends the query's.

        Raises:
            ValueError: The bias lists fewer distances than tokens.
        """
        if self.bias is not None and self.bias.dim() == 2 and self.key.length > self.bias.shape[1] // 2:
            raise ValueError(
                f"the bias lists distances of {self.key.length} tokens; prefill with a longer one, (heads, 2 N - 1)"
            )
        inputs = AttentionInputs(query, key, value, self.scale, CAUSAL).validated()
        trees, routed = self._add(inputs)
        config = self.operator.config
        query = query.to(routing_dtype(inputs))
        leaf, scores = follow(routed, trees.query_planes, trees.query_offsets)
        if select("tf_attention decode", {"triton": self._obstacle}) == "triton":
            return self._step_by_triton(query, leaf, value)
        found, level = self._found(leaf)
        each = []
        by_distance = self._by_distance(query)
        for chosen in self._softmaxes:
            met = self._near(~found[:, :, chosen].any(-1).all(-1))
            gated = torch.zeros_like(met, dtype=query.dtype)
            for tree in range(config.n_trees)[chosen]:
                new = found[:, :, tree] & ~met
                met = met | new
                if config.query_gradient == "sibling":
                    sure = config.beta * scores[:, :, tree, :, -1].abs()
                    same = leaf[:, :, tree] == self._leaves()[:, :, tree]
                    gate = torch.where(same, logsigmoid(sure), logsigmoid(-sure))
                    gated = torch.where(new & (level[:, :, tree, None] == config.height - 1), gate, gated)
            each.append(self._attend(query, met, gated + by_distance))
        return self._mean(each, value)

    def _by_distance(self, query: Tensor) -> Tensor:
        """The bias of the newest query on every key, ``(h, m)``; 0 without one."""
        if self.bias is None:
            return query.new_zeros(())
        age, bias = (
            self.key.length - 1 - torch.arange(self.key.length, device=query.device),
            self.bias.to(query.dtype),
        )
        if bias.dim() == 1:
            return -bias[:, None] * age
        return bias[:, bias.shape[1] // 2 - age]

    @property
    def _softmaxes(self) -> list[slice]:
        """The trees whose keys share a softmax."""
        trees = self.operator.config.n_trees
        if self.operator.config.combine == "mean":
            return [slice(tree, tree + 1) for tree in range(trees)]
        return [slice(0, trees)]

    @staticmethod
    def _mean(each: list[tuple[Tensor, Tensor]], value: Tensor) -> AttentionOutput:
        """The mean of some softmaxes; several have no log-sum-exp together."""
        out = torch.stack([o for o, _ in each]).mean(0)
        lse = each[0][1]
        if len(each) > 1:
            blind = torch.stack([x == -torch.inf for _, x in each]).all(0)
            lse = torch.full_like(lse, torch.nan).masked_fill(blind, -torch.inf)
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        return AttentionOutput(out.to(value.dtype), lse.to(wide))

    def _obstacle(self) -> str:
        """Why Triton cannot serve a step; empty when it can."""
        if self.operator.config.query_gradient == "sibling":
            return "a gate changes the scores of a leaf"
        if self.bias is not None:
            return BIASED
        if self.key.rows.dtype == torch.float64:
            return "float64"
        return gpu_obstacle(self.key.rows, self.value.rows)

    def _step_by_triton(self, query: Tensor, leaf: Tensor, value: Tensor) -> AttentionOutput:
        from fastattn_compile.kernels.gpu import leaf_decode

        config, leaves, real = self.operator.config, self.leaf.rows, self.real.rows
        if not (self.sorted and self.sorted[0].serves(real.shape[1])):
            self.sorted = [
                leaf_decode.Sorted.of(leaves[:, :, trees], real, config.height, config.sinks)
                for trees in self._softmaxes
            ]
        lowest = 0 if config.fallback == "ancestor" else config.height
        fallback = config.fallback_window if config.fallback == "self+window" else 0
        each = [
            leaf_decode.attend_one(
                query, leaf[:, :, trees, 0], self.key.rows, self.value.rows, leaves[:, :, trees], real, found.order,
                found.start, found.cut, config.height, lowest, config.window, fallback, self.scale,
            )
            for trees, found in zip(self._softmaxes, self.sorted)
        ]  # fmt: skip
        return self._mean(each, value)

    def stored_rows(self) -> int:
        """Rows of keys."""
        return self.key.length

    def _add(self, inputs: AttentionInputs) -> tuple[Trees, Tensor]:
        """Files keys and values; the trees, and the queries as they are routed."""
        dtype = routing_dtype(inputs)
        trees = Trees.of(self.operator.config, inputs, self.parameters, dtype)
        real = inputs.key_padding
        if real is None:
            real = torch.ones(
                inputs.key.shape[0], inputs.key.shape[2], dtype=torch.bool, device=inputs.key.device
            )
        query, key = self.routed.add(inputs, dtype)
        self.key.append(real_keys(inputs))
        self.value.append(inputs.value.masked_fill(~real[:, None, :, None], 0))
        self.leaf.append(follow(key, trees.key_planes, trees.key_offsets)[0])
        self.real.append(real)
        return trees, query

    def _leaves(self) -> Tensor:
        """Leaves of the keys, once a query head: ``(b, h, t, m)``."""
        return self.leaf.rows.repeat_interleave(self._group, 1)

    def _found(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """Keys met through each tree ``(b, h, t, m)`` and the level of the node, ``(b, h, t)``."""
        config = self.operator.config
        self._group = leaf.shape[1] // self.leaf.rows.shape[1]
        keys, real = self._leaves(), self.real.rows[:, None, None]
        deepest = config.height - (config.query_gradient == "sibling")
        lowest = 0 if config.fallback == "ancestor" else deepest
        level = torch.full(leaf.shape[:3], lowest, device=leaf.device)
        found = torch.zeros_like(keys, dtype=torch.bool)
        for depth in range(lowest, deepest + 1):
            shift = config.height - depth
            same = real & ((keys >> shift) == (leaf >> shift))
            some = same.any(-1)
            level, found = level.masked_fill(some, depth), torch.where(some[..., None], same, found)
        return found, level

    def _near(self, empty: Tensor) -> Tensor:
        """Window and sinks, ``(b, h, m)``; ``empty`` ``(b, h)`` says where an empty leaf calls for its
        window.
        """
        config, real = self.operator.config, self.real.rows
        age = real.shape[1] - 1 - torch.arange(real.shape[1], device=real.device)
        near = (real & (age < config.window)) | (real & (real.cumsum(1) <= config.sinks))
        near = near[:, None].expand(*empty.shape, -1)
        if config.fallback == "self+window":
            near = near | (empty[..., None] & (age < config.fallback_window) & real[:, None])
        return near

    def _attend(self, query: Tensor, met: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the keys met, ``(b, h, m)``; only their rows are read."""
        most = max(1, int(met.sum(-1).max()))
        at = (~met).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
        batch, heads, _ = at.shape
        keys, values = self.key.rows, self.value.rows
        sequence = torch.arange(batch, device=at.device)[:, None, None]
        head = (torch.arange(heads, device=at.device) // self._group)[:, None]
        k, v = (x[sequence, head, at].to(query.dtype) for x in (keys, values))
        scores = (self.scale * query @ k.mT).squeeze(2) + bias.gather(-1, at)
        scores = scores.masked_fill(~met.gather(-1, at), -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
        return (weights[:, :, None] @ v), lse
