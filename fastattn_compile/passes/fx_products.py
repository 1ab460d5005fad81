"""What products and attentions mean. Rules as in ``fx_rules``."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import sympy

from fastattn_compile.passes.fx_rules import Meaning, Result, rank, rule
from fastattn_compile.passes.fx_vocabulary import Call
from fastattn_compile.passes.graph import Node


def _is_learned(node: Any) -> bool:
    """Whether an operand is computed from parameters and buffers alone."""
    if not isinstance(node, Node):
        return False
    work, seen = [node], {node}
    while work:
        current = work.pop()
        if current.kind == "input" or (
            current.kind not in ("parameter", "constant") and not current.operands
        ):
            return False
        for operand in current.operands:
            if operand not in seen:
                seen.add(operand)
                work.append(operand)
        if len(seen) > 32:  # a projection is near its weight
            return False
    return True


def _transposed(node: Node) -> Meaning:
    shape = node.shape
    swapped = None if shape is None else (*shape[:-2], shape[-1], shape[-2])
    dims = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2) if shape is not None else (1, 0)
    return Meaning("permute", (node,), {"dims": dims}, swapped, node.dtype)


@rule("matmul")
def _matmul(call: Call, result: Result) -> Meaning | None:
    operands = (call.get("x"), call.get("y"))
    return Meaning("matmul", operands[::-1] if call.swapped else operands)


@rule("linear")
def _linear(call: Call, result: Result) -> Meaning | None:
    x, weight, bias = call.get("x"), call.get("weight"), call.get("bias")
    if not isinstance(weight, Node) or weight.kind == "input" or _is_learned(weight):
        return Meaning("linear", (x, weight, bias))
    # A "weight" that was computed from the inputs: somebody multiplies activations this way.
    if rank(weight) != 2:
        return None
    product = ("matmul", (x, _transposed(weight)))
    if bias is None:
        return Meaning(*product)
    return Meaning("add", (Meaning(*product, {}, result.shape, result.dtype), bias))


@rule("addmm")
def _addmm(call: Call, result: Result) -> Meaning | None:
    base, a, b = (call.get(key) for key in ("base", "a", "b"))
    beta, alpha = call.get("beta", 1), call.get("alpha", 1)
    if beta == alpha == 1 and _is_learned(b):
        return Meaning("linear", (a, _transposed(b), base))
    return Meaning("baddbmm", (base, a, b), {"beta": beta, "alpha": alpha})


@rule("baddbmm")
def _baddbmm(call: Call, result: Result) -> Meaning | None:
    operands = tuple(call.get(key) for key in ("base", "a", "b"))
    return Meaning("baddbmm", operands, {"beta": call.get("beta", 1), "alpha": call.get("alpha", 1)})


def _letters(labels: Sequence[Any]) -> str:
    """Einsum's list form: 0..51 stand for A-Z and a-z."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if label is Ellipsis else alphabet[label] for label in labels)


def explicit_equation(equation: str) -> str:
    """An einsum equation without spaces and with its output written out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        out = ("..." if "..." in left else "") + "".join(
            c for c in sorted(set(letters)) if letters.count(c) == 1
        )
    return f"{left}->{out}"


@rule("einsum")
def _einsum(call: Call, result: Result) -> Meaning | None:
    given = list(call.arguments.values())
    if given and isinstance(given[0], str):
        equation, operands = given[0], given[1:]
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
    elif given and isinstance(given[0], Node):
        tail = given.pop() if len(given) % 2 else None
        operands = given[0::2]
        equation = ",".join(_letters(labels) for labels in given[1::2])
        equation += f"->{_letters(tail)}" if tail is not None else ""
    else:
        return None
    equation = explicit_equation(equation)
    left, _, out = equation.partition("->")
    if (
        len(operands) == 1
        and "." not in equation
        and len(set(left)) == len(left)
        and sorted(left) == sorted(out)
    ):
        return Meaning("permute", (operands[0],), {"dims": tuple(left.index(c) for c in out)})
    return Meaning("einsum", tuple(operands), {"equation": equation}) if len(operands) == 2 else None


@rule("tensordot")
def _tensordot(call: Call, result: Result) -> Meaning | None:
    x, y, dims = call.get("x"), call.get("y"), call.get("dims", 2)
    in_x, in_y = rank(x), rank(y)
    if in_x is None or in_y is None or call.get("out") is not None:
        return None
    if isinstance(dims, int):
        of_x, of_y = list(range(in_x - dims, in_x)), list(range(dims))
    elif (
        isinstance(dims, (tuple, list)) and len(dims) == 2 and all(isinstance(d, (tuple, list)) for d in dims)
    ):
        of_x, of_y = [d % in_x for d in dims[0]], [d % in_y for d in dims[1]]
    else:
        return None
    left = list(string.ascii_lowercase[:in_x])
    right = list(string.ascii_lowercase[in_x : in_x + in_y])
    for i, j in zip(of_x, of_y):
        right[j] = left[i]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return Meaning("einsum", (x, y), {"equation": f"{''.join(left)},{''.join(right)}->{''.join(out)}"})


# ---- attention


@rule("scaled_dot_product_attention")
def _sdpa(call: Call, result: Result) -> Meaning | None:
    query, key, value = call.get("query", call.get("x")), call.get("key"), call.get("value")
    scale = call.get("scale")
    if scale is None and rank(query):
        channels = query.shape[-1]
        scale = channels**-0.5 if isinstance(channels, int) else 1 / sympy.sqrt(channels)
    attributes = {
        "dropout": call.get("dropout_p", 0.0),
        "is_causal": call.get("is_causal", False),
        "scale": scale,
        "enable_gqa": bool(call.get("enable_gqa", False)),
    }
    return Meaning("sdpa", (query, key, value, call.get("attn_mask")), attributes)


@rule(
    "multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward",
    "_triton_multi_head_attention", "_triton_scaled_dot_attention",
)  # fmt: skip
def _mha(call: Call, result: Result) -> Meaning | None:
    operands = tuple(v for v in call.arguments.values() if isinstance(v, Node))
    return Meaning("mha", operands, {"target": call.name})


@rule("flex_attention")
def _flex_attention(call: Call, result: Result) -> Meaning | None:
    """Inputs are query, key, value; the two functions are graph modules, their captured tensors nodes."""
    block_mask = call.get("block_mask", ())
    last = block_mask[-1] if isinstance(block_mask, tuple) and block_mask else None
    attributes = {
        "scale": call.get("scale"),
        "score_mod": _subgraph(call.get("score_mod")),
        "mask_mod": _subgraph(last),
        "score_mod_buffers": call.get("score_mod_buffers", ()),
        "mask_mod_buffers": call.get("mask_mod_buffers", ()),
        "block_mask": tuple(x for x in block_mask if x is not last) if isinstance(block_mask, tuple) else (),
    }
    return Meaning("flex_attention", (call.get("query"), call.get("key"), call.get("value")), attributes)


def _subgraph(value: Any) -> Any:
    return value.attributes.get("value") if isinstance(value, Node) else value


@rule("embedding")
def _embedding(call: Call, result: Result) -> Meaning | None:
    return Meaning("embedding", (call.get("indices"), call.get("weight")))
