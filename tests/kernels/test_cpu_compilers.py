"""The C++ sources under every compiler that is found here, for every width of vectors."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn_compile.kernels.cpu import build

KNOWN = ("g++", "clang++", *(f"clang++-{version}" for version in range(15, 23)))
COMPILERS = [name for name in KNOWN if shutil.which(name)]
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if platform.machine() == "x86_64" else ("",)


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler is installed")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name", ["fma", "pool", "ranges", "trees", pytest.param("barnes_hut", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_sources_compile(compiler: str, name: str, level: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.cpp"
    path.write_text(build.source(name), encoding="utf-8")
    machine = [f"-march={level}"] if level else []
    flags = (
        ["-std=c++17", "-Wno-psabi", "-Wbitwise-conditional-parentheses"]
        if "clang" in compiler
        else ["-std=c++17", "-Wno-psabi"]
    )
    done = subprocess.run(
        [compiler, *flags, *machine, "-fsyntax-only", "-Werror", "-Wno-unused", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
