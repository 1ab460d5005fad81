"""Machine code of every row of the configuration table, for GPUs that are not there.

A row that spills, outgrows shared memory, loses its tensor cores or needs more registers than recorded fails. Run
without ``TRITON_INTERPRET``: a kernel is made for the interpreter or for the compiler, once and for all.
"""

import pytest
from gpu_stage import OLDER, but_for_known_spills

from fastattn_compile.kernels.gpu import barnes_hut_gradients as of_keys
from fastattn_compile.kernels.gpu import barnes_hut_tree as tree
from fastattn_compile.kernels.gpu import cast, cast_scan, coarse, conv, counting_sort, leaf_decode, sinks
from fastattn_compile.kernels.gpu.aot import SHARED_MEMORY, compiled, precision
from fastattn_compile.kernels.gpu.launch import HEAVY, LIGHT
from fastattn_compile.kernels.gpu.op_compile import SMALL, reports
from fastattn_compile.kernels.gpu.op_configs import configs, without

INT, FLOAT, BOOL, LONG, DOUBLE = "*i32", "*fp32", "*i1", "*i64", "*fp64"


def check(report, architecture, tensor_cores=True):
    assert report.spilled == 0 and report.stack == 0, report
    assert report.shared <= SHARED_MEMORY[architecture], report
    # A kernel that the compiler broke is small, and does nothing.
    assert report.registers > (16 if tensor_cores else 4), report
    assert any(report.products.values()) == tensor_cores, report


def each_row():
    """Rows of the table; those that take the compiler long are for the long run."""
    for row in configs():
        long = row[2] == "float" or row[3] > 128
        yield pytest.param(row, id="-".join(map(str, row)), marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize("row", list(each_row()))
def test_every_row_of_the_table(row):
    name, architecture, kind, width = row
    config = configs()[row]
    (report,) = reports(*row, config)
    check(but_for_known_spills(report, "-".join(map(str, row))), architecture)
    assert OLDER or report.registers <= config.registers, (
        f"{report}; {config.registers} registers were recorded"
    )
    if architecture == "sm_90" and kind == "half" and width <= 128 and name not in SMALL:
        assert report.products["HGMMA"] and not report.products["HMMA"], report


def test_a_row_is_not_known_to_be_none():
    assert not without() & configs().keys()


@pytest.mark.parametrize("name", ["leaf_fwd", "leaf_dq", "leaf_dkv"])
def test_what_a_window_hides_from_leaves_fits_the_same_tiles(name):
    row = name, "sm_90", "half", 64
    (report,) = reports(*row, configs()[row], hidden=True)
    check(report, "sm_90")


COARSE = {
    **dict.fromkeys(("X", "WEIGHT", "SCALAR", "OUT", "SUM", "COUNT", "REAL", "FACTOR", "TABLE", "VALUE", "GRAD"), FLOAT),
    **dict.fromkeys(("LEAF", "QUERY_LEAF", "KEY_LEAF"), INT),
}  # fmt: skip
MEANS = {"E": 128, "BE": 32, "H": 6, "BT": 64, "CAUSAL": True}
CHOICE = {
    "D": 128, "BD": 32, "R": 4, "SAMPLES": 0, "GROUP": 1, "BLOCK": 64, "FANOUT": 4, "CAUSAL": True, "TOP": False,
    "KEEP_ABOVE": 32, "KEEP": 64, "BK": 256, "BV": 16, "q_d": 1,
}  # fmt: skip
DROP = {"REST": False, **dict.fromkeys(("CLOSED", "CLOSED_ABOVE", "CLOSED_COUNT", "room", "first_node"))}
CHOSEN = {
    "Q": "*bf16",
    "MAIN": FLOAT,
    "MORE": FLOAT,
    "COUNT": FLOAT,
    "KEPT_ABOVE": INT,
    "KEPT": INT,
    "CLOSED": INT,
    "CLOSED_ABOVE": INT,
    "CLOSED_COUNT": INT,
    "scale": "fp32",
}
MIXED = {
    **dict.fromkeys(("LOGITS", "SUMMARY", "INSIDE", "MIXTURE", "LSE", "OUT", "X", "ROWS"), FLOAT),
    **dict.fromkeys(("FIRST", "SLOT"), INT),
}  # fmt: skip
SCANNED = {
    **dict.fromkeys(("A", "WEIGHT", "QUERY", "VALUE", "SCORE", "STATE", "SCORED", "OUT"), FLOAT), "OWN": INT, "MASS": DOUBLE,
}  # fmt: skip
WAVES = {**dict.fromkeys(("Q", "K", "BIAS", "PROFILE", "TOP", "OUT", "X", "Y"), DOUBLE), "BOUNDS": LONG}
CACHE = {
    **dict.fromkeys(("Q", "K", "V"), "*bf16"), **dict.fromkeys(("LEAF", "QUERY", "ORDER", "CUT"), LONG), "REAL": BOOL,
    **dict.fromkeys(("LEVEL", "START"), INT),
    "OUT": FLOAT, "LSE": FLOAT, "scale": "fp32",
}  # fmt: skip
SORT = {"CODE": LONG, "ORDER": LONG, "COUNT": INT, "BASE": INT}
MIX = {"C": 64, "E": 128, "R": 4, "S": 256, "OWN_SUMMARY": False, "BT": 32, "BC": 64, "BE": 64}
SCAN = {"C": 100, "E": 128, "R": 4, "SHARED": False, "HAS_SCORE": True, "T": 64, "BC": 64, "BE": 32}
MIXES = {**SCAN, "BC": 32}
WALK = {"C": 100, "W": 128, "SHARED": False, "REVERSE": True, "T": 64, "B": 256}
MERGE = {
    "D": 128, "WIDTH": 4, "FANOUT": 4, "LEVELS": 3, "TOKENS": True, "KIND": 0, "ROWS": 64, "BD": 64, "x_d": 1
}  # fmt: skip
FAR = {"C": 64, "LEAF": 4, "BC": 64, "BL": 4}
PROFILE = {"D": 64, "FREE": True, "HAS_BIAS": False, "BIAS": None, "BM": 64, "BT": 16, "q_d": 1, "k_d": 1}
ONE = {"D": 128, "E": 128, "BD": 128, "BE": 128, "H": 6, "LOWEST": 0, "BH": 8, "BN": 64}

# Kernels with one configuration: itself, types, constants, how it is launched, whether it has products.
FIXED = {
    "tc_spread": (coarse.tc_spread, COARSE, {**MEANS, "BY_LEVEL": True, "HAS_SUM": True, "BJ": 64}, HEAVY, True),
    "tc_prefix": (coarse.tc_prefix, COARSE, {"REVERSE": True, "TOTAL": False, "B": 256}, LIGHT, False),
    "tc_counts": (coarse.tc_counts, COARSE, MEANS, HEAVY, False),
    "tc_read": (coarse.tc_read, COARSE, MEANS, HEAVY, True),
    "tc_dots": (coarse.tc_dots, COARSE, {**MEANS, "BH": 8}, HEAVY, True),
    "tc_give": (coarse.tc_give, COARSE, MEANS, HEAVY, True),
    "cast_mix": (cast.cast_mix, MIXED, MIX, LIGHT, True),
    "cast_sum": (cast.cast_sum, MIXED, {"W": 256, "BT": 32, "BW": 64}, LIGHT, False),
    "scan_given": (cast_scan.scan_given, SCANNED, SCAN, HEAVY, True),
    "scan_asked": (cast_scan.scan_asked, SCANNED, SCAN, HEAVY, True),
    "scan_walk": (cast_scan.scan_walk, SCANNED, WALK, LIGHT, False),
    "scan_mix": (cast_scan.scan_mix, SCANNED, MIXES, HEAVY, True),
    "scan_score": (cast_scan.scan_score, SCANNED, MIXES, HEAVY, True),
    "scan_transposed": (cast_scan.scan_transposed, SCANNED, SCAN, HEAVY, True),
    "scan_logits": (cast_scan.scan_logits, SCANNED, SCAN, HEAVY, True),
    "bh_merge": (tree.bh_merge, {"X": "*bf16", "TAKEN": BOOL, "OUT": FLOAT}, MERGE, LIGHT, False),
    "bh_descend": (tree.bh_descend, CHOSEN, {**CHOICE, **DROP, "STATISTIC": 0}, HEAVY, True),
    "bh_descend_cumulant": (tree.bh_descend, CHOSEN, {**CHOICE, **DROP, "STATISTIC": 1}, HEAVY, True),
    "bh_descend_bound": (tree.bh_descend, CHOSEN, {**CHOICE, **DROP, "STATISTIC": 2}, HEAVY, True),
    "bh_descend_rest": (tree.bh_descend, CHOSEN, {**CHOICE, "REST": True, "STATISTIC": 0}, HEAVY, True),
    "add_sinks": (
        sinks.add_sinks, {"FOUND": FLOAT, "SINK": INT, "TOTAL": "*bf16"},
        {"C": 128, "SINKS": 4, "PACKED": False, "DOCUMENT": None, "BC": 64, "BS": 16}, LIGHT, False,
    ),
    "bh_far_sum": (of_keys.bh_far_sum, {"PART": FLOAT, "OUT": FLOAT, "FIRST": INT}, FAR, LIGHT, False),
    "conv_profile": (conv.conv_profile, {**WAVES, "scale": "fp64", "uncovered": "fp64"}, PROFILE, LIGHT, False),
    "conv_weights": (conv.conv_weights, {**WAVES, "limit": "fp64"}, {"B": 256}, LIGHT, False),
    "conv_multiply": (conv.conv_multiply, WAVES, {"CONJUGATE": True, "ADD": False, "B": 256}, LIGHT, False),
    "sort_count": (counting_sort.sort_count, SORT, {"BINS": 64, "T": 128}, LIGHT, False),
    "sort_place": (counting_sort.sort_place, SORT, {"T": 128}, LIGHT, False),
    "tf_level": (leaf_decode.tf_level, {**CACHE, "OUT": INT}, ONE, LIGHT, False),
    "tf_decode": (leaf_decode.tf_decode, CACHE, ONE, LIGHT, False),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", FIXED)
def test_kernels_with_one_configuration(name, architecture):
    kernel, types, constants, launch, products = FIXED[name]
    given = {**constants, "PRECISION": precision("float", architecture)}
    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    report = compiled(kernel, types, given, architecture, *launch.values())
    check(but_for_known_spills(report, f"{name}-{architecture}"), architecture, products)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", [name for name in FIXED if name.startswith("scan_")])
def test_scans_of_float64_masses_fit_older_and_newer_cards(name, architecture):
    test_kernels_with_one_configuration(name, architecture)
