"""One model, one list of names: from every way of capturing it, whatever breaks, changes or repeats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn_compile as fa
from fastattn_compile.backend import records
from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.passes.analyse import analyse

torch.set_num_threads(1)

N = 32


class Attention(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / 4).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, attention: nn.Module | None = None, breaks: bool = False) -> None:
        super().__init__()
        self.attn = Attention() if attention is None else attention
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.attn(x)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, breaks: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


class Shared(nn.Module):
    """A block that is called three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = self.first
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x)
        x = self.first(x)
        result: Tensor = self.last(x)
        return result


class Several(nn.Module):
    """Three attentions in one module, the last behind a graph break."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for number in range(2):
            q, k, v = self.qkv[number](x).chunk(3, -1)
            x = x + (q @ k.mT / 4).softmax(-1) @ v
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv[2](x)[:, None].chunk(3, -1)
        return x + torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


BLOCKS = [f"blocks.{i}.attn" for i in range(3)]
SEVERAL = [f"blocks.{i}{o}" for i in range(2) for o in ("", "#1", "#2")]
LIBRARY = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "attention"]
SHARED = ["first.attn", "second.attn", "first.attn#1", "last.attn"]

# Models that can be exported, which no graph break can.
WHOLE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "blocks": (lambda: Stack(*(Block() for _ in range(3))), BLOCKS),
    "shared": (Shared, SHARED),
    "several": (lambda: Stack(Several(), Several()), SEVERAL),
    "library": (Library, LIBRARY),
    "inner compile": (
        lambda: Stack(*(torch.compile(Block(), backend="eager") for _ in range(3))), BLOCKS
    ),
}  # fmt: skip
BROKEN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "in the loop": (lambda: Stack(*(Block() for _ in range(3)), breaks=True), BLOCKS),
    "in the block": (lambda: Stack(*(Block(breaks=True) for _ in range(3))), BLOCKS),
    "in the attention": (lambda: Stack(*(Block(Attention(True)) for _ in range(3))), BLOCKS),
    "more blocks than Dynamo compiles of one code": (
        lambda: Stack(*(Block(breaks=True) for _ in range(10))), [f"blocks.{i}.attn" for i in range(10)]
    ),
    "several": (lambda: Stack(Several(True), Several(True)), SEVERAL),
}  # fmt: skip


def compiled(model: nn.Module, *shapes: int, grad: bool = False, mark: str = "", **options: Any) -> list[str]:
    """Names of the sites of every graph that ``torch.compile`` makes of a model, the last length's alone."""
    torch._dynamo.reset()
    choice = {"operator": "window", "width": 8, "quiet": True, "compiler": "eager"}
    fast = torch.compile(model, backend="fastattn", options=choice, **options)
    known = 0
    for n in shapes:
        known = len(records(model))
        x = torch.randn(2, n, 16)
        if mark:
            getattr(torch._dynamo, mark)(x, 1)
        with torch.set_grad_enabled(grad):
            fast(x)
    made = [decision for record in records(model)[known:] for decision in record.decisions]
    assert {decision.operator for decision in made} == {"window"}
    return [decision.name for decision in made]


@pytest.mark.parametrize("kind", [*WHOLE, *(f"broken {kind}" for kind in BROKEN)])
def test_compilation_gives_the_names_of_the_modules(kind: str) -> None:
    build, wanted = BROKEN[kind[7:]] if kind.startswith("broken ") else WHOLE[kind]
    model = build().eval()
    x = torch.randn(2, N, 16)
    assert [line.name for line in fa.scan(model, x).softmaxes] == wanted
    assert compiled(model, N) == wanted
    assert compiled(model, N, 48) == wanted, "compiled again for another length, now symbolic"
    assert compiled(model, N, dynamic=True) == wanted
    # Behind a graph break Dynamo itself calls some sizes constant that it was told are not.
    mark = "maybe_mark_dynamic" if kind.startswith("broken") else "mark_dynamic"
    assert compiled(model, N, mark=mark) == wanted
    assert compiled(model.train(), N, grad=True) == wanted
    model.eval()
    assert list(fa.capture(model, [(x,)]).sites) == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("kind", ["blocks", "shared", "several", "broken several"])
def test_ddp_gives_the_same_names(kind: str, optimized: bool) -> None:
    """Its optimizer cuts a graph between buckets of parameters, here between the attentions of one module."""
    build, wanted = BROKEN[kind[7:]] if kind.startswith("broken ") else WHOLE[kind]
    model = nn.parallel.DistributedDataParallel(build(), bucket_cap_mb=0.001)
    with torch._dynamo.config.patch(optimize_ddp=optimized):
        assert compiled(model, N, grad=True) == wanted
        assert compiled(model, N, 48, grad=True) == wanted
    assert len(records(model)) > 2 or not optimized
    assert [line.name for line in fa.scan(model, torch.randn(2, N, 16)).softmaxes] == wanted


def test_a_scan_sees_what_dynamo_gave_up_before() -> None:
    """Functions are given up for all compilations of a process."""
    model, x = Stack(*(Block(breaks=True) for _ in range(3))).eval(), torch.randn(2, N, 16)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        fast = torch.compile(model, backend="eager")
        fast(x), fast(x[:, 1:])
    assert [line.name for line in fa.scan(model, x).softmaxes] == BLOCKS
    assert list(fa.capture(model, [(x,)]).sites) == BLOCKS


def served(model: nn.Module) -> dict[str, str]:
    return {decision.name: decision.operator for record in records(model) for decision in record.decisions}


@pytest.mark.parametrize("kind", ["in the loop", "in the block", "in the attention"])
def test_a_plan_serves_each_block_behind_a_graph_break(kind: str) -> None:
    """One code, three blocks: each is served as the plan says, and computes what the whole model does."""
    broken, whole = BROKEN[kind][0]().eval(), WHOLE["blocks"][0]().eval()
    whole.load_state_dict(broken.state_dict())
    plan = fa.Plan(
        {BLOCKS[0]: fa.PlannedSite("window", {"width": 4}), BLOCKS[2]: fa.PlannedSite("fma", {"block": 8})}
    )
    x, results = torch.randn(2, 64, 16), []
    for model in (broken, whole):
        torch._dynamo.reset()
        fast = torch.compile(
            model, backend="fastattn", options={"plan": plan, "quiet": True, "compiler": "aot_eager"}
        )
        with torch.no_grad():
            results.append((fast(x), fast(x)))
        assert served(model) == {BLOCKS[0]: "window", BLOCKS[1]: "exact", BLOCKS[2]: "fma"}
    (first, again), (expected, _) = results
    assert torch.equal(first, again) and torch.allclose(first, expected, atol=1e-5)
    assert not torch.allclose(first, broken(x), atol=1e-3)


def test_parameters_of_each_block_are_its_own_behind_a_graph_break() -> None:
    model = BROKEN["in the block"][0]().eval()
    x = torch.randn(2, 64, 16)
    bundles = fa.attach(model, "fma", x, options={"basis": "depthwise", "block": 8})
    assert list(bundles) == BLOCKS
    options = {"operator": "fma", "basis": "depthwise", "block": 8, "quiet": True, "compiler": "aot_eager"}
    torch._dynamo.reset()
    torch.compile(model, backend="fastattn", options=options)(x).sum().backward()
    assert served(model) == dict.fromkeys(BLOCKS, "fma")
    for bundle in bundles.values():
        assert all(p.grad is not None and bool(p.grad.any()) for p in bundle.parameters())


class Repeated(nn.Module):
    """A block called twice, each time in a graph of its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(breaks=True)
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.again(self.block(x))
        return result


@pytest.mark.parametrize("other", ["block.attn#1", "again.attn"])
def test_calls_that_share_a_graph_are_not_served_by_one_anothers_choice(other: str) -> None:
    def run(second: fa.PlannedSite, **options: Any) -> nn.Module:
        torch._dynamo.reset()
        model = Repeated().eval()
        plan = fa.Plan({"block.attn": fa.PlannedSite("window", {"width": 4}), other: second})
        fast = torch.compile(
            model, backend="fastattn", options={"plan": plan, "quiet": True, "compiler": "eager", **options}
        )
        with torch.no_grad():
            fast(torch.randn(2, N, 16))
        return model

    assert served(run(fa.PlannedSite("window", {"width": 4}))) == {"block.attn": "window"}
    (decision,) = [d for record in records(run(fa.PlannedSite("exact"))) for d in record.decisions]
    assert decision.operator == "exact" and "graph break" in decision.reason
    with pytest.raises(UnsupportedSiteError, match="graph break"):
        run(fa.PlannedSite("window", {"width": 8}), strict=True)


class Regions(Stack):
    """Blocks that PyTorch captures once, as one region, and calls again with other weights."""

    def forward(self, x: Tensor) -> Tensor:
        @torch.compiler.nested_compile_region
        def run(block: nn.Module, x: Tensor) -> Tensor:
            result: Tensor = block(x)
            return result

        for block in self.blocks:
            x = run(block, x)
        return x


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_region_is_served_call_by_call(compiler: str) -> None:
    names = [f"blocks.{i}.attn" for i in range(4)]
    model = Regions(*(Block() for _ in range(4))).eval()
    whole = Stack(*copy.deepcopy(model.blocks)).eval()
    x = torch.randn(2, 64, 16)
    assert [line.name for line in fa.scan(model, x).softmaxes] == names
    assert list(fa.capture(model, [(x,)]).sites) == names
    plan = fa.Plan(
        {names[1]: fa.PlannedSite("window", {"width": 4}), names[2]: fa.PlannedSite("fma", {"block": 8})}
    )
    results = []
    for one in (model, whole):
        torch._dynamo.reset()
        fast = torch.compile(
            one, backend="fastattn", options={"plan": plan, "quiet": True, "compiler": compiler}
        )
        with torch.no_grad():
            results.append(fast(x))
        assert served(one) == dict(zip(names, ["exact", "window", "fma", "exact"]))
    assert torch.allclose(*results, atol=1e-5)
    assert not torch.allclose(results[0], model(x), atol=1e-3)


def test_what_was_measured_on_one_model_does_not_decide_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of one class have one code, which Dynamo compiles once when it sees no difference."""
    errors = iter((0.5, 0.0))
    monkeypatch.setattr("fastattn_compile.passes.choose.crossover", lambda *_: 1)
    monkeypatch.setattr("fastattn_compile.measure.own_error", lambda *_: next(errors))
    torch._dynamo.reset()
    models = [Stack(Block()).eval() for _ in range(2)]
    for model in models:
        with torch.no_grad():
            torch.compile(model, backend="fastattn", options={"quiet": True, "compiler": "eager"})(
                torch.randn(2, N, 16)
            )
    assert [served(model) for model in models] == [{"blocks.0.attn": "exact"}, {"blocks.0.attn": "fma"}]


def test_a_model_compiled_by_its_method_has_the_same_names() -> None:
    model = Stack(*(Block(breaks=True) for _ in range(2))).eval()
    options = {"operator": "window", "width": 8, "quiet": True, "compiler": "eager"}
    for compile_it in (
        lambda: torch.compile(model.forward, backend="fastattn", options=options),
        lambda: torch.compile(lambda x: model(x) + 1, backend="fastattn", options=options),
        lambda: (model.compile(backend="fastattn", options=options), model)[1],
    ):
        torch._dynamo.reset()
        with torch.no_grad():
            compile_it()(torch.randn(2, N, 16))
        assert [d.name for r in records(model) for d in r.decisions] == BLOCKS[:2]


@pytest.mark.parametrize("kind", WHOLE)
def test_export_gives_the_same_names(kind: str) -> None:
    build, wanted = WHOLE[kind]
    model, x = build().eval(), torch.randn(2, N, 16)
    length = torch.export.Dim("length", min=8, max=64)
    for strict in (True, False):
        for shapes in (None, {"x": {1: length}}):
            program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
            found = [line.name for a in analyse(copy.deepcopy(program.graph_module)) for line in a.softmaxes]
            assert found == wanted
            assert [line.name for line in fa.scan(program.module(), x).softmaxes] == wanted


@pytest.mark.parametrize("kind", WHOLE)
def test_onnx_gives_the_same_names(kind: str, tmp_path: Any) -> None:
    build, wanted = WHOLE[kind]
    assert onnx_names(build().eval(), (torch.randn(2, N, 16),), tmp_path) == wanted


def onnx_names(model: nn.Module, args: tuple[Any, ...], folder: Any, **options: Any) -> list[str]:
    onnx = pytest.importorskip("onnx")
    from fastattn_compile.converting.convert import scan_onnx

    path = folder / "model.onnx"
    onnx.save_model(fa.onnx.export(model, args, **options), str(path))
    return [line.name for line in scan_onnx(str(path)).softmaxes]
