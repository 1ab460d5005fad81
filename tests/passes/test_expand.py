"""Expanded attention calls against the calls themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture, single_call
from torch import nn

from fastattn_compile.passes.expand import expand
from fastattn_compile.passes.fx_view import view

torch.set_num_threads(1)

BATCH, LENGTH, KEYS, WIDTH, HEADS = 2, 6, 4, 8, 2


def kinds(gm: torch.fx.GraphModule) -> list[str]:
    return [node.kind for node in view(gm).nodes if node.kind in ("mha", "sdpa", "softmax")]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def check(gm: torch.fx.GraphModule, inputs: list[Any], expected: list[str]) -> None:
    """Expands a graph; against fp64 it may be at most twice as wrong as the calls it stands for."""
    seed = 7

    def run(*tensors: Any) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [x for x in gm(*tensors) if isinstance(x, torch.Tensor)]

    def doubled(x: Any) -> Any:
        return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    assert kinds(gm) == ["mha"] * len(expected)
    exact = run(*(doubled(x) for x in inputs))
    before = run(*inputs)
    assert expand(gm) == []
    assert kinds(gm) == expected
    after = run(*inputs)
    assert len(before) == len(after) > 0
    for old, new, oracle in zip(before, after, exact):
        assert new.shape == old.shape and new.dtype == old.dtype
        epsilon = torch.finfo(old.dtype).eps * float(oracle.abs().max())
        assert error(new, oracle) <= 2 * error(old, oracle) + epsilon
    assert all(node.op == "output" or "example_value" in node.meta for node in gm.graph.nodes)
    gm.graph.lint()


def attention(mha: nn.MultiheadAttention, *qkv: torch.Tensor, **options: Any) -> Any:
    """``F.multi_head_attention_forward`` of a module, as its forward calls it."""
    separate = {}
    if mha.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        separate = {"use_separate_proj_weight": True} | {name: getattr(mha, name) for name in names}
    return single_call(
        F.multi_head_attention_forward, *qkv, WIDTH, HEADS, mha.in_proj_weight, mha.in_proj_bias, mha.bias_k,
        mha.bias_v, mha.add_zero_attn, mha.dropout, mha.out_proj.weight, mha.out_proj.bias,
        training=mha.training, **separate, **options,
    )  # fmt: skip


def masks(kind: str, rows: int, keys: int, batch: int | None) -> torch.Tensor | None:
    """Attention masks by shape and type; no row is hidden whole."""
    if kind == "none":
        return None
    shape = (rows, keys) if kind.startswith("2d") else ((batch or 1) * HEADS, rows, keys)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden if kind.endswith("bool") else torch.randn(shape).masked_fill(hidden, float("-inf"))


def padding(kind: str, keys: int, batch: int | None) -> torch.Tensor | None:
    if kind == "none":
        return None
    hidden = (
        torch.zeros(keys, dtype=torch.bool) if batch is None else torch.zeros(batch, keys, dtype=torch.bool)
    )
    hidden[..., -1] = True
    return hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


@pytest.mark.parametrize("need", ["output", "average", "heads"])
@pytest.mark.parametrize("pad", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "2d bool", "2d float", "3d bool", "3d float"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_and_weights(mask: str, pad: str, need: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    gm, inputs = attention(
        nn.MultiheadAttention(WIDTH, HEADS), x, x, x,
        need_weights=need != "output", average_attn_weights=need == "average",
        attn_mask=masks(mask, LENGTH, LENGTH, BATCH), key_padding_mask=padding(pad, LENGTH, BATCH),
    )  # fmt: skip
    check(gm, inputs, ["sdpa" if need == "output" else "softmax"])


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", ["self", "cross", "all different", "separate widths"])
@pytest.mark.parametrize("batched", [True, False])
def test_projections(batched: bool, which: str, bias: bool, need: bool) -> None:
    torch.manual_seed(0)
    separate = {"kdim": 5, "vdim": 3} if which == "separate widths" else {}
    mha = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, **separate)

    def sequence(length: int, width: int) -> torch.Tensor:
        return torch.randn(length, BATCH, width) if batched else torch.randn(length, width)

    query = sequence(LENGTH, WIDTH)
    key = query if which == "self" else sequence(KEYS, separate.get("kdim", WIDTH))
    value = key if which in ("self", "cross") else sequence(KEYS, separate.get("vdim", WIDTH))
    mask = masks("3d float", LENGTH, len(key), BATCH if batched else None)
    pad = padding("float", len(key), BATCH if batched else None)
    gm, inputs = attention(mha, query, key, value, need_weights=need, attn_mask=mask, key_padding_mask=pad)
    check(gm, inputs, ["softmax" if need else "sdpa"])


@pytest.mark.parametrize("pad", ["none", "bool"])
@pytest.mark.parametrize("need", [False, True])
def test_causal_hint(need: bool, pad: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    gm, inputs = attention(
        nn.MultiheadAttention(WIDTH, HEADS), x, x, x, is_causal=True, need_weights=need,
        attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        key_padding_mask=padding(pad, LENGTH, BATCH),
    )  # fmt: skip
    check(gm, inputs, ["softmax" if need else "sdpa"])
    for site in view(gm).of_kind("sdpa"):
        assert site.attributes["is_causal"] is (pad == "none")
        assert (site.inputs[3] is None) is (pad == "none")


@pytest.mark.parametrize("need", [False, True])
def test_training_dropout(need: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    mha = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    check(*attention(mha, x, x, x, need_weights=need), ["softmax" if need else "sdpa"])
    gm, _ = attention(mha, x, x, x, need_weights=need)
    expand(gm)
    assert [
        n.attributes.get("dropout", n.attributes.get("p")) for n in view(gm).of_kind("sdpa", "dropout")
    ] == [0.5]
    gm, _ = attention(mha.eval(), x, x, x, need_weights=need)
    expand(gm)
    assert [n.attributes.get("dropout") for n in view(gm).of_kind("sdpa", "dropout")] == (
        [] if need else [0.0]
    )


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_half_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.bfloat16)
    mha = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.bfloat16)
    pad, mask = padding("bool", LENGTH, BATCH), torch.randn(LENGTH, LENGTH, dtype=torch.bfloat16)
    check(*attention(mha, x, x, x, attn_mask=mask, key_padding_mask=pad), ["softmax"])


def test_rows_that_see_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    hidden = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    hidden[1] = True
    for need in (False, True):
        gm, inputs = attention(
            nn.MultiheadAttention(WIDTH, HEADS), x, x, x, attn_mask=hidden, need_weights=need
        )
        before = gm(*inputs)[0]
        expand(gm)
        torch.testing.assert_close(gm(*inputs)[0], before, equal_nan=True)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_without_positions_stay(options: dict[str, bool]) -> None:
    x = torch.randn(LENGTH, BATCH, WIDTH)
    gm, inputs = attention(nn.MultiheadAttention(WIDTH, HEADS, **options), x, x, x)
    code, before = gm.code, gm(*inputs)
    ((node, text),) = expand(gm)
    assert ("bias_k" if "add_bias_kv" in options else "add_zero_attn") in text
    assert node in gm.graph.nodes and gm.code == code
    assert all(torch.equal(a, b) for a, b in zip(before, gm(*inputs)))


def test_static_keys_stay() -> None:
    x = torch.randn(LENGTH, BATCH, WIDTH)
    static = torch.randn(BATCH * HEADS, KEYS, WIDTH // HEADS)
    gm, _ = attention(nn.MultiheadAttention(WIDTH, HEADS), x, x, x, static_k=static, static_v=static)
    ((_, text),) = expand(gm)
    assert "static_k" in text


# ---- the fast paths of inference


def fast_mask(kind: int | None, floating: bool) -> torch.Tensor | None:
    """Masks as ``nn.MultiheadAttention.merge_masks`` gives them."""
    if kind is None:
        return None
    hidden = (
        torch.rand({0: (LENGTH, LENGTH), 1: (BATCH, LENGTH), 2: (BATCH, HEADS, LENGTH, LENGTH)}[kind]) < 0.4
    )
    hidden[..., 0] = False
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")) if floating else hidden


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize("need", ["output", "average", "heads"])
def test_native_attention(need: str, kind: int | None, floating: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(WIDTH, HEADS).requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    gm, inputs = single_call(
        torch._native_multi_head_attention, x, x, x, WIDTH, HEADS, mha.in_proj_weight, mha.in_proj_bias,
        mha.out_proj.weight, mha.out_proj.bias, fast_mask(kind, floating), need != "output",
        need == "average", kind,
    )  # fmt: skip
    if need == "output":
        # Its second result is empty then.
        (result,) = [n for n in gm.graph.nodes if n.op == "output"]
        result.args = (result.args[0][:1],)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    check(gm, inputs, ["sdpa" if need == "output" else "softmax"])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
def test_encoder_layer(kind: int | None, norm_first: bool, gelu: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16).requires_grad_(False)
    for norm in (layer.norm1, layer.norm2):
        norm.weight.normal_()
        norm.bias.normal_()
    mha = layer.self_attn
    gm, inputs = single_call(
        torch._transformer_encoder_layer_fwd, torch.randn(BATCH, LENGTH, WIDTH), WIDTH, HEADS,
        mha.in_proj_weight, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias, gelu, norm_first, 1e-5,
        layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias, layer.linear1.weight,
        layer.linear1.bias, layer.linear2.weight, layer.linear2.bias, fast_mask(kind, True), kind,
    )  # fmt: skip
    check(gm, inputs, ["sdpa"])


def test_unknown_mask_type_stays() -> None:
    mha = nn.MultiheadAttention(WIDTH, HEADS).requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    gm, _ = single_call(
        torch._native_multi_head_attention, x, x, x, WIDTH, HEADS, mha.in_proj_weight, mha.in_proj_bias,
        mha.out_proj.weight, mha.out_proj.bias, fast_mask(2, False), True, True, 2,
    )  # fmt: skip
    (node,) = [n for n in gm.graph.nodes if n.target is torch._native_multi_head_attention]
    node.args = (*node.args[:12], 9)
    before = list(gm.graph.nodes)
    ((kept, text),) = expand(gm)
    assert kept is node and "mask_type 9" in text
    assert list(gm.graph.nodes) == before


# ---- what Dynamo makes of modules


@pytest.mark.parametrize("dynamic", [False, True])
def test_modules_of_a_transformer(dynamic: bool) -> None:
    torch.manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    source, target = torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True).eval().requires_grad_(False)
    ((gm, inputs),) = capture(model, source, target, tgt_mask=mask, tgt_is_causal=True, dynamic=dynamic)
    check(gm, inputs, ["sdpa", "sdpa", "sdpa"])
    paths = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert [n.module for n in view(gm).of_kind("sdpa")] == paths
    assert list(view(gm).of_kind("sdpa"))[1].attributes["is_causal"] is True


@pytest.mark.parametrize("dynamic", [False, True])
def test_module_in_training(dynamic: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.25, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    ((gm, inputs),) = capture(lambda y: mha(y, y, y)[0], x, dynamic=dynamic)
    check(gm, inputs, ["sdpa"])  # nobody reads the weights, though they are asked for
    (site,) = view(gm).of_kind("sdpa")
    assert site.attributes["dropout"] == 0.25


def test_gradients_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    mha = nn.MultiheadAttention(WIDTH, HEADS)
    gm, inputs = attention(mha, x, x, x, need_weights=False)
    before = torch.autograd.grad(gm(*inputs)[0].square().sum(), list(mha.parameters()))
    expand(gm)
    after = torch.autograd.grad(gm(*inputs)[0].square().sum(), list(mha.parameters()))
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old)
