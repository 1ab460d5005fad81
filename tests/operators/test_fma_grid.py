"""Fast multipole attention on grids: who meets whom, identities with exact attention, gradients, refusals, vision models."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend.common import compiled, operators_used
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_as_good_as,
    cast,
    gradients,
    leaves,
    make_inputs,
    make_parameters,
    relative_error,
    run,
)
from torch import Tensor, nn

import fastattn_compile as fa
from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.kernels.aten.fma_grid_plan import GridPattern, level_offsets, met_cells
from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.check import compare_with_reference
from fastattn_compile.operators.exact.reference import exact_attention
from fastattn_compile.operators.fma.config import FmaConfig
from fastattn_compile.operators.fma.grid_cells import grid_levels, part_grid
from fastattn_compile.operators.fma.grid_cost import grid_pairs
from fastattn_compile.operators.fma.grid_reference import far_cells
from fastattn_compile.operators.library import attend, torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.observe import observing
from fastattn_compile.operators.registry import make_operator, operator_from_token

# Ragged in every way: odd, thin, cut cells, tokens in front, ranks that are no square.
GRIDS: dict[str, dict[str, Any]] = {
    "even": {"grid": (12, 20), "block": 4, "rank": 1},
    "rank 2": {"grid": (9, 14), "block": 4, "rank": 2},
    "ragged": {"grid": (13, 7), "block": 4, "rank": 4, "prefix": 2},
    "thin": {"grid": (1, 37), "block": 4, "rank": 2},
    "one": {"grid": (9, 9), "block": 1, "rank": 1, "prefix": 1},
    "nine": {"grid": (17, 10), "block": 9, "rank": 3},
    "unscaled": {"grid": (8, 11), "block": 4, "rank": 2, "scale_attn": False},
    "learned": {"grid": (11, 12), "block": 4, "rank": 2, "basis": "depthwise"},
    "learned thin": {"grid": (2, 40), "block": 4, "rank": 1, "basis": "depthwise", "prefix": 1},
}
each_grid = pytest.mark.parametrize("case", GRIDS)


def tokens_of(options: dict[str, Any]) -> int:
    return int(math.prod(options["grid"]) + options.get("prefix", 0))


def build(
    case: str, mask: str = "none", **sizes: Any
) -> tuple[Operator, AttentionInputs, tuple[Tensor, ...]]:
    operator = make_operator("fma", **GRIDS[case])
    inputs = make_inputs(mask, length=tokens_of(GRIDS[case]), **sizes)
    return operator, inputs, make_parameters(operator, inputs)


def pattern(grid: tuple[int, int], side: int) -> GridPattern:
    levels = grid_levels(FmaConfig(grid=grid, block=side * side, rank=1))
    return GridPattern(*grid, side, (1, 1), levels)


def lists(grid: tuple[int, int], side: int) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """For every finest cell the finest cells it meets, and (level, y, x) of the pooled ones; from the kernel's plan."""
    plan = pattern(grid, side)
    down, across = plan.cells(0)
    near, far = met_cells(plan, slice(0, down * across), torch.device("cpu"))
    offsets, found = level_offsets(plan), []
    for fine, pooled in zip(near.tolist(), far.tolist()):
        cells = []
        for number in (x for x in pooled if x < offsets[-1]):
            level = next(at for at in range(plan.levels) if number < offsets[at + 1])
            cells.append((level + 1, *divmod(number - offsets[level], plan.cells(level)[1])))
        found.append(([x for x in fine if x < down * across], cells))
    return found


class TestCells:
    def test_the_worked_example(self) -> None:
        """8 x 8 tokens, cells of one: the lists that the specification writes out."""
        found = lists((8, 8), 1)
        near, far = found[0]
        assert [divmod(x, 8) for x in near] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        corner = [(y, x) for y in range(4) for x in range(4) if y > 1 or x > 1]
        assert len(corner) == 12
        assert far == [(1, y, x) for y, x in corner] + [(2, y, x) for y, x in corner]
        near, far = found[3 * 8 + 3]
        assert [divmod(x, 8) for x in near] == [(y, x) for y in (2, 3, 4) for x in (2, 3, 4)]
        first = [(1, y, x) for y in range(6) for x in range(6) if y not in (2, 3, 4) or x not in (2, 3, 4)]
        assert len(first) == 27
        second = {(0, 3), (1, 3), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)}
        assert far[:27] == first and {(y, x) for _, y, x in far[27:]} == second and len(far) == 34

    @given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4))
    @settings(max_examples=60, deadline=None)
    def test_every_query_meets_every_token_once(self, height: int, width: int, side: int) -> None:
        plan = pattern((height, width), side)
        down, across = plan.cells(0)
        if plan.levels == 0:  # attended exactly: all cells touch
            assert max(down, across) <= 2
            return
        for near, far in lists((height, width), side):
            seen = torch.zeros(down, across, dtype=torch.int)
            for cell in near:
                seen[cell // across, cell % across] += 1
            for level, y, x in far:
                reach = 1 << (level - 1)
                seen[y * reach : (y + 1) * reach, x * reach : (x + 1) * reach] += 1
            assert (seen == 1).all()

    @pytest.mark.parametrize(
        ("grid", "side"),
        [
            ((8, 8), 1),
            ((16, 16), 2),
            ((32, 16), 2),
            ((56, 56), 7),
            ((28, 28), 7),
            ((12, 20), 2),
        ],
    )
    def test_the_definition_meets_every_token_once(self, grid: tuple[int, int], side: int) -> None:
        """The rule of the definition, written from coordinates, and the lists of the kernel agree."""
        found = lists(grid, side)
        plan = pattern(grid, side)
        down, across = plan.cells(0)
        own = torch.tensor([[y, x] for y in range(down) for x in range(across)])
        for level in range(plan.levels):
            rows, columns = plan.cells(level)
            cells = torch.tensor([[y, x] for y in range(rows) for x in range(columns)])
            met = far_cells(own[:, None] // 2**level, cells)
            for at, (_, far) in enumerate(found):
                of_level = [(y, x) for one, y, x in far if one == level + 1]
                assert of_level == [tuple(c) for c in cells[met[at]].tolist()]

    @pytest.mark.parametrize(
        ("block", "rank", "parts"),
        [(64, 4, (2, 2)), (64, 2, (1, 2)), (16, 8, (2, 4)), (81, 27, (3, 9)), (36, 6, (2, 3))],
    )
    def test_parts_of_a_mean(self, block: int, rank: int, parts: tuple[int, int]) -> None:
        assert part_grid(FmaConfig(grid=(9, 9), block=block, rank=rank)) == parts


class TestNumbers:
    @each_grid
    @pytest.mark.parametrize("mask", ["none", "key_padding"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_results_are_as_accurate_as_their_type(self, case: str, mask: str, dtype: torch.dtype) -> None:
        operator, inputs, parameters = build(case, mask, dtype=dtype)
        seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=dtype)

        def of(evaluate: Any, given: AttentionInputs, params: tuple[Tensor, ...]) -> list[Tensor]:
            given, params, sources = leaves(given, params)
            output = evaluate(given, params)
            seed = tuple(s.to(given.value.dtype) for s in seeds)
            return [output.out, output.log_sum_exp, *gradients(output, sources, seed)]

        got = of(lambda i, p: run(operator, i, p), inputs, parameters)
        formula = of(operator.reference, inputs, parameters)
        oracle = of(operator.reference, cast(inputs, torch.float64), tuple(p.double() for p in parameters))
        assert got[0].dtype == dtype and got[0].is_contiguous() and got[1].dtype == torch.float32
        for at, (g, f, o) in enumerate(zip(got, formula, oracle)):
            assert_as_good_as(g, oracle=o, formula=f, name=f"result {at}")

    @given(st.data())
    @settings(max_examples=25, deadline=None)
    def test_any_shape_equals_the_definition(self, data: st.DataObject) -> None:
        draw = data.draw
        side = draw(st.integers(1, 4))
        options = {
            "grid": (draw(st.integers(1, 15)), draw(st.integers(1, 15))), "block": side * side,
            "rank": draw(st.sampled_from([r for r in range(1, side * side + 1) if side * side % r == 0])),
            "basis": draw(st.sampled_from(["mean", "depthwise"])), "prefix": draw(st.integers(0, 2)),
            "scale_attn": draw(st.booleans()),
        }  # fmt: skip
        kv_heads = draw(st.integers(1, 2))
        operator = make_operator("fma", **options)
        inputs = make_inputs(
            draw(st.sampled_from(["none", "key_padding"])), batch=draw(st.integers(1, 2)), kv_heads=kv_heads,
            heads=kv_heads * draw(st.integers(1, 3)), length=tokens_of(options), head_dim=draw(st.integers(1, 5)),
            value_dim=draw(st.integers(1, 5)), dtype=torch.float64, seed=draw(st.integers(0, 99)),
        )  # fmt: skip
        parameters = make_parameters(operator, inputs)
        inputs, parameters, sources = leaves(inputs, parameters)
        results = []
        for evaluate in (operator.reference, lambda i, p: run(operator, i, p)):
            output = evaluate(inputs, parameters)
            generator = torch.Generator().manual_seed(0)
            seeds = tuple(
                torch.randn(x.shape, generator=generator, dtype=x.dtype)
                for x in (output.out, output.log_sum_exp)
            )
            results.append([output.out, output.log_sum_exp, *gradients(output, sources, seeds)])
        for wanted, got in zip(*results):
            assert relative_error(got, wanted) < 1e-12 or (got - wanted).abs().max() < 1e-12

    @each_grid
    def test_gradcheck(self, case: str) -> None:
        operator, inputs, parameters = build(
            case, batch=1, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64
        )
        inputs, _, sources = leaves(inputs, parameters)

        def function(q: Tensor, k: Tensor, v: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
            output = run(operator, dataclasses.replace(inputs, query=q, key=k, value=v), params)
            return output.out, output.log_sum_exp

        assert torch.autograd.gradcheck(function, sources, fast_mode=True)

    @pytest.mark.parametrize("case", ["ragged", "learned"])
    def test_opcheck(self, case: str) -> None:
        operator, inputs, parameters = build(case, batch=1)
        tensors = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        made = [p.requires_grad_() for p in parameters]
        told = 0.3, str(inputs.mask), operator.token, "site"
        torch.library.opcheck(torch_op("fma"), (*tensors, None, None, None, made, *told))

    @pytest.mark.parametrize("grid", [(4, 4), (3, 2), (1, 4), (4, 1)])
    @pytest.mark.parametrize("prefix", [0, 1])
    def test_a_grid_of_near_cells_is_exact(self, grid: tuple[int, int], prefix: int) -> None:
        operator = make_operator("fma", grid=grid, block=4, rank=2, prefix=prefix)
        inputs = make_inputs("none", length=math.prod(grid) + prefix, dtype=torch.float64)
        exact = exact_attention(inputs)
        for got in (run(operator, inputs), operator.reference(inputs)):
            assert relative_error(got.out, exact.out) < 1e-14
            assert relative_error(got.log_sum_exp, exact.log_sum_exp) < 1e-14
        assert operator.exact_keys(inputs, torch.arange(2)).all()

    def test_parts_of_one_token_make_the_first_level_exact(self) -> None:
        operator = make_operator("fma", grid=(7, 8), block=4, rank=4)  # one pooled level
        inputs = make_inputs("none", length=56, dtype=torch.float64)
        assert relative_error(run(operator, inputs).out, exact_attention(inputs).out) < 1e-14

    @each_grid
    def test_keys_that_are_alike_in_coarse_cells_give_exact_attention(self, case: str) -> None:
        """Means lose nothing of keys that are constant over a cell of the coarsest level, whatever the values."""
        options = {**GRIDS[case], "basis": "mean", "scale_attn": True}
        operator = make_operator("fma", **options)
        height, width = options["grid"]
        inputs = make_inputs("none", length=tokens_of(options), dtype=torch.float64)
        side = math.isqrt(options["block"]) << (grid_levels(operator.config) - 1)
        place = torch.arange(height * width)
        cell = place // width // side * width + place % width // side
        front = inputs.key[:, :, : operator.config.prefix]
        key = torch.cat([front, torch.randn(2, 2, height * width, 8, dtype=torch.float64)[:, :, cell]], 2)
        inputs = dataclasses.replace(inputs, key=key)
        got, exact = run(operator, inputs), exact_attention(inputs)
        assert relative_error(got.out, exact.out) < 1e-13
        assert relative_error(got.log_sum_exp, exact.log_sum_exp) < 1e-13

    @pytest.mark.parametrize("case", ["even", "ragged", "thin", "nine"])
    @pytest.mark.parametrize("mask", ["none", "key_padding"])
    def test_queries_of_zero_give_the_mean_of_the_values(self, case: str, mask: str) -> None:
        operator, inputs, _ = build(case, mask, dtype=torch.float64)
        inputs = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
        got, exact = run(operator, inputs), exact_attention(inputs)
        assert relative_error(got.out, exact.out) < 1e-13
        assert relative_error(got.log_sum_exp, exact.log_sum_exp) < 1e-13

    def test_a_learned_basis_starts_as_the_mean(self) -> None:
        options = {"grid": (11, 13), "block": 16, "rank": 8}
        mean = make_operator("fma", **options)
        learned = make_operator("fma", **options, basis="depthwise")
        inputs = make_inputs("none", length=143, dtype=torch.float64)
        whole = make_inputs("none", length=256, dtype=torch.float64)
        start = tuple(p.double() for p in learned.initial_parameters(inputs.spec()).values())
        assert [tuple(p.shape) for p in start] == list(learned.parameter_shapes(inputs.spec()).values())
        # Where no cell is cut the two are the same function.
        options["grid"] = (16, 16)
        mean, learned = make_operator("fma", **options), make_operator("fma", **options, basis="depthwise")
        start = tuple(p.double() for p in learned.initial_parameters(whole.spec()).values())
        assert relative_error(run(learned, whole, start).out, run(mean, whole).out) < 1e-14

    def test_rows_are_a_depthwise_convolution(self) -> None:
        """The weights are those of a Conv2d of stride and kernel ``width`` with ``rank`` outputs a channel."""
        from fastattn_compile.kernels.aten.fma_grid_pool import learned_rows

        plan = dataclasses.replace(pattern((8, 12), 2), parts=(1, 2), learned=True)
        x = torch.randn(3, 96, 5, dtype=torch.float64)
        offsets = level_offsets(plan)
        weights = []
        for level in range(plan.levels):
            width = 2 << level
            weights += [torch.randn(5, 2, width, width).double(), torch.randn(5, 2).double()]
        rows = learned_rows(x, torch.ones(offsets[-1], dtype=torch.float64), weights, plan)
        for level in range(plan.levels):
            width, (down, across) = 2 << level, plan.cells(level)
            image = F.pad(x.mT.unflatten(2, (8, 12)), (0, across * width - 12, 0, down * width - 8))
            kernel = weights[2 * level].flatten(0, 1)[:, None]
            made = F.conv2d(image, kernel, weights[2 * level + 1].flatten(), stride=width, groups=5)
            wanted = made.flatten(2).unflatten(1, (5, 2)).permute(0, 3, 2, 1)
            assert torch.allclose(rows[:, offsets[level] : offsets[level + 1]], wanted)

    def test_grouped_heads_and_independent_sequences(self) -> None:
        operator, inputs, _ = build("ragged", batch=3, heads=6, kv_heads=2, dtype=torch.float64)
        plain = run(operator, inputs)
        repeated = dataclasses.replace(
            inputs, key=inputs.key.repeat_interleave(3, 1), value=inputs.value.repeat_interleave(3, 1)
        )
        assert torch.allclose(plain.out, run(operator, repeated).out)
        moved = dataclasses.replace(
            inputs, query=inputs.query.flip(0), key=inputs.key.flip(0), value=inputs.value.flip(0)
        )
        assert torch.allclose(plain.out.flip(0), run(operator, moved).out)

    @pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4])
    def test_padding_has_no_influence(self, garbage: float) -> None:
        operator, inputs, _ = build("ragged", "key_padding")
        hidden = ~inputs.key_padding[:, None, :, None]
        dirty = dataclasses.replace(
            inputs,
            key=inputs.key.masked_fill(hidden, garbage),
            value=inputs.value.masked_fill(hidden, garbage),
        )
        results = []
        for tensors in (inputs, dirty):
            tensors, _, sources = leaves(tensors, ())
            output = run(operator, tensors)
            seeds = torch.ones_like(output.out), torch.ones_like(output.log_sum_exp)
            results.append([output.out, *gradients(output, sources, seeds)])
        for clean, other in zip(*results):
            assert torch.equal(clean, other)
        for gradient in results[1][2:]:
            assert not gradient.masked_select(hidden).any()

    def test_all_of_a_sequence_hidden(self) -> None:
        operator, inputs, _ = build("ragged", "key_padding")
        inputs.key_padding[0] = False
        output = run(operator, inputs)
        assert not output.out[0].any() and (output.log_sum_exp[0] == -torch.inf).all()
        assert torch.isfinite(output.out).all() and torch.isfinite(output.log_sum_exp[1]).all()

    def test_tokens_in_front_meet_everything_exactly(self) -> None:
        operator, inputs, _ = build("ragged", dtype=torch.float64)
        assert (
            relative_error(run(operator, inputs).out[:, :, :2], exact_attention(inputs).out[:, :, :2]) < 1e-14
        )
        # One of them that holds all the mass decides the output of every query.
        key = inputs.key.clone()
        key[:, :, 1] = 0
        query = torch.ones_like(inputs.query)
        key[:, :, 1, :] = 200.0
        output = run(operator, dataclasses.replace(inputs, query=query, key=key))
        wanted = inputs.value[:, :, 1:2].repeat_interleave(2, 1).expand_as(output.out)
        assert torch.allclose(output.out, wanted)

    @pytest.mark.parametrize("case", ["ragged", "learned"])
    def test_inputs_of_mixed_types(self, case: str) -> None:
        """Autocast gives float32 queries and keys and bfloat16 values, and does not reach into the kernels."""
        operator, inputs, parameters = build(case)
        inputs = dataclasses.replace(inputs, value=inputs.value.bfloat16())
        oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in parameters))
        results = []
        for autocast in (False, True):
            given, params, sources = leaves(inputs, parameters)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = run(operator, given, params)
                seeds = torch.ones_like(got.out), torch.ones_like(got.log_sum_exp)
                grads = gradients(got, sources, seeds)
            assert got.out.dtype == torch.bfloat16 and got.log_sum_exp.dtype == torch.float32
            assert relative_error(got.out, oracle.out) <= torch.finfo(torch.bfloat16).eps
            assert [g.dtype for g in grads] == [s.dtype for s in sources]
            results.append([got.out, got.log_sum_exp, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results))

    def test_any_strides(self) -> None:
        operator, inputs, _ = build("ragged")
        turned = [
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)
        ]
        other = dataclasses.replace(inputs, query=turned[0], key=turned[1], value=turned[2])
        assert torch.equal(run(operator, inputs).out, run(operator, other).out)

    def test_a_new_pass_gives_the_same_bits(self) -> None:
        operator, inputs, _ = build("even")
        assert torch.equal(run(operator, inputs).out, run(operator, inputs).out)

    def test_threads_give_the_same_result(self) -> None:
        operator, inputs, parameters = build("learned", dtype=torch.float64)
        results = []
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                given, params, sources = leaves(inputs, parameters)
                output = run(operator, given, params)
                seeds = torch.ones_like(output.out), torch.ones_like(output.log_sum_exp)
                results.append([output.out, *gradients(output, sources, seeds)])
            finally:
                torch.set_num_threads(before)
        assert all(torch.allclose(a, b) for a, b in zip(*results))


class TestCost:
    @each_grid
    def test_pairs_are_those_of_the_definition(self, case: str) -> None:
        """Counted in the dense definition: keys a query sees, token by token and row by row."""
        from unittest import mock

        from fastattn_compile.operators.fma import grid_reference

        operator, inputs, parameters = build(case, batch=1)
        seen: list[Tensor] = []

        def count(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(visible)
            return softmax(scores, visible)

        softmax = grid_reference.masked_softmax
        with mock.patch.object(grid_reference, "masked_softmax", count):
            operator.reference(inputs, parameters)
        n = tokens_of(GRIDS[case])
        near, far = grid_pairs(operator.config)
        assert (int(seen[0][..., :n].sum()), int(seen[0][..., n:].sum())) == (near, far)
        assert near == int(operator.exact_keys(inputs, torch.arange(n)).sum())
        assert operator.cost(inputs.spec()).keys_per_query == (near + far) / n

    def test_memory_does_not_hold_all_pairs(self) -> None:
        """The largest tensor of a pass stays far below n x n."""
        from torch.utils._python_dispatch import TorchDispatchMode

        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                made = func(*args, **(kwargs or {}))
                for x in made if isinstance(made, (tuple, list)) else [made]:
                    if isinstance(x, Tensor):
                        largest = max(largest, x.numel())
                return made

        operator = make_operator("fma", grid=(64, 64))
        inputs = make_inputs("none", batch=1, heads=1, kv_heads=1, length=4096, head_dim=16)
        with Watch():
            operator.forward(inputs)
        assert 4096 * 16 < largest < 4096**2 / 8


class TestChoice:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"grid": (8,)}, "grid must be two positive numbers, height and width"),
            ({"grid": (0, 8)}, "grid must be two positive numbers"),
            ({"grid": -8}, "grid must be two positive numbers, .* or one for a square, got -8"),
            ({"grid": (8, 8.0)}, "grid must be height and width, or one number for a square, got"),
            ({"grid": (8, 8), "block": 32}, "32 is no square number; 36 is a cell of 6 x 6"),
            ({"grid": (8, 8), "block": 16, "rank": 3}, "rank must divide block"),
            (
                {"grid": (8, 8), "basis": "dense"},
                "basis 'dense' is not defined on a grid; .* mean, depthwise",
            ),
            ({"grid": (8, 8), "basis": "recursive"}, "basis 'recursive' is not defined on a grid"),
            ({"grid": (8, 8), "boundary": "zero_pad", "sinks": 0}, "a grid has the boundary 'clean'"),
            ({"grid": (8, 8), "sinks": 8}, "a grid has no sinks, got sinks=8; .* prefix"),
            ({"grid": (8, 8), "prefix": -1}, "prefix must be 0 or more"),
            ({"prefix": 1}, "prefix counts tokens in front of a grid, got prefix=1 without grid"),
        ],
    )
    def test_bad_configurations_say_why(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            make_operator("fma", **options)

    def test_further_options_of_the_sequence_form_are_not_passed_over(self) -> None:
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Wider(FmaConfig):
            turned: bool = False

        assert Wider(grid=(8, 8)).grid == (8, 8) and Wider(turned=True).turned
        with pytest.raises(
            ValueError, match="not defined on a grid: turned; leave it out, or leave grid out"
        ):
            Wider(grid=(8, 8), turned=True)

    @pytest.mark.parametrize(
        ("mask", "length", "message"),
        [
            ("none", 65, "the grid has 64 tokens \\(8 x 8\\), the site 65 queries and 65 keys; .* prefix"),
            ("none", 63, "the grid has 64 tokens"),
            ("causal", 64, "an order of tokens .* leave grid out"),
            ("window(9)", 64, "is not supported on a grid"),
            ("left(9)", 64, "a window over the sequence"),
            ("segments", 64, "packed documents is not supported on a grid"),
            ("chunk(16)", 64, "chunked attention is not supported on a grid"),
            ("none + alibi", 64, "a bias by distance in the sequence \\(alibi\\)"),
            ("none + bucketed", 64, "a bias by distance in the sequence \\(bucketed\\)"),
        ],
    )
    def test_sites_are_refused_with_the_reason(self, mask: str, length: int, message: str) -> None:
        inputs = make_inputs(mask, length=length)
        with pytest.raises(ValueError, match=message):
            run(make_operator("fma", grid=(8, 8), block=4), inputs)

    def test_further_refusals(self) -> None:
        operator = make_operator("fma", grid=(8, 8), block=4)
        spec = make_inputs("none", length=64).spec()
        for change, message in [
            ({"kind": "cross"}, "cross attention"),
            ({"query_len": 1}, "1 queries and 64 keys"),
            ({"bias": "dense"}, "a bias by distance"),
            ({"softcap": 5.0}, "soft cap"),
            ({"dropout": 0.1}, "dropout"),
            ({"weights_used": True}, "weights are read"),
            ({"mask": MaskStructure(opaque="a comparison of tensors")}, "not understood"),
        ]:
            support = operator.supports(dataclasses.replace(spec, **change))
            assert not support and message in support.reason
        assert operator.supports(spec) and operator.decoder(1.0) is None

    def test_wrong_parameters_are_refused(self) -> None:
        operator, inputs, parameters = build("learned")
        with pytest.raises(ValueError, match="has 8 parameters, got 4"):
            run(operator, inputs, parameters[:4])
        with pytest.raises(ValueError, match=r"parameter key_weight_1 of fma must have shape \(8, 2, 2, 2\)"):
            run(operator, inputs, (parameters[0].flatten(2), *parameters[1:]))

    def test_the_configuration_survives_json(self) -> None:
        operator = make_operator("fma", grid=[8, 16], block=16, prefix=1)
        assert operator.config.grid == (8, 16) and operator.config.sinks == 0
        again = operator_from_token(operator.token)
        assert again.config == operator.config and type(again) is type(operator)
        assert dataclasses.replace(operator.config, rank=1).sinks == 0
        plain = operator.config.to_dict()
        assert json.loads(json.dumps(plain)) == plain and FmaConfig.from_dict(plain) == operator.config
        assert make_operator("fma", grid=8, block=16).config.grid == (8, 8)

    def test_no_other_kernel_is_taken_in_its_place(self) -> None:
        operator, inputs, _ = build("even")
        with recorded_kernels() as record:
            run(operator, inputs)
        assert record == {"fma grid forward": "aten"}
        with use_kernels("cpp"), pytest.raises(RuntimeError, match="there is no cpp implementation of it"):
            run(operator, inputs)

    def test_a_long_grid_is_checked_on_its_first_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for options in ({}, {"basis": "depthwise", "rank": 1}, {"prefix": 3}):
            operator = make_operator("fma", grid=(40, 36), block=9, **{"rank": 3, **options})
            short, length = operator.on_first_tokens(1024)
            assert short.config.grid == ((1024 - operator.config.prefix) // 36, 36) and length <= 1024
            inputs = make_inputs("none", length=1440 + operator.config.prefix, batch=1)
            monkeypatch.setenv("FASTATTN_CHECK", "1")
            run(operator, inputs, make_parameters(operator, inputs, noise=0.0))
        small = make_inputs("none", length=16 * 36 + 3, batch=1)
        fits = make_operator("fma", grid=(16, 36), block=9, rank=3, prefix=3)
        assert all(x.within for x in compare_with_reference(fits, small, gradients=True))


class Attention(nn.Module):
    """Multi-head attention as vision transformers write it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.product(q, k, v).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """A small vision transformer: patches, positions, perhaps a class token, two blocks, a head."""

    def __init__(self, grid: tuple[int, int], front: int, dim: int = 32) -> None:
        super().__init__()
        self.front = front
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        if front:
            self.cls = nn.Parameter(torch.randn(1, front, dim))
        self.positions = nn.Parameter(0.1 * torch.randn(1, front + math.prod(grid), dim))
        self.attention = nn.ModuleList(Attention(dim, 4) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))
            for _ in range(2)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        if self.front:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.positions
        for attention, mlp in zip(self.attention, self.mlp):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x[:, 0] if self.front else x.mean(1))


class TestVisionModels:
    @pytest.mark.parametrize("front", [0, 1])
    def test_a_vision_transformer_through_the_backend(self, front: int) -> None:
        torch.manual_seed(0)
        grid = (11, 14)
        options = {"grid": grid, "block": 4, "rank": 4, "prefix": front}
        model = Encoder(grid, front)
        operator = fa.make_operator("fma", **options)
        judge = Encoder(grid, front)
        judge.load_state_dict(model.state_dict())
        for attention in judge.attention:
            attention.product = lambda q, k, v: (
                operator.reference(AttentionInputs(q, k, v, q.shape[-1] ** -0.5)).out
            )
        image = torch.randn(2, 3, 44, 56)
        fast = compiled(model, operator="fma", strict=True, **options)
        out, wanted = fast(image), judge(image)
        assert list(operators_used().values()) == ["fma", "fma"]
        assert_as_good_as(out, oracle=copy.deepcopy(judge).double()(image.double()), formula=wanted)
        out.square().sum().backward()
        wanted.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), judge.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-5 * float(q.grad.abs().max())), name

    def test_images_of_another_size_stay_exact(self) -> None:
        """Under dynamic shapes the size of the grid is a guard: another number of tokens is compiled anew, and exact."""
        options = {"grid": (12, 10), "block": 4, "rank": 1}
        model = Attention(32, 4)
        judge = copy.deepcopy(model)
        operator = make_operator("fma", **options)
        judge.product = lambda q, k, v: operator.reference(AttentionInputs(q, k, v, q.shape[-1] ** -0.5)).out
        fast = compiled(model, dynamic=True, operator="fma", **options)
        for tokens in (120, 132, 120):
            x = torch.randn(2, tokens, 32)
            with torch.no_grad():
                got, exact = fast(x), model(x)
                assert torch.allclose(got, judge(x) if tokens == 120 else exact, atol=1e-6)
            assert (relative_error(got, exact) > 1e-3) == (tokens == 120)

    def test_a_class_token_that_was_not_named_is_refused(self) -> None:
        model = Encoder((11, 14), 1)
        image = torch.randn(1, 3, 44, 56)
        fast = compiled(model, operator="fma", grid=(11, 14), block=4)
        assert torch.allclose(fast(image), model(image), atol=1e-5)
        assert set(operators_used().values()) == {"exact"}
        assert "given as prefix" in fa.report(fast).to_json()["sites"][0]["reason"]
        with pytest.raises(Exception, match="given as prefix") as caught:
            compiled(model, operator="fma", grid=(11, 14), block=4, strict=True)(image)
        assert isinstance(caught.value, UnsupportedSiteError) or "UnsupportedSiteError" in repr(caught.value)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "front", "options", "attention"),
        [
            ("ViT", 1, {}, "sdpa"),
            ("DeiT", 2, {}, "eager"),
            ("Dinov2WithRegisters", 5, {"num_register_tokens": 4}, "sdpa"),
            ("SiglipVision", 0, {}, "sdpa"),
        ],
    )
    def test_models_of_transformers(
        self, family: str, front: int, options: dict[str, Any], attention: str
    ) -> None:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=4,
            attn_implementation=attention, **options, **({} if front == 5 else {"intermediate_size": 64}),
        )  # fmt: skip
        model = getattr(transformers, f"{family}Model")(config).eval()
        image = torch.randn(1, 3, 64, 64)
        fast = compiled(model, operator="fma", grid=(16, 16), block=4, rank=4, prefix=front)
        with torch.no_grad():
            got, exact = fast(image).last_hidden_state, model(image).last_hidden_state
        used = [name for name in operators_used().values() if name == "fma"]
        # SigLIP pools with one query of its own, which stays exact.
        assert len(used) == 2 and len(operators_used()) == 2 + (family == "SiglipVision")
        # Pooled rows represent untrained attention well; and this is not exact attention.
        assert 1e-5 < relative_error(got, exact) < 0.3

    def test_onnx_says_what_it_has_no_body_for(self) -> None:
        ir = pytest.importorskip("onnx_ir")
        from fastattn_compile.lowering.onnx.body import BodySpec
        from fastattn_compile.lowering.onnx.registry import supported

        spec = BodySpec(2, 2, 8, 8, 0.3, MaskStructure(), ir.DataType.FLOAT, 18, 64)
        assert supported(make_operator("fma", grid=(8, 8), block=4), spec)
        learned = make_operator("fma", grid=(8, 8), block=4, basis="depthwise")
        assert "mean basis only, not 'depthwise'" in supported(learned, spec).reason

    def test_learned_rows_are_trained(self) -> None:
        """The parameters of a depthwise basis, in the module tree, get gradients through a compiled model."""
        torch.manual_seed(0)
        model = Encoder((8, 8), 0)
        image = torch.randn(2, 3, 32, 32)
        fa.attach(model, "fma", image, options={"grid": (8, 8), "block": 4, "rank": 2, "basis": "depthwise"})
        fast = compiled(model, operator="fma", grid=(8, 8), block=4, rank=2, basis="depthwise", strict=True)
        fast(image).square().sum().backward()
        learned = {n: p for n, p in model.named_parameters() if "weight_1" in n}
        assert len(learned) == 4 and all(p.grad is not None and p.grad.any() for p in learned.values())

    def test_the_site_tells_what_served_it(self) -> None:
        seen = []
        operator, inputs, _ = build("even")
        with observing(lambda name, op, *_: seen.append((name, op.config.grid))):
            attend(inputs.query, inputs.key, inputs.value, operator, site="here")
        assert seen == [("here", (12, 20))]
