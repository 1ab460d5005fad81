"""How a softmax was read, on the terminal, and a whole scan as a page of HTML."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fastattn_compile.files import write_text
from fastattn_compile.reporting.terminal import WIDTH, console, mask_text, new_table, pairs_table, print_scan

if TYPE_CHECKING:
    from fastattn_compile.scanning import Explanation, Scan


def print_explanation(explanation: Explanation, file: IO[str] | None = None) -> None:
    """Prints how one softmax was read.

    Args:
        explanation: From ``Scan.explain``.
        file: Where to; standard output when ``None``.
    """
    out, softmax = console(file), explanation.softmax
    out.print(
        f"[bold]{escape(softmax.name)}[/]: {softmax.status.replace('_', ' ')}",
        softmax.source,
        highlight=False,
    )
    if softmax.reason:
        out.print(escape(softmax.reason))
    table = new_table("step", "role", "shape", "source", title="The part of the graph that was read")
    for step in explanation.steps:
        table.add_row(escape(f"{step.kind}  {step.name}"), step.role, escape(step.shape), escape(step.source))
    out.print(table)
    if softmax.site is not None:
        spec = softmax.site.spec
        tensors = len(softmax.site.factors)
        scale = f"{softmax.site.scale:.6g}" + (f" and {tensors} factors that are tensors" if tensors else "")
        known = {
            "mask": mask_text(softmax), "bias": spec.bias, "scale": scale, "kind": spec.kind,
            "query heads": str(spec.heads), "key heads": str(spec.kv_heads),
            "channels": f"{spec.head_dim}, values {spec.value_dim}", "dropout": f"{spec.dropout:g}",
            "soft cap": f"{spec.softcap:g}",
        }  # fmt: skip
        out.print(pairs_table(list(known.items())))
        out.print(
            pairs_table([(name, reason or "can serve it") for name, reason in explanation.operators.items()])
        )


def save_scan_html(scan: Scan, path: str | Path) -> None:
    """Writes a scan as one HTML page: the table, and how each softmax was read.

    Args:
        scan: From ``fa.scan``.
        path: Where to.
    """
    page = Console(record=True, file=io.StringIO(), width=WIDTH)
    text = io.StringIO()
    print_scan(scan, text, full=True)
    for line in scan.softmaxes:
        text.write("\n")
        if line.node is not None:
            print_explanation(scan.explain(line.name), text)
    page.print(Text(text.getvalue()))
    write_text(Path(path), page.export_html(inline_styles=True))
