"""Which operator serves which attention module of a Hugging Face model: the plan, brought to the modules."""

from __future__ import annotations

import inspect
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn_compile import backend
from fastattn_compile.errors import OptionError, PlanError
from fastattn_compile.integrations.hugging_face.plain import NAME
from fastattn_compile.operators.base import Operator, SiteSpec
from fastattn_compile.options import Options, parse_options
from fastattn_compile.passes.names import site_module
from fastattn_compile.passes.site import EXACT, TAKEN, Softmax
from fastattn_compile.plans import Plan
from fastattn_compile.retrofitting.attach import ATTRIBUTE

ROUTE = "_fastattn_route"
CROSS = "_fastattn_cross"

_OPTIONS = ("operator", "plan", "strict", "monitor", "quiet")
# What a module's forward calls the states it attends to besides its own.
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")


@dataclass(frozen=True)
class Route:
    """What serves the attention of one module.

    Args:
        name: Name of the site: the path of the module.
        operator: Its operator; ``None`` for exact attention.
        reason: Why.
        strict: Raise where the operator cannot serve.
        model: Number of the routed model, under which its report is kept.
    """

    name: str
    operator: Operator | None
    reason: str
    strict: bool = False
    model: int = -1


_reports: dict[int, backend.CompiledGraph] = {}
_numbers = itertools.count()


def register_transformers() -> None:
    """Makes ``attn_implementation="fastattn"`` known to transformers. Calling it again changes nothing.

    A model loaded with it computes exact attention, by structure: no n x n mask. ``route`` says what else serves it.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from fastattn_compile.integrations.hugging_face.attention import fastattn_attention
    from fastattn_compile.integrations.hugging_face.mask import structured_mask

    AttentionInterface.register(NAME, fastattn_attention)
    AttentionMaskInterface.register(NAME, structured_mask)


def route(model: Any, **options: Any) -> Any:
    """Serves the attention of a Hugging Face model by operators, without compiling it.

    The model's attention implementation becomes ``"fastattn"``. Names of sites, plan and report are those of
    ``torch.compile(model, backend="fastattn")``; the masks stay structure across graph breaks, DDP, FSDP, compilation of
    single blocks and generation caches. Decoding steps stay exact, unless ``generate`` is given a ``DecodingCache``.
    Learned parameters attached by ``fa.attach`` are used.

    Args:
        model: A ``PreTrainedModel``; changed in place.
        **options: ``operator`` with fields of its configuration, or ``plan``; ``strict``, ``monitor``. As for the backend.
            With none, the plan that ``fa.from_pretrained`` left on the model.

    Returns:
        The model.

    Raises:
        OptionError: An option is bad, or the model is no model of transformers with an exchangeable attention.
        PlanError: The plan names modules that the model does not have, or treats calls of one module differently.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise OptionError(
            f"route needs a model of transformers, got {type(model).__name__}; any model can be compiled with "
            'torch.compile(model, backend="fastattn")'
        )
    if not options:
        options = {"plan": getattr(model, "fastattn_plan", None)}
    parsed = parse_options({key: value for key, value in options.items() if value is not None})
    foreign = sorted(set(options) - set(_OPTIONS) - set(parsed.operator_options))
    if foreign:
        raise OptionError(f"option {foreign[0]} is of the compiler; route takes {', '.join(_OPTIONS)}")
    if parsed.operator is None and parsed.plan is None:
        raise OptionError("route needs option operator or option plan")
    register_transformers()
    model.set_attn_implementation(NAME)
    if getattr(getattr(model, "config", None), "_attn_implementation", NAME) != NAME:
        raise OptionError(
            f"{type(model).__name__} has attention of its own that transformers cannot exchange; "
            'use torch.compile(model, backend="fastattn")'
        )
    unroute(model, keep_implementation=True)
    planned = _by_module(parsed, model)
    number = next(_numbers)
    record = _reports[number] = backend.CompiledGraph({id(module) for module in model.modules()}, [])
    weakref.finalize(model, _forget, number)
    operator = parsed.build_operator()
    for name, module in model.named_modules():
        chosen, reason = (
            (operator, "named by the user")
            if planned is None
            else planned.get(name, (None, "not named by the plan"))
        )
        setattr(module, ROUTE, Route(name, chosen, reason, parsed.strict, number))
        if _may_be_cross(module):
            module.register_forward_pre_hook(_mark_cross, with_kwargs=True)
    if parsed.monitor:
        record.watch(parsed.monitor, {name for name, _ in model.named_modules()})
    return model


def unroute(model: Any, keep_implementation: bool = False) -> None:
    """Takes the routes off a model and gives it back transformers' ``sdpa`` attention.

    Args:
        model: A routed model.
        keep_implementation: Leave ``attn_implementation="fastattn"``: exact attention by structure.
    """
    for module in model.modules():
        module.__dict__.pop(ROUTE, None)
        module.__dict__.pop(CROSS, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _mark_cross:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    if not keep_implementation:
        model.set_attn_implementation("sdpa")


def parameters_of(module: nn.Module, operator: Operator) -> tuple[Tensor, ...]:
    """Learned parameters attached to a module for an operator."""
    bundle = getattr(module, ATTRIBUTE, None) if operator.learned else None
    return tuple(bundle.tensors()) if bundle is not None else ()


def note(route: Route, operator: Operator | None, reason: str, spec: SiteSpec) -> None:
    """Enters into the report what served a site. Under ``torch.compile`` that happens once, while it traces."""
    if route.model < 0:
        return
    sizes = [size if isinstance(size, int) else 0 for size in (spec.heads, spec.kv_heads, spec.head_dim)]
    _note(
        route.model,
        route.name,
        operator.token if operator is not None else "",
        reason,
        str(spec.mask),
        spec.kind,
        *sizes,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note(
    model: int,
    name: str,
    token: str,
    reason: str,
    mask: str,
    kind: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    from fastattn_compile.operators.registry import operator_from_token

    operator = operator_from_token(token) if token else None
    record = _reports.get(model)
    if record is None:
        return
    line = Softmax(
        name, TAKEN if token else EXACT, "" if token else reason, "", kind, mask, heads, kv_heads, head_dim
    )
    decision = backend.Decision(
        name, operator.name if operator is not None else "exact",
        operator.config.to_dict() if operator is not None else {}, reason, None, line,
    )  # fmt: skip
    for place, known in enumerate(record.decisions):
        if known.name == name:
            record.decisions[place] = decision
            break
    else:
        record.decisions.append(decision)
    backend.remember(record)


def _forget(number: int) -> None:
    backend.forget(_reports.pop(number))


def _by_module(options: Options, model: nn.Module) -> dict[str, tuple[Operator | None, str]] | None:
    """Module path to operator and reason; ``None`` when one operator serves all."""
    if options.plan is None:
        return None
    modules = dict(model.named_modules())
    found: dict[str, tuple[Operator | None, str]] = {}
    plan: Plan = options.plan
    for name, site in plan.sites.items():
        path = site_module(name)
        if path not in modules:
            raise PlanError(f"the plan names site {name!r}, and the model has no module {path!r}")
        operator = None if site.operator == "exact" else site.build()
        chosen = operator, site.reason or ("named by the plan" if operator else "exact by the plan")
        known = found.setdefault(path, chosen)
        if getattr(known[0], "token", "") != getattr(operator, "token", ""):
            raise PlanError(
                f"the plan serves several attentions of module {path!r} differently, and a route knows modules only; "
                'use torch.compile(model, backend="fastattn", options={"plan": ...})'
            )
    return found


def _may_be_cross(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and any(name in code.co_varnames[: code.co_argcount] for name in _OTHER_STATES)


def _mark_cross(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Notes whether a module attends to another sequence than its own: queries and keys then share no positions."""
    setattr(module, CROSS, any(kwargs.get(name) is not None for name in _OTHER_STATES))
