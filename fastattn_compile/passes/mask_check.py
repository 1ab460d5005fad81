"""Masks whose structure no graph tells, read from the first batch and checked on every later one.

A mask that comes from outside, as an input or a constant, is data to the graph: behind a graph break, or where a user makes
it. Its values may still be causal, a window, padding. Where they are on the first batch, the site is given that structure;
before every call the values are compared with it, and where they differ the graph must run as it was.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.axes import length
from fastattn_compile.passes.emission import emit
from fastattn_compile.passes.expression import (
    ZERO,
    Expression,
    axes_of,
    compare,
    constant,
    logical_and,
    substitute,
)
from fastattn_compile.passes.formula import leaves
from fastattn_compile.passes.fx_meta import example, value_of
from fastattn_compile.passes.graph import Node, Size, dependencies
from fastattn_compile.passes.mask_bias import HIDDEN
from fastattn_compile.passes.mask_structure import MaskAnalysis
from fastattn_compile.passes.mask_terms import axes_by_role
from fastattn_compile.passes.mask_values import has_structure, structure_of
from fastattn_compile.passes.sequences import same_sequence
from fastattn_compile.passes.site import Site, Softmax

# What a mask must not be computed by for its values to be looked at before the graph runs: work, chance, the unknown.
_WORK = {
    "matmul", "linear", "baddbmm", "einsum", "softmax", "log_softmax", "sdpa", "mha", "flex_attention", "dropout",
    "embedding", "opaque",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What the mask of some sites was on the first batch.

    Args:
        names: The sites.
        structure: The structure.
        visible: Which keys are visible, a formula of the axes.
        bias: What is added to their scores.
        sizes: Extents of the axes.
        plain: Nothing is added to the scores of visible keys.
    """

    names: tuple[str, ...]
    structure: MaskStructure
    visible: Expression
    bias: Expression
    sizes: Mapping[str, Size]
    plain: bool = True

    def holds(self, visible: Tensor | None, plain: bool) -> bool:
        """Whether it is so of what ``MaskReader`` read."""
        return visible is not None and plain >= self.plain and has_structure(visible, self.structure)


class MaskReader:
    """Computes the masks of some sites from the inputs of their graph, without running the graph.

    Args:
        gm: The graph; later changes of it do not matter.
        nodes: The tensors of its view that the formulas read.
    """

    def __init__(self, gm: torch.fx.GraphModule, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        origins = [node.origin for node in nodes]
        needed: set[torch.fx.Node] = set()
        work = list(origins)
        while work:
            node = work.pop()
            if node not in needed:
                needed.add(node)
                work.extend(node.all_input_nodes)
        graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        self._symbols: list[tuple[int, int | None, Any]] = []
        self._sources: list[int] = []
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for at, node in enumerate(inputs):
            self._note_sizes(at, node)
            if node in needed:
                self._sources.append(at)
        for node in gm.graph.nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in origins))
        self._graph = torch.fx.GraphModule(gm, graph)
        held = [operator.attrgetter(node.target)(gm) for node in graph.nodes if node.op == "get_attr"]
        self._constants = [value for value in held if isinstance(value, Tensor)]

    def _note_sizes(self, at: int, node: torch.fx.Node) -> None:
        value = example(node)
        for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else ((None, value),):
            if isinstance(size, torch.SymInt):
                self._symbols.append((at, dim, size.node.expr))

    def sizes(self, inputs: Sequence[Any]) -> dict[Any, int]:
        """The symbolic sizes of the graph on some inputs."""
        return {
            symbol: int(inputs[at]) if dim is None else inputs[at].shape[dim]
            for at, dim, symbol in self._symbols
        }

    def sources(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The tensors that decide what the masks are."""
        return [inputs[at] for at in self._sources if isinstance(inputs[at], Tensor)] + self._constants

    def read(self, inputs: Sequence[Any], claims: Sequence[Claim]) -> list[tuple[Tensor | None, bool]]:
        """The masks on some inputs.

        Args:
            inputs: Inputs of the graph.
            claims: Whose formulas to compute.

        Returns:
            For each claim which keys are visible, ``(batch, queries, keys)``, ``None`` where heads differ or the inputs
            do not tell; and whether nothing is added to their scores.
        """
        symbols = self.sizes(inputs)
        with torch.no_grad():
            values = dict(zip(self.nodes, self._graph(*inputs)))
            return [_read(claim, values, symbols) for claim in claims]


def _read(
    claim: Claim, values: Mapping[Node, Tensor], symbols: Mapping[sympy.Symbol, int]
) -> tuple[Tensor | None, bool]:
    try:
        return _evaluate(claim, values, symbols)
    except ValueError:  # a size or a value that the inputs do not tell
        return None, False


def _evaluate(
    claim: Claim, values: Mapping[Node, Tensor], symbols: Mapping[sympy.Symbol, int]
) -> tuple[Tensor | None, bool]:
    by_head = "head" in axes_of(claim.visible) | axes_of(claim.bias)
    axes = ("batch", "head", "query", "key") if by_head else ("batch", "query", "key")
    sizes = [int(sympy.sympify(claim.sizes[name]).subs(dict(symbols))) for name in axes]
    device = next(iter(values.values())).device

    def tensor(formula: Expression) -> Tensor:
        result: Tensor = emit(
            formula, axes, sizes, device, lambda f, args, kwargs: f(*args, **kwargs), values.__getitem__
        )
        return result

    visible, plain = tensor(claim.visible), True
    if claim.bias != ZERO:
        bias = tensor(claim.bias)
        visible = visible & (bias > HIDDEN)
        plain = not bool(((bias != 0) & visible).any())
    if not by_head:
        return visible, plain
    first = visible[:, :1]
    return (first.squeeze(1) if bool((visible == first).all()) else None), plain


class MaskCheck:
    """The claims on the masks of a graph, and whether inputs keep them.

    Args:
        reader: Computes the masks.
        claims: What was found.
    """

    def __init__(self, reader: MaskReader, claims: Sequence[Claim]) -> None:
        self.reader, self.claims = reader, list(claims)
        self._known: list[tuple[weakref.ref[Tensor], int]] = []
        self._sizes: dict[Any, int] = {}

    def of(self, names: Collection[str]) -> MaskCheck | None:
        """The same for some sites only, ``None`` when nothing is claimed of them."""
        claims = [claim for claim in self.claims if not set(names).isdisjoint(claim.names)]
        return MaskCheck(self.reader, claims) if claims else None

    def structure(self, name: str) -> MaskStructure:
        """What is claimed of a site."""
        return next(claim.structure for claim in self.claims if name in claim.names)

    def broken(self, inputs: Sequence[Any]) -> tuple[str, ...]:
        """Names of sites whose mask is not what it was; the same tensors, unchanged and read at the same sizes, are looked
        at once. Writes that PyTorch does not count (``.data``, NumPy) are not seen.

        Args:
            inputs: Inputs of the graph.
        """
        sources, sizes = self.reader.sources(inputs), self.reader.sizes(inputs)
        same = [ref() is x and version == x._version for (ref, version), x in zip(self._known, sources)]
        if same and len(same) == len(self._known) == len(sources) and all(same) and sizes == self._sizes:
            return ()
        wrong = [
            claim for claim, found in zip(self.claims, self.reader.read(inputs, self.claims)) if not claim.holds(*found)
        ]  # fmt: skip
        # Tensors of inference mode count no versions.
        counted = not wrong and not any(x.is_inference() for x in sources)
        self._sizes = sizes
        self._known = [(weakref.ref(x), x._version) for x in sources] if counted else []
        return tuple(name for claim in wrong for name in claim.names)


def check_masks(
    gm: torch.fx.GraphModule, softmaxes: Sequence[Softmax], inputs: Sequence[Any]
) -> tuple[list[Softmax], MaskCheck | None]:
    """Gives sites the structure that the values of their masks show.

    Args:
        gm: The graph the sites were found in.
        softmaxes: Its softmaxes.
        inputs: Its inputs on the first batch. Under some wrappers they are no real tensors, and nothing is found.

    Returns:
        The softmaxes, those with a structure found so as ``checked``; and what has to be checked before every call of a
        graph that was rewritten with them, ``None`` for nothing.
    """
    asked: dict[tuple[Any, ...], list[Softmax]] = {}
    for line in softmaxes:
        if line.site is not None and _may_be_read(line.site):
            asked.setdefault(_question(line.site), []).append(line)
    if not asked or any(isinstance(x, FakeTensor) for x in inputs):
        return list(softmaxes), None
    # The number behind a symbolic size, without making it the only one.
    inputs = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
    claims = [
        Claim(tuple(line.name for line in lines), MaskStructure(), visible, bias, dict(sizes))
        for (visible, bias, sizes), lines in asked.items()
    ]
    read = [leaf.node for claim in claims for x in (claim.visible, claim.bias) for leaf in leaves(x)]
    reader = MaskReader(gm, list(dict.fromkeys(read)))
    with unset_fake_temporarily():
        masks = reader.read(inputs, claims)
    kept: list[Claim] = []
    found: dict[str, Softmax] = {}
    for claim, lines, (visible, plain) in zip(claims, asked.values(), masks):
        # Of the keys that a single query sees (a step against a cache) each step says anew.
        step = visible is not None and visible.shape[1] == 1
        padded = step or "batch" in axes_of(claim.visible) | axes_of(claim.bias)
        structure = structure_of(visible, padded) if visible is not None else None
        if structure is not None:
            claim = replace(claim, structure=structure, plain=plain)
            kept.append(claim)
            found.update((line.name, _with_structure(line, claim)) for line in lines)
    if not kept:
        return list(softmaxes), None
    return [found.get(line.name, line) for line in softmaxes], MaskCheck(reader, kept)


def _question(site: Site) -> tuple[Any, ...]:
    sizes = tuple((role, length(group)) for role, group in axes_by_role(site.groups).items())
    return (*site.mask.data, sizes) if site.mask.data is not None else ()


def _may_be_read(site: Site) -> bool:
    """Whether the mask comes from the inputs without work, and with all that meets the scores in it."""
    if site.mask.data is None:
        return False
    read = [leaf.node for x in site.mask.data for leaf in leaves(x)]
    work, seen = list(read), set(read)
    while work:
        node = work.pop()
        if node.kind in _WORK or node.tainted or _trained(node):
            return False
        for operand in dependencies(node):
            if operand not in seen:
                seen.add(operand)
                work.append(operand)
    return bool(read)


def _trained(node: Node) -> bool:
    """Whether gradients go to a tensor: what is 0 now will be a bias."""
    return bool(getattr(value_of(node), "requires_grad", False))


def _with_structure(line: Softmax, claim: Claim) -> Softmax:
    site, structure = line.site, claim.structure
    assert site is not None
    padding: Expression | None = None
    if structure.key_padding:
        padding = claim.visible
        if claim.bias != ZERO:
            padding = logical_and(padding, compare("gt", claim.bias, constant(HIDDEN)))
        padding = substitute(padding, {"head": constant(0)})
    kind = "self" if same_sequence(site.query.origin, site.key.origin, site.groups, structure) else "cross"
    mask = MaskAnalysis(structure, padding)
    if not claim.plain:
        # What is added keeps its values, those that hide keys included.
        mask = replace(mask, bias="dense", bias_expression=claim.bias, reason=site.mask.reason)
    spec = dataclasses.replace(site.spec, mask=structure, bias=mask.bias, kind=kind)
    given = replace(site, mask=mask, spec=spec)
    return replace(line, site=given, mask=str(structure), kind=kind, checked=True)
