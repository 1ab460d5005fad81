"""The error of an operator on the tensors a graph really meets: at compile time, and while the model runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.observe import add_observer, observing
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.analyse import analyse
from fastattn_compile.passes.mask_guard import MaskHistory
from fastattn_compile.passes.regions import copied
from fastattn_compile.passes.rewrite import Replacement, rewrite
from fastattn_compile.passes.site import Site
from fastattn_compile.reporting.metrics import probe_rows, sample_rows

# Query rows an error is measured on. Their exact attention costs rows * n products.
SAMPLED_ROWS = 64


def is_real(example_inputs: Sequence[Any]) -> bool:
    """Whether the example inputs hold data: under some wrappers (DDP's graph splitting) they are fake."""
    return not any(isinstance(x, FakeTensor) for x in example_inputs)


def own_error(operator: Operator, inputs: AttentionInputs, parameters: tuple[Tensor, ...] = ()) -> float:
    """Relative output error of an operator on some tensors: 95th percentile over sampled queries and heads."""
    rows = sample_rows(inputs.query.shape[2], SAMPLED_ROWS)
    output = operator.forward(inputs, parameters)
    error = probe_rows(inputs, rows, output.out, operator, parameters).own_error
    return float(torch.quantile(error.float(), 0.95)) if error.numel() else 0.0


def measure_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    sites: Sequence[Site],
    candidate: Operator,
    history: MaskHistory | None = None,
) -> Mapping[str, float]:
    """Runs a copy of a graph with exact attention on its example inputs and measures a candidate at some sites.

    The copy runs without gradients, on clones of whatever it might change in place, and leaves the random state alone.

    Args:
        gm: The graph.
        example_inputs: Its real inputs.
        sites: Sites of the graph.
        candidate: The operator to measure.
        history: As for ``analyse``.

    Returns:
        Name of each site to its error.
    """
    twin = copied(gm)
    wanted = {site.name for site in sites}
    errors: dict[str, float] = {}

    def observe(name: str, _: Operator, inputs: AttentionInputs, __: AttentionOutput) -> None:
        if name in wanted:
            errors[name] = own_error(candidate, inputs)

    exact = make_operator("exact")
    for analysis in analyse(twin, inputs=example_inputs, history=history):
        found = [line.site for line in analysis.softmaxes if line.site is not None and line.name in wanted]
        rewrite(analysis.gm, [Replacement(site, exact) for site in found if exact.supports(site.spec)])
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(devices=[]), observing(observe):
        torch.fx.Interpreter(twin).run(*[_own(x) for x in example_inputs])
    return errors


def _own(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    return value


@dataclass
class Monitor:
    """Samples the error of replaced sites while a model runs.

    Args:
        share: Share of the calls that are measured, 0 to 1.
        seed: Seed of the choice of calls.
    """

    share: float
    seed: int = 0
    errors: dict[str, list[float]] = field(default_factory=dict)

    def watch(self, names: set[str]) -> Callable[[], None]:
        """Starts watching sites by name; the returned function stops."""
        generator = random.Random(self.seed)

        def observe(name: str, operator: Operator, inputs: AttentionInputs, output: AttentionOutput) -> None:
            if name in names and operator.name != "exact" and generator.random() < self.share:
                rows = sample_rows(inputs.query.shape[2], SAMPLED_ROWS)
                error = probe_rows(inputs, rows, output.out, operator).own_error
                if error.numel():
                    self.errors.setdefault(name, []).append(float(torch.quantile(error.float(), 0.95)))

        return add_observer(observe)
