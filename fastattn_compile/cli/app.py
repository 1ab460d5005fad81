"""The ``fastattn`` command; ``common.py`` names its exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastattn_compile.cli import bench, convert, demo, info
from fastattn_compile.cli import eval as eval_
from fastattn_compile.cli import plan as plan_
from fastattn_compile.cli import retrofit as retrofit_
from fastattn_compile.cli import scan as scan_
from fastattn_compile.cli.common import FAILED, USAGE
from fastattn_compile.errors import (
    ConversionError,
    FastAttentionError,
    NumericError,
    UnsupportedSiteError,
    VerificationError,
)
from fastattn_compile.version import __version__


class Verbs(TyperGroup):
    """The verbs; an error a user may meet becomes one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen verb."""
        try:
            return super().invoke(ctx)
        except FastAttentionError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            failed = isinstance(
                error, (ConversionError, NumericError, UnsupportedSiteError, VerificationError)
            )
            raise typer.Exit(FAILED if failed else USAGE) from error


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sub-quadratic attention for any model, at compile time, with the accuracy it cost.",
    epilog="Exit codes: 0 done, 2 usage, 3 over budget or failed validation, 4 nothing found.",
)
app.command("demo")(demo.demo)
app.command("scan")(scan_.scan)
app.command("eval")(eval_.eval_)
app.command("plan")(plan_.plan)
app.command("retrofit")(retrofit_.retrofit)
app.command("convert")(convert.convert)
app.command("bench")(bench.bench)
app.command("info")(info.info)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastattn {__version__}")
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Sub-quadratic attention for any model, at compile time, with the accuracy it cost."""


def main() -> None:
    """Runs the command line."""
    app()
