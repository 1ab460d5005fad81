"""``fastattn eval``: what an operator or a plan costs a model in accuracy, and gains in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli.load import load

if TYPE_CHECKING:
    from fastattn_compile.reporting.document import Report


def eval_(
    model: common.Model,
    length: common.Length = 2048,
    operator: common.OperatorName = None,
    option: common.OptionList = None,
    plan: common.PlanFile = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Largest relative output error of a site (95th percentile). Without --operator and --plan "
            "sites over it stay exact; with one of them a site over it is a failure (exit code 3).",
            show_default=False,
        ),
    ] = None,
    attn: common.Attention = "sdpa",
    dtype: common.Type = "float32",
    text: common.Text = None,
    compiler: Annotated[
        str, typer.Option("--compiler", help="What lowers both models: inductor, aot_eager or eager.")
    ] = "inductor",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Query positions to sample a site.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs behind a median.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="Every site, also beyond 40.")] = False,
    out: common.Out = None,
    json: common.Json = False,
    threads: common.Threads = None,
    seed: common.Seed = 0,
) -> None:
    """Measure what replacing a model's attention costs: per site, end to end, and in time."""
    settings = common.read_options(option)
    if tolerance is not None:
        settings["tolerance"] = tolerance
    planned = _check(operator, settings, plan, compiler)
    common.set_threads(threads)
    with common.progress_bar() as progress:
        progress("load the model", 0, 0)
        loaded = load(model, length=length, attention=attn, dtype=dtype, text=text, seed=seed)
        from fastattn_compile.reporting.evaluate import evaluate

        report = evaluate(
            loaded.model, loaded.inputs, operator=operator, options=settings, plan=planned, rows=rows,
            seed=seed, compiler=compiler, repeats=repeats, progress=progress,
            context={"command": common.command_line(), "text": loaded.source},
        )  # fmt: skip
    for line in loaded.notices:
        common.notice(line)
    common.deliver(report.to_json(), json, out)
    if not json:
        report.print(full=full)
    if not report.sites:
        raise typer.Exit(common.NOTHING_FOUND)
    if tolerance is not None and (operator or planned) and over_budget(report, tolerance):
        raise typer.Exit(common.FAILED)


def _check(operator: str | None, settings: dict[str, Any], plan: Any, compiler: str) -> Any:
    """Refuses bad options before a model is loaded; returns the plan."""
    from fastattn_compile.options import parse_options
    from fastattn_compile.plans import Plan

    planned = Plan.load(plan) if plan is not None else None
    named = {"operator": operator, "plan": planned, "compiler": compiler}
    parse_options({**settings, **{key: value for key, value in named.items() if value is not None}})
    return planned


def over_budget(report: Report, tolerance: float) -> bool:
    """Whether a replaced site's error exceeds the tolerance; says which.

    Args:
        report: The report.
        tolerance: Largest relative output error, 95th percentile.
    """
    over = [
        site.name
        for site in report.sites
        if site.replaced and site.own_error_p95 is not None and site.own_error_p95 > tolerance
    ]
    if over:
        named = ", ".join(over[:3]) + (f" and {len(over) - 3} more" if len(over) > 3 else "")
        common.notice(f"over budget: the error of {named} is above the tolerance {tolerance:g}")
    return bool(over)
