"""Barnes-Hut attention as an ONNX body: a loop over blocks of queries, each of which descends the tree by lists.

One step of the loop serves one block in all heads: it scores the top of the tree, follows the best nodes down level by
level, gathers the keys of the leaves it opened, and attends them together with the near field and the sinks. A step holds
the rows of one block, so that memory grows with the sequence and not with what is opened in all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn_compile.lowering.onnx.blocks import Blocks
from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, hidden, only
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no

_STATISTICS = ("mean", "cumulant")


def _supports(operator: Operator, spec: BodySpec) -> Support:
    config = operator.config
    if config.select not in _STATISTICS:
        return no(f"its ONNX body chooses by {' or '.join(map(repr, _STATISTICS))}, not by {config.select!r}")
    if config.rest != "drop" or config.tolerance:
        return no("its ONNX body opens a number of leaves and leaves the rest out: rest='drop', tolerance=0")
    if not config.open:
        return no("its ONNX body opens at least one leaf; for the near field alone use window")
    if spec.mask.left is not None or spec.mask.right not in (None, 0):
        return no(
            f"its ONNX body serves causal and bidirectional attention without a window, not {spec.mask}"
        )
    return only(spec.mask, "right", "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "block": config.block, "sinks": config.sinks, "leaf": config.leaf, "fanout": config.fanout,
        "group": config.group, "open": config.open, "beam": config.beam, "select": config.select,
        "share_group": config.share_group, "longest": spec.longest,
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    if not operator.config.share_group and spec.group > 1:
        # Every query head chooses for itself: as if each had keys of its own.
        heads = w.constant([head // spec.group for head in range(spec.heads)])
        key, value = (w.op("Gather", x, heads, axis=1) for x in (given.key, given.value))
        given = dataclasses.replace(given, key=key, value=value)
        spec = dataclasses.replace(spec, kv_heads=spec.heads)
    return _Writing(w, operator, spec, given).write()


@dataclass(frozen=True)
class _Level:
    """The nodes of one level in all units, ``u`` of them.

    Args:
        features: ``(u * nodes, f)``: what the features of a query are multiplied with.
        mass: ``(u * nodes)`` logarithm of the tokens of a node, hidden where there is none.
        base: Number of the first node of every unit, ``(b, g, 1, 1)``.
    """

    features: ir.Value
    mass: ir.Value
    base: ir.Value


class _Writing(Blocks):
    """One body. ``q`` groups of queries of a block that share a choice, ``v`` query heads of a key head, which vote."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        config = operator.config
        self.config, self.causal = config, spec.mask.causal
        self.pattern = config.pattern(spec.mask)
        self.top = self.pattern.levels(spec.longest) - 1
        self.dtype = ir.DataType.DOUBLE if spec.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        self.choosers = config.block // config.group
        self.span = (2 if self.causal else 3) * config.block
        super().__init__(w, spec, given, config.block, config.sinks, self.span)

    def _checked(self, blocks: ir.Value) -> ir.Value:
        """The number of blocks; more tokens than the tree was written for stop the run with an index out of range."""
        w = self.w
        most = -(-self.spec.longest // self.config.block)
        over = w.cast(w.op("Greater", blocks, [most]), ir.DataType.INT64)
        return w.op("Mul", blocks, w.op("Gather", [1], over, axis=0))

    # Before the loop.

    def _wide(self, x: ir.Value) -> ir.Value:
        return x if self.spec.dtype == self.dtype else self.w.cast(x, self.dtype)

    def _real(self, x: float) -> ir.Value:
        return self.w.constant(x, self.dtype)

    def _of_tree(self, x: ir.Value) -> ir.Value:
        """Tokens filled up to whole nodes of the top."""
        w, width = self.w, self.pattern.width(self.top)
        missing = w.op("Mod", w.op("Neg", w.shape(x, 2)), [width])
        return w.op("Pad", x, w.join([0, 0, 0, 0, 0, 0, missing, 0]))

    def _levels(self, keys: ir.Value, taken: ir.Value) -> list[_Level]:
        """The tree from the leaves up, of keys that are 0 where a token belongs to no node."""
        w, dim = self.w, self.spec.head_dim
        cumulant = self.config.select == "cumulant"
        sums = w.op("Concat", keys, w.op("Mul", keys, keys), axis=3) if cumulant else keys
        channels, counts, made = dim * (1 + cumulant), taken, []
        for level in range(self.top + 1):
            width = self.config.fanout if level else self.config.leaf
            sums, counts = (
                w.op("ReduceSum", w.op("Reshape", x, [0, 0, -1, width, c]), [3], keepdims=0)
                for x, c in ((sums, channels), (counts, 1))
            )
            some = w.op("Max", counts, self._real(1.0))
            features = w.op("Div", sums, some)
            if cumulant:
                mean, square = w.op("Split", features, [dim, dim], outputs=2, axis=3)
                features = w.op("Concat", mean, w.op("Sub", square, w.op("Mul", mean, mean)), axis=3)
            mass = w.op(
                "Where", w.op("Greater", counts, self._real(0.0)), w.op("Log", some), self._real(-1e30)
            )
            nodes = w.shape(features, 2)
            wide = w.op("Expand", mass, self._every_unit())
            made.append(_Level(
                w.op("Reshape", features, [-1, channels]), w.op("Reshape", wide, [-1]), self._base(nodes)
            ))  # fmt: skip
        return made

    def _every_unit(self) -> ir.Value:
        return self.w.join([self.w.shape(self.key, 0), self.spec.kv_heads, 1, 1])

    def _base(self, rows: ir.Value) -> ir.Value:
        w = self.w
        units = w.op("Mul", w.shape(self.key, 0), [self.spec.kv_heads])
        return w.op("Reshape", w.op("Mul", w.range(units), rows), [-1, self.spec.kv_heads, 1, 1])

    def _voices(self) -> ir.Value:
        """Features of the queries that speak for groups, ``(k, b, g, q * v, f)``."""
        w, spec, group = self.w, self.spec, self.config.group
        query = w.op("Mul", self._wide(self.query), self._real(spec.scale))
        if group > 1:
            # Causal: the queries up to the group's first one, none before the sequence.
            before = group - 1 if self.causal else 0
            total = w.op("Mul", self.blocks, [self.m])
            after = w.op("Sub", w.op("Sub", total, self.length), [before])
            query = w.op("Pad", query, w.join([0, 0, before, 0, 0, 0, after, 0]))
            query = w.op(
                "ReduceSum", w.op("Reshape", query, [0, 0, -1, group, spec.head_dim]), [3], keepdims=0
            )
            first = w.op("Mul", w.range(w.op("Mul", self.blocks, [self.choosers])), group)
            there = w.op("Add", first, 1) if self.causal else w.op("Sub", self.length, first)
            count = w.cast(w.op("Max", w.op("Min", there, group), 1), self.dtype)
            query = w.op("Div", query, w.op("Unsqueeze", count, [1]))
        else:
            query = w.op("Pad", query, w.join([0, 0, 0, 0, 0, 0, self.missing, 0]))
        if self.config.select == "cumulant":
            query = w.op("Concat", query, w.op("Mul", w.op("Mul", query, query), self._real(0.5)), axis=3)
        return self._blocks_first(query, self.choosers, 1)

    def _blocks_first(self, x: ir.Value, groups: int, size: int) -> ir.Value:
        """``(b, h, k * groups * size, c)`` as ``(k, b, g, groups * v * size, c)``."""
        w, spec = self.w, self.spec
        channels = w.shape(x, 3)
        x = (
            w.op("Reshape", x, w.join([0, spec.kv_heads, -1, groups * size, channels]))
            if spec.group == 1
            else x
        )
        if spec.group == 1:
            return w.op("Transpose", x, perm=[2, 0, 1, 3, 4])
        heads = w.op(
            "Reshape", x, w.join([-1, spec.group, self.blocks, groups, w.op("Mul", channels, [size])])
        )
        moved = w.op("Transpose", heads, perm=[2, 0, 3, 1, 4])
        return w.op(
            "Reshape", moved, w.join([self.blocks, -1, spec.kv_heads, groups * spec.group * size, channels])
        )

    # The loop.

    def write(self) -> ir.Value:
        """The whole computation."""
        w, spec, m = self.w, self.spec, self.m
        real, taken = self._tokens()
        ahead = 0 if self.causal else m
        pads = w.join([0, 0, m, 0, 0, 0, w.op("Add", self.missing, [ahead]), 0])
        near = [w.op("Pad", x, pads) for x, _ in self._sides()]
        there = w.op("Pad", w.cast(real, ir.DataType.INT32), w.constant([0, 0, m, 0, 0, 0, ahead, 0]))
        there = w.cast(w.op("Transpose", there, perm=[0, 1, 3, 2]), ir.DataType.BOOL)
        full = w.join([0, 0, 0, 0, 0, 0, self.missing, 0])
        chosen = self._of_tree(w.cast(taken, self.dtype))
        tokens = [self._of_tree(w.op("Pad", x, full)) for x, _ in self._sides()]
        levels = self._levels(w.op("Mul", self._wide(tokens[0]), chosen), chosen)
        rows = w.shape(tokens[0], 2)
        base = self._base(rows)
        wide = w.op("Expand", chosen, self._every_unit())
        met = w.op("Reshape", w.op("Greater", wide, self._real(0.0)), [-1])
        far = [w.op("Reshape", x, [-1, c]) for x, (_, c) in zip(tokens, self._sides())]
        query = w.op("Pad", w.op("Mul", self.query, spec.scale), full)
        query = self._blocks_first(query, self.choosers, self.config.group)
        voices = self._voices()
        sinks = [self._at_sinks(x) for x, _ in self._sides()] if self.sinks else []
        sink_bias = w.op("Transpose", self._sink_bias(), perm=[2, 0, 1, 3, 4]) if self.sinks else None

        def step(w: OnnxWriter, number: ir.Value) -> ir.Value:
            own = w.op("Gather", query, number, axis=0)
            first = w.op("Mul", w.op("Unsqueeze", number, [0]), [m])
            k, v = (w.slice(x, first, w.op("Add", first, [self.span]), 2) for x in near)
            seen = w.op("And", w.slice(there, first, w.op("Add", first, [self.span]), 3), self._past())
            scores = [w.op("Where", seen, self._dot(w, own, k), hidden(spec))]
            if sink_bias is not None:
                of_sinks = w.op("Add", self._dot(w, own, sinks[0]), w.op("Gather", sink_bias, number, axis=0))
                scores.append(of_sinks)
            leaves, opened = self._choose(w, levels, w.op("Gather", voices, number, axis=0), first)
            leaf = w.op("Mul", w.op("Unsqueeze", leaves, [4]), self.config.leaf)
            place = w.op("Add", leaf, w.constant(np.arange(self.config.leaf)))
            at = w.op("Add", w.op("Reshape", place, [0, 0, 0, -1]), base)
            exists = w.op("And", w.op("Reshape", w.op("Expand", w.op("Unsqueeze", opened, [4]), w.op("Shape", place)),
                                      [0, 0, 0, -1]), w.op("Gather", met, at, axis=0))  # fmt: skip
            keys, values = (w.op("Gather", x, at, axis=0) for x in far)
            grouped = [0, 0, self.choosers, -1, spec.head_dim]
            of_far = self._dot_gathered(w, w.op("Reshape", own, grouped), keys)
            of_far = w.op("Where", w.op("Unsqueeze", exists, [3]), of_far, hidden(spec))
            flat = w.join([0, 0, self.choosers * self.config.group * spec.group, -1])
            every = w.op("Concat", *scores, w.op("Reshape", of_far, flat), axis=3)
            weights = w.op("Softmax", every, axis=-1)
            if self.padding is not None:
                some = w.op("Greater", every, hidden(spec) / 2)
                weights = w.op("Where", some, weights, 0.0)
            cuts = [0, self.span, self.span + self.sinks] if self.sinks else [0, self.span]
            parts = [w.slice(weights, a, b, 3) for a, b in zip(cuts, [*cuts[1:], 1 << 62])]
            out = w.op("MatMul", parts[0], v)
            if self.sinks:
                out = w.op("Add", out, w.op("MatMul", parts[1], sinks[1]))
            of_far = w.op("MatMul", w.op("Reshape", parts[-1], w.op("Shape", of_far)), values)
            result: ir.Value = w.op("Add", out, w.op("Reshape", of_far, w.op("Shape", out)))
            return result

        out = w.loop(self.blocks, step, ["b", spec.kv_heads, m * spec.group, spec.value_dim])
        return self._heads_first(out)

    def _past(self) -> ir.Value:
        """What the mask shows of the near field, ``(rows, span)``, rows in the order of ``_blocks_first``."""
        group, heads = self.config.group, self.spec.group
        one = np.arange(self.m).reshape(self.choosers, 1, group)
        place = np.broadcast_to(one, (self.choosers, heads, group)).reshape(-1, 1)
        shown = np.arange(self.span) - self.m <= place if self.causal else np.ones((1, self.span), dtype=bool)
        return self.w.constant(shown)

    def _dot(self, w: OnnxWriter, query: ir.Value, keys: ir.Value) -> ir.Value:
        result: ir.Value = w.op("MatMul", query, w.op("Transpose", keys, perm=[0, 1, 3, 2]))
        return result

    def _dot_gathered(self, w: OnnxWriter, query: ir.Value, keys: ir.Value) -> ir.Value:
        """The same for rows that every group of queries has for itself: what is turned is the few, not the many."""
        turned = [0, 1, 2, 4, 3]
        scores = w.op("MatMul", keys, w.op("Transpose", query, perm=turned))
        result: ir.Value = w.op("Transpose", scores, perm=turned)
        return result

    def _heads_first(self, out: ir.Value) -> ir.Value:
        """``(k, b, g, q * v * size, e)`` as ``(b, h, n, e)``."""
        w, spec, group = self.w, self.spec, self.config.group
        if spec.group == 1:
            # onnx.reference puts what steps give one after another where ONNX stacks it: this is right for both.
            out = w.op("Reshape", out, w.join([self.blocks, -1, spec.kv_heads, self.m, spec.value_dim]))
            out = w.op("Transpose", out, perm=[1, 2, 0, 3, 4])
        else:
            split = w.join([self.blocks, -1, self.choosers, spec.group, group * spec.value_dim])
            out = w.op("Transpose", w.op("Reshape", out, split), perm=[1, 3, 0, 2, 4])
        whole = w.op("Reshape", out, w.join([w.shape(self.key, 0), spec.heads, -1, spec.value_dim]))
        return w.slice(whole, 0, self.length, 2)

    def _sink_bias(self) -> ir.Value:
        """Sinks in blocks apart from the query's; nearer ones it meets as tokens: ``(b, 1, k, 1, s)``."""
        w = self.w
        block = w.op("Reshape", w.range(self.blocks), [1, -1, 1])
        distance = w.op("Sub", block, w.op("Unsqueeze", w.op("Div", self._places, [self.m]), [1]))
        apart = w.op("Greater", distance if self.causal else w.op("Abs", distance), 1)
        seen = w.op("And", apart, w.op("Unsqueeze", self._exists, [1]))
        return w.op("Unsqueeze", w.op("Where", seen, 0.0, hidden(self.spec)), [1, 3])

    # The descent.

    def _choose(
        self, w: OnnxWriter, levels: list[_Level], voices: ir.Value, first: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Numbers of the leaves that the groups of a block open, and whether they are any, ``(b, g, q, open)`` each."""
        spec, fan = self.spec, self.config.fanout
        channels = spec.head_dim * (2 if self.config.select == "cumulant" else 1)
        voices = w.op("Reshape", voices, [0, 0, self.choosers, spec.group, channels])
        edges = [w.op("Sub", first, [self.m])]
        if not self.causal:
            edges.append(w.op("Add", first, [2 * self.m]))
        count = w.op("Div", w.shape(levels[-1].mass, 0), w.op("Mul", w.shape(self.key, 0), [spec.kv_heads]))
        shape = w.join([w.shape(self.key, 0), spec.kv_heads, self.choosers, count])
        nodes = w.op("Expand", w.range(count), shape)
        valid = None
        for level in range(self.top, -1, -1):
            here, width = levels[level], self.pattern.width(level)
            at = w.op("Add", nodes, here.base)
            rows = w.op("Gather", here.features, at, axis=0)
            scores = self._dot_gathered(w, voices, rows)
            mass = w.op("Gather", here.mass, at, axis=0)
            begin = w.op("Mul", nodes, width)
            inside = w.op("LessOrEqual", w.op("Add", begin, width), edges[0])
            if not self.causal:
                inside = w.op("Or", inside, w.op("GreaterOrEqual", begin, edges[1]))
            inside = w.op("And", inside, w.op("Greater", mass, self._real(-1.0)))
            if valid is not None:
                inside = w.op("And", inside, valid)
            rank = self._vote(w, w.op("Add", scores, w.op("Unsqueeze", mass, [3])), inside)
            most = w.op("Min", w.shape(rank, 3), [self.pattern.keep(level)])
            best, place = w.op("TopK", rank, most, outputs=2, axis=3)
            valid = w.op("Greater", best, self._real(-1e29))
            nodes = w.op("GatherElements", nodes, place, axis=3)
            if level:
                nodes, valid = self._children(w, nodes, valid, edges, self.pattern.width(level), fan)
        if valid is None:
            raise ValueError("a tree has at least its leaves")
        return nodes, valid

    def _vote(self, w: OnnxWriter, scores: ir.Value, inside: ir.Value) -> ir.Value:
        """One ranking of the query heads of a key head: the sum of the shares of mass that they give, ``(b, g, q, l)``."""
        inside = w.op("Unsqueeze", inside, [3])
        scores = w.op("Where", inside, scores, self._real(-1e30))
        if self.spec.group == 1:
            return w.op("Squeeze", scores, [3])
        shares = w.op("ReduceSum", w.op("Softmax", scores, axis=-1), [3], keepdims=0)
        return w.op("Where", w.op("Squeeze", inside, [3]), shares, self._real(-1e30))

    def _children(
        self, w: OnnxWriter, nodes: ir.Value, valid: ir.Value, edges: list[ir.Value], width: int, fan: int
    ) -> tuple[ir.Value, ir.Value]:
        """Children of the kept nodes, and of the nodes that reach beyond the far field."""
        made = [w.op("Mul", nodes, fan)]
        flags = [valid]
        if self.m % width:
            shape = w.op("Shape", w.slice(nodes, 0, 1, 3))
            parents = [w.op("Div", edge, [width]) for edge in edges]
            crossed = [
                w.op("And", w.op("Greater", edge, 0), w.op("Greater", w.op("Mod", edge, [width]), 0))
                for edge in edges
            ]
            if len(edges) > 1:
                apart = w.op("Not", w.op("And", crossed[0], w.op("Equal", *parents)))
                crossed[1] = w.op("And", w.op("And", crossed[1], apart), w.op("Less", edges[1], self.length))
            there = [w.op("Where", x, parent, [0]) for x, parent in zip(crossed, parents)]
            made += [w.op("Mul", w.op("Expand", parent, shape), fan) for parent in there]
            flags += [w.op("Expand", x, shape) for x in crossed]
        parents_of = w.op("Concat", *made, axis=3) if len(made) > 1 else made[0]
        known = w.op("Concat", *flags, axis=3) if len(flags) > 1 else flags[0]
        child = w.op("Add", w.op("Unsqueeze", parents_of, [4]), w.constant(np.arange(fan)))
        known = w.op("Expand", w.op("Unsqueeze", known, [4]), w.op("Shape", child))
        return w.op("Reshape", child, [0, 0, 0, -1]), w.op("Reshape", known, [0, 0, 0, -1])


BODY = Body("BarnesHut", 2, _supports, _write, _attributes)
