"""What an operator is: configuration, abilities, reference, kernels, parameters, cost. Everything comes through here.

An operator is an efficient attention. It never sees a graph: a site is described to it by a ``SiteSpec``, tensors reach it
as ``AttentionInputs`` in the one canonical layout ``(batch, heads, length, head_dim)``. To add one, write a folder beside
``fma`` with a frozen configuration and a subclass of ``Operator``, and name it in ``registry.py``.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from fastattn_compile.operators.site import (
    YES,
    AttentionInputs,
    AttentionOutput,
    Gradients,
    SiteSpec,
    Support,
    no,
)

__all__ = [
    "YES", "AttentionInputs", "AttentionOutput", "ConfigT", "Cost", "Decoder", "Gradients", "Operator", "OperatorConfig",
    "SiteSpec", "Support", "no",
]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Work of one attention, forward, as counted from its definition.

    Args:
        flops: Floating-point operations (a multiply-add is 2).
        bytes: Bytes that must move between memory and processor once.
        keys_per_query: Mean number of score products a query takes part in, exact or pooled.
    """

    flops: float
    bytes: float
    keys_per_query: float


@dataclass(frozen=True)
class OperatorConfig:
    """Base of the configurations: frozen, validated at construction, serialisable.

    Args:
        version: Version of the meaning of the fields; raised when a field changes meaning.
    """

    version: int = 1

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """Builds the configuration from plain values.

        Args:
            values: Field name to value. ``{}`` gives the defaults.

        Raises:
            ValueError: A name is unknown (the text lists the valid ones), a value is out of range, or the version is
                another than this package reads.
            TypeError: A value has the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} of {cls.__name__}; "
                f"valid options: {', '.join(name for name in fields)}"
            )
        for name, value in values.items():
            default = fields[name].default
            if default is not dataclasses.MISSING and default is not None:
                right = isinstance(value, type(default)) and isinstance(value, bool) == isinstance(
                    default, bool
                )
                if not right and not (isinstance(default, float) and type(value) is int):
                    raise TypeError(
                        f"option {name} of {cls.__name__} must be {type(default).__name__}, got {value!r}"
                    )
        known = fields["version"].default
        if values.get("version", known) != known:
            raise ValueError(
                f"version of {cls.__name__} must be {known}, got {values['version']}: the options were written by a "
                "package in which they mean something else"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as JSON gives them back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


ConfigT = TypeVar("ConfigT", bound=OperatorConfig)


class Decoder(ABC):
    """Causal attention one token at a time: a prefill and its steps give what one pass over all tokens gives."""

    @abstractmethod
    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens and keeps what later tokens need of it."""

    @abstractmethod
    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.
        """

    @abstractmethod
    def stored_rows(self) -> int:
        """Rows of keys (exact or pooled) held for one key head: what decoding costs in memory and time."""


class Operator(ABC, Generic[ConfigT]):
    """An efficient attention.

    Subclasses set ``name``, ``config_type`` and ``implementation`` and fill the abstract methods. ``implementation`` is
    raised with every change of numerics: it travels in the operator's token, because compile caches do not hash code.

    Args:
        config: The configuration; the defaults when ``None``.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[OperatorConfig]]
    implementation: ClassVar[int] = 1

    def __init__(self, config: ConfigT | None = None) -> None:
        self.config: ConfigT = config if config is not None else self.config_type()  # type: ignore[assignment]
        # Made once, and not when it is read: torch.compile cannot trace through json.
        values = {"operator": self.name, "implementation": self.implementation, **self.config.to_dict()}
        self._token = json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def token(self) -> str:
        """Name, implementation and configuration as one canonical string: the ``config`` argument of the torch op."""
        return self._token

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self.config, f.name)!r}"
            for f in dataclasses.fields(self.config)
            if f.name != "version"
        ]
        return f"{self.name}({', '.join(changed)})"

    @abstractmethod
    def supports(self, spec: SiteSpec) -> Support:
        """Whether this operator can serve the site, with a reason when it cannot."""

    @abstractmethod
    def reference(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The plain, readable, differentiable definition; O(n^2) memory is allowed. The judge of every kernel."""

    @abstractmethod
    def forward(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
        """The fast path, without autograd."""

    @abstractmethod
    def backward(
        self,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
        grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> Gradients:
        """The gradients of ``forward``, given the gradients of its output and of its log-sum-exp."""

    @abstractmethod
    def exact_keys(
        self, inputs: AttentionInputs, rows: Tensor, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Which keys the given query rows meet one by one, not through a pooled summary.

        Args:
            inputs: The tensors of the site.
            rows: ``(r,)`` query positions.
            parameters: Learned parameters, in order. Where they decide and are not given, only the keys that are met
                whatever they are.

        Returns:
            Boolean, broadcastable to ``(batch, heads, r, key_len)``.
        """

    @abstractmethod
    def cost(self, spec: SiteSpec) -> Cost:
        """Work of the forward pass on a site."""

    def diagnostics(self, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> dict[str, float]:
        """What the operator itself knows of its loss or its balance on some tensors, for reports. Empty for most.

        Args:
            inputs: The tensors of a site.
            parameters: Learned parameters, in order.

        Returns:
            Named numbers, means over rows and heads where not said otherwise.
        """
        return {}

    def decoder(self, scale: float, parameters: tuple[Tensor, ...] = ()) -> Decoder | None:
        """State for causal decoding token by token; ``None`` when the operator has no form of it.

        Args:
            scale: Factor on the scores.
            parameters: Learned parameters, in order.
        """
        return None

    def on_first_tokens(self, longest: int) -> tuple[Operator, int]:
        """What serves the first tokens of a sequence when the whole is too long for ``reference``, and how many they are.

        Itself on ``longest`` tokens, unless the configuration fixes the number of tokens.
        """
        return self, longest

    def routing_loss(
        self, inputs: AttentionInputs, parameters: tuple[Tensor, ...], rows: Tensor
    ) -> Tensor | None:
        """How much softmax mass of some query rows lies where the operator does not route them; ``None`` without routing.

        Differentiable in the parameters: what decides what a query meets is not trained by the output, which depends on
        it only through a hard choice.

        Args:
            inputs: The tensors of a site.
            parameters: Learned parameters, in order.
            rows: ``(r,)`` query positions.
        """
        return None

    def pieces(self, spec: SiteSpec) -> list[tuple[Operator, SiteSpec]]:
        """The operators that do the work at a site, each with its share of it, for predictions of its speed."""
        return [(self, spec)]

    @property
    def comes_apart(self) -> bool:
        """Whether this is one softmax over ``exact_keys`` and summaries of the rest, so that the log-sum-exp tells how
        much of the output is near field and how much is far.
        """
        return False

    @property
    def only_on_aten(self) -> bool:
        """Whether no kernel but that on ATen serves this configuration at any site, for predictions of its speed."""
        return False

    @property
    def learned(self) -> bool:
        """Whether the operator has learned parameters in this configuration."""
        return False

    @property
    def starts_from_sample(self) -> bool:
        """Whether ``initial_parameters`` depends on the sample, so that it is worth a run of the model to have one."""
        return False

    def parameter_shapes(self, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the learned parameters at a site, in order. Empty when there are none."""
        return {}

    def initial_parameters(self, spec: SiteSpec, sample: AttentionInputs | None = None) -> dict[str, Tensor]:
        """Initial values of the learned parameters, in the order of ``parameter_shapes``.

        Args:
            spec: The site.
            sample: Calibration tensors of the site, used by operators whose start depends on data.
        """
        return {}
