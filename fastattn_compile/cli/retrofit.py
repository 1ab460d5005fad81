"""``fastattn retrofit``: a plan put into a checkpoint, fitted, distilled, measured and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli import plan as planning
from fastattn_compile.cli.load import load
from fastattn_compile.errors import OptionError, PlanError

if TYPE_CHECKING:
    from fastattn_compile.retrofitting.stages import DistilStage


def retrofit(
    model: common.Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the result is saved.")],
    plan: common.PlanFile = None,
    max_drop: planning.MaxDrop = None,
    metric: planning.Metric = "kl",
    speedup: planning.Speedup = None,
    max_minutes: planning.MaxMinutes = None,
    operator: planning.Operators = None,
    keep: planning.Keep = None,
    cost: planning.Unit = None,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Sequences to fit parameters on.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps at a site in one pass.")] = 4,
    distil: Annotated[
        list[str] | None,
        typer.Option(
            "--distil",
            metavar="STAGE",
            show_default=False,
            help="Then train the whole model towards the exact one: kl, language_model or hidden, alone or with "
            "options (kl:steps=200,train=lora,rank=8,learning_rate=1e-4); repeatable, in order. A stage that does "
            "not help on held-out text is not kept.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps of a stage that a killed run may lose.")
    ] = 50,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            min=0.0,
            show_default=False,
            help="Largest KL on the held-out text; with more nothing is saved (exit code 3).",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Save the whole model, so that it loads without the base.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove causality, run the controls.")
    ] = True,
    compiler: Annotated[
        str,
        typer.Option(
            "--compiler", help="What lowers the model to train and report: inductor, aot_eager or eager."
        ),
    ] = "inductor",
    sequences: planning.Sequences = 4,
    length: common.Length = 2048,
    attn: common.Attention = "sdpa",
    dtype: common.Type = "float32",
    text: common.Text = None,
    resume: planning.Resume = None,
    out: common.Out = None,
    json: common.Json = False,
    threads: common.Threads = None,
    seed: common.Seed = 0,
) -> None:
    """Plan under a budget or take a plan, fit its parameters, distil, measure on held-out text, and save."""
    from fastattn_compile.plans import Plan
    from fastattn_compile.retrofitting.checkpoint import save_pretrained
    from fastattn_compile.retrofitting.fit import FitSettings
    from fastattn_compile.retrofitting.retrofit import retrofit as put

    stages = read_stages(distil)
    given = Plan.load(plan) if plan is not None else None
    if given is not None and (max_drop is not None or speedup is not None):
        given = given.solve(max_drop=max_drop, speedup=speedup)
    common.set_threads(threads)
    with common.progress_bar() as progress:
        progress("load the model", 0, 0)
        loaded = load(model, length=length, attention=attn, dtype=dtype, text=text, seed=seed, more=sequences)
        if given is None:
            given = planning.search(
                loaded, max_drop=max_drop, metric=metric, speedup=speedup, max_minutes=max_minutes,
                operators=planning.read_operators(operator), keep=keep or (), unit=cost, folder=resume,
                seed=seed, progress=progress,
            )  # fmt: skip
        if not given.sites:
            raise typer.Exit(common.NOTHING_FOUND)
        report = put(
            loaded.model, given, loaded.more or (loaded.inputs,), (loaded.inputs,), verify=verify, compiler=compiler,
            settings=FitSettings(passes=passes, steps=steps, seed=seed), stages=stages, progress=progress,
            checkpoint_every=checkpoint_every, folder=None if resume is None else resume / "fit",
            context={"command": common.command_line(), "text": loaded.source},
        )  # fmt: skip
    for line in loaded.notices:
        common.notice(line)
    common.deliver(report.to_json(), json, out)
    if not json:
        report.print()
    for stage in report.provenance.get("stages", ()):
        common.notice(_told(stage))
    if max_kl is not None and (report.model.kl is None or report.model.kl > max_kl):
        found = "not measured" if report.model.kl is None else f"{report.model.kl:.4g}"
        common.notice(
            f"over budget: the KL on held-out text is {found}, allowed is {max_kl:g}; nothing was saved"
        )
        raise typer.Exit(common.FAILED)
    if all(site.operator == "exact" for site in given.sites.values()):
        planning.raise_for(given, max_drop, speedup)
        raise PlanError("the plan keeps every site exact: there is nothing to save")
    save_pretrained(loaded.model, folder, plan=given, report=report, merge=merge)
    common.notice(f"saved: {folder.name}")
    planning.raise_for(given, max_drop, speedup)


def read_stages(given: Sequence[str] | None) -> list[DistilStage]:
    """``objective`` or ``objective:key=value,...`` as stages of ``fa.distil``, named by their objective.

    Args:
        given: What stood behind each ``--distil``.

    Raises:
        OptionError: A key is no option of a stage, or a value is out of range.
    """
    from fastattn_compile.retrofitting.stages import DistilStage

    stages: list[DistilStage] = []
    for entry in given or ():
        objective, colon, options = entry.partition(":")
        settings = common.read_options(options.split(",")) if colon else {}
        known = ("steps", "train", "learning_rate", "rank", "scale", "temperature", "warmup", "clip")
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise OptionError(
                f"--distil {entry!r}: unknown {', '.join(unknown)}; a stage takes {', '.join(known)}"
            )
        count = sum(stage.objective == objective for stage in stages)
        name = objective if not count else f"{objective} {count + 1}"
        try:
            stages.append(DistilStage(name, objective, **settings))
        except TypeError as error:
            raise OptionError(f"--distil {entry!r}: {error}") from error
    return stages


def _told(stage: dict[str, Any]) -> str:
    kept = "kept" if stage["kept"] else "not kept: it did not help"
    return (
        f"stage {stage['name']}: {stage['objective']} {stage['before']:.4g} -> {stage['after']:.4g}, {kept}"
    )
