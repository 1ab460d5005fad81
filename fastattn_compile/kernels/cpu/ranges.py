"""Attention of every query to a range of a list of keys in C++, for leaves and windows: what it serves, and its calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.treeformer_tf import NearPairs, Part, PartGradients, join
from fastattn_compile.kernels.aten.window import Band, Local
from fastattn_compile.kernels.cpu.arguments import TYPES, dense_rows, fresh, type_obstacle
from fastattn_compile.kernels.cpu.build import library, obstacle

_MOST = 2**31 - 1  # places and queries of one key head are counted in 32 bits


class _Arguments(ctypes.Structure):
    """``RangeArgs`` of ``ranges.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "log_sum_exp", "order", "start", "stop")),
        *((name, ctypes.c_void_p) for name in ("hidden", "low", "high", "extra", "extra_low", "extra_high")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "slope", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("of_query", "of_key")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("b", "h", "g", "n", "m", "d", "e", "lists", "s")),
        ("dtype", ctypes.c_int32), ("threads", ctypes.c_int32), ("scale", ctypes.c_float),
        ("spread", ctypes.c_void_p), ("pool", ctypes.c_void_p),
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
        found = _forward(query, key, value, scale, len(part.ranges.levels), _lists(part))
        if found is None:
            return None
        made = found if made is None else join(*made, *found)
    return made


def backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Sequence[Part], out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[PartGradients]] | None:  # fmt: skip
    """As ``kernels.aten.treeformer_tf.backward``; ``None`` when a key or value that is met is not finite."""
    grads = _Gradients(query, key, value, out, log_sum_exp.squeeze(-1), grad_out, grad_log_sum_exp)
    said = []
    for part in parts:
        lists = len(part.ranges.levels)
        of_query, of_key = torch.zeros(query.shape[:3]), torch.zeros(*key.shape[:3], lists)
        if not grads.add(scale, lists, _lists(part) | {"of_query": of_query, "of_key": of_key}):
            return None
        said.append(PartGradients(of_query.flatten(), of_key.flatten(0, 2), None, None))
    return grads.query, grads.key, grads.value, said


def _lists(part: Part) -> dict[str, Tensor]:
    """Fields of one part."""
    lists = {"order": part.ranges.order, "start": part.ranges.start, "stop": part.ranges.stop}
    if isinstance(part.hidden, NearPairs):
        lists |= {"low": part.hidden.low, "high": part.hidden.high}
        if part.hidden.sinks is not None:
            lists["hidden"] = part.hidden.sinks
    return lists


def window_obstacle(query: Tensor, key: Tensor, value: Tensor, local: Local) -> str:
    """As ``why_not``, for local attention."""
    if not isinstance(local.near, Band):
        return f"what is near is not a band ({local.near})"
    return _counting_obstacle(query, key, 1) or type_obstacle(query, key, value) or obstacle("ranges")


def window(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, key_padding: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """As ``kernels.aten.window.forward``; ``None`` when a key or value that is met is not finite."""
    found = _forward(query, key, value, scale, 1, _window_lists(query, key, local, key_padding))
    return None if found is None else (found[0].to(value.dtype), found[1].squeeze(-1))


def window_backward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, local: Local, out: Tensor, log_sum_exp: Tensor,
    grad_out: Tensor, grad_log_sum_exp: Tensor | None = None, key_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """As ``kernels.aten.window.backward`` without a bias; ``None`` when a key or value that is met is not finite."""
    grads = _Gradients(query, key, value, out, log_sum_exp, grad_out, grad_log_sum_exp)
    if not grads.add(scale, 1, _window_lists(query, key, local, key_padding)):
        return None
    return grads.query.to(query.dtype), grads.key.to(key.dtype), grads.value.to(value.dtype)


def _window_lists(query: Tensor, key: Tensor, local: Local, key_padding: Tensor | None) -> dict[str, Tensor]:
    """Fields of local attention: the keys as they stand are one list."""
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
    return lists


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lists: int, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp ``(b, h, n, 1)`` in float32; ``given`` by the names of the fields."""
    out = fresh(*query.shape[:3], value.shape[3])
    log_sum_exp = torch.empty(*query.shape[:3], 1)
    done = _call(query, key, value, scale, lists, {**given, "out": out, "log_sum_exp": log_sum_exp})
    return (out, log_sum_exp) if done else None


class _Gradients:
    """Gradients in float32 that parts add to.

    Args:
        query: ``(b, h, n, d)``.
        key: ``(b, g, m, d)``.
        value: ``(b, g, m, e)``.
        out: ``(b, h, n, e)``, over all parts.
        log_sum_exp: ``(b, h, n)``, likewise.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp; ``None`` is zero.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, grad_out: Tensor,
        grad_log_sum_exp: Tensor | None,
    ) -> None:  # fmt: skip
        self.inputs = query, key, value
        self.query, self.key, self.value = (fresh(*x.shape).zero_() for x in self.inputs)
        grad_out = grad_out.float().contiguous()
        slope = torch.linalg.vecdot(grad_out, out.float())
        if grad_log_sum_exp is not None:
            slope = slope - grad_log_sum_exp
        self.given = {"log_sum_exp": log_sum_exp.float(), "grad_out": grad_out, "slope": slope}

    def add(self, scale: float, lists: int, given: dict[str, Tensor]) -> bool:
        """Adds those of one call; false when a key or value that is met is not finite."""
        grads = {"grad_query": self.query, "grad_key": self.key, "grad_value": self.value}
        return _call(*self.inputs, scale, lists, {**given, **self.given, **grads})


def _call(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lists: int, given: dict[str, Tensor]
) -> bool:
    """Runs the kernel; false when a key or value that is met is not finite. ``given`` by the names of the fields."""
    strided = dict(zip(("query", "key", "value"), (dense_rows(x) for x in (query, key, value))))
    held = {**strided, **{name: x.contiguous() for name, x in given.items()}}
    arguments = _Arguments()
    for name, tensor in held.items():
        setattr(arguments, name, tensor.data_ptr())
    for name, tensor in strided.items():
        getattr(arguments, f"{name}_strides")[:] = tensor.stride()[:3]
    arguments.b, arguments.h, arguments.n, arguments.d = query.shape
    arguments.g, arguments.m, arguments.e = value.shape[1:]
    arguments.lists, arguments.s = lists, given["extra"].shape[1] if "extra" in given else 0
    arguments.dtype, arguments.threads, arguments.scale = TYPES[query.dtype], torch.get_num_threads(), scale
    return bool(library("ranges").ranges_run(ctypes.byref(arguments)) == 0)
