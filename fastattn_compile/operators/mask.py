"""Which keys a query may see, as structure: a few numbers and a few per-token facts, never an n x n tensor.

A ``MaskStructure`` says what is known of a mask. Position terms (causal, sliding window, chunked, prefix) are numbers in
it; facts about tokens (key padding, packed documents) are flags in it and travel beside it as ``(batch, length)`` tensors.
The text form (``"causal & window(128) & key_padding"``) is what operators receive as an argument and what reports print.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

_TERM = re.compile(r"^(?P<name>[a-z_]+)(\((?P<args>.*)\))?$")


@dataclass(frozen=True)
class MaskStructure:
    """The visibility of keys to queries. With no argument, every query sees every key.

    Key ``j`` is visible to query ``i`` when all terms that are set allow it. Distances are measured from the diagonal,
    ``delta = j - i``, or ``j - (i + key_len - query_len)`` when ``end_aligned``.

    Args:
        left: Largest distance back: ``delta >= -left``. ``None`` is unbounded. A sliding window of ``w`` tokens has
            ``left = w - 1``.
        right: Largest distance ahead: ``delta <= right``. ``None`` is unbounded, 0 is causal.
        end_aligned: The last query stands at the last key (queries continue a cache), instead of the first at the first.
        chunk: Queries see keys of their own chunk of this many positions only.
        prefix: The first ``prefix`` keys are visible to every query whatever ``left`` and ``right`` say (prefix-LM).
        key_padding: A ``(batch, key_len)`` boolean tensor travels along; only keys that are true are visible.
        segments: A ``(batch, length)`` integer tensor travels along; only keys of the query's segment are visible.
        opaque: Why the mask was not understood. Empty when the other fields say everything.
    """

    left: int | None = None
    right: int | None = None
    end_aligned: bool = False
    chunk: int | None = None
    prefix: int | None = None
    key_padding: bool = False
    segments: bool = False
    opaque: str = ""

    def __post_init__(self) -> None:
        for name in ("chunk", "prefix"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"MaskStructure.{name} must be a positive number of tokens, got {value}")
        if self.left is not None and self.right is not None and self.left + self.right < 0:
            raise ValueError(
                f"no key is visible: left={self.left}, right={self.right} describe an empty band"
            )

    @property
    def causal(self) -> bool:
        """Whether no query sees a key after its own position."""
        return self.right is not None and self.right <= 0

    @property
    def understood(self) -> bool:
        """Whether the structure says everything there is to know about the mask."""
        return not self.opaque

    @property
    def positional(self) -> MaskStructure:
        """The same mask without the terms that need a tensor."""
        return MaskStructure(self.left, self.right, self.end_aligned, self.chunk, self.prefix)

    def __str__(self) -> str:
        terms: list[str] = []
        if self.right is not None:
            terms.append("causal" if self.right == 0 else f"right({self.right})")
        if self.left is not None:
            # A causal window counts the token itself; otherwise the distance back is the clearer number.
            terms.append(f"window({self.left + 1})" if self.right == 0 else f"left({self.left})")
        if self.end_aligned:
            terms.append("end_aligned")
        if self.chunk is not None:
            terms.append(f"chunk({self.chunk})")
        if self.prefix is not None:
            terms.append(f"prefix({self.prefix})")
        if self.key_padding:
            terms.append("key_padding")
        if self.segments:
            terms.append("segments")
        if self.opaque:
            terms.append(f"opaque({self.opaque})")
        return " & ".join(terms) or "none"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> MaskStructure:
        """Reads the text form back.

        Args:
            text: What ``str(mask)`` gave, for example ``"causal & window(128)"``.

        Raises:
            ValueError: A term is unknown or lacks its number.
        """
        found: dict[str, object] = {}
        opaque_at = text.find("opaque(")
        if opaque_at >= 0:
            found["opaque"] = text[opaque_at + len("opaque(") : text.rindex(")")]
            text = text[:opaque_at].rstrip(" &")
        for term in filter(None, (part.strip() for part in text.split("&"))):
            match = _TERM.match(term)
            name, args = (match["name"], match["args"]) if match else (term, None)
            if name == "none":
                continue
            if name == "causal" and args is None:
                found["right"] = 0
            elif name in ("right", "left", "chunk", "prefix") and args is not None:
                found[name] = int(args)
            elif name == "window" and args is not None:
                found["left"] = int(args) - 1
            elif name in ("end_aligned", "key_padding", "segments") and args is None:
                found[name] = True
            else:
                raise ValueError(
                    f"unknown mask term {term!r}; terms are causal, window(n), left(n), right(n), end_aligned, "
                    "chunk(n), prefix(n), key_padding, segments"
                )
        return MaskStructure(**found)  # type: ignore[arg-type]

    def conflicts(self, *abilities: str) -> list[str]:
        """Names the terms that are set and not among an operator's ``abilities``.

        Args:
            *abilities: Field names the operator honours, for example ``"right"``, ``"key_padding"``.
        """
        return [
            f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name not in abilities
        ]

    def visible(self, rows: Tensor, keys: Tensor, query_len: int, key_len: int) -> Tensor:
        """Evaluates the position terms.

        Args:
            rows: Query positions, integer, any shape that broadcasts with ``keys``.
            keys: Key positions, integer.
            query_len: Number of queries.
            key_len: Number of keys.

        Returns:
            Boolean, the broadcast shape of ``rows`` and ``keys``.

        Raises:
            ValueError: The mask is opaque.
        """
        if self.opaque:
            raise ValueError(f"an opaque mask cannot be evaluated from its structure: {self.opaque}")
        place = rows + (key_len - query_len) if self.end_aligned else rows
        delta = keys - place
        seen = torch.ones_like(delta, dtype=torch.bool)
        if self.left is not None:
            seen &= delta >= -self.left
        if self.right is not None:
            seen &= delta <= self.right
        if self.prefix is not None:
            seen |= keys < self.prefix
        if self.chunk is not None:
            seen &= torch.div(keys, self.chunk, rounding_mode="floor") == torch.div(
                place, self.chunk, rounding_mode="floor"
            )
        return seen

    def interval(self, query_len: int, key_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The position terms as an interval of keys for every query.

        Args:
            query_len: Number of queries.
            key_len: Number of keys.
            device: Where to put it.

        Returns:
            ``(query_len,)`` int64 first visible key and one past the last, equal where nothing is visible.

        Raises:
            ValueError: It is more than one interval: a prefix outside a sliding window.
        """
        if self.prefix is not None and self.left is not None:
            raise ValueError(f"a prefix outside a sliding window is not one interval of keys ({self})")
        place = torch.arange(query_len, device=device) + (key_len - query_len if self.end_aligned else 0)
        low, high = torch.zeros_like(place), torch.full_like(place, key_len)
        if self.left is not None:
            low = place - self.left
        if self.right is not None:
            high = (place + self.right + 1).clamp(min=self.prefix or 0)
        if self.chunk is not None:
            begin = torch.div(place, self.chunk, rounding_mode="floor") * self.chunk
            low, high = torch.maximum(low, begin), torch.minimum(high, begin + self.chunk)
        low = low.clamp(0, key_len)
        return low, torch.maximum(high.clamp(0, key_len), low)


NO_MASK = MaskStructure()
CAUSAL = MaskStructure(right=0)
