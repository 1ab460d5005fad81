"""The structure that the values of a mask show: which of the patterns there are words for has just these visible keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.operators.mask import MaskStructure

_AT_ONCE = 1 << 18


def structure_of(visible: Tensor, padded: bool) -> MaskStructure | None:
    """Finds the simplest structure with these visible keys.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
        padded: Whether keys may be padding, which a mask of every sequence of its own can say: those no query sees.

    Returns:
        The structure; ``None`` when there is none.
    """
    if not visible.any():
        return None
    for structure in _candidates(visible.any(0), padded):
        if has_structure(visible, structure):
            return structure
    return None


def has_structure(visible: Tensor, structure: MaskStructure) -> bool:
    """Whether a structure shows just these keys.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
        structure: Position terms, and whether keys that no query sees are padding.
    """
    _, queries, keys = visible.shape
    real = visible.any(1, keepdim=True) if structure.key_padding else None
    columns = torch.arange(keys, dtype=torch.int32, device=visible.device)
    # A few rows at a time: distances take several times the room of a mask.
    step = max(1, _AT_ONCE // keys)
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = torch.arange(start, stop, dtype=torch.int32, device=visible.device)[:, None]
        pattern = structure.visible(rows, columns, queries, keys)
        if not bool((visible[:, start:stop] == (pattern if real is None else pattern & real)).all()):
            return False
    return True


def _candidates(seen: Tensor, padded: bool) -> Iterator[MaskStructure]:
    """Structures to try, the simpler first.

    Args:
        seen: ``(queries, keys)``, what is visible in any sequence.
        padded: As in ``structure_of``.
    """
    queries, keys = seen.shape
    # Of every query that sees a key the first and the last one, as distances.
    marks, rows = seen.to(torch.uint8), torch.arange(queries, device=seen.device)
    some = seen.any(1)
    right = int((keys - 1 - marks.flip(1).argmax(1) - rows)[some].max())
    left = int((rows - marks.argmax(1))[some].max())
    offset = keys - queries

    def made(
        left: int | None, right: int | None, chunk: int | None = None, prefix: int | None = None
    ) -> Iterator[MaskStructure]:
        # Seen from the end where that is the clearer number, as masks are that are read from a graph.
        even = left is not None and right is not None and left + offset == right - offset
        end = offset != 0 and (right == offset or even)
        move = offset if end else 0
        left = None if left is None else left + move
        right = None if right is None else right - move
        if left is None or right is None or left + right >= 0:
            yield MaskStructure(left, right, end, chunk, prefix, padded)

    for bounds in ((None, None), (None, right), (left, None), (left, right)):
        yield from made(*bounds)
    first = int(seen[0].sum())
    if first > 1:
        yield from made(None, max(offset, 0), prefix=first)
        yield from made(None, None, chunk=first)
    yield from made(None, max(offset, 0), chunk=max(1, int(seen[:, 0].sum())))
