"""The judge of every kernel: definitions in float64, tolerances derived from what a type itself costs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import MaskStructure


def make_inputs(
    mask: str = "causal",
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    length: int = 75,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    key_len: int | None = None,
    seed: int = 0,
) -> AttentionInputs:
    """Random tensors of one attention; padding is ragged, right in one sequence and left in the next.

    A bias is named behind the mask: ``"causal + alibi"``, ``"none + bucketed"``.
    """
    mask, _, bias = mask.partition(" + ")
    generator = torch.Generator().manual_seed(seed)
    key_len = length if key_len is None else key_len
    value_dim = head_dim if value_dim is None else value_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    structure = MaskStructure.parse(mask)
    padding = segments = None
    if structure.key_padding:
        padding = torch.rand(batch, key_len, generator=generator) > 0.1
        for sequence in range(batch):
            cut = int(torch.randint(1, max(2, key_len // 2), (), generator=generator))
            padding[sequence, -cut:] = False
            if sequence % 2:
                padding[sequence] = padding[sequence].flip(0)
    if structure.segments:
        segments = (torch.rand(batch, key_len, generator=generator) < 0.1).cumsum(-1)
    return AttentionInputs(
        draw(batch, heads, length, head_dim), draw(batch, kv_heads, key_len, head_dim),
        draw(batch, kv_heads, key_len, value_dim), 0.7 * head_dim**-0.5, structure, padding, segments,
        _bias(bias, heads, key_len, generator, dtype),
    )  # fmt: skip


def _bias(
    kind: str, heads: int, length: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor | None:
    """Slopes from gentle to steep, or a number for every distance, smooth and rough in parts."""
    if not kind:
        return None
    if kind == "alibi":
        return (2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)).to(dtype)
    distance = torch.arange(1 - length, length, dtype=torch.float64)
    rough = torch.randn(heads, 2 * length - 1, generator=generator, dtype=torch.float64)
    return (0.3 * rough + torch.sin(distance / 9) - 0.02 * distance.abs()).to(dtype)


def make_parameters(operator: Operator, inputs: AttentionInputs, noise: float = 0.3) -> tuple[Tensor, ...]:
    """Learned parameters at their start, moved a little so that nothing is symmetric by accident."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for value in operator.initial_parameters(inputs.spec(), inputs).values():
        size = value.abs().max().clamp(min=0.1)
        made.append(
            (value + noise * size * torch.randn(value.shape, generator=generator)).to(inputs.value.dtype)
        )
    return tuple(made)


def cast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """The same numbers in another type."""
    return dataclasses.replace(
        inputs, query=inputs.query.to(dtype), key=inputs.key.to(dtype), value=inputs.value.to(dtype),
        bias=None if inputs.bias is None else inputs.bias.to(dtype),
    )  # fmt: skip


def run(operator: Operator, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> AttentionOutput:
    """The operator through its torch op, as users and compiled graphs call it."""
    out, log_sum_exp = attend(
        inputs.query, inputs.key, inputs.value, operator, scale=inputs.scale, mask=inputs.mask,
        key_padding=inputs.key_padding, segments=inputs.segments, bias=inputs.bias, parameters=parameters,
    )  # fmt: skip
    return AttentionOutput(out, log_sum_exp)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``; infinities must stand at the same places."""
    got, wanted = got.detach().double(), wanted.detach().double()
    infinite = torch.isinf(wanted)
    assert torch.equal(infinite, torch.isinf(got)), "infinities differ"
    difference = (got - wanted).masked_fill(infinite, 0).norm()
    return float(difference / wanted.masked_fill(infinite, 0).norm().clamp(min=1e-30))


def assert_as_good_as(got: Tensor, *, oracle: Tensor, formula: Tensor, name: str = "output") -> None:
    """A kernel may err twice as much as its formula evaluated in its type, and one rounding more.

    Args:
        got: What the kernel gave.
        oracle: What the definition gives in float64 from the same numbers.
        formula: What the definition gives, evaluated in the kernel's type.
        name: Of the quantity, for the message.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    error, typical = relative_error(got, oracle), relative_error(formula, oracle)
    allowed = 2 * typical + torch.finfo(got.dtype).eps
    assert error <= allowed, (
        f"{name}: relative error {error:.2e}, its formula in {got.dtype} errs {typical:.2e}"
    )


def gradients(
    outputs: AttentionOutput, sources: tuple[Tensor, ...], seeds: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(out * seed) + sum(lse * seed)`` over the rows that see a key."""
    log_sum_exp = outputs.log_sum_exp
    seen = torch.isfinite(log_sum_exp.detach())
    total = (outputs.out.to(seeds[0].dtype) * seeds[0]).sum()
    total = total + (log_sum_exp.masked_fill(~seen, 0).to(seeds[1].dtype) * seeds[1] * seen).sum()
    found = torch.autograd.grad(total, sources, allow_unused=True)
    return tuple(torch.zeros_like(s) if g is None else g for g, s in zip(found, sources))


def leaves(
    inputs: AttentionInputs, parameters: tuple[Tensor, ...]
) -> tuple[AttentionInputs, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Copies that require gradients: inputs, parameters, and all of them in one tuple."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    made = tuple(p.detach().clone().requires_grad_() for p in parameters)
    given = dataclasses.replace(inputs, query=q, key=k, value=v)
    if inputs.bias is None or inputs.bias.dim() == 1:
        return given, made, (q, k, v, *made)
    bias = inputs.bias.detach().clone().requires_grad_()
    return dataclasses.replace(given, bias=bias), made, (q, k, v, *made, bias)
