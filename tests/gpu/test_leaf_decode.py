"""One query of leaf attention over a cache."""

import pytest
import torch
from oracle import assert_as_good_as, make_inputs, make_parameters

from fastattn_compile.kernels.gpu import leaf_decode
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.treeformer.decode import LeafDecoder


@pytest.mark.parametrize(
    ("fallback", "height", "padded"), [("ancestor", 3, True), ("ancestor", 6, False), ("zero", 6, True)]
)
def test_decoding(fallback, height, padded, device, monkeypatch):
    length, steps = 100, 3
    operator = make_operator("tf_attention", height=height, fallback=fallback)
    mask = "causal & key_padding" if padded else "causal"
    inputs = make_inputs(mask, length=length + steps, head_dim=16, value_dim=24)
    tensors = [x.to(device) for x in (inputs.query, inputs.key, inputs.value)]
    padding = None if inputs.key_padding is None else inputs.key_padding[:, :length].to(device)
    parameters = tuple(p.to(device) for p in make_parameters(operator, inputs))
    monkeypatch.setattr(leaf_decode, "_STRETCH", 64)

    def decode(dtype, triton):
        monkeypatch.setattr(LeafDecoder, "_obstacle", lambda self: "" if triton else "not now")
        decoder = operator.decoder(inputs.scale, tuple(p.to(dtype) for p in parameters))
        prompt = [x[:, :, :length].to(dtype) for x in tensors]
        decoder.prefill(AttentionInputs(*prompt, inputs.scale, inputs.mask, padding))
        return [
            decoder.step(*(x[:, :, i : i + 1].to(dtype) for x in tensors))
            for i in range(length, length + steps)
        ]

    judged = decode(torch.float32, True), decode(torch.float64, False), decode(torch.float32, False)
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got.out, oracle=oracle.out, formula=formula.out)
        assert_as_good_as(got.log_sum_exp, oracle=oracle.log_sum_exp, formula=formula.log_sum_exp)
