"""What the two forms of tree attention share as operators: refusals, parameters, their start from data."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_bias import PairBias
from fastattn_compile.kernels.aten.treeformer_ranges import Sight, near_ranges
from fastattn_compile.kernels.tiles import all_finite, work_dtype
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator, SiteSpec, Support, no
from fastattn_compile.operators.exact.operator import refuse_extras
from fastattn_compile.operators.site import places_in_segments
from fastattn_compile.operators.treeformer.config import TreeConfig
from fastattn_compile.operators.treeformer.fit import fit_planes, grow, random_planes
from fastattn_compile.operators.treeformer.trees import parameter_shapes, real_keys, turns

TreeConfigT = TypeVar("TreeConfigT", bound=TreeConfig)


def sight_of(inputs: AttentionInputs) -> Sight:
    """The mask as an interval of positions for every query, and the facts about tokens."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    low, high = inputs.mask.interval(queries, keys, inputs.query.device)
    if inputs.segments is None:
        return Sight(low, high, keys, inputs.key_padding)
    _, segment = torch.unique(inputs.segments, return_inverse=True)
    offset = keys - queries if inputs.mask.end_aligned else 0
    return Sight(low, high, keys, inputs.key_padding, segment, segment[:, offset : offset + queries])


def pair_bias(inputs: AttentionInputs, sight: Sight) -> PairBias | None:
    """The bias of the site for every pair that is met; distances inside a document are those of its own tokens."""
    if inputs.bias is None:
        return None
    (batch, heads, queries, _), kv_heads = inputs.query.shape, inputs.key.shape[1]
    if inputs.segments is None:
        offset = sight.length - queries if inputs.mask.end_aligned else 0
        of_key = torch.arange(sight.length, device=inputs.query.device).expand(batch, -1)
        of_query = torch.arange(queries, device=inputs.query.device).expand(batch, -1) + offset
    else:
        of_query = of_key = places_in_segments(inputs.segments)
    dtype = work_dtype(inputs.query, inputs.key, inputs.value)
    return PairBias(
        inputs.bias.to(dtype), of_query.repeat_interleave(heads, 0).flatten(),
        of_key.repeat_interleave(kv_heads, 0).flatten(), queries,
    )  # fmt: skip


def finished(inputs: AttentionInputs, out: Tensor, log_sum_exp: Tensor) -> AttentionOutput:
    """The results in the types an operator returns; NaN where routing is not defined.

    A vector that is not finite has no leaf: a query like that, and every query to which a key like that is
    visible, gets NaN, so that no leaf hides it.

    Args:
        inputs: The tensors.
        out: ``(b, h, n, e)``.
        log_sum_exp: ``(b, h, n)``.
    """
    query, key = inputs.query, real_keys(inputs)
    if not all_finite(query, key):
        lost = ~torch.isfinite(query).all(-1)
        sight, (batch, kv_heads) = sight_of(inputs), key.shape[:2]
        every = torch.zeros_like(lost, dtype=torch.int64)
        bad = ~torch.isfinite(key).all(-1)
        hit = near_ranges(query.shape[1], kv_heads, batch, sight, every, every + sight.length, only=bad)
        lost = lost | (hit.stop > hit.start)
        out = out.masked_fill(lost[..., None], torch.nan)
        log_sum_exp = log_sum_exp.masked_fill(lost, torch.nan)
    wide = torch.float64 if inputs.value.dtype == torch.float64 else torch.float32
    return AttentionOutput(out.to(inputs.value.dtype), log_sum_exp.to(wide))


# Weight of even leaves beside the mass inside them.
_BALANCE = 0.01


class TreeOperator(Operator[TreeConfigT], Generic[TreeConfigT]):
    """Base of the two operators."""

    def __init__(self, config: TreeConfigT | None = None) -> None:
        super().__init__(config)
        # torch.compile traces ``supports`` and takes a float read there for a variable, which costs a second
        # compilation.
        self._unrotates = self.config.rotary_base > 0

    @property
    def learned(self) -> bool:
        """Whether there are planes to learn."""
        return self.config.height > 0

    def routing_loss(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
    ) -> Tensor | None:
        """Softmax mass outside the leaves, and how unevenly keys fill them, weighted as the specification says."""
        from fastattn_compile.operators.treeformer.losses import balance_loss, mass_loss

        if not self.learned:
            return None
        mass = mass_loss(self.config, inputs, parameters, rows)
        return mass + _BALANCE * balance_loss(self.config, inputs, parameters)

    def refusal(self, spec: SiteSpec, *biases: str) -> Support:
        """What neither form can serve.

        Args:
            spec: The site.
            *biases: The kinds of bias that this form adds.
        """
        mask, config = spec.mask, self.config
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        if spec.query_len == 1:
            return no("a single query (decoding) gains nothing from trees made for one step; exact is faster")
        if spec.key_len < config.leaves:
            return no(
                f"height {config.height} makes {config.leaves} leaves for {spec.key_len} keys; "
                f"use a height of at most log2 of the number of keys"
            )
        if mask.segments and spec.query_len != spec.key_len:
            return no("packed documents need queries and keys at the same positions")
        if self._unrotates and spec.head_dim % 2:
            return no(
                f"rotary_base undoes rotations of pairs of channels, and head_dim {spec.head_dim} is odd"
            )
        if self._unrotates and mask.segments:
            return no("rotary_base does not know where the positions of packed documents start")
        if self._unrotates and spec.query_len != spec.key_len and not mask.end_aligned:
            return no("rotary_base needs queries that stand at positions of the keys")
        return refuse_extras(spec, *biases)

    @property
    def starts_from_sample(self) -> bool:
        """Planes split the keys."""
        return self.config.height > 0

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Planes and offsets of the trees, a key head each; those of queries and weights of levels, a query
        head each.
        """
        return parameter_shapes(self.config, spec)

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Planes split the keys of the sample; without one they are random, with offset 0."""
        return self._start(spec, sample, {})

    def grown_parameters(
        self, spec: SiteSpec, learned: dict[str, Tensor], sample: AttentionInputs | None = None
    ) -> dict[str, Tensor]:
        """Parameters of these trees that continue those of lower ones (specification section 9).

        The planes of lower trees are the first of the heap and are kept. Free weights of new levels start at
        0, so that coarse attention starts with the outputs it had; splitting the leaves of leaf attention
        does change its outputs.

        Args:
            spec: The site.
            learned: Parameters of the lower trees by name; those missing start anew.
            sample: Calibration tensors for the new planes.

        Raises:
            ValueError: A parameter belongs to higher trees, or to another number of heads, trees or channels.
        """
        return self._start(spec, sample, learned)

    def _start(
        self, spec: SiteSpec, sample: AttentionInputs | None, learned: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        config = self.config
        shapes = self.parameter_shapes(spec)
        values: dict[str, Tensor] = {}
        if config.height:
            known = None
            if "key_planes" in learned:
                known = learned["key_planes"].detach().cpu(), learned["key_offsets"].detach().cpu()
            if sample is None:
                planes, offsets = random_planes(shapes["key_planes"], config.seed)
            else:
                routed = (
                    turns(config, sample, torch.float32)[1].undo(real_keys(sample).detach().float()).cpu()
                )
                real = None if sample.key_padding is None else sample.key_padding.cpu()
                planes, offsets = fit_planes(config, routed, real, known)
            values["key_planes"], values["key_offsets"] = planes, offsets
            if not config.shared:
                group = spec.heads // spec.kv_heads
                values["query_planes"] = planes.repeat_interleave(group, 0)
                values["query_offsets"] = offsets.repeat_interleave(group, 0)
        if "level_weights" in shapes:
            values["level_weights"] = torch.full(shapes["level_weights"], self._even_weight())
        for name, old in learned.items():
            if name in values:
                dim = -2 if name.endswith("planes") else -1
                values[name] = grow(name, old.detach().cpu().float(), values[name], dim)
                if name == "level_weights" and self._free_weights():
                    values[name][..., old.shape[-1] :] = 0
        return values

    def _free_weights(self) -> bool:
        return False

    def _even_weight(self) -> float:
        return 1 / (self.config.n_trees * (self.config.height + 1))
