"""What distillation minimises: the distance to the frozen teacher, or the language model's own loss.

Every objective is a sum over tokens and a count of them, so that the mean is the same however a batch is shared out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn_compile.errors import OptionError

KL, LANGUAGE_MODEL, HIDDEN = "kl", "language_model", "hidden"
OBJECTIVES = (KL, LANGUAGE_MODEL, HIDDEN)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """A batch as arguments of the model, and the labels.

    Args:
        batch: A mapping of keywords, a tuple or list of arguments, or one tensor. ``labels`` of a mapping are not given to
            the model; without them ``input_ids`` label themselves.
    """
    if isinstance(batch, Mapping):
        keywords = dict(batch)
        labels = keywords.pop("labels", None)
        return (), keywords, labels if labels is not None else keywords.get("input_ids")
    arguments = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    ids = next((x for x in arguments if isinstance(x, Tensor) and not x.is_floating_point()), None)
    return arguments, {}, ids


def main_output(result: Any, objective: str) -> Tensor:
    """Logits, or the last hidden state for the objective ``hidden``.

    Raises:
        OptionError: The model gives none.
    """
    name = "last_hidden_state" if objective == HIDDEN else "logits"
    found = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
    if found is None and isinstance(result, Tensor):
        found = result
    if found is None and isinstance(result, (tuple, list)) and not hasattr(result, "_fields"):
        found = next((x for x in result if isinstance(x, Tensor)), None)
    if not isinstance(found, Tensor):
        raise OptionError(
            f"objective {objective!r} needs a model that gives {name}; this one gives {type(result).__name__}"
        )
    return found


def real_tokens(keywords: Mapping[str, Any], output: Tensor) -> Tensor | None:
    """``(batch, n)`` boolean of a padding mask that fits the output, true where a token is real."""
    mask = keywords.get("attention_mask")
    fits = isinstance(mask, Tensor) and tuple(mask.shape) == tuple(output.shape[:2]) and output.dim() == 3
    return mask != 0 if isinstance(mask, Tensor) and fits else None


def distance(
    objective: str, student: Tensor, teacher: Tensor, real: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Distance to the teacher: sum over tokens, and their number.

    Args:
        objective: ``"kl"``: KL(teacher || student) of the predictions, times the squared temperature. ``"hidden"``:
            squared distance of the hidden states over the teacher's squared length.
        student: ``(..., c)``.
        teacher: The same shape.
        real: Boolean of the leading dimensions; all when ``None``.
        temperature: Divides the logits.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if objective == KL:
        p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
        each = temperature**2 * (p.exp() * (p - q)).sum(-1)
    else:
        each = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    if real is None:
        return each.sum(), torch.tensor(each.numel(), device=each.device)
    return (each * real).sum(), real.sum()


def language_model_loss(logits: Tensor, labels: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the next token: sum over tokens, and their number.

    Args:
        logits: ``(batch, n, vocabulary)``.
        labels: ``(batch, n)`` token ids, not shifted; negative where not counted.
        real: ``(batch, n)`` boolean; all when ``None``.

    Raises:
        OptionError: There are no labels of the right shape.
    """
    if logits.dim() != 3 or labels is None or tuple(labels.shape) != tuple(logits.shape[:2]):
        shape = tuple(labels.shape) if labels is not None else None
        raise OptionError(
            f"objective {LANGUAGE_MODEL!r} needs logits (batch, n, vocabulary) and labels (batch, n); "
            f"got {tuple(logits.shape)} and {shape}"
        )
    target = labels[:, 1:].clone()
    if real is not None:
        target[~real[:, 1:]] = -1
    target[target < 0] = -1
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(
        logits[:, :-1].to(wide).flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum"
    )
    return total, (target >= 0).sum()
