"""What timm, vit-pytorch and x-transformers import of torchvision, where no build of it fits this torch.

Model code only names its classes at import time. Nothing here computes anything.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from torch import nn


class _Named(type):
    """A class whose every attribute is its own name, as an enumeration's member would print."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  a package, so that what is below it is asked for here too
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = nn.BatchNorm2d if name == "FrozenBatchNorm2d" else _Named(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Answers imports of torchvision, unless it is there. What looks for it decides first."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("transformers", "diffusers"):
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        sys.meta_path.append(_Finder())
