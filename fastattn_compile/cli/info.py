"""``fastattn info``: what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from typing import Any

from fastattn_compile.cli import common

_EXTRAS = {
    "hf": ("transformers", "tokenizers", "gguf", "accelerate"),
    "onnx": ("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
    "mlir": ("torch-mlir",),
    "report": ("matplotlib", "jinja2"),
}
_BASE = ("torch", "numpy", "safetensors", "networkx", "sympy", "typer", "rich")


def info(json: common.Json = False, out: common.Out = None, threads: common.Threads = None) -> None:
    """Show versions, device, compilers, operators and which extras are installed."""
    common.set_threads(threads)
    document = gather()
    common.deliver(document, json, out)
    if not json:
        _print(document)


def gather() -> dict[str, Any]:
    """What there is to know, as a JSON document."""
    import torch

    from fastattn_compile.lowering.onnx.native.build import state as onnx_library
    from fastattn_compile.operators.registry import operator_names
    from fastattn_compile.reporting.provenance import device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "schema": "fastattn.info/1",
        "versions": versions(),
        "device": {
            "type": device.type,
            "name": device_name(device),
            "cpu": device_name(torch.device("cpu")),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "compilers": {"cpp": _cpp_compiler(), "triton": _version("triton")},
        "kernels": _kernels(),
        "onnx_library": onnx_library(),
        "operators": operator_names(),
        "backends": _backends(),
        "packages": {name: _version(name) for name in _BASE},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpp_compiler() -> str | None:
    """The C++ compiler Inductor would call, by name; without one it cannot lower for the CPU."""
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((name for name in wanted if name and shutil.which(name)), None)
    return os.path.basename(found) if found else None


def _kernels() -> dict[str, str]:
    """Which implementation of the kernels runs on a CPU and on a GPU, and why others cannot when they cannot."""
    import torch

    from fastattn_compile.kernels.cpu.build import obstacle
    from fastattn_compile.kernels.dispatch import chosen_kernels

    reason = obstacle()
    chosen = chosen_kernels()
    runs = "aten" if chosen == "aten" or (chosen == "auto" and reason) else "cpp"
    missing = "" if _version("triton") else "triton is not installed"
    if not torch.cuda.is_available():
        missing = "there is no GPU"
    on_gpu = "aten" if chosen in ("aten", "cpp") or (chosen == "auto" and missing) else "triton"
    return {"chosen": chosen, "cpu": runs, "cpp_obstacle": reason, "gpu": on_gpu, "triton_obstacle": missing}


def _backends() -> list[str]:
    """Names that ``torch.compile(backend=...)`` takes here; installing the package adds ``fastattn``."""
    import torch

    return list(torch.compiler.list_backends())


def _described(kernels: dict[str, str]) -> str:
    """The kernels of a CPU in words."""
    text = {"cpp": "C++, built at first use", "aten": "ATen"}[kernels["cpu"]]
    if kernels["chosen"] != "auto":
        text += f" (chosen: {kernels['chosen']})"
    return text + (f"; C++: {kernels['cpp_obstacle']}" if kernels["cpp_obstacle"] else "")


def _described_gpu(kernels: dict[str, str]) -> str:
    """The kernels of a GPU in words."""
    if kernels["triton_obstacle"]:
        return f"none run; Triton: {kernels['triton_obstacle']}"
    if kernels["gpu"] == "aten":
        return f"ATen (chosen: {kernels['chosen']})"
    return (
        "Triton, forward and backward, packed documents of fma where they stand; ATen where it has no kernel"
    )


def _print(document: dict[str, Any]) -> None:
    from rich.markup import escape

    from fastattn_compile.reporting.terminal import console, pairs_table

    device, compilers = document["device"], document["compilers"]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("device", device["name"]),
        ("instructions", device["cpu_capability"]),
        ("threads", f"{device['threads']} of {device['cores']} cores"),
        ("C++ compiler", compilers["cpp"] or "none found: Inductor cannot lower for the CPU"),
        ("Triton", compilers["triton"] or "not installed"),
        ("CPU kernels", _described(document["kernels"])),
        ("GPU kernels", _described_gpu(document["kernels"])),
        ("ONNX library", document["onnx_library"]),
        ("operators", ", ".join(document["operators"])),
        ("backends", ", ".join(document["backends"])),
    ]
    for extra, packages in document["extras"].items():
        there = [f"{name} {version}" for name, version in packages.items() if version]
        missing = [name for name, version in packages.items() if not version]
        text = ", ".join(there) + ("; " if there and missing else "")
        rows.append((f"extra {extra}", text + (f"missing: {', '.join(missing)}" if missing else "")))
    console().print(pairs_table([(name, escape(str(value))) for name, value in rows]))
