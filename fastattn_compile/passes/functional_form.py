"""The call without a side effect that an in-place call stands for."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from fastattn_compile.passes.fx_meta import example, same_sizes
from fastattn_compile.passes.fx_vocabulary import bind_python, target_name, words

# A function or the name of a method, its arguments, its keyword arguments.
FunctionalCall = tuple[Any, tuple[Any, ...], dict[str, Any]]

_OPERATORS = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
}
# Spelled like an in-place operation, changes no element.
HARMLESS = words("requires_grad_ retain_grad_")
# They change sizes, strides or the autograd history instead of elements.
_METADATA = words(
    "squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ resize_ resize_as_ sparse_resize_ set_ "
    "as_strided_ rename_ detach_ share_memory_"
)
# Their functional forms draw other random numbers, or are rounded otherwise under autocast.
_KEPT = words(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ "
    "alpha_dropout_ feature_dropout_ rrelu_ addmm_ addbmm_ baddbmm_ addmv_"
)


def functional_form(node: torch.fx.Node, target: torch.fx.Node) -> FunctionalCall | None:
    """The call without side effect that gives what ``target`` holds after ``node``."""
    if node.target is operator.setitem:
        return _functional_setitem(node, target)
    if "out" in node.kwargs:
        return None
    args, kwargs = node.args, dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        return _functional_overload(node)
    name, _ = target_name(node)
    if name in _METADATA or name in _KEPT or f"{name}_" in _KEPT:
        return None
    if node.op == "call_function" and node.target in _OPERATORS:
        return _OPERATORS[node.target], args, kwargs
    given = bind_python(node) or {}
    if given.get("inplace") is True:
        # torch.nn.functional.relu(x, inplace=True)
        return node.target, (), {**given, "inplace": False}
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        return f"__{bare[1:]}__", args, kwargs
    if name == "zero_":
        return torch.zeros_like, (target,), {}
    if name == "fill_":
        value = args[1] if len(args) > 1 else kwargs.get("value")
        return None if isinstance(value, torch.fx.Node) else (torch.full_like, (target, value), {})
    if name == "copy_":
        return _functional_copy(args, target)
    bare = name[:-1]
    if node.op == "call_method":
        return (bare, args, kwargs) if hasattr(torch.Tensor, bare) else None
    for home in (torch, torch.nn.functional):
        if getattr(home, name, None) is node.target and hasattr(home, bare):
            return getattr(home, bare), args, kwargs
    return None


def _functional_overload(node: torch.fx.Node) -> FunctionalCall | None:
    overload: Any = node.target
    namespace, name = overload._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name in _METADATA | _KEPT | {"copy_"}:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, overload._overloadname, None)
    return None if functional is None else (functional, node.args, dict(node.kwargs))


def _functional_copy(args: tuple[Any, ...], target: torch.fx.Node) -> FunctionalCall | None:
    """``x.copy_(source)`` over all of ``x`` is a copy of the source in the type of ``x``."""
    source = args[1] if len(args) > 1 else None
    if not isinstance(source, torch.fx.Node):
        return None
    old, new = example(target), example(source)
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return None
    if old.device != new.device or not same_sizes(old.shape, new.shape):
        return None
    return "to", (source, old.dtype), {"copy": True}


def _functional_setitem(node: torch.fx.Node, target: torch.fx.Node) -> FunctionalCall | None:
    """``x[mask] = number`` is a masked fill, ``x[:, a:b] = y`` a slice scatter."""
    _, index, value = node.args
    old = example(target)
    if not isinstance(old, torch.Tensor):
        return None
    if isinstance(index, torch.fx.Node):
        mask = example(index)
        full = (
            isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and same_sizes(old.shape, mask.shape)
        )
        known = full and isinstance(value, (bool, int, float))
        return ("masked_fill", (target, index, value), {}) if known else None
    bounds = _sliced(index, old.dim())
    if bounds is None or not isinstance(value, torch.fx.Node):
        return None
    new, place = example(value), old[(slice(None),) * bounds[0] + (slice(*bounds[1:]),)]
    if not isinstance(new, torch.Tensor) or new.dtype != old.dtype or not same_sizes(place.shape, new.shape):
        return None
    return torch.slice_scatter, (target, value, *bounds), {}


def scatter_form(part: torch.fx.Node, value: torch.fx.Node) -> FunctionalCall | None:
    """The whole that ``part`` is a slice of, with ``value`` in the place of the slice.

    Args:
        part: A node; only a slice along one dimension has such a form.
        value: A tensor of its shape and type.
    """
    if part.target is not operator.getitem or not isinstance(part.args[0], torch.fx.Node):
        return None
    whole = example(part.args[0])
    bounds = _sliced(part.args[1], whole.dim()) if isinstance(whole, torch.Tensor) else None
    return None if bounds is None else (torch.slice_scatter, (part.args[0], value, *bounds), {})


def _sliced(index: Any, rank: int) -> tuple[int, int | None, int | None, int] | None:
    """Dimension, start, stop and step of a subscript that slices one dimension, by plain numbers."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is not Ellipsis and not isinstance(entry, slice) for entry in entries):
        return None
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (rank - len(entries) + 1)
    parts = [(d, entry) for d, entry in enumerate(entries) if entry != slice(None)]
    if len(parts) != 1:
        return None
    dim, part = parts[0]
    if any(bound is not None and not isinstance(bound, int) for bound in (part.start, part.stop, part.step)):
        return None
    return dim, part.start, part.stop, 1 if part.step is None else part.step
