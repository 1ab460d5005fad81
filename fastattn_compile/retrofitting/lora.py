"""Low-rank adapters on the projections of replaced attention (Hu et al., arXiv 2106.09685), merged when training ends.

An adapted projection keeps its name and its weight's name, so plans, sharding and checkpoints see the model they know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn_compile.errors import PlanError
from fastattn_compile.retrofitting.attach import site_owner

DOWN, UP = "lora_down", "lora_up"


class AdaptedLinear(nn.Linear):
    """A linear layer plus ``scale * up @ down`` of low rank; it starts as the layer itself (``up`` is 0).

    Args:
        linear: The layer; its weight and bias are shared.
        rank: Rows of ``down``.
        scale: Factor on the product.
        generator: Draws ``down``.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        bound = 1 / math.sqrt(linear.in_features)
        down = (
            2 * torch.rand(rank, linear.in_features, generator=generator, dtype=torch.float64) - 1
        ) * bound
        self.register_parameter(DOWN, nn.Parameter(down.to(linear.weight)))
        self.register_parameter(UP, nn.Parameter(linear.weight.new_zeros(linear.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the correction."""
        low = F.linear(x, getattr(self, DOWN))
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, getattr(self, UP))


def adapt(model: nn.Module, sites: Iterable[str], rank: int, scale: float, seed: int) -> list[str]:
    """Puts adapters on every linear layer inside the modules of some sites.

    Args:
        model: Changed in place.
        sites: Names of sites.
        rank: Rank of the corrections.
        scale: Factor on them.
        seed: Seed of the start.

    Returns:
        Names of the adapted layers.

    Raises:
        PlanError: There is no ``nn.Linear`` in the modules of the sites.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {id(owner): owner for owner in (site_owner(model, site)[0] for site in sites)}
    inside = {
        id(module) for owner in owners.values() for module in owner.modules() if type(module) is nn.Linear
    }
    adapted = []
    for name, module in list(model.named_modules()):
        if id(module) in inside and isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, AdaptedLinear(module, rank, scale, generator))
            adapted.append(name)
    if not adapted:
        raise PlanError(
            "low-rank adapters need nn.Linear layers in the modules of the replaced sites, and there are none; "
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
            weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
            # Summed in float64: a correction that is small beside the weight is not rounded away twice.
            weight.add_((scale * up.double() @ down.double()).to(weight))
            used |= {name, f"{layer}.{DOWN}"}
    return used
