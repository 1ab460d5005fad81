"""What a report comes to, in sentences. They say what was lost as plainly as what was gained."""

from __future__ import annotations

from fastattn_compile.reporting.document import Report

# Bounds of the words on KL in nats a token: below the first a reader rarely sees a difference in the text.
_CLOSE, _VISIBLE = 0.01, 0.1
_LOWERED = {"eager": "run without a compiler"}


def verdict(report: Report) -> list[str]:
    """The sentences, most important first.

    Args:
        report: The document.
    """
    replaced = [site for site in report.sites if site.replaced]
    if not report.sites:
        return ["No softmax attention was found: there is nothing to replace."]
    if not replaced:
        return [
            f"All {len(report.sites)} softmax attentions stayed exact: nothing is gained and nothing is lost."
        ]
    return [
        f"{len(replaced)} of {len(report.sites)} softmax attentions were replaced.",
        *filter(
            None, (_quality(report), _controls(report), _halves(report), _causality(report), _cost(report))
        ),
    ]


def _quality(report: Report) -> str:
    model = report.model
    if model.kl is None:
        if model.hidden_error is None:
            return ""
        return f"The last hidden state is off by {model.hidden_error:.2g} of its length (median over tokens)."
    word = (
        "The model predicts nearly as before"
        if model.kl < _CLOSE
        else "The loss is small but visible"
        if model.kl < _VISIBLE
        else "The loss is heavy"
    )
    parts = [f"KL {model.kl:.2g} nats a token"]
    if model.top1 is not None:
        parts.append(f"{model.top1 * 100:.0f} % of the predictions unchanged")
    if model.ppl is not None and model.ppl_exact:
        change = change_text(model.ppl_exact, model.ppl, 0)
        parts.append(f"perplexity {model.ppl_exact:.3g} to {model.ppl:.3g} ({change})")
    return f"{word}: {', '.join(parts)}."


def _controls(report: Report) -> str:
    pairs = [
        (site.own_error, window)
        for site in report.sites
        if site.replaced
        and site.own_error is not None
        and (window := site.controls.get("window")) is not None
    ]
    beaten = sum(window <= own for own, window in pairs if own > 0)
    if not pairs:
        return ""
    if not beaten:
        return "At every replaced site the operator is closer to exact than a local window of as many keys."
    return (
        f"At {beaten} of {len(pairs)} replaced sites a local window of as many keys is at least as close to "
        "exact: there a plain window would do as well."
    )


def _halves(report: Report) -> str:
    """Whether the far field and the operator as a whole earn their cost, end to end."""
    model, controls = report.model, report.model.controls
    whole = model.kl if model.kl is not None else model.hidden_error
    if whole is None or not controls:
        return ""
    no_better = [
        text
        for name, text in (
            ("no_attention", "no attention at all"),
            ("window", "a local window of as many keys"),
            ("near_only", "its near field alone (the far field carries nothing here)"),
        )
        if (delta := controls.get(name)) is not None and delta <= whole
    ]
    if no_better:
        return f"End to end the operator is no better than {', nor than '.join(no_better)}."
    return f"End to end the operator is better than every control: {', '.join(n.replace('_', ' ') for n in controls)}."


def _causality(report: Report) -> str:
    if not report.checks:
        return ""
    if report.checks.get("causal"):
        return "Causal: changing later tokens does not change what comes before them."
    return "Causality was not checked: the base model itself looks ahead, or gives no output a token."


def _cost(report: Report) -> str:
    cost = report.cost
    parts = []
    if cost.attention_ms and cost.attention_ms_exact:
        parts.append(f"attention {_compared(cost.attention_ms_exact, cost.attention_ms)}")
    if cost.total_ms and cost.total_ms_exact:
        lowered = (
            f", both {_LOWERED.get(cost.compiler, f'lowered by {cost.compiler}')}" if cost.compiler else ""
        )
        parts.append(f"the whole model {_compared(cost.total_ms_exact, cost.total_ms)}{lowered}")
    if not parts:
        return ""
    where = f" at n = {cost.n}" if cost.n else ""
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}{where}."


def _compared(exact: float, replaced: float) -> str:
    return f"{exact / replaced:.2f}x faster" if replaced < exact else f"{replaced / exact:.2f}x slower"


def change_text(before: float, after: float, digits: int) -> str:
    """A change in per cent with its sign, for example ``+24 %``; no minus sign before a zero."""
    return f"{round((after / before - 1) * 100, digits) + 0.0:+.{digits}f} %"


def ratio_text(exact: float | None, replaced: float | None) -> str:
    """How many times faster, ``-`` when one of the times is missing."""
    return f"{exact / replaced:.2f}x" if exact and replaced else "-"
