"""The mask interface: what transformers knows of a mask reaches the attention as structure, not as an n x n tensor.

transformers builds a mask from functions of indices (causal, sliding window, packed sequences, ...) and a padding mask. They
are read here one by one. A mask with anything else in it becomes the boolean tensor that the ``sdpa`` implementation gets,
so that nothing is lost: such a site stays exact. Decoding steps get that tensor too, it has one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils

from fastattn_compile.operators.mask import MaskStructure


class StructuredMask(BlockMask):
    """A mask as structure and facts about tokens.

    It is a ``BlockMask`` for one reason: besides 4-D tensors that is the only kind of mask which transformers hands on as it
    is when a model, or ``generate()``, is given one that was made before.

    Args:
        structure: Position terms, and which facts travel along.
        batch: Number of sequences.
        query_length: Queries of a sequence.
        key_length: Keys of a sequence that any query may see: the first of those there are.
        key_padding: ``(batch, key_length)`` boolean, true where a token is real, or ``None``.
        segments: ``(batch, key_length)`` integer, the document of a token, or ``None``.
    """

    def __init__(
        self,
        structure: MaskStructure,
        batch: int,
        query_length: int,
        key_length: int,
        key_padding: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> None:
        # The blocks of a BlockMask are never built: nothing here calls flex_attention.
        self.structure = structure
        self.batch, self.query_length, self.key_length = batch, query_length, key_length
        self.key_padding, self.segments = key_padding, segments

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the mask as a tensor."""
        return self.batch, 1, self.query_length, self.key_length

    @property
    def ndim(self) -> int:
        """Axes of the mask as a tensor; GPT-2 asks for them."""
        return 4

    def to(self, device: torch.device | str) -> StructuredMask:
        """The mask on another device."""
        facts = [None if x is None else x.to(device) for x in (self.key_padding, self.segments)]
        return StructuredMask(self.structure, self.batch, self.query_length, self.key_length, *facts)

    def dense(self, device: torch.device) -> Tensor:
        """The mask as ``(batch or 1, 1, queries, keys)`` boolean, true where visible: of the size of the scores."""
        rows = torch.arange(self.query_length, device=device)
        keys = torch.arange(self.key_length, device=device)
        seen = self.structure.visible(rows[:, None], keys[None], self.query_length, self.key_length)[
            None, None
        ]
        if self.key_padding is not None:
            seen = seen & self.key_padding.to(device)[:, None, None, :]
        if self.segments is not None:
            ids = self.segments.to(device)
            place = rows + (self.key_length - self.query_length) if self.structure.end_aligned else rows
            seen = seen & (ids[:, None, place, None] == ids[:, None, None, :])
        return seen

    def __repr__(self) -> str:
        return f"StructuredMask({self.structure}, {self.query_length} queries, {self.key_length} keys)"


@dataclass(frozen=True)
class _Terms:
    """What the functions of a mask say: distances back and ahead, a chunk size, documents."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    chunk_start: Tensor | None = None
    segments: Tensor | None = None


def structured_mask(**given: Any) -> StructuredMask | Tensor | None:
    """The mask interface of ``attn_implementation="fastattn"``.

    Args:
        **given: What ``transformers.masking_utils`` passes to every mask interface.

    Returns:
        The structure where it is understood; else, and for one query, what the ``sdpa`` implementation gets.
    """
    query_length, key_length = given.get("q_length"), given["kv_length"]
    if query_length is None or query_length == 1:
        return _tensor(given)
    tracing = torch.compiler.is_compiling()
    query_offset, key_offset = given.get("q_offset", 0), given.get("kv_offset", 0)
    if isinstance(query_offset, Tensor):
        if tracing:
            # A static cache under compilation: where the queries stand is known to the data alone.
            return _tensor(given)
        query_offset = int(query_offset)
    terms = _traced_terms(given) if tracing else _terms(given["mask_function"])
    if terms is None:
        return _tensor(given)
    structure = _placed(terms, query_offset - key_offset, key_offset, query_length, key_length)
    if structure is None:
        return _tensor(given)
    if structure.right is not None and not structure.end_aligned:
        # A static cache has room for later tokens, which no query sees.
        key_length = min(key_length, query_length + structure.right)
    if terms.segments is not None and terms.segments.shape[-1] != key_length:
        return _tensor(given)
    padding = _padding(given["attention_mask"], key_length, key_offset, tracing)
    structure = replace(structure, key_padding=padding is not None, segments=terms.segments is not None)
    return StructuredMask(structure, given["batch_size"], query_length, key_length, padding, terms.segments)


def _tensor(given: dict[str, Any]) -> Tensor | None:
    found: Tensor | None = masking_utils.sdpa_mask(**given)
    return found


def _terms(function: Callable[..., Any]) -> _Terms | None:
    """Reads a mask function of transformers by its name and what it closes over; ``None`` for any other function."""
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    code = getattr(function, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held = dict(zip(getattr(code, "co_freevars", ()), cells))
    factory = function.__qualname__.partition(".")[0]
    if factory == "causal_mask_function":
        return _Terms(right=0)
    if factory == "bidirectional_mask_function":
        return _Terms()
    if factory == "sliding_window_overlay":
        return _Terms(left=held["sliding_window"] - 1)
    if factory == "sliding_window_bidirectional_overlay":
        return _Terms(left=held["sliding_window"], right=held["sliding_window"])
    if factory == "chunked_overlay":
        return _Terms(chunk=held["chunk_size"], chunk_start=held["left_padding"])
    if factory == "packed_sequence_mask_function":
        return _Terms(segments=held["packed_sequence_mask"])
    if factory == "remap_positions_for_packed_sequence":
        # Inside a document positions rise by one, so distances are those of the indices; chunks would start anew.
        inner = _terms(held["mask_function"])
        return inner if inner is not None and inner.chunk is None else None
    if factory == "and_masks":
        return _all_of([_terms(part) for part in held["mask_functions"]])
    return None


def _all_of(parts: list[_Terms | None]) -> _Terms | None:
    found: dict[str, Any] = {}
    for part in parts:
        if part is None:
            return None
        for name, value in vars(part).items():
            if value is None:
                continue
            if name in ("left", "right"):
                found[name] = min(value, found.get(name, value))
            elif name in found:
                return None
            else:
                found[name] = value
    return _Terms(**found)


def _traced_terms(given: dict[str, Any]) -> _Terms | None:
    """The same under ``torch.compile``, which cannot look into functions: from the flags that travel beside them."""
    function, local, config = given["mask_function"], given.get("local_size"), given.get("config")
    if function is masking_utils.causal_mask_function:
        return _Terms(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return _Terms()
    if given.get("use_vmap", False) or getattr(config, "attention_chunk_size", None) is not None:
        return None
    if "allow_is_bidirectional_skip" in given:
        # Skipping the mask is allowed only where nothing but the window was added to it.
        return (
            _Terms(left=local, right=local)
            if given["allow_is_bidirectional_skip"] and local is not None
            else None
        )
    left = None if local is None else local - 1
    if given.get("allow_is_causal_skip", False):
        return _Terms(left=left, right=0)
    alone = given["attention_mask"] is None and given["q_length"] == given["kv_length"]
    if alone and left != 0:
        return _Terms(left=left, right=0, segments=_documents(given))
    return None


def _documents(given: dict[str, Any]) -> Tensor:
    """Documents of a packed causal mask, ``(batch, length)``: a token that does not see the one before it begins one.

    Without an ``attention_mask`` a compiled model always gets a packed mask, of one document where nothing is packed. What
    lies before the diagonal says everything about it; that nothing lies behind is asserted while the model runs.
    """
    function, length, device = given["mask_function"], given["q_length"], given.get("device", "cpu")
    batch = torch.arange(given["batch_size"], device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    place = torch.arange(1, length, device=device)[None]
    begins = ~function(batch, head, place, place - 1).expand(given["batch_size"], length - 1)
    ahead = function(batch, head, place - 1, place)
    torch._assert_async(~ahead.any(), "the mask shows tokens ahead and is not the mask of packed documents")
    return torch.nn.functional.pad(begins.cumsum(-1), (1, 0))


def _placed(
    terms: _Terms, shift: int, key_offset: int, query_length: int, key_length: int
) -> MaskStructure | None:
    """The terms as distances between indices: query ``i`` stands at key ``i + shift``."""
    end = shift != 0 and shift == key_length - query_length
    move = 0 if end else shift
    left = None if terms.left is None else terms.left - move
    right = None if terms.right is None else terms.right + move
    if left is not None and right is not None and left + right < 0:
        return None
    if terms.chunk is not None:
        start = terms.chunk_start
        if torch.compiler.is_compiling() or key_offset % terms.chunk or move:
            return None
        if start is not None and bool(start.any()):
            return None
    if terms.segments is not None and (move or end):
        return None
    return MaskStructure(left=left, right=right, end_aligned=end, chunk=terms.chunk)


def _padding(mask: Tensor | None, key_length: int, key_offset: int, tracing: bool) -> Tensor | None:
    """``(batch, key_length)``, true for a real token; ``None`` without padding. Keys past the mask are hidden."""
    if mask is None:
        return None
    lacking = key_offset + key_length - mask.shape[-1]
    if lacking > 0:
        mask = torch.nn.functional.pad(mask, (0, lacking))
    mask = mask[:, key_offset : key_offset + key_length].to(torch.bool)
    if not tracing and bool(mask.all()):
        return None
    return mask
