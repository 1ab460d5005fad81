"""The tree of a tree code and the choice of what a group of queries opens, in Triton.

``bh_merge`` makes the sums or extremes of a few levels at a time, bottom up. ``bh_descend`` takes one level of the
descent for one group: it lists the children of the nodes kept above and of the parents that reach beyond the far
field, estimates their mass, sorts them, keeps the best. A launch a level; what passes between levels are numbers of
nodes. Words and sizes as in ``kernels/aten/barnes_hut_tree.py``, whose choice this is: ``u`` units, ``c`` choosers, ``g``
groups, ``N`` nodes of all levels, leaves first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.gpu.launch import HEAVY, LIGHT, padded, precision
from fastattn_compile.kernels.gpu.online import COUNTS, finite

# Kinds of what a node holds of its tokens.
SUM, SQUARES, LARGEST, LARGEST_NEGATED = 0, 1, 2, 3
# Levels of one launch of bh_merge, and rows that it reads at least.
_MERGED_LEVELS, _MERGED_ROWS = 3, 64


@triton.jit(do_not_specialize=COUNTS)
def bh_merge(
    X, TAKEN, OUT, heads, length, x_b, x_h, x_n, x_d, taken_b, nodes, first_in, first_out,
    D: tl.constexpr, WIDTH: tl.constexpr, FANOUT: tl.constexpr, LEVELS: tl.constexpr, TOKENS: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``LEVELS`` levels of nodes over one stretch of ``ROWS`` tokens, or of nodes of the level below.

    ``length`` rows in; ``WIDTH`` of them make a node, ``FANOUT`` nodes the next level's. ``WIDTH``, ``FANOUT`` and
    ``ROWS`` are powers of two, ``nodes`` counts those of all levels.
    """
    part, unit, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BD + tl.arange(0, BD)
    row = part * ROWS + tl.arange(0, ROWS)
    channel, here = d < D, row < length
    if TOKENS:
        here = here & (tl.load(TAKEN + unit // heads * taken_b + row, mask=here, other=0) != 0)
        base = X + unit // heads * x_b + unit % heads * x_h
        x = tl.load(
            base + row.to(tl.int64)[:, None] * x_n + d[None, :] * x_d,
            mask=here[:, None] & channel[None, :],
            other=0.0,
        ).to(tl.float32)
        if KIND == 1:
            x = x * x
        if KIND == 3:
            x = -x
    else:
        base = X + (unit * nodes + first_in) * D
        x = tl.load(base + row[:, None] * D + d[None, :], mask=here[:, None] & channel[None, :], other=0.0)
    if KIND >= 2:
        x = tl.where(here[:, None], x, float("-inf"))
    total = length
    for level in tl.static_range(LEVELS):
        if level == 0:
            x = tl.reshape(x, [ROWS // WIDTH, WIDTH, BD])
            total = tl.cdiv(total, WIDTH)
        else:
            x = tl.reshape(x, [ROWS // WIDTH // FANOUT**level, FANOUT, BD])
            total = tl.cdiv(total, FANOUT)
        x = tl.max(x, 1) if KIND >= 2 else tl.sum(x, 1)
        node = part * (ROWS // WIDTH // FANOUT**level) + tl.arange(0, ROWS // WIDTH // FANOUT**level)
        at = OUT + (unit * nodes + first_out + node)[:, None] * D + d[None, :]
        tl.store(at, x, mask=(node < total)[:, None] & channel[None, :])
        first_out += total


@triton.jit(do_not_specialize=COUNTS)
def bh_descend(
    Q, MAIN, MORE, COUNT, KEPT_ABOVE, KEPT, CLOSED, CLOSED_ABOVE, CLOSED_COUNT, room, first_node, heads, per_unit, length,
    start, q_start, q_b, q_h, q_n, q_d, count_row, count_units, main_b, main_n, more_b, more_n, total, width, groups,
    left, right, scale,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, SAMPLES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, CAUSAL: tl.constexpr, STATISTIC: tl.constexpr, TOP: tl.constexpr, KEEP_ABOVE: tl.constexpr,
    KEEP: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One level of the descent for one group of queries: the numbers of the best ``KEEP`` candidates, -1 fills up.

    With ``REST`` the other candidates, numbered among the nodes of all levels, are appended to the group's list in
    ``CLOSED``, which has ``room`` for all of them. The levels above left ``CLOSED_ABOVE`` there; how many there are now
    is written elsewhere, so that no thread reads what another has already counted up.

    ``R`` heads choose together; ``left`` and ``right`` are -1 where the mask has no bound. The groups
    begin at position ``start``, ``Q`` at ``q_start``. A row of counts serves ``count_units`` units.
    """
    group, chooser = tl.program_id(0), tl.program_id(1)
    # Heads are numbered through all sequences: those of a unit, and of a chooser, are neighbours.
    head, first = chooser * R, start + group * GROUP
    batch, unit = (head // heads).to(tl.int64), (head // per_unit).to(tl.int64)
    choice = chooser.to(tl.int64) * groups + group

    # The far field: one stretch before the near blocks and one after, whole nodes only.
    end_before = tl.maximum((first // BLOCK - 1) * BLOCK, 0)
    begin_before = tl.where(left < 0, 0, tl.maximum(first + GROUP - 1 - left, 0))
    begin_after = (first // BLOCK + 2) * BLOCK
    shown = tl.where(right < 0, length, first + right + 1)
    end_after = tl.where(shown >= length, 2147483647, shown)

    i = tl.arange(0, BK)
    if TOP:
        node, valid = i, i < total
    else:
        above = tl.load(
            KEPT_ABOVE + choice * KEEP_ABOVE + i // FANOUT, mask=i < KEEP_ABOVE * FANOUT, other=-1
        )
        node, valid = above * FANOUT + i % FANOUT, above >= 0
        # Parents that an edge of the far field cuts were no candidates: their children are.
        cut, span = (i - KEEP_ABOVE * FANOUT) // FANOUT, width * FANOUT
        p0, p1 = begin_before // span, end_before // span
        p2, p3 = begin_after // span, end_after // span
        c0 = (begin_before % span != 0) & (begin_before < length)
        c1 = (end_before % span != 0) & (end_before < length) & ~(c0 & (p0 == p1))
        if CAUSAL:
            c2, c3 = c1 & False, c1 & False
        else:
            c2 = (begin_after % span != 0) & (begin_after < length) & ~(c0 & (p0 == p2)) & ~(c1 & (p1 == p2))
            c3 = (end_after % span != 0) & (end_after < length) & ~(c0 & (p0 == p3)) & ~(c1 & (p1 == p3))
            c3 = c3 & ~(c2 & (p2 == p3))
        parent = tl.where(cut == 0, p0, tl.where(cut == 1, p1, tl.where(cut == 2, p2, p3)))
        crossed = ((cut == 0) & c0) | ((cut == 1) & c1) | ((cut == 2) & c2) | ((cut == 3) & c3)
        edge = i >= KEEP_ABOVE * FANOUT
        node, valid = tl.where(edge, parent * FANOUT + i % FANOUT, node), tl.where(edge, crossed, valid)
        valid = valid & (node >= 0) & (node < total)
    begin = node * width
    far = (begin >= begin_before) & (begin + width <= end_before)
    if not CAUSAL:
        far = far | ((begin >= begin_after) & (begin + width <= end_after))
    valid = valid & far
    count = tl.load(COUNT + unit // count_units * count_row + node, mask=valid, other=0.0)
    valid = valid & (count > 0)
    count = tl.where(valid, count, 1.0)

    VOICES: tl.constexpr = SAMPLES if SAMPLES > 0 else 1
    # Estimated log mass of every candidate for every voice, a few channels at a time.
    voice = tl.arange(0, BV)
    speaks, speaker = voice < R * VOICES, head + voice // VOICES
    base = Q + batch * q_b + (speaker % heads).to(tl.int64) * q_h
    MAIN += unit * main_b
    MORE += unit * more_b
    row = node.to(tl.int64)
    s = tl.zeros([BV, BK], tl.float32)
    for channel in range(0, D, BD):
        d = channel + tl.arange(0, BD)
        q = tl.zeros([BV, BD], tl.float32)
        if SAMPLES > 0:
            step = voice % SAMPLES * (GROUP // SAMPLES)
            place = tl.minimum(tl.maximum(first - step if CAUSAL else first + step, 0), length - 1)
            at = base + (place - q_start).to(tl.int64) * q_n
            q += tl.load(
                at[:, None] + d[None, :] * q_d, mask=speaks[:, None] & (d < D)[None, :], other=0.0
            ).to(tl.float32)
            q = finite(q)
        else:
            members = 0
            for step in range(GROUP):
                place = first - step if CAUSAL else first + step
                inside = (place >= 0) & (place < length)
                at = base + (place - q_start).to(tl.int64) * q_n
                more = tl.load(
                    at[:, None] + d[None, :] * q_d,
                    mask=inside & speaks[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                q += finite(more.to(tl.float32))
                members += inside.to(tl.int32)
            q = q / members
        q *= scale
        mask = valid[:, None] & (d < D)[None, :]
        if STATISTIC == 2:
            high = tl.load(MORE + row[:, None] * more_n + d[None, :], mask=mask, other=0.0)
            low = tl.load(MAIN + row[:, None] * main_n + d[None, :], mask=mask, other=0.0)
            s = tl.dot(tl.maximum(q, 0.0), tl.trans(high), s, input_precision=PRECISION)
            s = tl.dot(tl.maximum(-q, 0.0), tl.trans(low), s, input_precision=PRECISION)
        else:
            mean = tl.load(MAIN + row[:, None] * main_n + d[None, :], mask=mask, other=0.0) / count[:, None]
            s = tl.dot(q, tl.trans(mean), s, input_precision=PRECISION)
            if STATISTIC == 1:
                variance = (
                    tl.load(MORE + row[:, None] * more_n + d[None, :], mask=mask, other=0.0) / count[:, None]
                    - mean * mean
                )
                s = tl.dot(0.5 * q * q, tl.trans(variance), s, input_precision=PRECISION)
    # A node with a value that is not finite comes first, so that whoever could see it does see it.
    s = tl.where(s - s == 0, s + tl.log(count)[None, :], float("inf"))
    s = tl.where(valid[None, :] & speaks[:, None], s, float("-inf"))
    if R * VOICES == 1:
        mass = tl.max(s, 0)
    else:
        # The logarithm of the sum of the shares that the voices give.
        must = tl.max(s, 0) == float("inf")
        s = tl.where(s == float("inf"), float("-inf"), s)
        anchor = tl.max(s, 1)
        anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
        whole = tl.sum(tl.exp(s - anchor[:, None]), 1)
        share = s - (anchor + tl.log(tl.where(whole == 0, 1.0, whole)))[:, None]
        most = tl.max(share, 0)
        anchor = tl.where(most == float("-inf"), 0.0, most)
        whole = tl.sum(tl.exp(share - anchor[None, :]), 0)
        mass = tl.where(whole == 0, float("-inf"), anchor + tl.log(tl.where(whole == 0, 1.0, whole)))
        mass = tl.where(must, float("inf"), mass)

    # Best first: the order of floats is that of these integers; the number of the node rides along.
    bits = mass.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    ordered = tl.sort((ordered << 32) | tl.where(valid, node, 0).to(tl.int64), descending=True)
    # What is there is above -inf, whose integer is this.
    found = tl.where((ordered >> 32) > -2139095041, (ordered & 0xFFFFFFFF).to(tl.int32), -1)
    tl.store(KEPT + choice * KEEP + i, found, mask=i < KEEP)
    if REST:
        listed, lost = tl.load(CLOSED_ABOVE + choice), (i >= KEEP) & (found >= 0)
        tl.store(CLOSED + choice * room + listed + i - KEEP, found + first_node, mask=lost)
        tl.store(CLOSED_COUNT + choice, listed + tl.sum(lost.to(tl.int32), 0))


@dataclass(frozen=True)
class NodeTree:
    """Statistics of all nodes.

    Args:
        pattern: The pattern.
        total: Nodes of each level, leaves first.
        first: Number of each level's first node.
        count: ``(b or 1, N)`` float32 tokens.
        main: ``(u, N, d)`` float32: sums of keys; largest negated keys under ``"bound"``.
        more: ``(u, N, d)``: sums of squares; largest keys; ``main`` again where nothing more is needed.
    """

    pattern: TreePattern
    total: tuple[int, ...]
    first: tuple[int, ...]
    count: Tensor
    main: Tensor
    more: Tensor

    @property
    def nodes(self) -> int:
        """Nodes of all levels."""
        return self.count.shape[1]


def build_tree(pattern: TreePattern, key: Tensor, taken: Tensor) -> NodeTree:
    """Statistics of all nodes, bottom up.

    Args:
        pattern: The pattern; leaf and fanout are powers of two.
        key: ``(b, g, n, d)``, any strides.
        taken: ``(b or 1, n)`` boolean, the tokens that belong to nodes; others are never read.
    """
    length = key.shape[2]
    widths = [pattern.width(level) for level in range(pattern.levels(length))]
    total = tuple(-(-length // width) for width in widths)
    first = tuple(sum(total[:level]) for level in range(len(total)))
    before = F.pad(taken.cumsum(1), (1, 0))
    places = [torch.arange(0, length + width, width, device=key.device).clamp(max=length) for width in widths]
    ends = [before[:, place[: n + 1]] for place, n in zip(places, total)]
    count = torch.cat([x[:, 1:] - x[:, :-1] for x in ends], 1).float()
    kinds = {"mean": (SUM,), "cumulant": (SUM, SQUARES), "bound": (LARGEST_NEGATED, LARGEST)}[
        pattern.statistic
    ]
    made = [merged(pattern, key, taken, total, first, kind) for kind in kinds]
    return NodeTree(pattern, total, first, count.contiguous(), made[0], made[-1])


def merged(
    pattern: TreePattern, x: Tensor, taken: Tensor, total: tuple[int, ...], first: tuple[int, ...], kind: int
) -> Tensor:
    """What all nodes hold of their tokens.

    Args:
        pattern: The pattern.
        x: ``(b, g, n, channels)``, any strides.
        taken: As of ``build_tree``.
        total: Nodes of each level.
        first: Number of each level's first node.
        kind: ``SUM`` or another of the kinds.

    Returns:
        ``(u, N, channels)`` float32.
    """
    batch, heads, length, channels = x.shape
    out = x.new_empty(batch * heads, sum(total), channels, dtype=torch.float32)
    block = min(64, padded(channels))
    for level in range(0, len(total), _MERGED_LEVELS):
        levels = min(_MERGED_LEVELS, len(total) - level)
        width = pattern.fanout if level else pattern.leaf
        rows = max(_MERGED_ROWS, width * pattern.fanout ** (levels - 1))
        read = total[level - 1] if level else length
        bh_merge[(-(-read // rows), batch * heads, -(-channels // block))](
            out if level else x, taken, out, heads, read, *x.stride(), taken.stride(0) if taken.shape[0] > 1 else 0,
            sum(total), first[level - 1] if level else 0, first[level],
            D=channels, WIDTH=width, FANOUT=pattern.fanout, LEVELS=levels, TOKENS=level == 0, KIND=kind, ROWS=rows,
            BD=block, **LIGHT,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class Closed:
    """The nodes that groups of queries leave closed: with the opened leaves they tile the far field.

    Args:
        nodes: ``(choosers, groups, room)`` int32 numbers among the nodes of all levels; those of a group stand first.
        count: ``(choosers, groups)`` int32, how many.
    """

    nodes: Tensor
    count: Tensor

    @staticmethod
    def sorted(nodes: Tensor) -> Closed:
        """From numbers with -1 between them."""
        return Closed(nodes.sort(-1, descending=True).values, (nodes >= 0).sum(-1, dtype=torch.int32))


def choose(
    tree: NodeTree, query: Tensor, kv_heads: int, scale: float, rest: bool = False
) -> tuple[Tensor, Closed | None]:
    """What every group of queries opens.

    Args:
        tree: The tree.
        query: ``(b, h, n, d)``, any strides.
        kv_heads: Key heads.
        scale: Factor on the scores.
        rest: Whether the closed nodes are wanted.

    Returns:
        ``(b * h / heads of a chooser, groups, open)`` int32 numbers of leaves, best first, -1 fills up; the closed
        nodes, ``None`` where not wanted or where every candidate of such a sequence is kept.
    """
    pattern, length = tree.pattern, query.shape[2]
    levels = [
        Nodes(tree.main[:, first:], tree.more[:, first:], tree.count[:, first:], total)
        for first, total in zip(tree.first, tree.total)
    ]
    return descend(pattern, levels, query, kv_heads, scale, length, rest=rest)


@dataclass(frozen=True)
class Nodes:
    """One level.

    Args:
        main: ``(u, N, d)`` as in ``NodeTree``, any strides but of channels.
        more: Likewise.
        count: ``(u or b or 1, N)`` float32, any stride of rows.
        total: Nodes that are there; there may be room for more.
    """

    main: Tensor
    more: Tensor
    count: Tensor
    total: int


def descend(
    pattern: TreePattern, levels: Sequence[Nodes], query: Tensor, kv_heads: int, scale: float, length: int,
    start: int = 0, q_start: int = 0, rest: bool = False,
) -> tuple[Tensor, Closed | None]:  # fmt: skip
    """What groups of queries open, from the levels of a tree.

    Args:
        pattern: The pattern.
        levels: From the leaves up.
        query: ``(b, h, k, d)``, any strides, the queries from position ``q_start`` on.
        kv_heads: Key heads.
        scale: Factor on the scores.
        length: Tokens.
        start: Position of the first query of the first group.
        q_start: Position of the first query given; none before it is needed.
        rest: Whether the closed nodes are wanted; they are numbered through ``levels``.

    Returns:
        As ``choose``.
    """
    batch, heads, _, channels = query.shape
    per_unit = heads // kv_heads
    speakers = per_unit if pattern.share else 1
    samples = min(pattern.samples, pattern.group)
    choosers, groups = batch * heads // speakers, -(-(length - start) // pattern.group)
    block = min(32, padded(channels))
    left, right = (-1 if x is None else x for x in (pattern.left, pattern.right))
    top, cuts = len(levels) - 1, 2 if pattern.causal else 4
    keeps = [pattern.keep(level) for level in range(top + 1)]
    listed = [pattern.fanout * (keep + cuts) for keep in keeps[1:]] + [levels[top].total]
    room = sum(max(0, many - keep) for many, keep in zip(listed, keeps)) if rest else 0
    # Closed nodes so far: a level reads what the one above it wrote.
    counts = query.new_zeros(top + 2, choosers, groups, dtype=torch.int32) if room else None
    closed = query.new_empty(choosers, groups, room, dtype=torch.int32) if room else None
    above, kept_above = query.new_empty(0, dtype=torch.int32), 0
    for level in range(top, -1, -1):
        keep, nodes = keeps[level], levels[level]
        kept = torch.empty(choosers, groups, keep, dtype=torch.int32, device=query.device)
        lists: tuple[Tensor | int | None, ...] = (None,) * 5
        if counts is not None:
            lists = closed, counts[level + 1], counts[level], room, sum(each.total for each in levels[:level])
        bh_descend[(groups, choosers)](
            query, nodes.main, nodes.more, nodes.count, above, kept, *lists, heads, per_unit, length, start, q_start,
            *query.stride(), nodes.count.stride(0) if nodes.count.shape[0] > 1 else 0,
            nodes.main.shape[0] // nodes.count.shape[0], *nodes.main.stride()[:2], *nodes.more.stride()[:2], nodes.total,
            pattern.width(level), groups, left, right, scale,
            D=channels, BD=block, R=speakers, SAMPLES=samples, GROUP=pattern.group, BLOCK=pattern.block,
            FANOUT=pattern.fanout, CAUSAL=pattern.causal,
            STATISTIC=("mean", "cumulant", "bound").index(pattern.statistic), TOP=level == top,
            PRECISION=precision(torch.float32),
            KEEP_ABOVE=kept_above, KEEP=keep, REST=room > 0, BK=padded(max(listed[level], keep)),
            BV=padded(speakers * max(1, samples)), **HEAVY,
        )  # fmt: skip
        above, kept_above = kept, keep
    return above, None if closed is None or counts is None else Closed(closed, counts[0])
