"""Trees in C++: routing, ranges of keys sorted by node, sums of nodes. What is served, and the calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_tc import Cut, Weighting
from fastattn_compile.kernels.cpu.arguments import dense_rows, fresh
from fastattn_compile.kernels.cpu.build import library, obstacle

# A caller with threads of its own; here those of OpenMP serve.
_OWN_THREADS = (("spread", ctypes.c_void_p), ("pool", ctypes.c_void_p))


class _Route(ctypes.Structure):
    """``RouteArgs`` of ``trees.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "offset", "leaf", "scores")),
        ("x_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("b", "h", "t", "n", "d", "height")),
        *((name, ctypes.c_int32) for name in ("threads", "dtype")),
        *_OWN_THREADS,
    )


class _Path(ctypes.Structure):
    """``PathArgs`` of ``trees.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "slopes", "leaf", "grad_x", "grad_weight", "grad_offset")
        ),
        ("x_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("b", "h", "t", "n", "d", "height")),
        ("threads", ctypes.c_int32),
        *_OWN_THREADS,
    )


class _Climb(ctypes.Structure):
    """``ClimbArgs`` of ``trees.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("key_leaf", "query_leaf", "key_segment", "query_segment", "gone")
        ),
        *((name, ctypes.c_void_p) for name in ("low", "high", "order", "start", "stop", "level", "node")),
        *((name, ctypes.c_int64) for name in ("b", "u", "r", "n", "m", "height", "deepest", "segments")),
        *((name, ctypes.c_int32) for name in ("ancestors", "threads")),
        *_OWN_THREADS,
    )


class _Coarse(ctypes.Structure):
    """``CoarseArgs`` of ``trees.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key_leaf", "query_leaf", "real", "value", "learned", "out", "seen")),
        *((name, ctypes.c_int64) for name in ("u", "r", "n", "L", "e", "height")),
        *((name, ctypes.c_int32) for name in ("causal", "softmax", "root", "threads")),
        ("share", ctypes.c_double), ("dtype", ctypes.c_int32),
        *_OWN_THREADS,
    )  # fmt: skip


def why_not(*tensors: Tensor) -> str:
    """Why C++ cannot serve these tensors, ``""`` when it can: it works in float32 on a CPU."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on a CPU, the tensors are on {x.device.type}"
        if x.dtype != torch.float32:
            return f"it works in float32, not {x.dtype}"
    return obstacle("trees")


def climbing_obstacle(leaf: Tensor) -> str:
    """Why C++ cannot climb these trees, ``""`` when it can."""
    return (
        f"it runs on a CPU, the trees are on {leaf.device.type}"
        if leaf.device.type != "cpu"
        else obstacle("trees")
    )


def follow(x: Tensor, weight: Tensor, offset: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """As ``kernels.aten.treeformer_route.follow``."""
    x, weight, offset = dense_rows(x), weight.contiguous(), offset.contiguous()
    batch, heads, length, _ = x.shape
    trees = weight.shape[1]
    leaf = torch.empty(batch, heads, trees, length, dtype=torch.int64)
    scores = torch.empty(batch, heads, trees, length, height)
    arguments = _Route(*(t.data_ptr() for t in (x, weight, offset, leaf, scores)))
    arguments.x_strides[:] = x.stride()[:3]
    arguments.b, arguments.h, arguments.n, arguments.d = x.shape
    arguments.t, arguments.height, arguments.threads = trees, height, torch.get_num_threads()
    library("trees").trees_route(ctypes.byref(arguments))
    return leaf, scores


def path_gradients(x: Tensor, weight: Tensor, leaf: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.aten.treeformer_route.path_gradients``."""
    x, weight, leaf, slopes = dense_rows(x), weight.contiguous(), leaf.contiguous(), slopes.contiguous()
    made = fresh(*x.shape), torch.empty_like(weight), torch.empty(weight.shape[:3])
    arguments = _Path(*(t.data_ptr() for t in (x, weight, slopes, leaf, *made)))
    arguments.x_strides[:] = x.stride()[:3]
    arguments.b, arguments.h, arguments.n, arguments.d = x.shape
    arguments.t, arguments.height = weight.shape[1], slopes.shape[-1]
    arguments.threads = torch.get_num_threads()
    library("trees").trees_path(ctypes.byref(arguments))
    return made


def climb(
    key_leaf: Tensor, query_leaf: Tensor, height: int, deepest: int, ancestors: bool, low: Tensor, high: Tensor,
    gone: Tensor | None, segments: int, key_segment: Tensor | None, query_segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``kernels.sorting.climb``; the fields of its ``Levels``."""
    given = {
        "key_leaf": key_leaf, "query_leaf": query_leaf, "low": low, "high": high, "gone": gone,
        "key_segment": key_segment, "query_segment": query_segment,
    }  # fmt: skip
    held = {name: x.contiguous() for name, x in given.items() if x is not None}
    units, length = key_leaf.shape
    order = torch.empty(units, deepest + 1 if ancestors else 1, length, dtype=torch.int64)
    start, stop, level, node = (torch.empty(query_leaf.shape, dtype=torch.int64) for _ in range(4))
    held |= {"order": order, "start": start, "stop": stop, "level": level, "node": node}
    arguments = _Climb(**{name: x.data_ptr() for name, x in held.items()})
    arguments.u, arguments.r, arguments.n = query_leaf.shape
    arguments.b, arguments.m = units if key_segment is None else len(key_segment), length
    arguments.height, arguments.deepest, arguments.segments = height, deepest, segments
    arguments.ancestors, arguments.threads = ancestors, torch.get_num_threads()
    used = library("trees").trees_climb(ctypes.byref(arguments))
    return order[:, :used], start, stop, level, node


def coarse(cut: Cut, value: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """As ``kernels.aten.treeformer_tc.forward``."""
    key_leaf, query_leaf, real = cut.key_leaf.contiguous(), cut.query_leaf.contiguous(), cut.real.contiguous()
    value, learned = value.contiguous(), weighting.learned.float().contiguous()
    out = fresh(*query_leaf.shape, value.shape[-1])
    seen = torch.empty(query_leaf.shape)
    arguments = _Coarse(*(t.data_ptr() for t in (key_leaf, query_leaf, real, value, learned, out, seen)))
    arguments.u, arguments.r = query_leaf.shape[:2]
    arguments.n, arguments.L = (
        query_leaf.shape[2] * query_leaf.shape[3],
        key_leaf.shape[1] * key_leaf.shape[2],
    )
    arguments.e, arguments.height = value.shape[-1], cut.height
    arguments.causal, arguments.softmax, arguments.root = cut.causal, weighting.softmax, weighting.root
    arguments.threads, arguments.share = torch.get_num_threads(), weighting.share
    library("trees").trees_coarse(ctypes.byref(arguments))
    return out, seen
