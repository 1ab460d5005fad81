"""What the verbs share: their options, where output goes, how a command line is remembered."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn_compile.errors import OptionError

if TYPE_CHECKING:
    from fastattn_compile.reporting.evaluate import Progress

# Exit codes: done, wrong usage, over budget or failed validation, nothing found.
DONE, USAGE, FAILED, NOTHING_FOUND = 0, 2, 3, 4

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder (config.json and safetensors), a .gguf file, or module:function that "
        "returns a model or (model, inputs).",
        show_default=False,
    ),
]
Length = Annotated[int, typer.Option("--length", "-n", min=1, help="Tokens of the input.")]
Attention = Annotated[str, typer.Option("--attn", help="How transformers writes attention: eager or sdpa.")]
Type = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16 or float16.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="A text file to read; sources of Python's standard library without it."),
]
OperatorName = Annotated[
    str | None, typer.Option("--operator", "-o", help="The operator for every site.", show_default=False)
]
OptionList = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Of the operator or the backend; repeatable."),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan: which operator serves which site.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON document here.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the JSON document on stdout, and nothing else.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of torch.", show_default=False)
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]


def read_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Reads ``key=value`` pairs. A value that is JSON (a number, ``true``) is read as such, else as text.

    Args:
        given: What stood behind each ``--option``.

    Raises:
        OptionError: A pair has no ``=`` or no key.
    """
    options: dict[str, Any] = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"--option takes key=value, got {pair!r}")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = value
    return options


def set_threads(threads: int | None) -> None:
    """Sets the number of torch's threads; ``None`` leaves it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def notice(text: str) -> None:
    """Tells the user something beside the result."""
    print(text, file=sys.stderr)


def deliver(document: dict[str, Any], as_json: bool, out: Path | None) -> None:
    """Writes a document where it was asked for.

    Args:
        document: The JSON document.
        as_json: Print it on standard output.
        out: A file for it.

    Raises:
        OptionError: The file cannot be written.
    """
    from fastattn_compile.files import write_json

    if out is not None:
        try:
            write_json(out, document)
        except OSError as error:
            raise OptionError(f"cannot write {out}: {error.strerror or error}") from error
        notice(f"written: {out}")
    if as_json:
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress display on standard error: a live line on a terminal, one line a stage elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        last: list[str] = []

        def line(stage: str, done: int, total: int) -> None:
            if last != [stage]:
                last[:] = [stage]
                notice(f"- {stage}")

        yield line
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    finished = bar.tasks[task].total or 1
                    bar.update(task, total=finished, completed=finished)
                    bar.stop_task(task)
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield show


def command_line() -> str:
    """The command as typed, every path cut to its last part: what a report may say of this machine."""
    words = []
    for word in sys.argv[1:]:
        key, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown = Path(value).name if "/" in value or "\\" in value else value
        words.append(f"{key}{equals}{shown}")
    return " ".join(["fastattn", *words])
