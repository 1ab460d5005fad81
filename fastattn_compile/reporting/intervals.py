"""How sure a delta is: confidence intervals by a paired bootstrap over stretches of the text.

Both models read the same tokens, so what is drawn again is a stretch with both models' numbers on it: the text's own
difficulty cancels. Tokens beside each other are alike, so stretches of 64 of them are drawn, not single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastattn_compile.reporting.metrics import TokenMetrics

STRETCH = 64
LEAST_STRETCHES = 5
_DRAWS = 2000
_LEVEL = 0.95


def bootstrap(
    columns: Mapping[str, Tensor], counted: Tensor, seed: int = 0, stretch: int = STRETCH
) -> dict[str, Tensor]:
    """Means of token numbers over resampled stretches.

    Args:
        columns: ``(batch, n)`` each; NaN where a token has no such number.
        counted: ``(batch, n)`` boolean, the tokens that count.
        seed: Seed of the draws.
        stretch: Tokens that are drawn together.

    Returns:
        For each column ``(draws,)`` float64 means; the same draws for all columns. Empty when the text has fewer than
        ``LEAST_STRETCHES`` stretches: an interval of so few would say nothing.
    """
    length = counted.shape[1]
    place = torch.arange(length) // stretch
    units = (torch.arange(counted.shape[0])[:, None] * (int(place[-1]) + 1) + place).flatten()
    units = torch.unique(units, return_inverse=True)[1]
    filled = torch.zeros(int(units.max()) + 1, dtype=torch.float64).index_add(
        0, units, counted.flatten().double()
    )
    if int((filled > 0).sum()) < LEAST_STRETCHES:
        return {}
    generator = torch.Generator().manual_seed(seed)
    kept = filled.nonzero()[:, 0]
    drawn = kept[torch.randint(len(kept), (_DRAWS, len(kept)), generator=generator)]
    means = {}
    for name, values in columns.items():
        there = counted & ~values.double().isnan()
        total, number = (
            torch.zeros(len(filled), dtype=torch.float64).index_add(0, units, x.flatten())
            for x in (values.double().nan_to_num(0.0) * there, there.double())
        )
        means[name] = total[drawn].sum(-1) / number[drawn].sum(-1)
    return means


def interval(draws: Tensor, level: float = _LEVEL) -> list[float]:
    """The middle of the draws: lower and upper end.

    Args:
        draws: ``(draws,)``.
        level: Share of the draws inside.
    """
    tail = (1 - level) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return [low, high]


def token_intervals(
    tokens: TokenMetrics, real: Tensor | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals of the delta between two language models.

    Args:
        tokens: From ``compare_logits``.
        real: ``(batch, n)`` boolean, true where a token is no padding; all when ``None``.
        seed: Seed of the draws.

    Returns:
        ``kl``, ``top1``, and, with labels, ``ppl_change``: the perplexity's relative change. Empty for a short text.
    """
    counted = torch.ones_like(tokens.top1) if real is None else real.cpu().bool()
    change = tokens.nll - tokens.nll_exact
    if real is not None:
        change = change.clone()
        change[:, :-1][~real[:, 1:].cpu().bool()] = torch.nan
    columns = {"kl": tokens.kl, "top1": tokens.top1.double(), "change": change}
    means = bootstrap(columns, counted, seed)
    found: dict[str, list[float]] = {}
    found.update({name: interval(means[name]) for name in ("kl", "top1") if name in means})
    if means and bool(means["change"].isfinite().all()):
        found["ppl_change"] = interval(means["change"].exp() - 1)
    return found
