"""Recall of the finder over a zoo of models, beside Inductor's own fusion of attention in the same run.

Every model runs compiled with every site rewritten as ``exact`` attention by the structure that was read, and must give
what it gave. Counted are sites found, kept with a reason and missed, what was taken and is no attention, and masks whose
structure is the true one. Dropout is off. Rows are kept as they come: a run that was stopped goes on.

    python benchmarks/find.py                       # everything: both implementations, masks, modes and types
    python benchmarks/find.py --only bert llama --modes eval --dtypes float32 --no-inductor
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rows import Rows, add_row_options
from torch import Tensor, nn
from zoo import Entry, models

import fastattn_compile.backend as backend
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "find.json"
SCHEMA = "fastattn.find/1"
KEY = ("name", "implementation", "mask", "mode", "dtype")
OPTIONS = {"operator": "exact", "compiler": "eager", "quiet": True}
TINY = 1e-12


def without_dropout(model: nn.Module) -> None:
    """Sets every rate of dropout to 0, of layers that are dropped too."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (
                "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
            ):
                setattr(module, name, 0.0)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """The same arguments with floating-point tensors of another type."""
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values
    )


def outcome(
    run: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], training: bool
) -> list[Tensor]:
    """The floating-point outputs of a call, and in training the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with torch.set_grad_enabled(training):
        out = run(**inputs)
    out = dict(out) if hasattr(out, "keys") else out
    found = [
        x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    if not training:
        return found
    torch.manual_seed(3)
    total = sum(
        (x.double() * torch.randn(x.shape, dtype=torch.float64)).sum() for x in found if x.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    gradients = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    return [x.detach() for x in found] + gradients


def apart(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Norm of the difference over the norm of what was wanted; infinite where shapes or infinities differ."""
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    squares = [0.0, 0.0]
    for a, b in zip(got, wanted):
        a, b = a.double(), b.double()
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        kept = torch.isfinite(b)
        squares[0] += float((a - b)[kept].square().sum())
        squares[1] += float(b[kept].square().sum())
    return float((squares[0] / max(squares[1], TINY)) ** 0.5)


def inductor_fused(model: nn.Module, inputs: dict[str, Any], training: bool) -> int | None:
    """Attentions Inductor's own passes replace; code generation is left out. ``None`` when it fails.

    Inductor counts each replacement, forward and backward of one site once, where it makes it.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def stub(gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            copied = list(arguments)
            arguments.clear()
            return gm(*copied)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compiled(gm: torch.fx.GraphModule, example: list[Any]) -> Any:
        return compile_fx(gm, example, inner_compile=stub)

    torch.compiler.reset()
    before = counters["inductor"]["fuse_attention"]
    try:
        with torch.set_grad_enabled(training):
            torch.compile(model, backend=compiled, dynamic=False)(**inputs)
    except Exception:  # whatever Inductor cannot compile, it does not fuse
        return None
    finally:
        torch.compiler.reset()
    return counters["inductor"]["fuse_attention"] - before


def structures(found: Iterable[Any], padded: bool) -> Counter[str]:
    """How many sites have which structure of mask; all that no structure says are one.

    A mask that was read from values allows for padding that a later batch may have.
    """

    def text(line: Any) -> str:
        if line.checked and not padded:
            return str(line.mask).replace(" & key_padding", "").replace("key_padding", "none")
        return "opaque" if line.mask.startswith("opaque") else str(line.mask)

    return Counter(text(d.softmax) for d in found)


def measure(
    entry: Entry, implementation: str, padded: bool, training: bool, dtype: torch.dtype, inductor: bool
) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = entry.build(implementation).train(training)
    without_dropout(model)
    torch.manual_seed(1)
    inputs = entry.inputs(padded)
    model, inputs = model.to(dtype), cast(inputs, dtype)
    plain = outcome(model, model, inputs, training)
    try:
        wide = copy.deepcopy(model).double()
        exact, judge = outcome(wide, wide, cast(inputs, torch.float64), training), "float64"
    except RuntimeError:  # code that fixes a type somewhere
        exact, judge = plain, "itself"
    if not math.isfinite(apart(plain, exact)):  # or overflows in one type alone
        exact, judge = plain, "itself"
    torch.compiler.reset()
    backend.reset()
    start = time.perf_counter()
    got = outcome(torch.compile(model, backend="fastattn", options=OPTIONS), model, inputs, training)
    seconds = time.perf_counter() - start
    decisions = [d for record in backend.records() for d in record.decisions]
    taken = [d for d in decisions if d.softmax.status == "taken"]
    kept = [d for d in decisions if d.softmax.status != "taken"]
    expected, masks = entry.expected(padded), structures(taken, padded)
    hiding = Counter({k: n for k, n in expected.items() if k != "none"})
    refused = [d for d in kept if entry.because and entry.because in d.softmax.reason]
    eps = torch.finfo(dtype).eps
    usual, error = apart(plain, exact), apart(got, exact)
    return {
        "sites": entry.sites,
        "taken": len(taken),
        "kept": min(len(refused), entry.kept),
        "missed": 0
        if entry.untraceable
        else max(entry.sites - len(taken) - min(len(refused), entry.kept), 0),
        "false_positives": max(len(taken) - entry.sites + entry.kept, 0),
        "not_attention": len(kept) - len(refused),
        "untraceable": entry.untraceable,
        "graphs": len(backend.records()),
        "masks": dict(masks),
        "masks_expected": dict(expected),
        # Where nothing is hidden there is no mask to understand.
        "masks_hiding": sum(hiding.values()),
        "masks_right": sum((masks & hiding).values()),
        "reasons": dict(Counter(d.softmax.reason for d in kept)),
        "judge": judge,
        "error": error if math.isfinite(error) else None,
        "error_of_model": usual if math.isfinite(usual) else None,
        # Of two results in one type, each errs by a few roundings.
        "agrees": error <= (2 * usual + eps if judge == "float64" else 8 * eps),
        "inductor": inductor_fused(model, inputs, training)
        if inductor and implementation != "sdpa"
        else None,
        "seconds": round(seconds, 2),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Totals by implementation, mask, mode and type, in Markdown."""
    lines = [
        "| implementation | padding | mode | type | models | sites | taken | kept, rightly | missed "
        "| false positives | Inductor | masks right | outputs agree |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    done = [r for r in rows if "failed" not in r]
    for key in sorted({tuple(r[k] for k in KEY[1:]) for r in done}, reverse=True):
        mine = [r for r in done if tuple(r[k] for k in KEY[1:]) == key]
        total = {
            k: sum(r[k] for r in mine)
            for k in ("sites", "taken", "kept", "missed", "false_positives", "masks_right")
        }
        fused = [r["inductor"] for r in mine if r["inductor"] is not None]
        masks = sum(r["masks_hiding"] for r in mine)
        lines.append("| " + " | ".join(map(str, (
            *key, len(mine), total["sites"], total["taken"], total["kept"], total["missed"], total["false_positives"],
            sum(fused) if fused else "", f"{total['masks_right']} of {masks}", sum(r["agrees"] for r in mine),
        ))) + " |")  # fmt: skip
    failed = [r for r in rows if "failed" in r]
    return "\n".join(
        [*lines, *(f"failed: {r['name']} ({r['implementation']}): {r['failed']}" for r in failed)]
    )


def show(row: dict[str, Any]) -> str:
    head = " ".join(str(row[k]) for k in KEY)
    if "failed" in row:
        return f"{head}: FAILED {row['failed']}"
    wrong = [
        name for name, bad in (
            ("MISSED", row["missed"]), ("FALSE", row["false_positives"]), ("DIFFERS", not row["agrees"]),
            ("MASK", row["masks"] != row["masks_expected"] and not row["untraceable"]),
        ) if bad
    ]  # fmt: skip
    text = f"{head}: {row['taken']} of {row['sites']} taken, Inductor {row['inductor']}, {row['seconds']} s"
    if wrong:
        text += f" {' '.join(wrong)} {row['masks']} {row['reasons']}"
        text += f" error {row['error']} against {row['error_of_model']}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--implementations", nargs="+", default=["eager", "sdpa", "library"])
    parser.add_argument("--masks", nargs="+", default=["padded", "plain"], choices=["padded", "plain"])
    parser.add_argument("--modes", nargs="+", default=["eval", "train"], choices=["eval", "train"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-inductor", action="store_true", help="leave out Inductor's count")
    add_row_options(parser, RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = Rows(args.json, SCHEMA, KEY, {"provenance": {"versions": versions()}})
    if args.show:
        print(summary(rows.all))
        return
    for dtype, mode, mask, entry in itertools.product(args.dtypes, args.modes, args.masks, models().values()):
        if (args.only and entry.name not in args.only) or (mask == "padded" and entry.masked is None):
            continue
        for implementation in set(entry.implementations) & set(args.implementations):
            key = {
                "name": entry.name,
                "implementation": implementation,
                "mask": mask,
                "mode": mode,
                "dtype": dtype,
            }
            known = rows.find(key)
            if not args.fresh and known is not None and "failed" not in known:
                continue
            try:
                row = key | measure(
                    entry,
                    implementation,
                    mask == "padded",
                    mode == "train",
                    getattr(torch, dtype),
                    not args.no_inductor,
                )
            except Exception as error:  # a model that its library cannot build or run is a row, and says so
                row = key | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            rows.put(row)
            print(show(row), flush=True)
    print(summary(rows.all))


if __name__ == "__main__":
    main()
