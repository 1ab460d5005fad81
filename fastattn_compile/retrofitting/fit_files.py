"""Where a fit is kept while it runs: a safetensors file a site, each written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastattn_compile.errors import CheckpointError


class FitFolder:
    """Parameters of sites, with the number of steps they have had.

    Args:
        path: The folder; ``None`` keeps nothing.
        fingerprint: What the fit depends on, by name.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, str]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)

    def save(self, site: str, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Writes a site beside its file and renames it."""
        if self.path is None:
            return
        target = self._file(site)
        beside = target.with_suffix(".part")
        stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(stored, beside, metadata={**self.fingerprint, "site": site, "steps": str(steps)})
        os.replace(beside, target)

    def load(self, site: str) -> tuple[dict[str, Tensor], int] | None:
        """A site's tensors and steps; ``None`` when there are none yet.

        Raises:
            CheckpointError: The file is of another run, or damaged.
        """
        if self.path is None or not self._file(site).exists():
            return None
        path = self._file(site)
        try:
            with safe_open(path, "pt") as stream:
                facts = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            steps = int(facts["steps"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({error}); delete it to fit its site again"
            ) from error
        other = sorted(k for k, v in self.fingerprint.items() if facts.get(k) != v)
        if other or facts.get("site") != site:
            raise CheckpointError(
                f"{path.parent} holds a fit with other {', '.join(other) or 'sites'}; give another folder, or delete it"
            )
        return tensors, steps

    def _file(self, site: str) -> Path:
        assert self.path is not None
        readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in site)
        return self.path / f"{readable}.{hashlib.sha256(site.encode()).hexdigest()[:8]}.safetensors"
