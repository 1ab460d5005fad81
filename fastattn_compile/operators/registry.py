"""The operators by name. A name here is the name everywhere: options, plans, reports, torch ops."""

from __future__ import annotations

import importlib
import json
from functools import lru_cache
from typing import Any

from fastattn_compile.operators.base import Operator

_HOMES = {
    "exact": ("fastattn_compile.operators.exact", "ExactAttention"),
    "fma": ("fastattn_compile.operators.fma", "FastMultipoleAttention"),
    "conv_basis": ("fastattn_compile.operators.conv_basis", "ConvBasisAttention"),
    "cast": ("fastattn_compile.operators.cast", "CastAttention"),
    "linformer": ("fastattn_compile.operators.linformer", "LinformerAttention"),
    "window": ("fastattn_compile.operators.window", "WindowAttention"),
    "barnes_hut": ("fastattn_compile.operators.barnes_hut", "BarnesHutAttention"),
    "tf_attention": ("fastattn_compile.operators.treeformer", "TreeLeafAttention"),
    "tc_attention": ("fastattn_compile.operators.treeformer", "TreeCoarseAttention"),
    "per_head": ("fastattn_compile.operators.per_head", "PerHeadAttention"),
}


def operator_names() -> list[str]:
    """Names of all operators."""
    return list(_HOMES)


def operator_class(name: str) -> type[Operator]:
    """The class of an operator.

    Raises:
        ValueError: No operator has this name; the text lists those there are.
    """
    if name not in _HOMES:
        raise ValueError(f"unknown operator {name!r}; operators: {', '.join(_HOMES)}")
    module, attribute = _HOMES[name]
    found: type[Operator] = getattr(importlib.import_module(module), attribute)
    return found


def make_operator(name: str, **options: Any) -> Operator:
    """Builds an operator from its name and the fields of its configuration.

    Raises:
        ValueError: The name or an option is unknown, or a value is out of range.
        TypeError: An option has the wrong type.

    Example:
        ``make_operator("fma", block=64, rank=4)``
    """
    cls = operator_class(name)
    return cls(cls.config_type.from_dict(options))


@lru_cache(maxsize=256)
def operator_from_token(token: str) -> Operator:
    """Reads ``Operator.token`` back.

    Raises:
        ValueError: The token was written by another implementation of the operator.
    """
    values = json.loads(token)
    name, implementation = values.pop("operator"), values.pop("implementation")
    operator = make_operator(name, **values)
    if implementation != operator.implementation:
        raise ValueError(
            f"the graph was compiled for implementation {implementation} of operator {name}, this package has "
            f"{operator.implementation}; compile again (torch.compiler.reset() and a fresh cache directory)"
        )
    return operator
