"""Low-rank adapters on the projections of replaced attention (Hu et al., arXiv 2106.09685), merged when training ends.

An adapted projection keeps its name and its weight's name, so plans, sharding and checkpoints see the model they know.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn_compile.errors import PlanError
from fastattn_compile.retrofitting.attach import site_owner

DOWN, UP = "lora_down", "lora_up"


class _Adapter(nn.Module):
    """What adapted layers share: the low-rank product, which starts as nothing (``up`` is 0)."""

    def _correct(
        self, inputs: int, outputs: int, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        weight: Tensor = self.weight  # type: ignore[assignment]
        bound = 1 / math.sqrt(inputs)
        down = (2 * torch.rand(rank, inputs, generator=generator, dtype=torch.float64) - 1) * bound
        self.scale = scale
        self.register_parameter(DOWN, nn.Parameter(down.to(weight)))
        self.register_parameter(UP, nn.Parameter(weight.new_zeros(outputs, rank)))

    def correction(self, x: Tensor) -> Tensor:
        """``scale * up @ down`` applied to ``(..., inputs)``."""
        return self.scale * F.linear(F.linear(x, getattr(self, DOWN)), getattr(self, UP))


class AdaptedLinear(_Adapter, nn.Linear):
    """A linear layer plus ``scale * up @ down`` of low rank.

    Args:
        linear: The layer; its weight and bias are shared.
        rank: Rows of ``down``.
        scale: Factor on the product.
        generator: Draws ``down``.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._correct(linear.in_features, linear.out_features, rank, scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the correction."""
        return F.linear(x, self.weight, self.bias) + self.correction(x)


class AdaptedConv1D(_Adapter):
    """The same for ``Conv1D`` of transformers (GPT-2), a linear layer whose weight is ``(inputs, outputs)``.

    Args:
        layer: The layer; its weight and bias are shared.
        rank: Rows of ``down``.
        scale: Factor on the product.
        generator: Draws ``down``.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight: Tensor = layer.weight  # type: ignore[assignment]
        self.bias: Tensor = layer.bias  # type: ignore[assignment]
        inputs, outputs = self.weight.shape
        self._correct(inputs, outputs, rank, scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the correction."""
        return x @ self.weight + self.bias + self.correction(x)


def _is_conv1d(module: nn.Module) -> bool:
    # A layer of transformers exists only where its module was imported, so nothing needs to be.
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and type(module) is kind


def adapt(model: nn.Module, sites: Iterable[str], rank: int, scale: float, seed: int) -> list[str]:
    """Puts adapters on every linear layer (``nn.Linear``, ``Conv1D`` of transformers) inside the modules of some sites.

    Args:
        model: Changed in place.
        sites: Names of sites.
        rank: Rank of the corrections.
        scale: Factor on them.
        seed: Seed of the start.

    Returns:
        Names of the adapted layers.

    Raises:
        PlanError: There is none in the modules of the sites.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {id(owner): owner for owner in (site_owner(model, site)[0] for site in sites)}
    inside = {id(module) for owner in owners.values() for module in owner.modules()}
    adapted = []
    for name, module in list(model.named_modules()):
        if id(module) not in inside:
            continue
        if type(module) is nn.Linear:
            layer: nn.Module = AdaptedLinear(module, rank, scale, generator)
        elif _is_conv1d(module):
            layer = AdaptedConv1D(module, rank, scale, generator)
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        adapted.append(name)
    if not adapted:
        raise PlanError(
            "low-rank adapters need linear layers (nn.Linear or transformers' Conv1D) in the modules of the replaced "
            "sites, and there are none; "
            'train "operators" or "full"'
        )
    return adapted


def merge(model: nn.Module, trained: Mapping[str, Tensor], scale: float) -> set[str]:
    """Adds trained corrections to the weights of a model without adapters.

    Args:
        model: Changed in place.
        trained: Parameters by name, adapters among them.
        scale: Factor on the corrections.

    Returns:
        Names of the entries that were adapters.
    """
    used = set()
    with torch.no_grad():
        for name, up in trained.items():
            layer, _, last = name.rpartition(".")
            if last != UP:
                continue
            down = trained[f"{layer}.{DOWN}"]
            module = model.get_submodule(layer)
            weight: Tensor = module.weight  # type: ignore[assignment]
            # Summed in float64: a correction that is small beside the weight is not rounded away twice.
            product = scale * up.double() @ down.double()
            weight.add_((product.T if _is_conv1d(module) else product).to(weight))
            used |= {name, f"{layer}.{DOWN}"}
    return used
