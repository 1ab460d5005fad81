"""Decoding by Barnes-Hut attention, one token at a time: all keys, and a tree over them that grows at its
right edge."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.barnes_hut_tree import Choice, Level, Sums, choose, voices_of
from fastattn_compile.kernels.barnes_hut import triton_obstacle
from fastattn_compile.kernels.dispatch import select
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Decoder
from fastattn_compile.operators.documents import refuse_decoding
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.growing import GrowingRows

if TYPE_CHECKING:
    from fastattn_compile.kernels.gpu.barnes_hut_tree import Nodes
    from fastattn_compile.operators.barnes_hut.operator import BarnesHutAttention


class _Nodes:
    """The complete nodes of one level: what the next level is merged from, and what is scored."""

    def __init__(self, sums: Sums) -> None:
        self._statistic = sums.statistic
        self._parts = [GrowingRows(1, x) for x in sums.parts]
        self._features, self._log_count = (
            GrowingRows(1, sums.features),
            GrowingRows(1, sums.counts.log()[..., None]),
        )

    def append(self, sums: Sums) -> None:
        for held, x in zip(self._parts, sums.parts):
            held.append(x)
        self._features.append(sums.features)
        self._log_count.append(sums.counts.log()[..., None])

    def after(self, first: int) -> Sums:
        """The sums of the nodes from one on."""
        return Sums(self._statistic, tuple(x.rows[:, first:] for x in self._parts))

    def in_triton(self) -> Nodes:
        """The level as Triton's descent reads it."""
        from fastattn_compile.kernels.gpu.barnes_hut_tree import Nodes

        count, main, *rest = (x.rows for x in self._parts)
        more = rest[0] if rest else main
        if self._statistic == "bound":
            more, main = more.chunk(2, -1)
        return Nodes(main, more, count.squeeze(-1), self.count)

    def level(self, first: int) -> Level:
        """As a level whose nodes are numbered from ``first``."""
        return Level(self._features.rows, self._log_count.rows.squeeze(-1), first)

    def pooled(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean key, mean value and logarithm of the count of some nodes, ``(u, k, *)`` each; any where there is none."""
        at = numbers.clamp(0, self.count - 1)[..., None]
        count, key, *_, value = (x.rows.gather(1, at.expand(-1, -1, x.rows.shape[2])) for x in self._parts)
        return key / count.clamp(min=1), value / count.clamp(min=1), count.log()

    @property
    def count(self) -> int:
        return self._parts[0].rows.shape[1]


class BarnesHutDecoder(Decoder):
    """Causal Barnes-Hut attention with O(log n) work a token, and the keys of the whole past in memory, in their type.

    Args:
        operator: The operator.
        scale: Factor on the scores.
    """

    def __init__(self, operator: BarnesHutAttention, scale: float) -> None:
        self.operator, self.scale = operator, scale
        self._length: int | None = None
        self._choice: Choice | None = None
        self._pool = operator.config.rest == "pool"
        # Mean keys and values of the closed nodes of the choice, and their biases.
        self._closed: tuple[Tensor, Tensor, Tensor] | None = None
        # The same as Triton takes them, once a step has asked for it.
        self._closed_rows: tuple[Tensor, ...] | None = None

    def prefill(self, inputs: AttentionInputs) -> AttentionOutput:
        """Attends a first stretch of tokens; its mask (causal, perhaps a sliding window, padding) stays in
        force.

        Raises:
            ValueError: The mask is not causal, queries and keys differ in number, or documents are packed.
        """
        refuse_decoding(inputs)
        length = inputs.key.shape[2]
        if inputs.mask.right != 0 or inputs.query.shape[2] != length:
            raise ValueError(
                f"decoding needs a causal mask and as many queries as keys, got {inputs.mask}, "
                f"{inputs.query.shape[2]} queries and {length} keys"
            )
        output = self.operator.forward(inputs)
        self._pattern = pattern = self.operator.config.pattern(inputs.mask)
        self._heads, self._kv_heads, self._type = (
            inputs.query.shape[1],
            inputs.key.shape[1],
            inputs.value.dtype,
        )
        wide = any(x.dtype == torch.float64 for x in (inputs.query, inputs.key, inputs.value))
        self._dtype = torch.float64 if wide else torch.float32
        real = inputs.key_padding
        if real is None:
            real = torch.ones(inputs.key.shape[0], length, dtype=torch.bool, device=inputs.key.device)
        units = real.repeat_interleave(self._kv_heads, 0)
        sink = units & (units.cumsum(-1) <= pattern.sinks)
        self._rank = units.sum(-1)
        self._fine = GrowingRows(1, (units & ~sink)[..., None])
        self._keys, self._values = (
            GrowingRows(1, x.flatten(0, 1).masked_fill(~units[..., None], 0))
            for x in (inputs.key, inputs.value)
        )
        numbers = (
            torch.arange(1, pattern.sinks + 1, device=units.device).expand(units.shape[0], -1).contiguous()
        )
        place = torch.searchsorted(units.cumsum(-1), numbers, out_int32=True)
        self._sinks = place.masked_fill(place >= length, -1)
        self._nodes: list[_Nodes] = []
        self._grow(0, length)
        self._length, self._choice = length, None
        self._queries = inputs.query[:, :, max(0, length - 2 * pattern.group) :]
        running = (length - 1) // pattern.group * pattern.group
        if length and length % pattern.group:
            self._choose(self._queries[:, :, : running + 1 - length or None], running)
        return output

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attends the next token.

        Args:
            query: ``(batch, heads, 1, head_dim)``.
            key: ``(batch, kv_heads, 1, head_dim)``.
            value: ``(batch, kv_heads, 1, value_dim)``.

        Raises:
            RuntimeError: ``prefill`` was not called.
        """
        if self._length is None:
            raise RuntimeError("call prefill before step")
        now, pattern = self._length, self._pattern
        self._length += 1
        self._rank = self._rank + 1
        sink = self._rank <= pattern.sinks
        numbers = torch.arange(1, pattern.sinks + 1, device=sink.device)
        self._sinks = self._sinks.masked_fill(numbers == self._rank[:, None], now)
        self._fine.append(~sink[:, None, None])
        self._keys.append(key.flatten(0, 1))
        self._values.append(value.flatten(0, 1))
        self._queries = torch.cat([self._queries, query], 2)[:, :, -2 * pattern.group :]
        self._grow(now, now + 1)
        if now % pattern.group == 0:
            self._choose(self._queries, now)
        return self._attend(query, now)

    def stored_rows(self) -> int:
        """Every key, and the nodes of the tree."""
        return (self._length or 0) + sum(nodes.count for nodes in self._nodes)

    def _grow(self, start: int, stop: int) -> None:
        """Adds the nodes that become complete between two lengths, bottom up: O(1) a token in the mean."""
        pattern, level = self._pattern, 0
        while stop // pattern.width(level):
            width = pattern.width(level)
            old, new = start // width, stop // width
            if new > old:
                if level == 0:
                    span = slice(old * width, new * width)
                    taken = self._fine.rows[:, span, 0]
                    keys = self._keys.rows[:, span].to(self._dtype)
                    values = self._values.rows[:, span].to(self._dtype) if self._pool else None
                    tokens = Sums.of_tokens(pattern.statistic, keys, values, taken)
                    made = tokens.merged(width)
                else:
                    below = self._nodes[level - 1].after(old * pattern.fanout)
                    children = (new - old) * pattern.fanout
                    made = Sums(below.statistic, tuple(x[:, :children] for x in below.parts)).merged(
                        pattern.fanout
                    )
                if level == len(self._nodes):
                    self._nodes.append(_Nodes(made))
                else:
                    self._nodes[level].append(made)
            level += 1

    def _choose(self, queries: Tensor, first: int) -> None:
        """Makes the choice of the group that begins at a position, from the queries up to it."""
        pattern, self._closed_rows = self._pattern, None
        if first < 2 * pattern.block or pattern.open == 0:
            self._choice = self._closed = None
            if first < 2 * pattern.block or not self._pool:
                return
        place = torch.tensor([first], device=queries.device)
        voices = voices_of(
            pattern, queries.to(self._dtype), place, self._kv_heads, first + 1 - queries.shape[2]
        )
        nodes = self._nodes[: pattern.levels(first + 1)]
        begins = [0]
        for each in nodes:
            begins.append(begins[-1] + each.count)
        levels = tuple(each.level(begin) for each, begin in zip(nodes, begins))
        if self._by_triton(queries) and not pattern.tolerance:
            self._choice = self._descend(queries, first)
        else:
            near = None
            if pattern.tolerance:
                rows, seen = self._near(first)
                scores = (voices * self.scale) @ self._taken(self._keys, rows)[:, None, None].mT
                near = scores.masked_fill(~seen[:, None, None, None], -torch.inf).logsumexp(-1)
            self._choice = choose(pattern, levels, voices, self.scale, place, first + 1, near, self._pool)
        rest, closed = self._choice.rest, self._choice.closed
        self._closed = None
        if rest is not None and closed is not None:
            self._closed = self._pooled(nodes, begins, rest, closed)

    def _pooled(
        self, nodes: list[_Nodes], begins: list[int], rest: Tensor, closed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``(u, c, k, d)``, values and biases ``(u, c, k)`` of closed nodes, -inf where one fills up."""
        units, choosers, _, count = rest.shape
        numbers = rest.reshape(units, -1)
        found = [
            x.new_zeros(units, numbers.shape[1], x.shape[2], dtype=self._dtype)
            for x in (self._keys.rows, self._values.rows)
        ]
        bias = torch.full_like(found[0][..., :1], -torch.inf)
        for each, begin in zip(nodes, begins):
            mine = ((numbers >= begin) & (numbers < begin + each.count))[..., None]
            parts = each.pooled(numbers - begin)
            found = [torch.where(mine, part, x) for part, x in zip(parts, found)]
            bias = torch.where(mine, parts[2], bias)
        keys, values, bias = (x.unflatten(1, (choosers, count)) for x in (*found, bias))
        return keys, values, bias.squeeze(-1).masked_fill(~closed[:, :, 0], -torch.inf)

    def _by_triton(self, query: Tensor) -> bool:
        obstacle = partial(triton_obstacle, query, self._keys.rows, self._values.rows, self._pattern)
        return select("barnes_hut decode", {"triton": obstacle}) == "triton"

    def _descend(self, queries: Tensor, first: int) -> Choice:
        """``choose`` in Triton."""
        from fastattn_compile.kernels.gpu import barnes_hut_tree

        levels = [nodes.in_triton() for nodes in self._nodes[: self._pattern.levels(first + 1)]]
        leaves, left = barnes_hut_tree.descend(
            self._pattern, levels, queries, self._kv_heads, self.scale, first + 1, first,
            first + 1 - queries.shape[2], self._pool,
        )  # fmt: skip
        choosers = self._keys.rows.shape[0], leaves.shape[0] // self._keys.rows.shape[0]
        leaves, rest, closed = leaves.unflatten(0, choosers), None, None
        if left is not None:
            closed = torch.arange(left.nodes.shape[2], device=leaves.device) < left.count[..., None]
            rest, closed = (
                x.unflatten(0, choosers) for x in (left.nodes.long().masked_fill(~closed, 0), closed)
            )
        return Choice(leaves.clamp(min=0), leaves >= 0, rest, closed)

    def _near(self, now: int) -> tuple[Tensor, Tensor]:
        """Rows of the near field and the sinks at a position, ``(u, k)``, and whether each is there and
        visible."""
        pattern, units = self._pattern, self._keys.rows.shape[0]
        device = self._rank.device
        begin = max(0, (now // pattern.block - 1) * pattern.block)
        near = torch.arange(begin, now + 1, device=device).expand(units, -1)
        near_seen = self._fine.rows[:, begin : now + 1, 0]
        rows, seen = torch.cat([self._sinks.long(), near], 1), torch.cat([self._sinks >= 0, near_seen], 1)
        if pattern.left is not None:
            seen = seen & (rows >= now - pattern.left)
        return rows.clamp(min=0), seen

    def _taken(self, held: GrowingRows, rows: Tensor) -> Tensor:
        return held.rows.gather(1, rows[..., None].expand(-1, -1, held.rows.shape[2])).to(self._dtype)

    def _attend_by_triton(self, query: Tensor) -> AttentionOutput:
        from fastattn_compile.kernels.gpu import barnes_hut_decode

        leaves, pattern = None, self._pattern
        if self._choice is not None:
            chosen = self._choice.leaves.masked_fill(~self._choice.opened, -1)
            leaves = chosen.int().flatten(0, 1).contiguous()
        if self._closed is not None and self._closed_rows is None:
            self._closed_rows = barnes_hut_decode.rows_of_nodes(*self._closed, self._keys.rows.dtype)
        out, log_sum_exp = barnes_hut_decode.attend_one(
            query, self._keys.rows, self._values.rows, self._fine.rows[..., 0], self._sinks, leaves,
            *(self._closed_rows or (None,) * 5), self.scale, pattern.block, pattern.leaf, pattern.share,
            -1 if pattern.left is None else pattern.left,
        )  # fmt: skip
        return AttentionOutput(out, log_sum_exp)

    def _attend(self, query: Tensor, now: int) -> AttentionOutput:
        if self._by_triton(query):
            return self._attend_by_triton(query)
        pattern = self._pattern
        rows, seen = (x[:, None] for x in self._near(now))
        if self._choice is not None:
            leaf = torch.arange(pattern.leaf, device=rows.device)
            tokens = (self._choice.leaves[:, :, 0, :, None] * pattern.leaf + leaf).flatten(2)
            opened = self._choice.opened[:, :, 0, :, None].expand(-1, -1, -1, pattern.leaf).flatten(2)
            fine = self._fine.rows[..., 0]
            far_seen = opened & fine.gather(1, tokens.flatten(1)).view_as(tokens)
            shape = (-1, tokens.shape[1], -1)
            rows, seen = (
                torch.cat([rows.expand(shape), tokens], 2),
                torch.cat([seen.expand(shape), far_seen], 2),
            )
        units, choosers, count = rows.shape
        keys, values = (
            self._taken(x, rows.flatten(1)).view(units, choosers, count, -1)
            for x in (self._keys, self._values)
        )
        bias = torch.zeros_like(seen, dtype=self._dtype)
        if self._closed is not None:
            closed_keys, closed_values, closed_bias = self._closed
            keys, values = torch.cat([keys, closed_keys], 2), torch.cat([values, closed_values], 2)
            bias, seen = torch.cat([bias, closed_bias], 2), torch.cat([seen, closed_bias > -torch.inf], 2)
        wide = query.to(self._dtype).view(units, choosers, -1, query.shape[3])
        scores = self.scale * (wide @ keys.mT) + bias[:, :, None]
        weights, log_sum_exp = masked_softmax(scores, seen[:, :, None])
        shape = (query.shape[0], self._heads, 1)
        statistics = torch.float64 if self._type == torch.float64 else torch.float32
        return AttentionOutput(
            (weights @ values).reshape(*shape, -1).to(self._type), log_sum_exp.reshape(shape).to(statistics)
        )
