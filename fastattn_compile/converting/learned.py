"""Learned parameters of the operators that a conversion chose: from a retrofit, or as they start from the inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from fastattn_compile.converting.delta import run_in_folder
from fastattn_compile.converting.expose import expose
from fastattn_compile.converting.feeds import Feeds
from fastattn_compile.converting.source import Source, prepare
from fastattn_compile.errors import ConversionError
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.onnx.rewrite import Replacement, rewrite
from fastattn_compile.passes.site import Site
from fastattn_compile.plans import Plan

Learned = Mapping[str, Mapping[str, torch.Tensor]]


def stored_parameters(plan: Plan | str | Path | None) -> Learned:
    """Parameters by site and name of a folder that ``fa.save_pretrained`` wrote; none of any other plan.

    Raises:
        CheckpointError: The folder is damaged.
    """
    if plan is None or isinstance(plan, Plan) or not Path(plan).is_dir():
        return {}
    from fastattn_compile.retrofitting.checkpoint import learned_parameters

    return learned_parameters(Path(plan))


def parameters_of(
    source: Source, choices: Mapping[str, Operator], stored: Learned, feeds: Feeds, threads: int, longest: int
) -> tuple[Learned, list[str]]:
    """The parameters of every site whose operator has some.

    Args:
        source: The model.
        choices: Site to operator.
        stored: Fitted ones, by site and name.
        feeds: Inputs of the model; where parameters start from data, the queries and keys that they give are the data.
        threads: Of ONNX Runtime.
        longest: Longest sequence to serve where the length is not fixed.

    Returns:
        Parameters by site and name, and the sites whose parameters nobody has fitted.

    Raises:
        ConversionError: Fitted parameters do not belong to the site.
    """
    found: dict[str, Mapping[str, torch.Tensor]] = {}
    fresh: list[str] = []
    if not any(operator.learned for operator in choices.values()):
        return found, fresh
    prepared = prepare(source)
    sites = {line.name: line.site for line in prepared.softmaxes if line.site is not None}
    missing = {
        name: sites[name] for name, operator in choices.items() if operator.learned and name not in stored
    }
    samples = _samples(source, [n for n in missing if choices[n].starts_from_sample], feeds, threads, longest)
    for name, operator in choices.items():
        if not operator.learned:
            continue
        spec = Replacement(sites[name], operator, longest).settled()
        shapes = operator.parameter_shapes(spec)
        if name in missing:
            found[name] = operator.initial_parameters(spec, samples.get(name))
            fresh.append(name)
            continue
        found[name] = {key: stored[name][key] for key in shapes if key in stored[name]}
        _check(name, operator, shapes, found[name])
    return found, fresh


def _check(
    name: str, operator: Operator, shapes: Mapping[str, tuple[int, ...]], got: Mapping[str, torch.Tensor]
) -> None:
    """Columns of positions may be fewer than the model's longest sequence: a longer one then stops the run."""
    dims = {
        key: tuple(value.shape)[: len(shape) - 1] for (key, shape), value in zip(shapes.items(), got.values())
    }
    if list(got) != list(shapes) or any(dims[key] != shape[:-1] for key, shape in shapes.items()):
        raise ConversionError(
            f"site {name}: {operator} has parameters {dict(shapes)} here, the fitted ones are "
            f"{ {key: tuple(value.shape) for key, value in got.items()} }"
        )


def _samples(
    source: Source, names: list[str], feeds: Feeds, threads: int, longest: int
) -> dict[str, AttentionInputs]:
    """Queries, keys and values of some sites, as the model makes them of the inputs."""
    if not names:
        return {}
    prepared = prepare(source)
    exact = make_operator("exact")
    sites: list[Site] = [s.site for s in prepared.softmaxes if s.site is not None and s.name in names]
    placed = rewrite(prepared.model, [Replacement(s, exact, longest) for s in sites], replace=False)
    exposed = [
        expose(prepared.model, item.inputs, f"fastattn_sample_{at}_") for at, item in enumerate(placed)
    ]
    outputs = run_in_folder(prepared.model, feeds, "the original model", threads)
    samples = {}
    for item, values in zip(placed, exposed):
        query, key, value, *padding = (
            _rounds_as_batch(outputs[name], 2 if at == 3 else 4) for at, name in enumerate(values)
        )
        if not query.numel():
            raise ConversionError(
                f"site {item.site.name}: these inputs do not reach it, and the parameters of its operator start from the "
                "queries and keys it sees; give inputs that take its branch"
            )
        inputs = AttentionInputs(query, key, value, item.site.scale, item.site.spec.mask)
        samples[item.site.name] = dataclasses.replace(inputs, key_padding=padding[0]) if padding else inputs
    return samples


def _rounds_as_batch(array: NDArray[Any], rank: int) -> torch.Tensor:
    """What a loop gave round by round, as one batch."""
    tensor = torch.from_numpy(array)
    return tensor.flatten(0, tensor.ndim - rank) if tensor.ndim > rank else tensor
