"""The library of our nodes for ONNX Runtime: shipped in wheels built where a compiler was, else built at first use.

Nothing but the standard library is imported here: the hook that packs a wheel runs this file by itself.

A file serves one level of instructions, so that a shipped one runs wherever its level does; its name says the level, and
of which sources it is made.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER, _FOLDER.parents[2] / "kernels" / "cpu")
SHIPPED = _FOLDER / "built"
# Levels of x86-64, the best first, with what of /proc/cpuinfo tells them (the psABI's levels).
_V2 = ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_LEVELS = {
    "x86-64-v4": (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": _V3,
    "x86-64-v2": _V2,
}
# Fused multiply-adds everywhere; no -ffast-math: infinities and NaN mean something here (kernels/cpu/build.py). The C++
# library goes in, so that a shipped file asks for nothing but the C library.
_FLAGS = (
    "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "--param=avoid-fma-max-bits=0", "-Wno-psabi", "-Wno-unused-command-line-argument",
)  # fmt: skip
_STATIC = ("-static-libstdc++", "-static-libgcc")


@functools.cache
def library_path() -> Path:
    """The shared library for ``SessionOptions.register_custom_ops_library``: the shipped one, else one built here.

    Building takes about half a minute, once for a user and machine.

    Raises:
        RuntimeError: None is there, and there is no C++ compiler, or it fails.
    """
    found = present()
    if found is not None:
        return found
    reason = compiler_obstacle()
    if reason:
        raise RuntimeError(f"the native library cannot be built: {reason}")
    level = levels_here()[0]
    return build(level, cache_folder())


def present() -> Path | None:
    """The library of these sources for this processor that is there already, shipped or built."""
    for level in levels_here():
        for folder in (SHIPPED, cache_folder()):
            path = folder / file_name(level)
            if path.is_file():
                return path
    return None


def state() -> str:
    """In words: whether the library is shipped, built, or will be built at first use, or why it cannot be."""
    found = present()
    if found is not None:
        return f"{'shipped' if found.parent == SHIPPED else 'built here'} ({found.stem.split('-', 2)[2]})"
    reason = compiler_obstacle()
    return f"none: {reason}" if reason else f"built at first use ({levels_here()[0]})"


def obstacle() -> str:
    """Why there can be no native library here, ``""`` when there can."""
    return "" if present() is not None else compiler_obstacle()


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, else the first known one."""
    return next((x for x in (os.environ.get("CXX"), "g++", "clang++", "c++") if x and shutil.which(x)), None)


def compiler_obstacle() -> str:
    """Why nothing can be built here, ``""`` when it can."""
    return "" if compiler() else "no C++ compiler was found (CXX, g++, clang++ or c++)"


def cache_folder() -> Path:
    """Where libraries that are built here are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastattn_compile" / "onnx"


@functools.cache
def levels_here() -> tuple[str, ...]:
    """Levels of instructions that this processor has, the best first; its family where that has no levels we know."""
    if not _is_x86():
        return (platform.machine().lower() or "unknown",)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ("x86-64-v2",)
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return tuple(level for level, needed in _LEVELS.items() if flags.issuperset(needed)) or ("x86-64",)


def levels_to_ship() -> tuple[str, ...]:
    """Levels of instructions that a wheel for machines of this family holds."""
    return tuple(_LEVELS) if _is_x86() else levels_here()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def fingerprint() -> str:
    """Of the sources and how they are compiled."""
    digest = hashlib.sha256(repr((_FLAGS, _STATIC)).encode())
    for path in _files(".h", ".cpp"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def file_name(level: str) -> str:
    """Of the library for a level of instructions."""
    return f"fastattn-{fingerprint()}-{level}.so"


def build(level: str, folder: Path) -> Path:
    """Compiles the library.

    Args:
        level: Of instructions, from ``levels_here`` or ``levels_to_ship``.
        folder: Where the file is put; made where it is missing.

    Raises:
        RuntimeError: There is no compiler, or it fails, or the folder cannot be written.
    """
    called = compiler()
    if called is None:
        raise RuntimeError(compiler_obstacle())
    machine = [f"-march={level}"] if level.startswith("x86-64") else []
    includes = [f"-I{path}" for path in _SOURCES]
    units = [str(path) for path in _files(".cpp") if path.parent == _FOLDER]
    units += [str(_SOURCES[1] / name) for name in ("ranges.cpp", "trees.cpp")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            objects = [str(Path(room) / f"{number}.o") for number in range(len(units))]
            compiling = [called, *_FLAGS, *machine, *includes, "-c"]
            each = [[*compiling, unit, "-o", made] for unit, made in zip(units, objects)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_call, each))
            static = _STATIC if sys.platform == "linux" else ()
            made = Path(room) / "library.so"
            _call([called, "-shared", *static, *objects, "-o", str(made)])
            path = folder / file_name(level)
            os.replace(made, path)  # several processes may build at once: whoever comes last puts the same
    except OSError as error:
        raise RuntimeError(f"the native library cannot be built in {folder}: {error}") from error
    return path


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} fails on the native library: {done.stderr.strip()[-600:]}")


def _files(*endings: str) -> list[Path]:
    return sorted(path for folder in _SOURCES for path in folder.iterdir() if path.suffix in endings)
