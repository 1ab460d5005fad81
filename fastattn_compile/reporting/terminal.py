"""Scans and reports as tables of at most 100 columns; colour on a terminal only, and never alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastattn_compile.reporting.document import Report, SiteReport, SpanReport
from fastattn_compile.reporting.verdict import change_text, ratio_text, verdict

if TYPE_CHECKING:
    from fastattn_compile.passes.site import Softmax
    from fastattn_compile.scanning import Scan

WIDTH = 100
_LISTED = 40
_WORST = 12
_LEGEND = (
    "own: median relative error of the operator alone; p95: 95 % of the rows are better; model: in the "
    "replaced model, with what came from below; mass: softmax mass on keys met one by one; window, none, near, "
    "far: own error of a local window of as many keys, of the plain mean, of the operator's near field and of "
    "its far field alone; keys: a query meets; speed: over exact"
)
_CHECKED = "checked: the mask is data to the graph; read from its values, and compared before every call"
_SITE_COLUMNS: dict[str, Callable[[SiteReport], str]] = {
    "own": lambda site: number(site.own_error),
    "p95": lambda site: number(site.own_error_p95),
    "model": lambda site: number(site.accumulated_error),
    "mass": lambda site: number(site.mass_recall),
    "window": lambda site: number(site.controls.get("window")),
    "none": lambda site: number(site.controls.get("no_attention")),
    "near": lambda site: number(site.controls.get("near_only")),
    "far": lambda site: number(site.controls.get("far_only")),
    "keys": lambda site: number(site.keys_per_query, ".0f"),
    "speed": lambda site: ratio_text(site.attention_ms_exact, site.attention_ms),
}
_STATUS = {"taken": "green", "exact": "yellow", "not_attention": "dim"}


def console(file: IO[str] | None = None) -> Console:
    """A console of at most 100 columns; 100 where the output is no terminal, and no colour there.

    Args:
        file: Where to; standard output when ``None``.
    """
    made = Console(file=file, highlight=False, soft_wrap=False)
    made.width = min(WIDTH, made.width) if made.is_terminal else WIDTH
    return made


def print_scan(scan: Scan, file: IO[str] | None = None, *, full: bool = False) -> None:
    """Prints every softmax of a model with what became of it.

    Args:
        scan: From ``fa.scan``.
        file: Where to; standard output when ``None``.
        full: One line a softmax; otherwise layers that differ in their number only share a line.
    """
    out = console(file)
    if not scan.softmaxes:
        out.print("No softmax was found in this model.")
        return
    table = new_table("softmax", "status", "kind", "mask", "heads", "kv", "dim")
    reasons: dict[tuple[str, str], list[str]] = {}
    for names, softmax in _alike(scan.softmaxes, full):
        sizes = [str(x) if x else "" for x in (softmax.heads, softmax.kv_heads, softmax.head_dim)]
        status = f"[{_STATUS.get(softmax.status, 'default')}]{softmax.status.replace('_', ' ')}[/]"
        table.add_row(escape(names), status, softmax.kind, escape(mask_text(softmax)), *sizes)
        if softmax.reason:
            reasons.setdefault((softmax.status, softmax.reason), []).append(names)
    out.print(table)
    if any(softmax.checked for softmax in scan.softmaxes):
        out.print(_CHECKED, style="dim")
    _print_reasons(out, reasons)
    counts = scan.counts
    out.print(
        f"{counts['taken']} of {len(scan.softmaxes)} softmaxes can be replaced, "
        f"{counts['exact']} stay exact, {counts['not_attention']} are not attention."
    )


def print_report(report: Report, file: IO[str] | None = None, *, full: bool = False) -> None:
    """Prints a report: the delta of each site, the delta end to end, the cost, and what it comes to.

    Args:
        report: The document.
        file: Where to; standard output when ``None``.
        full: Every site, also beyond 40.
    """
    out = console(file)
    if report.sites:
        _print_sites(out, report.sites, full)
    _print_model(out, report)
    _print_cost(out, report)
    for sentence in verdict(report):
        out.print(escape(sentence))


def new_table(name: str, *columns: str, title: str | None = None) -> Table:
    """A table of the house: names to the left, numbers to the right."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(name, overflow="fold")
    for column in columns:
        words = column in ("status", "kind", "mask", "operator")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _alike(softmaxes: Sequence[Any], full: bool) -> Iterable[tuple[str, Any]]:
    """Neighbours that differ only in numbers inside their names, as one; each by itself when ``full``."""

    def looks(softmax: Any) -> tuple[Any, ...]:
        same = (softmax.status, softmax.reason, softmax.kind, softmax.mask, softmax.checked, softmax.heads)
        name = softmax.name if full else re.sub(r"\d+", "#", softmax.name)
        return (name, *same, softmax.kv_heads, softmax.head_dim)

    for _, group in groupby(softmaxes, key=looks):
        members = list(group)
        yield joined_names([member.name for member in members]), members[0]


def mask_text(softmax: Softmax) -> str:
    """The mask of a softmax, and whether it was read from values."""
    return f"{softmax.mask} (checked)" if softmax.checked else softmax.mask


def joined_names(names: Sequence[str]) -> str:
    """One name for layers that differ in numbers: ``layers.{0..29}.attn (30)``.

    Args:
        names: At least one name, alike but for their numbers.
    """
    if len(set(names)) == 1:
        return names[0] if len(names) == 1 else f"{names[0]} ({len(names)})"
    rows = [re.split(r"(\d+)", name) for name in names]
    parts = []
    for column in zip(*rows):
        values = list(dict.fromkeys(column))
        parts.append(values[0] if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}")
    return f"{''.join(parts)} ({len(names)})"


def _print_reasons(out: Console, reasons: dict[tuple[str, str], list[str]]) -> None:
    for (status, reason), names in reasons.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        out.print(escape(f"{status.replace('_', ' ')}: {listed}: {reason}"))


def _print_sites(out: Console, sites: Sequence[SiteReport], full: bool) -> None:
    shown = list(sites)
    title = None
    if len(sites) > _LISTED and not full:
        worst = sorted(sites, key=lambda s: s.accumulated_error or s.own_error or 0.0, reverse=True)[:_WORST]
        shown = [site for site in sites if site in worst]
        title = f"the {len(shown)} of {len(sites)} sites with the largest error"
    # A column that nothing was measured for is left out.
    columns = [name for name, cell in _SITE_COLUMNS.items() if any(cell(site) != "-" for site in sites)]
    table = new_table("site", "operator", *columns, title=title)
    reasons: dict[tuple[str, str], list[str]] = {}
    for site in shown:
        table.add_row(escape(site.name), site.operator, *(_SITE_COLUMNS[name](site) for name in columns))
    for site in sites:
        if site.reason and not site.replaced:
            reasons.setdefault(("exact", site.reason), []).append(site.name)
    out.print(table)
    if columns:
        out.print(_LEGEND, style="dim")
    _print_diagnostics(out, sites)
    _print_reasons(out, reasons)
    _print_broken(out, sites)


def _print_broken(out: Console, sites: Sequence[SiteReport]) -> None:
    """Masks that were other than on the first batch."""
    for calls, members in groupby(sites, key=lambda site: site.mask_broken):
        if calls:
            names = [site.name for site in members]
            out.print(
                escape(
                    f"mask: {joined_names(names)}: other than read on {calls} calls, which ran exact and uncompiled"
                )
            )


def _print_diagnostics(out: Console, sites: Sequence[SiteReport]) -> None:
    """What operators say of themselves: the mean over their sites, and the site with the most."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for site in sites:
        for name, value in site.diagnostics.items():
            found.setdefault((site.operator, name), []).append((value, site.name))
    for (operator, name), values in found.items():
        mean, (most, where) = sum(value for value, _ in values) / len(values), max(values)
        words = f"{operator}: {name.replace('_', ' ')} {number(mean)} in the mean of its sites"
        out.print(escape(f"{words}, most {number(most)} ({where})"))


def _print_model(out: Console, report: Report) -> None:
    model = report.model
    if model.hidden_error is not None:
        table = new_table("end to end", "error of the last hidden state", "cosine")
        table.add_row("all tokens", number(model.hidden_error), number(model.hidden_cosine, ".5f"))
        out.print(table)
        _print_controls(out, report)
    if model.kl is None:
        return
    table = new_table("end to end", "KL", "top-1 kept", "ppl exact", "ppl", "change")
    spans: list[tuple[str, Any]] = [("all tokens", model)]
    spans += [(f"positions {span.start} to {span.stop - 1}", span) for span in model.by_position]
    for name, span in spans:
        table.add_row(name, *_delta(span))
    if model.intervals:
        table.add_row("95 % of resampled texts", *_intervals(model.intervals))
    out.print(table)
    _print_controls(out, report)


def _intervals(intervals: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    def span(name: str, form: str, factor: float = 1.0) -> str:
        ends = intervals.get(name)
        return " to ".join(number(end * factor, form) for end in ends) if ends else ""

    top1, change = span("top1", ".1f", 100), span("ppl_change", "+.1f", 100)
    return span("kl", "#.3g"), top1 and f"{top1} %", "", "", change and f"{change} %"


def _print_controls(out: Console, report: Report) -> None:
    if report.model.controls:
        what = "KL" if report.model.kl is not None else "error"
        whole = report.model.kl if report.model.kl is not None else report.model.hidden_error
        names = ("the operator", *(name.replace("_", " ") for name in report.model.controls))
        table = new_table(f"{what} end to end with", *names)
        table.add_row("at every replaced site", *map(number, (whole, *report.model.controls.values())))
        out.print(table)


def _delta(span: SpanReport | Any) -> tuple[str, ...]:
    change = change_text(span.ppl_exact, span.ppl, 1) if span.ppl and span.ppl_exact else "-"
    kept = f"{span.top1 * 100:.1f} %" if span.top1 is not None else "-"
    return number(span.kl), kept, number(span.ppl_exact), number(span.ppl), change


def _print_cost(out: Console, report: Report) -> None:
    cost = report.cost
    rows = [
        ("attention, all sites", cost.attention_ms_exact, cost.attention_ms),
        ("whole model", cost.total_ms_exact, cost.total_ms),
    ]
    rows = [row for row in rows if row[1] is not None and row[2] is not None]
    if not rows:
        return
    table = new_table("forward" + (f", n = {cost.n}" if cost.n else ""), "exact", "replaced", "speed")
    for name, exact, replaced in rows:
        spent = (f"{number(ms, '.1f')} ms" for ms in (exact, replaced))
        table.add_row(name, *spent, ratio_text(exact, replaced))
    out.print(table)


def pairs_table(rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and values without a head.

    Args:
        rows: Name and value, in rich markup.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def number(value: float | None, form: str = "#.3g") -> str:
    """A number for a table, ``-`` where there is none.

    Args:
        value: The number.
        form: Its format; three significant digits without it.
    """
    return "-" if value is None else format(value, form).rstrip(".")
