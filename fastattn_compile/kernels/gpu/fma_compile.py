"""Machine code of the kernels of fast multipole and window attention as models launch them, for tests and search."""

from __future__ import annotations

from typing import Any

from fastattn_compile.kernels.gpu.aot import Report, compiled, precision
from fastattn_compile.kernels.gpu.fma_attend import fma_dq, fma_fwd
from fastattn_compile.kernels.gpu.fma_configs import Config
from fastattn_compile.kernels.gpu.fma_decode import fma_decode
from fastattn_compile.kernels.gpu.fma_gradients import fma_dkv, fma_far, fma_sinks
from fastattn_compile.kernels.gpu.window import window_dkv, window_dq, window_fwd

KERNELS = {
    "fma_fwd": fma_fwd,
    "fma_dq": fma_dq,
    "fma_far": fma_far,
    "fma_dkv": fma_dkv,
    "fma_sinks": fma_sinks,
    "fma_decode": fma_decode,
    "window_fwd": window_fwd,
    "window_dq": window_dq,
    "window_dkv": window_dkv,
}
# Those that serve packed documents, too.
PACKED = frozenset({"fma_fwd", "fma_dq", "fma_far", "fma_dkv", "fma_sinks"})
# Sinks are 16 keys at most by default, and queries of one step 16: less than Hopper's instruction takes.
SMALL = frozenset({"fma_sinks", "fma_decode"})

_FLOATS = "MASS", "LSE", "DELTA", "RUNS_K", "RUNS_V", "CELLS_K", "CELLS_V", "SUMS_K", "SUMS_V", "COUNT"
_LEARNED = "FACTOR_K", "FACTOR_V", "SHIFT_K", "SHIFT_V"
_LONGS = "RING_PLACE", "SINK_PLACE", "FOUND"
_TYPES = {
    **dict.fromkeys((*_FLOATS, *_LEARNED), "*fp32"), **dict.fromkeys(_LONGS, "*i64"), "SINK": "*i32", "DOCUMENT": "*i32",
    "POOLED": "*u8", "FINE": "*u8", "scale": "fp32",
}  # fmt: skip
_OF_KIND = "Q", "K", "V", "ROWS_K", "ROWS_V", "OUT", "GRAD", "DQ", "RING_K", "RING_V", "SINK_K", "SINK_V"
_CASE: dict[str, Any] = {
    "G": 1, "BLOCK": 64, "RANK": 4, "SINKS": 4, "BS": 16, "BANDED": False, "PADDED": False,
    "HAS_GRAD_LSE": False, "GRAD_LSE": None, "LOG2S": 4, "CELL": 16, "ALL": False, "SPREAD": True,
    "q_d": 1, "k_d": 1, "v_d": 1, "WEIGHTED": True, "DOCUMENT": None, **dict.fromkeys(_LEARNED), "BR": 16, "BL": 8,
}  # fmt: skip


def reports(
    name: str,
    architecture: str,
    kind: str,
    width: int,
    config: Config,
    causal: bool = True,
    packed: bool = False,
    learned: bool = False,
) -> list[Report]:
    """What the compiler says of each launch of a kernel.

    Args:
        name: A key of ``KERNELS``.
        architecture: A key of ``aot.TARGETS``.
        kind: ``"half"`` or ``"float"``.
        width: Channels of query, key and value.
        config: The configuration.
        causal: Which lists.
        packed: Whether documents take the place of sequences.
        learned: Whether pooled rows are learned.
    """
    kernel, of_kind = KERNELS[name], "*bf16" if kind == "half" else "*fp32"
    # What sinks get from stretches of queries is added in float32.
    of_keys = "*fp32" if name == "fma_sinks" else of_kind
    types = {**dict.fromkeys(_OF_KIND, of_kind), **_TYPES, "DK": of_keys, "DV": of_keys}
    made = []
    for which in config.parts:
        given = {
            **_CASE, **config.tiles, "D": width, "E": width, "BD": width, "BE": width, "CAUSAL": causal,
            "PACKED": packed, "LEARNED": learned, "WHICH": which, "PRECISION": precision(kind, architecture),
        }  # fmt: skip
        for absent in (("DOCUMENT",) if packed else ()) + (_LEARNED if learned else ()):
            del given[absent]
        constants = {name: x for name, x in given.items() if name in kernel.arg_names}
        made.append(compiled(kernel, types, constants, architecture, config.warps, config.stages))
    return made
