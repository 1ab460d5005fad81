"""The ONNX bodies by operator name."""

from __future__ import annotations

from fastattn_compile.lowering.onnx import (
    barnes_hut,
    cast,
    conv_basis,
    exact,
    fma,
    fma_grid,
    linformer,
    per_head,
    tree_coarse,
    tree_leaf,
    window,
)
from fastattn_compile.lowering.onnx.body import Body, BodySpec, computed
from fastattn_compile.operators.base import Operator, Support, no

_BODIES = {
    "exact": exact.BODY,
    "fma": fma.BODY,
    "window": window.BODY,
    "linformer": linformer.BODY,
    "tf_attention": tree_leaf.BODY,
    "tc_attention": tree_coarse.BODY,
    "barnes_hut": barnes_hut.BODY,
    "cast": cast.BODY,
    "conv_basis": conv_basis.BODY,
    "per_head": per_head.BODY,
}


def body_of(operator: Operator) -> Body | None:
    """The body of an operator, ``None`` when it has none."""
    if operator.name == "fma" and operator.config.grid is not None:
        return fma_grid.BODY
    if operator.name == "fma" and operator.config.rotary_base:
        return fma.ROTARY_BODY
    return _BODIES.get(operator.name)


def supported(operator: Operator, spec: BodySpec) -> Support:
    """Whether an operator can be said in ONNX at a site."""
    body = body_of(operator)
    if body is None:
        return no(f"{operator.name} has no ONNX body yet; operators that have one: {', '.join(_BODIES)}")
    if spec.mask.segments:
        return no("packed documents cannot be said in ONNX yet")
    return body.supports(operator, computed(spec))
