"""Small graphs by hand: nodes of the view that carry the tensor they stand for, and masks of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.passes.expression import Expression, axis
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.mask_lift import Lifter
from fastattn_compile.passes.mask_structure import AXES, MaskAnalysis, MaskTerm, recognise, verify

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "maximum": torch.maximum, "minimum": torch.minimum,
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt, "eq": operator.eq,
    "ne": operator.ne, "and": torch.logical_and, "or": torch.logical_or, "pow": operator.pow,
    "not": torch.logical_not, "abs": torch.abs, "neg": operator.neg, "log": torch.log, "exp": torch.exp,
    "sqrt": torch.sqrt, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "where": torch.where, "tril": torch.tril, "triu": torch.triu, "cumsum": torch.cumsum,
}  # fmt: skip


@dataclass(eq=False)
class Drawn:
    """A node and its value, with the arithmetic of tensors."""

    graph: Graph
    node: Node
    value: Tensor

    def _make(self, kind: str, *others: Any) -> Drawn:
        return self.graph.call(kind, self, *others)

    def __add__(self, other: Any) -> Drawn:
        return self._make("add", other)

    def __sub__(self, other: Any) -> Drawn:
        return self._make("sub", other)

    def __rsub__(self, other: Any) -> Drawn:
        return self.graph.call("sub", other, self)

    def __mul__(self, other: Any) -> Drawn:
        return self._make("mul", other)

    def __truediv__(self, other: Any) -> Drawn:
        return self._make("div", other)

    def __floordiv__(self, other: Any) -> Drawn:
        return self._make("floordiv", other)

    def __mod__(self, other: Any) -> Drawn:
        return self._make("mod", other)

    def __pow__(self, other: Any) -> Drawn:
        return self._make("pow", other)

    def __le__(self, other: Any) -> Drawn:
        return self._make("le", other)

    def __lt__(self, other: Any) -> Drawn:
        return self._make("lt", other)

    def __ge__(self, other: Any) -> Drawn:
        return self._make("ge", other)

    def __gt__(self, other: Any) -> Drawn:
        return self._make("gt", other)

    def eq(self, other: Any) -> Drawn:
        return self._make("eq", other)

    def ne(self, other: Any) -> Drawn:
        return self._make("ne", other)

    def __and__(self, other: Any) -> Drawn:
        return self._make("and", other)

    def __or__(self, other: Any) -> Drawn:
        return self._make("or", other)

    def __invert__(self) -> Drawn:
        return self._make("not")

    def __neg__(self) -> Drawn:
        return self._make("neg")

    def abs(self) -> Drawn:
        return self._make("abs")

    def to(self, dtype: torch.dtype) -> Drawn:
        return self.graph.add("cast", (self,), {}, self.value.to(dtype))

    def masked_fill(self, where: Drawn, value: float) -> Drawn:
        made = self.value.masked_fill(where.value, value)
        return self.graph.add("where", (where, value, self), {}, made)

    def reshape(self, *shape: int) -> Drawn:
        return self.graph.add("reshape", (self,), {}, self.value.reshape(shape))

    def expand(self, *shape: int) -> Drawn:
        return self.graph.add("expand", (self,), {}, self.value.expand(shape))

    def permute(self, *dims: int) -> Drawn:
        return self.graph.add("permute", (self,), {"dims": dims}, self.value.permute(dims))

    def repeat(self, *repeats: int) -> Drawn:
        return self.graph.add("repeat", (self,), {"repeats": repeats}, self.value.repeat(repeats))

    def repeat_interleave(self, repeats: int, dim: int) -> Drawn:
        attributes = {"repeats": repeats, "dim": dim}
        return self.graph.add(
            "repeat_interleave", (self,), attributes, self.value.repeat_interleave(repeats, dim)
        )

    def cumsum(self, dim: int) -> Drawn:
        return self.graph.add("cumsum", (self,), {"dim": dim}, self.value.cumsum(dim))

    def diff(self, dim: int, prepend: Drawn | None = None) -> Drawn:
        made = self.value.diff(dim=dim, prepend=None if prepend is None else prepend.value)
        return self.graph.add("diff", (self, prepend), {"dim": dim}, made)

    def tril(self, diagonal: int = 0) -> Drawn:
        return self.graph.add("tril", (self,), {"diagonal": diagonal}, self.value.tril(diagonal))

    def triu(self, diagonal: int = 0) -> Drawn:
        return self.graph.add("triu", (self,), {"diagonal": diagonal}, self.value.triu(diagonal))

    def clamp(self, low: float | None = None, high: float | None = None) -> Drawn:
        return self.graph.add("clamp", (self,), {"min": low, "max": high}, self.value.clamp(low, high))

    def __getitem__(self, index: Any) -> Drawn:
        entries = index if isinstance(index, tuple) else (index,)
        nodes = tuple(e.node if isinstance(e, Drawn) else e for e in entries)
        made = self.value[tuple(e.value if isinstance(e, Drawn) else e for e in entries)]
        return self.graph.add(
            "index", (self, *(e for e in entries if isinstance(e, Drawn))), {"index": nodes}, made
        )


class Graph:
    """Draws nodes. ``values`` holds what each computes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: dict[Node, Tensor] = {}

    def add(self, kind: str, inputs: tuple[Any, ...], attributes: dict[str, Any], value: Tensor) -> Drawn:
        operands = tuple(x.node if isinstance(x, Drawn) else x for x in inputs)
        name = f"{kind}_{len(self.nodes)}"
        node = Node(
            name, kind, operands, attributes, tuple(value.shape), value.dtype, source=f"model.py:{len(name)}"
        )
        self.nodes.append(node)
        self.values[node] = value
        return Drawn(self, node, value)

    def call(self, kind: str, *inputs: Any) -> Drawn:
        values = [x.value if isinstance(x, Drawn) else x for x in inputs]
        return self.add(kind, inputs, {}, torch.as_tensor(_OPERATORS[kind](*values)))

    def input(self, value: Tensor) -> Drawn:
        return self.add("input", (), {}, value)

    def constant(self, value: Tensor) -> Drawn:
        return self.add("constant", (), {"value": value}, value)

    def full(self, shape: tuple[int, ...], value: Any, dtype: torch.dtype = torch.float32) -> Drawn:
        return self.add("full", (), {"value": value}, torch.full(shape, value, dtype=dtype))

    def arange(self, stop: int, start: int = 0, step: int = 1, dtype: torch.dtype = torch.int64) -> Drawn:
        made = torch.arange(start, start + stop * step, step, dtype=dtype)
        return self.add("arange", (), {"start": start, "step": step}, made)

    def where(self, condition: Drawn, a: Any, b: Any) -> Drawn:
        values = [x.value if isinstance(x, Drawn) else x for x in (a, b)]
        return self.add("where", (condition, a, b), {}, torch.where(condition.value, *values))

    def embedding(self, indices: Drawn, table: Drawn) -> Drawn:
        made = torch.nn.functional.embedding(indices.value, table.value)
        return self.add("embedding", (indices, table), {}, made)

    def opaque(self, value: Tensor, *inputs: Drawn) -> Drawn:
        return self.add("opaque", inputs, {"target": "mystery"}, value)

    def view(self) -> GraphView:
        return GraphView(self.nodes)


# An attention of such a graph.

B, H, N = 2, 3, 8
LOW = torch.finfo(torch.float32).min
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 7, 7]])


def places(sizes: tuple[int, ...]) -> dict[str, Expression]:
    return {name: axis(name, size) for name, size in zip(AXES, sizes)}


@dataclass
class Case:
    """An attention of a drawn graph."""

    graph: Graph
    sizes: tuple[int, int, int, int] = (B, H, N, N)
    causal: bool = False
    trust_added: bool = False

    def term(self, x: Drawn, role: str, fill: float = -math.inf, factor: float = 1.0) -> MaskTerm:
        """A term aligned at the last dimensions of the scores."""
        at = list(places(self.sizes).values())[4 - x.value.dim() :]
        return MaskTerm(x.node, role, fill, tuple(at), factor)

    def analyse(self, *terms: MaskTerm, verified: bool = True) -> MaskAnalysis:
        lifter = Lifter(self.graph.view())
        sizes = dict(zip(AXES, self.sizes))
        analysis = recognise(terms, lifter, sizes, self.causal, trust_added=self.trust_added)
        if verified and analysis.structure.understood:
            assert verify(analysis, terms, self.graph.values, self.causal)
        return analysis


def rows(g: Graph, n: int = N) -> Drawn:
    return g.arange(n).reshape(n, 1)


def padding(g: Graph, dtype: torch.dtype = torch.int64) -> Drawn:
    return g.input(PADDING.to(dtype))


def additive(g: Graph, keep: Drawn, low: float = LOW) -> Drawn:
    return g.where(keep, 0.0, low)
