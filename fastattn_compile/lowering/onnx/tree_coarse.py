"""Coarse tree attention as an ONNX body: what a query reads is one weight for every leaf.

A query reads the mean of every node of its path. A leaf is in the nodes that its own path shares with the query's, so all
that the query reads of a leaf's sum is one number, the sum over the shared levels of the level's weight over the node's
count. Under a causal mask sums run over chunks of tokens, and inside a chunk the weights of the leaves are those of its
keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, only
from fastattn_compile.lowering.onnx.trees import Routing, supports_trees
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

# Tokens of a chunk.
_CHUNK = 64
# Every query holds a weight for every leaf.
_HIGHEST = 8


def _supports(operator: Operator, spec: BodySpec) -> Support:
    support = supports_trees(operator, spec)
    if not support:
        return support
    if operator.config.height > _HIGHEST:
        return no(f"its ONNX body weighs every leaf for every query: height at most {_HIGHEST}")
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "height": config.height, "n_trees": config.n_trees, "shared": int(config.shared),
        "include_root": int(config.include_root), "level_weights": config.level_weights,
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    writing = _Writing(w, operator, spec, given)
    total = writing.tree(0)
    for tree in range(1, operator.config.n_trees):
        total = w.op("Add", total, writing.tree(tree))
    out = writing.ungrouped(total)
    return out if writing.dtype == spec.dtype else w.cast(out, spec.dtype)


class _Writing:
    """``c`` chunks of ``t`` tokens, one chunk of all tokens where nothing is causal; ``r = group * t`` queries."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        self.w, self.spec, self.config, self.padding = w, spec, operator.config, given.key_padding
        self.causal, self.height = spec.mask.causal, operator.config.height
        self.leaves = 1 << self.height
        self.routing = Routing(w, operator, spec, given)
        self.dtype = self.routing.dtype
        self.learned = w.cast(given.parameters[-1], self.dtype)
        self.length = w.shape(given.query, 2)
        self.missing = w.op("Mod", w.op("Neg", self.length), [_CHUNK]) if self.causal else None
        value = given.value
        if self.padding is not None:
            value = w.op("Where", w.op("Unsqueeze", self.padding, [1, 3]), value, 0.0)
        value = value if spec.dtype == self.dtype else w.cast(value, self.dtype)
        if self.causal:
            self.value = w.op("Reshape", self._filled(value, 2, 4), [0, 0, -1, _CHUNK, spec.value_dim])
        else:
            self.value = w.op("Unsqueeze", value, [2])

    def _filled(self, x: ir.Value, axis: int, rank: int) -> ir.Value:
        """With the last chunk filled up."""
        if self.missing is None:
            return x
        pads: list[Any] = [0] * (2 * rank)
        pads[rank + axis] = self.missing
        return self.w.op("Pad", x, self.w.join(pads))

    def _real(self, x: float) -> ir.Value:
        return self.w.constant(x, self.dtype)

    def _chunks_of_queries(self, leaf: ir.Value) -> ir.Value:
        """``(b, g, group * n)`` as ``(b, g, c, r)``."""
        w, group = self.w, self.spec.group
        if not self.causal:
            return w.op("Unsqueeze", leaf, [2])
        if group == 1:
            return w.op("Reshape", self._filled(leaf, 2, 3), [0, 0, -1, _CHUNK])
        split = self._filled(w.op("Reshape", leaf, [0, 0, group, -1]), 3, 4)
        split = w.op("Reshape", split, [0, 0, group, -1, _CHUNK])
        return w.op("Reshape", w.op("Transpose", split, perm=[0, 1, 3, 2, 4]), [0, 0, -1, group * _CHUNK])

    def ungrouped(self, out: ir.Value) -> ir.Value:
        """``(b, g, c, r, e)`` as ``(b, h, n, e)``."""
        w, spec = self.w, self.spec
        if not self.causal:
            return w.op("Reshape", out, [0, spec.heads, -1, spec.value_dim])
        if spec.group > 1:
            split = w.op("Reshape", out, [0, 0, 0, spec.group, _CHUNK * spec.value_dim])
            out = w.op("Transpose", split, perm=[0, 1, 3, 2, 4])
        return w.slice(w.op("Reshape", out, [0, spec.heads, -1, spec.value_dim]), 0, self.length, 2)

    def tree(self, number: int) -> ir.Value:
        """What one tree gives, ``(b, g, c, r, e)``."""
        w = self.w
        found = self.routing.leaves(number)
        query, member = self._chunks_of_queries(found.query), self._members(found.key)
        shares = w.op("CumSum", self._factors(self._counts(query, member), number), w.constant(4))
        bits = np.arange(self.leaves)[:, None] ^ np.arange(self.leaves)
        shared = self.height - np.ceil(np.log2(bits + 1)).astype(np.int64)
        of_leaves = w.op("GatherElements", shares, w.op("Gather", w.constant(shared), query, axis=0), axis=4)
        chunks = (
            w.op("Reshape", member, [0, 0, -1, _CHUNK, self.leaves])
            if self.causal
            else w.op("Unsqueeze", member, [2])
        )
        turned = w.op("Transpose", chunks, perm=[0, 1, 2, 4, 3])
        sums = w.op("MatMul", turned, self.value)
        if not self.causal:
            return w.op("MatMul", of_leaves, sums)
        before = w.op("CumSum", sums, w.constant(2), exclusive=1)
        past = w.constant(np.tile(np.tri(_CHUNK), (self.spec.group, 1)), self.dtype)
        own = w.op("Mul", w.op("MatMul", of_leaves, turned), past)
        return w.op("Add", w.op("MatMul", of_leaves, before), w.op("MatMul", own, self.value))

    def _members(self, leaf: ir.Value) -> ir.Value:
        """Which leaf a key is in, ``(b, g, m, leaves)``, 0 for padding; what fills the last chunk comes after all."""
        w = self.w
        if self.padding is not None:
            leaf = w.op("Where", w.op("Unsqueeze", self.padding, [1]), leaf, -1)
        leaf = w.op("Unsqueeze", self._filled(leaf, 2, 3), [3])
        return w.cast(w.op("Equal", leaf, w.constant(np.arange(self.leaves))), self.dtype)

    def _counts(self, query: ir.Value, member: ir.Value) -> ir.Value:
        """Keys that a query sees in the nodes of its path, ``(b, g, c, r, height + 1)``."""
        w, group = self.w, self.spec.group
        depths = np.repeat(np.arange(self.height + 1), 1 << np.arange(self.height + 1))
        nodes = np.arange(2 * self.leaves - 1) - (1 << depths) + 1
        inside = (np.arange(self.leaves)[:, None] >> (self.height - depths)) == nodes
        level = np.arange(self.height + 1)
        path = w.op("Div", w.op("Unsqueeze", query, [4]), w.constant(1 << (self.height - level)))
        path = w.op("Add", path, w.constant((1 << level) - 1))
        if not self.causal:
            total = w.op("ReduceSum", member, [2], keepdims=0)
            of_nodes = w.op("MatMul", total, w.constant(inside, self.dtype))
            read = w.op("GatherElements", of_nodes, w.op("Reshape", path, [0, 0, -1]), axis=2)
            return w.op("Reshape", read, w.op("Shape", path))
        running = w.op("MatMul", w.op("CumSum", member, w.constant(2)), w.constant(inside, self.dtype))
        running = w.op("Reshape", running, [0, 0, -1, _CHUNK, 2 * self.leaves - 1])
        if group > 1:
            running = w.op("Tile", running, [1, 1, 1, group, 1])
        return w.op("GatherElements", running, path, axis=4)

    def _factors(self, counts: ir.Value, number: int) -> ir.Value:
        """Weights of the levels over the counts of their nodes, 0 where there is no key."""
        w, spec, config = self.w, self.spec, self.config
        learned = w.op("Gather", self.learned, number, axis=1)
        depth = self.height + 1
        learned = w.op("Reshape", learned, [spec.kv_heads, 1, spec.group, 1, depth])
        if spec.group > 1:
            tokens = _CHUNK if self.causal else self.length
            learned = w.op("Expand", learned, w.join([spec.kv_heads, 1, spec.group, tokens, depth]))
            learned = w.op("Reshape", learned, [spec.kv_heads, 1, -1, depth])
        else:
            learned = w.op("Squeeze", learned, [2])
        some = w.op("Max", counts, self._real(1.0))
        seen = w.op("Greater", counts, self._real(0.0))
        if not config.include_root:
            seen = w.op("And", seen, w.constant(np.arange(depth) > 0))
        weights = learned
        if config.level_weights == "softmax":
            logits = w.op("Where", seen, w.op("Add", learned, w.op("Log", some)), self._real(-1e30))
            weights = w.op("Softmax", logits, axis=-1)
            if config.n_trees > 1:
                weights = w.op("Mul", weights, self._real(1 / config.n_trees))
        return w.op("Where", seen, w.op("Div", weights, some), self._real(0.0))


BODY = Body("TreeCoarse", 1, _supports, _write, _attributes)
