"""``fa.retrofit``: a plan put into a model, its parameters fitted, the whole distilled, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastattn_compile.errors import OptionError
from fastattn_compile.plans import Plan
from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.evaluate import Progress, evaluate
from fastattn_compile.retrofitting.attach import detach, place
from fastattn_compile.retrofitting.batches import Batches
from fastattn_compile.retrofitting.checkpoint import BASE_ATTRIBUTE, PLAN_ATTRIBUTE
from fastattn_compile.retrofitting.distil import distil
from fastattn_compile.retrofitting.fit import FitSettings, fit
from fastattn_compile.retrofitting.objectives import split_batch
from fastattn_compile.retrofitting.stages import DistilStage


def retrofit(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    settings: FitSettings | None = None,
    stages: Sequence[DistilStage] = (),
    folder: str | Path | None = None,
    checkpoint_every: int = 50,
    compiler: str = "inductor",
    verify: bool = True,
    progress: Progress | None = None,
    context: Mapping[str, Any] | None = None,
) -> Report:
    """Fits the parameters of a plan's operators, attaches them, distils the model if asked, and measures the result.

    The parameters are the model's from then on (``<module of the site>.fastattn.<name>``), and the plan is
    ``model.fastattn_plan``: compile with ``options={"plan": model.fastattn_plan}``, save with ``fa.save_pretrained``. After
    an error the model is as it was, without parameters attached.

    Args:
        model: The model; changed in place.
        plan: What serves which site.
        data: Batches to fit on.
        validation: Batches to judge by, the first of which the report is measured on; the first of ``data`` when ``None``.
        settings: How to fit.
        stages: Training of the whole model after the fit (``fa.distil``), towards the model as it was, in this process;
            each is kept only if it helps on ``validation``, which must then be given. A copy of the model is held.
        folder: Keeps the fit there, and under ``distil`` the stages, and resumes them.
        checkpoint_every: Steps of a stage between checkpoints.
        compiler: What lowers the model for stages and report: ``inductor``, ``aot_eager`` or ``eager``.
        verify: Prove causality and run the controls.
        progress: Called as ``progress(stage, done, total)``.
        context: More entries for the provenance of the report; no paths.

    Returns:
        The report; ``provenance["fit"]`` says of every fitted site what fitting gained, ``provenance["stages"]`` the
        same of every stage. End to end it compares with the model as it was given.

    Raises:
        PlanError: The plan does not fit the model.
        NumericError: A site's loss, or an output, is not finite.
        OptionError: The data holds no batch, raises, or cannot be read again for the stages.
        CheckpointError: ``folder`` holds another run.
        VerificationError: The result looks into the future where the model did not.
    """
    model = getattr(model, "_orig_mod", model)
    held_out = None if validation is None else list(validation)
    if held_out is not None and not held_out:
        raise OptionError("validation holds no batch")
    if stages and held_out is None:
        raise OptionError(
            "stages need validation: without held-out batches nobody knows whether a stage helps"
        )
    if stages and iter(data) is data:
        raise OptionError(
            "stages read the data again after the fit: give a list or a data loader, not an iterator"
        )
    if not isinstance(data, (list, tuple)):
        source = Batches(data)
        judged = source.peek() if held_out is None else held_out[0]
        again: Iterable[Any] = data if stages else _Rest(source)
    else:
        if not data:
            raise OptionError("the data holds no batch")
        judged, again = (data[0] if held_out is None else held_out[0]), data
    given = _copy(model) if stages else None
    fitted = fit(model, plan, again, held_out, settings=settings, folder=folder, progress=progress)
    detach(model)
    told: dict[str, Any] = {**(context or {}), "fit": fitted.to_json()}
    try:
        for (site, _), values in fitted.parameters.items():
            place(model, site, plan.sites[site].build(), dict(zip(fitted.names[site], values)))
        if given is not None and held_out is not None:
            distilled = distil(
                model, plan, data, held_out, stages=stages, teacher=given, compiler=compiler,
                folder=None if folder is None else Path(folder) / "distil", checkpoint_every=checkpoint_every,
                progress=progress,
            )  # fmt: skip
            plan, told["stages"] = distilled.plan, distilled.to_json()["stages"]
        arguments, keywords, labels = split_batch(judged)
        report = evaluate(
            model, keywords or arguments, plan=plan, compiler=compiler, verify=verify, progress=progress,
            labels=labels if isinstance(judged, Mapping) and "labels" in judged else None,
            before=given, context=told,
        )  # fmt: skip
    except BaseException:
        detach(model)
        if given is not None:
            _take_back(model, given)
        raise
    setattr(model, PLAN_ATTRIBUTE, plan)
    return report


def _copy(model: nn.Module) -> nn.Module:
    given = copy.deepcopy(model)
    detach(given)
    return given


def _take_back(model: nn.Module, given: nn.Module) -> None:
    """Brings a model back to the weights and attributes of a copy made before."""
    model.load_state_dict(given.state_dict())
    for name in (PLAN_ATTRIBUTE, BASE_ATTRIBUTE):
        if hasattr(given, name):
            setattr(model, name, getattr(given, name))
        elif hasattr(model, name):
            delattr(model, name)


class _Rest:
    """Batches of which the first was looked at already, as something that is read once."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        while True:
            yield self.batches.next()
