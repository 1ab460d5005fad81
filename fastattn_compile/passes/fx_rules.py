"""What calls mean: from a canonical call to a kind of the view, one small function for a family of calls.

A rule gets a ``Call`` and the shape and type of its result and returns a ``Meaning``, or ``None`` for what
the view's vocabulary cannot say. Operands inside a meaning may be meanings themselves; they become nodes of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fastattn_compile.passes.fx_vocabulary import Call
from fastattn_compile.passes.graph import Node, Size

Shape = tuple[Size, ...] | None


@dataclass(frozen=True)
class Meaning:
    """A node of the view before it is one.

    Args:
        kind: A word of ``graph.KINDS``.
        inputs: Operands: nodes, numbers, ``None``, or meanings that become nodes of their own.
        attributes: As in ``graph.KINDS``.
        shape: Given for an operand inside a meaning; the node's own shape is known from the graph.
        dtype: Likewise.
    """

    kind: str
    inputs: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    shape: Shape = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Result:
    """What is known of the result of a call.

    Args:
        shape: Its sizes.
        dtype: Its type.
    """

    shape: Shape
    dtype: torch.dtype | None


Rule = Callable[[Call, Result], "Meaning | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some canonical names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def is_number(value: Any) -> bool:
    """Whether an operand is a scalar: a number or a symbolic one."""
    return isinstance(value, (int, float, complex, sympy.Basic))


def rank(node: Any) -> int | None:
    """Number of dimensions of a node, ``None`` when unknown."""
    return len(node.shape) if isinstance(node, Node) and node.shape is not None else None


def dimension(dim: Any, of: int | None) -> int | None:
    """A dimension counted from the front, ``None`` when it or the rank is unknown."""
    if not isinstance(dim, int) or of is None:
        return None
    return dim + of if dim < 0 else dim


def scalar(value: Any) -> Any:
    """The number a 0-d tensor of a known value stands for; anything else as it is."""
    if isinstance(value, Node) and value.kind == "full" and value.shape == () and not value.tainted:
        return value.attributes["value"]
    return value


def is_boolean(value: Any) -> bool:
    """Whether an operand is a boolean tensor or a boolean."""
    return isinstance(value, bool) or (isinstance(value, Node) and value.dtype == torch.bool)
