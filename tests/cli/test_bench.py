"""``fastattn bench`` as a user calls it."""

import json
from pathlib import Path

import pytest

from fastattn_compile.kernels.cpu import build

SMALL = ("--heads", "2", "--head-dim", "16", "--seconds", "0", "--threads", "1", "--no-memory")


@pytest.fixture(autouse=True)
def own_constants(tmp_path, monkeypatch):
    from fastattn_compile.operators import speed

    monkeypatch.setenv(speed.VARIABLE, str(tmp_path / "speed.json"))
    speed.known_speeds.cache_clear()
    yield
    speed.known_speeds.cache_clear()


def test_bench_prints_a_table_and_writes_json(fastattn):
    result = fastattn(
        "bench",
        "-o",
        "fma",
        "-o",
        "window",
        "--option",
        "fma.block=16",
        "-n",
        "128",
        "-n",
        "256",
        *SMALL,
        "--out",
        "rows.json",
    )
    assert result.exit_code == 0, result.output
    assert "faster than exact" in result.stdout
    document = json.loads(Path("rows.json").read_text())
    assert document["schema"] == "fastattn.bench/1"
    assert [(r["operator"], r["n"]) for r in document["rows"]] == [
        ("fma", 128), ("fma", 256), ("window", 128), ("window", 256)
    ]  # fmt: skip
    assert document["rows"][0]["config"]["block"] == 16


def test_calibration_is_used_afterwards(fastattn, tmp_path):
    result = fastattn("bench", "-n", "256", "-n", "512", *SMALL, "--calibrate", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "speed.json").read_text())
    assert {row["operator"] for row in written["speeds"]} == {"exact", "fma"}


@pytest.mark.skipif(bool(build.obstacle()), reason=build.obstacle() or "there is a C++ compiler")
def test_what_calibration_cannot_fit_is_named(fastattn, tmp_path):
    """With 100 tokens all is near, and another implementation may serve than with 512."""
    result = fastattn("bench", "-n", "100", "-n", "512", *SMALL, "--kernels", "cpp", "--calibrate", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "speed.json").read_text())
    assert {row["operator"] for row in written["speeds"]} == {"exact"}
    assert "fma is not fitted" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--calibrate", "-n", "128"), "two different --length"),
        (("--resume",), "give --out too"),
        (("--option", "window.left=3"), "none of the operators timed"),
        (("-o", "fmm"), "unknown operator 'fmm'"),
        (("--kernels", "fast"), "unknown kernels 'fast'"),
    ],
)
def test_wrong_usage_is_code_2(fastattn, options, text):
    result = fastattn("bench", *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_plot_is_drawn(fastattn):
    pytest.importorskip("matplotlib")
    result = fastattn("bench", "-n", "128", "-n", "256", *SMALL, "--plot", "ratio.svg")
    assert result.exit_code == 0, result.output
    assert Path("ratio.svg").read_text().startswith("<?xml")
