"""Attention that is one node, written out beside it in standard operators, so that the finder reads it as any other.

The fused node stays. Where a conversion replaces the attention, what was written takes the node's place; everywhere else
it has no user and is dropped. What cannot be written out (a cache, packed tokens) keeps its reason.

Sources: the operator specifications of ONNX (``Attention``, opset 23) and of ONNX Runtime's domain ``com.microsoft``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.passes.onnx.sizes import attribute

MICROSOFT = "com.microsoft"
MEANS = "fastattn.means"  # in a fused node's meta: what was written out for it
STANDS_FOR = "fastattn.stands_for"  # in the meta of what was written: the fused node's output, and its own
WHY_NOT = "fastattn.why_not"  # in a fused node's meta: why nothing was written out
_OPSET = 13  # the first in which everything written here exists

_NEVER: Mapping[str, str] = {
    "PackedAttention": "tokens of several sequences are packed into one axis",
    "PackedMultiHeadAttention": "tokens of several sequences are packed into one axis",
    "QAttention": "its projections and products are 8-bit integers inside one node",
    "SparseAttention": "it attends to blocks of its own choice, and is sub-quadratic already",
    "DecoderMaskedMultiHeadAttention": "it attends to keys of earlier calls (a cache)",
    "DecoderMaskedSelfAttention": "it attends to keys of earlier calls (a cache)",
    "DecoderAttention": "it attends to keys of earlier calls (a cache)",
    "PagedAttention": "it attends to keys of earlier calls (a cache)",
    "LongformerAttention": "it attends to a band and to global tokens, and is sub-quadratic already",
    "MultiScaleDeformableAttention": "it attends to sampled points",
}


class _Not(Exception):
    """Why a node cannot be written out."""


@dataclass
class _Parts:
    """Attention in canonical layout, ``(batch, heads, n, d)``, before it is written.

    Args:
        query: Queries.
        key: Keys, of fewer heads where several queries share one.
        value: Values, likewise.
        repeats: Query heads of one key head.
        scale: Factor of the scores.
        cap: Bound of the scores, 0 without one.
        added: Tensors that are added to the scores.
        kept: Boolean tensors, true where a score stays, each with what a hidden score becomes.
        causal: Whether keys behind the query are hidden.
        window: Keys a query sees at most, its own one included; 0 for all.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    repeats: int = 1
    scale: float = 1.0
    cap: float = 0.0
    added: list[ir.Value] = field(default_factory=list)
    kept: list[tuple[ir.Value, float]] = field(default_factory=list)
    causal: bool = False
    window: int = 0


def unfold(graph: ir.Graph, opset: int) -> list[ir.Node]:
    """Writes out every fused attention of a graph beside it, in place.

    Args:
        graph: A graph, after ``infer_shapes``.
        opset: Version of the standard operators.

    Returns:
        The nodes that were added.
    """
    added: list[ir.Node] = []
    for node in list(graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) not in _RULES and not (domain == MICROSOFT and node.op_type in _NEVER):
            continue
        try:
            if node.op_type in _NEVER and domain == MICROSOFT:
                raise _Not(_NEVER[node.op_type])
            if opset < _OPSET:
                raise _Not(f"it can be written out from opset {_OPSET} on, the model has {opset}")
            writer = _Writer(node, len(added))
            result = writer.merged(_RULES[domain, node.op_type](node, writer))
        except _Not as reason:
            node.meta[WHY_NOT] = f"{'an' if node.op_type[0] in 'AEIO' else 'a'} {node.op_type} node: {reason}"
            continue
        if result is None:  # read as it is
            continue
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        node.meta[MEANS] = result
        for made in writer.nodes:
            made.meta[STANDS_FOR] = (node.outputs[0], result)
            made.metadata_props.update(node.metadata_props)
        graph.insert_before(node, writer.nodes)
        added += writer.nodes
    return added


def take_over(value: ir.Value) -> None:
    """Lets what was written out take the place of its fused node.

    Args:
        value: A value inside what was written out; nothing happens for any other.
    """
    node = value.producer()
    pair = node.meta.get(STANDS_FOR) if node is not None else None
    if pair is None:
        return
    fused, written = pair
    name, was_output = fused.name, fused.is_graph_output()
    fused.replace_all_uses_with(written, replace_graph_outputs=True)
    if was_output:
        fused.name, written.name = f"{name}_exact", name


class _Writer(OnnxWriter):
    """Writes the steps that fused nodes share."""

    def __init__(self, node: ir.Node, number: int) -> None:
        dtype = node.outputs[0].dtype or _dtype_of(node.inputs)
        super().__init__(dtype, f"{node.name or node.outputs[0].name or 'attention'}_written_{number}_")
        self.heads = int(attribute(node, "num_heads", attribute(node, "q_num_heads", 0)) or 0)

    def split(self, x: ir.Value, heads: int) -> ir.Value:
        """``(batch, n, heads * d)`` as ``(batch, heads, n, d)``."""
        return self.permute(self.op("Reshape", x, [0, 0, heads, -1]), (0, 2, 1, 3))

    def part(self, x: ir.Value, start: int, size: int, axis: int) -> ir.Value:
        """So many elements of an axis."""
        return self.op("Slice", x, [start], [start + size], [axis])

    def merged(self, parts: _Parts | None) -> ir.Value | None:
        """The attention, ``(batch, n, heads * d)``."""
        if parts is None:
            return None
        key, value = (self._repeated(x, parts.repeats) for x in (parts.key, parts.value))
        scores = self.op("MatMul", parts.query, self.permute(key, (0, 1, 3, 2)))
        scores = self.op("Mul", scores, parts.scale)
        if parts.cap:
            scores = self.op("Mul", self.op("Tanh", self.op("Div", scores, parts.cap)), parts.cap)
        for tensor in parts.added:
            scores = self.op("Add", scores, tensor)
        if parts.causal:
            parts.kept.append((self._causal(parts), float("-inf")))
        for seen, fill in parts.kept:
            scores = self.op("Where", seen, scores, fill)
        summed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        result: ir.Value = self.op("Reshape", self.permute(summed, (0, 2, 1, 3)), [0, 0, -1])
        return result

    def _repeated(self, x: ir.Value, repeats: int) -> ir.Value:
        if repeats == 1:
            return x
        wide = self.op("Expand", self.op("Unsqueeze", x, [2]), [1, 1, repeats, 1, 1])
        heads, length, channels = self.shape(x, 1), self.shape(x, 2), self.shape(x, 3)
        whole = self.op(
            "Concat", self.constant([0]), self.op("Mul", heads, [repeats]), length, channels, axis=0
        )
        result: ir.Value = self.op("Reshape", wide, whole)
        return result

    def _causal(self, parts: _Parts) -> ir.Value:
        queries = self.op("Unsqueeze", self.range(self.shape(parts.query, 2)), [1])
        keys = self.op("Unsqueeze", self.range(self.shape(parts.key, 2)), [0])
        seen: ir.Value = self.op("LessOrEqual", keys, queries)
        if parts.window:
            near = self.op("Greater", keys, self.op("Sub", queries, parts.window))
            seen = self.op("And", seen, near)
        return seen


def _dtype_of(values: Sequence[ir.Value | None]) -> ir.DataType:
    found = next((v.dtype for v in values if v is not None and v.dtype is not None), None)
    return found or ir.DataType.FLOAT


def _given(node: ir.Node, at: int) -> ir.Value | None:
    value = node.inputs[at] if at < len(node.inputs) else None
    return value if value is not None and value.name else None


def _needed(node: ir.Node, at: int) -> ir.Value:
    value = _given(node, at)
    if value is None:
        raise _Not(f"its input {at} is missing")
    return value


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise _Not(f"the shape of {value.name} is not known")
    return len(value.shape)


def _size(value: ir.Value, dim: int) -> int:
    size = value.shape[dim] if value.shape is not None and len(value.shape) else None
    if not isinstance(size, int):
        raise _Not(f"dimension {dim} of {value.name} is not a number")
    return size


def _without(node: ir.Node, reasons: Mapping[int, str]) -> None:
    for at, reason in reasons.items():
        if _given(node, at) is not None:
            raise _Not(reason)


_CACHE = "it attends to keys of earlier calls (a cache)"


def _visible(writer: _Writer, mask: ir.Value, keys: ir.Value, query: ir.Value) -> ir.Value:
    """Which keys a mask of the runtime's own kind leaves: of integers per key, or lengths of the sequences."""
    rank = _rank(mask)
    if rank == 1:
        if mask.shape is None or query.shape is None or str(mask.shape[0]) != str(query.shape[0]):
            raise _Not("its mask holds positions in packed sequences")
        positions = writer.op("Unsqueeze", writer.range(writer.shape(keys, 2)), [0])
        ends = writer.op("Unsqueeze", writer.cast(mask, ir.DataType.INT64), [1])
        seen = writer.op("Less", positions, ends)
        return writer.op("Unsqueeze", seen, [1, 2])
    if rank > 3:
        raise _Not("its mask has four dimensions and is read by offsets")
    real = writer.op("Not", writer.op("Equal", writer.cast(mask, ir.DataType.INT64), 0))
    return writer.op("Unsqueeze", real, [1, 2] if rank == 2 else [1])


def _attention(node: ir.Node, writer: _Writer) -> _Parts:
    """``com.microsoft::Attention``: projections of one tensor, then attention."""
    _without(node, {4: _CACHE})
    if attribute(node, "do_rotary", 0):
        raise _Not("it rotates its queries and keys")
    x, weights = _needed(node, 0), _needed(node, 1)
    total, heads = _size(weights, 1), writer.heads
    sizes = list(attribute(node, "qkv_hidden_sizes") or [total // 3] * 3)
    projected = writer.op("MatMul", x, weights)
    bias, at, parts = _given(node, 2), 0, []
    if bias is not None:
        projected = writer.op("Add", projected, bias)
    for size in sizes:
        parts.append(writer.split(writer.part(projected, at, size, 2), heads))
        at += size
    made = _Parts(
        parts[0],
        parts[1],
        parts[2],
        scale=float(attribute(node, "scale", 0.0) or 0.0) or (sizes[0] // heads) ** -0.5,
    )
    made.causal = bool(attribute(node, "unidirectional", 0))
    return _masked(made, node, writer, mask=3, bias=5)


def _masked(made: _Parts, node: ir.Node, writer: _Writer, mask: int, bias: int) -> _Parts:
    fill = float(attribute(node, "mask_filter_value", -10000.0) or -10000.0)
    added, hidden = _given(node, bias), _given(node, mask)
    if added is not None:
        made.added.append(added)
    if hidden is not None:
        made.kept.append((_visible(writer, hidden, made.key, _needed(node, 0)), fill))
    return made


def _multi_head(node: ir.Node, writer: _Writer) -> _Parts:
    """``com.microsoft::MultiHeadAttention``: queries, keys and values apart, or packed in a fifth dimension."""
    _without(node, {6: _CACHE, 7: _CACHE, 9: _CACHE})
    query, key, value, bias = _needed(node, 0), _given(node, 1), _given(node, 2), _given(node, 3)
    heads = writer.heads

    def packed(x: ir.Value, at: int) -> ir.Value:
        return writer.permute(writer.op("Gather", x, at, axis=3), (0, 2, 1, 3))

    if _rank(query) == 5:
        if bias is not None:
            raise _Not("a bias is added to packed queries, keys and values")
        parts, channels = [packed(query, at) for at in range(3)], _size(query, 4)
    else:
        channels = _size(query, 2) // heads
        sources: list[ir.Value | None] = [query, key, value]
        start = 0
        for at, x in enumerate(sources):
            if bias is not None and x is not None:
                if _rank(x) != 3:
                    raise _Not("a bias is added to keys that have heads already")
                size = _size(x, 2)
                sources[at] = writer.op("Add", x, writer.part(bias, start, size, 0))
                start += size
        first, second, third = sources
        if key is not None and _rank(key) == 5:
            pair = [packed(key, 0), packed(key, 1)]
        else:
            pair = []
            for x, original in ((second, key), (third, value)):
                if x is None or original is None:
                    raise _Not("its keys or values are missing")
                pair.append(x if _rank(original) == 4 else writer.split(x, heads))
        parts = [writer.split(first or query, heads), *pair]
    made = _Parts(
        parts[0], parts[1], parts[2], scale=float(attribute(node, "scale", 0.0) or 0.0) or channels**-0.5
    )
    made.causal = bool(attribute(node, "unidirectional", 0))
    return _masked(made, node, writer, mask=4, bias=5)


def _grouped(node: ir.Node, writer: _Writer) -> _Parts:
    """``com.microsoft::GroupQueryAttention`` on a whole prompt: causal, several query heads to a key head."""
    _without(node, {3: _CACHE, 4: _CACHE, 11: "it has sinks of its own"})
    if attribute(node, "do_rotary", 0):
        raise _Not("it rotates its queries and keys")
    if attribute(node, "smooth_softmax", 0) or attribute(node, "qk_output", 0):
        raise _Not("it smooths its softmax or gives its scores")
    kv_heads, heads = int(attribute(node, "kv_num_heads")), writer.heads
    query, key, value = _needed(node, 0), _given(node, 1), _given(node, 2)
    if key is None or value is None:
        channels = _size(query, 2) // (heads + 2 * kv_heads)
        wide, narrow = heads * channels, kv_heads * channels
        whole = query
        query, key, value = (
            writer.part(whole, start, size, 2)
            for start, size in ((0, wide), (wide, narrow), (wide + narrow, narrow))
        )
    else:
        channels = _size(query, 2) // heads
    made = _Parts(
        writer.split(query, heads),
        writer.split(key, kv_heads),
        writer.split(value, kv_heads),
        heads // kv_heads,
    )
    made.scale = float(attribute(node, "scale", 0.0) or 0.0) or channels**-0.5
    made.cap = float(attribute(node, "softcap", 0.0) or 0.0)
    made.causal, made.window = True, max(int(attribute(node, "local_window_size", -1)), 0)
    lengths, bias = _needed(node, 5), _given(node, 10)
    if bias is not None:
        made.added.append(bias)
    positions = writer.op("Unsqueeze", writer.range(writer.shape(made.key, 2)), [0])
    last = writer.op("Reshape", writer.cast(lengths, ir.DataType.INT64), [-1, 1])
    seen = writer.op("Unsqueeze", writer.op("LessOrEqual", positions, last), [1, 2])
    made.kept.append((seen, float("-inf")))
    return made


def _standard(node: ir.Node, writer: _Writer) -> _Parts | None:
    """The standard ``Attention`` with heads folded into three dimensions; one of four is read as it is."""
    _without(node, {4: _CACHE, 5: _CACHE, 6: "it is told the lengths of a cache"})
    if attribute(node, "softcap", 0.0):
        raise _Not("its soft cap and its mask are applied in an order that runtimes disagree on")
    if attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3:
        raise _Not("it gives its scores")
    query = _needed(node, 0)
    if _rank(query) != 3:
        return None
    heads, kv_heads = writer.heads, int(attribute(node, "kv_num_heads", 0) or 0)
    if not heads or not kv_heads:
        raise _Not("it does not say its number of heads")
    scale = float(attribute(node, "scale", 0.0) or 0.0) or (_size(query, 2) // heads) ** -0.5
    q, k, v = (writer.split(_needed(node, at), n) for at, n in enumerate((heads, kv_heads, kv_heads)))
    made = _Parts(q, k, v, heads // kv_heads, scale, causal=bool(attribute(node, "is_causal", 0)))
    mask = _given(node, 3)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        made.kept.append((mask, float("-inf")))
    elif mask is not None:
        made.added.append(mask)
    return made


_RULES: Mapping[tuple[str, str], Callable[[ir.Node, _Writer], _Parts | None]] = {
    ("", "Attention"): _standard,
    (MICROSOFT, "Attention"): _attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
    (MICROSOFT, "GroupQueryAttention"): _grouped,
}
