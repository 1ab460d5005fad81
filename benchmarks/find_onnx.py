"""The finder on ONNX files, beside ONNX Runtime's own fusion of attention in the same run.

Small random models of many architectures, both implementations of attention, three exporters, and what fp16, optimisers
and quantisers make of the files. True attentions are counted from the configuration, never by a matcher. Every file is
converted with ``exact`` attention where our bodies serve the site, and must give what it gave: judged by the model in
float64, the converted file may err twice as much as the file did, plus a rounding. Rows are kept as they come.

    python benchmarks/find_onnx.py
    python benchmarks/find_onnx.py --only bert llama --variants plain QDQ --cache ~/.cache/onnx_files
    python benchmarks/find_onnx.py --show
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_files import EXPORTERS, TYPES, VARIANTS, Feeds, Files, built, fused_nodes, run
from rows import Rows, add_row_options
from zoo import Entry, models

from fastattn_compile.converting.source import prepare
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.onnx.rewrite import Replacement, can_replace, rewrite
from fastattn_compile.passes.site import NOT_ATTENTION, TAKEN
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "find_onnx.json"
SCHEMA = "fastattn.find_onnx/1"
KEY = ("name", "implementation", "exporter", "variant")
MODELS = (
    "bert", "distilbert", "gpt2", "llama", "t5", "bart", "vit", "whisper", "clip_vision", "clip_text", "mistral", "swin",
    "deberta_v2", "bloom", "falcon_alibi", "modernbert", "qwen3", "gemma2", "mpt", "nn.MultiheadAttention with weights",
    "nn.TransformerEncoder", "by hand: nanogpt", "by hand: einsum", "negative: linear_attention",
    "negative: efficient_attention", "negative: mixture", "convnext",
)  # fmt: skip
USUAL = ("dynamo 18", "dynamo 23", "legacy 17")
# Beside the usual exporters, of a few models alone.
RARE = {
    "dynamo 20": ("bert", "llama", "t5"),
    "dynamo 24": ("bert", "llama", "t5"),
    "legacy 14": ("bert", "gpt2", "vit"),
}


def reference(entry: Entry, implementation: str) -> tuple[np.ndarray, Feeds]:
    """What the model gives in float64, and what it is fed."""
    model, inputs = built(entry, implementation)
    feeds = {name: x.numpy() for name, x in inputs.items()}
    with torch.no_grad():
        try:
            wide = model.double()(*(x.double() if x.is_floating_point() else x for x in inputs.values()))
        except RuntimeError:  # code that fixes a type somewhere
            wide = model.float()(*inputs.values())
    return wide.double().numpy(), feeds


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what was wanted."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-12))


def ran(path: Path, feeds: Feeds, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray, Feeds]:
    """The file's output with what it is judged by; of the first sequence alone where the runtime takes no more.

    It refuses the standard ``RotaryEmbedding`` of the exporter, whose cache has no batch, for a batch of two.
    """
    try:
        return run(path, feeds), wide, feeds
    except Exception:
        one = {name: x[:1] for name, x in feeds.items()}
        return run(path, one), wide[:1], one


def converted(path: Path) -> tuple[bytes, int, Counter[str]]:
    """The file with ``exact`` in place of every attention our bodies serve, their number, and why others stay."""
    prepared = prepare(path)
    exact, wanted, reasons = make_operator("exact"), [], Counter()
    for line in prepared.softmaxes:
        if line.site is None:
            continue
        support = can_replace(Replacement(line.site, exact, 8192), prepared.opset)
        if support:
            wanted.append(Replacement(line.site, exact, 8192))
        else:
            reasons[support.reason] += 1
    rewrite(prepared.model, wanted)
    prepared.forget_inferred()
    return ir.to_proto(prepared.model).SerializeToString(), len(wanted), reasons


def measure(
    entry: Entry, path: Path, files: Files, key: dict[str, str], wide: np.ndarray, feeds: Feeds
) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    lines = prepare(path).softmaxes
    seconds = time.perf_counter() - start
    taken = [line for line in lines if line.status == TAKEN]
    kept = [line for line in lines if line.status not in (TAKEN, NOT_ATTENTION)]
    expected = Counter(entry.expected(entry.masked is not None))
    hiding = Counter({k: n for k, n in expected.items() if k != "none"})
    masks = Counter("opaque" if line.mask.startswith("opaque") else line.mask for line in taken)
    row: dict[str, Any] = {
        "sites": entry.sites, "taken": len(taken), "kept": len(kept),
        "missed": max(entry.sites - len(taken) - len(kept), 0),
        "false_positives": max(len(taken) + len(kept) - entry.sites, 0),
        "masks": dict(masks), "masks_expected": dict(expected), "masks_hiding": sum(hiding.values()),
        "masks_right": sum((masks & hiding).values()),
        "names": [line.name for line in lines],
        "reasons": dict(Counter(f"{line.status}: {line.reason}" for line in lines if line.status != TAKEN)),
        "fused_before": fused_nodes(path), "seconds": round(seconds, 2),
    }  # fmt: skip
    if key["variant"] == "plain":
        for column, variant in (("ort_optimizer", "ORT optimizer"), ("ort_session", "ORT session")):
            try:
                made = files.path(entry, key["implementation"], key["exporter"], variant, feeds)
                row[column] = fused_nodes(made)
            except RuntimeError as error:  # it does not run there
                row[column], row[f"{column}_failed"] = 0, str(error)
    try:
        before, wide, feeds = ran(path, feeds, wide)
    except Exception as error:  # what the runtime refuses was not broken by us
        said = f"{type(error).__name__}: {str(error).replace(str(path), path.name)[:200]}"
        if "INVALID_GRAPH" in said and key["variant"] in VARIANTS:  # a tool of its own made no model of it
            return {"failed": said}
        return row | {"agrees": None, "not_run": said}
    data, replaced, refused = converted(path)
    usual = apart(before, wide)
    row |= {"replaced": replaced, "refused": dict(refused), "error_of_file": usual}
    try:
        error = apart(run(data, feeds), wide)
    except Exception as failure:
        return row | {"agrees": False, "broken": f"{type(failure).__name__}: {str(failure)[:300]}"}
    eps = float(np.finfo(np.float32).eps)
    return row | {"error": error if np.isfinite(error) else None, "agrees": error <= 2 * usual + eps}


def summary(rows: list[dict[str, Any]]) -> str:
    """Totals by variant, exporter and implementation, in Markdown."""
    lines = [
        "| file | exporter | source | files | attentions | found | missed | false positives | masks right "
        "| exact: replaced | outputs agree | ONNX Runtime optimizer | session |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    done = [r for r in rows if "failed" not in r]
    order = ["plain", *VARIANTS, *TYPES]

    def place(key: tuple[str, ...]) -> tuple[Any, ...]:
        return order.index(key[0]), list(EXPORTERS).index(key[1]), key[2]

    groups = {(r["variant"], r["exporter"], r["implementation"]) for r in done}
    for key in sorted(groups, key=place):
        mine = [r for r in done if (r["variant"], r["exporter"], r["implementation"]) == key]
        lines.append(_line(key, mine))
    for variant in order:
        mine = [r for r in done if r["variant"] == variant]
        if mine:
            lines.append(_line((f"**{variant}**", "all", ""), mine))
    if done:
        lines.append(_line(("**all**", "", ""), done))
    failures = Counter(f"{r['variant']}, {r['exporter']}: {r['failed'][:110]}" for r in rows if "failed" in r)
    return "\n".join([*lines, *(f"not made, {n} files: {text}" for text, n in failures.items())])


def _line(key: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    total = Counter()
    for row in rows:
        total.update({k: v for k, v in row.items() if isinstance(v, int) and not isinstance(v, bool)})
    ran = [r for r in rows if r["agrees"] is not None]
    theirs = [
        f"{sum(min(r[c], r['sites']) for r in rows if c in r)}" if any(c in r for r in rows) else ""
        for c in ("ort_optimizer", "ort_session")
    ]
    cells = (
        *key, len(rows), total["sites"], total["taken"] + total["kept"], total["missed"], total["false_positives"],
        f"{total['masks_right']} of {total['masks_hiding']}", total["replaced"],
        f"{sum(r['agrees'] for r in ran)} of {len(ran)}", *theirs,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def show(row: dict[str, Any]) -> str:
    head = " / ".join(str(row[k]) for k in KEY)
    if "failed" in row:
        return f"{head}: NOT MADE {row['failed'][:160]}"
    wrong = [
        name for name, bad in (
            ("MISSED", row["missed"]), ("FALSE", row["false_positives"]), ("DIFFERS", row["agrees"] is False),
            ("MASK", row["masks_right"] < row["masks_hiding"]), ("KEPT", row["kept"]),
        ) if bad
    ]  # fmt: skip
    text = f"{head}: {row['taken']} of {row['sites']}, replaced {row.get('replaced')}, {row['seconds']} s"
    if wrong:
        detail = {
            k: row.get(k)
            for k in ("masks", "masks_expected", "reasons", "refused", "error", "error_of_file", "broken")
        }
        text += f" {' '.join(wrong)} {detail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--implementations", nargs="+", default=["eager", "sdpa", "library"])
    parser.add_argument("--exporters", nargs="+", default=list(EXPORTERS), choices=list(EXPORTERS))
    parser.add_argument(
        "--variants", nargs="+", default=["plain", *VARIANTS, *TYPES], choices=["plain", *VARIANTS, *TYPES]
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fastattn-onnx-files")
    add_row_options(parser, RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    rows = Rows(args.json, SCHEMA, KEY, {"provenance": {"versions": versions()}})
    if args.show:
        print(summary(rows.all))
        return
    zoo, files = models(), Files(args.cache)
    for variant, exporter, name in itertools.product(args.variants, args.exporters, args.only or MODELS):
        entry = zoo[name]
        if (exporter not in USUAL and (name not in RARE[exporter] or variant != "plain")) or (
            variant in TYPES and exporter != "dynamo 18"
        ):
            continue
        for implementation in [x for x in entry.implementations if x in args.implementations]:
            key = {"name": name, "implementation": implementation, "exporter": exporter, "variant": variant}
            if not args.fresh and rows.find(key) is not None:
                continue
            try:
                wide, feeds = reference(entry, implementation)
                path = files.path(entry, implementation, exporter, variant, feeds)
                row = key | measure(entry, path, files, key, wide, feeds)
            except RuntimeError as error:
                row = key | {"failed": str(error)}
            rows.put(row)
            print(show(row), flush=True)
    print(summary(rows.all))


if __name__ == "__main__":
    main()
