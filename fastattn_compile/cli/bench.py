"""``fastattn bench``: how fast operators are here, against the best exact attention and the physical limit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn_compile.cli import common
from fastattn_compile.errors import OptionError

_LENGTHS = [1024, 4096, 16384]


def bench(
    operator: Annotated[
        list[str] | None, typer.Option("--operator", "-o", help="An operator; repeatable. fma without it.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="[OPERATOR.]KEY=VALUE", help="A field of the configuration; repeatable."
        ),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", "-n", help=f"Tokens; repeatable. {_LENGTHS} without it.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Type; repeatable. float32 without it.")
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option("--direction", help="forward, backward or both; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; the GPU if there is one.")] = "auto",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", min=1, help="Key heads; as many as query heads without it.")
    ] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, help="Channels of a head.")] = 64,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="No causal mask.")] = False,
    flex: Annotated[
        bool | None,
        typer.Option("--flex/--no-flex", help="Let FlexAttention compete as the baseline; on a GPU it does."),
    ] = None,
    kernels: Annotated[
        str, typer.Option("--kernels", help="Implementation: auto, aten, cpp or triton.")
    ] = "auto",
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Time for one row, about.")] = 10.0,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Fit this machine's speed constants, which decide where exact is kept."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios here (png, svg, pdf).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that --out already holds.")] = False,
    out: common.Out = None,
    json: common.Json = False,
    threads: common.Threads = None,
) -> None:
    """Time operators against the best exact attention on this machine. A wrong kernel prints no time."""
    common.set_threads(threads)
    import torch

    from fastattn_compile.benchmarking import show, suite
    from fastattn_compile.benchmarking.case import Case
    from fastattn_compile.kernels.dispatch import IMPLEMENTATIONS, use_kernels
    from fastattn_compile.machine import device_name
    from fastattn_compile.operators.speed import save_speeds, user_file

    if resume and out is None:
        raise OptionError("--resume continues the file that --out names; give --out too")
    if kernels not in IMPLEMENTATIONS:
        raise OptionError(f"unknown kernels {kernels!r}; one of {', '.join(IMPLEMENTATIONS)}")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    lengths = sorted(length or _LENGTHS)
    if calibrate and len(set(lengths)) < 2:
        raise OptionError("--calibrate fits two constants: give two different --length at least")
    given, names = common.read_options(option), operator or ["fma"]
    cases = [
        Case(
            operator=name, options=_options_of(name, names, given), n=n, batch=batch, heads=heads,
            kv_heads=kv_heads or heads, head_dim=head_dim, causal=not bidirectional, dtype=each, device=where,
            direction=way,
        )
        for name in names
        for each in dtype or ["float32"]
        for way in direction or ["forward"]
        for n in lengths
    ]  # fmt: skip
    with common.progress_bar() as progress, use_kernels(kernels):
        document = suite.run_suite(
            cases, seconds=seconds, flex=where == "cuda" if flex is None else flex, memory=memory, out=out,
            resume=resume, progress=progress,
        )  # fmt: skip
    if calibrate:
        fitted = suite.speeds(document["rows"], device_name(torch.device(where)))
        save_speeds(user_file(), fitted)
        common.notice(
            f"{len(fitted)} speed constants of this machine written: {user_file().name} in the cache folder"
        )
        for name in sorted(set(names) - {speed.operator for speed in fitted}):
            common.notice(
                f"{name} is not fitted: that takes forward rows of two lengths that one implementation serves; give "
                "longer ones"
            )
    common.deliver(document, json, out)
    if plot is not None:
        show.plot(document, plot)
        common.notice(f"written: {plot}")
    if not json:
        show.print_document(document)
    if any(row["reason"].startswith("wrong") for row in document["rows"]):
        raise typer.Exit(common.FAILED)


def _options_of(name: str, names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The options that are meant for an operator: those without a prefix, and those with its own."""
    options = {}
    for key, value in given.items():
        owner, dot, field = key.partition(".")
        if dot and owner not in names:
            raise OptionError(
                f"--option {key}: {owner!r} is none of the operators timed ({', '.join(names)})"
            )
        if not dot or owner == name:
            options[field if dot else key] = value
    return options
