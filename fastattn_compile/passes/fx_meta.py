"""Fake values of FX nodes: reading them, and computing those of new nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn_compile.passes.graph import Node, as_size, same_size


def example(node: torch.fx.Node) -> Any:
    """The fake value of a node: a tensor, a symbolic number, or a tuple of them; ``None`` when unknown."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def value_of(node: Node) -> Any:
    """The fake value of what a node of the view stands for; ``None`` where it stands for none of FX."""
    return example(node.origin) if isinstance(node.origin, torch.fx.Node) else None


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def fake_mode(nodes: Iterable[torch.fx.Node]) -> FakeTensorMode | None:
    """The fake mode of the first of some nodes that has a fake tensor."""
    for node in nodes:
        for tensor in tensors(example(node)):
            mode = getattr(tensor, "fake_mode", None)
            if isinstance(mode, FakeTensorMode):
                return mode
    return None


def fake_call(call: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Result of a call on the fake values of its operands.

    Args:
        call: A function, or the name of a method of the first argument.
        args: Arguments; nodes stand for their fake values.
        kwargs: Likewise.
        mode: Fake mode of the operands.
    """
    args, kwargs = torch.fx.map_arg((args, kwargs), example)
    with mode:
        return getattr(args[0], call)(*args[1:], **kwargs) if isinstance(call, str) else call(*args, **kwargs)


def propagate(nodes: Iterable[torch.fx.Node], like: torch.fx.Node, mode: FakeTensorMode) -> None:
    """Gives new nodes the fake values and the origin of the node they replace.

    Args:
        nodes: ``call_function`` and ``call_method`` nodes in execution order; operands have values.
        like: The node they stand for: its module and source line become theirs.
        mode: Fake mode of the operands.
    """
    key = "example_value" if "example_value" in like.meta else "val"
    origin: dict[str, Any] = dict(like.meta)
    for own in ("example_value", "val", "tensor_meta"):
        origin.pop(own, None)
    for node in nodes:
        node.meta = {**origin, key: fake_call(node.target, node.args, node.kwargs, mode)}


def surely_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever their symbols stand for. Installs no guard."""
    return same_size(as_size(a), as_size(b))


def same_sizes(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """``surely_equal`` for whole shapes or strides."""
    first, second = list(a), list(b)
    return len(first) == len(second) and all(surely_equal(x, y) for x, y in zip(first, second))
