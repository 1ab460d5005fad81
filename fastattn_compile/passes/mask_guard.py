"""What must hold of the inputs of a graph for the masks that were read from values, and what is done when it does not.

The structure of a mask that is data is a claim on every later batch; so is what a buffer held whose values became part of
a formula. Both are looked at before every call. What is learned where they fail serves the next compilation.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor

from fastattn_compile.kernels.masks import any_at_all
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.passes.emission import emit
from fastattn_compile.passes.expression import TRUE, ZERO, Expression, axes_of
from fastattn_compile.passes.fx_meta import example
from fastattn_compile.passes.graph import Node, Size
from fastattn_compile.passes.lift_values import pattern_of
from fastattn_compile.passes.mask_bias import HIDDEN
from fastattn_compile.passes.mask_values import has_structure, structure_of
from fastattn_compile.passes.names import parameter_path


@dataclass
class MaskHistory:
    """What was learned of the masks of a model on batches that broke a claim.

    Args:
        claimed: Name of a site to the structures that were claimed of its mask and did not last.
        met: Name of a site to what its mask was then, where there is a word for it.
        buffers: Names of the graph's buffers that were written to: no formula may be made of their values.
    """

    claimed: dict[str, list[MaskStructure]] = field(default_factory=dict)
    met: dict[str, list[MaskStructure]] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)

    def add(self, other: MaskHistory) -> None:
        """Takes in what was learned elsewhere."""
        for mine, theirs in ((self.claimed, other.claimed), (self.met, other.met)):
            for name, structures in theirs.items():
                for structure in structures:
                    _remember(mine, name, structure)
        self.buffers |= other.buffers


def _remember(known: dict[str, list[MaskStructure]], name: str, structure: MaskStructure) -> None:
    if structure not in known.setdefault(name, []):
        known[name].append(structure)


class _Looked:
    """The tensors that were looked at last. Writes that PyTorch does not count (``.data``, NumPy) are not seen."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], int]] | None = None

    def at(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was these, unchanged since."""
        kept = self._kept
        return kept is not None and len(kept) == len(tensors) and all(
            ref() is x and version == x._version for (ref, version), x in zip(kept, tensors)
        )  # fmt: skip

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """From now on it is these. Tensors of inference mode count no versions and are looked at every time."""
        counted = not any(x.is_inference() for x in tensors)
        self._kept = [(weakref.ref(x), x._version) for x in tensors] if counted else None


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

    @property
    def failure(self) -> str:
        """What to say where it does not hold."""
        return f"the mask of {self.names[0]} is no longer {self.structure}, which it was on the first batch"

    def holds(self, visible: Tensor | None, plain: bool) -> bool:
        """Whether it is so of what ``MaskReader`` read."""
        return visible is not None and plain >= self.plain and has_structure(visible, self.structure)


@dataclass(frozen=True, eq=False)
class Held:
    """What a buffer held when its values became part of the formulas of masks.

    Args:
        names: The sites whose masks are made of it.
        node: The buffer.
        formula: Its values.
        position: Among the inputs of the graph; ``None`` where the graph holds it itself.
    """

    names: tuple[str, ...]
    node: Node
    formula: Expression
    position: int | None
    _looked: _Looked = field(default_factory=_Looked, repr=False)

    @property
    def failure(self) -> str:
        """What to say where it does not hold."""
        name = parameter_path(self.node.origin) or self.node.name
        return f"the buffer {name}, which the mask of {self.names[0]} is made of, has other values than on the first batch"

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether it holds them still."""
        value = inputs[self.position] if self.position is not None else self.node.attributes.get("value")
        if not isinstance(value, Tensor):
            return False
        if self._looked.at([value]):
            return True
        same = pattern_of(value, self.node) == self.formula
        if same:
            self._looked.keep([value])
        return same


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
            For each claim which keys are visible, ``(batch, queries, keys)``, of one sequence where it is the same for all,
            ``None`` where heads differ or the inputs do not tell; and whether nothing is added to their scores.
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
    varies = axes_of(claim.visible) | axes_of(claim.bias)
    by_head = "head" in varies
    axes = ("batch", "head", "query", "key") if by_head else ("batch", "query", "key")
    sizes = [int(sympy.sympify(claim.sizes[name]).subs(dict(symbols))) for name in axes]
    if "batch" not in varies:
        sizes[0] = 1
    device = next(iter(values.values())).device

    def tensor(formula: Expression) -> Tensor:
        result: Tensor = emit(
            formula, axes, sizes, device, lambda f, args, kwargs: f(*args, **kwargs), values.__getitem__
        )
        return result

    plain = True
    if claim.bias == ZERO:
        visible = tensor(claim.visible)
    else:
        bias = tensor(claim.bias)
        visible = bias > HIDDEN if claim.visible == TRUE else (bias > HIDDEN) & tensor(claim.visible)
        plain = not any_at_all((bias != 0) & visible)
    if not by_head:
        return visible, plain
    first = visible[:, :1]
    return (first.squeeze(1) if bool((visible == first).all()) else None), plain


class MaskCheck:
    """The claims on the masks of a graph, and whether inputs keep them.

    Args:
        reader: Computes the masks; ``None`` without claims on them.
        claims: What was found in them.
        held: The buffers whose values are part of formulas.
    """

    def __init__(self, reader: MaskReader | None, claims: Sequence[Claim], held: Sequence[Held] = ()) -> None:
        self.reader, self.claims, self.held = reader, list(claims), list(held)
        self._looked = _Looked()
        self._sizes: dict[Any, int] = {}

    def of(self, names: Collection[str]) -> MaskCheck | None:
        """The same for some sites only, ``None`` when nothing is claimed of them."""
        claims = [claim for claim in self.claims if not set(names).isdisjoint(claim.names)]
        held = [held for held in self.held if not set(names).isdisjoint(held.names)]
        return MaskCheck(self.reader if claims else None, claims, held) if claims or held else None

    def broken(self, inputs: Sequence[Any]) -> list[Claim | Held]:
        """What does not hold. The same tensors, unchanged and read at the same sizes, are looked at once.

        Args:
            inputs: Inputs of the graph.
        """
        wrong: list[Claim | Held] = [held for held in self.held if not held.holds(inputs)]
        if self.reader is None:
            return wrong
        sources, sizes = self.reader.sources(inputs), self.reader.sizes(inputs)
        if sizes == self._sizes and self._looked.at(sources):
            return wrong
        masks = self.reader.read(inputs, self.claims)
        failed = [claim for claim, found in zip(self.claims, masks) if not claim.holds(*found)]
        if not failed:
            self._sizes = sizes
            self._looked.keep(sources)
        return [*wrong, *failed]

    def learn(self, inputs: Sequence[Any], broken: Sequence[Claim | Held], history: MaskHistory) -> None:
        """Notes what the masks are on inputs that do not keep the claims.

        Args:
            inputs: Inputs of the graph.
            broken: What does not hold of them.
            history: Where to note it.
        """
        history.buffers |= {str(held.node.origin.target) for held in broken if isinstance(held, Held)}
        claims = [claim for claim in broken if isinstance(claim, Claim)]
        if self.reader is None or not claims:
            return
        for claim, (visible, _) in zip(claims, self.reader.read(inputs, claims)):
            found = None if visible is None else structure_of(visible, claim.structure.key_padding)
            for name in claim.names:
                _remember(history.claimed, name, claim.structure)
                if found is not None:
                    _remember(history.met, name, found)
