"""What a conversion costs: the original and the converted file side by side on the same inputs, per site and end to end."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fastattn_compile.converting.feeds import Feeds
from fastattn_compile.converting.run import Timing, run, session, timed
from fastattn_compile.errors import ConversionError
from fastattn_compile.operators.base import Operator
from fastattn_compile.passes.onnx.rewrite import Placed
from fastattn_compile.passes.site import Site
from fastattn_compile.reporting.document import CostReport, ModelReport, SiteReport
from fastattn_compile.reporting.evaluate import compare_outputs
from fastattn_compile.reporting.metrics import Quantiles, relative_error

# From this many last channels on, an output of a model that reads token numbers is taken for logits.
_VOCABULARY = 1000


def run_in_folder(model: ir.Model, feeds: Feeds, what: str, threads: int) -> dict[str, NDArray[Any]]:
    """Saves a model to a folder that goes away and runs it: weights of any size have a place there.

    Raises:
        RuntimeFailure: It does not run.
        ConversionError: There is no room for its weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            ir.save(model, path, external_data="model.data")
        except OSError as error:
            raise ConversionError(
                f"{what} cannot be written to {Path(folder).parent} to be run: {error.strerror or error}; free some "
                "room, or name another place (TMPDIR)"
            ) from error
        return run(session(str(path), threads, what), feeds, what)


def errors(got: NDArray[Any], wanted: NDArray[Any]) -> Quantiles | None:
    """Relative errors over the last dimension; rows where the exact output is 0 or not finite are left out."""
    exact, replaced = (torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in (wanted, got))
    each = relative_error(replaced, exact)
    return Quantiles.of(each[torch.isfinite(each)])


def site_reports(
    placed: Sequence[Placed], operators: Mapping[str, Operator], own: Sequence[Quantiles | None],
    accumulated: Sequence[Quantiles | None], reasons: Mapping[str, str], length: int,
) -> list[SiteReport]:  # fmt: skip
    """One report a replaced site."""
    made = []
    for item, alone, inside in zip(placed, own, accumulated):
        operator, name = operators[item.site.name], item.site.name
        line = SiteReport(
            name, operator.name, reasons.get(name, ""), options=operator.config.to_dict(),
            keys_per_query=_keys_per_query(operator, item.site, length),
        )  # fmt: skip
        if alone is not None:
            line = dataclasses.replace(
                line, own_error=alone.median, own_error_p95=alone.p95, own_error_p99=alone.p99
            )
        if inside is not None:
            line = dataclasses.replace(
                line, accumulated_error=inside.median, accumulated_error_p95=inside.p95,
                accumulated_error_p99=inside.p99,
            )  # fmt: skip
        made.append(line)
    return made


def _keys_per_query(operator: Operator, site: Site, length: int) -> float | None:
    def fixed(size: Any) -> int:
        return size if isinstance(size, int) else length

    spec = site.spec
    known = dataclasses.replace(spec, batch=1, query_len=fixed(spec.query_len), key_len=fixed(spec.key_len))
    return operator.cost(known).keys_per_query


def model_report(
    names: Sequence[str], before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]], feeds: Feeds,
    causal: bool,
) -> ModelReport:  # fmt: skip
    """The delta of the first output of real numbers: as logits when it looks like logits, else as hidden states.

    Args:
        names: Outputs in order.
        before: Those of the original.
        after: Those of the converted model.
        feeds: Inputs of both.
        causal: Every attention is causal, so that a token is predicted from those before it.
    """
    real = [name for name in names if before[name].dtype.kind == "f" and before[name].ndim >= 2]
    if not real:
        return ModelReport()
    exact, replaced = (torch.from_numpy(np.asarray(x[real[0]], dtype=np.float32)) for x in (before, after))
    integers = {
        n: torch.from_numpy(a.astype(np.int64))
        for n, a in feeds.items()
        if a.dtype.kind in "iu" and a.ndim == 2
    }
    tokens = next((a for name, a in integers.items() if "mask" not in name and "type" not in name), None)
    mask = next((a != 0 for name, a in integers.items() if "mask" in name), None)
    logits = exact.ndim == 3 and exact.shape[-1] >= _VOCABULARY and tokens is not None
    return compare_outputs((exact, logits), (replaced, logits), tokens if causal else None, mask)


def cost_report(
    original: Path, converted: Path, feeds: Feeds, length: int, repeats: int, threads: int
) -> tuple[CostReport, Timing, Timing]:
    """Both files timed in fresh processes, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        np.savez(given, **feeds)  # type: ignore[arg-type]
        exact, replaced = (timed(path, given, repeats, threads) for path in (original, converted))
    cost = CostReport(
        total_ms=replaced.ms, total_ms_exact=exact.ms, n=length, compiler="ONNX Runtime", repeats=repeats
    )
    return cost, exact, replaced
