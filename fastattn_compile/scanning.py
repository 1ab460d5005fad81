"""``fa.scan``: every softmax of a model, taken, exact or not attention, without changing anything."""

from __future__ import annotations

import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fastattn_compile.errors import ModelLoadError
from fastattn_compile.integrations.hugging_face.plain import plain_attention
from fastattn_compile.operators.registry import make_operator, operator_names
from fastattn_compile.passes.analyse import analyse
from fastattn_compile.passes.choose import symbolic_spec
from fastattn_compile.passes.names import unique_names
from fastattn_compile.passes.site import EXACT, NOT_ATTENTION, TAKEN, Softmax

SCHEMA = "fastattn.scan/1"


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
        fields = ("name", "status", "reason", "source", "kind", "mask", "heads", "kv_heads", "head_dim")
        return {
            "schema": SCHEMA,
            "softmaxes": [{name: getattr(line, name) for name in fields} for line in self.softmaxes],
            "counts": self.counts,
            "graphs": self.graphs,
        }

    def print(self) -> None:
        """Prints the table."""
        from fastattn_compile.reporting.terminal import print_scan

        print_scan(self)


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
        found.append([judge(line) for analysis in analyse(gm) for line in analysis.softmaxes])
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

    def call(*arguments: Any, **keywords: Any) -> Any:
        return target(*arguments, **keywords)

    # Dynamo caches by code object: a new one leaves the caches of the user's own compilations alone.
    isolated = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    with _untouched(target), torch.no_grad():
        # Dynamo remembers by source line which sizes changed between calls; the sites of this call have fixed ones.
        torch.compile(isolated, backend=backend, dynamic=False)(*args, **kwargs)


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
