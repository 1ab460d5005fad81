"""What replacing every attention of SmolLM2-135M costs without training, beside local windows of the same
reach.

Perplexity, divergence and agreement on the sources of Python's standard library. The windows are the
controls: they show how much of an operator's quality the near field alone would give.

    python benchmarks/quality_smollm2.py --length 2048
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.backend import fastattn
from fastattn_compile.cli.demo import model_file
from fastattn_compile.cli.load import Loaded, load
from fastattn_compile.files import write_json
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.reporting.metrics import Summary, TokenMetrics, compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.reporting.terminal import console, number

RESULTS = Path(__file__).parent / "results" / "quality_smollm2.json"
WINDOW_ATTENTION = "fastattn_local_window"

Predict = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    config: dict[str, Any]
    predict: Predict


@contextmanager
def local_window(model: Any, window: int, sinks: int) -> Iterator[None]:
    """Every attention is exact softmax over the last ``window`` tokens and the first ``sinks``."""
    import transformers

    band = MaskStructure(left=window - 1, right=0)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        rows, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        seen = band.visible(rows, keys, query.shape[2], key.shape[2]) | ((keys < sinks) & (keys <= rows))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    # The mask is built here from positions, so transformers is left without a mask function for this name.
    transformers.AttentionInterface.register(WINDOW_ATTENTION, attend)
    model.set_attn_implementation(WINDOW_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def rows_of(model: Any) -> list[Row]:
    """The exact model first, then what is compared with it."""

    def run(callee: Any, ids: Tensor) -> Tensor:
        logits: Tensor = callee(input_ids=ids, use_cache=False).logits
        return logits

    def window(size: int, sinks: int) -> Row:
        def predict(ids: Tensor) -> Tensor:
            with local_window(model, size, sinks):
                return run(model, ids)

        return Row(f"window {size} + {sinks} sinks", {"window": size, "sinks": sinks}, predict)

    def fma(**options: Any) -> Row:
        compiled = torch.compile(
            model,
            backend=fastattn,
            options={"operator": "fma", "compiler": "eager", "strict": True, "quiet": True, **options},
        )
        name = "FMA, " + ", ".join(f"{key}={value}" for key, value in options.items())
        return Row(name, {"operator": "fma", **options}, lambda ids: run(compiled, ids))

    return [
        Row("exact", {}, lambda ids: run(model, ids)),
        window(128, 4),
        window(512, 4),
        fma(block=64, rank=4, sinks=4),
        fma(block=64, rank=16, sinks=4),
        fma(block=64, rank=4, sinks=0),
    ]


@torch.no_grad()
def measure(rows: Sequence[Row], sequences: Sequence[Tensor]) -> list[Summary]:
    """Token metrics of each row against the first, over all sequences."""
    found: list[list[TokenMetrics]] = [[] for _ in rows]
    for ids in sequences:
        exact = rows[0].predict(ids)
        for row, parts in zip(rows, found):
            logits = exact if row is rows[0] else row.predict(ids)
            parts.append(compare_logits(exact, logits, ids))
    summaries = []
    for parts in found:
        columns = {
            f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(TokenMetrics)
        }
        summary = summarise(TokenMetrics(**columns))
        assert summary is not None
        summaries.append(summary)
    return summaries


def document(
    rows: Sequence[Row], summaries: Sequence[Summary], loaded: Loaded, args: argparse.Namespace
) -> Any:
    context = {"benchmark": "quality_smollm2", "text": loaded.source, "sequences": args.sequences}
    return {
        "schema": "fastattn.quality/1",
        "n": args.length,
        "rows": [
            {"name": row.name, "config": row.config, **dataclasses.asdict(summary)}
            for row, summary in zip(rows, summaries)
        ],
        "provenance": provenance(loaded.model, loaded.inputs, seed=0, context=context),
    }


def show(rows: Sequence[Row], summaries: Sequence[Summary], length: int) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        f"every attention, n = {length}", "perplexity", "KL to exact", "top-1 kept", box=box.SIMPLE_HEAD
    )
    for row, summary in zip(rows, summaries):
        table.add_row(row.name, number(summary.ppl), number(summary.kl), f"{summary.top1 * 100:.0f} %")
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--sequences", type=int, default=1, help="sequences, one after the other in the text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    loaded = load(str(model_file()), length=args.length * args.sequences)
    assert isinstance(loaded.inputs, dict)
    sequences = loaded.inputs["input_ids"].split(args.length, dim=1)
    rows = rows_of(loaded.model)
    summaries = measure(rows, sequences)
    show(rows, summaries, args.length)
    write_json(args.out, document(rows, summaries, loaded, args))


if __name__ == "__main__":
    main()
