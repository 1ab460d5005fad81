"""Machine code of every row of the table of fast multipole and window attention, for GPUs that are not there."""

import json
from pathlib import Path

import pytest
from gpu_stage import OLDER, but_for_known_spills

from fastattn_compile.kernels.gpu.aot import SHARED_MEMORY, compiled
from fastattn_compile.kernels.gpu.fma_compile import PACKED, SMALL, reports
from fastattn_compile.kernels.gpu.fma_configs import configs, without
from fastattn_compile.kernels.gpu.fma_gradients import fma_runs
from fastattn_compile.kernels.gpu.fma_pool import fma_pool, fma_spread

# Registers and programs on a multiprocessor of each launch of a row, as they were when the row was chosen.
RECORDED = json.loads((Path(__file__).parent / "fma_recorded.json").read_text())


def rows():
    """The cells that users meet most in every run; the others are compiled where there is time."""
    for row in configs():
        name, architecture, kind, width = row
        if name.endswith("_packed"):
            continue
        usual = kind == "half" and ((architecture == "sm_90" and width < 256) or width == 64)
        yield pytest.param(row, id="-".join(map(str, row)), marks=[] if usual else [pytest.mark.slow])


def packed_rows():
    """The same cells where documents are packed, but those for which the search found none."""
    for row in configs():
        name, architecture, kind, width = row
        if name in PACKED and (f"{name}_packed", *row[1:]) not in without():
            usual = architecture == "sm_90" and kind == "half" and width == 64
            yield pytest.param(row, id="-".join(map(str, row)), marks=[] if usual else [pytest.mark.slow])


@pytest.mark.parametrize("row", list(rows()))
def test_every_row_of_the_table(row):
    judge(row, RECORDED["-".join(map(str, row))], packed=False)


@pytest.mark.parametrize("row", list(packed_rows()))
def test_packed_documents_fit_the_same_tiles(row):
    judge(row, RECORDED["-".join(map(str, (*row, "packed")))], packed=True)


def test_a_row_is_not_known_to_be_none():
    assert not without() & configs().keys()


def judge(row, recorded, packed):
    name, architecture, kind, width = row
    config = configs()[row]
    if packed:
        config = configs().get((f"{name}_packed", *row[1:]), config)
    for made, (registers, programs) in zip(reports(*row, config, packed=packed), recorded, strict=True):
        made = but_for_known_spills(made, "-".join(map(str, (*row, "packed") if packed else row)))
        assert made.fits(SHARED_MEMORY[architecture]), made
        assert OLDER or made.registers <= registers, f"{made}; {registers} registers were recorded"
        if architecture != "gfx942" and not OLDER:
            assert made.programs(config.warps) >= programs, f"{made}; {programs} programs were recorded"
        if architecture == "sm_90" and kind == "half" and width <= 128 and name not in SMALL:
            assert made.products["HGMMA"] and not made.products["HMMA"], made


@pytest.mark.parametrize("name", ["fma_fwd", "fma_far"])
def test_bidirectional_lists_fit_the_same_tiles(name):
    row = name, "sm_90", "half", 64
    (made,) = reports(*row, configs()[row], causal=False)
    assert made.fits(SHARED_MEMORY["sm_90"]), made


@pytest.mark.parametrize("width", [64, 128])
def test_a_step_with_learned_rows_fits_the_same_tiles(width):
    row = "fma_decode", "sm_90", "half", width
    (made,) = reports(*row, configs()[row], learned=True)
    assert made.fits(SHARED_MEMORY["sm_90"]), made


@pytest.mark.parametrize(
    "kind, precision, channels, warps", [("*bf16", "tf32", 128, 8), ("*fp32", "tf32x3", 64, 4)]
)
def test_pool(kind, precision, channels, warps):
    types = {"X": kind, "TAKEN": "*u8", "COUNT": "*fp32", "ROWS": "*bf16", "SUMS": "*fp32"}
    constants = {
        "C": 128,
        "BC": channels,
        "RANK": 4,
        "ALL": False,
        "PACKED": False,
        "DOCUMENT": None,
        "R": 64,
        "BT": 64,
        "PRECISION": precision,
        "x_d": 1,
    }
    made = compiled(fma_pool, types, constants, "sm_90", warps, 2)
    assert made.fits(SHARED_MEMORY["sm_90"]) and made.products["HGMMA"], made


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "documents"])
@pytest.mark.parametrize("kernel", [fma_runs, fma_spread], ids=["runs", "spread"])
def test_sums_of_rows(kernel, packed, architecture):
    types = {
        "RUNS": "*fp32",
        "ROWS": "*fp32",
        "COUNT": "*fp32",
        "OUT": "*fp32",
        "factor": "fp32",
        "DOCUMENT": "*i32",
    }
    given = {
        "C": 256,
        "BC": 256,
        "BLOCK": 64,
        "RANK": 4,
        "CAUSAL": False,
        "LOG2S": 4,
        "PACKED": packed,
        "B": 16,
    }
    if not packed:
        given["DOCUMENT"] = None
    constants = {name: x for name, x in given.items() if name in kernel.arg_names}
    made = compiled(kernel, types, constants, architecture, 4, 2)
    assert made.spilled == made.stack == 0, made
