"""Names of sites: the path of the module that made a node, as ``model.named_modules()`` spells it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch.fx

# Spelled-out accesses: L['self']._modules['layers']._modules['0'], layers["0"], layers[0], getattr(layers,
# "0").
_REGISTRY = re.compile(r"\._(?:modules|parameters|buffers)\[")
_SUBSCRIPT = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(-?\d+))\]")
_GETATTR = re.compile(r"getattr\(([^(),]*), *['\"]([^'\"]*)['\"]\)")
# A method behind a decorator is traced from the decorator's frame, whose ``args[0]`` is the module.
_ROOT = re.compile(r"^(?:L\[['\"]args['\"]\]\[0\]|[LG]\[(?:'[^']*'|\"[^\"]*\")\]|self\b)")
# Modules that others are wrapped in: they are no step of a path.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FLAT_STEP = re.compile(r"(?:^|_)(?:modules|parameters|buffers)_")
_STACK_LINE = re.compile(r'^\s*File "([^"]+)", line (\d+)', re.MULTILINE)
_PACKAGES = re.compile(r"(?:site|dist)-packages/")


def normalise_path(path: str) -> str:
    """A module path without its frame root and in dotted form.

    Args:
        path: As Dynamo or export wrote it, for example ``L['self']._modules['layers']._modules['0'].attn``.

    Returns:
        The fully qualified name relative to the frame's root module, ``""`` for the root itself.
    """
    return module_root(path)[1]


@lru_cache(maxsize=4096)
def module_root(path: str) -> tuple[str, str]:
    """The frame root of a module path (``"L['self']"``, ``""`` when it has none) and the rest in dotted form."""
    while (match := _GETATTR.search(path)) is not None:
        path = f"{path[: match.start()]}{match[1]}.{match[2]}{path[match.end() :]}"
    root = _ROOT.match(path)
    rest = path[root.end() :] if root else f".{path}"
    rest = _REGISTRY.sub("[", rest)
    rest = _SUBSCRIPT.sub(lambda m: "." + next(group for group in m.groups() if group is not None), rest)
    return root[0] if root else "", plain_path(rest.replace("._modules.", "."))


def plain_path(path: str) -> str:
    """A dotted path without the wrappers that compilation, sharding and checkpointing put around modules."""
    return ".".join(step for step in path.strip(".").split(".") if step not in _WRAPPERS)


def join_paths(*paths: str) -> str:
    """Dotted paths one after the other; empty ones are left out."""
    return ".".join(filter(None, paths))


def module_stack(node: torch.fx.Node) -> list[tuple[str, str]]:
    """Modules a node was made in, outermost first: the key (``id``, with ``@call`` when repeated) and the
    path."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for key, value in stack.items():
        path = value[0] if isinstance(value, (tuple, list)) else value
        found.append((str(key), normalise_path(str(path))))
    return found


def module_path(node: torch.fx.Node) -> str:
    """Path of the innermost module that made a node, ``""`` at the root or when unknown."""
    stack = module_stack(node)
    return stack[-1][1] if stack else ""


def source_line(node: torch.fx.Node) -> str:
    """``file:line`` of the statement that made a node, ``""`` when unknown.

    The file is given from its package on (``transformers/models/...``), or by its name outside an installed
    package.
    """
    return _last_line(node.meta.get("stack_trace") or "")


# A statement makes many nodes, and a block of a model is written once.
@lru_cache(maxsize=4096)
def _last_line(trace: str) -> str:
    begin = trace.rfind('File "')
    found = _STACK_LINE.search(trace, trace.rfind("\n", 0, begin) + 1) if begin >= 0 else None
    if found is None:
        return ""
    file, line = found.groups()
    file = file.replace("\\", "/")
    parts = _PACKAGES.split(file)
    return f"{parts[-1] if len(parts) > 1 else file.rsplit('/', 1)[-1]}:{line}"


def parameter_path(node: torch.fx.Node) -> str:
    """Fully qualified name of a parameter or buffer from its placeholder, ``""`` when it is none.

    Dynamo's source object spells the access exactly; a node that lost it (a copy, a higher-order body) is
    decoded from its name, in which a dot and an underscore that was not in the source cannot be told apart.
    """
    if node.op == "get_attr":
        return normalise_path(str(node.target))
    source = source_name(node)
    if source:
        return normalise_path(source) if _is_member(source) else ""
    return decode_placeholder(str(node.target))


def source_name(node: torch.fx.Node) -> str:
    """How Dynamo reaches the value of a placeholder (``L['self']._modules[...]``), ``""`` when not
    recorded."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    # A method up to torch 2.9, a property after.
    return str(name() if callable(name) else name)


def decode_placeholder(name: str) -> str:
    """Fully qualified name from ``L_self_modules_layers_modules_0_modules_q_proj_parameters_weight_``.

    Returns:
        ``"layers.0.q_proj.weight"``; ``""`` when the name is not of this form.
    """
    steps = _FLAT_STEP.split(name)
    if len(steps) < 2 or not re.match(r"^[LlGg]_", name):
        return ""
    return ".".join(step.strip("_") for step in steps[1:])


def _is_member(source: str) -> bool:
    return _REGISTRY.search(source) is not None


def role(node: torch.fx.Node, value: Any) -> str:
    """Whether a placeholder is a learned weight, a buffer, or an input of the model.

    Args:
        node: A placeholder.
        value: Its fake value.

    Returns:
        ``"parameter"``, ``"constant"`` or ``"input"``.
    """
    if isinstance(value, torch.nn.Parameter):
        return "parameter"
    target, source = str(node.target), source_name(node)
    path = source or (target if decode_placeholder(target) else "")
    before, after = ("._", "[") if source else ("_", "_")
    # The innermost access decides: a module may be named like a registry.
    last = {
        "parameter": path.rfind(f"{before}parameters{after}"),
        "constant": path.rfind(f"{before}buffers{after}"),
    }
    kind = max(last, key=last.__getitem__)
    if last[kind] >= 0:
        return kind
    if "example_value" not in node.meta and "val" in node.meta:
        # Exported programs name parameters p_, buffers b_ and lifted constants c_.
        return {"p_": "parameter", "b_": "constant", "c_": "constant"}.get(target[:2], "input")
    return "input"


def unique_names(names: Sequence[str], before: Mapping[str, int] | None = None) -> list[str]:
    """Tells repeated names apart: the second of a name gets ``#1``, the third ``#2``, in order.

    Args:
        names: Names in execution order.
        before: How many of a name there are in graphs before this one.
    """
    seen: Counter[str] = Counter(before)
    taken = set(names)
    result = []
    for name in names:
        unique = name
        while seen[name] and (unique := f"{name}#{seen[name]}") in taken:
            seen[name] += 1
        seen[name] += 1
        taken.add(unique)
        result.append(unique)
    return result


def site_module(name: str) -> str:
    """Path of the module that a site named by its module is in."""
    return name.partition("#")[0].partition("@")[0]


def module_ids(gm: torch.fx.GraphModule) -> set[int]:
    """``id`` of every module that made a node of the graph, by which a model's own modules are recognised."""
    found: set[int] = set()
    for node in gm.graph.nodes:
        for key, _ in module_stack(node):
            number, _, _ = key.partition("@")
            if number.isdigit():
                found.add(int(number))
    return found
