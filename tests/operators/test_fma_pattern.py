"""Who meets whom in fast multipole attention: coverage, golden pair sets, block plans, cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from oracle import make_inputs
from torch.utils.flop_counter import FlopCounterMode

from fastattn_compile.kernels.aten.fma_plan import Pattern, make_plan
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.fma import FmaConfig
from fastattn_compile.operators.fma.config import level_count
from fastattn_compile.operators.fma.cost import pairs
from fastattn_compile.operators.fma.reference import far_field, near_field
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "fma_golden.json").read_text())["pairs"]
SIZES = [(5, 2), (8, 2), (16, 2), (17, 2), (31, 4), (64, 4), (33, 8), (100, 8), (129, 8), (75, 5), (40, 1)]


def definition(length: int, block: int, causal: bool) -> list[list[tuple[int, int]]]:
    """For every query the (level, token or group) pairs it meets, from the formulas of the definition."""
    rows = torch.arange(length)[:, None]
    seen = near_field(rows, torch.arange(length), block)
    if causal:
        seen &= torch.arange(length) <= rows
    found = [[(0, int(j)) for j in row.nonzero()[:, 0]] for row in seen]
    for level in range(level_count(length, block)):
        width = block << level
        groups = torch.arange(-(-length // width))
        for row, met in zip(found, far_field(rows, groups, width, causal)):
            row += [(level + 1, int(g)) for g in met.nonzero()[:, 0]]
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pairs(name):
    direction, length, block = name.split("_")
    length, block = int(length[1:]), int(block[1:])
    wanted = [[tuple(pair) for pair in row] for row in GOLDEN[name]]
    assert definition(length, block, direction == "causal") == wanted
    inputs = make_inputs("causal" if direction == "causal" else "none", length=length)
    exact = make_operator("fma", block=block, rank=1, sinks=0).exact_keys(inputs, torch.arange(length))[0, 0]
    assert [[(0, int(j)) for j in row.nonzero()[:, 0]] for row in exact] == [
        [pair for pair in row if pair[0] == 0] for row in wanted
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "block"), SIZES)
def test_every_token_is_met_exactly_once(length, block, causal):
    for i, row in enumerate(definition(length, block, causal)):
        times = torch.zeros(length, dtype=torch.int64)
        for level, place in row:
            width = 1 if level == 0 else block << (level - 1)
            times[place * width : (place + 1) * width] += 1
        assert times.tolist() == [int(not causal or j <= i) for j in range(length)]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "block"), SIZES)
def test_the_plan_of_the_kernel_meets_the_same(length, block, causal, learned):
    rank = 2 if block % 2 == 0 else 1
    pattern = Pattern(block, rank, min(2, block), causal, right=0 if causal else None, learned=learned)
    plan = make_plan(length, pattern, torch.device("cpu"))
    for i, row in enumerate(definition(length, block, causal)):
        wanted = torch.zeros(length, dtype=torch.int64)
        for level, place in row:
            width = 1 if level == 0 else block << (level - 1)
            # A learned row covers its whole group: the group counts once for every row.
            wanted[place * width : (place + 1) * width] += rank if learned and level else 1
        wanted[: pattern.sinks] += torch.tensor(
            [abs(i // block - j // block) > 1 and (not causal or j < i) for j in range(pattern.sinks)]
        )
        got = torch.zeros(length, dtype=torch.int64)
        slots = plan.met[i // block].nonzero()[:, 0]
        for first, last in zip(plan.first[i // block, slots].tolist(), plan.last[i // block, slots].tolist()):
            if not causal or last <= i:
                got[first : last + 1] += 1
        assert torch.equal(got, wanted), i


def test_exact_keys_know_padding_and_sinks():
    inputs = make_inputs("causal & key_padding")
    inputs.key_padding[:] = True
    inputs.key_padding[1, :10] = False
    seen = make_operator("fma", block=8, rank=2, sinks=2).exact_keys(inputs, torch.tensor([60]))[:, 0, 0]
    near = list(range(48, 61))
    assert seen[0].nonzero()[:, 0].tolist() == [0, 1, *near]
    assert seen[1].nonzero()[:, 0].tolist() == [10, 11, *near]


def count_by_definition(config: FmaConfig, inputs: AttentionInputs) -> int:
    """Pairs of the definition: with equal scores and weights a query's normaliser counts what it meets."""
    operator = make_operator("fma", **{**config.to_dict(), "scale_attn": False})
    level = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    shapes = operator.parameter_shapes(inputs.spec()).values()
    output = operator.reference(level, tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    return round(float(output.log_sum_exp.exp().sum()))


@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense", "recursive"])
@pytest.mark.parametrize(
    "mask", ["none", "causal", "causal & window(21)", "left(30)", "right(13) & left(22)"]
)
@pytest.mark.parametrize(
    ("length", "block", "rank", "sinks"),
    [(16, 2, 2, 0), (75, 8, 2, 3), (100, 8, 4, 8), (9, 8, 2, 2), (64, 4, 4, 4)],
)
def test_cost_counts_the_pairs_of_the_definition(length, block, rank, sinks, mask, basis):
    inputs = make_inputs(mask, batch=1, heads=1, kv_heads=1, length=length, dtype=torch.float64)
    config = FmaConfig(block=block, rank=rank, sinks=sinks, basis=basis)
    wanted = count_by_definition(config, inputs)
    assert sum(pairs(config, inputs.mask, length)) == wanted
    cost = make_operator("fma", **config.to_dict()).cost(inputs.spec())
    assert cost.keys_per_query == pytest.approx(wanted / length)


@pytest.mark.parametrize(
    ("length", "block", "rank"), [(1024, 64, 4), (4096, 64, 4), (2048, 128, 8), (4096, 64, 1)]
)
def test_cost_follows_the_closed_form(length, block, rank):
    """Specification section 2, without sinks."""
    levels = level_count(length, block)
    config = FmaConfig(block=block, rank=rank, sinks=0)
    far = 1.5 * rank * (length * (levels - 1) + 2 * block)
    assert pairs(config, CAUSAL, length) == (length * (3 * block + 1) / 2 - block**2, far)
    assert pairs(config, NO_MASK, length) == (3 * block * length - 2 * block**2, 2 * far)


def test_cost_counts_work_and_traffic():
    spec = make_inputs("causal", length=128, value_dim=6, dtype=torch.bfloat16).spec()
    config = FmaConfig(block=8, rank=2)
    cost = make_operator("fma", **config.to_dict()).cost(spec)
    pooling = 2 * 2 * 128 * 14
    assert cost.flops == 2 * 2 * 4 * sum(pairs(config, CAUSAL, 128)) * 14 + pooling
    assert cost.bytes == 2 * (2 * 4 * 128 * 14 + 2 * 2 * 128 * 14)
    assert cost.flops < ExactAttention().cost(spec).flops


@pytest.mark.parametrize("basis", ["mean", "depthwise", "dense"])
def test_cost_counts_the_products_that_pool(basis):
    """Products of the reference, counted by torch: its scores are dense, so what the basis adds is the difference."""

    def counted(rank):
        operator = make_operator("fma", block=8, rank=rank, sinks=0, basis=basis)
        inputs = make_inputs("causal", length=128, value_dim=6)
        parameters = tuple(operator.initial_parameters(inputs.spec()).values())
        with FlopCounterMode(display=False) as counter:
            operator.reference(inputs, parameters)
        rows = sum(rank * (128 // (8 << level)) for level in range(3))
        dense_scores = 2 * 2 * 4 * 128 * (128 + rows) * 14
        pairs_only = 2 * 2 * 4 * sum(pairs(operator.config, CAUSAL, 128)) * 14
        return counter.get_total_flops() - dense_scores, operator.cost(inputs.spec()).flops - pairs_only

    for rank in (1, 2):
        done, stated = counted(rank)
        # Means are sums, which the counter does not see; every other basis pools by products.
        assert (done, stated) == (0, 2 * 2 * 128 * 14) if basis == "mean" else done == stated


def test_cost_grows_like_n_log_n():
    config = FmaConfig()
    per_token = [sum(pairs(config, CAUSAL, n)) / n for n in (4096, 8192, 16384)]
    assert per_token[1] - per_token[0] == pytest.approx(per_token[2] - per_token[1], rel=0.1)


def test_exact_cost_counts_visible_pairs():
    for mask in (
        "none",
        "causal",
        "left(3)",
        "causal & window(9)",
        "chunk(7)",
        "causal & prefix(5)",
        "right(3) & chunk(9)",
    ):
        inputs = make_inputs(mask, length=40)
        visible = int(inputs.visible(torch.arange(40)).sum())
        assert ExactAttention().cost(inputs.spec()).keys_per_query == pytest.approx(visible / 40), mask
    spec = dataclasses.replace(
        make_inputs(length=20, key_len=33).spec(), mask=MaskStructure.parse("causal & end_aligned")
    )
    seen = spec.mask.visible(torch.arange(20)[:, None], torch.arange(33), 20, 33)
    assert ExactAttention().cost(spec).keys_per_query == pytest.approx(int(seen.sum()) / 20)
