"""Linformer as an operator (Wang, Li, Khabsa, Fang, Ma, arXiv 2006.04768)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn_compile.kernels.aten import linformer as linformer_aten
from fastattn_compile.kernels.aten.cast_kmeans import balanced_assignment
from fastattn_compile.operators.base import (
    YES,
    AttentionInputs,
    AttentionOutput,
    Cost,
    Gradients,
    Operator,
    SiteSpec,
    Support,
    no,
)
from fastattn_compile.operators.exact.cost import parameter_bytes, traffic
from fastattn_compile.operators.exact.operator import refuse_extras
from fastattn_compile.operators.linformer.config import LinformerConfig
from fastattn_compile.operators.linformer.reference import linformer_attention


class LinformerAttention(Operator[LinformerConfig]):
    """Queries meet ``rank`` learned combinations of all keys, O(n rank): bidirectional self-attention."""

    name = "linformer"
    config_type = LinformerConfig

    def supports(self, spec: SiteSpec) -> Support:
        """Bidirectional self-attention up to ``max_length``; anything else is refused with the reason."""
        mask, config = spec.mask, self.config
        if not mask.understood:
            return no(f"the mask is not understood as structure ({mask.opaque})")
        extras = refuse_extras(spec)
        if not extras:
            return extras
        if mask.right is not None:
            return no(
                f"the mask ({mask}) hides what follows a token, and every projected row mixes the whole "
                "sequence: the future would leak into the past; only bidirectional attention is served"
            )
        for term in mask.conflicts("end_aligned", "key_padding"):
            return no(
                f"the mask term {term} is not supported: a projected row mixes the whole sequence ({mask})"
            )
        if spec.kind != "self":
            return no("cross attention is not supported: projections belong to the positions of one sequence")
        if spec.query_len == 1:
            return no("a single query (decoding) gains nothing from projecting all keys; exact is faster")
        if spec.query_len != spec.key_len:
            return no(
                f"{spec.query_len} queries against {spec.key_len} keys: they must stand at the same positions"
            )
        if spec.key_len < config.rank:
            return no(
                f"rank {config.rank} makes more rows than the sequence has tokens ({spec.key_len}); exact is faster, "
                "or lower rank"
            )
        if config.max_length is not None and spec.key_len > config.max_length:
            return no(
                f"the projections serve {config.max_length} positions, the sequence has {spec.key_len}; "
                "raise max_length"
            )
        return YES

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The dense definition."""
        return linformer_attention(inputs, self._checked(inputs, parameters))

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """Projected rows attended in tiles of query rows."""
        return AttentionOutput(
            *linformer_aten.forward(
                inputs.query, inputs.key, inputs.value, inputs.scale, self._checked(inputs, parameters),
                inputs.key_padding,
            )
        )  # fmt: skip

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """Gradients of ``forward``, computed from the scores again."""
        query, key, value, projections = linformer_aten.backward(
            inputs.query, inputs.key, inputs.value, inputs.scale, self._checked(inputs, parameters),
            output.out, output.log_sum_exp, grad_out, grad_log_sum_exp, inputs.key_padding,
        )  # fmt: skip
        of_keys, of_values = projections
        learned = (of_keys + of_values,) if self.config.sharing == "key_value" else projections
        return Gradients(query, key, value, learned)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """None: every key is met through projected rows alone."""
        return torch.zeros_like(inputs.visible(rows))

    def cost(self, spec: SiteSpec) -> Cost:
        """Two products with every projected row, and the projections of keys and values."""
        rank, length = self.config.rank, int(spec.key_len)
        channels = spec.head_dim + spec.value_dim
        flops = 2.0 * spec.batch * (spec.heads + spec.kv_heads) * length * rank * channels
        shapes = self.parameter_shapes(spec)
        # Of a longer projection the columns of the sequence.
        learned = parameter_bytes({name: (*shape[:2], length) for name, shape in shapes.items()})
        return Cost(flops, traffic(spec) + learned, float(rank))

    @property
    def learned(self) -> bool:
        """Always: the projections are parameters."""
        return True

    @property
    def starts_from_sample(self) -> bool:
        """When rows start as means of positions that are alike."""
        return self.config.start == "data"

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """The two projections, ``(heads, rank, max_length)``, or the one."""
        shape = (self._heads(int(spec.kv_heads)), self.config.rank, self._columns(spec))
        return dict.fromkeys(self._names, shape)

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Means of the positions that share a row, blocks or alike in the sample (``LinformerConfig.start``).

        Raises:
            ValueError: The sample is longer than the projections, or has other key heads than the site.
        """
        heads, rank, columns = self.parameter_shapes(spec)[self._names[0]]
        row = (torch.arange(columns) * rank // columns).expand(heads, -1).clone()
        if self.config.start == "data" and sample is not None:
            length = sample.key.shape[2]
            if length > columns or sample.key.shape[1] != int(spec.kv_heads):
                raise ValueError(
                    f"the sample has {sample.key.shape[1]} key heads and {length} positions, the projections "
                    f"are made for {spec.kv_heads} heads and at most {columns} positions"
                )
            row[:, :length] = self._alike(sample, heads)
        initial = torch.nn.functional.one_hot(row, rank).mT.float()
        initial /= initial.sum(-1, keepdim=True).clamp(min=1)
        return {name: initial.clone() for name in self._names}

    def _alike(self, sample: AttentionInputs, heads: int) -> Tensor:
        """A row for every position of the sample, ``(heads, n)``: about equally many positions for each."""
        keys = sample.key.detach().float().cpu()
        if sample.key_padding is not None:
            keys = keys.masked_fill(~sample.key_padding.cpu()[:, None, :, None], 0)
        together = keys.permute(1, 2, 0, 3).flatten(2)
        if heads == 1:
            together = together.movedim(0, 1).flatten(1)[None]
        rows = min(self.config.rank, keys.shape[2])
        return torch.stack([balanced_assignment(points, rows)[1] for points in together])

    def _columns(self, spec: SiteSpec) -> int:
        return int(spec.key_len) if self.config.max_length is None else self.config.max_length

    def _checked(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        heads, length, wanted = self._heads(inputs.key.shape[1]), inputs.key.shape[2], len(self._names)
        shapes = [tuple(p.shape) for p in parameters]
        fitting = len(shapes) == wanted and len(set(shapes)) == 1
        if not fitting or shapes[0][:2] != (heads, self.config.rank) or shapes[0][2] < length:
            raise ValueError(
                f"linformer expects {' and '.join(self._names)} of shape ({heads}, {self.config.rank}, "
                f"at least {length}), got {shapes}; make them with initial_parameters"
            )
        return parameters[0], parameters[-1]

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return (
            ("projection",) if self.config.sharing == "key_value" else ("key_projection", "value_projection")
        )

    def _heads(self, kv_heads: int) -> int:
        """Heads that have projections of their own."""
        return kv_heads if self.config.sharing == "none" else 1
