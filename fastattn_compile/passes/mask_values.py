"""The structure that the values of a mask show: which of the patterns there are words for has just these visible keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn_compile.kernels.masks import Rows, read, read_aten
from fastattn_compile.operators.mask import MaskStructure


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
    rows = read(visible)
    if not rows.seen.any():
        return None
    documents = None
    for structure in _candidates(visible, rows, padded, packed):
        if structure.segments and documents is None:
            documents = _documents(rows)
        if _shows(rows, structure, documents):
            return structure
    return None


def has_structure(visible: Tensor, structure: MaskStructure) -> bool:
    """Whether a structure shows just these keys.

    Args:
        visible: ``(batch, queries, keys)`` boolean.
        structure: Position terms, whether keys that no query sees are padding, and whether tokens that no mask joins are of
            different documents.
    """
    rows = read(visible)
    return _shows(rows, structure, _documents(rows) if structure.segments else None)


def _shows(rows: Rows, structure: MaskStructure, documents: Tensor | None) -> bool:
    """Whether every query sees just the real keys of an interval, which all structures say: as many, and none outside."""
    queries, keys = rows.count.shape[1], rows.seen.shape[1]
    low, high = (x[None] for x in structure.interval(queries, keys, rows.count.device))
    if structure.segments and documents is not None:
        begin, end = _extents(documents)
        low = torch.maximum(low, begin)
        high = torch.maximum(torch.minimum(high, end), low)
    if structure.key_padding:
        before = pad(rows.seen.cumsum(1), (1, 0))
        low, high = low.expand_as(rows.count), high.expand_as(rows.count)
        wanted = before.gather(1, high) - before.gather(1, low)
    else:
        wanted = high - low
    inside = (rows.first >= low) & (rows.last < high)
    return bool(((rows.count == wanted) & (inside | ~rows.some)).all())


def _extents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of a token begins and ends, ``(batch, n)``; their numbers rise along the sequence."""
    edges = documents.contiguous()
    return torch.searchsorted(edges, edges), torch.searchsorted(edges, edges, right=True)


def documents_of(visible: Tensor) -> Tensor:
    """Numbers the packed documents of a mask: the finest stretches of tokens that see nothing of each other.

    Args:
        visible: ``(batch, n, n)`` boolean.

    Returns:
        ``(batch, n)`` int64, rising along the sequence. Neighbours that neither see nor are seen share a number.
    """
    return _documents(read_aten(visible))  # it stands in graphs, which are compiled


def _documents(rows: Rows) -> Tensor:
    n = rows.count.shape[1]
    place = torch.arange(n, device=rows.count.device)
    first, last = (torch.where(rows.some, x, place) for x in (rows.first, rows.last))
    # A document begins where no later query looks back beyond, and no earlier one ahead.
    back = first.flip(1).cummin(1).values.flip(1)[:, 1:] >= place[1:]
    ahead = last.cummax(1).values[:, :-1] < place[1:]
    alone = ~(rows.some | rows.seen)
    begins = back & ahead & ~(alone[:, 1:] & alone[:, :-1])
    return pad(begins.cumsum(1), (1, 0))


def _candidates(visible: Tensor, rows: Rows, padded: bool, packed: bool) -> Iterator[MaskStructure]:
    """Structures to try, the simpler first.

    Args:
        visible: ``(batch, queries, keys)``, some of them visible.
        rows: What was read of it.
        padded: As in ``structure_of``.
        packed: As in ``structure_of``.
    """
    queries, keys = visible.shape[1:]
    # Of every query that sees a key the first and the last one, as distances.
    place = torch.arange(queries, device=visible.device)
    right = int((rows.last - place)[rows.some].max())
    left = int((place - rows.first)[rows.some].max())
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
    first = int(visible[:, 0].any(0).sum())
    if first > 1:
        yield from made(None, max(offset, 0), padded, prefix=first)
        # Where queries and keys are the same tokens, chunks are documents, and operators serve these.
        yield from made(None, None, padded, chunk=first)
    yield from made(None, max(offset, 0), padded, chunk=max(1, int(visible[:, :, 0].any(0).sum())))
