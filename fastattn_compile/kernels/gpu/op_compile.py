"""Machine code of the operator kernels as models launch them, for tests and search."""

from __future__ import annotations

from typing import Any

from fastattn_compile.kernels.gpu.aot import Report, compiled, precision
from fastattn_compile.kernels.gpu.barnes_hut_attend import bh_dq, bh_fwd
from fastattn_compile.kernels.gpu.barnes_hut_gradients import bh_dkv, bh_far_dkv
from fastattn_compile.kernels.gpu.leaf import leaf_dkv, leaf_dq, leaf_fwd
from fastattn_compile.kernels.gpu.op_configs import Config

_INT, _FLOAT, _BOOL = "*i32", "*fp32", "*i1"
_OF_KIND = "Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV", "NODE_K", "NODE_V"
_STATISTICS = dict.fromkeys(("LSE", "GRAD_LSE", "DELTA", "SUM", "BIAS"), _FLOAT)
_LISTS = dict.fromkeys(
    ("QUERY_ROW", "OUT_ROW", "START", "STOP", "TILE", "KEY_ROW", "GRAD_ROW", "FIRST", "LAST"), _INT
)
_TREE = {
    "FINE": _BOOL, "SINK": _INT, "LEAVES": _INT, "PAIR": "*i64", "TILE": _INT, "LEAF_OF": _INT,
    "DK": _FLOAT, "DV": _FLOAT, "NODE_WEIGHT": _FLOAT, "CLOSED": _INT, "CLOSED_COUNT": _INT, "MET": _INT,
}  # fmt: skip
_LEAF = {
    "HAS_BIAS": False, "BIAS": None, "HIDDEN": False, "SINKS": False, "LOW": None, "HIGH": None, "SINK": None
}  # fmt: skip
# Pairs that a window hides from the leaves: types of what tells them.
_NEAR = {"LOW": _INT, "HIGH": _INT, "SINK": _BOOL}
_GROUP = {"R": 4, "LEAF": 4, "OPEN": 64, "SINKS": 4, "CAUSAL": True, "BLOCK": 64, "BO": 64, "BS": 16}
_POOL = {"POOL": True}
_NODES = "NODE_K", "NODE_V", "NODE_WEIGHT", "CLOSED", "CLOSED_COUNT", "MET", "room", "nodes", "weight_row"
_NO_POOL = {"POOL": False, **dict.fromkeys(_NODES)}
_NO_SLOPE = {"HAS_GRAD_LSE": False, "GRAD_LSE": None}
_FAR_KEYS = {"R": 4, "GROUP": 16, "LEAF": 4, "OPEN": 64, "BL": 16, **_NO_POOL}
_FAR_NODES = {"R": 4, "GROUP": 16, "LEAF": 16, "OPEN": 1, "BL": 16, "FINE": None, **_POOL}

# Of each kernel of the table: itself, types that are not those of its tensors, constants.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "leaf_fwd": (leaf_fwd, _LISTS, _LEAF),
    "leaf_dq": (leaf_dq, _LISTS, {**_LEAF, **_NO_SLOPE}),
    "leaf_dkv": (leaf_dkv, _LISTS, {**_LEAF, "ADD": False}),
    "bh_fwd": (bh_fwd, _TREE, {**_GROUP, **_NO_POOL, "GROUP": 16}),
    "bh_fwd_few": (bh_fwd, _TREE, {**_GROUP, **_NO_POOL, "GROUP": 1}),
    "bh_fwd_pool": (bh_fwd, _TREE, {**_GROUP, **_POOL, "GROUP": 16}),
    "bh_fwd_few_pool": (bh_fwd, _TREE, {**_GROUP, **_POOL, "GROUP": 1}),
    "bh_dq": (bh_dq, _TREE, {**_GROUP, **_NO_POOL, **_NO_SLOPE, "GROUP": 16}),
    "bh_dq_few": (bh_dq, _TREE, {**_GROUP, **_NO_POOL, **_NO_SLOPE, "GROUP": 1}),
    "bh_dq_pool": (bh_dq, _TREE, {**_GROUP, **_POOL, **_NO_SLOPE, "GROUP": 16}),
    "bh_dq_few_pool": (bh_dq, _TREE, {**_GROUP, **_POOL, **_NO_SLOPE, "GROUP": 1}),
    "bh_dkv": (bh_dkv, _TREE, {"BLOCK": 64, "SINKS": 0, "CAUSAL": True, "SINK": None}),
    "bh_far_dkv": (bh_far_dkv, _TREE, _FAR_KEYS),
    "bh_far_dkv_pool": (bh_far_dkv, _TREE, _FAR_NODES),
}
# Kernels whose tiles of products have fewer rows than Hopper's instruction takes.
SMALL = frozenset(
    {"bh_fwd_few", "bh_dq_few", "bh_far_dkv", "bh_fwd_few_pool", "bh_dq_few_pool", "bh_far_dkv_pool"}
)


def reports(
    name: str, architecture: str, kind: str, width: int, config: Config, hidden: bool = False
) -> list[Report]:
    """What the compiler says of each launch of a kernel; those of this table have one.

    Args:
        name: A key of ``KERNELS``.
        architecture: A key of ``aot.TARGETS``.
        kind: ``"half"`` or ``"float"``.
        width: Channels of query, key and value.
        config: The configuration.
        hidden: Whether leaves leave out what a window meets.
    """
    kernel, types, constants = KERNELS[name]
    given = {
        **constants, **config.tiles, "D": width, "E": width, "BD": width, "BE": width, "q_d": 1, "k_d": 1, "v_d": 1,
        "PRECISION": precision(kind, architecture),
    }  # fmt: skip
    types = {**dict.fromkeys(_OF_KIND, "*bf16" if kind == "half" else _FLOAT), **_STATISTICS, **types}
    if hidden:
        types |= _NEAR
        given = {name: x for name, x in given.items() if name not in _NEAR} | {"HIDDEN": True, "SINKS": True}
    constants = {name: x for name, x in given.items() if name in kernel.arg_names}
    return [
        compiled(kernel, {**types, "scale": "fp32"}, constants, architecture, config.warps, config.stages)
    ]
