"""``fastattn eval``: what an operator or a plan costs a model in accuracy, and gains in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli.load import load, load_retrofit

if TYPE_CHECKING:
    from fastattn_compile.reporting.document import Report


def eval_(
    model: common.Model,
    after: Annotated[
        str | None,
        typer.Argument(
            metavar="[AFTER]",
            help="A retrofit of MODEL: a folder from fa.save_pretrained, served by its own plan, or another "
            "model with the same outputs. It is compared with MODEL as it is.",
            show_default=False,
        ),
    ] = None,
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
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            min=0.0,
            show_default=False,
            help="Largest KL end to end, nats a token; more is a failure (exit code 3).",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            show_default=False,
            help="Prove causality and run the controls end to end: no attention, a window of as many keys, near "
            "field only, far field only. With AFTER it is the default.",
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
    """Measure what replacing a model's attention costs: per site, end to end, and in time.

    With AFTER: what a retrofit costs against the model it was made from.
    """
    settings = common.read_options(option)
    if tolerance is not None:
        settings["tolerance"] = tolerance
    planned = _check(operator, settings, plan, compiler)
    common.set_threads(threads)
    with common.progress_bar() as progress:
        progress("load the model", 0, 0)
        loaded = load(model, length=length, attention=attn, dtype=dtype, text=text, seed=seed)
        measured, before = loaded.model, None
        if after is not None:
            progress("load the retrofit", 0, 0)
            measured, before = load_retrofit(after, loaded, attention=attn, dtype=dtype), loaded.model
        if operator is None and planned is None:
            planned = getattr(measured, "fastattn_plan", None)
        from fastattn_compile.reporting.evaluate import evaluate

        report = evaluate(
            measured, loaded.inputs, operator=operator, options=settings, plan=planned, rows=rows, seed=seed,
            compiler=compiler, repeats=repeats, before=before, progress=progress,
            verify=after is not None if verify is None else verify,
            context={"command": common.command_line(), "text": loaded.source},
        )  # fmt: skip
    for line in loaded.notices:
        common.notice(line)
    common.deliver(report.to_json(), json, out)
    if not json:
        report.print(full=full)
    if not report.sites:
        raise typer.Exit(common.NOTHING_FOUND)
    named = bool(operator or planned)
    failed = tolerance is not None and named and over_budget(report, tolerance)
    if max_kl is not None and over_kl(report, max_kl):
        failed = True
    if failed:
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


def over_kl(report: Report, largest: float) -> bool:
    """Whether the model's KL exceeds a budget, or was not measured; says so.

    Args:
        report: The report.
        largest: Nats a token.
    """
    kl = report.model.kl
    if kl is not None and kl <= largest:
        return False
    said = "this model gives no logits to measure a KL on" if kl is None else f"KL {kl:.3g} nats a token"
    common.notice(f"over budget: {said}, the budget is {largest:g}")
    return True
