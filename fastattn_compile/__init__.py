"""Sub-quadratic attention for any model, at compile time, with the accuracy it cost.

    import torch
    fast = torch.compile(model, backend="fastattn", options={"operator": "fma"})

    import fastattn_compile as fa
    fa.scan(model, input_ids).print()

Importing the package is cheap: torch and everything else come with the first use of a name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn_compile.version import __version__

if TYPE_CHECKING:
    from fastattn_compile import onnx
    from fastattn_compile.backend import fastattn
    from fastattn_compile.converting.convert import convert
    from fastattn_compile.integrations.hugging_face.cache import DecodingCache
    from fastattn_compile.integrations.hugging_face.route import register_transformers, route, unroute
    from fastattn_compile.operators.library import attend
    from fastattn_compile.operators.mask import MaskStructure
    from fastattn_compile.operators.registry import make_operator
    from fastattn_compile.plans import Plan, PlannedSite
    from fastattn_compile.reporting.document import Report
    from fastattn_compile.reporting.evaluate import evaluate
    from fastattn_compile.reporting.of_model import report
    from fastattn_compile.retrofitting.attach import attach, detach
    from fastattn_compile.retrofitting.base_weights import BaseWeights
    from fastattn_compile.retrofitting.bootstrap import BootstrapSchedule
    from fastattn_compile.retrofitting.capture import capture
    from fastattn_compile.retrofitting.checkpoint import from_pretrained, save_pretrained
    from fastattn_compile.retrofitting.distil import distil
    from fastattn_compile.retrofitting.fit import FitSettings, fit
    from fastattn_compile.retrofitting.planning import plan
    from fastattn_compile.retrofitting.retrofit import retrofit
    from fastattn_compile.retrofitting.stages import DistilStage
    from fastattn_compile.scanning import Scan, scan

_HOMES = {
    "BaseWeights": "retrofitting.base_weights",
    "BootstrapSchedule": "retrofitting.bootstrap",
    "DecodingCache": "integrations.hugging_face.cache",
    "DistilStage": "retrofitting.stages",
    "FitSettings": "retrofitting.fit",
    "MaskStructure": "operators.mask",
    "Plan": "plans",
    "PlannedSite": "plans",
    "Report": "reporting.document",
    "Scan": "scanning",
    "attach": "retrofitting.attach",
    "capture": "retrofitting.capture",
    "convert": "converting.convert",
    "detach": "retrofitting.attach",
    "distil": "retrofitting.distil",
    "attend": "operators.library",
    "evaluate": "reporting.evaluate",
    "fastattn": "backend",
    "fit": "retrofitting.fit",
    "from_pretrained": "retrofitting.checkpoint",
    "make_operator": "operators.registry",
    "register_transformers": "integrations.hugging_face.route",
    "plan": "retrofitting.planning",
    "report": "reporting.of_model",
    "retrofit": "retrofitting.retrofit",
    "route": "integrations.hugging_face.route",
    "save_pretrained": "retrofitting.checkpoint",
    "scan": "scanning",
    "unroute": "integrations.hugging_face.route",
}

__all__ = [
    "BaseWeights", "BootstrapSchedule", "DecodingCache", "DistilStage", "FitSettings", "MaskStructure",
    "Plan", "PlannedSite", "Report", "Scan", "__version__", "attach", "attend", "capture", "convert",
    "detach", "distil", "evaluate", "fastattn", "fit", "from_pretrained", "make_operator", "onnx", "plan",
    "register_transformers", "report", "retrofit", "route", "save_pretrained", "scan", "unroute",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "onnx":
        return importlib.import_module(f"{__name__}.onnx")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
