"""Conv-basis attention: profiles of the anchors, products between transforms."""

import pytest
import torch
from oracle import assert_as_good_as

from fastattn_compile.kernels.aten import conv as conv_aten
from fastattn_compile.kernels.aten import conv_pattern, conv_profiles, conv_sums
from fastattn_compile.kernels.aten.conv_pattern import Pattern
from fastattn_compile.kernels.aten.conv_sums import Buckets
from fastattn_compile.kernels.gpu import conv

CASES = {
    "causal": {},
    "bidirectional": {"right": None},
    "band-recovered": {"left": 30, "right": 20, "anchors": "recover", "uncovered": "ones"},
    "few-at-a-time": {"budget": 1 << 12},
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), ("causal", torch.float64)]
)
def test_profiles_and_sums(case, dtype, device, monkeypatch):
    options = {"right": 0, "anchors": "sink_strided", **CASES[case]}
    monkeypatch.setattr(conv, "_SPECTRA", options.pop("budget", conv._SPECTRA))
    pattern = Pattern(5, sinks=2, probe=4, delta=2.0, width=2.0, **options)
    batch, heads, group, length, d, c = 2, 1, 2, 90, 16, 4
    query = torch.randn(batch, heads, group, length, d, device=device)
    key = torch.randn(batch, heads, 1, length, d, device=device)
    hidden = torch.zeros(batch, length, dtype=torch.bool, device=device)
    hidden[0, -7:] = True
    bias = torch.randn(heads, group, 2 * length - 1, device=device)
    x = torch.randn(batch, heads, 1, c, length, device=device).masked_fill(hidden[:, None, None, None], 0)
    rows = torch.randn(batch, heads, group, c, length, device=device)
    seen = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)

    def judge(module, profiles, dtype):
        monkeypatch.setattr(conv_pattern, "make_side", profiles)
        sides = conv_pattern.make_sides(pattern, query.to(dtype), key.to(dtype), 0.3, hidden, bias.to(dtype))
        buckets = Buckets(exact.to(dtype), pattern.width) if exact is not None else None
        if buckets is None:
            return conv_aten.magnitudes(sides, seen)
        given = x.to(dtype), rows.to(dtype)
        return [
            *(side.profile for side in sides), module.weighted_sums(sides, given[0], buckets),
            module.transposed_sums(sides, given[1], buckets),
            *(module.slopes(side, *given, buckets) for side in sides),
        ]  # fmt: skip

    exact = None
    exact = judge(conv_sums, conv_profiles.make_side, torch.float64).nan_to_num(neginf=-torch.inf)
    judged = (
        judge(conv, conv.make_side, dtype), judge(conv_sums, conv_profiles.make_side, torch.float64),
        judge(conv_sums, conv_profiles.make_side, dtype),
    )  # fmt: skip
    for got, oracle, formula in zip(*judged, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(got, oracle, rtol=1e-9, atol=1e-9)
        else:
            assert_as_good_as(got, oracle=oracle, formula=formula)


def test_obstacles():
    assert conv.obstacle(torch.ones(1)) == ""
    assert "bfloat16" in conv.obstacle(torch.ones(1, dtype=torch.bfloat16))
