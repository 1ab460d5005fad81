"""One query of leaf attention over a cache."""

import pytest
import torch
from oracle import assert_as_good_as, make_inputs, make_parameters

from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.kernels.gpu import leaf_decode
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.treeformer import decode as treeformer_decode

ONE = {"batch": 1, "heads": 2, "kv_heads": 1}
TWO = {"heads": 2, "kv_heads": 1}

# Configuration, mask, tokens of the prompt, type, sizes.
CASES = {
    "ancestor-padded": ({"height": 3}, "causal & key_padding", 100, torch.float32, {}),
    "ancestor-deep": ({"height": 6}, "causal", 100, torch.float32, ONE),
    "nothing": ({"height": 6, "fallback": "zero"}, "causal & key_padding", 100, torch.float32, TWO),
    "window-and-sinks": ({"height": 2, "window": 9, "sinks": 3}, "causal & key_padding", 90, torch.float32, TWO),
    "blind": ({"height": 6, "fallback": "self+window", "fallback_window": 5}, "causal", 80, torch.float32, ONE),
    "few-tokens": ({"height": 1, "sinks": 4}, "causal", 2, torch.float32, ONE),
    "two-trees": ({"height": 2, "n_trees": 2, "window": 4}, "causal", 90, torch.float32, ONE),
    "mean-of-trees": ({"height": 3, "n_trees": 2, "combine": "mean"}, "causal", 90, torch.float32, ONE),
    "float16": ({"height": 2, "sinks": 2}, "causal", 70, torch.float16, ONE),
    "bfloat16": ({"height": 2, "window": 3}, "causal", 70, torch.bfloat16, ONE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_decoding(case, device, monkeypatch):
    options, mask, length, kind, sizes = CASES[case]
    operator, steps = make_operator("tf_attention", **options), 4
    inputs = make_inputs(mask, length=length + steps, head_dim=16, value_dim=24, dtype=kind, **sizes)
    tensors = [x.to(device) for x in (inputs.query, inputs.key, inputs.value)]
    padding = None if inputs.key_padding is None else inputs.key_padding[:, :length].to(device)
    parameters = tuple(p.to(device) for p in make_parameters(operator, inputs))
    # Keys are sorted at the first step and at the last; a node is cut into parts.
    monkeypatch.setattr(leaf_decode, "_RECENT", 2)
    monkeypatch.setattr(leaf_decode, "_PARTS", 2)
    monkeypatch.setattr(leaf_decode, "_COLUMNS", 16)
    if device == "cpu":
        monkeypatch.setattr(treeformer_decode, "gpu_obstacle", lambda *tensors: "")

    def decode(dtype, kernels):
        decoder = operator.decoder(inputs.scale, tuple(p.to(dtype) for p in parameters))
        prompt = [x[:, :, :length].to(dtype) for x in tensors]
        with use_kernels("aten"):
            decoder.prefill(AttentionInputs(*prompt, inputs.scale, inputs.mask, padding))
        with use_kernels(kernels), recorded_kernels() as ran:
            made = [
                decoder.step(*(x[:, :, i : i + 1].to(dtype) for x in tensors))
                for i in range(length, length + steps)
            ]
        assert ran["tf_attention decode"] == kernels
        return made

    judged = decode(kind, "triton"), decode(torch.float64, "aten"), decode(kind, "aten")
    for got, oracle, formula in zip(*judged, strict=True):
        assert_as_good_as(got.out, oracle=oracle.out, formula=formula.out)
        if options.get("combine") == "mean":
            assert torch.equal(got.log_sum_exp.isnan(), oracle.log_sum_exp.isnan())
        else:
            assert_as_good_as(got.log_sum_exp, oracle=oracle.log_sum_exp, formula=formula.log_sum_exp)


def test_the_op_keeps_its_contract(device):
    query, key, value = (
        torch.randn(1, h, n, c, device=device) for h, n, c in ((2, 1, 16), (1, 40, 16), (1, 40, 24))
    )
    leaf, real = torch.arange(40, device=device).view(1, 1, 1, 40) % 4, torch.ones(1, 40, dtype=torch.bool)
    found = leaf_decode.Sorted.of(leaf, real.to(device), 2, 2)
    given = query, leaf[:, :, :, :2].transpose(1, 3)[..., 0], key, value, leaf, real.to(device)
    given = *given, found.order, found.start, found.cut, 2, 0, 3, 0, 0.3
    torch.library.opcheck(leaf_decode.attend_one, given, test_utils=["test_schema", "test_faketensor"])
