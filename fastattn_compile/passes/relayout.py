"""Bringing a tensor of a graph from the layout it has to the one that is wanted, symbolic sizes included."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch.fx

from fastattn_compile.passes.axes import Atom, Axes, leaves

Tensor = Any  # a tensor of the graph that is written
GraphSize = Any  # a number, or a value of that graph


class LayoutWriter(Protocol):
    """What a graph must offer to have tensors re-laid in it."""

    def size(self, tensor: Tensor, dim: int) -> GraphSize:
        """The length of a dimension."""

    def multiply(self, a: GraphSize, b: GraphSize) -> GraphSize:
        """A product of two lengths."""

    def divide(self, a: GraphSize, b: int) -> GraphSize:
        """A length divided by a number that divides it."""

    def reshape(self, tensor: Tensor, sizes: Sequence[GraphSize]) -> Tensor:
        """The tensor in another shape."""

    def expand(self, tensor: Tensor, sizes: Sequence[GraphSize]) -> Tensor:
        """The tensor repeated along dimensions of size 1."""

    def permute(self, tensor: Tensor, dims: Sequence[int]) -> Tensor:
        """The tensor with its dimensions in another order."""


class FxWriter:
    """Writes layout changes into an FX graph, at its insertion point.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph

    def size(self, tensor: torch.fx.Node, dim: int) -> torch.fx.Node:
        """The length of a dimension."""
        return self.graph.call_method("size", (tensor, dim))

    def multiply(self, a: GraphSize, b: GraphSize) -> torch.fx.Node:
        """A product of two lengths."""
        return self.graph.call_function(operator.mul, (a, b))

    def divide(self, a: GraphSize, b: int) -> torch.fx.Node:
        """A length divided by a number that divides it."""
        return self.graph.call_function(operator.floordiv, (a, b))

    def reshape(self, tensor: torch.fx.Node, sizes: Sequence[GraphSize]) -> torch.fx.Node:
        """The tensor in another shape."""
        return self.graph.call_method("reshape", (tensor, list(sizes)))

    def expand(self, tensor: torch.fx.Node, sizes: Sequence[GraphSize]) -> torch.fx.Node:
        """The tensor repeated along dimensions of size 1."""
        return self.graph.call_method("expand", (tensor, list(sizes)))

    def permute(self, tensor: torch.fx.Node, dims: Sequence[int]) -> torch.fx.Node:
        """The tensor with its dimensions in another order."""
        return self.graph.call_method("permute", (tensor, list(dims)))


class Relayout:
    """Emits reshapes, expands and permutes, and knows the size of every atom of a site.

    Args:
        writer: Writes into the graph.
        tensors: Tensors of the site with their axes: symbolic sizes are read off them.
    """

    def __init__(self, writer: LayoutWriter, tensors: Sequence[tuple[Tensor, Axes]]) -> None:
        self.writer = writer
        self._tensors = [(tensor, [leaves(axis) for axis in axes]) for tensor, axes in tensors]
        self._sizes: dict[Atom, GraphSize] = {}

    def size(self, atom: Atom) -> GraphSize:
        """Length of an atom, as a number or as a value of the graph."""
        if isinstance(atom.size, int):
            return atom.size
        if atom not in self._sizes:
            self._sizes[atom] = self._read_size(atom)
        return self._sizes[atom]

    def _read_size(self, atom: Atom) -> GraphSize:
        for tensor, axes in self._tensors:
            for dim, axis in enumerate(axes):
                others = [a for a in axis if a is not atom]
                if len(others) < len(axis) and all(isinstance(a.size, int) for a in others):
                    whole = self.writer.size(tensor, dim)
                    known = 1
                    for other in others:
                        known *= int(other.size)
                    return whole if known == 1 else self.writer.divide(whole, known)
        raise LookupError(f"no tensor of the site shows the size {atom.size}")

    def product(self, atoms: Sequence[Atom]) -> GraphSize:
        """Length of an axis made of several atoms."""
        known: int = 1
        symbolic: GraphSize = None
        for atom in atoms:
            size = self.size(atom)
            if isinstance(size, int):
                known *= size
            else:
                symbolic = size if symbolic is None else self.writer.multiply(symbolic, size)
        if symbolic is None:
            return known
        return symbolic if known == 1 else self.writer.multiply(symbolic, known)

    def emit(self, tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
        """Re-lays a tensor.

        Args:
            tensor: The tensor.
            axes: The axes it has.
            wanted: The axes it is to have, one group a dimension. Atoms it lacks are broadcast.

        Returns:
            The re-laid tensor; the tensor itself when nothing is to be done.
        """
        have = [leaves(axis) for axis in axes]
        target = [leaves(axis) for axis in wanted]
        if have == target:
            return tensor
        flat = [atom for axis in have for atom in axis]
        order = [atom for group in target for atom in group]
        x = tensor
        if any(len(axis) != 1 for axis in have):
            x = self._reshape(x, [[atom] for atom in flat])
        missing = [atom for atom in order if atom not in flat]
        if missing:
            x = self.writer.reshape(x, [1] * len(missing) + [self.size(a) for a in flat])
            flat = missing + flat
            x = self.writer.expand(x, [self.size(atom) for atom in flat])
        permutation = [flat.index(atom) for atom in order]
        if permutation != list(range(len(flat))):
            x = self.writer.permute(x, permutation)
        if any(len(group) != 1 for group in target):
            x = self._reshape(x, target)
        return x

    def _reshape(self, tensor: Tensor, groups: Axes) -> Tensor:
        return self.writer.reshape(tensor, [self.product(group) for group in groups])
