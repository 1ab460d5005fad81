"""Function bodies in ONNX Runtime Web under Node: the same files, with nothing of ours installed there.

Runs where Node and the package are: ``npm install --no-save onnxruntime-web@1.30.0`` in this repository, or in the folder
that the variable ``ONNXRUNTIME_WEB`` names.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models.helpers import attention_model, run
from onnx_models.test_bodies import OPTIONS, feeds_of, served, spec_of
from oracle import make_inputs, make_parameters

from fastattn_compile.operators.registry import make_operator

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from onnx_web import run_in_web  # noqa: E402

PACKAGE = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT))
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGE / "node_modules" / "onnxruntime-web").is_dir(),
    reason="needs Node and onnxruntime-web (npm install --no-save onnxruntime-web@1.30.0)",
)


def test_bodies_compute_in_web_what_they_compute_natively() -> None:
    torch.manual_seed(0)
    models, natively = [], {}
    for name, options in OPTIONS.items():
        for mask in ("none", "causal"):
            if served(name, mask) != mask:
                continue
            inputs = make_inputs(mask, length=75)
            operator = make_operator(name, **options)
            model = attention_model(operator, spec_of(inputs), parameters=make_parameters(operator, inputs))
            models.append((f"{name}.{mask}", model, feeds_of(inputs)))
            natively[f"{name}.{mask}"] = run(model, feeds_of(inputs))[0]
    printed, outputs = run_in_web(PACKAGE, models, repeats=0)
    assert {r["name"]: r["error"] for r in printed["results"] if r["error"]} == {}
    for name, wanted in natively.items():
        apart = np.linalg.norm(outputs[name] - wanted.reshape(-1)) / np.linalg.norm(wanted)
        assert apart < 1e-5, (name, apart)
