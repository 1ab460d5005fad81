"""Building the C++ sources: by the compiler and flags that Inductor picks, into the cache that Inductor keeps its own in."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import threading
from functools import cache, lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent
# Those that include others first.
_HEADERS = ("opened.h", "tree.h", "gradients.h", "blocks.h", "ranges.h", "trees.h", "simd.h", "threads.h")
# Fused multiply-adds and vectors of the machine at hand; no -ffast-math: infinities and NaN mean something here. For some
# processors GCC would not fuse where sums wait for each other, so in one width of a loop and not in another: a query would
# get other bits beside other queries. Other compilers do not know that switch, and need not say so.
FLAGS = (
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "--param=avoid-fma-max-bits=0", "-Wno-psabi",
    "-Wno-unused-command-line-argument", "-march=native",
)  # fmt: skip
_lock = threading.Lock()
_failed: dict[str, str] = {}


@lru_cache(maxsize=1)
def _compiler_obstacle() -> str:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, or whatever its search raises
        return f"no C++ compiler was found ({' '.join(str(error).split())[:160] or type(error).__name__})"
    return ""


def obstacle(name: str | None = None) -> str:
    """Why C++ kernels cannot run here, ``""`` when they can. Builds the named one to know it for certain.

    Args:
        name: A source without its ending; only the compiler is looked for when ``None``.
    """
    reason = _compiler_obstacle()
    if reason or name is None:
        return reason
    if name not in _failed:
        try:
            library(name)
        except Exception as error:  # a compiler can fail in many ways; kernels on ATen serve then
            _failed[name] = f"{name}.cpp does not build: {' '.join(str(error).split())[-300:]}"
        else:
            _failed[name] = ""
    return _failed[name]


def source(name: str) -> str:
    """The text of a source with our own headers put in: what is compiled, and what other runtimes compile."""
    text = (_FOLDER / f"{name}.cpp").read_text(encoding="utf-8")
    for header in (_FOLDER / name for name in _HEADERS):
        body = header.read_text(encoding="utf-8").replace("#pragma once\n", "")
        line = f'#include "{header.name}"\n'
        text = text.replace(line, body, 1).replace(line, "")
    return text


@cache
def library(name: str) -> ctypes.CDLL:
    """A built source, loaded. Building takes some seconds the first time on a machine; reading the text, most of a
    millisecond, is not done again.

    Args:
        name: Of the source, without its ending.

    Raises:
        RuntimeError: It does not build.
    """
    return compiled(source(name))


def compiled(code: str) -> ctypes.CDLL:
    """Source text, built for this machine and loaded; equal texts are built once.

    Args:
        code: C++ that includes nothing of ours.

    Raises:
        RuntimeError: It does not build.
    """
    with _lock:
        return _compiled(code)


@cache
def _compiled(code: str) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    built: ctypes.CDLL = CppCodeCache.load(
        f"// {pick_vec_isa()} {_processor()}\n{code}", "cpu", extra_flags=FLAGS
    )
    return built


def _processor() -> str:
    """The instruction sets of this processor, which -march=native builds for: a shared cache keeps machines apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
