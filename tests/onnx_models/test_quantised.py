"""Attention whose tensors are 8-bit integers: found, replaced between real numbers, or kept with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_models.helpers import Attention, exact, export, run
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from fastattn_compile.converting.convert import scan_onnx

X = np.random.default_rng(0).standard_normal((2, 20, 32)).astype(np.float32)


class Once(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": X}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def static(form: QuantFormat) -> Callable[[str, str], None]:
    return lambda source, target: quantize_static(source, target, Once(), quant_format=form)


FORMS: dict[str, Callable[[str, str], None]] = {
    "QDQ": static(QuantFormat.QDQ),
    "QOperator": static(QuantFormat.QOperator),
    "dynamic": quantize_dynamic,
    "dynamic, all products": lambda source, target: quantize_dynamic(
        source, target, extra_options={"MatMulConstBOnly": False}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "eager"])
def test_the_conversion_errs_no_more_than_the_quantisation(form: str, fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = export(Attention(fused=fused, causal=True), torch.from_numpy(X))
    source, target = str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")
    onnx.save(plain, source)
    FORMS[form](source, target)
    quantised = onnx.load(target)
    (line,) = scan_onnx(quantised).softmaxes
    assert (line.status, line.mask, line.heads) == ("taken", "causal", 4), line.reason
    after = exact(quantised)
    assert "Softmax" not in {node.op_type for node in after.graph.node}
    wanted, before, got = (run(model, {"x": X})[0] for model in (plain, quantised, after))
    # The attention itself is no longer rounded to 256 steps; what is around it is.
    assert np.linalg.norm(got - wanted) <= 1.1 * np.linalg.norm(before - wanted)
