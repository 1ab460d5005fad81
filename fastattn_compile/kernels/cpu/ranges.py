"""Attention of every query to a range of a list of keys in C++, for leaves and windows: what it serves, and its calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_tf import NearPairs, Part, join
from fastattn_compile.kernels.aten.window import Band, Local
from fastattn_compile.kernels.cpu.arguments import TYPES, dense_rows, type_obstacle
from fastattn_compile.kernels.cpu.build import library, obstacle

_MOST = 2**31 - 1  # places and queries of one key head are counted in 32 bits


class _Arguments(ctypes.Structure):
    """``RangeArgs`` of ``ranges.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "log_sum_exp", "order", "start", "stop")),
        *((name, ctypes.c_void_p) for name in ("hidden", "low", "high", "extra", "extra_low", "extra_high")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("b", "h", "g", "n", "m", "d", "e", "lists", "s")),
        ("dtype", ctypes.c_int32), ("threads", ctypes.c_int32), ("scale", ctypes.c_float),
    )  # fmt: skip


def _counting_obstacle(query: Tensor, key: Tensor, lists: int) -> str:
    if max(query.shape[1] // key.shape[1] * query.shape[2], key.shape[2] * lists) > _MOST:
        return f"it counts to {_MOST}, got {query.shape[2]} queries and {key.shape[2]} keys"
    return ""


def why_not(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]) -> str:
    """Why the C++ kernel cannot serve leaf attention, ``""`` when it can.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, e)``.
        parts: Who meets whom.
    """
    if any(part.gate is not None for part in parts):
        return "a gate changes the scores"
    if any(not isinstance(part.hidden, (NearPairs, type(None))) for part in parts):
        return "pairs that an earlier tree met are hidden"
    counting = _counting_obstacle(query, key, max(len(part.ranges.levels) for part in parts))
    return counting or type_obstacle(query, key, value) or obstacle("ranges")


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part]
) -> tuple[Tensor, Tensor] | None:
    """As ``kernels.aten.treeformer_tf.attend``; ``None`` when a key or value that is met is not finite."""
    made: tuple[Tensor, Tensor] | None = None
    for part in parts:
        lists = {"order": part.ranges.order, "start": part.ranges.start, "stop": part.ranges.stop}
        if isinstance(part.hidden, NearPairs):
            lists |= {"low": part.hidden.low, "high": part.hidden.high}
            if part.hidden.sinks is not None:
                lists["hidden"] = part.hidden.sinks
        found = _call(query, key, value, scale, len(part.ranges.levels), lists)
        if found is None:
            return None
        made = found if made is None else join(*made, *found)
    return made


def window_obstacle(query: Tensor, key: Tensor, value: Tensor, local: Local) -> str:
    """As ``why_not``, for local attention."""
    if not isinstance(local.near, Band):
        return f"what is near is not a band ({local.near})"
    return _counting_obstacle(query, key, 1) or type_obstacle(query, key, value) or obstacle("ranges")


def window(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, key_padding: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """As ``kernels.aten.window.forward``; ``None`` when a key or value that is met is not finite."""
    if not isinstance(local.near, Band):
        raise TypeError(f"what is near must be a band, got {local.near}")
    keys, shape = key.shape[2], query.shape[:3]
    place = torch.arange(shape[2]) + local.offset
    low = torch.zeros_like(place) if local.left is None else place - local.left
    high = torch.full_like(place, keys) if local.right is None else place + local.right + 1
    start = torch.maximum(low, place - local.near.left).clamp(0, keys)
    stop = torch.minimum(high, place + local.near.right + 1).clamp(0, keys)
    edges = {"start": start, "stop": stop, "extra_low": low, "extra_high": high}
    lists = {name: edge.expand(shape) for name, edge in edges.items()}
    real = torch.ones(shape[0], keys, dtype=torch.bool) if key_padding is None else key_padding
    if local.sinks:
        rank = real.cumsum(-1)
        wanted = torch.arange(1, local.sinks + 1).expand(shape[0], -1).contiguous()
        extra = torch.searchsorted(rank, wanted)
        lists["extra"] = extra.masked_fill(extra == keys, -1)
        real = real & (rank > local.sinks)
    if local.sinks or key_padding is not None:
        lists["hidden"] = ~real
    base = (
        torch.arange(shape[0] * key.shape[1])
        .view(shape[0], -1, 1)
        .repeat_interleave(shape[1] // key.shape[1], 1)
        * keys
    )
    lists["start"], lists["stop"] = lists["start"] + base, lists["stop"] + base
    found = _call(query, key, value, scale, 1, lists)
    return None if found is None else (found[0].to(value.dtype), found[1].squeeze(-1))


def _call(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lists: int, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp ``(b, h, n, 1)`` in float32; ``given`` by the names of the fields."""
    query, key, value = (dense_rows(x) for x in (query, key, value))
    out = torch.empty(*query.shape[:3], value.shape[3])
    log_sum_exp = torch.empty(*query.shape[:3], 1)
    strided = {"query": query, "key": key, "value": value}
    held = {
        **strided,
        "out": out,
        "log_sum_exp": log_sum_exp,
        **{name: x.contiguous() for name, x in given.items()},
    }
    arguments = _Arguments()
    for name, tensor in held.items():
        setattr(arguments, name, tensor.data_ptr())
    for name, tensor in strided.items():
        getattr(arguments, f"{name}_strides")[:] = tensor.stride()[:3]
    arguments.b, arguments.h, arguments.n, arguments.d = query.shape
    arguments.g, arguments.m, arguments.e = value.shape[1:]
    arguments.lists, arguments.s = lists, given["extra"].shape[1] if "extra" in given else 0
    arguments.dtype, arguments.threads, arguments.scale = TYPES[query.dtype], torch.get_num_threads(), scale
    return None if library("ranges").ranges_run(ctypes.byref(arguments)) else (out, log_sum_exp)
