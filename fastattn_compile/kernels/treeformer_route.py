"""Routing through trees, in C++ on a CPU where it can; see ``kernels.aten.treeformer_route``.

Routing is a step of a kernel, not one a user chooses: what C++ cannot serve is routed by ATen whatever was asked for.
"""

from __future__ import annotations

from torch import Tensor

from fastattn_compile.kernels.aten import treeformer_route as aten
from fastattn_compile.kernels.cpu import trees as cpu
from fastattn_compile.kernels.dispatch import takes_step


def follow(x: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``kernels.aten.treeformer_route.follow``."""
    if takes_step("cpp", lambda: cpu.why_not(x, weight, offset)):
        return cpu.follow(x, weight, offset, aten.height_of(weight))
    return aten.follow(x, weight, offset)


def path_gradients(x: Tensor, weight: Tensor, leaf: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.aten.treeformer_route.path_gradients``."""
    if takes_step("cpp", lambda: cpu.why_not(x, weight, slopes)):
        return cpu.path_gradients(x, weight, leaf, slopes)
    return aten.path_gradients(x, weight, leaf, slopes)
