"""Exact attention through PyTorch's SDPA with the mask as structure: no tensor of the size of the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn_compile.operators.base import AttentionInputs, SiteSpec, Support, no
from fastattn_compile.operators.exact.operator import refuse_extras, visibility
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

# Query rows of one call. Fewer spare more hidden keys, more calls cost time: 256 to 512 are best from 1024 to 8192 tokens.
_ROWS, _MOST_CALLS = 256, 16
_EXACT = make_operator("exact")


def serves(spec: SiteSpec) -> Support:
    """Whether ``structured_sdpa`` computes a site: any understood mask, dropout too; nothing that changes the scores."""
    if not spec.mask.understood:
        return no(f"the mask is not understood as structure ({spec.mask.opaque})")
    return refuse_extras(SiteSpec(**{**vars(spec), "dropout": 0.0}))


def structured_sdpa(
    query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None, segments: Tensor | None, scale: float,
    mask: str, dropout: float = 0.0, site: str = "",
) -> Tensor:  # fmt: skip
    """Softmax attention by as few SDPA calls as the mask allows.

    No mask and plain causal are flags of one call, padding alone a mask of one row. Anything else is served in stretches of
    query rows, each against the keys that any of them may see, with a mask of that size.

    Args:
        query: ``(batch, heads, n, d)``.
        key: ``(batch, kv_heads, m, d)``; ``kv_heads`` divides ``heads``.
        value: ``(batch, kv_heads, m, e)``.
        key_padding: ``(batch, m)`` boolean, true where a token is real, or ``None``.
        segments: ``(batch, m)`` integer, or ``None``.
        scale: Factor on the scores.
        mask: Text of the mask structure.
        dropout: Probability of dropout on the weights.
        site: Name for observers.

    Returns:
        ``(batch, heads, n, e)``.
    """
    structure = MaskStructure.parse(mask)
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    plain = not structure.conflicts("right", "end_aligned")
    if plain and (structure.right is None or (structure.right == 0 and queries == keys)):
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=structure.causal, scale=scale, enable_gqa=grouped
        )
    if not structure.conflicts("key_padding", "end_aligned") and key_padding is not None:
        key, value = (_for_all_heads(x, query) for x in (key, value))
        return scaled_dot_product_attention(
            query, key, value, key_padding[:, None, None, :], dropout_p=dropout, scale=scale
        )
    if not dropout and not (isinstance(queries, int) and isinstance(keys, int)):
        # Lengths that vary cannot be cut into a fixed number of calls; the operator cuts them while it runs.
        out: Tensor = torch_op("exact")(
            query, key, value, key_padding, segments, None, [], scale, mask, _EXACT.token, site
        )[0]
        return out
    return _in_stretches(AttentionInputs(query, key, value, scale, structure, key_padding, segments), dropout)


def _in_stretches(x: AttentionInputs, dropout: float) -> Tensor:
    queries = int(x.query.shape[2])
    rows = max(_ROWS, -(-queries // _MOST_CALLS))
    _, span = visibility(x)
    key, value = (_for_all_heads(y, x.query) for y in (x.key, x.value))
    outputs = []
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        first, last = span(start, stop) if span is not None else (0, int(x.key.shape[2]))
        # A stretch that sees no key still has a call: of hidden keys, which give 0.
        last = max(last, first + 1) if first < x.key.shape[2] else last
        first = min(first, last - 1)
        near = slice(first, last)
        seen = _visible(x, torch.arange(start, stop, device=x.query.device), near)
        outputs.append(
            scaled_dot_product_attention(
                x.query[:, :, start:stop], key[:, :, near], value[:, :, near], seen, dropout_p=dropout, scale=x.scale
            )
        )  # fmt: skip
    return torch.cat(outputs, 2)


def _for_all_heads(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values repeated for the query heads that share them: SDPA with a mask has no fast kernel for groups."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def _visible(x: AttentionInputs, rows: Tensor, near: slice) -> Tensor:
    """``(batch or 1, 1, rows, keys)``, true where a key of the stretch is visible."""
    queries, keys = x.query.shape[2], x.key.shape[2]
    places = torch.arange(near.start, near.stop, device=rows.device)
    seen = x.mask.visible(rows[:, None], places[None], queries, keys)[None, None]
    if x.key_padding is not None:
        seen = seen & x.key_padding[:, None, None, near]
    if x.segments is not None:
        own = rows + (keys - queries) if x.mask.end_aligned else rows
        seen = seen & (x.segments[:, None, own, None] == x.segments[:, None, None, near])
    return seen
