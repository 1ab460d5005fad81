"""What Barnes-Hut attention costs in quality at SmolLM2-135M without training, beside windows that meet as
many keys.

Every head of every layer is replaced. For each budget of keys a query, a row of Barnes-Hut attention stands
beside the narrowest local window with the same sinks that meets at least as many keys; further rows vary one
option.

    python benchmarks/barnes_hut_quality.py --length 2048
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn_compile.cli.demo import model_file
from fastattn_compile.cli.load import load
from fastattn_compile.files import write_json
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.operators.library import attend
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.operators.window import WindowAttention
from fastattn_compile.operators.window.cost import equal_window
from fastattn_compile.reporting.metrics import compare_logits, summarise
from fastattn_compile.reporting.provenance import provenance
from fastattn_compile.reporting.terminal import console, number

RESULTS = Path(__file__).parent / "results" / "barnes_hut_quality.json"
ATTENTION = "fastattn_direct"
BUDGETS: tuple[dict[str, Any], ...] = ({"open": 28}, {"open": 64}, {"open": 115, "beam": 60})
VARIANTS: tuple[dict[str, Any], ...] = (
    {"select": "cumulant"},
    {"share_group": False},
    {"group": 4},
    {"group": 16},
    {"rest": "pool"},
)


@contextmanager
def attention(model: Any, operator: Operator) -> Iterator[None]:
    """Every attention of a transformers model goes straight through an operator, causal."""
    import transformers

    def direct(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out, _lse = attend(query, key, value, operator, scale=scaling, mask="causal")
        return out.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    transformers.AttentionInterface.register(ATTENTION, direct)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def operators_of(spec: SiteSpec, variants: bool) -> list[Operator]:
    """The rows: each budget with its window, then the variants."""
    rows: list[Operator] = []
    for options in BUDGETS:
        tree = make_operator("barnes_hut", **options)
        width = equal_window(tree.cost(spec).keys_per_query, spec, tree.config.sinks)
        rows += [tree, WindowAttention(width)]
    return rows + [make_operator("barnes_hut", **options) for options in VARIANTS] if variants else rows


@torch.no_grad()
def measure(model: Any, ids: Tensor, exact: Tensor, operator: Operator, spec: SiteSpec) -> dict[str, Any]:
    """One row of the document."""
    with attention(model, operator):
        summary = summarise(compare_logits(exact, model(input_ids=ids, use_cache=False).logits, ids))
    row = {"operator": operator.name, "config": operator.config.to_dict(), **dataclasses.asdict(summary)}
    row["keys_per_query"] = operator.cost(spec).keys_per_query
    if operator.name == "barnes_hut":
        at_8192 = dataclasses.replace(spec, query_len=8192, key_len=8192)
        row["selection_products"] = operator.selection_products(spec)
        row["selection_products_at_8192"] = operator.selection_products(at_8192)
    return row


def main() -> None:
    from rich import box
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence")
    parser.add_argument("--variants", action="store_true", help="also vary single options")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    loaded = load(str(model_file()), length=args.length)
    ids, shape = loaded.inputs["input_ids"], loaded.model.config
    spec = SiteSpec(
        1, shape.num_attention_heads, shape.num_key_value_heads, args.length, args.length,
        shape.head_dim, shape.head_dim, mask=CAUSAL,
    )  # fmt: skip
    with torch.no_grad():
        exact = loaded.model(input_ids=ids, use_cache=False).logits
    columns = ("keys a query", "choice", "choice at 8192", "perplexity", "KL", "top-1")
    table = Table("every attention", *columns, box=box.SIMPLE_HEAD)
    rows = []
    context = {"benchmark": "barnes_hut_quality", "text": loaded.source}
    origin = provenance(loaded.model, loaded.inputs, seed=0, context=context)
    for operator in operators_of(spec, args.variants):
        row = measure(loaded.model, ids, exact, operator, spec)
        rows.append(row)
        changed = {k: v for k, v in row["config"].items() if v != getattr(type(operator)().config, k)}
        names = ("selection_products", "selection_products_at_8192")
        counts = (row["keys_per_query"], *(row.get(name, 0.0) for name in names))
        cells = [number(x) for x in (*counts, row["ppl"], row["kl"])]
        table.add_row(f"{operator.name} {changed}", *cells, f"{row['top1'] * 100:.1f} %")
        document = {"schema": "fastattn.quality/1", "n": args.length, "rows": rows, "provenance": origin}
        write_json(args.out, document)
    console().print(table)


if __name__ == "__main__":
    main()
