"""Packed documents, each attended as a sequence of its own: its positions begin at 0, and no group spans two of them.

Documents of a like length are laid side by side and padded to the longest of them, so that a kernel for sequences
serves them in as many calls as there are doublings of the length. A token belongs to one document: what was laid out is
put back without a sum. A bias by distance counts the tokens of the document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Gradients
from fastattn_compile.operators.mask import MaskStructure


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of some documents stand.

    Args:
        place: ``(documents, longest)`` numbers of tokens in ``(batch * n)``; any token where there is none.
        real: ``(documents, longest)`` boolean, where there is one.
    """

    place: Tensor
    real: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """``(b, h, n, ...)`` as ``(documents, h, longest, ...)``."""
        return x.transpose(1, 2).flatten(0, 1)[self.place].transpose(1, 2)

    def scatter(self, x: Tensor, target: Tensor) -> None:
        """The way back of ``gather``, into a contiguous ``(b, n, h, ...)``."""
        target.view(-1, *target.shape[2:])[self.place[self.real]] = x.transpose(1, 2)[self.real]


@dataclass(frozen=True)
class _Order:
    """The tokens of all sequences, document after document.

    Args:
        tokens: ``(b * n,)`` numbers of the tokens in ``(b, n)``.
        first: ``(documents,)`` where each document begins in ``tokens``.
        length: ``(documents,)`` its tokens.
    """

    tokens: Tensor
    first: Tensor
    length: Tensor


def _order(segments: Tensor) -> _Order:
    batch, n = segments.shape
    sequence = torch.arange(batch, device=segments.device)[:, None]
    ids, at = segments.sort(dim=1, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = begins.flatten().nonzero().flatten()
    end = torch.cat([first[1:], first.new_full((1,), batch * n)])
    return _Order((at + sequence * n).flatten(), first, end - first)


def _layouts(segments: Tensor, unit: int | None) -> list[_Layout]:
    """Documents of one length, or by the doublings of their length counted in ``unit`` tokens."""
    order = _order(segments)
    classes = order.length
    if unit is not None:
        classes = torch.ceil(torch.log2((-(-order.length // unit)).double())).long()
    layouts = []
    for number in classes.unique().tolist():
        chosen = (classes == number).nonzero().flatten()
        inside = torch.arange(int(order.length[chosen].max()), device=segments.device)
        real = inside < order.length[chosen, None]
        place = order.tokens[torch.where(real, order.first[chosen, None] + inside, order.first[chosen, None])]
        layouts.append(_Layout(place, real))
    return layouts


def _document_mask(inputs: AttentionInputs, padded: bool) -> MaskStructure:
    return dataclasses.replace(inputs.mask, segments=False, key_padding=padded, end_aligned=False)


def _checked(inputs: AttentionInputs) -> Tensor:
    """The segments, when distances inside a document are what the mask means by distance.

    Raises:
        ValueError: Tokens of a document stand apart, and a window measures their distance.
    """
    segments = inputs.segments
    if segments is None:
        raise ValueError(f"the documents of the tokens are missing, the mask is {inputs.mask}")
    mask = inputs.mask
    if mask.left is not None or mask.right not in (None, 0):
        runs = segments.shape[0] + int((segments[:, 1:] != segments[:, :-1]).sum())
        if runs != len(_order(segments).first):
            raise ValueError(
                "the tokens of a packed document must stand side by side when a window depends on their distance; "
                f" got {runs} stretches of {len(_order(segments).first)} documents ({mask})"
            )
    return segments


def _laid_out(inputs: AttentionInputs, layout: _Layout) -> AttentionInputs:
    q, k, v = (layout.gather(x) for x in (inputs.query, inputs.key, inputs.value))
    padding = None
    if inputs.key_padding is not None:
        padding = inputs.key_padding.flatten()[layout.place] & layout.real
    elif not bool(layout.real.all()):
        padding = layout.real
    mask = _document_mask(inputs, padding is not None)
    return dataclasses.replace(inputs, query=q, key=k, value=v, mask=mask, key_padding=padding, segments=None)


def forward_documents(
    attend: Callable[[AttentionInputs], AttentionOutput], inputs: AttentionInputs, unit: int | None
) -> AttentionOutput:
    """Attends every document as a sequence.

    Args:
        attend: Attention of sequences, perhaps padded at the end.
        inputs: Packed documents.
        unit: Documents whose lengths in multiples of this lie between the same powers of 2 may be padded to one
            length; a block, for an operator whose levels follow from the number of blocks. With ``None`` only
            documents of one length go together, for an operator that padding would move.

    Raises:
        ValueError: Tokens of a document stand apart, and a window measures their distance.
    """
    out, log_sum_exp = None, None
    for layout in _layouts(_checked(inputs), unit):
        made = attend(_laid_out(inputs, layout))
        if out is None or log_sum_exp is None:
            batch, heads, n, _ = inputs.query.shape
            out = made.out.new_empty(batch, n, heads, made.out.shape[3])
            log_sum_exp = made.log_sum_exp.new_empty(batch, n, heads)
        layout.scatter(made.out, out)
        layout.scatter(made.log_sum_exp, log_sum_exp)
    if out is None or log_sum_exp is None:
        raise ValueError("there are no documents: the sequence has no tokens")
    return AttentionOutput(out.transpose(1, 2).contiguous(), log_sum_exp.transpose(1, 2).contiguous())


def backward_documents(
    differentiate: Callable[[AttentionInputs, AttentionOutput, Tensor, Tensor | None], Gradients],
    inputs: AttentionInputs, output: AttentionOutput, grad_out: Tensor, grad_log_sum_exp: Tensor | None,
    unit: int | None,
) -> Gradients:  # fmt: skip
    """Gradients of ``forward_documents``.

    Args:
        differentiate: Gradients of attention of sequences, given inputs, output and the gradients of the output.
        inputs: As in ``forward_documents``.
        output: What it returned.
        grad_out: Gradient of the output.
        grad_log_sum_exp: Gradient of the log-sum-exp, or ``None``.
        unit: As in ``forward_documents``.
    """
    grads = [
        torch.empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)
        for x in (inputs.query, inputs.key, inputs.value)
    ]
    parameters: tuple[Tensor, ...] | None = None
    of_bias: Tensor | None = None
    for layout in _layouts(_checked(inputs), unit):
        of_output = AttentionOutput(layout.gather(output.out), layout.gather(output.log_sum_exp))
        gone = ~layout.real[:, None]
        grad = layout.gather(grad_out).masked_fill(gone[..., None], 0)
        of_lse = None if grad_log_sum_exp is None else layout.gather(grad_log_sum_exp).masked_fill(gone, 0)
        made = differentiate(_laid_out(inputs, layout), of_output, grad, of_lse)
        for target, found in zip(grads, (made.query, made.key, made.value)):
            layout.scatter(found, target)
        if made.bias is not None:
            of_bias = made.bias if of_bias is None else of_bias + made.bias
        if parameters is None:
            parameters = made.parameters
        else:
            parameters = tuple(a + b for a, b in zip(parameters, made.parameters))
    query, key, value = (x.transpose(1, 2).contiguous() for x in grads)
    return Gradients(query, key, value, parameters or (), of_bias)


def _document(inputs: AttentionInputs, sequence: int, place: Tensor) -> AttentionInputs:
    """One document by itself: the tokens at some places of a sequence."""
    one = slice(sequence, sequence + 1)
    q, k, v = (x[one, :, place] for x in (inputs.query, inputs.key, inputs.value))
    padding = None if inputs.key_padding is None else inputs.key_padding[one, place]
    mask = _document_mask(inputs, padding is not None)
    return dataclasses.replace(inputs, query=q, key=k, value=v, mask=mask, key_padding=padding, segments=None)


def reference_documents(
    attend: Callable[[AttentionInputs], AttentionOutput], inputs: AttentionInputs
) -> AttentionOutput:
    """What packed documents mean: every document of every sequence by itself, one call each; differentiable.

    Args:
        attend: The definition for sequences.
        inputs: Packed documents.
    """
    segments, outs, statistics = _checked(inputs), [], []
    for sequence, ids in enumerate(segments):
        stretches = [(ids == document).nonzero().flatten() for document in ids.unique()]
        made = [attend(_document(inputs, sequence, place)) for place in stretches]
        back = torch.cat(stretches).argsort()
        outs.append(torch.cat([one.out for one in made], 2)[:, :, back])
        statistics.append(torch.cat([one.log_sum_exp for one in made], 2)[:, :, back])
    return AttentionOutput(torch.cat(outs), torch.cat(statistics))


@dataclass(frozen=True)
class AskedDocument:
    """A document that holds some of the query rows that are asked for.

    Args:
        inputs: The document by itself.
        sequence: Its row of the batch.
        place: ``(tokens,)`` where its tokens stand there.
        number: ``(r,)`` which of the rows asked for it holds.
        rows: ``(r,)`` where these stand in the document.
    """

    inputs: AttentionInputs
    sequence: int
    place: Tensor
    number: Tensor
    rows: Tensor


def asked_documents(inputs: AttentionInputs, rows: Tensor) -> Iterator[AskedDocument]:
    """The documents that some query rows belong to, one by one.

    Args:
        inputs: Packed documents.
        rows: ``(r,)`` query positions.
    """
    for sequence, ids in enumerate(_checked(inputs)):
        for document in ids[rows].unique():
            place, number = (ids == document).nonzero().flatten(), (ids[rows] == document).nonzero().flatten()
            one = _document(inputs, sequence, place)
            yield AskedDocument(one, sequence, place, number, torch.searchsorted(place, rows[number]))


def exact_keys_documents(
    exact_keys: Callable[[AttentionInputs, Tensor], Tensor], inputs: AttentionInputs, rows: Tensor
) -> Tensor:
    """Which keys some queries of packed documents meet one by one.

    Args:
        exact_keys: The same for sequences.
        inputs: Packed documents.
        rows: ``(r,)`` query positions.

    Returns:
        ``(batch, heads, r, n)`` boolean.
    """
    batch, heads, n, _ = inputs.query.shape
    met = torch.zeros(batch, heads, len(rows), n, dtype=torch.bool, device=rows.device)
    for asked in asked_documents(inputs, rows):
        found = exact_keys(asked.inputs, asked.rows).expand(1, heads, -1, -1)[0]
        met[asked.sequence, :, asked.number[:, None], asked.place] = found
    return met


def refuse_decoding(inputs: AttentionInputs) -> None:
    """Refuses to begin decoding from packed documents.

    Raises:
        ValueError: They are packed.
    """
    if inputs.segments is not None:
        raise ValueError(
            "packed documents cannot be decoded together: give every document a batch row of its own"
        )
