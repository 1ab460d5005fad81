"""How learned parameters of an operator reach a compiled graph.

A backend cannot add parameters to a graph. So they live in the module tree before compilation, and a forward hook calls
``torch.ops.fastattn.parameters`` on them: the call computes nothing, but it makes them inputs of the captured graph, under
the name of their site, where the backend finds them and removes the call.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "fastattn::parameters", mutates_args=(), schema="(Tensor[] parameters, str site) -> Tensor"
)
def mark_parameters(parameters: list[Tensor], site: str) -> Tensor:
    """Marks tensors as the learned parameters of a site.

    Args:
        parameters: In the operator's order.
        site: Name of the site.

    Returns:
        An empty tensor that nothing reads.
    """
    return torch.empty(0)


@mark_parameters.register_fake
def _(parameters: list[Tensor], site: str) -> Tensor:
    return torch.empty(0)


def _no_gradient(ctx: object, grad: Tensor) -> tuple[None, None]:
    return None, None


mark_parameters.register_autograd(_no_gradient)
