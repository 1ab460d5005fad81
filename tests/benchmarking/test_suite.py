"""Benchmark rows: gated by correctness, resumable, summed up as crossover lengths and speed constants."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastattn_compile.benchmarking import suite
from fastattn_compile.benchmarking.case import Case
from fastattn_compile.benchmarking.measure import measure, wrongness
from fastattn_compile.benchmarking.suite import crossovers, run_suite, speeds
from fastattn_compile.errors import OptionError
from fastattn_compile.machine import Rates
from fastattn_compile.operators.base import AttentionOutput
from fastattn_compile.operators.fma import FastMultipoleAttention

RATES = Rates(1e11, 1e10)
SMALL = Case(operator="fma", options={"block": 16, "rank": 2}, n=200, heads=2, kv_heads=1, head_dim=16)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_row_names_its_baseline_and_its_limit(direction: str) -> None:
    row = measure(dataclasses.replace(SMALL, direction=direction), RATES, seconds=0, memory=False)
    assert row["reason"] == ""
    assert row["baseline"].startswith("scaled_dot_product_attention")
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-2, abs=1e-3)
    assert 0 < row["floor_fraction"] < 1
    assert row["kernels"] in ("aten", "cpp")


def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastMultipoleAttention.forward

    def wrong(self, inputs, parameters=()):
        output = right(self, inputs, parameters)
        return AttentionOutput(output.out + 1e-3, output.log_sum_exp)

    monkeypatch.setattr(FastMultipoleAttention, "forward", wrong)
    row = measure(SMALL, RATES, seconds=0, memory=False)
    assert row["ms"] is None
    assert "wrong: relative error of the output" in row["reason"]


def test_a_refused_case_says_why() -> None:
    row = measure(Case(operator="linformer", n=128, head_dim=16), RATES, seconds=0, memory=False)
    assert row["ms"] is None
    assert "causal" in row["reason"]


@pytest.mark.slow
def test_a_grid_longer_than_its_definition_can_take_is_judged_by_its_first_rows() -> None:
    case = Case(
        operator="fma", options={"grid": (40, 32), "block": 16}, n=1280, causal=False, direction="both"
    )
    assert wrongness(case, case.make_operator()) == ""


def test_peak_memory_is_that_of_a_fresh_process() -> None:
    row = measure(dataclasses.replace(SMALL, n=4096), RATES, seconds=0)
    output = 2 * 4096 * 16 * 4
    assert output <= row["peak_bytes"] < 100 * output


def test_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cases, measured = tmp_path / "rows.json", [dataclasses.replace(SMALL, n=n) for n in (100, 200)], []
    run_suite(cases[:1], seconds=0, memory=False, out=out)
    first = json.loads(out.read_text())["rows"][0]
    document = run_suite(
        cases, seconds=0, memory=False, out=out, resume=True, on_row=lambda row: measured.append(row["n"])
    )
    assert measured == [200]
    assert document["rows"][0] == first
    assert json.loads(out.read_text()) == document
    other = run_suite([dataclasses.replace(SMALL, n=50)], seconds=0, memory=False, out=out, resume=True)
    assert [row["n"] for row in other["rows"]] == [100, 200, 50]  # rows of other cases are not lost
    monkeypatch.setattr(suite, "device_name", lambda device: "another machine")
    with pytest.raises(OptionError, match=r"was measured on .*, this is another machine"):
        run_suite(cases, out=out, resume=True)
    out.write_text("{}")
    with pytest.raises(OptionError, match="is no benchmark document"):
        run_suite(cases, out=out, resume=True)


def _rows(ratios: dict[int, float]) -> list[dict[str, object]]:
    common = {**suite._as_row(SMALL), "ms": 1.0, "kernels": "aten", "flops": 1e6}
    return [{**common, "n": n, "ratio": ratio, "baseline_ms": ratio} for n, ratio in ratios.items()]


@pytest.mark.parametrize(
    ("ratios", "n"),
    [
        ({1024: 0.5, 4096: 2.0}, 2048),
        ({1024: 1.5, 4096: 3.0}, 1024),
        ({1024: 0.2, 4096: 0.9}, None),
        ({1024: 2.0, 2048: 0.5, 8192: 2.0}, 4096),
    ],
)
def test_crossover_lengths(ratios: dict[int, float], n: int | None) -> None:
    assert crossovers(_rows(ratios))[0]["n"] == n


def test_speed_constants_come_out_of_the_rows() -> None:
    rows = []
    for n in (1024, 4096, 16384):
        case = dataclasses.replace(SMALL, n=n)
        flops = case.make_operator().cost(case.spec()).flops
        exact = Case(**{**dataclasses.asdict(case), "operator": "exact", "options": {}})
        exact_seconds = 2e-5 + exact.make_operator().cost(exact.spec()).flops / 5e10
        ms = 1e3 * (1e-4 + flops / 2e10)
        rows.append({**_rows({n: 1.0})[0], "flops": flops, "ms": ms, "baseline_ms": 1e3 * exact_seconds})
    fma, exact = speeds(rows, "a device")
    assert (fma.operator, fma.device, fma.dtype) == ("fma", "a device", "float32")
    assert fma.seconds_per_call == pytest.approx(1e-4, rel=1e-3)
    assert fma.flops_per_second == pytest.approx(2e10, rel=1e-3)
    assert exact.operator == "exact"
    assert exact.flops_per_second == pytest.approx(5e10, rel=1e-3)


def test_a_series_is_fitted_by_what_serves_its_longest_sequence() -> None:
    """Where all keys are near, ATen's exact attention serves whatever was asked for."""
    rows = [
        {**_rows({n: 1.0})[0], "flops": 1e6 * n, "ms": n / 1e3 * (100 if n < 256 else 1), "kernels": kernels}
        for n, kernels in ((64, "aten"), (128, "aten"), (256, "cpp"), (1024, "cpp"))
    ]
    fma, _ = speeds(rows, "a device")
    assert (fma.kernels, fma.flops_per_second) == ("cpp", pytest.approx(1e12))
    assert [s.operator for s in speeds(rows[:3], "a device")] == ["exact"]  # one length of C++ tells nothing


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"operator": "fmm"}, "unknown operator 'fmm'"),
        ({"options": {"block": 10, "rank": 3}}, "rank must divide block"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"n": 0}, "n must be 1 or more"),
        ({"direction": "sideways"}, "one of forward, backward, both"),
    ],
)
def test_bad_cases_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Case(**{"operator": "fma", **values})
