"""Names of sites in models of transformers: the same from every way into a model, whatever breaks or changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn_compile as fa
from fastattn_compile.backend import records

pytest.importorskip("transformers")

import transformers
from integrations.models import build, inputs_of

BROKEN_AT = {
    "llama": ["layers"], "bert": ["encoder.layer"], "gpt2": ["h"], "vit": ["layers"],
    "t5": ["encoder.block", "decoder.block"], "swin": ["encoder.layers.0.blocks", "encoder.layers.1.blocks"],
}  # fmt: skip
SITES = {
    "t5": [
        "encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ],
    "swin": [
        "encoder.layers.0.blocks.0.attention", "encoder.layers.0.blocks.1.attention",
        "encoder.layers.1.blocks.0.attention",
    ],
}  # fmt: skip
OPTIONS = {"operator": "window", "width": 8, "quiet": True, "compiler": "eager"}


def model_of(kind: str, attention: str = "sdpa") -> tuple[transformers.PreTrainedModel, dict[str, Tensor]]:
    """A model that gives no caches, and inputs of it."""
    model, given = build(kind, attention), inputs_of(kind, 48)
    for config in (module.config for module in model.modules() if hasattr(module, "config")):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    if kind == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :24]
    return model, given


def names(model: torch.nn.Module) -> list[str]:
    """Of the sites of all graphs, in the order of their compilation."""
    return [decision.name for record in records(model) for decision in record.decisions]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN_AT)
def test_one_model_has_one_list_of_names(kind: str) -> None:
    model, given = model_of(kind)
    lines = fa.scan(model, **given).softmaxes
    wanted = [line.name for line in lines]
    modules = dict(model.named_modules())
    assert all(name in modules for name in wanted) and (
        wanted == SITES[kind] if kind in SITES else len(wanted) == 2
    )
    # What no operator but exact attention can serve by its structure (the bias tables of Swin) is not captured.
    assert list(fa.capture(model, [given]).sites) == ([] if kind == "swin" else wanted)
    for broken in (False, True):
        for path in BROKEN_AT[kind] if broken else ():
            for block in model.get_submodule(path):
                block.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        torch._dynamo.reset()
        # The methods of T5 are behind a decorator, which is one function to Dynamo.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            torch.compile(model, backend="fastattn", options=OPTIONS)(**given)
        assert names(model) == wanted
    torch._dynamo.reset()
    with torch.no_grad():
        fa.route(model, operator="window", width=8)(**given)
    assert names(model) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", SITES)
def test_other_sizes_and_training_change_no_name(kind: str) -> None:
    model, given = model_of(kind)
    torch._dynamo.reset()
    fast = torch.compile(model.train(), backend="fastattn", options=OPTIONS)
    fast(**given)
    known = len(records(model))
    # The second size is symbolic.
    fast(**{name: torch.cat((x, x)) for name, x in given.items()})
    assert names(model) == SITES[kind] * 2 and len(records(model)) == 2 * known


@pytest.mark.slow
@pytest.mark.parametrize("kind", SITES)
def test_exported_models_have_the_same_names(kind: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from fastattn_compile.converting.convert import scan_onnx

    # torch.onnx cannot decompose the SDPA of these models.
    model, given = model_of(kind, "eager")
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = {name: {0: batch} for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    assert [line.name for line in fa.scan(program.module(), **given).softmaxes] == SITES[kind]
    onnx.save_model(fa.onnx.export(model, (), kwargs=given), str(tmp_path / "model.onnx"))
    assert [line.name for line in scan_onnx(str(tmp_path / "model.onnx")).softmaxes] == SITES[kind]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("kind", SITES)
def test_ddp_gives_the_same_names(kind: str, optimized: bool) -> None:
    model, given = model_of(kind)
    parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=optimized):
        torch.compile(parallel, backend="fastattn", options=OPTIONS)(**given)
    # Parts that need nothing of one another (encoder and decoder) come in any order.
    assert sorted(names(model)) == sorted(SITES[kind])
    assert len(records(model)) > 2 if optimized else len(records(model)) == 1
