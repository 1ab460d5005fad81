"""A retrofit inside a Hugging Face folder: written and read by transformers, with an entry of ours in its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastattn_compile.errors import CheckpointError
from fastattn_compile.files import write_json
from fastattn_compile.plans import Plan

ENTRY = "fastattn"


def is_pretrained(model: nn.Module) -> bool:
    """Whether transformers can save the model."""
    return callable(getattr(model, "save_pretrained", None)) and hasattr(
        getattr(model, "config", None), "save_pretrained"
    )


def save(model: Any, state: Mapping[str, Tensor], plan: Plan, folder: Path, tokenizer: Any = None) -> None:
    """Saves a model as transformers does and enters the plan into ``config.json``.

    Args:
        model: A ``PreTrainedModel``.
        state: Its ``state_dict`` without learned parameters of operators: transformers knows none.
        plan: Its sites are entered as ``"fastattn": {"plan": ...}``.
        folder: Where to.
        tokenizer: Saved too.
    """
    model.save_pretrained(folder, state_dict=dict(state))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # What served it, without how it was found: that stays in our own file.
    write_json(path, {**config, ENTRY: {"plan": Plan(plan.sites).to_json()}})


def load(folder: Path) -> nn.Module:
    """Builds the model of a folder through transformers, from files alone, in evaluation mode.

    Raises:
        CheckpointError: transformers is not installed, or does not know the architecture.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f'building the model of {folder} needs: pip install "fastattn-compile[hf]"'
        ) from error
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        builder = getattr(transformers, names[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/config.json names no architecture that transformers {transformers.__version__} knows: "
            f"build the model yourself and pass it ({type(error).__name__}: {error})"
        ) from error
    try:
        model: nn.Module = builder.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # readers of damaged files raise anything
        raise CheckpointError(
            f"{folder} does not load through transformers: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()
