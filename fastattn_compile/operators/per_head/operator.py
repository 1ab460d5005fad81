"""A site whose heads are served by different operators, as one operator."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastattn_compile.operators.base import (
    YES,
    AttentionInputs,
    AttentionOutput,
    Cost,
    Decoder,
    Gradients,
    Operator,
    SiteSpec,
    Support,
    no,
)
from fastattn_compile.operators.per_head.config import PerHeadConfig
from fastattn_compile.operators.per_head.decode import PerHeadDecoder
from fastattn_compile.operators.per_head.served import Served, together
from fastattn_compile.operators.registry import make_operator

_LONGEST = 1 << 24


class PerHeadAttention(Operator[PerHeadConfig]):
    """The heads of a site by different operators: each part attends with its own heads, as if they were the whole site.

    Serves what every part serves with its heads. Learned parameters are those of the parts, one after the other.
    """

    name = "per_head"
    config_type = PerHeadConfig

    def __init__(self, config: PerHeadConfig | None = None) -> None:
        super().__init__(config)
        self.operators = tuple(
            make_operator(part["operator"], **part.get("options", {})) for part in self.config.parts
        )

    def __repr__(self) -> str:
        heads = self.config.heads
        if not heads:
            return f"per_head(all heads: {self.operators[0]})"
        named = [
            f"key heads {_listed([h for h, of in enumerate(heads) if of == n])}: {self.operators[n]}"
            for n in sorted(set(heads))
        ]
        return f"per_head({'; '.join(named)})"

    def served(self, heads: int, kv_heads: int) -> list[Served]:
        """The parts that serve any head of a site, whose numbers of heads may be symbolic."""
        heads, kv_heads = int(heads), int(kv_heads)
        group = heads // kv_heads
        return [
            Served(self.operators[part], part, mine, [h * group + i for h in mine for i in range(group)])
            for part, mine in self.config.served(kv_heads)
        ]

    def supports(self, spec: SiteSpec) -> Support:
        """Every part must serve its heads."""
        named = len(self.config.heads)
        if named and named != spec.kv_heads:
            return no(f"heads names {named} key heads, the site has {spec.kv_heads}")
        for part in self.served(spec.heads, spec.kv_heads):
            support = part.operator.supports(part.spec(spec))
            if not support:
                return no(f"{part.operator.name} of key heads {_listed(part.key_heads)}: {support.reason}")
        return YES

    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The definitions of the parts, put together."""
        split = self.split(inputs, parameters)
        return together([part for part, _, _ in split], [p.operator.reference(x, own) for p, x, own in split])

    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The fast paths of the parts, put together."""
        split = self.split(inputs, parameters)
        return together([part for part, _, _ in split], [p.operator.forward(x, own) for p, x, own in split])

    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """The gradients of the parts, put together."""
        query, key, value = (torch.empty_like(x) for x in (inputs.query, inputs.key, inputs.value))
        bias = None if inputs.bias is None or inputs.bias.dim() != 2 else torch.zeros_like(inputs.bias)
        learned: list[Tensor] = []
        for part, given, own in self.split(inputs, parameters):
            at = part.query_heads
            found = part.operator.backward(
                given, own, AttentionOutput(output.out[:, at], output.log_sum_exp[:, at]), grad_out[:, at],
                None if grad_log_sum_exp is None else grad_log_sum_exp[:, at],
            )  # fmt: skip
            query[:, at], key[:, part.key_heads], value[:, part.key_heads] = (
                found.query,
                found.key,
                found.value,
            )
            learned += found.parameters
            if bias is not None and found.bias is not None:
                bias[at] = found.bias
        return Gradients(query, key, value, tuple(learned), bias)

    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """What the parts meet, head by head."""
        batch, heads = inputs.query.shape[:2]
        met = inputs.key.new_zeros(batch, heads, len(rows), inputs.key.shape[2], dtype=torch.bool)
        for part, given, own in self.split(inputs, parameters):
            met[:, part.query_heads] = part.operator.exact_keys(given, rows, own)
        return met

    def cost(self, spec: SiteSpec) -> Cost:
        """The sum of the parts; keys a query in the mean over heads."""
        costs = [(at.heads, operator.cost(at)) for operator, at in self.pieces(spec)]
        keys = sum(cost.keys_per_query * heads for heads, cost in costs) / int(spec.heads)
        return Cost(sum(c.flops for _, c in costs), sum(c.bytes for _, c in costs), keys)

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """What each part tells, with its key heads."""
        return {
            f"{name} (key heads {_listed(part.key_heads)})": number
            for part, given, own in self.split(inputs, parameters)
            for name, number in part.operator.diagnostics(given, own).items()
        }

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """The decoders of the parts; a part without one is told of at the prefill, where the site's heads are known."""
        return PerHeadDecoder(self, scale, parameters)

    def pieces(self, spec: SiteSpec) -> list[tuple[Operator, SiteSpec]]:
        """The parts at their heads."""
        return [(part.operator, part.spec(spec)) for part in self.served(spec.heads, spec.kv_heads)]

    def on_first_tokens(self, longest: int) -> tuple[Operator, int]:
        """Every part on as many tokens as all of them can be shortened to."""
        shorter = list(self.operators)
        for _ in range(2):  # a part that fixes its tokens may come last
            for number, operator in enumerate(shorter):
                shorter[number], longest = operator.on_first_tokens(longest)
        parts = tuple({"operator": op.name, "options": op.config.to_dict()} for op in shorter)
        return PerHeadAttention(dataclasses.replace(self.config, parts=parts)), longest

    def routing_loss(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
    ) -> Tensor | None:
        """The sum over the parts that route."""
        losses = [
            loss
            for part, given, own in self.split(inputs, parameters)
            if (loss := part.operator.routing_loss(given, own, rows)) is not None
        ]
        return torch.stack(losses).sum() if losses else None

    @property
    def comes_apart(self) -> bool:
        """Whether all parts do."""
        return all(operator.comes_apart for operator in self.operators)

    @property
    def only_on_aten(self) -> bool:
        """Whether a part is."""
        return any(operator.only_on_aten for operator in self.operators)

    @property
    def learned(self) -> bool:
        """Whether a part has learned parameters."""
        return any(operator.learned for operator in self.operators)

    @property
    def starts_from_sample(self) -> bool:
        """Whether a part does."""
        return any(operator.starts_from_sample for operator in self.operators)

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Those of the parts, named by their numbers."""
        return {
            f"part{part.number}_{name}": shape
            for part in self.served(spec.heads, spec.kv_heads)
            for name, shape in part.operator.parameter_shapes(part.spec(spec)).items()
        }

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Those of the parts, each from its heads of the sample."""
        return {
            f"part{part.number}_{name}": values
            for part in self.served(spec.heads, spec.kv_heads)
            for name, values in part.operator.initial_parameters(
                part.spec(spec), None if sample is None else part.inputs(sample)
            ).items()
        }

    def split(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
    ) -> list[tuple[Served, AttentionInputs, tuple[Tensor, ...]]]:
        """Each part with its tensors and its parameters, in the order of the configuration.

        Raises:
            ValueError: The parameters are not as many as the parts have at any length of the sequence.
        """
        parts = self.served(inputs.query.shape[1], inputs.key.shape[1])
        given = [part.inputs(inputs) for part in parts]
        found, begin = [], 0
        for part, tensors, count in zip(parts, given, self._counts(parts, inputs.spec(), len(parameters))):
            found.append((part, tensors, parameters[begin : begin + count]))
            begin += count
        return found

    def _counts(self, parts: list[Served], spec: SiteSpec, total: int) -> list[int]:
        """How many of the parameters are each part's; there may be more than this length needs (levels of a tree)."""
        if not total:
            return [0] * len(parts)
        length = max(1, int(spec.key_len))
        while length <= _LONGEST:
            at = dataclasses.replace(spec, query_len=length, key_len=length)
            counts = [len(part.operator.parameter_shapes(part.spec(at))) for part in parts]
            if sum(counts) == total:
                return counts
            length *= 2
        raise ValueError(
            f"the parts have {sum(counts)} learned parameters at {_LONGEST} tokens and fewer at less, got {total}"
        )


def _listed(heads: list[int]) -> str:
    return ", ".join(map(str, heads))
