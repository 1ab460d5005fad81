"""``fa.retrofit``: a plan put into a model, its parameters fitted, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastattn_compile.errors import OptionError
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.evaluate import Progress, evaluate
from fastattn_compile.retrofitting.attach import detach, place
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.checkpoint import PLAN_ATTRIBUTE
from fastattn_compile.retrofitting.fit import FitSettings, fit
from fastattn_compile.retrofitting.objectives import split_batch


def retrofit(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    settings: FitSettings | None = None,
    folder: str | Path | None = None,
    compiler: str = "inductor",
    verify: bool = True,
    progress: Progress | None = None,
    context: Mapping[str, Any] | None = None,
) -> Report:
    """Fits the parameters of a plan's operators, attaches them to the model and measures the result.

    The parameters are the model's from then on (``<module of the site>.fastattn.<name>``), and the plan is
    ``model.fastattn_plan``: compile with ``options={"plan": model.fastattn_plan}``, save with ``fa.save_pretrained``. After
    an error the model has no parameters attached.

    Args:
        model: The model; changed in place.
        plan: What serves which site.
        data: Batches to fit on.
        validation: Batches to judge by, the first of which the report is measured on; the first of ``data`` when ``None``.
        settings: How to fit.
        folder: Keeps the fit there and resumes it.
        compiler: What lowers the model for the report: ``inductor``, ``aot_eager`` or ``eager``.
        verify: Prove causality and run the controls.
        progress: Called as ``progress(stage, done, total)``.
        context: More entries for the provenance of the report; no paths.

    Returns:
        The report; ``provenance["fit"]`` says of every fitted site what fitting gained.

    Raises:
        PlanError: The plan does not fit the model.
        NumericError: A site's loss, or an output, is not finite.
        OptionError: The data holds no batch, or raises.
        CheckpointError: ``folder`` holds another run.
        VerificationError: The result looks into the future where the model did not.
    """
    model = getattr(model, "_orig_mod", model)
    held_out = None if validation is None else list(validation)
    if held_out is not None and not held_out:
        raise OptionError("validation holds no batch")
    if not isinstance(data, (list, tuple)):
        source = Batches(data)
        judged = source.peek() if held_out is None else held_out[0]
        again: Iterable[Any] = _Rest(source)
    else:
        if not data:
            raise OptionError("the data holds no batch")
        judged, again = (data[0] if held_out is None else held_out[0]), data
    fitted = fit(model, plan, again, held_out, settings=settings, folder=folder, progress=progress)
    detach(model)
    try:
        for (site, _), values in fitted.parameters.items():
            place(model, site, plan.sites[site].build(), dict(zip(fitted.names[site], values)))
        arguments, keywords, labels = split_batch(judged)
        report = evaluate(
            model, keywords or arguments, plan=plan, compiler=compiler, verify=verify, progress=progress,
            labels=labels if isinstance(judged, Mapping) and "labels" in judged else None,
            context={**(context or {}), "fit": fitted.to_json()},
        )  # fmt: skip
    except BaseException:
        detach(model)
        raise
    setattr(model, PLAN_ATTRIBUTE, plan)
    return report


class _Rest:
    """Batches of which the first was looked at already, as something that is read once."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        while True:
            yield self.batches.next()
