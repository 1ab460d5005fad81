"""``fa.scan``: every softmax of a model, taken, exact or not attention, without changing anything."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fastattn_compile.errors import ModelLoadError, OptionError
from fastattn_compile.integrations.hugging_face.plain import plain_attention
from fastattn_compile.operators.registry import make_operator, operator_names
from fastattn_compile.passes.analyse import analyse
from fastattn_compile.passes.choose import symbolic_spec
from fastattn_compile.passes.explain import Step, explain
from fastattn_compile.passes.names import unique_names
from fastattn_compile.passes.site import EXACT, NOT_ATTENTION, TAKEN, Softmax

SCHEMA = "fastattn.scan/1"
_COMPILATIONS = 1 << 16


@dataclass(frozen=True)
class Explanation:
    """How one softmax was read.

    Args:
        softmax: Its line of the scan.
        steps: The part of the graph that was walked, in execution order.
        operators: Name of each operator to its refusal, ``""`` when it can serve the site; empty when it is no site.
    """

    softmax: Softmax
    steps: tuple[Step, ...]
    operators: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The explanation as a JSON document, schema ``fastattn.explanation/1``."""
        return {
            "schema": "fastattn.explanation/1",
            "softmax": _plain(self.softmax),
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "operators": dict(self.operators),
        }

    def print(self) -> None:
        """Prints the steps, the structure and what each operator says."""
        from fastattn_compile.reporting.explained import print_explanation

        print_explanation(self)


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Args:
        softmaxes: One for each softmax of the model, in execution order.
        graphs: Number of graphs the model was captured in; more than one means graph breaks.
    """

    softmaxes: tuple[Softmax, ...]
    graphs: int = 1

    @property
    def counts(self) -> dict[str, int]:
        """Number of softmaxes by status."""
        counted = Counter(line.status for line in self.softmaxes)
        return {status: counted[status] for status in (TAKEN, EXACT, NOT_ATTENTION)}

    def to_json(self) -> dict[str, Any]:
        """The scan as a JSON document, schema ``fastattn.scan/1``."""
        return {
            "schema": SCHEMA,
            "softmaxes": [_plain(line) for line in self.softmaxes],
            "counts": self.counts,
            "graphs": self.graphs,
        }

    def explain(self, name: str) -> Explanation:
        """Shows how one softmax was read.

        Args:
            name: Its name in the table.

        Raises:
            OptionError: No softmax has this name.
        """
        for line in self.softmaxes:
            if line.name == name:
                return Explanation(line, explain(line), _answers(line))
        close = difflib.get_close_matches(name, [line.name for line in self.softmaxes], 3, 0.0)
        raise OptionError(
            f"no softmax is called {name!r}; the nearest names are {', '.join(close) or 'none'}"
        )

    def print(self) -> None:
        """Prints the table."""
        from fastattn_compile.reporting.terminal import print_scan

        print_scan(self)


def _plain(line: Softmax) -> dict[str, Any]:
    fields = (
        "name",
        "status",
        "reason",
        "source",
        "kind",
        "mask",
        "checked",
        "heads",
        "kv_heads",
        "head_dim",
    )
    return {name: getattr(line, name) for name in fields}


def _answers(line: Softmax) -> dict[str, str]:
    """What every operator says to a site, at its defaults."""
    if line.site is None:
        return {}
    spec = symbolic_spec(line.site)
    return {name: make_operator(name).supports(spec).reason for name in operator_names()}


def scan(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Scan:
    """Finds every softmax of a model. The model runs once, on the given arguments, without gradients.

    Args:
        model: A module or a function of tensors.
        *args: Arguments of one call.
        **kwargs: Keyword arguments of the call.

    Returns:
        The scan: ``taken`` where at least one operator can replace the attention, ``exact`` where it must stay, with
        the reason, and ``not_attention`` for any other softmax.

    Raises:
        ModelLoadError: ``model`` cannot be called.
    """
    found: list[list[Softmax]] = []

    def record(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        found.append(
            [judge(line) for analysis in analyse(gm, inputs=example_inputs) for line in analysis.softmaxes]
        )
        return gm.forward

    run_captured(model, record, *args, **kwargs)
    lines = [line for graph in found for line in graph]
    names = unique_names([line.name for line in lines])
    return Scan(tuple(_renamed(line, name) for line, name in zip(lines, names)), max(len(found), 1))


def run_captured(model: Callable[..., Any], backend: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a model once through a backend, without gradients, and leaves everything else as it was.

    Args:
        model: A module or a function of tensors.
        backend: Gets every captured graph, as a ``torch.compile`` backend does.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.

    Raises:
        ModelLoadError: ``model`` cannot be called.
    """
    if not callable(model):
        raise ModelLoadError(f"scan needs a module or a function, got {type(model).__name__}")
    target = getattr(model, "_orig_mod", model)
    with _untouched(target), torch.no_grad(), compiling_always():
        compiled_apart(target, backend)(*args, **kwargs)


def compiled_apart(target: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """A model compiled for fixed sizes, beside what its owner compiles of it.

    Args:
        target: The model.
        backend: Gets every captured graph.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        return target(*arguments, **keywords)

    # Dynamo caches by code object: a new one leaves the caches of the user's own compilations alone.
    isolated = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    # Dynamo remembers by source line which sizes changed between calls; the sites of a call have fixed ones.
    compiled: Callable[..., Any] = torch.compile(isolated, backend=backend, dynamic=False)
    return compiled


@contextmanager
def compiling_always() -> Iterator[None]:
    """Inside, Dynamo compiles a function for every new size.

    Left alone it stops after eight and runs the function as it is, and its attention is neither seen nor replaced. What
    follows a graph break counts over all compilations of a process, and what Dynamo has given up it gives up for all.
    """
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    from torch._dynamo import config
    from torch._dynamo.convert_frame import input_codes

    # A function that was given up in a compilation of its owner is tried again, and given up again at its next call there.
    always = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT)
    for code in filter(None, (seen() for seen in input_codes.seen)):
        set_code_exec_strategy(code, always)
    with config.patch(
        recompile_limit=_COMPILATIONS, accumulated_recompile_limit=_COMPILATIONS,
        fail_on_recompile_limit_hit=True,
    ):  # fmt: skip
        yield


def judge(line: Softmax) -> Softmax:
    """Turns ``taken`` into ``exact`` where no operator but exact attention can serve the site."""
    if line.status != TAKEN or line.site is None:
        return line
    spec = symbolic_spec(line.site)
    reason = ""
    for name in operator_names():
        if name == "exact":
            continue
        support = make_operator(name).supports(spec)
        if support:
            return line
        reason = reason or support.reason
    return dataclasses.replace(line, status=EXACT, reason=reason)


def _renamed(line: Softmax, name: str) -> Softmax:
    return line if line.name == name else dataclasses.replace(line, name=name)


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Puts buffers (running statistics, caches) and the random state back as they were."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, torch.nn.Module) else []
    with torch.random.fork_rng(), plain_attention(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
