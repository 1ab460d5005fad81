"""What could serve a site, and what that costs on this device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastattn_compile.errors import OptionError
from fastattn_compile.machine import drain
from fastattn_compile.operators.base import AttentionInputs, Operator, SiteSpec
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.speed import predicted_seconds
from fastattn_compile.reporting.timing import exact_attention
from fastattn_compile.retrofitting.journal import Journal

Options = Mapping[str, Any]
Wanted = Iterable[str | tuple[str, Options]] | Mapping[str, Sequence[Options]]

SECONDS, PREDICTED, FLOPS = "seconds", "predicted seconds", "flops"
_RUNS = 3

# Of every operator a ladder of budgets. Those with learned parameters are tried when they are named.
LADDERS: Mapping[str, Sequence[Options]] = {
    "barnes_hut": (
        {"block": 32, "open": 8, "beam": 16},
        {"block": 32, "open": 16, "beam": 16},
        {"open": 16},
        {"open": 28},
        {"open": 48},
        {"open": 64},
        # On long sequences what the beam drops is lost before leaves are opened: it grows with them. Where heads look at
        # places of their own, a choice for each query head costs no more arithmetic and has half the error.
        {"block": 32, "open": 16, "beam": 16, "share_group": False},
        {"block": 32, "open": 32, "beam": 32, "share_group": False},
        {"open": 64, "beam": 48, "share_group": False},
        {"open": 128, "beam": 64, "share_group": False},
        {"open": 256, "beam": 128, "share_group": False},
        # Queries that choose together share the price of the choice: a beam that lets nearly every node through, and the
        # variance of a node's keys beside their mean, without which nodes of unlike keys are overlooked. On some sites that
        # has a tenth of the error; where neighbours look at places of their own, twice that of a choice for each.
        {"open": 32, "beam": 64, "group": 8, "select": "cumulant"},
        {"open": 80, "beam": 128, "group": 8, "select": "cumulant"},
        {"block": 32, "open": 48, "beam": 256, "group": 32, "select": "cumulant"},
        {"block": 32, "open": 96, "beam": 320, "group": 32, "select": "cumulant"},
        {"block": 32, "open": 192, "beam": 512, "group": 32, "select": "cumulant"},
        {"block": 32, "open": 128, "beam": 128, "group": 8, "select": "cumulant", "share_group": False},
    ),
    "window": ({"width": 64}, {"width": 128}, {"width": 256}, {"width": 512}, {"width": 1024}),
    "fma": ({"block": 32}, {"block": 64, "rank": 16}, {"block": 128}),
    "cast": (
        {"clusters": 32, "cluster_size": 64, "clustering": "token_choice", "select": "key", "combine": "lse"},
    ),
    "tf_attention": ({"height": 4, "window": 64, "sinks": 4}, {"height": 3, "window": 128, "sinks": 4}),
    "tc_attention": ({"height": 6}, {"height": 8}),
    "linformer": ({"rank": 64}, {"rank": 128}),
    "conv_basis": ({"k": 16}, {"k": 64}),
}
DEFAULT = ("barnes_hut", "window", "fma")


def wanted_operators(operators: Wanted | None) -> list[tuple[Operator, dict[str, Any]]]:
    """The operators to try, with the options that make them.

    Args:
        operators: Names, of which a ladder of configurations is tried; pairs of name and options; or a mapping of name to
            a list of options.

    Raises:
        OptionError: A name or an option is wrong, or there is none.
    """
    pairs: list[tuple[str, dict[str, Any]]] = []
    if isinstance(operators, Mapping):
        pairs = [(name, dict(options)) for name, ladder in operators.items() for options in ladder]
    else:
        for entry in DEFAULT if operators is None else operators:
            if isinstance(entry, str):
                pairs += [(entry, dict(options)) for options in LADDERS.get(entry, ({},))]
            else:
                pairs.append((entry[0], dict(entry[1])))
    try:
        found = [(make_operator(name, **options), options) for name, options in pairs if name != "exact"]
    except (ValueError, TypeError) as error:
        raise OptionError(f"operators: {error}") from error
    if not found:
        raise OptionError("operators names none but exact attention: there is nothing to choose from")
    return list({operator.token: (operator, options) for operator, options in found}.values())


class Costs:
    """Cost of an operator at a site, each measured or computed once.

    Args:
        unit: ``"seconds"``: measured here. ``"predicted seconds"``: from the cost model of this device. ``"flops"``:
            counted, the selection of what is met included.
        n: Tokens a sequence that the cost is for; those of the site when ``None``.
        journal: Where measured times are kept.
    """

    def __init__(self, unit: str, n: int | None, journal: Journal) -> None:
        self.unit, self.n, self.journal = unit, n, journal

    def at(self, spec: SiteSpec) -> SiteSpec:
        """The site with the sequence length of the cost."""
        if self.n is None or spec.kind != "self" or spec.query_len != spec.key_len:
            return spec
        return dataclasses.replace(spec, query_len=self.n, key_len=self.n)

    def of(self, operator: Operator, spec: SiteSpec) -> float:
        """Cost of one forward pass."""
        at = self.at(spec)
        if self.unit == FLOPS:
            return operator.cost(at).flops
        if self.unit == PREDICTED:
            return predicted_seconds(operator, at)
        sizes = (at.batch, at.heads, at.kv_heads, at.query_len, at.key_len, at.head_dim, at.value_dim)
        name = f"time/{operator.token}/{sizes}/{at.dtype}/{at.device}/{at.mask}"
        return float(self.journal.get(name, lambda: _seconds(operator, at)))


def _seconds(operator: Operator, spec: SiteSpec) -> float:
    """The shortest of a few runs on random tensors; for exact attention the best kernel there is."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, length: int, channels: int) -> torch.Tensor:
        values = torch.randn(int(spec.batch), int(heads), int(length), int(channels), generator=generator)
        return values.to(spec.device, spec.dtype)

    query = drawn(spec.heads, spec.query_len, spec.head_dim)
    key = drawn(spec.kv_heads, spec.key_len, spec.head_dim)
    value = drawn(spec.kv_heads, spec.key_len, spec.value_dim)
    batch, length = key.shape[0], key.shape[2]
    padding = (
        torch.ones(batch, length, dtype=torch.bool, device=key.device) if spec.mask.key_padding else None
    )
    segments = torch.zeros(batch, length, dtype=torch.long, device=key.device) if spec.mask.segments else None
    inputs = AttentionInputs(query, key, value, query.shape[-1] ** -0.5, spec.mask, padding, segments)
    if operator.name == "exact":
        _, call = exact_attention(inputs)
    else:
        parameters = tuple(
            p.to(key.device)
            for p in (operator.initial_parameters(spec, inputs).values() if operator.learned else ())
        )

        def call() -> Any:
            return torch_op(operator.name)(
                query, key, value, padding, segments, None, list(parameters), inputs.scale, str(spec.mask),
                operator.token, "",
            )  # fmt: skip

    best = float("inf")
    with torch.no_grad():
        call()
        for _ in range(_RUNS):
            drain(key.device)
            start = time.perf_counter()
            call()
            drain(key.device)
            best = min(best, time.perf_counter() - start)
    return best
