"""Configurations of tree attention: what the paper leaves open is a field, with its proposed default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastattn_compile.kernels.aten.treeformer_route import Estimator
from fastattn_compile.kernels.rotary import check_base
from fastattn_compile.operators.base import OperatorConfig

MAX_HEIGHT = 16


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choices: {', '.join(allowed)}")


def _at_least(name: str, value: Any, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class TreeConfig(OperatorConfig):
    """What both forms of tree attention can be told.

    Args:
        height: Levels of decisions; a tree has ``2^height`` leaves. 0 is no tree: softmax attention, or the
            plain mean.
        n_trees: Trees of a head.
        shared: Queries and keys go through the same planes (the paper). When false, queries have planes of
            their own over the same nodes: queries and keys of trained models are distributed differently.
        estimator: Gradient of the hard decisions: ``"soft"``, the product of sigmoids along the path
            (specification 6a); ``"sum"``, a sum over the decisions (6b).
        surrogate: Derivative of one decision under ``"sum"``: ``"clip"``, 1 where ``|z| <= 1``;
            ``"sigmoid"``.
        beta: Steepness of the sigmoids; commonly raised from 1 to 10 in training.
        init: Start of the planes from calibration data: ``"pca"``, median splits along the principal
            direction of a node's keys; ``"kmeans"``, between two means; ``"random"``, median splits along
            random directions. Trees after the first see a random half of the channels. Without data planes
            are random, with offset 0.
        rotary_base: Base of the rotary embedding that is undone before routing (pairs of channels ``i``, ``i
            + d / 2``, positions counted over real tokens). 0 routes the vectors as they come.
        seed: Of the random start.
    """

    height: int = 6
    n_trees: int = 1
    shared: bool = True
    estimator: str = "soft"
    surrogate: str = "clip"
    beta: float = 1.0
    init: str = "pca"
    rotary_base: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.height <= MAX_HEIGHT:
            raise ValueError(
                f"height must be between 0 and {MAX_HEIGHT} (and at most log2 of the number of keys), "
                f"got {self.height}"
            )
        _at_least("n_trees", self.n_trees, 1)
        _one_of("estimator", self.estimator, ("soft", "sum"))
        _one_of("surrogate", self.surrogate, ("clip", "sigmoid"))
        _one_of("init", self.init, ("pca", "kmeans", "random"))
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be a positive number, got {self.beta}")
        check_base(self.rotary_base)

    @property
    def leaves(self) -> int:
        """Leaves of a tree."""
        return 1 << self.height

    def straight_through(self) -> Estimator:
        """The estimator as the kernels take it."""
        return Estimator(self.estimator, self.surrogate, self.beta)


@dataclass(frozen=True, kw_only=True)
class TfConfig(TreeConfig):
    """What leaf attention (``tf_attention``) can be told, besides ``TreeConfig``.

    A query's own membership in its leaf gets no gradient from softmax over that leaf alone (specification 6);
    hence ``query_gradient``. The other remedies are ``mass_loss`` and training ``tc_attention`` first with
    the same planes.

    Args:
        fallback: What a query meets whose leaf shows it no key: ``"ancestor"``, the keys of the deepest node
            above that has any; ``"zero"``, nothing; ``"self+window"``, itself and tokens within
            ``fallback_window``.
        fallback_window: Tokens of that window.
        window: Keys less than this many positions away are met exactly in any case. A trained model needs
            some.
        sinks: First real tokens of a sequence that are met exactly in any case.
        combine: Several trees: ``"union"``, one softmax over the keys of all leaves, each key once;
            ``"mean"``, the mean of the trees' outputs, without a log-sum-exp (it is NaN).
        query_gradient: Gradient of the queries' planes: ``"gate"``, the output is multiplied by the soft mass
            of the leaf over its own value; ``"sibling"``, the sibling leaf is met too, both weighted by the
            soft last decision, which changes the output; ``"none"``.
        capacity: A leaf gives a query at most ``ceil(capacity * keys / leaves)`` keys; 0 is no limit. Bounds
            the work of unbalanced trees.
        overflow: Which keys a full leaf drops: ``"oldest"``, of what the query sees; ``"margin"``, those
            nearest to a plane (not with causal masks: it needs the whole sequence).
    """

    fallback: str = "ancestor"
    fallback_window: int = 32
    window: int = 0
    sinks: int = 0
    combine: str = "union"
    query_gradient: str = "gate"
    capacity: float = 0.0
    overflow: str = "oldest"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("fallback", self.fallback, ("ancestor", "zero", "self+window"))
        _one_of("combine", self.combine, ("union", "mean"))
        _one_of("query_gradient", self.query_gradient, ("gate", "sibling", "none"))
        _one_of("overflow", self.overflow, ("oldest", "margin"))
        _at_least("fallback_window", self.fallback_window, 1)
        _at_least("window", self.window, 0)
        _at_least("sinks", self.sinks, 0)
        if not (self.capacity >= 0 and math.isfinite(self.capacity)):
            raise ValueError(f"capacity must be 0 (no limit) or a positive factor, got {self.capacity}")
        if self.query_gradient == "sibling" and self.height < 1:
            raise ValueError("query_gradient='sibling' needs a tree with at least one decision, got height=0")
        if self.query_gradient == "sibling" and self.capacity:
            raise ValueError(
                "query_gradient='sibling' and a capacity do not go together: a capacity is of one leaf"
            )

    def keys_of_leaf(self, keys: int) -> int:
        """Most keys a leaf gives a query; 0 is no limit."""
        return math.ceil(self.capacity * keys / self.leaves) if self.capacity else 0


@dataclass(frozen=True, kw_only=True)
class TcConfig(TreeConfig):
    """What coarse tree attention (``tc_attention``) can be told, besides ``TreeConfig``.

    Args:
        include_root: The mean of all visible values is level 0 of every path.
        level_weights: ``"free"``, learned numbers; ``"softmax"``, the softmax over the levels of learned
            numbers plus the logarithm of the node's count, over the number of trees.
    """

    include_root: bool = True
    level_weights: str = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("level_weights", self.level_weights, ("free", "softmax"))
        if not self.include_root and self.height < 1:
            raise ValueError("include_root=False needs a tree with at least one decision, got height=0")
