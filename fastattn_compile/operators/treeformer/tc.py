"""Coarse tree attention as an operator: means of values along the query's path (Treeformer, TC-Attention).

A patent application covers the mechanism; see the notice in ``fastattn_compile.operators.treeformer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.kernels import treeformer_tc as kernel
from fastattn_compile.kernels.aten import exact as exact_aten
from fastattn_compile.kernels.aten.treeformer_route import dense_backward
from fastattn_compile.kernels.aten.treeformer_tc import (
    Cut,
    Members,
    TreeGradients,
    Weighting,
    chunk_length,
    chunked,
)
from fastattn_compile.kernels.tiles import all_finite, without_nonfinite
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
from fastattn_compile.operators.documents import (
    backward_documents,
    forward_documents,
    reference_documents,
)
from fastattn_compile.operators.exact.operator import visibility
from fastattn_compile.operators.treeformer.common import TreeOperator, finished
from fastattn_compile.operators.treeformer.config import TcConfig
from fastattn_compile.operators.treeformer.cost import coarse_cost
from fastattn_compile.operators.treeformer.decode import CoarseDecoder
from fastattn_compile.operators.treeformer.reference import coarse_attention
from fastattn_compile.operators.treeformer.trees import Routed, Trees, plane_gradients, route, routing_dtype

_TERMS = {
    "left": "a sliding window",
    "chunk": "chunked attention",
    "prefix": "a bidirectional prefix",
}
# Elements that the units of one pass may hold.
_WORKING_SET = 1 << 23


@dataclass(frozen=True)
class _Units:
    """Some key heads of some sequences, with their query heads.

    Args:
        rows: Which units, of ``batch * kv_heads``.
        size: Tokens of a chunk of queries and of keys.
    """

    rows: slice
    size: int


class TreeCoarseAttention(TreeOperator[TcConfig]):
    """Every query reads, at each node of its path, the mean of the values whose keys passed there: no scores,
    no softmax.

    Serves self-attention, bidirectional and causal, and cross-attention without a mask, with grouped queries,
    key padding and packed documents. A trained operator: it cannot retrieve a single token, and without
    training it is hardly better than a mean. There are no scores, hence no normaliser: the log-sum-exp is that
    of scores of 0, the logarithm of the number of visible keys; it says which queries see none (-inf), and has no gradient.
    """

    name = "tc_attention"
    config_type = TcConfig
    implementation = 2

    @property
    def learned(self) -> bool:
        """The weights of the levels are learned at every height."""
        return True

    @property
    def starts_from_sample(self) -> bool:
        """Planes split the keys, free weights of the levels are a least-squares fit."""
        return self.config.height > 0 or self._free_weights()

    def supports(self, spec: SiteSpec) -> Support:
        """No mask or a causal one, with key padding or packed documents, each a sequence of its own."""
        mask = spec.mask
        for term in mask.conflicts("right", "end_aligned", "key_padding", "segments", "opaque"):
            return no(
                f"{_TERMS[term]} is not supported: the running sums of a node would have to forget ({mask})"
            )
        if mask.right is not None and mask.right != 0:
            return no(
                f"a mask that ends {mask.right} positions from the diagonal is not supported; a causal one is"
            )
        if mask.causal and spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys under a causal mask: queries and keys "
                "must stand at the same positions; to continue a cache use the decoder"
            )
        return self.refusal(spec)

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        if inputs.segments is not None:
            return reference_documents(lambda one: self.reference(one, parameters), inputs)
        return coarse_attention(self.config, inputs, self._trees(inputs, parameters))

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Sums of nodes, by chunks when causal; no n x n tensor."""
        if inputs.segments is not None:
            return forward_documents(lambda one: self.forward(one, parameters), inputs, 1)
        trees = self._trees(inputs, parameters)
        routed = route(self.config, inputs, trees)
        value = inputs.value.to(routed.key.dtype)
        finite = all_finite(value)
        out, seen = self._read(inputs, routed, trees, value if finite else without_nonfinite(value))
        if not finite:
            # A value that is not finite reaches exactly the queries that see it on their paths.
            self._poison(inputs, routed, trees, value, out)
        return finished(inputs, out, seen.log())

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Closed-form gradients of values and weights, straight-through gradients of the trees (specification
        5 to 7).
        """
        if inputs.segments is not None:
            packed = inputs, output, grad_out, grad_log_sum_exp, 1
            return backward_documents(lambda one, *saved: self.backward(one, parameters, *saved), *packed)
        config, trees = self.config, self._trees(inputs, parameters)
        routed = route(config, inputs, trees)
        dtype = routed.key.dtype
        value, grad_out = without_nonfinite(inputs.value.to(dtype)), grad_out.to(dtype)
        sums = _Sums(config, inputs, routed, trees, value)
        for tree in range(config.n_trees):
            for units in self._passes(inputs):
                cut, v = self._cut(inputs, routed, tree, units), self._values(inputs, value, units)
                g = chunked(_units(grad_out, inputs, units), 2, units.size)
                found = kernel.backward(
                    cut, v, self._weighting(inputs, trees, tree, units), g,
                    sums.receiver("query", tree, units), sums.receiver("key", tree, units),
                )  # fmt: skip
                sums.add(tree, units, found)
        return sums.gradients(parameters)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """None: no key is met one by one."""
        return torch.zeros(1, 1, rows.numel(), inputs.key.shape[2], dtype=torch.bool, device=rows.device)

    def cost(self, spec: SiteSpec) -> Cost:
        """Routing, sums, and the rows of a path."""
        return coarse_cost(self.config, spec)

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """Sums and counts of the nodes: a state that does not grow with the sequence."""
        return CoarseDecoder(self, parameters)

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Planes from the sample's keys, and weights of the levels by least squares against its softmax
        attention.
        """
        values = super().initial_parameters(spec, sample)
        empty = sample is None or (sample.key_padding is not None and not bool(sample.key_padding.any()))
        if sample is not None and not empty and self._free_weights() and self.supports(sample.spec()):
            values["level_weights"] = self._least_squares(sample, values)
        return values

    def _least_squares(self, sample: AttentionInputs, values: dict[str, Tensor]) -> Tensor:
        """The weights that bring the sum of the means nearest to the teacher (specification section 13)."""
        device, shape = sample.query.device, values["level_weights"].shape
        visible, span = visibility(sample)
        teacher, _ = exact_aten.forward(
            sample.query, sample.key, sample.value.float(), sample.scale, visible, span
        )
        columns = []
        for place in range(shape[1] * shape[2]):
            one = torch.zeros(shape)
            one.view(shape[0], -1)[:, place] = 1
            parameters = tuple(p.to(device) for p in {**values, "level_weights": one}.values())
            columns.append(self.forward(sample, parameters).out.double().transpose(0, 1).flatten(1))
        means = torch.stack(columns, -1)
        products = means.mT @ means
        size = products.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        ridge = 1e-4 * size[:, None, None] * torch.eye(means.shape[-1], device=device, dtype=means.dtype)
        target = means.mT @ teacher.double().transpose(0, 1).flatten(1)[..., None]
        return torch.linalg.solve(products + ridge, target).view(shape).float().cpu()

    def _free_weights(self) -> bool:
        return self.config.level_weights == "free"

    def _even_weight(self) -> float:
        return super()._even_weight() if self._free_weights() else 0.0

    def _trees(self, inputs: AttentionInputs, parameters: Sequence[Tensor]) -> Trees:
        return Trees.of(self.config, inputs, parameters, routing_dtype(inputs))

    def _passes(self, inputs: AttentionInputs, forward: bool = False) -> Iterator[_Units]:
        """Units a few at a time, so that a pass fits the working set. Only a backward pass has pairs of a chunk."""
        height, units = self.config.height, inputs.key.shape[0] * inputs.key.shape[1]
        length = max(inputs.query.shape[2], inputs.key.shape[2])
        if forward and inputs.query.shape[2] == inputs.key.shape[2] and kernel.takes_whole(inputs.value):
            yield _Units(slice(0, units), length)
            return
        size = chunk_length(length, height)
        own = size if inputs.mask.causal and not forward else 1
        together = max(1, _WORKING_SET // max(1, inputs.group * length * max(own, inputs.value.shape[3])))
        for start in range(0, units, together):
            yield _Units(slice(start, min(start + together, units)), size)

    def _cut(self, inputs: AttentionInputs, routed: Routed, tree: int, units: _Units) -> Cut:
        real = inputs.value.new_ones(inputs.key.shape[:3], dtype=routed.key.dtype)
        if inputs.key_padding is not None:
            real = real * inputs.key_padding[:, None]
        keys = routed.key_leaf[:, :, tree].flatten(0, 1)[units.rows]
        return Cut(
            self.config.height,
            inputs.mask.causal,
            chunked(keys, 1, units.size),
            chunked(_units(routed.query_leaf[:, :, tree], inputs, units), 2, units.size),
            chunked(real.flatten(0, 1)[units.rows], 1, units.size),
        )

    def _values(self, inputs: AttentionInputs, value: Tensor, units: _Units) -> Tensor:
        if inputs.key_padding is not None:
            value = value.masked_fill(~inputs.key_padding[:, None, :, None], 0)
        return chunked(value.flatten(0, 1)[units.rows], 1, units.size)

    def _weighting(self, inputs: AttentionInputs, trees: Trees, tree: int, units: _Units) -> Weighting:
        if trees.level_weights is None:
            raise ValueError("tc_attention has weights of the levels among its parameters; none were given")
        learned = trees.level_weights[:, tree].unflatten(0, (-1, inputs.group))
        every = learned.repeat(inputs.key.shape[0], 1, 1)[units.rows]
        return Weighting(every, not self._free_weights(), self.config.include_root, 1 / self.config.n_trees)

    def _read(
        self, inputs: AttentionInputs, routed: Routed, trees: Trees, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = inputs.query.shape
        passes = list(self._passes(inputs, forward=True))
        if len(passes) == 1:
            out, seen = self._read_units(inputs, routed, trees, value, passes[0])
        else:
            out = value.new_empty(batch * inputs.key.shape[1], inputs.group, length, value.shape[3])
            seen = value.new_empty(out.shape[:3])
            for units in passes:
                out[units.rows], seen[units.rows] = self._read_units(inputs, routed, trees, value, units)
        return out.reshape(batch, heads, length, -1), seen.reshape(batch, heads, length)

    def _read_units(
        self, inputs: AttentionInputs, routed: Routed, trees: Trees, value: Tensor, units: _Units
    ) -> tuple[Tensor, Tensor]:
        """What queries of some units read in all trees, and how many keys they see."""
        values = self._values(inputs, value, units)
        out, seen = self._read_tree(inputs, routed, trees, values, units, 0)
        for tree in range(1, self.config.n_trees):
            out += self._read_tree(inputs, routed, trees, values, units, tree)[0]
        return out, seen

    def _read_tree(
        self, inputs: AttentionInputs, routed: Routed, trees: Trees, values: Tensor, units: _Units, tree: int
    ) -> tuple[Tensor, Tensor]:
        cut, weighting = self._cut(inputs, routed, tree, units), self._weighting(inputs, trees, tree, units)
        found = kernel.forward(cut, values, weighting)
        out, seen = (x.flatten(2, 3)[:, :, : inputs.query.shape[2]] for x in found)
        return out, seen

    def _poison(
        self, inputs: AttentionInputs, routed: Routed, trees: Trees, value: Tensor, out: Tensor
    ) -> None:
        bad = (~torch.isfinite(value)).to(value.dtype)
        for tree in range(self.config.n_trees):
            for units in self._passes(inputs):
                weights = self._weighting(inputs, trees, tree, units)
                ones = Weighting(torch.ones_like(weights.learned), root=weights.root)
                cut, v = self._cut(inputs, routed, tree, units), self._values(inputs, bad, units)
                part = kernel.forward(cut, v, ones)[0].flatten(2, 3)[:, :, : inputs.query.shape[2]]
                out.view(-1, inputs.group, *out.shape[2:])[units.rows].masked_fill_(part > 0, torch.nan)


def _units(x: Tensor, inputs: AttentionInputs, units: _Units) -> Tensor:
    """``(b, h, n, ...)`` to ``(units, group, n, ...)``."""
    return x.unflatten(1, (-1, inputs.group)).flatten(0, 1)[units.rows]


class _Sums:
    """Gradients of all inputs, filled a piece at a time."""

    def __init__(
        self, config: TcConfig, inputs: AttentionInputs, routed: Routed, trees: Trees, value: Tensor
    ) -> None:
        self.config, self.inputs, self.routed, self.trees = config, inputs, routed, trees
        self.x = {"query": routed.query, "key": routed.key}
        self.planes = {
            "query": (trees.query_planes, trees.query_offsets), "key": (trees.key_planes, trees.key_offsets)
        }  # fmt: skip
        # New, not "like": inputs have any strides, and these are written through flattened views.
        self.grad_x = {side: x.new_zeros(x.shape) for side, x in self.x.items()}
        self.grad_planes = {side: [p.new_zeros(p.shape) for p in both] for side, both in self.planes.items()}
        self.value = value.new_zeros(value.shape)
        self.levels = None if trees.level_weights is None else torch.zeros_like(trees.level_weights)

    def receiver(self, side: str, tree: int, units: _Units) -> Members:
        """Takes the gradients of memberships in some chunks of some units on to vectors and planes."""
        heads = self.x[side].shape[1] // self.inputs.key.shape[1]
        batch, length = self.x[side].shape[0], self.x[side].shape[2]
        weight, offset = (
            p[:, tree].unflatten(0, (-1, heads)).repeat(batch, *[1] * p[:, tree].dim())[units.rows]
            for p in self.planes[side]
        )
        x = self.x[side].unflatten(1, (-1, heads)).flatten(0, 1)[units.rows]
        grad_x = self.grad_x[side].unflatten(1, (-1, heads)).flatten(0, 1)[units.rows]
        kv_heads = (
            torch.arange(batch * weight.shape[0], device=x.device)[units.rows] % self.inputs.key.shape[1]
        )

        def receive(chunks: slice, levels: list[Tensor]) -> None:
            if side == "key":
                levels = [level[:, None] for level in levels]
            at = slice(chunks.start * units.size, min(chunks.stop * units.size, length))
            flat = [level.flatten(2, 3)[:, :, : at.stop - at.start] for level in levels]
            to_x, to_weight, to_offset = dense_backward(
                x[:, :, at], weight, offset, self.config.straight_through(), flat
            )
            grad_x[:, :, at] += to_x
            for total, part in zip(self.grad_planes[side], (to_weight, to_offset)):
                total[:, tree].unflatten(0, (-1, heads)).index_add_(0, kv_heads, part)

        return receive

    def add(self, tree: int, units: _Units, found: TreeGradients) -> None:
        """Takes the gradients of values and of the weights of the levels."""
        length, kv_heads = self.value.shape[2], self.value.shape[1]
        self.value.flatten(0, 1)[units.rows] += found.value.flatten(1, 2)[:, :length]
        if self.levels is not None:
            head = (
                torch.arange(self.value.shape[0] * kv_heads, device=self.value.device)[units.rows] % kv_heads
            )
            self.levels[:, tree].unflatten(0, (kv_heads, -1)).index_add_(
                0, head, found.learned.to(self.levels.dtype)
            )

    def gradients(self, parameters: tuple[Tensor, ...]) -> Gradients:
        """All of them, in the types of the inputs."""
        inputs = self.inputs
        of_query, of_key = self.routed.turns
        keys, queries = (tuple(self.grad_planes[side]) for side in ("key", "query"))
        planes = plane_gradients(self.config, inputs.group, (keys[0], keys[1]), (queries[0], queries[1]))
        learned = [*planes, self.levels] if self.levels is not None else planes
        return Gradients(
            of_query.redo(self.grad_x["query"]).to(inputs.query.dtype),
            of_key.redo(self.grad_x["key"]).to(inputs.key.dtype),
            self.value.to(inputs.value.dtype),
            tuple(g.to(p.dtype) for g, p in zip(learned, parameters)),
        )
