"""Bringing a tensor of an FX graph from the layout it has to the one that is wanted, symbolic sizes included."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Union

import torch.fx

from fastattn_compile.passes.axes import Atom, Axes, leaves

GraphSize = Union[int, torch.fx.Node]


class Relayout:
    """Emits reshapes, expands and permutes before a node, and knows the size of every atom of a site.

    Args:
        graph: The graph to append to, at its insertion point.
        tensors: Tensors of the site with their axes: symbolic sizes are read off them.
    """

    def __init__(self, graph: torch.fx.Graph, tensors: Sequence[tuple[torch.fx.Node, Axes]]) -> None:
        self.graph = graph
        self._tensors = [(node, [leaves(axis) for axis in axes]) for node, axes in tensors]
        self._sizes: dict[Atom, GraphSize] = {}

    def size(self, atom: Atom) -> GraphSize:
        """Length of an atom, as a number or as a node of the graph."""
        if isinstance(atom.size, int):
            return atom.size
        if atom not in self._sizes:
            self._sizes[atom] = self._read_size(atom)
        return self._sizes[atom]

    def _read_size(self, atom: Atom) -> GraphSize:
        for node, axes in self._tensors:
            for dim, axis in enumerate(axes):
                others = [a for a in axis if a is not atom]
                if len(others) < len(axis) and all(isinstance(a.size, int) for a in others):
                    whole = self.graph.call_method("size", (node, dim))
                    known = 1
                    for other in others:
                        known *= int(other.size)
                    return (
                        whole if known == 1 else self.graph.call_function(operator.floordiv, (whole, known))
                    )
        raise LookupError(f"no tensor of the site shows the size {atom.size}")

    def product(self, atoms: Sequence[Atom]) -> GraphSize:
        """Length of an axis made of several atoms."""
        known: int = 1
        symbolic: torch.fx.Node | None = None
        for atom in atoms:
            size = self.size(atom)
            if isinstance(size, int):
                known *= size
            else:
                symbolic = (
                    size if symbolic is None else self.graph.call_function(operator.mul, (symbolic, size))
                )
        if symbolic is None:
            return known
        return symbolic if known == 1 else self.graph.call_function(operator.mul, (symbolic, known))

    def emit(self, tensor: torch.fx.Node, axes: Axes, wanted: Axes) -> torch.fx.Node:
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
            x = self.graph.call_method("reshape", (x, [1] * len(missing) + [self.size(a) for a in flat]))
            flat = missing + flat
            x = self.graph.call_method("expand", (x, [self.size(atom) for atom in flat]))
        permutation = [flat.index(atom) for atom in order]
        if permutation != list(range(len(flat))):
            x = self.graph.call_method("permute", (x, permutation))
        if any(len(group) != 1 for group in target):
            x = self._reshape(x, target)
        return x

    def _reshape(self, tensor: torch.fx.Node, groups: Axes) -> torch.fx.Node:
        return self.graph.call_method("reshape", (tensor, [self.product(group) for group in groups]))
