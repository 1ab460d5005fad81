"""The FX view: attention calls, sizes, roles, tuples, real models."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from capture import capture, single_call
from torch import nn

from fastattn_compile.passes.functionalize import functionalize
from fastattn_compile.passes.fx_view import view
from fastattn_compile.passes.graph import GraphView, Node

torch.set_num_threads(1)
aten = torch.ops.aten

X, Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
M = torch.rand(2, 3, 4) < 0.5
K = torch.arange(24).reshape(2, 3, 4)
ALL = slice(None)


def read(target: Any, *args: Any, **kwargs: Any) -> Node:
    """The node of the view that a single call becomes: for a tuple, that of its first element."""
    gm, _ = single_call(target, *args, **kwargs)
    (output,) = view(gm).of_kind("output")
    node: Node = output.inputs[0]
    # The first result of a call that gives several is that call.
    return node.operands[0] if node.kind == "identity" and node.operands[0].inputs else node


# ---- attention calls

Q, K4 = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8)
KV = (Q, K4, K4)
GQA = (Q, K4[:, :2], K4[:, :2])
BIAS = torch.randn(5, 6)
FUSED = {"dropout": 0.0, "is_causal": False, "scale": 8**-0.5, "enable_gqa": False}
SDPA, CPU = F.scaled_dot_product_attention, aten._scaled_dot_product_flash_attention_for_cpu.default
EFFICIENT, FLASH = (
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "mask", "changed"),
    [
        (SDPA, KV, {}, None, {}),
        (SDPA, (), {"query": Q, "key": K4, "value": K4}, None, {}),
        (SDPA, (*KV, BIAS), {}, "x2", {}),
        (SDPA, KV, {"attn_mask": BIAS}, "x2", {}),
        (SDPA, (*KV, None, 0.1, True), {}, None, {"dropout": 0.1, "is_causal": True}),
        (SDPA, KV, {"is_causal": True, "scale": 0.5}, None, {"is_causal": True, "scale": 0.5}),
        (SDPA, GQA, {"enable_gqa": True}, None, {"enable_gqa": True}),
        (aten.scaled_dot_product_attention.default, (*KV, BIAS), {}, "x2", {}),
        (
            aten._scaled_dot_product_attention_math.default,
            (*KV, BIAS, 0.0),
            {"scale": 0.5},
            "x2",
            {"scale": 0.5},
        ),
        (CPU, (*KV, 0.0, True), {}, None, {"is_causal": True}),
        (CPU, KV, {"attn_mask": BIAS}, "x2", {}),
        (EFFICIENT, (*KV, None, False), {}, None, {}),
        (FLASH, (*KV, 0.0, True), {"scale": 0.5}, None, {"is_causal": True, "scale": 0.5}),
    ],
)
def test_fused_attention(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mask: str | None, changed: dict[str, Any]
) -> None:
    node = read(target, *args, **kwargs)
    assert node.kind == "sdpa"
    assert node.attributes == {**FUSED, **changed}
    assert [x.name if isinstance(x, Node) else x for x in node.inputs][2:] == [node.inputs[2].name, mask]
    assert node.shape == (2, 4, 5, 8)


def test_flex_attention_shows_its_functions() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x = torch.randn(1, 2, 128, 16)
    lengths = torch.tensor([100])
    block = create_block_mask(lambda b, h, q, k: (q >= k) & (k < lengths[b]), 1, None, 128, 128, device="cpu")
    ((gm, _),) = capture(
        lambda q: flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + i - j, block_mask=block), x
    )
    (node,) = view(gm).of_kind("flex_attention")
    assert [n.shape for n in node.inputs] == [(1, 2, 128, 16)] * 3
    assert node.attributes["scale"] == 0.25
    assert isinstance(node.attributes["score_mod"], torch.fx.GraphModule)
    assert isinstance(node.attributes["mask_mod"], torch.fx.GraphModule)
    (captured,) = node.attributes["mask_mod_buffers"]
    assert captured.shape == (1,)
    (output,) = view(gm).of_kind("output")
    assert output.inputs[0].kind == "identity" and output.inputs[0].inputs[0].kind == "flex_attention"


@pytest.mark.parametrize(
    "target",
    [aten._native_multi_head_attention.default, torch._native_multi_head_attention],
)
def test_opaque_attention_is_visible(target: Any) -> None:
    x, w, o = torch.randn(2, 5, 8), torch.randn(24, 8), torch.randn(8, 8)
    gm, _ = single_call(target, x, x, x, 8, 2, w, w[:, 0].contiguous(), o, o[0].contiguous())
    (node,) = view(gm).of_kind("mha")
    assert node.attributes["target"] == "_native_multi_head_attention" and node.shape == (2, 5, 8)


# ---- what cannot be said, and what must not be


@pytest.mark.parametrize(
    "call",
    [
        (torch.sin, X),
        ("view", X, torch.int32),  # the bits of another type
        (torch.einsum, "bid,bjd,bkd->bijk", X, Y, torch.randn(2, 3, 4)),
        (torch.bitwise_and, K, torch.ones_like(K)),
        (torch.div, X, Y),
        (operator.getitem, X, M),
        (operator.getitem, X, [0, 1]),
        (F.alpha_dropout, X, 0.5, True),
        (torch.repeat_interleave, X, 2),
        (torch.fmod, X, 2.0),
        (torch.gather, X, 2, K % 3),
    ],
)
def test_opaque(call: tuple[Any, ...]) -> None:
    kwargs = {"rounding_mode": "trunc"} if call[0] is torch.div else {}
    node = read(*call, **kwargs)
    assert node.kind == "opaque" and node.inputs[0].name == "x0"


def test_foreign_functions_are_not_taken_for_torch() -> None:
    @torch.library.custom_op("fastattn_tests::softmax", mutates_args=())
    def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x + dim

    softmax.register_fake(lambda x, dim: torch.empty_like(x))
    node = read(torch.ops.fastattn_tests.softmax.default, X, -1)
    assert node.kind == "opaque" and node.attributes["target"] == "fastattn_tests.softmax"


def test_a_tainted_in_place_call_is_opaque() -> None:
    ((gm, _),) = capture(
        lambda cache, x: cache.index_copy_(0, torch.tensor([1]), x), torch.zeros(3, 4), torch.ones(1, 4)
    )
    nodes = {n.name: n for n in view(gm, functionalize(gm)).nodes}
    assert nodes["index_copy_"].kind == "opaque" and nodes["index_copy_"].tainted
    assert nodes["l_cache_"].tainted and not nodes["l_x_"].tainted


# ---- sizes, roles, tuples


def test_sizes_are_expressions() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = x.shape[1]
        steps = torch.arange(1, n + 1)
        return (
            x[:, 1:],
            x[:, : n - 1],
            x.new_full((n,), n),
            torch.cat([x, x], 1),
            steps,
            x[:, -1],
            x.sum() * n,
        )

    ((gm, _),) = capture(fn, torch.randn(4, 6), dynamic=True)
    (output,) = view(gm).of_kind("output")
    tail, head, full, folded, steps, last, scaled = output.inputs
    b, n = next(x for x in view(gm).of_kind("input") if "symbol" not in x.attributes).shape
    assert isinstance(n, sympy.Expr) and isinstance(b, sympy.Expr)
    assert tail.shape == (b, n - 1) and tail.attributes["index"] == (ALL, slice(1, n, None))
    assert head.attributes["index"] == (ALL, slice(0, n - 1, None))
    assert full.attributes["value"] == n and full.shape == (n,)
    assert folded.shape[1] == 2 * n
    assert steps.attributes == {"start": 1, "step": 1} and steps.shape == (n,)
    assert last.attributes["index"] in ((ALL, -1 + n), (ALL, n - 1))
    assert scaled.inputs[1] == n
    symbols = {x.attributes["symbol"] for x in view(gm).of_kind("input") if "symbol" in x.attributes}
    assert n in symbols


def test_reading_a_shape_is_not_reading_the_tensor() -> None:
    ((gm, _),) = capture(
        lambda x: (x.softmax(-1), x.new_zeros(x.softmax(-1).shape[0])), torch.randn(4, 6), dynamic=True
    )
    seen = view(gm)
    for softmax in seen.of_kind("softmax"):
        assert {user.kind for user in seen.users(softmax)} <= {"output"}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.eps = 0.25, 0.5

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        scores = q @ q.mT * self.scale
        return scores.softmax(-1) @ q + self.eps


def test_a_symbolic_scale_becomes_a_number_with_a_guard() -> None:
    model, scales = Scaled(), []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        seen = view(gm)
        (softmax,) = seen.of_kind("softmax")
        scales.append(softmax.inputs[0].inputs[1])
        assert isinstance(next(seen.of_kind("output")).inputs[0].inputs[1], sympy.Expr)  # no factor of scores
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    x = torch.randn(2, 5, 4)
    for scale, eps in ((0.25, 0.5), (0.25, 0.75), (0.5, 0.75)):
        model.scale, model.eps = scale, eps
        torch.testing.assert_close(compiled(x), model(x))
    assert scales == [0.25, 0.5]


class Roles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameters_of = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parameters_of(x) + self.table


def test_roles_of_placeholders() -> None:
    wanted = {"parameter": 2, "constant": 1, "input": 1}
    ((gm, _),) = capture(Roles(), torch.randn(3, 4))
    exported = torch.export.export(Roles(), (torch.randn(3, 4),)).graph_module
    for graph in (gm, exported):
        assert {kind: len(list(view(graph).of_kind(kind))) for kind in wanted} == wanted
    lifted = torch.fx.symbolic_trace(nn.Sequential(nn.Softmax(-1), nn.Dropout(0.5).eval(), nn.Identity()))
    for node in lifted.graph.nodes:
        node.meta["example_value"] = torch.empty(2, 3)
    assert [n.kind for n in view(lifted).nodes] == ["input", "softmax", "dropout", "identity", "output"]


def test_projections_and_products_of_activations() -> None:
    linear = nn.Linear(4, 4)

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key = linear(x)
        return (
            F.linear(x[0], key[0]),
            torch.addmm(linear.bias, x[0], linear.weight),
            torch.addmm(key[0, 0, :3], x[0], key[0].t()),
        )

    ((gm, _),) = capture(fn, torch.randn(2, 3, 4))
    (output,) = view(gm).of_kind("output")
    product, projection, biased = output.inputs
    assert (
        product.kind == "matmul" and product.inputs[1].kind == "permute" and product.inputs[1].shape == (4, 3)
    )
    assert projection.kind == "linear" and projection.inputs[1].attributes == {"dims": (1, 0)}
    assert biased.kind == "baddbmm" and biased.attributes == {"beta": 1, "alpha": 1}


def test_elements_of_tuples() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = x.split([1, 2, 1], -1)
        first, *_, last = x.unbind(1)
        values, indices = x.max(-1, keepdim=True)
        return a, b, c, first, last, values, indices

    ((gm, _),) = capture(fn, X)
    (output,) = view(gm).of_kind("output")
    a, b, c, first, last, values, indices = output.inputs
    assert [n.attributes["index"][2] for n in (a, b, c)] == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert [n.attributes["index"][1] for n in (first, last)] == [0, 2]
    assert values.kind == "amax" and values.attributes == {"dims": (2,), "keepdim": True}
    assert indices.kind == "opaque"


def test_scalar_tensors_are_numbers() -> None:
    def fn(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        low = torch.full([], torch.finfo(x.dtype).min, dtype=x.dtype)
        return torch.where(m, x / torch.tensor(2.0), low)

    ((gm, _),) = capture(fn, X, M)
    (node,) = view(gm).of_kind("where")
    assert node.inputs[2] == torch.finfo(torch.float32).min
    assert node.inputs[1].inputs[1] == 2.0


def test_every_node_is_there_in_order() -> None:
    ((gm, _),) = capture(lambda x: torch.stack([x.sin(), x.cos()]).softmax(-1), X)
    nodes = view(gm).nodes
    assert [n.origin for n in nodes if n.origin is not None] == list(gm.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    assert all(order[x] < order[n] for n in nodes for x in n.operands)
    assert len({n.name for n in nodes}) == len(nodes)


# ---- models


def model(name: str) -> tuple[nn.Module, dict[str, Any], int]:
    """A small random model, the arguments of a call, and how many softmaxes it has."""
    import transformers as hf

    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "attn_implementation": "eager"}
    tokens, pad = torch.randint(1, 32, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    pad[1, 6:] = 0
    masked = {"input_ids": tokens, "attention_mask": pad}
    if name == "llama":
        llama = hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=2))
        return llama, {**masked, "use_cache": False}, 1
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**small)), masked, 1
    if name == "gpt2":
        gpt2 = hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, attn_implementation="eager")
        return hf.GPT2LMHeadModel(gpt2), {**masked, "use_cache": False}, 2
    t5 = hf.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    arguments = {**masked, "decoder_input_ids": tokens, "use_cache": False}
    return hf.T5ForConditionalGeneration(t5), arguments, 3


def between(seen: GraphView, softmax: Node) -> set[Node]:
    """The nodes on the paths from the projections to a softmax, and on to the next projection."""
    found: set[Node] = set()
    for step in (seen.graph.predecessors, seen.graph.successors):
        work = list(step(softmax))
        while work:
            node = work.pop()
            if node not in found and node.kind not in ("linear", "embedding", "input", "parameter", "output"):
                found.add(node)
                work.extend(step(node))
    return found


@pytest.mark.parametrize(
    ("name", "dynamic"), [("llama", True), ("bert", False), ("t5", False), ("gpt2", True)]
)
def test_models_have_nothing_opaque_around_the_softmax(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    module, arguments, count = model(name)
    with torch.no_grad():
        ((gm, _),) = capture(module.eval(), **arguments, dynamic=dynamic)
    seen = view(gm, functionalize(gm))
    softmaxes = list(seen.of_kind("softmax"))
    assert len(softmaxes) == count
    modules = dict(module.named_modules())
    for softmax in softmaxes:
        opaque = {n.attributes["target"] for n in between(seen, softmax) if n.kind == "opaque"}
        # Rotary embedding turns queries and keys; norms come after the attention of BERT and GPT-2.
        assert opaque <= {"cos", "sin", "layer_norm", "mean", "rsqrt"}
        assert "atten" in softmax.module.lower() or "attn" in softmax.module.lower()
        assert softmax.module in modules
        assert ".py:" in softmax.source and not softmax.source.startswith("/")
        assert all(isinstance(size, int) for size in softmax.shape or ()) is not dynamic
