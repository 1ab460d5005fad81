"""The tree of a tree code over key positions, and the choice of what a query opens, on ATen, in lists: no n x
n tensor.

Sizes: ``u`` units (sequence and key head), ``c`` choosers of a unit (1 when its query heads share a choice,
else its query heads), ``v`` voices of a chooser (query heads times sampled queries), ``g`` groups of queries,
``d`` channels.

A node of level ``l`` covers ``leaf * fanout ** l`` consecutive positions. Nodes are candidates when they lie
wholly in the far field, hold a token, and have a parent that was kept or that reaches beyond the far field.
The best ``keep(l)`` candidates of each level are expanded, those of level 0 are opened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.kernels.tiles import without_nonfinite, work_dtype

# Nodes kept on the upper levels, where they are few and one wrong choice loses many keys.
MIN_BEAM = 8
# Scores of all nodes by one product are cheaper than gathering this many times fewer node vectors.
_DENSE = 12


@dataclass(frozen=True)
class TreePattern:
    """What of a configuration and a mask the tree and the choice depend on.

    Args:
        block: Tokens of a block; the near field is the own and the neighbouring blocks.
        leaf: Tokens of a leaf; divides ``block``.
        fanout: Children of a node.
        group: Consecutive queries that share a choice; divides ``block``.
        open: Leaves opened.
        beam: Nodes kept on the level above the leaves; half as many on each next one, down to ``MIN_BEAM``.
        sinks: First real tokens, which belong to no node.
        statistic: ``"mean"``, ``"cumulant"`` or ``"bound"``.
        samples: Queries that speak for a group; 0 for the mean of the group.
        share: Whether the query heads of a key head make one choice.
        causal: Whether queries see nothing after themselves.
        left: Largest distance back that the mask shows.
        right: Largest distance ahead that the mask shows.
        tolerance: Share of a row's mass that may stay unopened; 0 opens ``open`` leaves always.
    """

    block: int
    leaf: int
    fanout: int
    group: int
    open: int
    beam: int
    sinks: int
    statistic: str
    samples: int
    share: bool
    causal: bool
    left: int | None
    right: int | None
    tolerance: float

    def width(self, level: int) -> int:
        """Tokens a node covers."""
        return self.leaf * self.fanout**level

    def keep(self, level: int) -> int:
        """Candidates of a level that are expanded, or opened at level 0."""
        if level == 0:
            return self.open
        return max(min(self.beam, MIN_BEAM), self.beam >> (level - 1))

    def levels(self, length: int) -> int:
        """Levels of a sequence. Levels whose nodes would all be kept decide nothing and are left out."""
        count = 1
        while -(-length // self.width(count)) > self.keep(count):
            count += 1
        return count

    def far(self, first: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
        """The far field of groups of queries: stretches of keys outside the near field that the mask shows
        all of them.

        Args:
            first: ``(g,)`` position of each group's first query.
            length: Tokens of the sequence.

        Returns:
            First position and end of each stretch, ``(g,)`` both; an end beyond ``length`` closes an
            incomplete node.
        """
        block = torch.div(first, self.block, rounding_mode="floor")
        begin = (
            torch.zeros_like(first)
            if self.left is None
            else (first + self.group - 1 - self.left).clamp(min=0)
        )
        found = [(begin, ((block - 1) * self.block).clamp(min=0))]
        if not self.causal:
            shown = torch.full_like(first, length) if self.right is None else first + self.right + 1
            endless = torch.full_like(first, torch.iinfo(first.dtype).max)
            found.append(((block + 2) * self.block, torch.where(shown >= length, endless, shown)))
        return found


@dataclass(frozen=True)
class Level:
    """The nodes of one level.

    Args:
        features: ``(u, nodes, f)``: what the features of a query are multiplied with to give a score.
        log_count: ``(u, nodes)``, logarithm of the tokens of a node, -inf for none.
        first: Number of the level's first node among the nodes of all levels.
    """

    features: Tensor
    log_count: Tensor
    first: int


@dataclass(frozen=True)
class Tree:
    """All nodes of all units.

    Args:
        levels: From the leaves up.
        keys: ``(u, nodes, d)`` mean keys of all levels.
        values: ``(u, nodes, e)`` mean values, or ``None``.
        counts: ``(u, nodes)`` tokens.
    """

    levels: tuple[Level, ...]
    keys: Tensor
    values: Tensor | None
    counts: Tensor

    def levels_of(self, units: slice) -> tuple[Level, ...]:
        """The levels of some units."""
        return tuple(Level(x.features[units], x.log_count[units], x.first) for x in self.levels)


@dataclass(frozen=True)
class Sums:
    """What nodes are made of, and merged from: everything a statistic needs, as sums and extremes over
    tokens.

    Args:
        statistic: ``"mean"``, ``"cumulant"`` or ``"bound"``.
        parts: ``(u, nodes, ...)`` each: number of tokens, sum of keys, then for ``"cumulant"`` the sum of
            squared keys or for
            ``"bound"`` the largest of keys and negated keys, then the sum of values where it is wanted.
    """

    statistic: str
    parts: tuple[Tensor, ...]

    @staticmethod
    def of_tokens(statistic: str, keys: Tensor, values: Tensor | None, taken: Tensor) -> Sums:
        """Every token as a node.

        Args:
            statistic: The statistic.
            keys: ``(u, n, d)``.
            values: ``(u, n, e)`` when mean values are wanted.
            taken: ``(u, n)`` boolean, the tokens that belong to nodes.
        """
        hidden = ~taken[..., None]
        chosen = keys.masked_fill(hidden, 0)
        parts = [taken[..., None].to(keys.dtype), chosen]
        if statistic == "cumulant":
            parts.append(chosen * chosen)
        elif statistic == "bound":
            parts.append(torch.cat([keys, -keys], -1).masked_fill(hidden, -torch.inf))
        if values is not None:
            parts.append(values.masked_fill(hidden, 0))
        return Sums(statistic, tuple(parts))

    def merged(self, width: int) -> Sums:
        """Groups of ``width`` nodes as one node each; the last group may be short."""
        made = []
        for place, x in enumerate(self.parts):
            extreme = place == 2 and self.statistic == "bound"
            filled = F.pad(x, (0, 0, 0, -x.shape[1] % width), value=-torch.inf if extreme else 0.0)
            groups = filled.unflatten(1, (-1, width))
            made.append(groups.amax(2) if extreme else groups.sum(2))
        return Sums(self.statistic, tuple(made))

    def mean(self, part: int) -> Tensor:
        """A part divided by the number of tokens: 1 for mean keys, -1 for mean values."""
        return self.parts[part] / self.parts[0].clamp(min=1)

    @property
    def features(self) -> Tensor:
        """``(u, nodes, f)``: what ``query_features`` are multiplied with."""
        if self.statistic == "bound":
            return self.parts[2].masked_fill(self.parts[0] == 0, 0)
        if self.statistic == "cumulant":
            mean = self.mean(1)
            return torch.cat([mean, self.mean(2) - mean * mean], -1)
        return self.mean(1)

    @property
    def counts(self) -> Tensor:
        """``(u, nodes)`` tokens."""
        return self.parts[0].squeeze(-1)


def build_tree(pattern: TreePattern, keys: Tensor, values: Tensor | None, taken: Tensor) -> Tree:
    """Statistics of all nodes, bottom up, O(n d).

    Args:
        pattern: The pattern.
        keys: ``(u, n, d)``, 0 at padding.
        values: ``(u, n, e)`` when mean values are wanted.
        taken: ``(u, n)`` boolean, the tokens that belong to nodes: real ones that are no sinks.
    """
    sums = Sums.of_tokens(pattern.statistic, keys, values, taken)
    levels: list[Level] = []
    made: list[Sums] = []
    first = 0
    for level in range(pattern.levels(keys.shape[1])):
        sums = sums.merged(pattern.fanout if level else pattern.leaf)
        levels.append(Level(sums.features, sums.counts.log(), first))
        first += sums.counts.shape[1]
        made.append(sums)
    mean_keys = torch.cat([x.mean(1) for x in made], 1)
    mean_values = None if values is None else torch.cat([x.mean(-1) for x in made], 1)
    return Tree(tuple(levels), mean_keys, mean_values, torch.cat([x.counts for x in made], 1))


def query_features(pattern: TreePattern, query: Tensor, scale: float) -> Tensor:
    """What the features of a node are multiplied with: estimates ``log(mass / count)`` of the node for the
    query.

    ``mean``: the score of the mean key. ``cumulant``: plus half the variance of the scores under a diagonal
    covariance of the
    keys. ``bound``: the largest score that a key between the channel-wise extremes of the node can have.

    Args:
        pattern: The pattern.
        query: ``(..., d)``.
        scale: Factor on the scores.
    """
    scaled = query * scale
    if pattern.statistic == "cumulant":
        return torch.cat([scaled, 0.5 * scaled * scaled], -1)
    if pattern.statistic == "bound":
        return torch.cat([scaled.clamp(min=0), (-scaled).clamp(min=0)], -1)
    return scaled


def voices_of(pattern: TreePattern, query: Tensor, first: Tensor, kv_heads: int, start: int = 0) -> Tensor:
    """The queries that speak for groups, 0 in place of values that are not finite.

    Causal: the mean of the ``group`` queries that end with the group's first one, or some of them; nothing
    later, so that the
    choice is known when the first query of the group is. Else the group's own queries.

    Args:
        pattern: The pattern.
        query: ``(b, h, n, d)``, queries from position ``start`` on.
        first: ``(g,)`` position of each group's first query.
        kv_heads: Key heads.
        start: Position of the first query given; none before it is needed.

    Returns:
        ``(u, c, g, v, d)``, float32 or float64.
    """
    size, samples = pattern.group, min(pattern.samples, pattern.group)
    steps = torch.arange(samples or size, device=first.device) * (size // samples if samples else 1)
    place = first[:, None] - steps if pattern.causal else first[:, None] + steps
    stop = start + query.shape[2]
    taken = query[:, :, place.clamp(0, stop - 1) - start]
    taken = without_nonfinite(taken.to(work_dtype(taken)))
    if not samples:
        real = (place >= 0) & (place < stop)
        weight = real.to(taken.dtype) / real.sum(-1, keepdim=True).clamp(min=1)
        taken = (taken * weight[..., None]).sum(-2, keepdim=True)
    units = taken.unflatten(1, (kv_heads, -1)).flatten(0, 1)
    if pattern.share:
        return units.transpose(1, 2).flatten(2, 3)[:, None]
    return units


def _node_scores(level: Level, features: Tensor, nodes: Tensor) -> Tensor:
    """Estimated log mass of listed nodes: ``(u, c, g, v, f)`` and ``(u, c or 1, g, k)`` to ``(u, c, g, v,
    k)``."""
    units, choosers, groups, voices, _ = features.shape
    listed = nodes.shape[-1]
    total = level.features.shape[1]
    wide = nodes.expand(units, choosers, groups, listed)
    rows = level.features.transpose(1, 2)[:, None]
    if total <= _DENSE * listed:
        scores = (features.flatten(2, 3) @ rows).unflatten(2, (groups, voices))
        scores = scores.gather(4, wide[:, :, :, None].expand(-1, -1, -1, voices, -1))
    else:
        flat = wide.flatten(1)[..., None].expand(-1, -1, level.features.shape[2])
        taken = level.features.gather(1, flat).unflatten(1, (choosers, groups, listed))
        scores = features @ taken.mT
    count = level.log_count.gather(1, wide.flatten(1)).unflatten(1, (choosers, groups, listed))
    # A node with a value that is not finite comes first, so that whoever could see it does see it.
    scores = scores.masked_fill(~torch.isfinite(scores), torch.inf)
    return (scores + count[:, :, :, None]).masked_fill((count == -torch.inf)[:, :, :, None], -torch.inf)


def merge_voices(scores: Tensor) -> Tensor:
    """One ranking from several voices: the logarithm of the sum of the shares each gives a node.

    Args:
        scores: ``(..., v, k)`` log masses, -inf for no candidate, +inf for one that must be taken.

    Returns:
        ``(..., k)``; the scores themselves when there is one voice.
    """
    if scores.shape[-2] == 1:
        return scores.squeeze(-2)
    must = (scores == torch.inf).any(-2)
    finite = scores.masked_fill(scores == torch.inf, -torch.inf)
    total = finite.logsumexp(-1, keepdim=True)
    shares = finite - total.masked_fill(total == -torch.inf, 0)
    return shares.logsumexp(-2).masked_fill(must, torch.inf)


@dataclass(frozen=True)
class Choice:
    """What some groups of queries open.

    Args:
        leaves: ``(u, c, g, open)`` numbers of leaves, best first.
        opened: The same shape, boolean: false fills up.
        rest: ``(u, c, g, k)`` numbers, among the nodes of all levels, of the candidates that were left
            closed; they and the
            opened leaves tile the far field. ``None`` when not asked for.
        closed: The shape of ``rest``, boolean.
    """

    leaves: Tensor
    opened: Tensor
    rest: Tensor | None
    closed: Tensor | None


def _candidates(
    pattern: TreePattern, level: int, total: int, kept: Tensor, kept_valid: Tensor, first: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Children of the kept nodes, and of the parents that reach beyond the far field."""
    fan = torch.arange(pattern.fanout, device=kept.device)
    nodes = [(kept[..., None] * pattern.fanout + fan).flatten(-2)]
    valid = [kept_valid[..., None].expand(*kept_valid.shape, pattern.fanout).flatten(-2)]
    above = pattern.width(level + 1)
    edges: list[tuple[Tensor, Tensor]] = []
    for edge in (x for stretch in pattern.far(first, length) for x in stretch):
        parent, crossed = torch.div(edge, above, rounding_mode="floor"), edge % above != 0
        for other, listed_before in edges:
            crossed = crossed & ~(listed_before & (other == parent))
        edges.append((parent, crossed & (edge < length)))
    for parent, crossed in edges:
        child = (parent.clamp(max=total)[:, None] * pattern.fanout + fan).expand(*kept.shape[:3], -1)
        nodes.append(child)
        valid.append(crossed[:, None].expand_as(child))
    listed = torch.cat(nodes, -1)
    return listed.clamp(max=total - 1), torch.cat(valid, -1) & (listed < total)


def in_far_field(pattern: TreePattern, level: int, nodes: Tensor, first: Tensor, length: int) -> Tensor:
    """Whether nodes lie wholly in the far field of groups of queries.

    Args:
        pattern: The pattern.
        level: Level of the nodes.
        nodes: ``(..., g, k)`` numbers of nodes.
        first: ``(g,)`` position of a group's first query.
        length: Tokens of the sequence.
    """
    width = pattern.width(level)
    inside = torch.zeros_like(nodes, dtype=torch.bool)
    for begin, end in pattern.far(first, length):
        inside = inside | ((nodes * width >= begin[:, None]) & ((nodes + 1) * width <= end[:, None]))
    return inside


def choose(
    pattern: TreePattern,
    levels: tuple[Level, ...],
    voices: Tensor,
    scale: float,
    first: Tensor,
    length: int,
    near_log_mass: Tensor | None = None,
    rest: bool = False,
) -> Choice:
    """Descends the tree for some groups of queries.

    Args:
        pattern: The pattern.
        levels: The levels of the tree.
        voices: ``(u, c, g, v, d)`` queries that speak for the groups, finite.
        scale: Factor on the scores.
        first: ``(g,)`` position of each group's first query.
        length: Tokens of the sequence; while decoding, up to the first query.
        near_log_mass: ``(u, c, g, v)``, logarithm of the mass of what is met anyway, read under a tolerance.
        rest: Whether the closed nodes are wanted.
    """
    features = query_features(pattern, voices, scale)
    top = len(levels) - 1
    total = levels[top].log_count.shape[1]
    nodes = torch.arange(total, device=voices.device).expand(1, 1, len(first), total)
    valid = torch.ones_like(nodes, dtype=torch.bool)
    left: list[Tensor] = []
    left_valid: list[Tensor] = []
    left_mass: list[Tensor] = []
    for level in range(top, -1, -1):
        here = levels[level]
        allowed = valid & in_far_field(pattern, level, nodes, first, length)
        scores = _node_scores(here, features, nodes).masked_fill(~allowed[:, :, :, None], -torch.inf)
        merged = merge_voices(scores)
        nodes = nodes.expand(merged.shape)
        order = merged.argsort(-1, descending=True) if rest or pattern.tolerance else None
        count = min(pattern.keep(level), merged.shape[-1])
        best = merged.topk(count, -1).indices if order is None else order[..., :count]
        if order is not None:
            others = order[..., count:]
            left.append(nodes.gather(-1, others) + here.first)
            left_valid.append(merged.gather(-1, others) > -torch.inf)
            left_mass.append(_gather_voices(scores, others).logsumexp(-1))
        valid = merged.gather(-1, best) > -torch.inf
        nodes = nodes.gather(-1, best)
        if level:
            total = levels[level - 1].log_count.shape[1]
            nodes, valid = _candidates(pattern, level - 1, total, nodes, valid, first, length)
    leaves, opened = nodes, valid
    if pattern.tolerance and near_log_mass is not None:
        closed = torch.stack(left_mass, -1).logsumexp(-1)
        needed = cut_by_tolerance(_gather_voices(scores, best), closed, near_log_mass, pattern.tolerance)
        left.append(leaves)
        left_valid.append(opened & ~needed)
        opened = opened & needed
    if not rest:
        return Choice(leaves, opened, None, None)
    return Choice(leaves, opened, torch.cat(left, -1), torch.cat(left_valid, -1))


def _gather_voices(scores: Tensor, places: Tensor) -> Tensor:
    return scores.gather(-1, places[:, :, :, None].expand(*scores.shape[:-1], places.shape[-1]))


def cut_by_tolerance(scores: Tensor, closed: Tensor, near: Tensor, tolerance: float) -> Tensor:
    """Which of the ranked leaves must be opened for the estimated unopened mass of every voice to fall to a
    tolerance.

    Args:
        scores: ``(..., v, k)`` estimated log masses, best leaf first.
        closed: ``(..., v)`` estimated log mass of all nodes that stay closed in any case.
        near: ``(..., v)`` log mass of what is met anyway.
        tolerance: Share of the whole mass.

    Returns:
        ``(..., k)`` boolean, true for a first stretch of the leaves.
    """
    whole = torch.cat([scores, closed[..., None], near[..., None]], -1).logsumexp(-1, keepdim=True)
    whole = whole.masked_fill(whole == -torch.inf, 0)
    share = (scores - whole).exp()
    # Mass that stays unopened when the leaves before this one are opened and no more.
    unopened = share.flip(-1).cumsum(-1).flip(-1) + (closed[..., None] - whole).exp()
    return ~(unopened <= tolerance).all(-2)
