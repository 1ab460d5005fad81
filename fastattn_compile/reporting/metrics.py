"""Accuracy of a replaced attention and of the model around it, on sampled rows and in chunks, never n x n.

At a site, a few query rows are computed exactly from the scores of those rows alone. From the same rows come
the operator's own error, the share of the softmax mass that lies on keys it meets one by one, and
controls without which a dead operator looks fine (arXiv 2510.05901): ``no_attention``, the plain mean of the
visible values, and a local ``window`` of the same number of keys; and, where an operator is one softmax over near
keys and summaries of the rest, its ``near_only`` and its ``far_only`` half. At the model, exact and replaced logits are
compared token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.window.cost import equal_window
from fastattn_compile.reporting.rows import mix, near_and_far, score_chunks, softmax_over

_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Quantiles:
    """Three quantiles of an error over tokens and heads.

    Args:
        median: Half of the rows are better.
        p95: One row in twenty is worse.
        p99: One row in a hundred is worse.
    """

    median: float
    p95: float
    p99: float

    @staticmethod
    def of(values: Tensor) -> Quantiles | None:
        """Quantiles of all elements, ``None`` when there are none."""
        if values.numel() == 0:
            return None
        points = torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)
        # sort, not torch.quantile: the latter refuses more than 2**24 elements.
        ordered = values.detach().flatten().double().cpu().sort().values
        places = points * (ordered.numel() - 1)
        low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
        median, p95, p99 = torch.where(low == high, low, low + (high - low) * places.frac()).tolist()
        return Quantiles(median, p95, p99)


def sample_rows(length: int, rows: int, seed: int = 0) -> Tensor:
    """Query positions to look at: one at random in each of ``rows`` equal strata, so every depth is seen.

    Args:
        length: Number of queries.
        rows: How many positions; all of them when ``rows >= length``.
        seed: Seed of the choice.

    Returns:
        ``(min(rows, length),)`` int64, increasing, on the CPU.

    Raises:
        ValueError: ``rows`` or ``length`` is not positive.
    """
    if rows < 1 or length < 1:
        raise ValueError(f"rows and length must be positive, got rows={rows}, length={length}")
    if rows >= length:
        return torch.arange(length)
    edges = torch.arange(rows + 1) * length // rows
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(rows, generator=generator, dtype=torch.float64) * (edges[1:] - edges[:-1])
    return edges[:-1] + inside.long()


def relative_error(replaced: Tensor, exact: Tensor) -> Tensor:
    """``||replaced - exact|| / ||exact||`` over the last dimension; 0 where both are 0.

    Args:
        replaced: ``(..., e)``.
        exact: ``(..., e)``.

    Returns:
        ``(...)``, float32 or wider.
    """
    wide = torch.promote_types(exact.dtype, torch.float32)
    exact, replaced = exact.to(wide), replaced.to(wide)
    difference, size = (replaced - exact).norm(dim=-1), exact.norm(dim=-1)
    return torch.where(difference == 0, torch.zeros_like(size), difference / size)


@dataclass(frozen=True)
class RowProbe:
    """What the sampled rows of one site say of an operator. Each tensor is flat over batch, head and row.

    Args:
        own_error: Relative error of the operator's output.
        mass_recall: Softmax mass on ``Operator.exact_keys``.
        controls: Relative error of each control.
    """

    own_error: Tensor
    mass_recall: Tensor
    controls: dict[str, Tensor]


def probe_rows(
    inputs: AttentionInputs,
    rows: Tensor,
    out: Tensor,
    operator: Operator,
    parameters: tuple[Tensor, ...] = (),
    log_sum_exp: Tensor | None = None,
) -> RowProbe:
    """Compares an operator's output with softmax attention on a few query rows.

    Rows that see no key and rows of padding tokens are left out.

    Args:
        inputs: The tensors of the site.
        rows: ``(r,)`` query positions.
        out: ``(batch, heads, query_len, value_dim)``, the operator's output.
        operator: The operator that gave it.
        parameters: Its learned parameters, in order: which keys it meets may depend on them.
        log_sum_exp: ``(batch, heads, query_len)``, of the operator: splits far from near field where the two come
            apart (``Operator.comes_apart``).
    """
    window = equal_cost_window(inputs, operator)
    sinks = sink_keys(inputs, sink_count(operator))
    chunks: list[dict[str, Tensor]] = []
    for part, scores in score_chunks(inputs, rows):
        seen = inputs.visible(part)
        weights = softmax_over(scores, seen)
        exact = mix(weights, inputs)
        keys = torch.arange(inputs.key.shape[2], device=part.device)
        near = window.visible(part[:, None], keys[None], inputs.query.shape[2], keys.numel()) | sinks
        met = operator.exact_keys(inputs, part, parameters)
        controls = {
            "no_attention": mix(softmax_over(torch.zeros_like(scores), seen), inputs),
            "window": mix(softmax_over(scores, seen & near), inputs),
        }
        if log_sum_exp is not None and operator.comes_apart:
            output = AttentionOutput(out, log_sum_exp)
            controls["near_only"], controls["far_only"] = near_and_far(inputs, scores, met, output, part)
        error = relative_error(out[:, :, part], exact)
        chunks.append(
            {
                "own_error": error,
                "mass_recall": (weights * met).sum(-1),
                **{name: relative_error(control, exact) for name, control in controls.items()},
                "kept": counted_rows(inputs, part, seen).expand_as(error),
            }
        )
    whole = {name: torch.cat([chunk[name] for chunk in chunks], dim=-1).cpu() for name in chunks[0]}
    kept = whole.pop("kept")
    flat = {name: values[kept] for name, values in whole.items()}
    return RowProbe(flat.pop("own_error"), flat.pop("mass_recall"), flat)


def counted_rows(inputs: AttentionInputs, rows: Tensor, seen: Tensor | None = None) -> Tensor:
    """Which sampled rows an error is taken over: those that see a key and are no padding tokens.

    Args:
        inputs: The tensors of the site.
        rows: ``(r,)`` query positions.
        seen: ``inputs.visible(rows)`` when it is at hand.

    Returns:
        ``(batch or 1, 1, r)`` boolean.
    """
    kept = (inputs.visible(rows) if seen is None else seen).any(-1)
    if inputs.key_padding is not None and inputs.query.shape[2] == inputs.key.shape[2]:
        kept = kept & inputs.key_padding[:, None, rows]
    return kept


def sink_count(operator: Operator) -> int:
    """How many first keys the operator always meets one by one; 0 when it has no such option."""
    return int(getattr(operator.config, "sinks", 0) or 0)


def sink_keys(inputs: AttentionInputs, count: int) -> Tensor:
    """The first keys that are no padding: ``(batch or 1, 1, 1, key_len)`` boolean.

    Args:
        inputs: The tensors of the site.
        count: How many.
    """
    if inputs.key_padding is None:
        return (torch.arange(inputs.key.shape[2], device=inputs.key.device) < count)[None, None, None]
    first = inputs.key_padding.cumsum(-1) <= count
    return (inputs.key_padding & first)[:, None, None]


def equal_cost_window(inputs: AttentionInputs, operator: Operator) -> MaskStructure:
    """The narrowest local window that meets, with the operator's sinks, at least as many keys a query as it.

    Args:
        inputs: The tensors of the site.
        operator: Its ``cost`` gives the number of keys, ``config.sinks`` the number of sinks.

    Returns:
        The band alone; sinks and the site's own mask come on top.
    """
    spec = inputs.spec()
    window = equal_window(operator.cost(spec).keys_per_query, spec, sink_count(operator))
    return window.band(inputs.mask)


@dataclass(frozen=True)
class TokenMetrics:
    """How the replaced model's prediction compares at every token.

    Args:
        kl: ``(batch, n)``, KL(exact || replaced) in nats.
        top1: ``(batch, n)`` boolean, both predict the same token.
        nll_exact: ``(batch, n)``, negative log-likelihood of the next token; NaN where there is no label.
        nll: The same of the replaced model.
    """

    kl: Tensor
    top1: Tensor
    nll_exact: Tensor
    nll: Tensor


@dataclass(frozen=True)
class Summary:
    """Token metrics over a span of positions.

    Args:
        kl: Mean KL(exact || replaced) in nats a token.
        top1: Share of tokens with the same prediction.
        ppl_exact: Perplexity of the exact model; ``None`` without labels.
        ppl: Perplexity of the replaced model; ``None`` without labels.
        tokens: Number of tokens counted.
    """

    kl: float
    top1: float
    ppl_exact: float | None
    ppl: float | None
    tokens: int


def compare_logits(exact: Tensor, replaced: Tensor, labels: Tensor | None = None) -> TokenMetrics:
    """Compares two models' logits token by token, in chunks.

    Args:
        exact: ``(batch, n, vocabulary)`` logits of the exact model.
        replaced: Logits of the replaced model, same shape.
        labels: ``(batch, n)`` token ids, not shifted: the label of position ``t`` is ``labels[:, t + 1]``.
            Negative ids are not counted.

    Raises:
        ValueError: The shapes do not agree.
    """
    if exact.dim() != 3 or exact.shape != replaced.shape:
        raise ValueError(
            "logits must have one shape (batch, n, vocabulary), "
            f"got {tuple(exact.shape)} and {tuple(replaced.shape)}"
        )
    batch, length, vocabulary = exact.shape
    if labels is not None and tuple(labels.shape) != (batch, length):
        raise ValueError(f"labels must have shape {(batch, length)}, got {tuple(labels.shape)}")
    target = torch.full((batch, length), -1, dtype=torch.long, device=exact.device)
    if labels is not None:
        target[:, :-1] = labels[:, 1:].to(exact.device)
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, _CHUNK_ELEMENTS // (batch * vocabulary))
    for start in range(0, length, step):
        span = slice(start, start + step)
        # float32 keeps a token's KL to about 1e-6 nats; the sums over tokens below are float64.
        p, q = exact[:, span].float().log_softmax(-1), replaced[:, span].float().log_softmax(-1)
        wanted = target[:, span]
        index = wanted.clamp(min=0)[..., None]
        unknown = wanted < 0
        nll_exact, nll = (
            -x.gather(-1, index)[..., 0].double().masked_fill(unknown, math.nan) for x in (p, q)
        )
        top1 = p.argmax(-1) == q.argmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).double().clamp(min=0)
        parts.append((kl.cpu(), top1.cpu(), nll_exact.cpu(), nll.cpu()))
    return TokenMetrics(*(torch.cat(columns, dim=1) for columns in zip(*parts)))


def summarise(tokens: TokenMetrics, real: Tensor | None = None, span: slice = slice(None)) -> Summary | None:
    """Means over a span of positions.

    Args:
        tokens: From ``compare_logits``.
        real: ``(batch, n)`` boolean, true where a token is no padding; all when ``None``.
        span: Positions.

    Returns:
        The summary, ``None`` when no token is left.
    """
    kept = torch.ones_like(tokens.top1) if real is None else real.cpu().bool()
    inside = torch.zeros_like(kept)
    inside[:, span] = True
    kept = kept & inside
    count = int(kept.sum())
    if count == 0:
        return None
    labelled = kept & ~tokens.nll.isnan()
    if real is not None:
        labelled[:, :-1] &= real[:, 1:].cpu().bool()
    known = bool(labelled.any())
    return Summary(
        kl=float(tokens.kl[kept].mean()),
        top1=float(tokens.top1[kept].double().mean()),
        ppl_exact=_exp(float(tokens.nll_exact[labelled].mean())) if known else None,
        ppl=_exp(float(tokens.nll[labelled].mean())) if known else None,
        tokens=count,
    )


def _exp(value: float) -> float:
    """``exp`` that overflows to infinity."""
    return math.exp(value) if value < 700 else math.inf


def thirds(length: int) -> list[slice]:
    """The positions in three equal spans, first to last; fewer when there are fewer positions."""
    edges = [length * i // 3 for i in range(4)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def cosine(replaced: Tensor, exact: Tensor) -> Tensor:
    """Cosine between two ``(..., e)`` tensors along their last dimension; 0 where one of them is 0."""
    return torch.nn.functional.cosine_similarity(replaced.float(), exact.float(), dim=-1)
