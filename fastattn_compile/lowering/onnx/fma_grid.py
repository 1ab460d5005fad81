"""Fast multipole attention on the grid of an image as an ONNX body: the grid is known, so that all tables are constants.

Queries are taken cell by cell. A table says which tokens of the nine cells around it, which pooled rows of far cells and
which tokens in front of the grid a cell meets; a step of a loop gathers them and attends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fastattn_compile.kernels.aten.fma_grid_plan import GridPattern, level_offsets, met_cells
from fastattn_compile.lowering.onnx import exact
from fastattn_compile.lowering.onnx.body import Body, BodyInputs, BodySpec, hidden, highest, only
from fastattn_compile.lowering.onnx.writer import FAR, OnnxWriter
from fastattn_compile.operators.base import Operator, Support, no
from fastattn_compile.operators.fma.grid_cells import grid_levels, grid_of, part_grid, side_of


def _supports(operator: Operator, spec: BodySpec) -> Support:
    if operator.config.basis != "mean":
        return no(f"its ONNX body serves the mean basis only, not {operator.config.basis!r}")
    return only(spec.mask, "end_aligned", "key_padding")


def _attributes(operator: Operator, spec: BodySpec) -> Mapping[str, Any]:
    config = operator.config
    return {
        "block": config.block, "rank": config.rank, "grid": list(grid_of(config)), "prefix": config.prefix,
        "scale_attn": int(config.scale_attn),
    }  # fmt: skip


def _write(w: OnnxWriter, operator: Operator, spec: BodySpec, given: BodyInputs) -> ir.Value:
    config = operator.config
    if not grid_levels(config):
        return exact.BODY.write(w, operator, spec, given)
    height, width = grid_of(config)
    pattern = GridPattern(
        height,
        width,
        side_of(config),
        part_grid(config),
        grid_levels(config),
        config.prefix,
        config.scale_attn,
    )
    out = _Writing(w, spec, given, pattern).write()
    if not config.prefix:
        return out
    front = BodyInputs(w.slice(given.query, 0, config.prefix, 2), given.key, given.value, given.key_padding)
    result: ir.Value = w.op("Concat", exact.BODY.write(w, operator, spec, front), out, axis=2)
    return result


class _Writing:
    """One body, for the queries of the grid.

    ``b`` batch (1 where nothing depends on it), ``g`` key heads, ``n`` tokens of the grid, ``c`` channels, ``m`` tokens of a
    cell, ``t`` slots of a cell, ``r = group * m`` rows of a tile.
    """

    def __init__(self, w: OnnxWriter, spec: BodySpec, given: BodyInputs, pattern: GridPattern) -> None:
        self.w, self.spec, self.pattern, self.padding = w, spec, pattern, given.key_padding
        self.query = w.slice(given.query, pattern.prefix, FAR, 2)
        self.key, self.value = given.key, given.value
        if self.padding is not None:
            # What stands at padding may be NaN, and NaN times 0 still is.
            mine = w.op("Unsqueeze", self.padding, [1, 3])
            self.key, self.value = (w.op("Where", mine, x, 0.0) for x in (given.key, given.value))
        down, across = pattern.cells(0)
        self.cells = down * across

    def write(self) -> ir.Value:
        """The output of the queries of the grid, ``(b, h, n, e)``."""
        w, spec, m = self.w, self.spec, self.pattern.block
        tokens, tokens_there = self._tokens()
        far, far_there = self._far()
        counts = self._sums(self._taken(), 1)
        keys, values = (
            w.op("Concat", x, self._means(x, counts, c), axis=2)
            for x, c in ((self.key, spec.head_dim), (self.value, spec.value_dim))
        )
        behind = self.pattern.prefix + self.pattern.tokens
        table = w.constant(np.concatenate([tokens, far + behind], 1))
        near_bias = self._bias(w.constant(tokens_there[None]), tokens)
        bias = w.op("Concat", near_bias, self._far_bias(counts, far, far_there), axis=2)
        order, back = self._order()
        queries = w.op("Mul", w.op("Gather", self.query, w.constant(order), axis=2), spec.scale)

        def step(w: OnnxWriter, number: ir.Value) -> ir.Value:
            rows = w.op("Add", w.op("Mul", number, m), w.constant(np.arange(m)))
            own = w.op("Gather", queries, rows, axis=2)
            if spec.group > 1:
                own = w.op("Reshape", own, [0, spec.kv_heads, spec.group * m, spec.head_dim])
            slots = w.op("Gather", table, number, axis=0)
            met_keys, met_values = (w.op("Gather", x, slots, axis=2) for x in (keys, values))
            scores = w.op("MatMul", own, w.op("Transpose", met_keys, perm=[0, 1, 3, 2]))
            seen = w.op("Unsqueeze", w.op("Gather", bias, number, axis=1), [1, 2])
            found = w.op("MatMul", w.op("Softmax", w.op("Add", scores, seen), axis=-1), met_values)
            if self.padding is not None:  # nothing else hides every key of a query
                some = w.op("Greater", highest(w, seen, spec), hidden(spec) / 2)
                found = w.op("Mul", found, w.cast(some, spec.dtype))
            result: ir.Value = w.op("Reshape", found, [0, spec.heads, m, spec.value_dim])
            return result

        out = w.loop(w.constant([self.cells]), step, ["batch", spec.heads, m, spec.value_dim])
        # onnx.reference puts what steps give one after another where ONNX stacks it: this is right for both.
        out = w.op("Reshape", out, [self.cells, -1, spec.heads, m, spec.value_dim])
        out = w.op("Transpose", out, perm=[1, 2, 0, 3, 4])
        whole = w.op("Reshape", out, [0, 0, -1, spec.value_dim])
        result: ir.Value = w.op("Gather", whole, w.constant(back), axis=2)
        return result

    # Who meets whom.

    def _by_cell(self) -> NDArray[Any]:
        """The tokens of the finest cells, ``(cells + 1, m)``, -1 outside the grid; the last cell lies outside as a whole."""
        pattern, side = self.pattern, self.pattern.side
        down, across = pattern.cells(0)
        plane = np.full((down * side, across * side), -1)
        plane[: pattern.height, : pattern.width] = np.arange(pattern.tokens).reshape(pattern.height, -1)
        cells = plane.reshape(down, side, across, side).swapaxes(1, 2).reshape(self.cells, -1)
        return np.concatenate([cells, np.full((1, pattern.block), -1)])

    def _order(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The token of every slot of the cells, and the slot of every token; slots outside the grid have the first token."""
        slots = self._by_cell()[:-1].reshape(-1)
        back = np.empty(self.pattern.tokens, dtype=np.int64)
        back[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
        return np.maximum(slots, 0), back

    def _tokens(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens that every cell meets one by one, those in front of the grid first, and which of them there are."""
        near, _ = met_cells(self.pattern, slice(0, self.cells), torch.device("cpu"))
        tokens = self._by_cell()[near.numpy()].reshape(self.cells, -1)
        tokens = np.where(tokens >= 0, tokens + self.pattern.prefix, -1)
        front = np.tile(np.arange(self.pattern.prefix), (self.cells, 1))
        return _squeezed(np.concatenate([front, tokens], 1))

    def _far(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Pooled rows that every cell meets, and which of them there are."""
        rank = self.pattern.rank
        _, far = met_cells(self.pattern, slice(0, self.cells), torch.device("cpu"))
        found = far.numpy()
        found = np.where(found < level_offsets(self.pattern)[-1], found, -1)[..., None]
        rows = np.where(found >= 0, found * rank + np.arange(rank), -1)
        return _squeezed(rows.reshape(self.cells, -1))

    def _bias(self, there: ir.Value, table: NDArray[Any]) -> ir.Value:
        """0 for tokens that a cell meets, ``(b, cells, t)``."""
        w = self.w
        if self.padding is not None:
            there = w.op("And", there, w.op("Gather", self.padding, w.constant(table), axis=1))
        result: ir.Value = w.op("Where", there, 0.0, hidden(self.spec))
        return result

    def _far_bias(self, counts: ir.Value, table: NDArray[Any], there: NDArray[Any]) -> ir.Value:
        """Logarithms of how many tokens a row stands for, ``(b, cells, t)``."""
        w = self.w
        mass = w.op("Gather", w.op("Squeeze", counts, [1, 3]), w.constant(table), axis=1)
        met = w.op("And", w.op("Greater", mass, 0.0), w.constant(there[None]))
        weight = w.op("Log", w.op("Max", mass, 1.0)) if self.pattern.scale_attn else w.constant(0.0)
        result: ir.Value = w.op("Where", met, weight, hidden(self.spec))
        return result

    # Pooled rows.

    def _taken(self) -> ir.Value:
        """1 for every token of the grid that is real, ``(b, 1, n, 1)``."""
        w, pattern = self.w, self.pattern
        if self.padding is None:
            return w.constant(np.ones((1, 1, pattern.tokens, 1)))
        real = w.slice(w.cast(self.padding, self.spec.dtype), pattern.prefix, FAR, 1)
        result: ir.Value = w.op("Unsqueeze", real, [1, 3])
        return result

    def _means(self, x: ir.Value, counts: ir.Value, channels: int) -> ir.Value:
        """Means of the parts of the cells of all levels, ``(b, g, rows, c)``."""
        sums = self._sums(self.w.slice(x, self.pattern.prefix, FAR, 2), channels)
        result: ir.Value = self.w.op("Div", sums, self.w.op("Max", counts, 1.0))
        return result

    def _sums(self, x: ir.Value, channels: int) -> ir.Value:
        """Sums over the parts of the cells of all levels, ``(b, g, rows, c)``, of tokens ``(b, g, n, c)``."""
        w, pattern = self.w, self.pattern
        (py, px), side, rows = pattern.parts, pattern.side, []
        plane = w.op("Reshape", x, [0, 0, pattern.height, pattern.width, channels])
        held, steps = (pattern.height, pattern.width), (side // py, side // px)
        for level in range(pattern.levels):
            down, across = pattern.cells(level)
            wanted = (down * py * steps[0], across * px * steps[1])
            missing = [b - a for a, b in zip(held, wanted)]
            if any(missing):
                plane = w.op("Pad", plane, [0, 0, 0, 0, 0, 0, 0, missing[0], missing[1], 0])
            split = w.op("Reshape", plane, [0, 0, down * py, steps[0], across * px, steps[1], channels])
            plane = w.op("ReduceSum", split, [3, 5], keepdims=0)
            held, steps = (down * py, across * px), (2, 2)
            cells = w.op("Reshape", plane, [0, 0, down, py, across, px, channels])
            cells = w.op("Transpose", cells, perm=[0, 1, 2, 4, 3, 5, 6])
            rows.append(w.op("Reshape", cells, [0, 0, -1, channels]))
        result: ir.Value = w.op("Concat", *rows, axis=2) if len(rows) > 1 else rows[0]
        return result


def _squeezed(table: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The entries that are there first, as many columns as the fullest row needs; and which of them are there."""
    there = table >= 0
    order = np.argsort(~there, axis=1, kind="stable")[:, : there.sum(1).max()]
    table, there = (np.take_along_axis(x, order, 1) for x in (table, there))
    return np.where(there, table, 0), there


BODY = Body("FMAGrid", 1, _supports, _write, _attributes)
