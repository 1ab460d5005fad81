"""A model run again and again with other operators at its sites, compiled once, from the first changed site on.

The captured graphs call a Python function at every site, which looks up what serves it: nothing is compiled again
between two choices. Where a batch takes one graph, a pass can keep what is alive at each site; a later pass that differs
from it only from some site on starts there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from fastattn_compile.errors import (
    FastAttentionError,
    ModelLoadError,
    NumericError,
    OptionError,
    UnsupportedSiteError,
)
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.analyse import analyse
from fastattn_compile.passes.learned import take_parameters
from fastattn_compile.passes.rewrite import Replacement, rewrite
from fastattn_compile.retrofitting.objectives import split_batch
from fastattn_compile.scanning import compiled_apart, compiling_always

Parameters = tuple[Tensor, ...]
Take = Callable[[str, AttentionInputs, Tensor], None]


@dataclass(frozen=True, eq=False)
class Server:
    """What serves a site in a pass. Two passes are the same up to a site when the same objects serve what is before it.

    Args:
        operator: The operator.
        parameters: Its learned parameters, in order.
    """

    operator: Operator
    parameters: Parameters = ()


Serving = Mapping[str, Server]


@dataclass(eq=False)
class Kept:
    """What is alive at sites of one pass.

    Args:
        serving: What served the sites of that pass.
        batch: Which batch it was.
        graph: The graph that ran; batches of other sizes have others.
        alive: Position of a site among the graph's to the values that it and what follows read.
    """

    serving: dict[str, Server]
    batch: int
    graph: _Graph
    alive: dict[int, dict[torch.fx.Node, Any]] = field(default_factory=dict)


class Replay:
    """A model that is called with a choice of operators.

    Sites that the choice does not name run exact attention. The model is run as it is, in evaluation mode and without
    gradients; its parameters are read at every call.

    Args:
        model: The model; a compiled one is unwrapped.
        memory: Bytes that kept passes may take altogether; fewer sites are kept when they would take more.

    Raises:
        ModelLoadError: The model has no data (meta device), or parameters on different devices.
    """

    def __init__(self, model: nn.Module, memory: int = 2 << 30) -> None:
        self.model = getattr(model, "_orig_mod", model)
        refuse_scattered(self.model)
        self.memory = memory
        self.specs: dict[str, SiteSpec] = {}
        self._graphs: list[_Graph] = []
        self._kept: list[Kept] = []
        self._pass: _Pass | None = None
        self._call: Any = compiled_apart(self.model, self._backend)

    def run(
        self, batch: Any, serving: Serving | None = None, *, index: int = 0, keep: bool = False,
        take: Take | None = None,
    ) -> Any:  # fmt: skip
        """The model's result on a batch.

        Args:
            batch: Keywords, a tuple of arguments, or a tensor.
            serving: What serves which site.
            index: A number that belongs to the batch: kept passes serve passes of the same number.
            keep: Keep what is alive at the sites.
            take: Shown each site's name, tensors and output, in execution order. The pass then runs from the start.

        Raises:
            NumericError: The output of a replaced site holds NaN or Inf; the text names the site.
            OptionError: The model does not take such a batch.
        """
        from torch._dynamo.exc import BackendCompilerFailed

        arguments, keywords, _ = split_batch(batch)
        self._pass = now = _Pass(dict(serving or {}), index, keep, take)
        try:
            with torch.no_grad(), compiling_always():
                result = self._call(*arguments, **keywords)
            if len(now.graphs) > 1:
                # What a later graph is given may depend on more than its sites.
                self._kept = [k for k in self._kept if k not in now.records]
            return result
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, FastAttentionError):
                raise error.inner_exception from error
            raise
        except TypeError as error:
            self._refuse_misfit(arguments, keywords, error)
            raise
        finally:
            self._pass = None

    def _refuse_misfit(self, arguments: tuple[Any, ...], keywords: dict[str, Any], error: TypeError) -> None:
        signature = inspect.signature(self.model.forward)
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as misfit:
            raise OptionError(
                f"a batch does not fit {type(self.model).__name__}.forward({', '.join(signature.parameters)}): {misfit}. "
                "A mapping is given as "
                "keywords, a tuple as arguments; a batch that is one argument itself goes as (batch,)"
            ) from error

    def forget(self, serving: Serving | None = None) -> None:
        """Drops kept passes: those of a choice, or all."""
        self._kept = [k for k in self._kept if serving is not None and k.serving != dict(serving)]

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept passes; what several of them share counts once."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for kept in self._kept
            for alive in kept.alive.values()
            for value in alive.values()
            if isinstance(value, Tensor)
        }
        return sum(storages.values())

    @contextmanager
    def closed(self) -> Iterator[Replay]:
        """The replay inside the block; what it holds is dropped after it."""
        try:
            yield self
        finally:
            self.forget()
            self._graphs.clear()

    def _backend(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        exact = make_operator("exact")
        analyses = analyse(gm)
        for analysis in analyses:
            take_parameters(analysis.gm)
            found = [
                line.site for line in analysis.softmaxes if line.site is not None and line.status == "taken"
            ]
            found = [site for site in found if exact.supports(site.spec)]
            rewrite(analysis.gm, [Replacement(site, exact) for site in found])
            for site in found:
                self.specs.setdefault(site.name, site.spec)
            for node in analysis.gm.graph.nodes:
                if node.op == "call_function" and node.target is torch_op("exact"):
                    node.target = self._serve
            analysis.gm.recompile()
        graph = _Graph(self, gm)
        self._graphs.append(graph)
        return graph

    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None,
        bias: Tensor | None, parameters: list[Tensor], scale: float, mask: str, config: str, site: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        now = self._pass
        server = now.serving.get(site) if now is not None else None
        operator = server.operator if server is not None else make_operator("exact")
        given = list(server.parameters) if server is not None else []
        result: tuple[Tensor, Tensor] = torch_op(operator.name)(
            query, key, value, key_padding, segments, bias, given, scale, mask, operator.token, site
        )
        if server is not None and not bool(torch.isfinite(result[0]).all()):
            raise NumericError(f"NaN or Inf in the output of site {site} served by {operator}")
        if now is not None and now.take is not None:
            structure = MaskStructure.parse(mask)
            inputs = AttentionInputs(query, key, value, scale, structure, key_padding, segments, bias)
            now.take(site, inputs, result[0])
        return result

    def run_graph(self, graph: _Graph, inputs: Sequence[Any]) -> Any:
        """Runs a captured graph under the present pass, from where it differs from a kept one."""
        now = self._pass
        if now is None:
            return graph.run(inputs, 0, {}, None)
        resumable = graph.resumable and not now.graphs
        now.graphs.append(graph)
        start: int = 0
        alive: dict[torch.fx.Node, Any] = {}
        if resumable and now.take is None and not now.keep:
            start, alive = self._best_start(graph, now)
        record = Kept(now.serving, now.batch, graph) if resumable and now.keep else None
        result = graph.run(inputs, start, alive, record)
        if record is not None:
            now.records.append(record)
            self._kept.append(record)
            self._thin()
        return result

    def _best_start(self, graph: _Graph, now: _Pass) -> tuple[int, dict[torch.fx.Node, Any]]:
        best: tuple[int, dict[torch.fx.Node, Any]] = (0, {})
        for kept in self._kept:
            if kept.batch != now.batch or kept.graph is not graph:
                continue
            for position, alive in kept.alive.items():
                before = graph.sites[:position]
                same = all(kept.serving.get(name) is now.serving.get(name) for name in before)
                if same and graph.cuts[position] > best[0]:
                    best = graph.cuts[position], alive
        return best

    def _thin(self) -> None:
        """Forgets every other site of the kept passes until they fit into memory."""
        while self.kept_bytes > self.memory and any(len(k.alive) > 1 for k in self._kept):
            for kept in self._kept:
                for position in sorted(kept.alive)[1::2]:
                    del kept.alive[position]
        if self.kept_bytes > self.memory:
            for kept in self._kept:
                kept.alive.clear()


@dataclass(frozen=True)
class _Pass:
    serving: dict[str, Server]
    batch: int
    keep: bool
    take: Take | None
    graphs: list[_Graph] = field(default_factory=list)
    records: list[Kept] = field(default_factory=list)


class _Graph:
    """A captured graph, run node by node so that it can start in the middle."""

    def __init__(self, owner: Replay, gm: torch.fx.GraphModule) -> None:
        self.owner, self.gm = owner, gm
        self.nodes = list(gm.graph.nodes)
        place = {node: i for i, node in enumerate(self.nodes)}
        serve = owner._serve
        self.cuts = [i for i, n in enumerate(self.nodes) if n.op == "call_function" and n.target == serve]
        self.sites = [str(self.nodes[i].args[10]) for i in self.cuts]
        self.last = {node: max([place[node], *(place[user] for user in node.users)]) for node in self.nodes}
        # An operation that changes a tensor in place would change what was kept too; sites inside the bodies of
        # higher-order operators cannot be told apart from here.
        inside = any(
            n.op == "call_function" and n.target == serve
            for _, m in gm.named_modules()
            if m is not gm and isinstance(m, torch.fx.GraphModule)
            for n in m.graph.nodes
        )
        self.resumable = bool(self.cuts) and not inside and not any(_in_place(n) for n in self.nodes)

    def __call__(self, *inputs: Any) -> Any:
        return self.owner.run_graph(self, inputs)

    def run(
        self, inputs: Sequence[Any], start: int, alive: Mapping[torch.fx.Node, Any], record: Kept | None
    ) -> Any:
        given = iter(inputs)
        values: dict[torch.fx.Node, Any] = {
            node: next(given) for node in self.nodes if node.op == "placeholder"
        }
        values.update(alive)
        positions = {cut: position for position, cut in enumerate(self.cuts)}

        def load(argument: Any) -> Any:
            return torch.fx.map_arg(argument, values.__getitem__)

        for index, node in enumerate(self.nodes):
            if index < start and node.op != "get_attr":
                continue
            if record is not None and index in positions:
                kept = {
                    n: v
                    for n, v in values.items()
                    if n.op not in ("placeholder", "get_attr") and self.last[n] >= index
                }
                record.alive[positions[index]] = kept
            if node.op == "output":
                return load(node.args[0])
            if node.op == "get_attr":
                values[node] = _attribute(self.gm, str(node.target))
            elif node.op == "call_function":
                target: Any = node.target
                values[node] = target(*load(node.args), **load(node.kwargs))
            elif node.op == "call_method":
                owner, *rest = load(node.args)
                values[node] = getattr(owner, str(node.target))(*rest, **load(node.kwargs))
            elif node.op == "call_module":
                values[node] = self.gm.get_submodule(str(node.target))(*load(node.args), **load(node.kwargs))
            for source in (*node.all_input_nodes, node):
                if self.last[source] <= index:
                    values.pop(source, None)
        raise UnsupportedSiteError("the captured graph has no output")


def _attribute(owner: Any, path: str) -> Any:
    for step in path.split("."):
        owner = getattr(owner, step)
    return owner


def _in_place(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    return name in ("setitem", "iadd", "isub", "imul", "itruediv") or bool(schema and schema.is_mutable) or (
        name.endswith("_") and not name.endswith("__")
    ) or node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True  # fmt: skip


def refuse_scattered(model: nn.Module) -> None:
    """Refuses a model that cannot run as it is.

    Raises:
        ModelLoadError: A parameter has no data, or parameters are on different devices.
    """
    devices: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        devices.setdefault(str(tensor.device), name)
    if "meta" in devices:
        raise ModelLoadError(
            f"{devices['meta']} is on the meta device and has no data: load the weights before planning or fitting"
        )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ModelLoadError(f"the model is spread over devices ({found}): move it to one of them")
