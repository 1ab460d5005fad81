"""The library of our nodes for ONNX Runtime, built on demand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastattn_compile.kernels.cpu import build

_FOLDER = Path(__file__).parent


@lru_cache(maxsize=1)
def library_path() -> Path:
    """The shared library for ``SessionOptions.register_custom_ops_library``.

    It is built at first use on a machine, which takes about half a minute, and kept where Inductor keeps its own code.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails.
    """
    reason = build.obstacle()
    if reason:
        raise RuntimeError(f"the native library cannot be built: {reason}")
    return Path(build.compiled(_source())._name)


def _source() -> str:
    text = (_FOLDER / "operators.cpp").read_text(encoding="utf-8")
    text = text.replace('#include "fma.cpp"\n', build.source("fma"))
    for header in ("runtime.h", "plain.h"):
        body = (_FOLDER / header).read_text(encoding="utf-8").replace("#pragma once\n", "")
        text = text.replace(f'#include "{header}"\n', body)
    return text
