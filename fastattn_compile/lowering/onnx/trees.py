"""Decision trees in ONNX: vectors to their leaves, and sorting by leaf. For the bodies of both forms of tree attention.

Sizes: ``b`` batch, ``g`` key heads, ``h`` query heads, ``q`` queries of a key head (``h / g * n``), ``m`` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import BodyInputs, BodySpec, merged
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

# A body scores all planes of a tree at once, and more levels would make that the cost of attention.
_HIGHEST = 10


@dataclass(frozen=True)
class Leaves:
    """Leaves of one tree.

    Args:
        query: ``(b, g, q)`` int64.
        key: ``(b, g, m)`` int64.
    """

    query: ir.Value
    key: ir.Value


def supports_trees(operator: Operator, spec: BodySpec) -> Support:
    """What a body of either form cannot route."""
    config = operator.config
    if config.rotary_base:
        return no("its ONNX body does not undo a rotary embedding; set rotary_base=0")
    if not 1 <= config.height <= _HIGHEST:
        return no(f"its ONNX body serves trees of height 1 to {_HIGHEST}, not {config.height}")
    return Support()


class Routing:
    """Routes the queries and keys of a body. Decisions are taken in float32, or float64 for float64 tensors."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        self.w, self.spec, self.height = w, spec, operator.config.height
        double = spec.dtype == ir.DataType.DOUBLE
        self.dtype = ir.DataType.DOUBLE if double else ir.DataType.FLOAT
        planes = [w.cast(p, self.dtype) for p in given.parameters[:4]]
        self.of_keys, own = planes[:2], not operator.config.shared
        self.of_queries = planes[2:] if own else self.of_keys
        key = given.key
        if given.key_padding is not None:
            key = w.op("Where", w.op("Unsqueeze", given.key_padding, [1, 3]), key, 0.0)
        self.key, self.query = (
            self._wide(key),
            self._wide(given.query if own else merged(w, given.query, spec)),
        )
        self.own = own

    def _wide(self, x: ir.Value) -> ir.Value:
        return x if self.spec.dtype == self.dtype else self.w.cast(x, self.dtype)

    def leaves(self, tree: int) -> Leaves:
        """The leaves of one tree."""
        query = self._follow(self.query, self.of_queries, tree)
        if self.own and self.spec.group > 1:
            query = self.w.op("Reshape", query, [0, self.spec.kv_heads, -1])
        return Leaves(query, self._follow(self.key, self.of_keys, tree))

    def _follow(self, x: ir.Value, planes: list[ir.Value], tree: int) -> ir.Value:
        """``(b, h, n, d)`` to leaf numbers ``(b, h, n)``: the nodes of a tree are numbered level by level."""
        w = self.w
        weight, offset = (w.op("Gather", p, tree, axis=1) for p in planes)
        product = w.op("MatMul", x, w.op("Transpose", weight, perm=[0, 2, 1]))
        scores = w.op("Add", product, w.op("Unsqueeze", offset, [1]))
        node = None
        for _ in range(self.height):
            here = w.slice(scores, 0, 1, 3) if node is None else w.op("GatherElements", scores, node, axis=3)
            step = w.op("Where", w.op("Greater", here, w.constant(0.0, self.dtype)), 2, 1)
            node = step if node is None else w.op("Add", w.op("Mul", node, 2), step)
        leaf = w.op("Sub", node, (1 << self.height) - 1)
        result: ir.Value = w.op("Squeeze", leaf, [3])
        return result
