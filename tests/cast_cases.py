"""Configurations of CAST that its tests run through."""

import pytest
from oracle import (
    make_inputs,
)

from fastattn_compile.operators.cast.config import CHOICES
from fastattn_compile.operators.registry import make_operator

CASES = {
    "topk": {},
    "topk-overlapping": {"cluster_size": 20, "own_summary": "included", "phi_heads": "per_head"},
    "topk-sparse": {"cluster_size": 4, "head_reduce": "softmax_mean", "surrogate_space": "input"},
    "topk-lse": {"combine": "lse", "cluster_size": 20},
    "sa": {"clustering": "sa_topk", "tau": "learned"},
    "sa-pairs": {"clustering": "sa_topk", "sa_order": "pair", "cluster_size": 12, "xi": "softplus"},
    "sa-lse": {"clustering": "sa_topk", "combine": "lse", "select": "key", "affinity_scale": "sqrt_width"},
    "causal": {"clustering": "token_choice", "cluster_size": 5, "head_reduce": "mean"},
    "causal-own": {
        "clustering": "token_choice",
        "cluster_size": 3,
        "own_summary": "included",
        "tau": "learned",
    },
    "causal-lse": {"clustering": "token_choice", "cluster_size": 5, "combine": "lse", "select": "query"},
}
each_case = pytest.mark.parametrize("case", CASES)


def build(case, clusters=5):
    return make_operator("cast", clusters=clusters, **CASES[case])


def fitting(operator, padded=False, **sizes):
    """Inputs whose mask the operator serves."""
    mask = " & ".join((["causal"] if operator.config.causal else []) + (["key_padding"] if padded else []))
    return make_inputs(mask or "none", **{"length": 41, **sizes})


SWITCHES = [
    (name, value)
    for name, values in CHOICES.items() if name not in ("clustering", "combine") for value in values
]  # fmt: skip
