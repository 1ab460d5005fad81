"""One measurement: which operator, on what sizes, type, device and in which direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.errors import OptionError
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# A backward pass makes the scores again and has four products more: five for the two of the forward pass.
WORK = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Args:
        operator: Name of the operator.
        options: Fields of its configuration.
        n: Tokens.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels.
        causal: Causal or bidirectional.
        dtype: Type of the tensors, without ``torch.``.
        device: ``"cpu"`` or ``"cuda"``.
        direction: One of ``DIRECTIONS``; ``"both"`` is a forward and its backward.
    """

    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    n: int = 4096
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    direction: str = FORWARD

    def __post_init__(self) -> None:
        for name in ("n", "batch", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise OptionError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("direction", self.direction, DIRECTIONS),
            ("device", self.device, ("cpu", "cuda")),
        ):
            if value not in known:
                raise OptionError(f"unknown {name} {value!r}; one of {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device 'cuda' was asked for, and torch sees no GPU here")
        self.make_operator()

    @property
    def mask(self) -> MaskStructure:
        """The mask."""
        return CAUSAL if self.causal else NO_MASK

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the tensors."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells two cases apart: a row of this key need not be measured twice."""
        config = self.make_operator().config.to_dict()
        values = {
            **dataclasses.asdict(self),
            "options": tuple(sorted((k, str(v)) for k, v in config.items())),
        }
        return tuple(values.values())

    def make_operator(self) -> Operator:
        """The operator; bad options raise ``OptionError``."""
        try:
            return make_operator(self.operator, **self.options)
        except (ValueError, TypeError) as error:
            raise OptionError(str(error)) from error

    def spec(self) -> SiteSpec:
        """The site as operators see it."""
        return SiteSpec(
            self.batch, self.heads, self.kv_heads, self.n, self.n, self.head_dim, self.head_dim,
            dtype=self.torch_dtype, device=self.device, mask=self.mask,
        )  # fmt: skip

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value; the same numbers for the same seed and sizes."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            shape = self.batch, heads, self.n, self.head_dim
            x = torch.randn(shape, generator=generator).to(self.device, self.torch_dtype)
            return x.requires_grad_(self.direction != FORWARD)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)

    def inputs(self, tensors: tuple[Tensor, Tensor, Tensor]) -> AttentionInputs:
        """The tensors as operators see them."""
        q, k, v = (x.detach() for x in tensors)
        return AttentionInputs(q, k, v, self.head_dim**-0.5, self.mask)

    def parameters(self, operator: Operator, inputs: AttentionInputs) -> tuple[Tensor, ...]:
        """Learned parameters at their start from the case's own tensors."""
        made = operator.initial_parameters(inputs.spec(), inputs) if operator.learned else {}
        return tuple(p.to(self.device, self.torch_dtype) for p in made.values())

    def attention(self, operator: Operator, parameters: tuple[Tensor, ...]) -> Attention:
        """The operator as a function of query, key and value."""
        mask = self.mask

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, operator, mask=mask, parameters=parameters)[0]

        return attention

    def step(self, attention: Attention, tensors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
        """What one timed call does."""
        if self.direction == FORWARD:
            return lambda: attention(*tensors)
        seed = torch.randn_like(tensors[0])
        if self.direction == BOTH:
            return lambda: torch.autograd.grad(attention(*tensors), tensors, seed)
        out = attention(*tensors)
        return lambda: torch.autograd.grad(out, tensors, seed, retain_graph=True)
