"""What an operator is told of an attention, the tensors it takes and gives, and its answer whether it serves.

Other rooms import these from ``operators.base``, through which everything of operators comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.operators.mask import NO_MASK, MaskStructure


@dataclass(frozen=True)
class Support:
    """Whether an operator can serve a site. Falsy with a reason when it cannot.

    Args:
        reason: Empty for yes; otherwise a sentence a user can act on.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


YES = Support()


def no(reason: str) -> Support:
    """A refusal. ``reason`` says what was found and what the operator can do instead."""
    return Support(reason)


@dataclass(frozen=True)
class SiteSpec:
    """One softmax attention as an operator sees it: sizes, types and structure.

    Sizes may be symbolic (``torch.SymInt``) under dynamic shapes: comparing one then installs a guard, so compare only
    what the decision needs.

    Args:
        batch: Number of sequences.
        heads: Query heads.
        kv_heads: Key and value heads; divides ``heads``.
        query_len: Queries a sequence.
        key_len: Keys a sequence.
        head_dim: Channels of query and key.
        value_dim: Channels of value.
        dtype: Type of the values.
        device: Device type, ``"cpu"`` or ``"cuda"``.
        kind: ``"self"`` when queries and keys stand at the same positions, else ``"cross"``.
        mask: The mask as structure.
        bias: Additive bias on the scores: ``"none"``, ``"alibi"``, ``"bucketed"`` or ``"dense"``.
        softcap: Scores are ``softcap * tanh(scores / softcap)``; 0 is none.
        sink_logits: A learned logit a head takes part in the softmax without a value.
        dropout: Probability of dropout on the attention weights, 0 when not training.
        weights_used: Something besides the product with the values reads the attention weights.
    """

    batch: int
    heads: int
    kv_heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    kind: str = "self"
    mask: MaskStructure = NO_MASK
    bias: str = "none"
    softcap: float = 0.0
    sink_logits: bool = False
    dropout: float = 0.0
    weights_used: bool = False


# Dimensions of the tensor of a bias to its kind.
_BIAS_KINDS = {1: "alibi", 2: "bucketed"}


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of one attention, in canonical layout.

    Args:
        query: ``(batch, heads, query_len, head_dim)``, floating point.
        key: ``(batch, kv_heads, key_len, head_dim)``. Query head ``h`` reads key head ``h // (heads // kv_heads)``.
        value: ``(batch, kv_heads, key_len, value_dim)``.
        scale: Factor on the scores.
        mask: Structure of the mask.
        key_padding: ``(batch, key_len)`` boolean, true where a token is real. Present exactly when ``mask.key_padding``.
        segments: ``(batch, key_len)`` integer. Present exactly when ``mask.segments``.
        bias: What is added to the scores by the distance of key and query. ``(heads,)`` slopes of ALiBi: ``-slope *
            |key - query|``. ``(heads, 2 N - 1)`` with ``N >= key_len``: one number for each ``key - query`` from ``-(N -
            1)`` to ``N - 1``. Or dense, ``(batch or 1, heads or 1, query_len, key_len)``, which reports know and no operator
            serves. Finite.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: MaskStructure = NO_MASK
    key_padding: Tensor | None = None
    segments: Tensor | None = None
    bias: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.query.shape[1] // self.key.shape[1]

    def spec(self) -> SiteSpec:
        """The description of these tensors that ``Operator.supports`` and ``Operator.cost`` read."""
        batch, heads, query_len, head_dim = self.query.shape
        _, kv_heads, key_len, value_dim = self.value.shape
        return SiteSpec(
            batch, heads, kv_heads, query_len, key_len, head_dim, value_dim, self.value.dtype, self.value.device.type,
            kind="self" if query_len == key_len else "cross", mask=self.mask,
            bias="none" if self.bias is None else _BIAS_KINDS.get(self.bias.dim(), "dense"),
        )  # fmt: skip

    def validated(self) -> AttentionInputs:
        """Returns itself when the shapes and types agree.

        Raises:
            ValueError: They do not; the text says what was expected and what was given.
            TypeError: A tensor is not of floating-point type.
        """
        q, k, v = self.query, self.key, self.value
        for name, tensor in (("query", q), ("key", k), ("value", v)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} must have shape (batch, heads, length, head_dim), got {tuple(tensor.shape)}"
                )
            if not tensor.dtype.is_floating_point:
                raise TypeError(f"{name} must be of floating-point type, got {tensor.dtype}")
        if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            raise ValueError(
                "query (b, h, n, d), key (b, g, m, d) and value (b, g, m, e) do not agree: "
                f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key heads ({k.shape[1]})")
        for name, fact, wanted in (
            ("key_padding", self.key_padding, self.mask.key_padding),
            ("segments", self.segments, self.mask.segments),
        ):
            if (fact is not None) != wanted:
                raise ValueError(f"{name} is {'missing' if wanted else 'given'} but the mask is {self.mask}")
            if fact is not None and tuple(fact.shape) != (k.shape[0], k.shape[2]):
                raise ValueError(
                    f"{name} must have shape (batch, key_len) = {(k.shape[0], k.shape[2])}, got {tuple(fact.shape)}"
                )
        if self.key_padding is not None and self.key_padding.dtype != torch.bool:
            raise TypeError(
                f"key_padding must be boolean, true where a token is real; got {self.key_padding.dtype}"
            )
        if self.bias is not None:
            self._check_bias(self.bias)
        return self

    def _check_bias(self, bias: Tensor) -> None:
        heads, key_len = self.query.shape[1], self.key.shape[2]
        if not bias.dtype.is_floating_point:
            raise TypeError(f"bias must be of floating-point type, got {bias.dtype}")
        fits = bias.dim() == 1 or (
            bias.dim() == 2 and bias.shape[1] % 2 == 1 and bias.shape[1] >= 2 * key_len - 1
        )
        if not fits or bias.shape[0] != heads:
            raise ValueError(
                f"bias must be slopes of shape (heads,) = ({heads},) or a bias by distance of shape (heads, 2 N - 1) with "
                f"N >= key_len, at least ({heads}, {2 * key_len - 1}); got {tuple(bias.shape)}"
            )

    def added(self, rows: Tensor, keys: Tensor | None = None) -> Tensor:
        """The bias on the scores, 0 without one.

        Args:
            rows: ``(r,)`` query positions.
            keys: ``(c,)`` key positions; all keys when ``None``. A distance that the bias does not list has that of the
                farthest one it lists.

        Returns:
            ``(batch or 1, heads or 1, r, c)``, the bias's type; ``(1, 1, 1, 1)`` without a bias.
        """
        if self.bias is None:
            return self.query.new_zeros(1, 1, 1, 1)
        if self.bias.dim() == 4:
            return self.bias[:, :, rows] if keys is None else self.bias[:, :, rows][..., keys]
        query_len, key_len = self.query.shape[2], self.key.shape[2]
        place = rows + (key_len - query_len if self.mask.end_aligned else 0)
        if self.segments is not None and keys is None:
            at = places_in_segments(self.segments)
            distance = at[:, None] - at[:, place, None]
        else:
            at_key = torch.arange(key_len, device=rows.device) if keys is None else keys
            distance = (at_key - place[:, None])[None]
        if self.bias.dim() == 1:
            return -self.bias[:, None, None] * distance[:, None].abs()
        most = self.bias.shape[1] // 2
        return self.bias[:, distance.clamp(-most, most) + most].transpose(0, 1)

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys the given query rows may see, all terms of the mask together.

        Args:
            rows: ``(r,)`` query positions.

        Returns:
            ``(batch or 1, 1, r, key_len)`` boolean.
        """
        query_len, key_len = self.query.shape[2], self.key.shape[2]
        keys = torch.arange(key_len, device=rows.device)
        seen = self.mask.visible(rows[:, None], keys[None], query_len, key_len)[None, None]
        if self.key_padding is not None:
            seen = seen & self.key_padding[:, None, None, :]
        if self.segments is not None:
            place = rows + (key_len - query_len) if self.mask.end_aligned else rows
            seen = seen & (self.segments[:, None, place, None] == self.segments[:, None, None, :])
        return seen


def places_in_segments(segments: Tensor) -> Tensor:
    """How many tokens of its segment stand before every token, ``(b, n)``."""
    ids, order = segments.sort(dim=1, stable=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    inside = place - place.masked_fill(~begins, 0).cummax(1).values
    return torch.empty_like(place).scatter_(1, order, inside)


@dataclass(frozen=True)
class AttentionOutput:
    """What an operator returns.

    Args:
        out: ``(batch, heads, query_len, value_dim)``, the values' type. Rows that see no key are 0.
        log_sum_exp: ``(batch, heads, query_len)``, natural logarithm of the normaliser, float32 (float64 for float64
            inputs). Rows that see no key are -inf.
    """

    out: Tensor
    log_sum_exp: Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of one attention, each of its input's shape and type.

    Args:
        query: Gradient of the queries.
        key: Gradient of the keys.
        value: Gradient of the values.
        parameters: One for each learned parameter, in order.
        bias: Gradient of a bias by distance; ``None`` for slopes, which get none, and without a bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    parameters: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
