"""Packed documents, and each of them alone."""

from __future__ import annotations

import dataclasses

import torch
from oracle import make_inputs

from fastattn_compile.operators.base import AttentionInputs

# Shorter than a block, of two blocks, of three levels; one length twice.
LENGTHS = [[5, 71, 16, 33, 16, 1], [142], [1, 1, 120, 20]]


def packed(mask: str, dtype: torch.dtype = torch.float64) -> AttentionInputs:
    inputs = make_inputs(f"{mask} & segments", batch=3, length=142, dtype=dtype)
    segments = torch.stack(
        [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) * 7 % 11 for lengths in LENGTHS]
    )
    return dataclasses.replace(inputs, segments=segments)


def alone(inputs: AttentionInputs, sequence: int, span: slice) -> AttentionInputs:
    one = slice(sequence, sequence + 1)
    q, k, v = (x[one, :, span] for x in (inputs.query, inputs.key, inputs.value))
    padding = None if inputs.key_padding is None else inputs.key_padding[one, span]
    mask = dataclasses.replace(inputs.mask, segments=False)
    return dataclasses.replace(inputs, query=q, key=k, value=v, mask=mask, key_padding=padding, segments=None)
