"""Learned parameters of operators as parameters of the model: in ``state_dict``, seen by the optimizer, sharded with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastattn_compile.errors import PlanError
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.parameters import mark_parameters
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.names import site_module
from fastattn_compile.passes.site import TAKEN, Softmax
from fastattn_compile.plans import Plan
from fastattn_compile.retrofitting.samples import visit_sites
from fastattn_compile.scanning import scan

ATTRIBUTE = "fastattn"


class LearnedParameters(nn.Module):
    """The learned parameters of one site, as a submodule of the module that holds the attention.

    Args:
        site: Name of the site.
        operator: The operator they belong to.
        values: Initial values by name, in the operator's order.
    """

    def __init__(self, site: str, operator: Operator, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.site = site
        self.operator = operator
        self._order = list(values)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    def names(self) -> list[str]:
        """Names of the parameters in the operator's order."""
        return list(self._order)

    def tensors(self) -> list[Tensor]:
        """The parameters in the operator's order."""
        return [getattr(self, name) for name in self._order]

    def extra_repr(self) -> str:
        """Site, operator and size, for ``print(model)``."""
        return f"{self.site}: {self.operator}, {sum(p.numel() for p in self.parameters())} parameters"


def attach(
    model: nn.Module,
    operator: str | Plan,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    calibrate: bool = True,
    **kwargs: Any,
) -> dict[str, LearnedParameters]:
    """Gives the sites of a model the learned parameters of their operators. Call it before the optimizer and the compiler.

    The parameters of a site become ``<module of the site>.fastattn.<name>``: they are in ``state_dict`` and in
    ``parameters()``. Compiled with the same operator or plan, the model uses them and trains them; run without
    compilation it computes exact attention and does not.

    Args:
        model: The model; changed in place.
        operator: Name of an operator, or a plan.
        *args: Arguments of one call of the model, to find its sites and their lengths: the parameters serve sequences up
            to the length of this call.
        options: Fields of the operator's configuration, when a name is given.
        calibrate: Parameters start from the queries, keys and values of that call where the operator can use them
            (surrogates of ``cast``, trees, ``linformer`` with ``start="data"``): give a call on real data, which then
            runs once more.
            When false they start from the sizes alone.
        **kwargs: Keyword arguments of the call.

    Returns:
        Name of each site to its parameters. Empty when no operator has any.

    Raises:
        PlanError: The plan names a site the model does not have.
        ValueError: The operator is unknown, an option is bad, or the model has parameters attached already.
    """
    if any(isinstance(module, LearnedParameters) for module in model.modules()):
        raise ValueError(
            "learned parameters are attached to this model already; call fa.detach(model) to start over"
        )
    lines = {line.name: line for line in scan(model, *args, **kwargs).softmaxes if line.site is not None}
    operators = _operators(lines, operator, dict(options or {}))
    served = {
        name: (chosen, site.spec)
        for name, chosen in operators.items()
        if (site := lines[name].site) is not None and chosen.learned and chosen.supports(site.spec)
    }
    started: dict[str, dict[str, Tensor]] = {}

    def start(name: str, sample: AttentionInputs) -> None:
        chosen, spec = served[name]
        started[name] = chosen.initial_parameters(spec, sample)

    asking = [name for name, (chosen, _) in served.items() if chosen.starts_from_sample]
    if calibrate and asking:
        visit_sites(model, start, asking, *args, **kwargs)
    # A site whose tensors could not be seen starts without them.
    values = {
        name: started.get(name) or chosen.initial_parameters(spec) for name, (chosen, spec) in served.items()
    }
    return {name: place(model, name, served[name][0], given) for name, given in values.items() if given}


def place(model: nn.Module, site: str, operator: Operator, values: Mapping[str, Tensor]) -> LearnedParameters:
    """Gives one site given learned parameters, in the type and on the device of the module it is in.

    Args:
        model: The model; changed in place.
        site: Name of the site, as ``fa.scan`` prints it.
        operator: The operator they belong to.
        values: Values by name, in the operator's order.

    Raises:
        PlanError: The site is not inside a module of the model.
    """
    owner, ordinal = site_owner(model, site)
    like = next(owner.parameters(), None)
    moved = {key: value.to(like) if like is not None else value for key, value in values.items()}
    bundle = LearnedParameters(site, operator, moved)
    owner.register_module(ATTRIBUTE + ordinal, bundle)
    owner.register_forward_pre_hook(_Mark(ATTRIBUTE + ordinal))
    return bundle


def detach(model: nn.Module) -> None:
    """Takes the learned parameters off a model again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LearnedParameters):
                delattr(module, name)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Mark):
                del module._forward_pre_hooks[key]


class _Mark:
    """A forward hook that makes the parameters of a site inputs of any graph captured from the module."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Read through the module tree, so that a copied or sharded model marks its own parameters.
        bundle = getattr(module, self.attribute)
        mark_parameters(bundle.tensors(), bundle.site)


def _operators(
    lines: Mapping[str, Softmax], operator: str | Plan, options: dict[str, Any]
) -> dict[str, Operator]:
    if isinstance(operator, Plan):
        missing = sorted(set(operator.sites) - set(lines))
        if missing:
            raise PlanError(
                f"the plan names sites the model does not have: {', '.join(missing)}; it has {sorted(lines)}"
            )
        return {name: site.build() for name, site in operator.sites.items()}
    return {name: make_operator(operator, **options) for name, line in lines.items() if line.status == TAKEN}


def site_owner(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """The module a site is in, and its ordinal there (empty for the first).

    Raises:
        PlanError: The site is named by its source line, or the model has no such module.
    """
    path, ordinal = site_module(site), site.partition("#")[2]
    try:
        return model.get_submodule(path), f"_{ordinal}" if ordinal else ""
    except AttributeError as error:
        raise PlanError(
            f"site {site!r} is not inside a module of the model, so it cannot own parameters; "
            "put the attention into an nn.Module of its own"
        ) from error
