"""What the finder says: a site with everything a rewrite needs, and one line for every softmax of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastattn_compile.operators.base import SiteSpec
from fastattn_compile.passes.axes import Atom, Axes
from fastattn_compile.passes.contraction import Operand
from fastattn_compile.passes.expression import Expression
from fastattn_compile.passes.graph import Node
from fastattn_compile.passes.mask_structure import MaskAnalysis

TAKEN, EXACT, NOT_ATTENTION = "taken", "exact", "not_attention"


@dataclass(frozen=True)
class Groups:
    """The axes of an attention by role, each a list of atoms, outermost first.

    Args:
        batch: Sequences.
        heads: Axes of the heads that keys or values have.
        repeated: Axes of the heads that only queries have (grouped-query attention); inside ``heads``.
        query: Positions of the queries.
        key: Positions of the keys.
        channels: What queries and keys are contracted over.
        value_channels: Channels of the values.
    """

    batch: list[Atom]
    heads: list[Atom]
    repeated: list[Atom]
    query: list[Atom]
    key: list[Atom]
    channels: list[Atom]
    value_channels: list[Atom]


@dataclass(frozen=True)
class Factor:
    """A tensor that multiplies scores and does not vary with both query and key.

    Args:
        side: ``"query"`` or ``"key"``: which of the two takes it.
        formula: Its value, over batch, head and that axis.
        power: 1 or -1.
    """

    side: str
    formula: Expression
    power: int


@dataclass(frozen=True)
class Site:
    """One softmax attention of a graph, canonicalised.

    Args:
        name: Module path, with an ordinal where a module has several.
        node: The softmax, or the fused operator.
        query: Queries, traced to their origin.
        key: Keys, traced to before any repetition over heads.
        value: Values, likewise.
        groups: Roles of the axes.
        scale: Factor on the scores.
        mask: What the mask is.
        out: The product with the values: what a rewrite replaces.
        out_axes: Axes of ``out``.
        spec: The site as operators see it.
        factors: Further factors on the scores, tensors.
        held: Constants whose values are part of what was read of the mask and the factors.
    """

    name: str
    node: Node
    query: Operand
    key: Operand
    value: Operand
    groups: Groups
    scale: float
    mask: MaskAnalysis
    out: Node
    out_axes: Axes
    spec: SiteSpec
    factors: tuple[Factor, ...] = ()
    held: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Softmax:
    """One line of a scan: a softmax of the graph and what became of it.

    Args:
        name: Name of the site.
        status: ``taken``, ``exact`` or ``not_attention``.
        reason: Why; empty for ``taken``.
        source: ``file:line`` that made it.
        kind: ``"self"``, ``"cross"`` or ``""``.
        mask: Text of the mask structure, ``""`` when not attention.
        heads: Query heads, 0 when not attention. Symbolic sizes are given by their hint.
        kv_heads: Key heads.
        head_dim: Channels of a head.
        site: What a rewrite needs; ``None`` where the graph cannot be rewritten.
        node: The softmax in the view of its graph.
        checked: The mask's structure was found in the values of the first batch, and is checked on every later one.
    """

    name: str
    status: str
    reason: str
    source: str
    kind: str = ""
    mask: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    site: Site | None = field(default=None, repr=False, compare=False)
    node: Node | None = field(default=None, repr=False, compare=False)
    checked: bool = False
