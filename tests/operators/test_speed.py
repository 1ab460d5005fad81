"""Which side of the crossover: constants of devices, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn_compile.errors import OptionError
from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.machine import device_name
from fastattn_compile.operators import speed
from fastattn_compile.operators.base import SiteSpec
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.speed import Speed, crossover, fit_speed, load_speeds, save_speeds, speed_of

HERE = device_name(torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "speed.json"
    monkeypatch.setenv(speed.VARIABLE, str(path))
    speed.known_speeds.cache_clear()
    yield path
    speed.known_speeds.cache_clear()


def made(
    operator: str = "fma",
    device: str = "cpu",
    kernels: str = "aten",
    dtype: str = "float32",
    rate: float = 1e10,
) -> Speed:
    return Speed(operator, device, kernels, dtype, 1e-4, rate)


KNOWN = (
    made(rate=1), made(kernels="cpp", rate=2), made(device=HERE, rate=3), made(device=HERE, kernels="cpp", rate=4),
    made(device=HERE, kernels="cpp", dtype="bfloat16", rate=5), made(device="cuda", rate=6),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernels", "dtype", "rate"),
    [
        ("auto", torch.float32, 4),  # this very device before its type, the faster implementation
        ("aten", torch.float32, 3),
        ("cpp", torch.bfloat16, 5),
        ("aten", torch.bfloat16, 3),  # the implementation before the type
        ("auto", torch.float16, 5),
    ],
)
def test_the_constants_that_fit_best(kernels: str, dtype: torch.dtype, rate: float) -> None:
    with use_kernels(kernels):
        assert speed_of("fma", "cpu", dtype, KNOWN).flops_per_second == rate


# heads, kv_heads, operator, constants -> the shortest length that is replaced
@pytest.mark.parametrize(
    ("rate", "overhead", "least", "most"),
    [
        (1e11, 0.0, 64, 300),  # as fast as exact: as soon as it does less
        (2e10, 1e-4, 500, 3000),
        (1e9, 1e-4, 10_000, 60_000),
        (1e6, 1.0, 1 << 20, 1 << 24),
    ],
)
def test_exact_is_kept_where_it_is_predicted_faster(
    rate: float, overhead: float, least: int, most: int
) -> None:
    save_speeds(
        speed.user_file(),
        [Speed("fma", HERE, k, "float32", overhead, rate) for k in ("aten", "cpp")]
        + [Speed("exact", HERE, "aten", "float32", 0.0, 1e11)],
    )
    spec = SiteSpec(1, 8, 8, 4096, 4096, 64, 64, mask=CAUSAL)
    assert least <= crossover(make_operator("fma"), spec) <= most


@pytest.mark.skipif(bool(speed.obstacle()), reason="without a compiler no row of C++ is read")
def test_only_kernels_that_serve_the_site_predict_its_time(own_file: Path) -> None:
    """However fast the others are."""
    rows = [
        made(name, HERE, kernels, rate=rate)
        for name in ("fma", "window")
        for kernels, rate in (("aten", 1e8), ("cpp", 1e13))
    ]
    save_speeds(own_file, rows)
    spec = SiteSpec(1, 4, 4, 4096, 4096, 64, 64, mask=CAUSAL)
    biased = replace(spec, bias="alibi")
    for name, slow in (("fma", False), ("window", True)):
        operator = make_operator(name)
        assert speed.predicted_seconds(operator, spec) < 0.1
        assert (speed.predicted_seconds(operator, biased) > 0.5) is slow
    # None but ATen's kernel serves grids, at whatever site.
    image = make_operator("fma", grid=(64, 64))
    assert speed.predicted_seconds(image, replace(spec, mask=NO_MASK)) > 0.5


def test_calibration_replaces_only_what_it_measured(own_file: Path) -> None:
    save_speeds(own_file, [made(device=HERE, rate=1e9), made("window", HERE)])
    save_speeds(own_file, [made(device=HERE, rate=2e9)])
    assert {(s.operator, s.flops_per_second) for s in load_speeds(own_file)} == {
        ("fma", 2e9),
        ("window", 1e10),
    }
    with use_kernels("aten"):
        assert speed_of("fma", "cpu", torch.float32).flops_per_second == 2e9


@pytest.mark.parametrize(
    "text", ["", "{}", '{"schema": "fastattn.speed/1", "speeds": [{"operator": "fma"}]}', "[1]"]
)
def test_a_broken_file_is_named(own_file: Path, text: str) -> None:
    own_file.write_text(text)
    with pytest.raises(OptionError, match=r"speed.json does not hold speed constants"):
        load_speeds(own_file)


def test_the_fit_finds_the_constants() -> None:
    samples = [(flops, 2e-4 + flops / 3e10) for flops in (1e6, 1e8, 1e10)]
    fixed, rate = fit_speed(samples)
    assert fixed == pytest.approx(2e-4, rel=1e-6)
    assert rate == pytest.approx(3e10, rel=1e-6)
    # Times that grow faster than the work have no positive fixed part.
    fixed, rate = fit_speed([(1e6, 1e-5), (1e8, 5e-3)])
    assert fixed == 0
    assert rate > 0
    with pytest.raises(ValueError, match="two lengths at least"):
        fit_speed([(1e6, 1.0), (1e6, 1.1)])


def test_shipped_constants_are_well_formed() -> None:
    shipped = load_speeds(Path(speed.__file__).with_name("speed.json"))
    assert {"cpu", "cuda"} <= {s.device for s in shipped}
    assert any(s.operator == "exact" for s in shipped)


# Measured on two threads of a CPU with AVX-512, 8 heads of 64 channels: ``fastattn bench`` names these lengths.
@pytest.mark.parametrize(
    ("operator", "kernels", "measured"),
    [
        ("fma", "cpp", 220), ("barnes_hut", "cpp", 5600), ("window", "cpp", 440), ("tf_attention", "cpp", 510),
        ("tc_attention", "cpp", 340), ("fma", "aten", 1500), ("window", "aten", 2700), ("tc_attention", "aten", 5000),
        ("tf_attention", "aten", 3700),
    ],
)  # fmt: skip
def test_shipped_constants_tell_where_an_operator_pays(operator: str, kernels: str, measured: int) -> None:
    if kernels == "cpp" and speed.obstacle():
        pytest.skip(speed.obstacle())
    with use_kernels(kernels):
        found = crossover(make_operator(operator), SiteSpec(1, 8, 8, 4096, 4096, 64, 64, mask=CAUSAL))
    assert measured / 2.5 < found < measured * 2.5
