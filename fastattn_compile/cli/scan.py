"""``fastattn scan``: which softmax attentions a model has, and what can be done with each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli.load import Loaded, load
from fastattn_compile.errors import OptionError

if TYPE_CHECKING:
    from fastattn_compile.scanning import Scan


def scan(
    model: common.Model,
    length: common.Length = 256,
    attn: common.Attention = "sdpa",
    dtype: common.Type = "float32",
    text: common.Text = None,
    full: Annotated[bool, typer.Option("--full", help="One line a softmax, alike or not.")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="NAME", help="Show how this softmax was read.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the table and every softmax as a page here.")
    ] = None,
    out: common.Out = None,
    json: common.Json = False,
    threads: common.Threads = None,
    seed: common.Seed = 0,
) -> None:
    """Find every softmax of a model: taken, exact, or not attention, and why."""
    common.set_threads(threads)
    with common.progress_bar() as progress:
        progress("load the model", 0, 0)
        if model.lower().endswith(".onnx"):
            notices: tuple[str, ...] = ()
            found = _scan_onnx(model)
        else:
            loaded = load(model, length=length, attention=attn, dtype=dtype, text=text, seed=seed)
            notices = loaded.notices
            progress("scan the graph", 0, 0)
            found = scan_loaded(loaded)
    for line in notices:
        common.notice(line)
    explanation = found.explain(explain) if explain is not None else None
    common.deliver((explanation or found).to_json(), json, out)
    if html is not None:
        from fastattn_compile.reporting.explained import save_scan_html

        save_scan_html(found, html)
    if explanation is not None and not json:
        explanation.print()
    elif not json:
        from fastattn_compile.reporting.terminal import print_scan

        print_scan(found, full=full)
    if not found.counts["taken"]:
        raise typer.Exit(common.NOTHING_FOUND)


def _scan_onnx(path: str) -> Scan:
    try:
        from fastattn_compile.converting.convert import scan_onnx
    except ImportError as error:
        raise OptionError(f'an ONNX file needs: pip install "fastattn-compile[onnx]" ({error})') from error
    return scan_onnx(path)


def scan_loaded(loaded: Loaded) -> Scan:
    """Scans a loaded model on its inputs."""
    from fastattn_compile.scanning import scan as scan_model

    if isinstance(loaded.inputs, tuple):
        return scan_model(loaded.model, *loaded.inputs)
    return scan_model(loaded.model, **loaded.inputs)
