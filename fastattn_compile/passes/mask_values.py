"""The structure that the values of a mask show: which of the patterns there are words for has just these visible keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn_compile.operators.mask import MaskStructure

_AT_ONCE = 1 << 18


def structure_of(visible: Tensor, padded: bool, packed: bool = False) -> MaskStructure | None:
    """Finds the simplest structure with these visible keys.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
        padded: Keys may be padding, those no query sees, on other batches if not on this one. What is not padded may turn
            out to be.
        packed: Sequences hold packed documents, on other batches if not on this one; they may turn out to.

    Returns:
        The structure; ``None`` when there is none.
    """
    if not visible.any():
        return None
    documents = None
    for structure in _candidates(any_along(visible, 0), padded, packed):
        if structure.segments and documents is None:
            documents = documents_of(visible)
        if _shows(visible, structure, documents):
            return structure
    return None


def has_structure(visible: Tensor, structure: MaskStructure) -> bool:
    """Whether a structure shows just these keys.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
        structure: Position terms, whether keys that no query sees are padding, and whether tokens that no mask joins are of
            different documents.
    """
    return _shows(visible, structure, documents_of(visible) if structure.segments else None)


def _shows(visible: Tensor, structure: MaskStructure, documents: Tensor | None) -> bool:
    _, queries, keys = visible.shape
    real = any_along(visible, 1, keepdim=True) if structure.key_padding else None
    columns = torch.arange(keys, dtype=torch.int32, device=visible.device)
    # A few rows at a time: distances take several times the room of a mask.
    step = max(1, _AT_ONCE // keys)
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = torch.arange(start, stop, dtype=torch.int32, device=visible.device)[:, None]
        pattern = structure.visible(rows, columns, queries, keys)
        if structure.segments and documents is not None:
            pattern = pattern & (documents[:, start:stop, None] == documents[:, None])
        if not bool((visible[:, start:stop] == (pattern if real is None else pattern & real)).all()):
            return False
    return True


def documents_of(visible: Tensor) -> Tensor:
    """Numbers the packed documents of a mask: the finest stretches of tokens that see nothing of each other.

    Args:
        visible: ``(batch, n, n)`` boolean.

    Returns:
        ``(batch, n)`` int64, rising along the sequence. Neighbours that neither see nor are seen share a number.
    """
    n, marks = visible.shape[2], _bytes(visible)
    place = torch.arange(n, device=visible.device)
    first = marks.argmax(2)
    sees = visible.gather(2, first[..., None]).squeeze(2)
    first = torch.where(sees, first, place)
    last = torch.where(sees, n - 1 - marks.flip(2).argmax(2), place)
    # A document begins where no later query looks back beyond, and no earlier one ahead.
    back = first.flip(1).cummin(1).values.flip(1)[:, 1:] >= place[1:]
    ahead = last.cummax(1).values[:, :-1] < place[1:]
    alone = ~(sees | (marks.amax(1) != 0))
    begins = back & ahead & ~(alone[:, 1:] & alone[:, :-1])
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0))


def any_along(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """``x.any(dim)`` of truth values, which CPUs do faster as a maximum of bytes."""
    return _bytes(x).amax(dim, keepdim) != 0


def _bytes(x: Tensor) -> Tensor:
    """Truth values as 0 and 1. Not as a view: Inductor then reads the bits that a comparison left in a vector."""
    return x.to(torch.uint8)


def _candidates(seen: Tensor, padded: bool, packed: bool) -> Iterator[MaskStructure]:
    """Structures to try, the simpler first.

    Args:
        seen: ``(queries, keys)``, what is visible in any sequence.
        padded: As in ``structure_of``.
        packed: As in ``structure_of``.
    """
    queries, keys = seen.shape
    # Of every query that sees a key the first and the last one, as distances.
    marks, rows = seen.to(torch.uint8), torch.arange(queries, device=seen.device)
    some = seen.any(1)
    right = int((keys - 1 - marks.flip(1).argmax(1) - rows)[some].max())
    left = int((rows - marks.argmax(1))[some].max())
    offset = keys - queries
    # Documents are told where queries and keys are the same tokens.
    documents = (False,) if offset else (True,) if packed else (False, True)

    def made(
        left: int | None, right: int | None, padding: bool, segments: bool = False, chunk: int | None = None,
        prefix: int | None = None,
    ) -> Iterator[MaskStructure]:  # fmt: skip
        # Seen from the end where that is the clearer number, as masks are that are read from a graph.
        even = left is not None and right is not None and left + offset == right - offset
        end = offset != 0 and (right == offset or even)
        move = offset if end else 0
        left = None if left is None else left + move
        right = None if right is None else right - move
        if left is None or right is None or left + right >= 0:
            yield MaskStructure(left, right, end, chunk, prefix, padding, segments)

    for padding, segments in itertools.product((True,) if padded else (False, True), documents):
        for back, ahead in ((None, None), (None, right), (left, None), (left, right)):
            yield from made(back, ahead, padding, segments)
    first = int(seen[0].sum())
    if first > 1:
        yield from made(None, max(offset, 0), padded, prefix=first)
        # Where queries and keys are the same tokens, chunks are documents, and operators serve these.
        yield from made(None, None, padded, chunk=first)
    yield from made(None, max(offset, 0), padded, chunk=max(1, int(seen[:, 0].sum())))
