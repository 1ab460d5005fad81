"""Names of sites against ``model.named_modules()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture import capture
from torch import nn

from fastattn_compile.passes.names import (
    decode_placeholder,
    module_ids,
    module_path,
    normalise_path,
    parameter_path,
    role,
    site_module,
    source_line,
    unique_names,
)

torch.set_num_threads(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (q @ k.mT).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"left side": Block(), "7": Block()})
        self.sequence = nn.Sequential(Block(), nn.Sequential(Block()))
        self.shared = Block()
        self.register_module("modules_x", Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        for name in self.named:
            x = self.named[name](x)
        x = self.sequence(x)
        for _ in range(2):
            x = self.shared(x)
        return getattr(self, "modules_x")(x).softmax(-1)


WANTED = [
    "layers.0.attn", "layers.1.attn", "named.left side.attn", "named.7.attn", "sequence.0.attn",
    "sequence.1.0.attn", "shared.attn", "shared.attn#1", "modules_x.attn",
]  # fmt: skip


def softmaxes(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if "softmax" in str(n.target)]


def decorated(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What a decorator with a bare signature leaves of a method: the module is ``args[0]``."""
    return Model.forward(*args, **kwargs)


class Decorated(Model):
    forward = decorated


@pytest.mark.parametrize("how", ["module", "function", "method", "decorated"])
def test_paths_are_those_of_named_modules(how: str) -> None:
    model = Decorated() if how == "decorated" else Model()
    fn = {"module": model, "decorated": model, "function": lambda x: model(x) + 1, "method": model.forward}[
        how
    ]
    ((gm, _),) = capture(fn, torch.randn(2, 3, 4))
    *inner, last = softmaxes(gm)
    assert unique_names([module_path(n) for n in inner]) == WANTED
    modules = dict(model.named_modules())
    assert all(site_module(name) in modules for name in WANTED)
    assert module_path(last) == ""
    assert source_line(last).startswith("test_names.py:")
    assert {id(modules[site_module(name)]) for name in WANTED} <= module_ids(gm)
    assert module_ids(gm) <= {id(m) for m in modules.values()}


def test_export_gives_the_same_paths() -> None:
    gm = torch.export.export(Model(), (torch.randn(2, 3, 4),)).graph_module
    *inner, _ = softmaxes(gm)
    assert unique_names([module_path(n) for n in inner]) == WANTED


def test_parameters_are_known_from_their_placeholders() -> None:
    block = Model().layers[1]

    def unrolled(x: torch.Tensor) -> torch.Tensor:
        attn = block.attn
        q, k, v = (
            torch.nn.functional.linear(x, p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        return (q @ k.mT).softmax(-1) @ v

    ((gm, _),) = capture(unrolled, torch.randn(2, 3, 4))
    (softmax,) = softmaxes(gm)
    assert module_path(softmax) == ""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder" and "parameters" in n.name]
    exact = {parameter_path(n) for n in placeholders}
    assert exact == {f"attn.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")}
    for node in placeholders:
        assert role(node, None) == "parameter"
        # Without the source object the name is decoded.
        node.meta.pop("grapharg", None)
        if hasattr(node, "_dynamo_source"):
            del node._dynamo_source
    assert {parameter_path(n) for n in placeholders} == exact


def test_paths_survive_a_graph_break() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    graphs = capture(Broken(), torch.randn(2, 3, 4))
    assert [module_path(n) for gm, _ in graphs for n in softmaxes(gm)] == ["blocks.0.attn", "blocks.1.attn"]


def test_checkpointed_bodies_keep_paths_and_parameters() -> None:
    from torch.utils.checkpoint import checkpoint

    model = Model().layers

    def fn(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model[1], x, use_reentrant=False)

    ((gm, _),) = capture(fn, torch.randn(2, 3, 4))
    bodies = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule) and m is not gm]
    ((body, softmax),) = [(b, n) for b in bodies for n in softmaxes(b)]
    assert module_path(softmax) == "1.attn"
    roles = [role(n, n.meta.get("example_value")) for n in body.graph.nodes if n.op == "placeholder"]
    assert sorted(roles) == ["input"] + ["parameter"] * 8


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].encoder.layer.0.attention.self", "encoder.layer.0.attention.self"),
        ("L['self']", ""),
        ("L['model']._modules['layers']._modules['0']._modules['self_attn']", "layers.0.self_attn"),
        ("L['self'].layers[3].attn", "layers.3.attn"),
        ("L['fn']['block'].attn", "block.attn"),
        ("G['model'].layers.slice", "layers.slice"),
        ('L["self"].blocks["1"]', "blocks.1"),
        ("getattr(L['self'].layers, '0').attn", "layers.0.attn"),
        ("getattr(getattr(L['self'], 'layers'), '0').attn", "layers.0.attn"),
        ("encoder.layers.0", "encoder.layers.0"),
        ("", ""),
        ("self_attention.self", "self_attention.self"),
        ("L['self'].selfish", "selfish"),
        ("L['self'].blocks.0._orig_mod.attn", "blocks.0.attn"),
        ("L['args'][0].layers.3.attn", "layers.3.attn"),
        ("L['args'][0]._modules['layers']._modules['0']", "layers.0"),
    ],
)
def test_spellings_of_paths(path: str, name: str) -> None:
    assert normalise_path(path) == name


@pytest.mark.parametrize(
    ("placeholder", "name"),
    [
        ("L_self_modules_model_modules_layers_modules_0_modules_self_attn_modules_q_proj_parameters_weight_",
         "model.layers.0.self_attn.q_proj.weight"),
        ("l_fn_modules_layers_modules_11_modules_attn_parameters_weight_", "layers.11.attn.weight"),
        ("G_m_buffers_inv_freq_", "inv_freq"),
        ("L_model_modules_h_modules_0_buffers_bias_", "h.0.bias"),
        ("L_num_parameters_", ""),
        ("L_x_", ""),
        ("primals_1", ""),
    ],
)  # fmt: skip
def test_decoded_placeholders(placeholder: str, name: str) -> None:
    assert decode_placeholder(placeholder) == name


def test_an_input_named_like_a_parameter_is_an_input() -> None:
    ((gm, _),) = capture(
        lambda num_parameters, l_buffers_: num_parameters + l_buffers_, torch.ones(2), torch.ones(2)
    )
    found = [role(n, n.meta["example_value"]) for n in gm.graph.nodes if n.op == "placeholder"]
    assert found == ["input", "input"]


def test_source_lines_start_at_the_package() -> None:
    node: Any = torch.fx.Graph().placeholder("x")
    assert source_line(node) == ""
    frames = [
        '  File "/venv/lib/python3.11/site-packages/transformers/models/llama/model.py", line 42, in f',
        "    x = y", '  File "/project/attention.py", line 7, in forward', "    return x.softmax(-1)",
    ]  # fmt: skip
    node.meta["stack_trace"] = "\n".join(frames)
    assert source_line(node) == "attention.py:7"
    node.meta["stack_trace"] = "\n".join(frames[:2])
    assert source_line(node) == "transformers/models/llama/model.py:42"


def test_repeated_names_are_numbered_in_order() -> None:
    assert unique_names(["a", "b", "a", "a", "b"]) == ["a", "b", "a#1", "a#2", "b#1"]
    assert unique_names(["a", "a#1", "a"]) == ["a", "a#1", "a#2"]
    names = unique_names(["a#1", "a", "a", "a#1"])
    assert len(set(names)) == 4 and names[:2] == ["a#1", "a"]
    assert unique_names(["a", "b", "a"], {"a": 2}) == ["a#2", "b", "a#3"]
    assert unique_names([]) == []
