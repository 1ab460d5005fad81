"""From a formula back to a tensor, by torch calls through callbacks that write graph nodes or compute.

Nothing of the size of the scores is made: a formula of batch and key becomes a ``(batch, key)`` tensor. An
element read at its own place is the tensor itself or a slice of it; only a computed index costs a gather.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor

from fastattn_compile.passes.expression import (
    Binary,
    Compare,
    Constant,
    Expression,
    Linear,
    Load,
    Logic,
    Not,
    Unary,
    Where,
    axes_of,
)
from fastattn_compile.passes.formula import Axis, places_of
from fastattn_compile.passes.graph import Node, Size, same_size

Handle = Any
Call = Callable[..., Handle]

_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "le": operator.le, "lt": operator.lt, "eq": operator.eq, "ne": operator.ne, "add": operator.add,
    "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "floordiv": operator.floordiv,
    "mod": operator.mod, "pow": operator.pow, "and": operator.and_, "or": operator.or_, "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log, "sqrt": torch.sqrt, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


def emit(
    expression: Expression,
    axes: Sequence[str],
    sizes: Sequence[Handle],
    device: torch.device,
    call: Call,
    load: Callable[[Node], Handle],
) -> Handle:
    """Builds the tensor of a formula.

    Args:
        expression: The formula; it varies over ``axes`` only.
        axes: Names of the axes, one for each dimension of the result.
        sizes: Their sizes, numbers or handles of numbers.
        device: Where index tensors are made.
        call: ``call(function, args, kwargs)`` gives the handle of the result, as
            ``torch.fx.Graph.call_function``.
        load: The handle of a tensor of the graph.

    Returns:
        The handle of a tensor of shape ``sizes``, boolean for a truth value. It may be an expanded view.

    Raises:
        ValueError: The formula varies over another axis, holds an unknown value, or a size that no axis has.
    """
    strange = axes_of(expression) - set(axes)
    if strange:
        raise ValueError(f"the formula varies over {sorted(strange)}, the tensor only over {list(axes)}")
    known = {place.extent: sizes[list(axes).index(place.name)] for place in places_of(expression)}
    writer = _Writer(call, load, _Places(axes, sizes, device, call, known))
    handle = writer.write(expression)
    if not writer.is_tensor(expression):
        return call(torch.full, (list(sizes), handle), {"device": device})
    if axes_of(expression) == set(axes):
        return handle
    return call(torch.broadcast_to, (handle, list(sizes)), {})


def emit_fx(
    graph: torch.fx.Graph, expression: Expression, axes: Sequence[str], sizes: Sequence[Handle], device: str
) -> torch.fx.Node:
    """``emit`` at the insertion point of an FX graph, where tensors of the view are the nodes they stand for.

    Args:
        graph: The graph.
        expression: As for ``emit``.
        axes: As for ``emit``.
        sizes: As for ``emit``.
        device: Type of the device.
    """
    written: torch.fx.Node = emit(
        expression, axes, sizes, torch.device(device), graph.call_function, lambda node: node.origin
    )
    return written


def evaluate(
    expression: Expression,
    grids: Mapping[str, Tensor],
    loads: Mapping[Node, Tensor],
    symbols: Mapping[Any, int] | None = None,
) -> Tensor:
    """Computes a formula on real tensors.

    Args:
        expression: The formula.
        grids: For each axis an integer tensor of indices; they broadcast against each other.
        loads: Value of each tensor the formula reads.
        symbols: Values of symbolic sizes.

    Returns:
        A tensor that broadcasts against the grids.
    """
    writer = _Writer(
        lambda f, args, kwargs: f(*args, **kwargs), loads.__getitem__, _Grids(grids, symbols or {})
    )
    return torch.as_tensor(writer.write(expression))


class _Grids:
    """Index tensors that are given."""

    def __init__(self, grids: Mapping[str, Tensor], symbols: Mapping[Any, int]) -> None:
        self.grids, self.symbols = grids, symbols

    def index(self, axis: Axis) -> Handle:
        return self.grids[axis.name]

    def size(self, value: sympy.Expr) -> Handle:
        return int(value.subs(dict(self.symbols)))

    def direct(self, expression: Load, handle: Handle) -> Handle | None:
        return None


class _Places:
    """Index tensors that are made: ``arange`` along one dimension of the result."""

    def __init__(
        self,
        axes: Sequence[str],
        sizes: Sequence[Handle],
        device: torch.device,
        call: Call,
        extents: Mapping[Size | None, Handle],
    ) -> None:
        self.axes, self.sizes, self.device, self.call = list(axes), list(sizes), device, call
        self.extents = extents
        self.made: dict[str, Handle] = {}

    def index(self, axis: Axis) -> Handle:
        """The indices along an axis, shaped to broadcast against the result."""
        if axis.name not in self.made:
            position = self.axes.index(axis.name)
            line = self.call(torch.arange, (self.sizes[position],), {"device": self.device})
            if len(self.axes) > 1:
                shaped = tuple(slice(None) if i == position else None for i in range(len(self.axes)))
                line = self.call(operator.getitem, (line, shaped), {})
            self.made[axis.name] = line
        return self.made[axis.name]

    def size(self, value: sympy.Expr) -> Handle:
        """A symbolic size, from the axes that have it."""
        if value in self.extents:
            return self.extents[value]
        if value.is_Integer:
            return int(value)
        if isinstance(value, (sympy.Add, sympy.Mul)):
            parts = [self.size(part) for part in value.args]
            function = operator.add if isinstance(value, sympy.Add) else operator.mul
            return reduce(lambda a, b: self.call(function, (a, b), {}), parts)
        raise ValueError(f"the size {value} is not the size of an axis of the tensor")

    def direct(self, expression: Load, handle: Handle) -> Handle | None:
        """The tensor itself, or a slice of it, when each of its indices is a number or one axis."""
        shape = expression.node.shape
        met: list[int] = []
        subscript: list[Any] = []
        for dim, index in enumerate(expression.indices):
            if isinstance(index, Constant):
                subscript.append(index.value)
                continue
            part = self._slice(index, None if shape is None else shape[dim])
            if part is None:
                return None
            position = self.axes.index(index.terms[0][0].name)  # type: ignore[attr-defined]
            # A new dimension of size 1 for each axis the tensor does not vary over.
            subscript.extend([None] * (position - (met[-1] if met else -1) - 1))
            subscript.append(part)
            met.append(position)
        if met != sorted(set(met)) or not met or any(isinstance(s, sympy.Expr) for s in subscript):
            return None
        subscript.extend([None] * (len(self.axes) - 1 - met[-1]))
        if all(part == slice(None) for part in subscript):
            return handle
        return self.call(operator.getitem, (handle, tuple(subscript)), {})

    def _slice(self, index: Expression, size: Size | None) -> slice | None:
        """``slice`` of a dimension of this size that is read at one axis plus an offset."""
        if not isinstance(index, Linear) or len(index.terms) != 1 or index.terms[0][1] != 1:
            return None
        axis, start = index.terms[0][0], index.offset
        if size is not None and axis.extent is not None and start == 0 and same_size(size, axis.extent):
            return slice(None)
        length = self.sizes[self.axes.index(axis.name)]
        if not isinstance(start, int) or start < 0 or (start and not isinstance(length, int)):
            return None
        return slice(start or None, start + length if start else length)


class _Writer:
    """Writes formulas, each part once."""

    def __init__(self, call: Call, load: Callable[[Node], Handle], places: _Grids | _Places) -> None:
        self.call, self.load, self.places = call, load, places
        self.written: dict[Expression, Handle] = {}

    @staticmethod
    def is_tensor(expression: Expression) -> bool:
        """Whether a formula is written as a tensor; otherwise it is a number."""
        return not isinstance(expression, Constant)

    def write(self, e: Expression) -> Handle:
        """The handle of a formula."""
        if e not in self.written:
            self.written[e] = self._write(e)
        return self.written[e]

    def _apply(self, op: str, *operands: Handle) -> Handle:
        return self.call(_OPERATORS[op], operands, {})

    def _write(self, e: Expression) -> Handle:
        if isinstance(e, Constant):
            return self.places.size(e.value) if isinstance(e.value, sympy.Expr) else e.value
        if isinstance(e, Linear):
            return self._linear(e)
        if isinstance(e, Compare):
            return self._compare(e)
        if isinstance(e, Logic):
            handle = self.write(e.terms[0])
            for term in e.terms[1:]:
                handle = self._apply(e.op, handle, self.write(term))
            return handle
        if isinstance(e, Not):
            if isinstance(e.x, Compare) and e.x.op == "eq" and self.is_tensor(e.x.a):
                return self._apply("ne", self.write(e.x.a), self.write(e.x.b))
            return self.call(torch.logical_not, (self.write(e.x),), {})
        if isinstance(e, Where):
            return self.call(torch.where, tuple(self.write(x) for x in (e.condition, e.a, e.b)), {})
        if isinstance(e, Binary):
            return self._binary(e)
        if isinstance(e, Unary):
            x = self.write(e.x)
            return (
                self.call(torch.Tensor.to, (x, torch.int64), {}) if e.op == "trunc" else self._apply(e.op, x)
            )
        if isinstance(e, Load):
            return self._load(e)
        raise ValueError(f"a formula with an unknown value cannot be written: {e}")

    def _linear(self, e: Linear) -> Handle:
        total: Handle = None
        for axis, coefficient in e.terms:
            part = self.places.index(axis)
            if coefficient != 1:
                part = self._apply("mul", part, coefficient)
            total = part if total is None else self._apply("add", total, part)
        if e.offset == 0:
            return total
        offset = self.places.size(e.offset) if isinstance(e.offset, sympy.Expr) else e.offset
        return self._apply("add", total, offset)

    def _compare(self, e: Compare) -> Handle:
        a, b = self.write(e.a), self.write(e.b)
        if not self.is_tensor(e.a) and not self.is_tensor(e.b):
            a = self.call(torch.full, ((), a), {})
        return self._apply(e.op, a, b)

    def _binary(self, e: Binary) -> Handle:
        a, b = self.write(e.a), self.write(e.b)
        if e.op not in ("minimum", "maximum"):
            return self._apply(e.op, a, b)
        if self.is_tensor(e.a) and self.is_tensor(e.b):
            return self.call(getattr(torch, e.op), (a, b), {})
        x, bound = (a, b) if self.is_tensor(e.a) else (b, a)
        return self.call(torch.clamp, (x,), {"max" if e.op == "minimum" else "min": bound})

    def _load(self, e: Load) -> Handle:
        handle = self.load(e.node)
        if (direct := self.places.direct(e, handle)) is not None:
            return direct
        indices = tuple(self.write(index) for index in e.indices)
        return self.call(operator.getitem, (handle, indices), {}) if indices else handle
