"""The cost models against a run whose arithmetic is counted, and against the bytes of the tensors it touches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.registry import make_operator

LENGTH = 1024
# What may be counted for each operation of the model. Dense kernels do what the definition says; those that work in
# tiles compute the hidden half of a diagonal tile and the ends of ragged ones as well, and trees look at every plane.
EXACT, TILES = (0.97, 1.03), (0.97, 2.1)
CASES: list[tuple[str, dict[str, Any], str, tuple[float, float]]] = [
    ("exact", {}, "none", EXACT),
    ("exact", {}, "causal", TILES),
    ("fma", {}, "none", (0.97, 1.3)),
    ("fma", {}, "causal", TILES),
    ("fma", {"sinks": 0, "queries": "pooled"}, "none", (0.97, 1.3)),
    ("fma", {"basis": "depthwise"}, "causal", TILES),
    # Cells cut by the border, and far cells that only some queries of a pass meet, are computed for all.
    ("fma", {"grid": (32, 32), "block": 16, "rank": 4}, "none", (0.97, 1.9)),
    ("fma", {"grid": (32, 32), "block": 16, "rank": 4, "basis": "depthwise"}, "none", (0.97, 1.9)),
    ("conv_basis", {"k": 16, "form": "fft"}, "none", (0.97, 1.15)),
    ("conv_basis", {"k": 16, "form": "fft"}, "causal", (0.97, 1.15)),
    ("conv_basis", {"k": 16, "form": "gather"}, "causal", EXACT),
    ("conv_basis", {"k": 16, "form": "fft", "stride": 20}, "causal", (0.97, 1.15)),
    ("conv_basis", {"approximation": "low_rank"}, "causal", (0.93, 1.1)),
    ("conv_basis", {"approximation": "low_rank"}, "none", EXACT),
    ("conv_basis", {"approximation": "low_rank"}, "causal & window(200)", (0.93, 1.2)),
    ("cast", {"clusters": 32}, "none", EXACT),
    ("cast", {"clusters": 32, "combine": "lse"}, "none", EXACT),
    ("cast", {"clusters": 32, "clustering": "sa_topk", "combine": "lse", "select": "key"}, "none", EXACT),
    ("cast", {"clusters": 32, "clustering": "token_choice", "cluster_size": 64}, "causal", (0.97, 6.0)),
    ("linformer", {}, "none", EXACT),
    ("linformer", {"sharing": "none"}, "none", EXACT),
    ("linformer", {"sharing": "key_value"}, "none", EXACT),
    ("window", {}, "none", TILES),
    ("window", {}, "causal", TILES),
    ("barnes_hut", {}, "none", TILES),
    ("barnes_hut", {}, "causal", TILES),
    ("barnes_hut", {"rest": "pool"}, "causal", TILES),
    ("barnes_hut", {"select": "cumulant"}, "causal", (0.97, 2.6)),
    ("tf_attention", {"height": 3}, "none", TILES),
    ("tf_attention", {"height": 3}, "causal", (0.97, 3.5)),
    ("tc_attention", {"height": 3}, "none", (0.97, 4.0)),
    ("per_head", {"parts": [{"operator": "window"}, {"operator": "fma"}], "heads": [1, 0]}, "causal", TILES),
]


def _product(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, rows, inner = query
    return int(2 * batch * rows * inner * key[-1])


def _added_product(total: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return _product(query, key)


def _transform(shape: Any, dims: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2.5 N log2 N for a transform of N real numbers (Frigo and Johnson's count of a real transform)."""
    length = max(shape[dims[-1]], out_shape[dims[-1]])
    return int(2.5 * length * math.log2(length) * math.prod(shape) / shape[dims[-1]])


def _complex(each: int) -> Any:
    """Real operations of an elementwise one on complex numbers; those on real numbers are not counted."""

    def count(*arguments: Any, out_val: Any = None, **_: Any) -> int:
        return each * out_val.numel() if out_val.is_complex() else 0

    count._get_raw = True  # type: ignore[attr-defined]
    return count


COUNTED = {
    torch.ops.aten.mul: _complex(6),
    torch.ops.aten.add_: _complex(2),
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten._fft_r2c: _transform,
    torch.ops.aten._fft_c2r: _transform,
}


def site(
    name: str, options: dict[str, Any], mask: str
) -> tuple[Operator, AttentionInputs, tuple[Tensor, ...]]:
    """The operator, tensors of a site, and parameters."""
    channels = 8 if options.get("approximation") == "low_rank" else 64
    inputs = make_inputs(mask, batch=1, heads=4, kv_heads=2, length=LENGTH, head_dim=channels, value_dim=32)
    operator = make_operator(name, **options)
    assert operator.supports(inputs.spec())
    return operator, inputs, tuple(operator.initial_parameters(inputs.spec(), inputs).values())


@pytest.mark.parametrize(("name", "options", "mask", "allowed"), CASES, ids=lambda x: str(x)[:60])
def test_flops_are_those_of_a_run(name, options, mask, allowed):
    operator, inputs, parameters = site(name, options, mask)
    with use_kernels("aten"), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        operator.forward(inputs, parameters)
    ratio = counter.get_total_flops() / operator.cost(inputs.spec()).flops
    assert allowed[0] <= ratio <= allowed[1], ratio


@pytest.mark.parametrize(
    ("name", "options", "mask"),
    [
        *((name, options, mask) for name, options, mask, _ in CASES),
        ("conv_basis", {"k": 16, "offset_bias": "learned", "key_bias": True}, "none"),
        ("tf_attention", {"height": 3, "shared": False, "n_trees": 2}, "none"),
        ("cast", {"tau": "learned", "surrogate_space": "input", "phi_heads": "per_head"}, "none"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_bytes_are_those_of_the_tensors(name, options, mask):
    """Each input, parameter and output once; the profiles of conv_basis are written and read besides."""
    operator, inputs, parameters = site(name, options, mask)
    out = operator.forward(inputs, parameters).out
    touched = (inputs.query, inputs.key, inputs.value, out, *parameters)
    profiles = 0.0
    if name == "conv_basis" and options.get("approximation") != "low_rank":
        profiles = 16.0 * 4 * options["k"] * LENGTH * (1 if inputs.mask.causal else 2)
    assert operator.cost(inputs.spec()).bytes == sum(x.numel() * x.element_size() for x in touched) + profiles
