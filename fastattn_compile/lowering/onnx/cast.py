"""CAST as an ONNX body: clusters by TopK, attention inside them, and back to the tokens by a sorted list of places.

A place is a token in a cluster. A token may have several, or none; sorted by token they are one list, in which every token
finds its own from a first number on. So what clusters give comes back by a gather of as many places as the token with the
most has, and nothing is added up by scattering, which standard operators learned late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, hidden, highest, only
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no
from fastattn_compile.operators.cast.parameters import sharpness


def _supports(operator: Operator, spec: BodySpec) -> Support:
    if operator.config.clustering != "topk":
        return no(
            "its ONNX body serves clustering='topk': the others assign one token after the other, which standard operators "
            f"do in as many steps as there are tokens; got {operator.config.clustering!r}"
        )
    return only(spec.mask, "key_padding", "end_aligned")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    names = ("clustering", "combine", "select", "head_reduce", "affinity_scale", "xi", "tau", "surrogate_space",
             "own_summary", "phi_heads")  # fmt: skip
    return {
        "clusters": config.clusters, "cluster_size": config.cluster_size or 0, **{n: getattr(config, n) for n in names},
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    return _Writing(w, operator, spec, given).write()


@dataclass(frozen=True)
class _Clusters:
    """Who is where.

    Args:
        tokens: ``(b, c, s)`` int64, tokens of the slots of every cluster.
        there: ``(b, c, s)`` boolean, whether a slot holds a token.
        own: ``(b, n, c)`` boolean, whether a token is in a cluster.
        places: ``(b, n, m)`` numbers of the slots of a token among all ``c * s``.
        used: ``(b, n, m)`` boolean.
    """

    tokens: ir.Value
    there: ir.Value
    own: ir.Value
    places: ir.Value
    used: ir.Value


class _Writing:
    """``c`` clusters of ``s`` slots, ``m`` clusters of the token that is in most, ``p`` gates."""

    def __init__(self, w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> None:
        config = operator.config
        self.w, self.spec, self.config, self.padding = w, spec, config, given.key_padding
        self.dtype = ir.DataType.DOUBLE if spec.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        self.length = w.shape(given.query, 2)
        self.query, self.key, self.value = given.query, given.key, given.value
        if self.padding is not None:
            mine = w.op("Unsqueeze", self.padding, [1, 3])
            self.query, self.key, self.value = (
                w.op("Where", mine, x, 0.0) for x in (given.query, given.key, given.value)
            )
        size = config.cluster_size
        self.size = w.constant([size]) if size else w.op(
            "Div", w.op("Add", self.length, [config.clusters - 1]), [config.clusters]
        )  # fmt: skip
        self.slots = w.op("Mul", self.size, [config.clusters])
        learned = [w.cast(p, self.dtype) for p in given.parameters]
        of_keys = learned.pop(0)
        of_queries = of_keys
        if config.surrogate_space == "input":
            of_queries, of_keys = of_keys, learned.pop(0)
        elif spec.group > 1:
            heads = w.op("Unsqueeze", of_keys, [2])
            shape = [config.clusters, spec.kv_heads, spec.group, spec.head_dim]
            of_queries = w.op(
                "Reshape", w.op("Expand", heads, shape), [config.clusters, spec.heads, spec.head_dim]
            )
        query, key = self._wide(self.query), self._wide(self.key)
        self.of_query = w.op("MatMul", query, w.op("Transpose", of_queries, perm=[1, 2, 0]))
        self.of_key = w.op("MatMul", key, w.op("Transpose", of_keys, perm=[1, 2, 0]))
        self.gate = None
        if config.gated:
            weight, bias = learned.pop(0), learned.pop(0)
            gates = 1 if config.phi_heads == "shared" else spec.kv_heads
            together = w.op(
                "Reshape", w.op("Transpose", query, perm=[0, 2, 1, 3]), [0, 0, spec.heads * spec.head_dim]
            )
            weight = w.op("Reshape", weight, [gates, spec.heads * spec.head_dim])
            product = w.op("MatMul", together, w.op("Transpose", weight, perm=[1, 0]))
            self.gate = w.op("Add", product, bias)  # (b, n, p)
        self.temperature = learned.pop(0) if config.tau == "learned" else None

    def _wide(self, x: ir.Value) -> ir.Value:
        return x if self.spec.dtype == self.dtype else self.w.cast(x, self.dtype)

    def _narrow(self, x: ir.Value) -> ir.Value:
        return x if self.spec.dtype == self.dtype else self.w.cast(x, self.spec.dtype)

    def _real(self, x: float) -> ir.Value:
        return self.w.constant(x, self.dtype)

    def write(self) -> ir.Value:
        """The whole computation."""
        w, spec = self.w, self.spec
        clusters = self._clusters()
        share = self._share(clusters) if self.config.combine == "lse" else None
        inside, mass = self._inside(clusters, share)
        if share is None:
            of_places, of_clusters, summary = self._mixture(clusters)
        else:
            of_places, of_clusters, summary = self._one_softmax(clusters, share, mass)
        places = w.op("Add", w.op("Unsqueeze", clusters.places, [1]), self._base(spec.heads, self.slots))
        rows = w.op("Gather", w.op("Reshape", inside, [-1, spec.value_dim]), places, axis=0)
        out = w.op("MatMul", w.op("Unsqueeze", of_places, [3]), rows)
        out = w.op("Squeeze", out, [3])
        grouped = w.op("Reshape", of_clusters, [0, spec.kv_heads, -1, self.config.clusters])
        pooled = w.op("Reshape", w.op("MatMul", grouped, summary), w.op("Shape", out))
        result: ir.Value = w.op("Add", out, pooled)
        if self.padding is not None and self.config.combine == "paper":
            # Without a single real token there is no cluster, and nothing to mix.
            return w.op("Where", w.op("Unsqueeze", self._any(clusters), [2]), result, 0.0)
        return result

    # Who is where.

    def _affinity(self, x: ir.Value, heads: int) -> tuple[ir.Value, ir.Value]:
        """How near tokens are to clusters, and what breaks ties, ``(b, n, c)`` each, of ``(b, h, n, c)`` products."""
        w, config = self.w, self.config
        if config.affinity_scale == "sqrt_width":
            x = w.op("Mul", x, self._real((heads * self.spec.head_dim) ** -0.5))
        total = w.op("ReduceSum", x, [1], keepdims=0)
        if config.head_reduce == "softmax_mean":
            shares = w.op("ReduceSum", w.op("Softmax", x, axis=-1), [1], keepdims=0)
            return w.op("Div", shares, self._real(float(heads))), total
        if config.head_reduce == "mean":
            total = w.op("Div", total, self._real(float(heads)))
        return w.op("Softmax", total, axis=-1), total

    def _affinities(self) -> list[ir.Value]:
        """Affinity and what breaks its ties, ``(b, c, n)`` each."""
        w, config = self.w, self.config
        if config.select == "query":
            found = self._affinity(self.of_query, self.spec.heads)
        else:
            found = self._affinity(self.of_key, self.spec.kv_heads)
        if config.select == "mix":
            gates = 1 if config.phi_heads == "shared" else self.spec.kv_heads
            share = w.op("Sigmoid", self.gate)
            if gates > 1:
                share = w.op("Div", w.op("ReduceSum", share, [2], keepdims=1), self._real(float(gates)))
            rest = w.op("Sub", self._real(1.0), share)
            both = zip(self._affinity(self.of_query, self.spec.heads), found)
            return [self._turned(w.op("Add", w.op("Mul", share, q), w.op("Mul", rest, k))) for q, k in both]
        return [self._turned(x) for x in found]

    def _turned(self, x: ir.Value) -> ir.Value:
        result: ir.Value = self.w.op("Transpose", x, perm=[0, 2, 1])
        return result

    def _clusters(self) -> _Clusters:
        w = self.w
        near, tie = self._affinities()
        if self.padding is not None:
            near = w.op("Where", w.op("Unsqueeze", self.padding, [1]), near, self._real(-1.0))
        # Sorted by what breaks ties first: of equal affinities the first are taken.
        _, order = w.op("TopK", tie, self.length, outputs=2, axis=2)
        best, at = w.op("TopK", w.op("GatherElements", near, order, axis=2), self.size, outputs=2, axis=2)
        tokens = w.op("GatherElements", order, at, axis=2)
        there = w.op("GreaterOrEqual", best, self._real(0.0))
        int64 = ir.DataType.INT64
        none = w.op("Mul", order, 0)
        own = self._turned(w.op("ScatterElements", none, tokens, w.cast(there, int64), axis=2))
        count = w.op("ReduceSum", own, [2], keepdims=1)
        first = w.op("CumSum", count, w.constant(1), exclusive=1)
        most = w.op("Max", highest_of_all(w, count, self.spec), [1])
        step = w.range(most)
        # Places by token; those that hold none come last.
        flat = w.join([0, self.slots])
        token = w.op("Where", there, tokens, w.op("Expand", self.length, w.op("Shape", there)))
        numbers = w.op("Add", w.op("Mul", w.op("Reshape", token, flat), self.slots), w.range(self.slots))
        _, sorted_places = w.op("TopK", numbers, self.slots, outputs=2, axis=1, largest=0)
        wanted = w.op("Min", w.op("Add", first, step), w.op("Sub", self.slots, [1]))
        places = w.op("GatherElements", sorted_places, w.op("Reshape", wanted, [0, -1]), axis=1)
        places = w.op("Reshape", places, w.op("Shape", wanted))
        return _Clusters(tokens, there, w.cast(own, ir.DataType.BOOL), places, w.op("Less", step, count))

    # Inside clusters.

    def _base(self, heads: int, rows: ir.Value) -> ir.Value:
        """Number of the first row of every head, ``(b, heads, 1, 1)``."""
        w = self.w
        every = w.op("Mul", w.shape(self.query, 0), [heads])
        return w.op("Reshape", w.op("Mul", w.range(every), rows), [-1, heads, 1, 1])

    def _members(self, x: ir.Value, heads: int, channels: int, clusters: _Clusters) -> ir.Value:
        """``(b, heads, n, channels)`` as ``(b, heads, c, s, channels)``."""
        w = self.w
        at = w.op("Add", w.op("Unsqueeze", clusters.tokens, [1]), self._base(heads, self.length))
        result: ir.Value = w.op("Gather", w.op("Reshape", x, [-1, channels]), at, axis=0)
        return result

    def _inside(self, clusters: _Clusters, share: ir.Value | None) -> tuple[ir.Value, ir.Value | None]:
        """Attention inside clusters, ``(b, h, c * s, e)``; with shares its log-sum-exp, ``(b, h, c * s)``."""
        w, spec, count = self.w, self.spec, self.config.clusters
        query = self._members(w.op("Mul", self.query, spec.scale), spec.heads, spec.head_dim, clusters)
        key = self._members(self.key, spec.kv_heads, spec.head_dim, clusters)
        value = self._members(self.value, spec.kv_heads, spec.value_dim, clusters)
        if spec.group > 1:
            query = w.op(
                "Reshape", query, w.join([0, spec.kv_heads, spec.group, count, self.size, spec.head_dim])
            )
            key, value = (w.op("Unsqueeze", x, [2]) for x in (key, value))
        last = [0, 1, 2, 3, 5, 4] if spec.group > 1 else [0, 1, 2, 4, 3]
        scores = w.op("MatMul", query, w.op("Transpose", key, perm=last))
        bias = w.op(
            "Where", clusters.there, 0.0 if share is None else self._narrow(w.op("Log", share)), hidden(spec)
        )
        bias = w.op("Unsqueeze", bias, [1, 2, 4] if spec.group > 1 else [1, 3])
        scores = w.op("Add", scores, bias)
        if share is None:
            out = w.op("MatMul", w.op("Softmax", scores, axis=-1), value)
            return out, None
        top = highest(w, scores, spec)
        weights = w.op("Exp", w.op("Sub", scores, top))
        total = w.op("ReduceSum", weights, [-1], keepdims=1)
        out = w.op("Div", w.op("MatMul", weights, value), total)
        mass = w.op("Add", top, w.op("Log", total))
        return out, w.op("Reshape", mass, w.join([0, spec.heads, self.slots]))

    def _any(self, clusters: _Clusters) -> ir.Value:
        """Whether there is a token, ``(b, 1, 1)``: the best of every cluster is one then."""
        result: ir.Value = self.w.op("Slice", clusters.there, [0, 0], [1, 1], [1, 2])
        return result

    # The two ways to put together what a query meets.

    def _mixture(self, clusters: _Clusters) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The paper's: weights of the places of a token ``(b, h, n, m)`` and of clusters ``(b, h, n, c)``; summaries."""
        w, spec, config = self.w, self.spec, self.config
        if self.gate is None:
            raise ValueError("the paper's combination needs the gate")
        gate = w.op("Unsqueeze", self._turned(self.gate), [3])  # (b, p, n, 1)
        base = sharpness(config)

        def sharp(x: ir.Value, number: int) -> ir.Value:
            softplus = w.op("Log", w.op("Add", w.op("Exp", w.op("Neg", w.op("Abs", x))), self._real(1.0)))
            softplus = w.op("Add", softplus, w.op("Max", x, self._real(0.0)))
            factor = w.op("Mul", w.op("Add", softplus, self._real(base)), self._real(spec.scale))
            if self.temperature is None:
                return factor
            return w.op("Mul", factor, w.op("Gather", self.temperature, [number], axis=0))

        of_query = sharp(gate, 0)
        if config.phi_heads == "per_head" and spec.group > 1:
            tiled = w.op("Expand", w.op("Unsqueeze", of_query, [2]), [1, 1, spec.group, 1, 1])
            of_query = w.op("Reshape", tiled, w.join([0, spec.heads, self.length, 1]))
        mixing = w.op("Mul", self.of_query, of_query)
        pooling = w.op("Mul", self.of_key, sharp(w.op("Neg", gate), 1))
        some = self._any(clusters)
        if self.padding is not None:
            mixing = w.op("Where", w.op("Unsqueeze", some, [1]), mixing, self._real(-1e30))
        mixture = w.op("Softmax", mixing, axis=-1)
        pooling = w.op("Transpose", pooling, perm=[0, 1, 3, 2])
        shape = w.join([w.shape(self.key, 0), spec.kv_heads, config.clusters, self.size])
        tokens = w.op("Expand", w.op("Unsqueeze", clusters.tokens, [1]), shape)
        pooling = w.op("GatherElements", pooling, tokens, axis=3)
        seen = w.op("Unsqueeze", clusters.there, [1])
        shares = w.op("Softmax", w.op("Where", seen, pooling, self._real(-1e30)), axis=-1)
        value = self._members(self.value, spec.kv_heads, spec.value_dim, clusters)
        summary = w.op("MatMul", w.op("Unsqueeze", self._narrow(shares), [3]), value)
        summary = w.op("Squeeze", summary, [3])
        own = w.op("Unsqueeze", clusters.own, [1])
        narrow = self._narrow(mixture)
        others = narrow if config.own_summary == "included" else w.op("Where", own, 0.0, narrow)
        cluster = w.op("Div", clusters.places, self.size)
        target = w.join([w.shape(self.query, 0), spec.heads, self.length, w.shape(cluster, 2)])
        at = w.op("Expand", w.op("Unsqueeze", cluster, [1]), target)
        mine = w.op("GatherElements", narrow, at, axis=3)
        return w.op("Where", w.op("Unsqueeze", clusters.used, [1]), mine, 0.0), others, summary

    def _share(self, clusters: _Clusters) -> ir.Value:
        """How much a token counts in a slot of its clusters, ``(b, c, s)``."""
        w = self.w
        count = w.op("ReduceSum", w.cast(clusters.own, self.dtype), [2], keepdims=0)
        share = w.op("Div", self._real(1.0), w.op("Max", count, self._real(1.0)))
        flat = w.op("Reshape", clusters.tokens, w.join([0, self.slots]))
        return w.op("Reshape", w.op("GatherElements", share, flat, axis=1), w.op("Shape", clusters.tokens))

    def _one_softmax(
        self, clusters: _Clusters, share: ir.Value, mass: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One softmax over own tokens and mean summaries; what it gives is as in ``_mixture``."""
        w, spec = self.w, self.spec
        counted = w.op("Where", clusters.there, share, self._real(0.0))
        total = w.op("ReduceSum", counted, [2], keepdims=1)
        mean = self._narrow(w.op("Div", counted, w.op("Max", total, self._real(1e-30))))
        mean = w.op("Unsqueeze", mean, [1, 3])
        keys, values = (
            w.op("Squeeze", w.op("MatMul", mean, self._members(x, spec.kv_heads, c, clusters)), [3])
            for x, c in ((self.key, spec.head_dim), (self.value, spec.value_dim))
        )
        query = w.op("Reshape", w.op("Mul", self.query, spec.scale), [0, spec.kv_heads, -1, spec.head_dim])
        scores = w.op("MatMul", query, w.op("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = w.op("Reshape", scores, w.join([0, spec.heads, self.length, self.config.clusters]))
        weight = w.op("Log", w.op("Max", total, self._real(1e-30)))
        scores = w.op("Add", scores, w.op("Unsqueeze", self._narrow(self._turned(weight)), [1]))
        apart = w.op("And", w.op("Not", clusters.own), self._any(clusters))
        scores = w.op("Where", w.op("Unsqueeze", apart, [1]), scores, hidden(spec))
        flat = w.op("Reshape", clusters.places, [0, -1])
        target = w.join([w.shape(self.query, 0), spec.heads, w.shape(flat, 1)])
        at = w.op("Expand", w.op("Unsqueeze", flat, [1]), target)
        mine = w.op("GatherElements", mass, at, axis=2)
        mine = w.op("Reshape", mine, w.join([0, spec.heads, self.length, -1]))
        mine = w.op("Where", w.op("Unsqueeze", clusters.used, [1]), mine, hidden(spec))
        every = w.op("Concat", mine, scores, axis=3)
        weights = w.op("Softmax", every, axis=-1)
        if self.padding is not None:
            weights = w.op("Where", w.op("Greater", every, hidden(spec) / 2), weights, 0.0)
        most = w.shape(mine, 3)
        return (
            w.slice(weights, 0, most, 3),
            w.slice(weights, most, w.op("Add", most, [self.config.clusters]), 3),
            values,
        )


def highest_of_all(w: OnnxWriter, x: ir.Value, spec: BodySpec) -> ir.Value:
    """The largest entry of a tensor, ``(1,)``."""
    return highest(w, w.op("Reshape", x, [-1]), spec)


# Not "Cast": a standard operator has that name, and onnx.reference takes one for the other.
BODY = Body("CAST", 1, _supports, _write, _attributes)
