"""The C++ sources under every compiler that is found here, for every width of vectors."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import make_inputs, run

from fastattn_compile.kernels.cpu import barnes_hut, build
from fastattn_compile.kernels.cpu.arguments import fresh
from fastattn_compile.operators.registry import make_operator

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
KNOWN = ("g++", "clang++", *(f"clang++-{version}" for version in range(15, 23)))
COMPILERS = [name for name in KNOWN if shutil.which(name)]
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if platform.machine() == "x86_64" else ("",)


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler is installed")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name", ["fma", "masks", "pool", "ranges", "trees", pytest.param("barnes_hut", marks=pytest.mark.slow)]
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


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs GCC for x86-64")
def test_what_comes_later_changes_no_bit_on_zen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later queries decide who is served together; tuned for Zen, GCC would fuse in some widths of a loop only."""
    source, built = tmp_path / "barnes_hut.cpp", tmp_path / "barnes_hut.so"
    source.write_text(build.source("barnes_hut"), encoding="utf-8")
    command = [
        "g++",
        "-std=c++17",
        "-O3",
        "-shared",
        "-fPIC",
        *build.FLAGS,
        "-march=x86-64-v3",
        "-mtune=znver3",
    ]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    monkeypatch.setattr(barnes_hut, "library", lambda name: ctypes.CDLL(str(built)))
    operator = make_operator(
        "barnes_hut", block=8, leaf=2, fanout=2, open=5, beam=4, sinks=3, share_group=False
    )
    inputs, now, found = make_inputs("causal", length=131, dtype=torch.float32), 97, []
    for _ in range(2):
        found.append(run(operator, inputs).out[:, :, :now])
        for x in (inputs.query, inputs.key, inputs.value):
            x[:, :, now:] = 50 * torch.randn_like(x[:, :, now:])
    assert torch.equal(*found)


def flags_of(address: int) -> list[str]:
    """Flags of the mapping that holds an address."""
    found: list[str] = []
    within = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if ends := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(ends[1], 16) <= address < int(ends[2], 16)
        elif within and line.startswith("VmFlags:"):
            found = line.split()[1:]
    return found


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="the system has no large pages")
def test_what_kernels_write_stands_in_large_pages() -> None:
    large, small = fresh(8, 1024, 1024), fresh(8)
    assert large.shape == (8, 1024, 1024) and large.dtype == torch.float32 and small.shape == (8,)
    assert "hg" in flags_of(large.data_ptr() + large.nbytes // 2)
    large.fill_(1)
    assert float(large.sum()) == large.numel()
