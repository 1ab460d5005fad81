"""The tensors that a model's attention sites meet in one call: what operators start their parameters from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.fx

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.observe import observing
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.analyse import analyse
from fastattn_compile.passes.rewrite import Replacement, rewrite
from fastattn_compile.scanning import run_captured

Take = Callable[[str, AttentionInputs], None]


def visit_sites(
    model: Callable[..., Any], take: Take, sites: Collection[str], *args: Any, **kwargs: Any
) -> None:
    """Runs a model once with exact attention and shows the tensors of its sites, one site after the other.

    Nothing is kept: memory is that of the call and of what ``take`` keeps. The model and what is compiled of it stay
    as they were.

    Args:
        model: The model.
        take: Called with a site's name and tensors, in execution order, below autograd; must not change them.
        sites: Names of the sites to show, as ``fa.scan`` prints them.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.
    """
    exact = make_operator("exact")

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        for analysis in analyse(gm):
            found = [line.site for line in analysis.softmaxes if line.site is not None and line.name in sites]
            rewrite(analysis.gm, [Replacement(site, exact) for site in found if exact.supports(site.spec)])
        return gm.forward

    def observe(site: str, _: Operator, inputs: AttentionInputs, __: AttentionOutput) -> None:
        if site in sites:
            take(site, inputs)

    with observing(observe):
        run_captured(model, backend, *args, **kwargs)


def site_samples(
    model: Callable[..., Any], sites: Collection[str], *args: Any, **kwargs: Any
) -> dict[str, AttentionInputs]:
    """The tensors of some sites in one call, all kept at once; of a site that runs several times the last.

    Args:
        model: The model.
        sites: Names of the sites.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.
    """
    seen: dict[str, AttentionInputs] = {}
    visit_sites(model, seen.__setitem__, sites, *args, **kwargs)
    return seen
