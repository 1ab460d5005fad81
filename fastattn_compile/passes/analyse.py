"""From a captured graph to its softmaxes: clean up, view, find, name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx

from fastattn_compile.passes.expand import expand
from fastattn_compile.passes.find import channel_sizes, find
from fastattn_compile.passes.frame import Frame, current_frame, place
from fastattn_compile.passes.functionalize import functionalize
from fastattn_compile.passes.fx_view import view
from fastattn_compile.passes.graph import GraphView
from fastattn_compile.passes.lift_values import WRITTEN
from fastattn_compile.passes.mask_check import check_masks
from fastattn_compile.passes.mask_guard import MaskCheck, MaskHistory
from fastattn_compile.passes.names import unique_names
from fastattn_compile.passes.regions import unshare
from fastattn_compile.passes.site import Softmax


@dataclass(frozen=True)
class Analysis:
    """A graph and what was found in it.

    Args:
        gm: The graph, cleaned up in place.
        view: Its normalised view.
        softmaxes: One for each softmax, in execution order.
        frame: What it was captured from; ``None`` when not by Dynamo.
        check: What must hold of the inputs for masks that were read from values.
    """

    gm: torch.fx.GraphModule
    view: GraphView
    softmaxes: list[Softmax]
    frame: Frame | None = None
    check: MaskCheck | None = None


def bodies(gm: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    """A graph and the graphs inside it (bodies of checkpointed or conditional regions)."""
    for _, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def analyse(
    gm: torch.fx.GraphModule,
    within: str = "",
    inputs: Sequence[Any] | None = None,
    history: MaskHistory | None = None,
) -> list[Analysis]:
    """Finds every softmax in a graph and the graphs inside it.

    Args:
        gm: A graph as Dynamo or ``torch.export`` captures it. In-place operators on fresh tensors are made functional and
            opaque attention calls are expanded, in place; what the graph computes does not change.
        within: Path, inside the whole model, of the module that was captured; sites are named from the model's root.
        inputs: Real inputs of the graph: masks that are data to it are understood from their values (``mask_check``).
        history: What earlier batches taught of these masks.
    """
    history = history or MaskHistory()
    for node in gm.graph.nodes if history.buffers else ():
        if str(node.target) in history.buffers:
            node.meta[WRITTEN] = True
    frame = current_frame(gm, within)
    place(gm, frame, within)
    found = _found(gm)
    if unshare(gm, {body for body, _, lines in found if lines}):
        found = _found(gm)
    paths = [line.name for _, _, lines in found for line in lines]
    if frame is not None and frame.inside and paths:
        # Of this module alone: what serves another may be something else.
        frame.bind()
    names = iter(unique_names(paths, frame.before(paths) if frame is not None else None))
    analyses = []
    for body, normalised, lines in found:
        named, check = [_named(line, next(names)) for line in lines], None
        if body is gm:
            named, check = check_masks(gm, normalised, named, inputs, history)
        analyses.append(Analysis(body, normalised, named, frame, check))
    return analyses


def _found(gm: torch.fx.GraphModule) -> list[tuple[torch.fx.GraphModule, GraphView, list[Softmax]]]:
    found = []
    for body in bodies(gm):
        expand(body)
        tainted = functionalize(body)
        normalised = view(body, tainted)
        if _specialise(body, normalised):
            normalised = view(body, tainted)
        found.append((body, normalised, find(normalised)))
    return found


def named(lines: Sequence[Softmax]) -> list[Softmax]:
    """The lines of a model with names that are unique in it."""
    names = unique_names([line.name for line in lines])
    return [_named(line, name) for line, name in zip(lines, names)]


def _named(line: Softmax, name: str) -> Softmax:
    site = dataclasses.replace(line.site, name=name) if line.site is not None else None
    return dataclasses.replace(line, name=name, site=site)


def _specialise(gm: torch.fx.GraphModule, normalised: GraphView) -> bool:
    """Makes symbolic head and channel sizes numbers, with guards. True when there were any."""
    wanted = {size for size in channel_sizes(normalised) if not isinstance(size, int)}
    wanted = {symbol for size in wanted for symbol in size.free_symbols}
    if not wanted:
        return False
    for node in gm.graph.nodes:
        tensor = node.meta.get("example_value")
        for size in tensor.shape if isinstance(tensor, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr in wanted:
                int(size)
    return True
