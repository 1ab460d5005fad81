"""The baseline of every time is exact attention, and calls take turns."""

import pytest
import torch

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.reporting.timing import EXACT, SDPA, exact_attention, interleaved_ms


@pytest.mark.parametrize(
    ("mask", "queries", "baseline"),
    [
        ("causal", 20, SDPA),
        ("causal & end_aligned", 20, SDPA),
        ("causal & end_aligned", 5, EXACT),
        ("none", 20, SDPA),
        ("none", 7, SDPA),
        ("key_padding", 20, SDPA),
        ("causal & key_padding", 20, EXACT),
        ("causal & window(4)", 20, EXACT),
        ("end_aligned", 5, SDPA),
    ],
)
def test_baseline_is_exact(mask, queries, baseline):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=generator, dtype=torch.float64)
        for heads, n in ((4, queries), (2, 20), (2, 20))
    )
    structure = MaskStructure.parse(mask)
    padding = torch.arange(20)[None] < torch.tensor([[20], [13]]) if structure.key_padding else None
    inputs = AttentionInputs(q, k, v, 0.3, structure, padding)
    name, call = exact_attention(inputs)
    assert name == baseline
    out = call()
    out = out.out if name == EXACT else out
    torch.testing.assert_close(out, ExactAttention().reference(inputs).out, rtol=1e-10, atol=1e-12)


def test_calls_take_turns():
    order = []
    times = interleaved_ms(
        [lambda: order.append("a"), lambda: order.append("b")], 3, lambda: order.append(".")
    )
    assert "".join(order) == "ab.ab.ab."
    assert len(times) == 2
    assert all(spent >= 0 for spent in times)


def test_a_fast_call_runs_several_times_in_its_turn():
    order = []
    interleaved_ms([lambda: order.append("a"), lambda: order.append("b")], 2, turns=[3, 1])
    assert "".join(order) == "aaabaaab"
