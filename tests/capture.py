"""Graphs for tests: those Dynamo makes of real code, and graphs of a single call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastattn_compile.passes.fx_meta import fake_call


def capture(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any
) -> list[tuple[torch.fx.GraphModule, list[Any]]]:
    """Runs a function or module under torch.compile and returns the graphs Dynamo made of it, with their
    inputs.

    Args:
        fn: A function or module.
        *args: Its arguments.
        dynamic: As for ``torch.compile``.
        **kwargs: Its keyword arguments.
    """
    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def record(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # Symbolic sizes stand for the sizes of this run.
        sizes = (torch.SymInt, torch.SymFloat)
        graphs.append((gm, [x.node.hint if isinstance(x, sizes) else x for x in example_inputs]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=record, dynamic=dynamic)(*args, **kwargs)
    return graphs


def single_call(target: Any, *args: Any, **kwargs: Any) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """The graph of one call, as Dynamo would write it, and its inputs.

    Args:
        target: A function, or the name of a method of the first argument.
        *args: Arguments. Each tensor becomes an input, the same tensor the same input; a parameter is known
            as one.
        **kwargs: Likewise.

    Returns:
        A graph that returns what the call does, elements of a tuple one by one.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = torch.fx.Graph()
    inputs: dict[torch.Tensor, torch.fx.Node] = {}

    def operand(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value not in inputs:
                node = graph.placeholder(f"x{len(inputs)}")
                node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
                inputs[value] = node
            return inputs[value]
        if isinstance(value, (list, tuple)):
            return type(value)(operand(item) for item in value)
        return value

    arguments = tuple(operand(x) for x in args)
    named = {key: operand(value) for key, value in kwargs.items()}
    create = graph.call_method if isinstance(target, str) else graph.call_function
    call = create(target, arguments, named)
    result = call.meta["example_value"] = fake_call(target, arguments, named, mode)
    outputs: Any = (call,)
    if isinstance(result, (tuple, list)):
        outputs = []
        for position, element in enumerate(result):
            if element is not None:
                outputs.append(graph.call_function(operator.getitem, (call, position)))
                outputs[-1].meta["example_value"] = element
    graph.output(tuple(outputs))
    return torch.fx.GraphModule(torch.nn.Module(), graph), list(inputs)
