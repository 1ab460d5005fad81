"""What machine this is: the names of its devices, and the rates that bound what any kernel can do on it."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            lines = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Rates:
    """The best this machine was seen to do.

    Args:
        flops: Floating-point operations a second of a matrix product.
        bytes: Bytes a second of a copy, read and written.
    """

    flops: float
    bytes: float


def drain(device: torch.device) -> None:
    """Waits until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measures the best product and the best copy of a device, in under a second on a CPU.

    Args:
        device: The device.
        dtype: Type of the product. On a CPU kernels work in float32 whatever the type of the tensors, and a product of
            halves there can be far slower, so that float32 is measured.
    """
    if device.type == "cpu":
        shapes = [(16, 64, 64, 192), (16, 64, 192, 64), (1, 1024, 1024, 1024)]
        dtype, elements = torch.float32, 1 << 24
    else:
        shapes, elements = [(1, 8192, 8192, 8192)], 1 << 28
    flops = 0.0
    for batch, rows, inner, columns in shapes:
        a = torch.randn(batch, rows, inner, device=device, dtype=dtype)
        b = torch.randn(batch, inner, columns, device=device, dtype=dtype)
        flops = max(flops, 2 * batch * rows * inner * columns / _best_seconds(a, b))
    source = torch.randn(elements, device=device)
    return Rates(flops, 2 * source.numel() * source.element_size() / _best_seconds(source))


def _best_seconds(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """The shortest of twenty products, or copies when there is one operand."""
    target = torch.empty_like(a) if b is None else torch.empty_like(torch.bmm(a, b))
    best = float("inf")
    for _ in range(20):
        drain(a.device)
        start = time.perf_counter()
        target.copy_(a) if b is None else torch.bmm(a, b, out=target)
        drain(a.device)
        best = min(best, time.perf_counter() - start)
    return best
