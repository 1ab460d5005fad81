"""What a function body is made of, and what the bodies of all operators share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, SiteSpec, Support, no
from fastattn_compile.operators.mask import MaskStructure

DOMAIN = "fastattn"
DOMAIN_VERSION = 1


@dataclass(frozen=True)
class BodySpec:
    """The site a body is written for.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of query and key.
        value_dim: Channels of value.
        scale: Factor on the scores.
        mask: The mask.
        dtype: Type of the tensors.
        opset: Version of the standard operators.
        longest: Tokens of the longest sequence that will come.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask: MaskStructure
    dtype: ir.DataType
    opset: int
    longest: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def site(self) -> SiteSpec:
        """The site as an operator sees it, at its longest."""
        return SiteSpec(
            1, self.heads, self.kv_heads, self.longest, self.longest, self.head_dim, self.value_dim, mask=self.mask
        )  # fmt: skip


@dataclass(frozen=True)
class BodyInputs:
    """The inputs of a body.

    Args:
        query: ``(batch, heads, n, head_dim)``.
        key: ``(batch, kv_heads, n, head_dim)``.
        value: ``(batch, kv_heads, n, value_dim)``.
        key_padding: ``(batch, n)`` boolean, true where a token is real; ``None`` without padding.
        parameters: Learned parameters, in the operator's order.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    key_padding: ir.Value | None = None
    parameters: tuple[ir.Value, ...] = ()


@dataclass(frozen=True)
class Body:
    """How an operator is said in standard operators.

    Args:
        op_type: Name of its node in our domain.
        version: Raised with every change of what the body computes; native kernels check it.
        supports: Whether the body can serve a site.
        write: Writes the body and returns the output, ``(batch, heads, n, value_dim)``.
        attributes: What the node says of itself, besides ``scale``, ``mask`` and ``body_version``.
    """

    op_type: str
    version: int
    supports: Callable[[Operator, BodySpec], Support]
    write: Callable[[OnnxWriter, Operator, BodySpec, BodyInputs], ir.Value]
    attributes: Callable[[Operator, BodySpec], Mapping[str, Any]]


def computed(spec: BodySpec) -> BodySpec:
    """The site as its body computes it: runtimes on CPUs have no products in bfloat16, so that is float32 inside."""
    if spec.dtype != ir.DataType.BFLOAT16:
        return spec
    return dataclasses.replace(spec, dtype=ir.DataType.FLOAT)


def hidden(spec: BodySpec) -> float:
    """The score of a hidden key: low enough to weigh nothing, and still a number in the type."""
    return -6e4 if spec.dtype == ir.DataType.FLOAT16 else -1e30


def only(mask: MaskStructure, *understood: str) -> Support:
    """Refuses masks with terms a body does not write."""
    strange = mask.conflicts(*understood)
    return no(f"its ONNX body does not serve {', '.join(strange)} masks ({mask})") if strange else Support()


def highest(w: OnnxWriter, bias: ir.Value, spec: BodySpec) -> ir.Value:
    """The largest entry of every row, kept as a dimension of 1 (the axis moved from attribute to input in opset 18)."""
    if spec.opset < 18:
        return w.op("ReduceMax", bias, axes=[-1], keepdims=1)
    return w.op("ReduceMax", bias, [-1], keepdims=1)


def with_mass(w: OnnxWriter, scores: ir.Value, values: ir.Value, spec: BodySpec) -> ir.Value:
    """Softmax attention of ``(..., r, t)`` scores with the log-sum-exp as one more channel, ``(..., r, e + 1)``."""
    top = highest(w, scores, spec)
    weights = w.op("Exp", w.op("Sub", scores, top))
    total = w.op("ReduceSum", weights, [-1], keepdims=1)
    out = w.op("Div", w.op("MatMul", weights, values), total)
    result: ir.Value = w.op("Concat", out, w.op("Add", top, w.op("Log", total)), axis=-1)
    return result


def lowest(w: OnnxWriter, x: ir.Value, spec: BodySpec, keepdims: int = 0) -> ir.Value:
    """The smallest entry of every row."""
    if spec.opset < 18:
        return w.op("ReduceMin", x, axes=[-1], keepdims=keepdims)
    return w.op("ReduceMin", x, [-1], keepdims=keepdims)


def merged(w: OnnxWriter, query: ir.Value, spec: BodySpec) -> ir.Value:
    """``(b, h, n, d)`` as ``(b, g, group * n, d)``: the query heads of a key head one after another."""
    if spec.group == 1:
        return query
    return w.op("Reshape", query, [0, spec.kv_heads, -1, spec.head_dim])


def grouped(w: OnnxWriter, query: ir.Value, spec: BodySpec) -> ir.Value:
    """``(b, h, n, d)`` as ``(b, g, group, n, d)``."""
    return w.op("Reshape", query, [0, spec.kv_heads, spec.group, -1, spec.head_dim])
