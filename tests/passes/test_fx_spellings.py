"""The FX view: every spelling of a computation reads the same."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import single_call

from fastattn_compile.passes.fx_view import view
from fastattn_compile.passes.graph import Node

torch.set_num_threads(1)
aten, prims = torch.ops.aten, torch.ops.prims

X = torch.randn(2, 3, 4)  # what most samples work on
Y = torch.randn(2, 3, 4)
M = torch.rand(2, 3, 4) < 0.5
N = torch.rand(2, 3, 4) < 0.5
K = torch.arange(24).reshape(2, 3, 4)
ALL = slice(None)


def plain(value: Any) -> Any:
    """Attributes without nodes, for comparison."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (tuple, list)):
        return tuple(plain(item) for item in value)
    return value


def read(target: Any, *args: Any, **kwargs: Any) -> Node:
    """The node of the view that a single call becomes: for a tuple, that of its first element."""
    gm, _ = single_call(target, *args, **kwargs)
    (output,) = view(gm).of_kind("output")
    node: Node = output.inputs[0]
    # The first result of a call that gives several is that call.
    return node.operands[0] if node.kind == "identity" and node.operands[0].inputs else node


def summary(node: Node) -> tuple[Any, ...]:
    """Kind, operands by kind and name, attributes."""
    operands = tuple(
        summary(x) if isinstance(x, Node) and x.origin is None else x.name if isinstance(x, Node) else x
        for x in node.inputs
    )
    return node.kind, operands, {key: plain(value) for key, value in node.attributes.items()}


def same(name: str, expected: tuple[Any, ...], *calls: tuple[Any, ...]) -> list[Any]:
    """Test parameters: all calls must read as ``expected``: kind, operands, attributes."""
    return [pytest.param(call, expected, id=f"{name}-{i}") for i, call in enumerate(calls)]


def keyword(target: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return (target, args, kwargs)


SPELLINGS = [
    *same("softmax", ("softmax", ("x0",), {"dim": 2}),
        (torch.softmax, X, -1), (F.softmax, X, 2), ("softmax", X, -1), keyword(F.softmax, X, dim=-1),
        keyword("softmax", X, dim=-1), keyword(torch.softmax, input=X, dim=-1),
        (aten._softmax.default, X, -1, False),
        (aten._safe_softmax.default, X, -1), (torch.special.softmax, X, -1), (aten.softmax.int, X, -1),
        keyword(F.softmax, X, dim=-1, dtype=torch.float64), keyword(F.softmax, X, -1, _stacklevel=5)),
    *same("log_softmax", ("log_softmax", ("x0",), {"dim": 1}),
        (torch.log_softmax, X, -2), (F.log_softmax, X, 1), ("log_softmax", X, 1),
        (aten._log_softmax.default, X, 1, False)),
    *same("softmin", ("softmax", (("neg", ("x0",), {}),), {"dim": 2}), keyword(F.softmin, X, dim=-1)),
    *same("add", ("add", ("x0", "x1"), {}),
        (operator.add, X, Y), (torch.add, X, Y), ("add", X, Y), ("__add__", X, Y), ("add_", X, Y),
        ("__iadd__", X, Y),
        (operator.iadd, X, Y), (aten.add.Tensor, X, Y), keyword(torch.add, X, other=Y),
        keyword(torch.add, input=X, other=Y),
        keyword("add", X, Y, alpha=1)),
    *same("add-number", ("add", ("x0", 3.0), {}), (operator.add, X, 3.0), (aten.add.Scalar, X, 3.0),
        ("add_", X, 3.0),
        (operator.iadd, X, 3.0)),
    *same("add-alpha", ("add", ("x0", ("mul", ("x1", 2), {})), {}),
        keyword(torch.add, X, Y, alpha=2), keyword(aten.add.Tensor, X, Y, alpha=2)),
    *same("sub", ("sub", ("x0", "x1"), {}),
        (operator.sub, X, Y), (torch.subtract, X, Y), ("sub_", X, Y), ("__isub__", X, Y),
        (aten.sub.Tensor, X, Y)),
    *same("rsub", ("sub", (1.0, "x0"), {}),
        (operator.sub, 1.0, X), (torch.rsub, X, 1.0), ("__rsub__", X, 1.0), (aten.rsub.Scalar, X, 1.0)),
    *same("rsub-alpha", ("sub", (1.0, ("mul", ("x0", 2), {})), {}), keyword(torch.rsub, X, 1.0, alpha=2)),
    *same("mul", ("mul", ("x0", "x1"), {}),
        (operator.mul, X, Y), (torch.multiply, X, Y), ("mul_", X, Y), (operator.imul, X, Y),
        (aten.mul.Tensor, X, Y)),
    *same("div", ("div", ("x0", "x1"), {}),
        (operator.truediv, X, Y), (torch.div, X, Y), (torch.true_divide, X, Y), ("div_", X, Y),
        ("__itruediv__", X, Y),
        (operator.itruediv, X, Y), ("divide", X, Y), (aten.div.Tensor, X, Y)),
    *same("rdiv", ("div", (2.0, "x0"), {}), (operator.truediv, 2.0, X), ("__rtruediv__", X, 2.0)),
    *same("reciprocal", ("div", (1, "x0"), {}), (torch.reciprocal, X), ("reciprocal", X)),
    *same("floordiv", ("floordiv", ("x0", 2), {}),
        (operator.floordiv, K, 2), (torch.floor_divide, K, 2), ("__floordiv__", K, 2),
        keyword(torch.div, K, 2, rounding_mode="floor")),
    *same("mod", ("mod", ("x0", 2), {}), (operator.mod, K, 2), (torch.remainder, K, 2), ("remainder", K, 2),
        ("__mod__", K, 2)),
    *same("pow", ("pow", ("x0", 2), {}),
        (operator.pow, X, 2), (torch.pow, X, 2), ("pow", X, 2), ("__pow__", X, 2),
        (aten.pow.Tensor_Scalar, X, 2),
        keyword(torch.pow, X, exponent=2), (torch.square, X), ("square", X)),
    *same("rpow", ("pow", (2, "x0"), {}), (operator.pow, 2, X), ("__rpow__", X, 2), (torch.pow, 2, X),
        (torch.exp2, X)),
    *same("maximum", ("maximum", ("x0", "x1"), {}),
        (torch.maximum, X, Y), (torch.max, X, Y), ("max", X, Y), keyword("max", X, other=Y),
        keyword(torch.clamp, X, min=Y)),
    *same("minimum", ("minimum", ("x0", "x1"), {}), (torch.minimum, X, Y), (torch.min, X, Y),
        keyword("clamp", X, max=Y)),
    *same("neg", ("neg", ("x0",), {}), (operator.neg, X), (torch.neg, X), ("neg_", X), ("__neg__", X),
        (torch.negative, X)),
    *same("abs", ("abs", ("x0",), {}), (operator.abs, X), (torch.abs, X), ("abs", X), (torch.absolute, X)),
    *same("tanh", ("tanh", ("x0",), {}), (torch.tanh, X), (F.tanh, X), ("tanh", X), ("tanh_", X),
        (aten.tanh.default, X)),
    *same("exp", ("exp", ("x0",), {}), (torch.exp, X), ("exp_", X), (aten.exp.default, X)),
    *same("sigmoid", ("sigmoid", ("x0",), {}), (torch.sigmoid, X), (F.sigmoid, X), (torch.special.expit, X)),
    *same("relu", ("relu", ("x0",), {}), (F.relu, X), (torch.relu, X), ("relu", X), (aten.relu.default, X)),
    *same("le", ("le", ("x0", "x1"), {}),
        (operator.le, X, Y), (torch.le, X, Y), ("le", X, Y), ("__le__", X, Y), (torch.less_equal, X, Y),
        (aten.le.Tensor, X, Y)),
    *same("gt", ("gt", ("x0", 0), {}), (operator.gt, X, 0), (torch.greater, X, 0), ("gt", X, 0),
        (aten.gt.Scalar, X, 0)),
    *same("ne", ("ne", ("x0", 1), {}), (operator.ne, K, 1), (torch.not_equal, K, 1), ("ne", K, 1)),
    *same("and", ("and", ("x0", "x1"), {}),
        (operator.and_, M, N), (torch.logical_and, M, N), (torch.bitwise_and, M, N), ("__and__", M, N),
        (operator.iand, M, N),
        ("logical_and", M, N), ("bitwise_and_", M, N), (operator.mul, M, N), (aten.bitwise_and.Tensor, M, N)),
    *same("or", ("or", ("x0", "x1"), {}),
        (operator.or_, M, N), (torch.logical_or, M, N), ("__ior__", M, N), (operator.add, M, N),
        (torch.bitwise_or, M, N)),
    *same("xor", ("ne", ("x0", "x1"), {}), (operator.xor, M, N), (torch.logical_xor, M, N),
        ("__xor__", M, N)),
    *same("not", ("not", ("x0",), {}),
        (operator.invert, M), (torch.logical_not, M), ("logical_not", M), (torch.bitwise_not, M),
        ("__invert__", M),
        ("bitwise_not", M)),
    *same("truth", ("and", (("ne", ("x0", 0), {}), "x1"), {}), (torch.logical_and, K, M)),
    *same("falsehood", ("eq", ("x0", 0), {}), (torch.logical_not, K), (operator.eq, K, 0)),
    *same("where", ("where", ("x0", "x1", "x2"), {}),
        (torch.where, M, X, Y), keyword(torch.where, M, input=X, other=Y), (aten.where.self, M, X, Y)),
    *same("method-where", ("where", ("x1", "x0", "x2"), {}), ("where", X, M, Y)),
    *same("masked_fill", ("where", ("x1", -math.inf, "x0"), {}),
        ("masked_fill", X, M, -math.inf), ("masked_fill_", X, M, -math.inf),
        (torch.masked_fill, X, M, -math.inf),
        keyword("masked_fill", X, mask=M, value=-math.inf), (aten.masked_fill.Scalar, X, M, -math.inf)),
    *same("clamp", ("clamp", ("x0",), {"min": 0.0, "max": None}),
        keyword(torch.clamp, X, min=0.0), ("clamp", X, 0.0), (torch.clamp_min, X, 0.0),
        ("clamp_min_", X, 0.0),
        (torch.clip, X, 0.0), keyword("clip", X, min=0.0)),
    *same("clamp-both", ("clamp", ("x0",), {"min": -1.0, "max": 1.0}),
        (torch.clamp, X, -1.0, 1.0), (F.hardtanh, X), keyword(F.hardtanh, X, min_val=-1.0, max_val=1.0)),
    *same("sum", ("sum", ("x0",), {"dims": (2,), "keepdim": True}),
        keyword(torch.sum, X, -1, keepdim=True), ("sum", X, -1, True),
        keyword("sum", X, dim=(2,), keepdim=True),
        keyword("sum", X, axis=-1, keepdims=True), (aten.sum.dim_IntList, X, [-1], True)),
    *same("sum-all", ("sum", ("x0",), {"dims": (0, 1, 2), "keepdim": False}), (torch.sum, X), ("sum", X)),
    *same("amax", ("amax", ("x0",), {"dims": (2,), "keepdim": True}),
        (torch.amax, X, -1, True), keyword("amax", X, dim=-1, keepdim=True), (torch.max, X, -1, True),
        keyword("max", X, dim=-1, keepdim=True), (aten.max.dim, X, -1, True),
        (aten.amax.default, X, [-1], True)),
    *same("amax-all", ("amax", ("x0",), {"dims": (0, 1, 2), "keepdim": False}), (torch.max, X), ("max", X)),
    *same("cumsum", ("cumsum", ("x0",), {"dim": 2}), (torch.cumsum, X, -1), keyword("cumsum", X, dim=-1),
        ("cumsum", X, 2)),
    *same("tril", ("tril", ("x0",), {"diagonal": 0}), (torch.tril, X), ("tril", X), ("tril_", X),
        (aten.tril.default, X)),
    *same("triu", ("triu", ("x0",), {"diagonal": 1}), (torch.triu, X, 1), keyword("triu", X, diagonal=1)),
    *same("cast", ("cast", ("x0",), {}),
        ("to", X, torch.float64), keyword("to", X, dtype=torch.float64), ("double", X), ("half", X),
        ("type", X, torch.int64),
        ("type_as", X, K), ("bool", X), ("to", X, "cpu", torch.float16), ("long", X),
        keyword(aten._to_copy.default, X, dtype=torch.float64),
        (prims.convert_element_type.default, X, torch.float64)),
    *same("identity", ("identity", ("x0",), {}),
        ("contiguous", X), ("clone", X), (torch.clone, X), ("detach", X), (torch.detach, X),
        ("to", X, "cpu"), ("float", X),
        ("to", X, torch.float32), ("type_as", X, Y), (aten.alias.default, X), ("cpu", X),
        (torch.positive, X), (aten.clone.default, X), (aten.lift_fresh_copy.default, X)),
    *same("reshape", ("reshape", ("x0",), {}),
        ("view", X, 6, 4), ("view", X, (6, 4)), ("reshape", X, -1, 4), (torch.reshape, X, (6, 4)),
        ("flatten", X, 0, 1),
        (torch.flatten, X), ("unflatten", X, -1, (2, 2)), ("unsqueeze", X, 0), (torch.unsqueeze, X, 1),
        ("squeeze", X),
        ("view_as", X, torch.zeros(6, 4)), (aten.view.default, X, [6, 4]),
        (aten._unsafe_view.default, X, [6, 4]),
        ("ravel", X), (aten.unsqueeze.default, X, 1), ("unsqueeze_", X, 0)),
    *same("permute", ("permute", ("x0",), {"dims": (0, 2, 1)}),
        ("transpose", X, 1, 2), ("transpose", X, -1, -2), (torch.transpose, X, 1, 2), ("permute", X, 0, 2, 1),
        ("permute", X, (0, 2, 1)), (torch.permute, X, (0, -1, -2)), ("swapaxes", X, 1, 2),
        ("swapdims", X, 1, 2),
        (getattr, X, "mT"), (torch.adjoint, X), (getattr, X, "mH"), (torch.movedim, X, 1, 2), ("movedim", X,
        (1,), (2,)),
        (torch.moveaxis, X, 2, 1), keyword(torch.transpose, X, dim0=1, dim1=2), (aten.transpose.int, X, 1, 2),
        (aten.permute.default, X, [0, 2, 1]), keyword("permute", X, dims=(0, 2, 1))),
    *same("t", ("permute", ("x0",), {"dims": (1, 0)}),
        ("t", X[0]), (torch.t, X[0]), (getattr, X[0], "T"), (aten.t.default, X[0]),
        (torch.einsum, "ij->ji", X[0])),
    *same("reverse", ("permute", ("x0",), {"dims": (2, 1, 0)}), ("permute", X, 2, 1, 0), (torch.movedim, X,
        (0, 1), (2, 1))),
    *same("expand", ("expand", ("x0",), {}),
        ("expand", X[:, :1], 2, 3, 4), ("expand", X[:, :1], (-1, 3, -1)), ("expand_as", X[:, :1], X),
        (torch.broadcast_to, X[:, :1], (2, 3, 4)), (aten.expand.default, X[:, :1], [2, 3, 4]),
        (torch.broadcast_tensors, X[:, :1], X)),
    *same("repeat", ("repeat", ("x0",), {"repeats": (1, 2, 1)}),
        ("repeat", X, 1, 2, 1), ("repeat", X, (1, 2, 1)), (torch.tile, X, (2, 1)),
        (aten.repeat.default, X, [1, 2, 1]),
        keyword(torch.tile, X, dims=(2, 1))),
    *same("repeat_interleave", ("repeat_interleave", ("x0",), {"repeats": 2, "dim": 1}),
        (torch.repeat_interleave, X, 2, 1), keyword("repeat_interleave", X, 2, dim=-2),
        (aten.repeat_interleave.self_int, X, 2, 1),
        keyword(torch.repeat_interleave, X, repeats=2, dim=1)),
    *same("cat", ("cat", ("x0", "x1"), {"dim": 2}),
        (torch.cat, [X, Y], -1), keyword(torch.cat, (X, Y), dim=2), (torch.concat, [X, Y], -1),
        (aten.cat.default, [X, Y], -1),
        keyword(torch.cat, tensors=[X, Y], dim=-1), keyword(torch.concatenate, [X, Y], axis=-1)),
    *same("stack", ("cat", (("reshape", ("x0",), {}), ("reshape", ("x1",), {})), {"dim": 1}),
        (torch.stack, [X, Y], 1), keyword(torch.stack, [X, Y], dim=-3), (aten.stack.default, [X, Y], 1)),
    *same("index-slice", ("index", ("x0",), {"index": (ALL, slice(1, 3, None), ALL)}),
        (operator.getitem, X, (ALL, slice(1, None))), (operator.getitem, X, (ALL, slice(-2, None))),
        (operator.getitem, X, (Ellipsis, slice(1, 99), ALL)), (aten.slice.Tensor, X, 1, 1, 2**63 - 1),
        ("narrow", X, 1, 1, 2), ("narrow", X, -2, -2, 2), keyword(torch.narrow, X, dim=1, start=1, length=2),
        ("__getitem__", X, (ALL, slice(1, 3)))),
    *same("index-first", ("index", ("x0",), {"index": (ALL, ALL, slice(0, 2, None))}),
        (operator.getitem, X, (Ellipsis, slice(None, 2))), (torch.chunk, X, 2, -1), ("chunk", X, 2, 2),
        ("split", X, 2, -1),
        (torch.split, X, 2, 2), keyword("split", X, [2, 2], dim=-1), (torch.tensor_split, X, 2, -1),
        (aten.split.Tensor, X, 2, -1), (aten.split_with_sizes.default, X, [2, 2], -1),
        (aten.slice.Tensor, X, 2, 0, 2)),
    *same("index-step", ("index", ("x0",), {"index": (ALL, ALL, slice(1, 4, 2))}),
        (operator.getitem, X, (Ellipsis, slice(1, None, 2))), (aten.slice.Tensor, X, 2, 1, 4, 2)),
    *same("index-select", ("index", ("x0",), {"index": (ALL, 2, ALL)}),
        (operator.getitem, X, (ALL, 2)), (operator.getitem, X, (ALL, -1)), ("select", X, 1, -1),
        (torch.select, X, 1, 2),
        (aten.select.int, X, 1, 2)),
    *same("index-0", ("index", ("x0",), {"index": (0, ALL, ALL)}),
        (operator.getitem, X, 0), (torch.unbind, X), ("unbind", X, 0), (operator.getitem, X, (0, Ellipsis))),
    *same("index-new", ("index", ("x0",), {"index": (ALL, None, ALL, ALL, None)}),
        (operator.getitem, X, (ALL, None, Ellipsis, None)), (operator.getitem, X,
        (ALL, None, ALL, ALL, None))),
    *same("index-all", ("identity", ("x0",), {}),
        (operator.getitem, X, (ALL, slice(0, 3))), (operator.getitem, X, Ellipsis),
        (aten.slice.Tensor, X, 1)),
    *same("index-tensor", ("index", ("x0", "x1"), {"index": (ALL, "x1", ALL)}),
        (operator.getitem, X, (ALL, K[0, 0, :2])), (torch.index_select, X, 1, K[0, 0, :2]),
        ("index_select", X, -2, K[0, 0, :2]), (aten.index.Tensor, X, [None, K[0, 0, :2]])),
    *same("full", ("full", (), {"value": 0.0}),
        (torch.zeros, 2, 3), (torch.zeros, (2, 3)), (torch.zeros_like, X), ("new_zeros", X, 2, 3),
        (torch.full, (2,), 0.0),
        (torch.full_like, X, 0), ("new_full", X, (2,), 0.0), (torch.tensor, 0.0), (torch.scalar_tensor, 0.0),
        keyword(torch.full, (2,), fill_value=0.0), (aten.full.default, [2], 0.0),
        (aten.zeros_like.default, X),
        (torch.fill, X, 0.0), ("zero_", X), ("fill_", X, 0.0)),
    *same("ones", ("full", (), {"value": True}),
        keyword(torch.ones, 2, 3, dtype=torch.bool), keyword("new_ones", X, (), dtype=torch.bool),
        (torch.ones_like, M),
        keyword(torch.full, (2,), True), (torch.tensor, True)),
    *same("literal", ("constant", (), {"value": (1, 2)}), (torch.tensor, [1, 2]), (torch.as_tensor, (1, 2))),
    *same("arange", ("arange", (), {"start": 0, "step": 1}),
        (torch.arange, 5), (torch.arange, 0, 5), keyword(torch.arange, end=5),
        keyword(torch.arange, 5, dtype=torch.float32),
        (aten.arange.default, 5), (aten.arange.start, 0, 5),
        keyword(prims.iota.default, 5, start=0, step=1, dtype=torch.int64, device="cpu",
        requires_grad=False)),
    *same("arange-step", ("arange", (), {"start": 2, "step": 3}),
        (torch.arange, 2, 9, 3), keyword(torch.arange, start=2, end=9, step=3),
        (aten.arange.start_step, 2, 9, 3)),
    *same("matmul", ("matmul", ("x0", "x1"), {}),
        (operator.matmul, X, Y.mT), (torch.matmul, X, Y.mT), ("matmul", X, Y.mT), ("__matmul__", X, Y.mT),
        (torch.bmm, X, Y.mT),
        ("bmm", X, Y.mT), (torch.mm, X[0], Y[0].mT), keyword(torch.matmul, X, other=Y.mT),
        (aten.bmm.default, X, Y.mT),
        keyword(torch.bmm, X, mat2=Y.mT), keyword(torch.bmm, input=X, mat2=Y.mT)),
    *same("linear", ("linear", ("x0", "x1", "x2"), {}), (F.linear, X, Y[0], torch.randn(3)),
        keyword(F.linear, X, Y[0], bias=torch.randn(3)), (aten.linear.default, X, Y[0], torch.randn(3))),
    *same("linear-no-bias", ("linear", ("x0", "x1", None), {}), (F.linear, X, Y[0]),
        (F.linear, X, Y[0], None)),
    *same("baddbmm", ("baddbmm", ("x0", "x1", "x2"), {"beta": 0.5, "alpha": 2}),
        keyword(torch.baddbmm, X[..., :3], X, Y.mT, beta=0.5, alpha=2),
        keyword("baddbmm", X[..., :3], batch1=X, batch2=Y.mT, beta=0.5, alpha=2),
        keyword(aten.baddbmm.default, X[..., :3], X, Y.mT, beta=0.5, alpha=2),
        keyword(torch.addmm, X[0, :, :3], X[0], Y[0].mT, beta=0.5, alpha=2)),
    *same("einsum", ("einsum", ("x0", "x1"), {"equation": "bid,bjd->bij"}),
        (torch.einsum, "bid,bjd->bij", X, Y), (torch.einsum, "b i d, b j d -> b i j", X, Y),
        (torch.einsum, "bid,bjd->bij", [X, Y]), (torch.einsum, "bid,bjd->bij", (X, Y)),
        (aten.einsum.default, "bid,bjd->bij", [X, Y])),
    *same("einsum-dots", ("einsum", ("x0", "x1"), {"equation": "...id,...jd->...ij"}),
        (torch.einsum, "...id,...jd->...ij", X, Y), (torch.einsum, "...id, ...jd -> ...ij", X, Y)),
    *same("einsum-implicit", ("einsum", ("x0", "x1"), {"equation": "bid,bjd->ij"}),
        (torch.einsum, "bid,bjd", X, Y)),
    *same("einsum-list", ("einsum", ("x0", "x1"), {"equation": "ABD,ACD->ABC"}),
        (torch.einsum, X, [0, 1, 3], Y, [0, 2, 3], [0, 1, 2])),
    *same("tensordot", ("einsum", ("x0", "x1"), {"equation": "abc,dec->abde"}),
        keyword(torch.tensordot, X, Y, dims=([2], [2])), keyword(torch.tensordot, X, Y, ([-1], [-1]))),
    *same("embedding", ("embedding", ("x0", "x1"), {}), (F.embedding, K[0] % 3, X[0])),
    *same("aten-embedding", ("embedding", ("x1", "x0"), {}), (aten.embedding.default, X[0], K[0] % 3),
        (torch.embedding, X[0], K[0] % 3)),
    *same("no-dropout", ("dropout", ("x0",), {"p": 0.0}),
        (F.dropout, X, 0.5, False), keyword(F.dropout, X, p=0.5, training=False),
        (torch.dropout, X, 0.5, False),
        keyword(F.dropout, X, p=0.0), (aten.native_dropout.default, X, 0.5, False),
        (F.dropout1d, X, 0.5, False)),
    *same("dropout", ("dropout", ("x0",), {"p": 0.25}),
        (F.dropout, X, 0.25), (torch.dropout, X, 0.25, True),
        keyword(F.dropout, X, p=0.25, training=True, inplace=False),
        (aten.native_dropout.default, X, 0.25, True)),
    *same("diff", ("diff", ("x0", "x1"), {"dim": 2}),
        keyword(torch.diff, X, prepend=Y[..., :1]), keyword("diff", X, dim=-1, prepend=Y[..., :1])),
    *same("masked_softmax", ("softmax", (("where", ("x1", -math.inf, "x0"), {}),), {"dim": 2}),
        (torch._masked_softmax, X, M, 2, 2), (aten._masked_softmax.default, X, M, -1, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "expected"), SPELLINGS)
def test_spellings(call: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    if len(call) == 3 and isinstance(call[2], dict):
        target, args, kwargs = call
    else:
        target, args, kwargs = call[0], call[1:], {}
    node = read(target, *args, **kwargs)
    assert summary(node) == expected
    if expected[0] != "linear":
        assert {type(v) for v in summary(node)[2].values()} == {type(v) for v in expected[2].values()}
