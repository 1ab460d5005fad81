"""What exact attention costs, counted from the mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from fastattn_compile.operators.base import Cost, SiteSpec
from fastattn_compile.operators.mask import MaskStructure


def visible_pairs(mask: MaskStructure, query_len: int, key_len: int) -> int:
    """Number of (query, key) pairs that the position terms of a mask allow.

    Args:
        mask: An understood mask; padding and segments are not counted, they are facts of the data.
        query_len: Number of queries.
        key_len: Number of keys.
    """
    offset = key_len - query_len if mask.end_aligned else 0
    return pairs_between(mask, range(query_len), range(key_len), offset)


def pairs_between(mask: MaskStructure, rows: range, keys: range, offset: int = 0) -> int:
    """Number of pairs of some queries and some keys that the position terms of a mask allow, in closed form.

    Args:
        mask: An understood mask.
        rows: Query positions.
        keys: Key positions.
        offset: Place of query 0 among the keys.
    """
    if mask.chunk is not None:
        return _pairs_of_chunks(mask, rows, keys, offset)
    pairs = _in_band(mask, rows, keys, offset)
    if mask.prefix is not None:
        # Of the prefix, what lies outside the band is visible too.
        prefix = range(keys.start, min(max(mask.prefix, keys.start), keys.stop))
        pairs += len(rows) * len(prefix) - _in_band(mask, rows, prefix, offset)
    return pairs


def _in_band(mask: MaskStructure, rows: range, keys: range, offset: int) -> int:
    begins = 0 if mask.left is None else _clipped(rows, offset - mask.left, keys)
    ends = len(rows) * len(keys) if mask.right is None else _clipped(rows, offset + mask.right + 1, keys)
    return ends - begins


def _clipped(rows: range, shift: int, keys: range) -> int:
    """Sum over the rows of how many keys stand before ``row + shift``."""
    first = min(max(keys.start - shift, rows.start), rows.stop)
    last = min(max(keys.stop - shift, first), rows.stop)
    rising = (last - first) * (first + last - 1 + 2 * (shift - keys.start)) // 2
    return rising + (rows.stop - last) * len(keys)


def _pairs_of_chunks(mask: MaskStructure, rows: range, keys: range, offset: int) -> int:
    size, inside = mask.chunk or 1, dataclasses.replace(mask, chunk=None)
    pairs = 0
    for chunk in range((rows.start + offset) // size, (rows.stop - 1 + offset) // size + 1):
        start, stop = chunk * size, (chunk + 1) * size
        some_rows = range(max(rows.start, start - offset), min(rows.stop, stop - offset))
        some_keys = range(max(keys.start, start), max(keys.start, start, min(keys.stop, stop)))
        pairs += pairs_between(inside, some_rows, some_keys, offset)
    return pairs


def traffic(spec: SiteSpec) -> float:
    """Bytes of queries, keys, values and outputs, each moved once."""
    query_side = spec.heads * spec.query_len * (spec.head_dim + spec.value_dim)
    key_side = spec.kv_heads * spec.key_len * (spec.head_dim + spec.value_dim)
    return float(spec.batch * (query_side + key_side) * spec.dtype.itemsize)


def parameter_bytes(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Bytes of learned parameters of these shapes, read once in float32, in which they are made.

    Args:
        shapes: ``Operator.parameter_shapes``.
    """
    return 4.0 * sum(math.prod(shape) for shape in shapes.values())


def exact_cost(spec: SiteSpec) -> Cost:
    """Two products a visible pair; an opaque mask counts as none."""
    queries = int(spec.query_len)
    pairs = visible_pairs(spec.mask, queries, int(spec.key_len))
    flops = 2.0 * spec.batch * spec.heads * pairs * (spec.head_dim + spec.value_dim)
    return Cost(flops, traffic(spec), pairs / max(1, queries))
