"""Fast multipole attention with zero keys before the first token, and what its learned bases imply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import cast, leaves, make_inputs, make_parameters, relative_error, run

from fastattn_compile.kernels.aten.fma_plan import Pattern
from fastattn_compile.kernels.cpu.fma import why_not
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.fma import FastMultipoleAttention
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator


def zero_padded(**options: object) -> FastMultipoleAttention:
    options = {"block": 8, "rank": 2, "sinks": 0, "boundary": "zero_pad", **options}
    return make_operator("fma", **options)


def with_zero_tokens(inputs: AttentionInputs, operator: FastMultipoleAttention) -> torch.Tensor:
    """Output of the first block from its definition: a block of zero keys, and at every level the zero rows of a parent."""
    config = operator.config
    length, m = inputs.key.shape[2], config.block
    rows = torch.tensor([0, 3, m - 1])
    scores = inputs.scale * inputs.query[:, :, rows] @ inputs.key.repeat_interleave(2, 1)[:, :, :m].mT
    scores = scores.masked_fill(torch.arange(m) > rows[:, None], -torch.inf)
    far, width = 0.0, m
    while 4 * width <= length:
        far += (width // config.rank if config.scale_attn else 1) * config.rank
        width *= 2
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + m + far
    return weights @ inputs.value.repeat_interleave(2, 1)[:, :, :m] / total


@pytest.mark.parametrize("length", [16, 32, 128])
@pytest.mark.parametrize("scaled", [True, False])
def test_zero_keys_take_part_in_the_first_block(length: int, scaled: bool) -> None:
    inputs = make_inputs("causal", length=length, dtype=torch.float64)
    operator = zero_padded(scale_attn=scaled)
    got = run(operator, inputs).out[:, :, [0, 3, 7]]
    assert torch.allclose(got, with_zero_tokens(inputs, operator), atol=1e-12)


def test_equal_scores_show_the_mass_of_the_zero_keys() -> None:
    """It is half the length for the first half of the queries, and nothing for the second (specification 1.5)."""
    inputs = make_inputs("causal", length=64, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    place = torch.arange(64)
    count = place + 1 + 32 * (place < 32)
    wanted = inputs.value.repeat_interleave(2, 1).cumsum(2) / count[:, None]
    got = run(zero_padded(), inputs)
    assert torch.allclose(got.out, wanted, atol=1e-12)
    assert torch.allclose(got.log_sum_exp, count.double().log().expand(2, 4, 64), atol=1e-12)


@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
def test_both_boundaries_agree_in_the_second_half(basis: str) -> None:
    inputs = make_inputs("causal", length=64, dtype=torch.float64)
    padded, clean = zero_padded(basis=basis), zero_padded(basis=basis, boundary="clean")
    parameters = make_parameters(padded, inputs)
    one, two = run(padded, inputs, parameters).out, run(clean, inputs, parameters).out
    assert torch.allclose(one[:, :, 32:], two[:, :, 32:], atol=1e-12)
    assert (one[:, :, :32] - two[:, :, :32]).abs().amin() > 0


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
def test_gradients_with_zero_keys(basis: str, length: int) -> None:
    inputs = make_inputs(
        "causal", batch=1, heads=2, kv_heads=1, length=length, head_dim=3, dtype=torch.float64
    )
    operator = zero_padded(basis=basis)
    inputs, _, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q, k, v, *params):
        output = run(operator, dataclasses.replace(inputs, query=q, key=k, value=v), params)
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_keys_in_every_type(dtype: torch.dtype) -> None:
    inputs = make_inputs("causal", length=64, dtype=dtype)
    operator = zero_padded()
    oracle = operator.reference(cast(inputs, torch.float64))
    formula = relative_error(operator.reference(inputs).out, oracle.out)
    assert relative_error(run(operator, inputs).out, oracle.out) <= 2 * formula + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("mask", "length", "words"),
    [
        ("none", 64, "causal attention"),
        ("causal & window(20)", 64, "without window"),
        ("causal & key_padding", 64, "padding"),
        ("causal & segments", 64, "documents"),
        ("causal", 72, "times a power of two"),
        ("causal", 8, "at least twice the block"),
    ],
)
def test_sites_without_zero_keys(mask: str, length: int, words: str) -> None:
    spec = dataclasses.replace(make_inputs("causal", length=length).spec(), mask=MaskStructure.parse(mask))
    support = zero_padded().supports(spec)
    assert not support and words in support.reason
    assert zero_padded().decoder(1.0) is None


def test_a_dense_basis_without_mixing_is_a_depthwise_one() -> None:
    inputs = make_inputs("causal & key_padding", dtype=torch.float64)
    depthwise = make_operator("fma", block=8, rank=2, basis="depthwise")
    parameters = make_parameters(depthwise, inputs)
    dense = tuple(
        torch.diag_embed(p.permute(1, 2, 0)).permute(2, 0, 3, 1) if p.dim() == 3 else p for p in parameters
    )
    got = run(make_operator("fma", block=8, rank=2, basis="dense"), inputs, dense)
    assert torch.allclose(got.out, run(depthwise, inputs, parameters).out, atol=1e-12)


def test_recursive_parameters_serve_every_length() -> None:
    operator = make_operator("fma", block=8, rank=2, basis="recursive")
    short, long = make_inputs("causal", length=20), make_inputs("causal", length=333, dtype=torch.float64)
    assert operator.parameter_shapes(short.spec()) == operator.parameter_shapes(long.spec())
    assert len(operator.parameter_shapes(short.spec())) == 6
    parameters = tuple(p.double() for p in make_parameters(operator, short))
    got = run(operator, long, parameters)
    assert torch.allclose(got.out, operator.reference(long, parameters).out, atol=1e-12)
    with pytest.raises(ValueError, match="takes 6 parameters, got 5"):
        run(operator, long, parameters[:5])


def test_the_native_kernel_refuses_what_it_does_not_know() -> None:
    tensors = [make_inputs("causal").query] * 3
    for change in ({"left": 5}, {"causal": False, "right": 3}):
        pattern = dataclasses.replace(Pattern(8, 2, 3, True, right=0), **change)
        assert "serves no window" in why_not(*tensors, pattern)
