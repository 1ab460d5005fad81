"""Machine code of Triton kernels for GPUs that are not there, and what it says about itself.

``triton.compile`` needs no driver, and the tools that read a binary come with Triton: registers, stack and shared memory
of a program, bytes that did not fit into registers, and which instructions do the products.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
# Bytes of shared memory that a program may ask for; the first number is that of consumer cards of its generation.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Products on tensor cores: Hopper's and Blackwell's of a warp group, the older ones of a warp, AMD's.
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")
# Spills go through local memory; a suffix tells how many bytes.
_SPILL, _BYTES = re.compile(r"\bSTL(?:\.(64|128))?\b"), {None: 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Report:
    """What a binary says.

    Args:
        registers: Of a thread.
        stack: Bytes of a thread.
        spilled: Bytes that code stores because registers ran out.
        shared: Bytes of shared memory of a program.
        products: How often each instruction of ``PRODUCTS`` stands in the code.
    """

    registers: int
    stack: int
    spilled: int
    shared: int
    products: Mapping[str, int]

    def fits(self, shared: int) -> bool:
        """Whether nothing was spilled, ``shared`` bytes suffice, and the compiler left products to do."""
        sound = self.registers > 16 and any(self.products.values())
        return sound and not self.spilled and not self.stack and self.shared <= shared

    def programs(self, warps: int) -> int:
        """Programs of a kernel on one multiprocessor of a data-centre GPU from NVIDIA, by registers and memory."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * warps)
        return min(by_registers, (228 << 10) // (self.shared + 1024), 64 // warps)

    def __str__(self) -> str:
        used = ", ".join(f"{count} {name}" for name, count in self.products.items() if count)
        return (
            f"{self.registers} registers, stack {self.stack}, {self.spilled} bytes spilled, "
            f"{self.shared} bytes shared, {used or 'no tensor cores'}"
        )


def precision(kind: str, architecture: str) -> str:
    """How a kernel makes its products; ``launch.precision`` says it of tensors that are there.

    Args:
        kind: ``"half"`` or ``"float"``.
        architecture: A key of ``TARGETS``.
    """
    if kind == "half":
        return "tf32"
    return "ieee" if architecture == "gfx942" else "tf32x3"


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: str,
    warps: int,
    stages: int,
) -> Report:
    """Compiles a kernel ahead of time.

    Args:
        kernel: A function under ``triton.jit``.
        types: Triton's types of its arguments (``"*bf16"``, ``"i32"``); those not named here or in ``constants`` are
            int32. Pointers and steps between rows (``*_n``, ``*_h``, ``*_b``) are taken to be multiples of 16, as they
            are in practice.
        constants: Values of its constants, and of arguments that the launcher would make constants (1, ``None``).
        architecture: A key of ``TARGETS``.
        warps: Of a program.
        stages: Of the software pipeline.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    even = [
        (place,) for place, name in enumerate(names)
        if signature[name].startswith("*") or (name[-2:] in ("_n", "_h", "_b") and name not in constants)
    ]  # fmt: skip
    source = ASTSource(
        kernel, signature, dict(constants), {place: [["tt.divisibility", 16]] for place in even}
    )
    binary = triton.compile(
        source, target=TARGETS[architecture], options={"num_warps": warps, "num_stages": stages}
    )
    if "amdgcn" in binary.asm:
        return _of_amd(binary.asm["amdgcn"], binary.metadata.shared)
    return _of_nvidia(binary.asm["cubin"], binary.metadata.shared)


def _of_nvidia(cubin: bytes, shared: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    spilled = sum(_BYTES[width or None] for width in _SPILL.findall(code))
    return Report(
        _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), spilled, shared, _products(code)
    )


def _of_amd(code: str, shared: int) -> Report:
    spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code)
    scratch = _number(r"\.private_segment_fixed_size:\s+(\d+)", code)
    return Report(_number(r"\.vgpr_count:\s+(\d+)", code), scratch, spilled, shared, _products(code))


def _products(code: str) -> dict[str, int]:
    return {name: len(re.findall(rf"\b{name}", code)) for name in PRODUCTS}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the binary says nothing like {pattern!r}; it said {text[:200]!r}")
    return int(found[1])


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout
