"""From where a mask meets the scores to the axes that masks are understood in: batch, head, query, key."""

from __future__ import annotations

from fastattn_compile.passes.axes import Atom, Axis, leaves, length
from fastattn_compile.passes.expression import Expression, add, axis, constant, floordiv, mod, mul
from fastattn_compile.passes.graph import Node, Size
from fastattn_compile.passes.mask_structure import MaskTerm
from fastattn_compile.passes.scores import ScoreTerm
from fastattn_compile.passes.site import Groups

ROLES = ("batch", "head", "query", "key")


def axes_by_role(groups: Groups) -> dict[str, Axis]:
    """The four axes of the scores of an attention."""
    return dict(zip(ROLES, (groups.batch, groups.heads, groups.query, groups.key)))


def canonical_terms(terms: list[ScoreTerm], groups: Groups) -> list[MaskTerm]:
    """Says of every dimension of every mask which index of batch, head, query and key it is.

    Args:
        terms: Masks and biases with the axes of the scores where they meet them.
        groups: The axes by role.
    """
    index = _atom_indices(groups)
    return [
        MaskTerm(term.node, term.role, term.fill, _dims(term.node, term.axes, index), term.factor)
        for term in terms
    ]


def _atom_indices(groups: Groups) -> dict[Atom, Expression]:
    """The index along each atom, as a formula of the four axes."""
    indices: dict[Atom, Expression] = {}
    for role, group in axes_by_role(groups).items():
        atoms = leaves(group)
        whole = axis(role, length(atoms))
        inner: Size = 1
        for atom in reversed(atoms):
            outer = floordiv(whole, constant(inner)) if inner != 1 else whole
            indices[atom] = mod(outer, constant(atom.size)) if len(atoms) > 1 else outer
            inner = inner * atom.size
    return indices


def _dims(node: Node, axes: list[Axis], index: dict[Atom, Expression]) -> tuple[Expression, ...]:
    """The index of each dimension of a tensor that is broadcast against scores with these axes."""
    shape = node.shape or ()
    result: list[Expression] = []
    for size, met in zip(shape, axes[len(axes) - len(shape) :]):
        total: Expression = constant(0)
        if size != 1:
            stride: Size = 1
            for atom in reversed(leaves(met)):
                total = add(total, mul(index[atom], constant(stride)))
                stride = stride * atom.size
        result.append(total)
    return tuple(result)
