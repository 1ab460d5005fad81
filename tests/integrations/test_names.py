"""Names of sites in models of transformers: the same scanned, captured, compiled, broken by every block, and routed."""

from __future__ import annotations

import pytest
import torch

import fastattn_compile as fa
from fastattn_compile.backend import records

pytest.importorskip("transformers")

from integrations.models import build, inputs_of

BROKEN_AT = {"llama": "layers", "bert": "encoder.layer", "gpt2": "h", "vit": "layers"}
OPTIONS = {"operator": "window", "width": 8, "quiet": True, "compiler": "eager"}


def names(model: torch.nn.Module) -> list[str]:
    """Of the sites of all graphs, in the order of their compilation."""
    return [decision.name for record in records(model) for decision in record.decisions]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN_AT)
def test_one_model_has_one_list_of_names(kind: str) -> None:
    model, given = build(kind, "sdpa"), inputs_of(kind, 48)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    wanted = [line.name for line in fa.scan(model, **given).softmaxes]
    modules = dict(model.named_modules())
    assert len(wanted) == 2 and all(name in modules for name in wanted)
    assert list(fa.capture(model, [given]).sites) == wanted
    for broken in (False, True):
        if broken:
            for block in model.get_submodule(BROKEN_AT[kind]):
                block.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend="fastattn", options=OPTIONS)(**given)
        assert names(model) == wanted
    torch._dynamo.reset()
    with torch.no_grad():
        fa.route(model, operator="window", width=8)(**given)
    assert names(model) == wanted
