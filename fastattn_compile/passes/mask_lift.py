"""From a tensor of the graph to the formula of its element, as far as that can be known for certain.

A node that computes something else than index arithmetic is a leaf: its element is simply read. A node whose
storage may be changed in place is an unknown. Narrow types are watched: where a type cannot hold the integers
of a formula exactly, the rounded tensor is read instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch

from fastattn_compile.passes import lift_layout  # noqa: F401  registers its rules
from fastattn_compile.passes.expression import (
    Constant,
    Expression,
    Load,
    bounds,
    constant,
    nonnegative,
    substitute,
)
from fastattn_compile.passes.formula import Unknown, larger_than
from fastattn_compile.passes.graph import GraphView, Node, as_size, dependencies
from fastattn_compile.passes.lift_values import RULES, NotIndexArithmetic, dim

# A formula with more parts than this is not kept: the tensor is read.
_LIMIT = 256

# The largest integer up to which a type holds every integer. float32 holds 2**24: positions are taken to fit.
_EXACT: Mapping[torch.dtype, int] = {
    torch.float16: 1 << 11, torch.bfloat16: 1 << 8, torch.int8: 127, torch.uint8: 255, torch.int16: 32767,
}  # fmt: skip


class Lifter:
    """Lifts nodes of one graph, each once.

    Args:
        view: The graph.
    """

    def __init__(self, view: GraphView) -> None:
        self.order = view.order
        self.cache: dict[Any, Any] = {}  # of what is derived from the formulas
        self.held: dict[Node, Expression] = {}  # tensors whose values are formulas
        self._lifted: dict[Node, Expression] = {}

    def lift(self, node: Node) -> Expression:
        """The element of ``node`` as a formula of its own indices ``d0``, ``d1``, ...

        A dimension of size 1 has the index 0. What is no index arithmetic is read (``Load``); what cannot be
        believed is ``Unknown``.
        """
        work = [node]
        while work:
            current = work[-1]
            missing = (
                [x for x in dependencies(current) if x not in self._lifted] if _descends(current) else []
            )
            if missing and current not in self._lifted:
                work.extend(missing)
                continue
            work.pop()
            if current not in self._lifted:
                self._lifted[current] = self._lift(current)
        return self._lifted[node]

    def _lift(self, node: Node) -> Expression:
        if node.tainted:
            return Unknown(node, "changed in place")
        try:
            lifted = RULES[node.kind](self, node) if node.kind in RULES else None
        except NotIndexArithmetic:
            lifted = None
        if lifted is None or larger_than(lifted, _LIMIT) or not _exact(lifted, node.dtype):
            if node.shape is None:
                return Unknown(node, "of unknown shape")
            return Load(node, tuple(dim(i, size) for i, size in enumerate(node.shape)))
        return lifted

    def held_behind(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The tensors whose values are part of the formulas of some nodes."""
        seen = dict.fromkeys(nodes)
        work = list(seen)
        while work:
            node = work.pop()
            new = [x for x in dependencies(node) if x not in seen] if _descends(node) else []
            seen.update(dict.fromkeys(new))
            work.extend(new)
        return tuple(node for node in seen if node in self.held)

    # What rules ask for. Operands are lifted before a rule runs.

    def of(self, node: Node) -> Expression:
        """The formula of an operand in its own indices."""
        return self._lifted[node]

    def scalar(self, value: Any) -> Expression:
        """The formula of a number, symbolic or held by a node.

        Raises:
            NotIndexArithmetic: It is neither.
        """
        if isinstance(value, (bool, int, float)):
            return constant(value)
        if isinstance(value, torch.SymInt):
            return constant(as_size(value))
        if isinstance(value, sympy.Expr):
            return constant(float(value) if value.is_Float else value)
        if isinstance(value, Node):
            lifted = self.of(value)
            if value.shape == () or isinstance(lifted, Constant):
                return lifted
        raise NotIndexArithmetic

    def operand(self, node: Node, position: int) -> Expression:
        """The formula of an operand in the indices of the elementwise node, aligned at the last dimension.

        Raises:
            NotIndexArithmetic: The operand is neither a number nor a tensor of known shape.
        """
        value = node.inputs[position]
        if not isinstance(value, Node) or not value.shape:
            return self.scalar(value)
        if node.shape is None:
            raise NotIndexArithmetic
        offset = len(node.shape) - len(value.shape)
        places = {f"d{i}": dim(i + offset, node.shape[i + offset]) for i in range(len(value.shape))}
        return substitute(self.of(value), places)


_lifters: WeakKeyDictionary[GraphView, Lifter] = WeakKeyDictionary()


def lifter_of(view: GraphView) -> Lifter:
    """The lifter of a graph, made once for each view."""
    if view not in _lifters:
        _lifters[view] = Lifter(view)
    return _lifters[view]


def _descends(node: Node) -> bool:
    return node.kind in RULES and not node.tainted


def _exact(lifted: Expression, dtype: torch.dtype | None) -> bool:
    """Whether a type holds the integers of a formula. Reals are rounded by every type and count as given."""
    most = _EXACT.get(dtype) if dtype is not None else None
    if most is None or lifted.domain != "int" or (isinstance(lifted, Load) and lifted.node.dtype == dtype):
        return True
    low, high = bounds(lifted)
    least = 0 if dtype == torch.uint8 else -most
    return low is not None and high is not None and nonnegative(low - least) and nonnegative(most - high)
