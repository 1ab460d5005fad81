"""``fastattn plan``: what serves each site of a model, under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli.load import Loaded, load
from fastattn_compile.errors import OptionError

if TYPE_CHECKING:
    from fastattn_compile.plans import Plan

MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        min=0.0,
        show_default=False,
        help="Most that may be lost, in the metric; 0.02 without this and --speedup.",
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        "--metric", help="kl (nats a token), ppl (relative rise) or cosine (of the last hidden states)."
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        "--speedup", min=1.0, show_default=False, help="Least factor by which attention must become cheaper."
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes", min=0.0, show_default=False, help="End with the best so far after this time."
    ),
]
Operators = Annotated[
    list[str] | None,
    typer.Option(
        "--operator", "-o", show_default=False,
        help="An operator to try, alone for a ladder of configurations or with options "
        "(window:width=256,sinks=4); repeatable. barnes_hut, window and fma without it.",
    ),
]  # fmt: skip
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", show_default=False, help="A site that stays exact; repeatable."),
]
Unit = Annotated[
    str | None,
    typer.Option(
        "--cost", show_default=False,
        help="seconds, measured here; 'predicted seconds', of the cost model; or flops. Measured without it.",
    ),
]  # fmt: skip
Sequences = Annotated[
    int, typer.Option("--sequences", min=1, help="Sequences of the text to choose or to fit on.")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume", metavar="FOLDER", show_default=False,
        help="Keep what is reached in this folder, and go on from what is there.",
    ),
]  # fmt: skip


def plan(
    model: common.Model,
    max_drop: MaxDrop = None,
    metric: Metric = "kl",
    speedup: Speedup = None,
    max_minutes: MaxMinutes = None,
    operator: Operators = None,
    keep: Keep = None,
    cost: Unit = None,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PLAN",
            show_default=False,
            help="Solve this plan for another budget: at once, without running the model.",
        ),
    ] = None,
    sequences: Sequences = 2,
    length: common.Length = 2048,
    attn: common.Attention = "sdpa",
    dtype: common.Type = "float32",
    text: common.Text = None,
    resume: Resume = None,
    out: common.Out = None,
    json: common.Json = False,
    threads: common.Threads = None,
    seed: common.Seed = 0,
) -> None:
    """Find the cheapest operators within a loss, or the best at a speed."""
    if again is not None:
        from fastattn_compile.plans import Plan

        if max_drop is None and speedup is None:
            max_drop = 0.02
        found = Plan.load(again).solve(max_drop=max_drop, speedup=speedup)
    else:
        common.set_threads(threads)
        with common.progress_bar() as progress:
            progress("load the model", 0, 0)
            loaded = load(
                model, length=length, attention=attn, dtype=dtype, text=text, seed=seed, more=sequences
            )
            found = search(
                loaded, max_drop=max_drop, metric=metric, speedup=speedup, max_minutes=max_minutes,
                operators=read_operators(operator), keep=keep or (), unit=cost, folder=resume, seed=seed,
                progress=progress,
            )  # fmt: skip
        for line in loaded.notices:
            common.notice(line)
    common.deliver(found.to_json(), json, out)
    if not json:
        from fastattn_compile.reporting.plan_table import print_plan

        print_plan(found)
    raise_for(found, max_drop, speedup)


def search(loaded: Loaded, *, unit: str | None, **options: Any) -> Plan:
    """Plans for a loaded model on the text that is not for evaluation.

    Args:
        loaded: The model and its inputs.
        unit: Of the cost; measured seconds at the length of the inputs when ``None``.
        **options: Of ``fa.plan``.
    """
    from fastattn_compile.retrofitting.planning import plan as find

    data = loaded.more or (loaded.inputs,)
    ids = data[0].get("input_ids") if isinstance(data[0], dict) else None
    n = int(ids.shape[1]) if unit in (None, "seconds") and ids is not None else None
    return find(
        loaded.model, data, n=n, unit=unit, batches=len(data),
        context={"command": common.command_line(), "text": loaded.source}, **options,
    )  # fmt: skip


def read_operators(given: list[str] | None) -> list[str | tuple[str, dict[str, Any]]] | None:
    """``name`` or ``name:key=value,key=value`` as ``fa.plan`` takes operators.

    Raises:
        OptionError: An option has no value.
    """
    if not given:
        return None
    found: list[str | tuple[str, dict[str, Any]]] = []
    for entry in given:
        name, colon, options = entry.partition(":")
        if not name:
            raise OptionError(f"--operator takes name or name:key=value,..., got {entry!r}")
        found.append((name, common.read_options(options.split(","))) if colon else name)
    return found


def raise_for(found: Plan, max_drop: float | None, speedup: float | None) -> None:
    """Ends with the exit code of a plan: nothing found, over budget, or done."""
    if not found.sites:
        raise typer.Exit(common.NOTHING_FOUND)
    frontier = found.frontier
    if frontier is None:
        return
    choice = {name for name, site in found.sites.items() if site.operator != "exact"}
    reached = bool(found.provenance.get("search", {}).get("reached", True))
    if (not choice and max_drop != 0) or not reached:
        wanted = " and ".join(
            text for text in (
                f"a loss of at most {max_drop:g} in {frontier.metric}" if max_drop is not None else "",
                f"a speedup of {speedup:g}" if speedup is not None else "",
            ) if text
        )  # fmt: skip
        why = (
            f"nothing cheaper keeps to {wanted or 'it'}; this is the best so far"
            if frontier.candidates else found.provenance.get("search", {}).get("stopped", "nothing to choose from")
        )  # fmt: skip
        common.notice(f"budget not reached: {why}")
        raise typer.Exit(common.FAILED)
