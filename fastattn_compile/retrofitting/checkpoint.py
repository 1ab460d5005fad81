"""``fa.save_pretrained`` and ``fa.from_pretrained``: a retrofit as a folder that others can load.

The folder holds only what is new: the plan, the learned parameters, and base tensors that were changed. The base model
itself is referred to by the hash of its weights, or merged into the folder. Nothing is pickled. A folder is written
beside its place, read back, and put there in one step, so a failed or killed save leaves the old one as it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastattn_compile.errors import CheckpointError, NumericError, PlanError
from fastattn_compile.files import replaced_folder, write_json, write_text
from fastattn_compile.passes.names import site_module
from fastattn_compile.plans import Plan, PlannedSite
from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.provenance import versions
from fastattn_compile.retrofitting import hugging_face
from fastattn_compile.retrofitting.attach import LearnedParameters, place
from fastattn_compile.retrofitting.base_weights import BaseWeights, alias_of, base_state, listed, tied_names
from fastattn_compile.retrofitting.card import model_card
from fastattn_compile.retrofitting.manifest import (
    CARD,
    CONFIG,
    MERGED,
    PARAMETERS,
    REPORT,
    SEPARATE,
    Manifest,
    file_hash,
)

WEIGHTS = "model.safetensors"
PLAN_ATTRIBUTE, BASE_ATTRIBUTE = "fastattn_plan", "fastattn_base"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    report: Report | None = None,
    base: BaseWeights | None = None,
    merge: bool = False,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Manifest:
    """Saves a retrofit: plan, learned parameters, changed weights, report, model card.

    Args:
        model: The model with its learned parameters attached. A compiled one is unwrapped.
        folder: Where to. An existing folder is replaced in one step; files in it that are not written anew are kept.
        plan: What serves which site; ``model.fastattn_plan`` when ``None``, else the operators of the attached
            parameters.
        report: What it costs; becomes ``report.json`` and the table of the card.
        base: Weights before training (``BaseWeights.of(model)``): tensors that differ are saved.
            ``model.fastattn_base``, which ``fa.distil`` leaves there, when ``None``; a model without it is said to have
            its base weights untouched.
        merge: Save the whole model, so that the base is not needed to load. A Hugging Face model is saved as
            transformers does, and loads through it.
        tokenizer: Saved beside a merged model (``tokenizer.save_pretrained``).
        overwrite: Replace a folder that fastattn_compile did not write.

    Returns:
        What ``fastattn_config.json`` says.

    Raises:
        CheckpointError: The folder is another's, or what was written does not read back.
        PlanError: There is no plan, it needs learned parameters that are not attached, or it names modules that the
            model does not have.
        NumericError: A learned parameter or changed weight holds NaN or Inf.
    """
    model = getattr(model, "_orig_mod", model)
    target = Path(folder)
    _refuse_foreign(target, overwrite)
    bundles = {m.site: m for m in model.modules() if isinstance(m, LearnedParameters)}
    plan = _plan_of(model, plan, bundles)
    owners = {site: _owner(model, site) for site in plan.sites}
    learned = _learned(plan, bundles)
    state = base_state(model)
    now = BaseWeights.of(model)
    before = base or getattr(model, BASE_ATTRIBUTE, None) or now
    tied = tied_names(state)
    differing = before.changed(now)

    tensors: dict[str, Tensor] = {}
    tensors.update({f"{site}::{name}": p for site, b in learned.items() for name, p in b.named_parameters()})
    _refuse_unfinite({**tensors, **{f"base::{name}": state[name] for name in differing}})
    transformers = merge and hugging_face.is_pretrained(model)
    stored_names = () if transformers else state if merge else differing
    weights = {name: tied[name] for name in stored_names}
    with replaced_folder(target, _written_before(target)) as staging:
        if not merge:
            tensors.update({f"base::{first}": state[first] for first in weights.values()})
        _write_tensors(tensors, staging / PARAMETERS)
        files = {PARAMETERS: file_hash(staging / PARAMETERS)}
        if transformers:
            hugging_face.save(model, state, plan, staging, tokenizer)
        elif merge:
            _write_tensors({first: state[first] for first in weights.values()}, staging / WEIGHTS)
            files[WEIGHTS] = file_hash(staging / WEIGHTS)
        manifest = Manifest(
            plan=plan,
            base=now if merge else before,
            weights=MERGED if merge else SEPARATE,
            learned={site: tuple(b.names()) for site, b in learned.items()},
            owners=owners,
            changed=weights,
            origin=before.hash if merge and differing else "",
            producer={
                "name": "fastattn_compile",
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **versions(),
            },
            files=files,
        )
        if report is not None:
            report.save(staging / REPORT)
        write_text(staging / CARD, model_card(manifest, report))
        written = [path.name for path in staging.iterdir()]
        manifest = dataclasses.replace(manifest, written=(*written, CONFIG))
        write_json(staging / CONFIG, manifest.to_json())
        # What cannot be read back takes nobody's place.
        _read_tensors(Manifest.load(staging), staging)
    return manifest


def from_pretrained(model: nn.Module | None, folder: str | Path, *, check: bool = True) -> nn.Module:
    """Brings a base model to the state of a saved retrofit.

    Everything is read and checked before the model is changed: after an error it is as it was. Run the result with
    ``torch.compile(model, backend="fastattn", options={"plan": model.fastattn_plan})``.

    Args:
        model: The base model the retrofit was made from; changed in place. ``None`` builds it from a merged Hugging
            Face folder.
        folder: From ``save_pretrained``.
        check: Compare the hash of the model's weights with the one saved. Without it only names and shapes are, and
            what the report says need not hold.

    Returns:
        The model with learned parameters attached, and the plan as its ``fastattn_plan``.

    Raises:
        CheckpointError: The folder is damaged, or belongs to another model; the text says what differs.
        ValueError: Learned parameters are attached to the model already.
    """
    source = Path(folder)
    manifest = Manifest.load(source)
    stored = _read_tensors(manifest, source)
    own_weights = manifest.weights == MERGED and WEIGHTS in manifest.files
    if model is None:
        if manifest.weights != MERGED or own_weights:
            raise CheckpointError(
                f"{source} holds no Hugging Face model to build from: give the base model ({manifest.base.model})"
            )
        model = hugging_face.load(source)
    model = getattr(model, "_orig_mod", model)
    if any(isinstance(module, LearnedParameters) for module in model.modules()):
        raise ValueError(
            "learned parameters are attached to this model already; call fa.detach(model) to start over"
        )
    _check_owners(model, manifest)
    state = base_state(model)
    if own_weights:
        whole = _read(source / WEIGHTS)
        weights = {name: whole[first] for name, first in manifest.changed.items()}
        _check_whole(manifest, state)
    else:
        weights = {name: stored[f"base::{first}"] for name, first in manifest.changed.items()}
        if check:
            _check_base(manifest, BaseWeights.of(model))
    _check_fit(weights, state)

    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)
    for site, names in manifest.learned.items():
        operator = manifest.plan.sites[site].build()
        place(model, site, operator, {name: stored[f"{site}::{name}"] for name in names})
    setattr(model, PLAN_ATTRIBUTE, manifest.plan)
    return model


def learned_parameters(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The learned parameters of a saved retrofit by site and name.

    Args:
        folder: From ``save_pretrained``.

    Raises:
        CheckpointError: The folder is damaged, or is no retrofit.
    """
    manifest = Manifest.load(folder)
    stored = _read_tensors(manifest, folder)
    return {
        site: {name: stored[f"{site}::{name}"] for name in names} for site, names in manifest.learned.items()
    }


def _written_before(target: Path) -> tuple[str, ...]:
    """Files of an earlier save, which a new one must not leave beside its own."""
    try:
        return Manifest.load(target).written
    except (CheckpointError, PlanError):
        return (CONFIG, PARAMETERS, REPORT, CARD)


def _refuse_foreign(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder to save into")
    if not overwrite and target.exists() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise CheckpointError(
            f"{target} holds files that fastattn_compile did not write: name another folder, or pass "
            "overwrite=True to write over those of the same name"
        )


def _plan_of(model: nn.Module, plan: Plan | None, bundles: Mapping[str, LearnedParameters]) -> Plan:
    found = plan if plan is not None else getattr(model, PLAN_ATTRIBUTE, None)
    if found is None and bundles:
        found = Plan(
            {
                site: PlannedSite(b.operator.name, b.operator.config.to_dict(), "learned")
                for site, b in bundles.items()
            }
        )
    if not isinstance(found, Plan):
        raise PlanError("there is no plan to save: give plan=Plan(...), which says what serves which site")
    return found


def _owner(model: nn.Module, site: str) -> str | None:
    """Module path of a site; ``None`` where the site is named by its source line."""
    path = site_module(site)
    try:
        model.get_submodule(path)
    except AttributeError:
        if ":" in path:
            return None
        raise PlanError(f"the plan names site {site!r}, but the model has no module {path!r}") from None
    return path


def _learned(plan: Plan, bundles: Mapping[str, LearnedParameters]) -> dict[str, LearnedParameters]:
    found = {}
    for site, planned in plan.sites.items():
        operator = planned.build()
        if not operator.learned:
            continue
        if site not in bundles:
            raise PlanError(
                f"site {site!r} is served by {operator}, whose parameters are not attached to the model; call fa.attach"
            )
        if bundles[site].operator.token != operator.token:
            raise PlanError(
                f"site {site!r}: the plan says {operator}, the attached parameters are of {bundles[site].operator}"
            )
        found[site] = bundles[site]
    return found


def _refuse_unfinite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            site, _, parameter = name.partition("::")
            raise NumericError(f"NaN or Inf in {parameter} of {site}: nothing was saved")


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors that share no memory: slices of one storage become tensors of their own."""
    ready = {}
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        ready[name] = value if whole else value.clone()
    save_file(ready, path, metadata={"format": "pt"})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy the folder again") from error


def _read_tensors(manifest: Manifest, folder: Path) -> dict[str, Tensor]:
    """The tensors of the parameter file: exactly those that the configuration names."""
    manifest.check_files(folder)
    stored = _read(folder / PARAMETERS)
    named = {f"{site}::{name}" for site, names in manifest.learned.items() for name in names}
    if manifest.weights == SEPARATE:
        named |= {f"base::{first}" for first in manifest.changed.values()}
    if named != set(stored):
        odd = sorted(named ^ set(stored))
        raise CheckpointError(f"{PARAMETERS} and {CONFIG} in {folder} do not belong together: {listed(odd)}")
    unplanned = sorted(set(manifest.learned) - set(manifest.plan.sites))
    if unplanned:
        raise CheckpointError(
            f"{CONFIG}: parameters of sites that the plan does not name: {listed(unplanned)}"
        )
    return stored


def _check_whole(manifest: Manifest, state: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(manifest.changed) - set(state)), sorted(set(state) - set(manifest.changed))
    if missing or extra:
        raise CheckpointError(
            f"the model is not the {manifest.base.model} that was saved: "
            f"it lacks {listed(missing) or 'nothing'} and has besides {listed(extra) or 'nothing'}"
        )


def _check_base(manifest: Manifest, found: BaseWeights) -> None:
    difference = manifest.base.difference(found)
    if difference:
        hint = ""
        if manifest.origin and manifest.origin == found.hash:
            hint = (
                "; these are the weights before training, and the folder holds those after it: load the model from the "
                "folder, or pass None"
            )
        raise CheckpointError(
            f"this is not the model the folder was made for ({manifest.base.model}, hash "
            f"{manifest.base.hash[:12]}, got {found.hash[:12]}): {difference}{hint}. With check=False it loads all the same"
        )


def _check_owners(model: nn.Module, manifest: Manifest) -> None:
    modules = [name for name, _ in model.named_modules()]
    for site, path in manifest.owners.items():
        if path is not None and path not in modules:
            close = difflib.get_close_matches(path, modules, n=1)
            hint = f"; is it {close[0]!r} now?" if close else ""
            raise CheckpointError(
                f"site {site!r} is in module {path!r}, which this {type(model).__name__} does not have{hint} "
                "The model's code may be of another version than when the folder was saved"
            )
    missing = sorted(
        set(manifest.learned) - {site for site, path in manifest.owners.items() if path is not None}
    )
    if missing:
        raise CheckpointError(f"{CONFIG} does not say in which module these are: {listed(missing)}")


def _check_fit(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Shapes fit, and names that are one tensor in the model get one value."""
    first: dict[tuple[Any, ...], str] = {}
    for name, value in weights.items():
        if name not in state:
            raise CheckpointError(f"the model has no tensor {name}, which the folder changes")
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(state[name].shape)}, the folder holds {tuple(value.shape)}"
            )
        if state[name].is_meta:
            raise CheckpointError(f"{name} is on the meta device: load the model's weights first")
        other = first.setdefault(alias_of(state[name]), name)
        if other != name and not torch.equal(weights[other], value):
            raise CheckpointError(
                f"{other} and {name} are one tied tensor in this model but were saved with different values: "
                "untie them before loading"
            )
    tied = {alias_of(state[name]) for name in weights}
    for name, tensor in state.items():
        if name not in weights and alias_of(tensor) in tied:
            other = first[alias_of(tensor)]
            raise CheckpointError(
                f"{name} is tied to {other} in this model, but only {other} was changed before saving: untie them first"
            )
