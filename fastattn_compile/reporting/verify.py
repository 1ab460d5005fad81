"""What errors alone do not prove: nothing looks into the future, and each half of an operator carries something.

The causality probe changes what comes late in the input and looks at what comes early in the output. It is made twice:
at every site in float64 on the site's own tensors, where rounding hides nothing and the site is named; and through the
whole model, where a mask that was lost on the way to a site would show.

The controls put something in the place of every replaced site's output and measure the model again: a plain mean of the
visible values, a local window of as many keys, the operator's near field alone, its far field alone. An operator whose
far half is dead is no better than its near half, whatever its own error looks like (arXiv 2510.05901).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.errors import VerificationError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.observe import substituting
from fastattn_compile.reporting.metrics import equal_cost_window, sink_count, sink_keys
from fastattn_compile.reporting.rows import mix, near_and_far, score_chunks, softmax_over

CONTROLS = ("no_attention", "window", "near_only", "far_only")
# In float64 sums that are only ordered otherwise differ by about 1e-15; a pooled future token weighs far more than this.
_SITE_ALLOWED = 1e-9
# End to end, in the model's type, in units of its rounding error: sums in another order pass through many layers.
_MODEL_ALLOWED = {torch.float64: 100.0, torch.float32: 100.0}
_MODEL_ALLOWED_HALF = 4.0
_NO_CONTENT = ("attention_mask", "position_ids", "token_type_ids", "cache_position", "labels")


@dataclass(frozen=True)
class Causality:
    """What the future does to the past, relative to the largest output.

    Args:
        causal: Whether it does nothing; ``None`` where the exact model looks ahead itself, or gives no output a token.
        influence: Largest change of an earlier output of the replaced model.
        allowed: Up to where that is rounding.
        influence_exact: The same of the exact model.
        sites: Site to the largest change of its earlier outputs, in float64.
    """

    causal: bool | None
    influence: float
    allowed: float
    influence_exact: float
    sites: Mapping[str, float]

    def insist(self) -> None:
        """Stops where the past depends on the future.

        Raises:
            VerificationError: It does; the text names the site.
        """
        leaking = {site: leak for site, leak in self.sites.items() if not leak <= _SITE_ALLOWED}
        if leaking:
            worst = max(leaking, key=leaking.__getitem__)
            raise VerificationError(
                f"site {worst} is not causal: changing later tokens changes its earlier outputs by {leaking[worst]:.2g} "
                f"of their size, in float64 ({len(leaking)} of {len(self.sites)} sites)"
            )
        if self.causal is False:
            raise VerificationError(
                f"the replaced model is not causal: changing later tokens changes earlier outputs by "
                f"{self.influence:.2g} of their size ({self.influence_exact:.2g} in the exact model). Its sites are "
                "causal by themselves, so a mask was lost on the way to one"
            )


def cuts(length: int) -> list[int]:
    """Positions from which on the input is changed: within blocks of any size, early and late."""
    return sorted(
        {max(1, length // 3), length // 2 + 1, length - max(1, length // 7)} & set(range(1, length))
    )


def site_influence(
    operator: Operator, inputs: AttentionInputs, parameters: tuple[Tensor, ...], seed: int = 0
) -> float:
    """Largest change of a causal site's earlier outputs when later tokens change, relative to the largest output.

    Args:
        operator: What serves the site.
        inputs: Its tensors; the first sequence is looked at, in float64.
        parameters: Learned parameters, in order.
        seed: Seed of the changes.
    """
    learned = tuple(p.detach().double() for p in parameters)
    first = dataclasses.replace(
        inputs,
        key_padding=None if inputs.key_padding is None else inputs.key_padding[:1],
        segments=None if inputs.segments is None else inputs.segments[:1],
        bias=inputs.bias if inputs.bias is None or inputs.bias.dim() < 4 else inputs.bias[:1],
    )

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return operator.forward(dataclasses.replace(first, query=query, key=key, value=value), learned).out

    given = [x[:1].double() for x in (inputs.query, inputs.key, inputs.value)]
    before = outputs(*given)
    size = float(before.abs().max()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for cut in cuts(inputs.query.shape[2]):
        after = outputs(*(_noisy(x, cut, 2, generator) for x in given))
        worst = max(worst, float((after - before)[:, :, :cut].abs().max()) / size)
    return worst


def model_influence(
    predict: Callable[[Any], Tensor | None], inputs: Any, before: Tensor, seed: int = 0
) -> float | None:
    """Largest change of a model's earlier outputs when later tokens change, relative to the largest output.

    Args:
        predict: Gives the model's main output for inputs.
        inputs: As the model takes them.
        before: Its output for them, ``(batch, n, ...)``.
        seed: Seed of the changes.

    Returns:
        ``None`` where there is no output a token or no input to change.
    """
    length = before.shape[1] if before.dim() >= 2 else 0
    size = float(before.abs().max()) or 1.0
    worst: float | None = None
    for cut in cuts(length):
        changed = _changed_inputs(inputs, cut, length, seed)
        after = predict(changed) if changed is not None else None
        if after is None or after.shape != before.shape:
            return None
        worst = max(worst or 0.0, float((after - before)[:, :cut].float().abs().max()) / size)
    return worst


def model_allowed(influence_exact: float, dtype: torch.dtype) -> float:
    """Up to which influence of the future on the past is rounding.

    Args:
        influence_exact: That of the exact model.
        dtype: Type of the outputs.
    """
    factor = _MODEL_ALLOWED.get(dtype, _MODEL_ALLOWED_HALF)
    return max(4 * influence_exact, factor * torch.finfo(dtype).eps)


def probe_causality(
    replaced: Callable[[Any], Tensor | None],
    exact: Callable[[Any], Tensor | None],
    inputs: Any,
    seed: int = 0,
) -> Causality:
    """Both probes of a replaced model.

    Args:
        replaced: Gives the replaced model's main output for inputs.
        exact: Gives that of the exact model.
        inputs: As both take them.
        seed: Seed of the changes.
    """
    sites: dict[str, float] = {}

    def look(
        site: str,
        operator: Operator,
        seen: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
    ) -> Tensor:
        if operator.name != "exact" and seen.mask.causal and seen.query.shape[2] == seen.key.shape[2] > 1:
            sites[site] = max(sites.get(site, 0.0), site_influence(operator, seen, parameters, seed))
        return output.out

    with substituting(look):
        before = replaced(inputs)
    before_exact = exact(inputs)
    if before is None or before_exact is None or before.dim() < 2:
        return Causality(None, 0.0, 0.0, 0.0, sites)
    influence_exact = model_influence(exact, inputs, before_exact, seed)
    influence = model_influence(replaced, inputs, before, seed)
    if influence is None or influence_exact is None:
        return Causality(None, 0.0, 0.0, 0.0, sites)
    allowed = model_allowed(influence_exact, before.dtype)
    looks_ahead = influence_exact > model_allowed(0.0, before.dtype)
    return Causality(
        None if looks_ahead else influence <= allowed, influence, allowed, influence_exact, sites
    )


def control_deltas(measure: Callable[[], float | None]) -> dict[str, float]:
    """The model's delta with every control in the place of the replaced sites.

    Args:
        measure: Runs the replaced model and gives its delta to the exact one.

    Returns:
        Name of the control to the delta; without those that apply to no site.
    """
    found = {}
    for name in CONTROLS:
        control = Control(name)
        with substituting(control):
            delta = measure()
        if control.applied and delta is not None:
            found[name] = delta
    return found


class Control:
    """Puts a control in the place of every replaced site's output; for ``substituting``.

    Args:
        name: One of ``CONTROLS``.
    """

    def __init__(self, name: str) -> None:
        if name not in CONTROLS:
            raise ValueError(f"unknown control {name!r}; controls: {', '.join(CONTROLS)}")
        self.name = name
        self.applied = 0

    def __call__(
        self,
        site: str,
        operator: Operator,
        inputs: AttentionInputs,
        parameters: tuple[Tensor, ...],
        output: AttentionOutput,
    ) -> Tensor:
        """The control's output for a site, or the operator's own where the control does not apply."""
        halves = self.name in ("near_only", "far_only")
        if operator.name == "exact" or (halves and not operator.comes_apart):
            return output.out
        self.applied += 1
        made = torch.empty_like(output.out)
        rows = torch.arange(inputs.query.shape[2], device=made.device)
        window, sinks = equal_cost_window(inputs, operator), sink_keys(inputs, sink_count(operator))
        for part, scores in score_chunks(inputs, rows):
            if halves:
                met = operator.exact_keys(inputs, part, parameters)
                near, far = near_and_far(inputs, scores, met, output, part)
                made[:, :, part] = (near if self.name == "near_only" else far).to(made.dtype)
                continue
            seen = inputs.visible(part)
            if self.name == "no_attention":
                scores = torch.zeros_like(scores)
            else:
                keys = torch.arange(inputs.key.shape[2], device=part.device)
                near_keys = window.visible(part[:, None], keys[None], rows.numel(), keys.numel())
                seen = seen & (near_keys | sinks)
            made[:, :, part] = mix(softmax_over(scores, seen), inputs).to(made.dtype)
        return made


def _noisy(x: Tensor, cut: int, dim: int, generator: torch.Generator) -> Tensor:
    """The tensor with noise of its own size from a position on."""
    late = x.narrow(dim, cut, x.shape[dim] - cut)
    noise = torch.randn(late.shape, generator=generator, dtype=torch.float32).to(late)
    spread = x.std() if x.numel() > 1 else 1.0
    return torch.cat([x.narrow(dim, 0, cut), late + 2 * noise * spread], dim)


def _changed_inputs(inputs: Any, cut: int, length: int, seed: int) -> Any:
    """Inputs with other tokens from a position on; ``None`` when there is none to change."""
    named = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    generator = torch.Generator().manual_seed(seed)
    changed = dict(named)
    for name, value in named.items():
        content = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == length
        if not content or name in _NO_CONTENT or value.dtype == torch.bool:
            continue
        if value.is_floating_point():
            changed[name] = _noisy(value, cut, 1, generator)
        else:  # ids out of the input itself, so that each is a valid one
            known = value.flatten().unique()
            drawn = torch.randint(len(known), value[:, cut:].shape, generator=generator)
            changed[name] = torch.cat([value[:, :cut], known[drawn.to(known.device)]], 1)
    if all(changed[name] is value for name, value in named.items()):
        return None
    return changed if isinstance(inputs, Mapping) else tuple(changed.values())
