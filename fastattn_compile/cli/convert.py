"""``fastattn convert``: an ONNX file in, an ONNX file with sub-quadratic attention out, with what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn_compile.cli import common
from fastattn_compile.errors import OptionError


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The converted model; only measured without it.")
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option(
            "--operator",
            help="Serve every site with it. Without it and --plan: fma, where --tolerance holds.",
        ),
    ] = None,
    option: common.OptionList = None,
    plan: common.PlanFile = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            show_default=False,
            help="Largest relative error of a site (95th percentile); with --operator or --plan, more is a failure.",
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", help="Arrays by input name (.npz); made from the signature without it."),
    ] = None,
    length: common.Length = 2048,
    longest: Annotated[
        int,
        typer.Option("--longest", min=1, help="Longest sequence to serve where the model does not fix it."),
    ] = 8192,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs behind a median.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="Every site, also beyond 40.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the JSON report here.")] = None,
    json: common.Json = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads of ONNX Runtime; 0: as it likes.")
    ] = 0,
    seed: common.Seed = 0,
) -> None:
    """Replace the attention of an ONNX model, offline; the result runs in any ONNX Runtime."""
    try:
        from fastattn_compile.converting.convert import convert as convert_model
    except ImportError as error:
        raise OptionError(f'convert needs ONNX: pip install "fastattn-compile[onnx]" ({error})') from error
    if report is not None and report.resolve() in {
        path.resolve() for path in (model, out) if path is not None
    }:
        raise OptionError(f"{report} is the model; name another file for the report")
    with common.progress_bar() as progress:
        made = convert_model(
            model, out, operator=operator, options=common.read_options(option), plan=plan, tolerance=tolerance,
            inputs=inputs, length=length, longest=longest, repeats=repeats, threads=threads, seed=seed,
            progress=progress,
        )  # fmt: skip
    common.deliver(made.to_json(), json, report)
    if not json:
        made.print(full=full)
        _print_loading(made.provenance)
    if made.cost.total_ms is None:  # nothing was made to be timed
        common.notice(
            "nothing was replaced, so no file was written" if out is not None else "nothing was replaced"
        )
        raise typer.Exit(common.NOTHING_FOUND)
    if out is not None:
        common.notice(f"written: {out}")


def _print_loading(provenance: object) -> None:
    if not isinstance(provenance, dict) or "session_load_seconds" not in provenance:
        return
    load, before = provenance["session_load_seconds"], provenance["session_load_seconds_exact"]
    text = f"A session loads in {load:.2f} s, the original's in {before:.2f} s"
    peak, peak_before = provenance.get("peak_bytes"), provenance.get("peak_bytes_exact")
    if peak is not None and peak_before is not None:
        text += f"; a run needs {peak / 2**20:.0f} MB, the original's {peak_before / 2**20:.0f} MB"
    print(f"{text}.")
    kernels = provenance.get("kernels", {})
    for told, wanted in (
        ("run native kernels in a session of fa.onnx.session, elsewhere as functions", "native"),
        ("have no native kernel and run as functions everywhere", "function"),
    ):
        types = [op_type for op_type, kind in kernels.items() if kind == wanted]
        if types:
            print(f"Nodes {', '.join(types)} {told}.")
