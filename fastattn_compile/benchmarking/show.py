"""Benchmark rows as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastattn_compile.benchmarking.suite import series
from fastattn_compile.errors import OptionError
from fastattn_compile.reporting.terminal import console, number


def print_document(document: dict[str, Any]) -> None:
    """Prints the rows, what was refused and why, and the crossover lengths."""
    out = console()
    table = Table(box=None, pad_edge=False)
    for name in ("operator", "kernels", "type", "direction", "n"):
        table.add_column(name, justify="right" if name == "n" else "left")
    for name in ("ms", "exact ms", "ratio", "limit", "peak MB", "keys"):
        table.add_column(name, justify="right")
    for row in document["rows"]:
        if row["ms"] is None:
            continue
        peak = row["peak_bytes"]
        table.add_row(
            row["operator"] + ("" if row["causal"] else " (bidir.)"), row["kernels"], row["dtype"], row["direction"],
            str(row["n"]), number(row["ms"], ".2f"), number(row["baseline_ms"], ".2f"), f"{row['ratio']:.2f}x",
            f"{row['floor_fraction']:.0%}", "-" if peak is None else f"{peak / 2**20:.1f}",
            number(row["keys_per_query"], ".0f"),
        )  # fmt: skip
    out.print(table)
    place = document["provenance"]
    out.print(
        f"ratio: time of the best exact attention over the operator's. limit: share of what the machine's best product "
        f"({place['flops_per_second'] / 1e9:.0f} GFLOP/s) and copy ({place['bytes_per_second'] / 1e9:.0f} GB/s) allow.",
        style="dim",
    )
    for row in document["rows"]:
        if row["ms"] is None:
            out.print(escape(f"{row['operator']} n={row['n']}: not timed: {row['reason']}"))
    for found in document["crossover"]:
        where = f"from about {found['n']} tokens on" if found["n"] else "nowhere among these lengths"
        out.print(f"{found['operator']} {found['dtype']} {found['direction']}: faster than exact {where}")


def plot(document: dict[str, Any], path: Path) -> None:
    """Draws the ratio to exact attention against the length, one line a series.

    Args:
        document: From ``run_suite``.
        path: The file; its ending says the format.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError('a plot needs matplotlib: pip install "fastattn-compile[report]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for group in series(document["rows"]):
        first = group[0]
        label = f"{first['operator']} {first['dtype']} {first['direction']}"
        axes.plot([r["n"] for r in group], [r["ratio"] for r in group], marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times faster than exact attention")
    axes.set_title(document["provenance"]["device"])
    axes.legend(fontsize="small")
    axes.grid(True, which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
