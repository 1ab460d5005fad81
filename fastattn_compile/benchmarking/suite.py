"""Many cases: resumable, each row written as soon as it is there, with crossover lengths and speed constants at the end."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn_compile.benchmarking.case import FORWARD, Case
from fastattn_compile.benchmarking.measure import measure
from fastattn_compile.errors import OptionError
from fastattn_compile.files import write_json
from fastattn_compile.kernels.dispatch import chosen_kernels
from fastattn_compile.machine import Rates, best_rates, device_name
from fastattn_compile.operators.speed import Speed, fit_speed
from fastattn_compile.reporting.provenance import versions

SCHEMA = "fastattn.bench/1"
_SERIES = ("operator", "config", "device", "dtype", "heads", "kv_heads", "head_dim", "causal", "direction")

Progress = Callable[[str, int, int], None]


def run_suite(
    cases: Sequence[Case],
    *,
    seconds: float = 10.0,
    flex: bool = False,
    memory: bool = True,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measures cases one after the other.

    Args:
        cases: The cases; at least one, all on one device.
        seconds: Time to spend on one, about.
        flex: FlexAttention may be the baseline.
        memory: Measure peak memory.
        out: Where the document is written after every row.
        resume: Keep the rows that ``out`` already holds and were measured with the same sizes and configuration.
        progress: Told the case at hand.
        on_row: Given every new row.

    Returns:
        The document, schema ``fastattn.bench/1``.

    Raises:
        OptionError: ``out`` holds something else, or was measured on another device.
    """
    device = torch.device(cases[0].device)
    kept = _kept(out, device) if resume and out is not None and out.exists() else {}
    rates = best_rates(device, cases[0].torch_dtype)
    # Rows of other cases stay in the document that a run goes on with.
    asked = {_row_key(_as_row(case)) for case in cases}
    rows = [row for key, row in kept.items() if key not in asked]
    document: dict[str, Any] = {}
    for at, case in enumerate(cases):
        progress(f"{case.operator} n={case.n} {case.dtype} {case.direction}", at, len(cases))
        key = _row_key(_as_row(case))
        row = kept.get(key)
        if row is None:
            row = measure(case, rates, seconds=seconds, flex=flex, memory=memory)
            on_row(row)
        rows.append(row)
        document = _document(rows, rates, device)
        if out is not None:
            write_json(out, document)
    return document


def _document(rows: list[dict[str, Any]], rates: Rates, device: torch.device) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "rows": rows,
        "crossover": crossovers(rows),
        "provenance": {
            "versions": versions(),
            "device": device_name(device),
            "system": platform.platform(terse=True),
            "threads": torch.get_num_threads(),
            "kernels": chosen_kernels(),
            "flops_per_second": round(rates.flops),
            "bytes_per_second": round(rates.bytes),
            "load": round(os.getloadavg()[0], 2),
        },
    }


def _as_row(case: Case) -> dict[str, Any]:
    return {
        "operator": case.operator, "config": case.make_operator().config.to_dict(), "device": case.device,
        "dtype": case.dtype, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "n": case.n, "causal": case.causal, "direction": case.direction,
    }  # fmt: skip


def _row_key(row: dict[str, Any]) -> str:
    return json.dumps({name: row.get(name) for name in (*_SERIES, "batch", "n")}, sort_keys=True)


def _kept(out: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run that has not finished."""
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
        rows, where = document["rows"], document["provenance"]["device"]
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}, expected {SCHEMA!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"cannot resume: {out} is no benchmark document ({error}); choose another --out"
        ) from error
    if where != device_name(device):
        raise OptionError(
            f"cannot resume: {out} was measured on {where}, this is {device_name(device)}; choose another --out"
        )
    return {_row_key(row): row for row in rows if row.get("ms") is not None}


def series(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that differ in length only, by length; rows without a time are left out."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["ms"] is not None:
            groups[json.dumps([row.get(name) for name in _SERIES], sort_keys=True)].append(row)
    return [sorted(group, key=lambda row: row["n"]) for group in groups.values()]


def crossovers(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every series the length from which on the operator is faster than exact attention, between measured lengths.

    ``n`` is ``None`` when it is nowhere faster, and the shortest measured length when it is faster from there on.
    """
    found = []
    for group in series(rows):
        n: float | None = None
        for before, row in zip([None, *group], group):
            if row["ratio"] < 1:
                n = None
            elif n is None:
                n = row["n"] if before is None else _between(before, row)
        first = group[0]
        found.append({**{name: first[name] for name in _SERIES if name != "config"}, "n": n and round(n)})
    return found


def _between(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Where the ratio passes 1, straight in logarithms."""
    low, high = math.log(before["ratio"]), math.log(after["ratio"])
    share = -low / (high - low) if high > low else 1.0
    return float(before["n"] * (after["n"] / before["n"]) ** share)


def speeds(rows: Iterable[dict[str, Any]], device: str) -> list[Speed]:
    """The two speed constants of every operator and of exact attention, fitted to the forward rows.

    Args:
        rows: Rows of one device. A series is fitted by the rows of the implementation that serves its longest sequence
            (where all keys are near, another may serve); one of a single length is left out.
        device: Name of the device.
    """
    found: list[Speed] = []
    for group in series(rows):
        longest = max(group, key=lambda row: int(row["n"]))
        own = [row for row in group if row["kernels"] == longest["kernels"]]
        if longest["direction"] != FORWARD:
            continue
        if _lengths(own) > 1:
            fitted = fit_speed([(row["flops"], row["ms"] / 1e3) for row in own])
            found.append(Speed(longest["operator"], device, longest["kernels"], longest["dtype"], *fitted))
        known = any(s.operator == "exact" and s.dtype == longest["dtype"] for s in found)
        if _lengths(group) > 1 and not known:
            exact = fit_speed([(_exact_flops(row), row["baseline_ms"] / 1e3) for row in group])
            found.append(Speed("exact", device, "aten", longest["dtype"], *exact))
    return found


def _lengths(rows: Sequence[dict[str, Any]]) -> int:
    return len({row["n"] for row in rows})


def _exact_flops(row: dict[str, Any]) -> float:
    sizes = {name: row[name] for name in ("n", "batch", "heads", "kv_heads", "head_dim", "causal", "dtype")}
    case = Case(operator="exact", device=row["device"], **sizes)
    return case.make_operator().cost(case.spec()).flops
