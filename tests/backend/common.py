"""What the backend tests share."""

from __future__ import annotations

from typing import Any

import torch

import fastattn_compile.backend as backend


def compiled(model: Any, dynamic: bool | None = False, **options: Any) -> Any:
    """A model compiled with the backend, nothing left over from before; runs the rewritten graph node by node."""
    torch.compiler.reset()
    backend.reset()
    return torch.compile(
        model, backend="fastattn", dynamic=dynamic, options={"compiler": "eager", "quiet": True, **options}
    )


def operators_used() -> dict[str, str]:
    """Site name to operator, of everything compiled since the last reset."""
    return {decision.name: decision.operator for decision in backend.decisions()}
