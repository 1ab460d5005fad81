"""A kernel held against the definition it implements: what ``FASTATTN_CHECK=1`` and every benchmark row ask first.

The tolerance is derived, not typed: against the definition in float64 a kernel may err twice as much as the definition
evaluated in the kernel's own type does, and one rounding more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.errors import NumericError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator

LONGEST = 1024
_NAMES = ("query", "key", "value")


@dataclass(frozen=True)
class Deviation:
    """How far one result of a kernel is from the definition.

    Args:
        name: ``"output"``, ``"log_sum_exp"`` or ``"gradient of ..."``.
        error: Relative error (Frobenius) against the definition in float64; infinite when infinities or NaN differ.
        allowed: Largest error that the type explains.
    """

    name: str
    error: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether the kernel is as good as its type."""
        return self.error <= self.allowed


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``; infinite when they differ in where they are not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    special = ~torch.isfinite(wanted)
    if not torch.equal(got[special].nan_to_num(0.5), wanted[special].nan_to_num(0.5)):
        return float("inf")
    difference, size = (x.masked_fill(special, 0).norm() for x in (got - wanted, wanted))
    error = float(difference / size.clamp(min=1e-30))
    return error if error == error else float("inf")


def excerpt(inputs: AttentionInputs, longest: int = LONGEST, *, whole_heads: bool = False) -> AttentionInputs:
    """The first tokens, sequence and key head of an attention, small enough for the definition.

    Args:
        inputs: The tensors.
        longest: Tokens to keep at most.
        whole_heads: Keep every head: learned parameters and biases may belong to one each.
    """
    kept = None if whole_heads or inputs.bias is not None else 1
    q, k, v = (
        x[:1, : kept and kept * heads, :longest]
        for x, heads in ((inputs.query, inputs.group), (inputs.key, 1), (inputs.value, 1))
    )
    padding, segments = (
        None if x is None else x[:1, :longest] for x in (inputs.key_padding, inputs.segments)
    )
    return dataclasses.replace(inputs, query=q, key=k, value=v, key_padding=padding, segments=segments)


def compare_with_reference(
    operator: Operator, inputs: AttentionInputs, parameters: Sequence[Tensor] = (), *, gradients: bool = False
) -> list[Deviation]:
    """Runs a kernel and its definition on the same tensors. The definition takes O(n^2) memory: give an ``excerpt``.

    Args:
        operator: The operator.
        inputs: The tensors.
        parameters: Learned parameters, in order.
        gradients: Compare the gradients of query, key, value and parameters too.
    """
    parameters = tuple(parameters)
    kernel = operator.forward(inputs, parameters)
    wide = _in(torch.float64, inputs), tuple(p.double() for p in parameters)
    narrow = inputs, tuple(p.to(inputs.value.dtype) for p in parameters)
    if not gradients:
        exact, typical = operator.reference(*wide), operator.reference(*narrow)
        return [
            _deviation("output", kernel.out, exact.out, typical.out),
            _deviation("log_sum_exp", kernel.log_sum_exp, exact.log_sum_exp, typical.log_sum_exp),
        ]
    with torch.enable_grad():
        (exact, exact_grads), (typical, typical_grads) = (
            _differentiated(operator, *x) for x in (wide, narrow)
        )
    seed = _seed(inputs)
    made = operator.backward(inputs, parameters, kernel, seed, None)
    kernel_grads = (made.query, made.key, made.value, *made.parameters)
    names = [*_NAMES, *(f"parameter {at}" for at in range(len(parameters)))]
    return [
        _deviation("output", kernel.out, exact.out, typical.out),
        _deviation("log_sum_exp", kernel.log_sum_exp, exact.log_sum_exp, typical.log_sum_exp),
        *(
            _deviation(f"gradient of {name}", *three)
            for name, *three in zip(names, kernel_grads, exact_grads, typical_grads)
        ),
    ]


def insist(operator: Operator, inputs: AttentionInputs, parameters: Sequence[Tensor], site: str) -> None:
    """Raises when a kernel strays from its definition on the tensors of a site.

    Args:
        operator: The operator.
        inputs: The tensors of the site; an excerpt of them is compared.
        parameters: Learned parameters, in order.
        site: Name of the site, for the message.

    Raises:
        NumericError: It strays further than its type explains.
    """
    judged, longest = operator.on_first_tokens(min(LONGEST, inputs.key.shape[2]))
    part = excerpt(inputs, longest, whole_heads=bool(parameters))
    if judged is not operator:
        parameters = parameters[: len(judged.parameter_shapes(part.spec()))]
    for deviation in compare_with_reference(judged, part, parameters):
        if not deviation.within:
            raise NumericError(
                f"the kernel of {operator} at site {site or '(unnamed)'} disagrees with its definition: relative error "
                f"of the {deviation.name} {deviation.error:.2e}, its type ({inputs.value.dtype}) explains "
                f"{deviation.allowed:.2e}. Run with FASTATTN_KERNELS=aten, and please report it."
            )


def _deviation(name: str, kernel: Tensor, exact: Tensor, typical: Tensor) -> Deviation:
    allowed = 2 * relative_error(typical, exact) + torch.finfo(kernel.dtype).eps
    return Deviation(name, relative_error(kernel, exact), allowed)


def _in(dtype: torch.dtype, inputs: AttentionInputs) -> AttentionInputs:
    q, k, v = (x.to(dtype) for x in (inputs.query, inputs.key, inputs.value))
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    return dataclasses.replace(inputs, query=q, key=k, value=v, bias=bias)


def _seed(inputs: AttentionInputs) -> Tensor:
    """The gradient of the output that is compared: the same numbers in every type."""
    generator = torch.Generator().manual_seed(0)
    shape = *inputs.query.shape[:3], inputs.value.shape[3]
    return torch.randn(shape, generator=generator).to(inputs.value.device, inputs.value.dtype)


def _differentiated(
    operator: Operator, inputs: AttentionInputs, parameters: tuple[Tensor, ...]
) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
    q, k, v, *learned = (
        x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, *parameters)
    )
    output = operator.reference(dataclasses.replace(inputs, query=q, key=k, value=v), tuple(learned))
    seed = _seed(inputs).to(output.out.dtype)
    grads = torch.autograd.grad(output.out, (q, k, v, *learned), seed, allow_unused=True)
    return output, tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (q, k, v, *learned)))
