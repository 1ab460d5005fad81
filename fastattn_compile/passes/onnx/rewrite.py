"""Replacing the sites of an ONNX graph by nodes of our domain with a body. All or nothing per site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch

from fastattn_compile.lowering.onnx.body import DOMAIN, DOMAIN_VERSION, BodySpec
from fastattn_compile.lowering.onnx.function import function, node_attributes, node_inputs
from fastattn_compile.lowering.onnx.registry import body_of, supported
from fastattn_compile.lowering.onnx.writer import OnnxWriter
from fastattn_compile.operators.base import Operator, SiteSpec, Support, no
from fastattn_compile.passes.axes import Axes, leaves
from fastattn_compile.passes.contraction import Operand
from fastattn_compile.passes.mask_structure import emit
from fastattn_compile.passes.onnx.facts import FactWriter
from fastattn_compile.passes.onnx.quantised import is_quantised, parameters, real, real_output, stored
from fastattn_compile.passes.onnx.unfold import take_over
from fastattn_compile.passes.relayout import Relayout
from fastattn_compile.passes.site import Site

_DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}  # fmt: skip
# Overloads tell functions of one name apart; models of an older version can hold one body of each operator.
_OVERLOADS_FROM = 10


@dataclass(frozen=True)
class Replacement:
    """A site and what is to serve it.

    Args:
        site: The site.
        operator: Its operator.
        longest: Tokens of the longest sequence that will come; the site's own length where it is a number.
        parameters: Learned parameters, in the operator's order; they become initialisers of the model.
    """

    site: Site
    operator: Operator
    longest: int
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def settled(self) -> SiteSpec:
        """The site at its longest, so that an operator can compare lengths with numbers."""
        spec = self.site.spec
        if isinstance(spec.key_len, int):
            return spec
        query_len = self.longest if spec.query_len == spec.key_len else spec.query_len
        return dataclasses.replace(spec, query_len=query_len, key_len=self.longest)

    def body_spec(self, opset: int) -> BodySpec | None:
        """What the body is written for, ``None`` when a size it needs is not a number."""
        spec = self.site.spec
        sizes = (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim)
        dtype = _DTYPES.get(spec.dtype)
        if dtype is None or not all(isinstance(size, int) for size in sizes):
            return None
        longest = spec.key_len if isinstance(spec.key_len, int) else self.longest
        return BodySpec(*sizes, self.site.scale, spec.mask, dtype, opset, longest)


def can_replace(replacement: Replacement, opset: int) -> Support:
    """Whether a site of an ONNX graph can be served by an operator.

    Args:
        replacement: The site and the operator.
        opset: Version of the standard operators in the model.
    """
    site = replacement.site
    given = (site.query.origin, site.key.origin, site.value.origin, site.out)
    strange = [x.name for x in given if not isinstance(x.origin, ir.Value)]
    if strange:
        return no(f"a fused node would have to be taken apart to reach {strange[0]}")
    values = [x.origin for x in given]
    for value in values[:3]:
        if is_quantised(value) and parameters(value) is None:
            return no(f"nothing says what the integers of {value.name} stand for")
    if real_output(values[3]) is None:
        return no(
            f"the product with the values, {values[3].name}, is not scaled back to real numbers by itself"
        )
    if opset < 13:
        return no(
            f"the bodies need opset 13 or later, the model has {opset}; raise it with onnx.version_converter first"
        )
    spec = replacement.body_spec(opset)
    if spec is None:
        return no(f"heads and channels must be numbers, and the type a real one: {site.spec}")
    if site.factors:
        return no("the ONNX bodies take no scale of the scores that is a tensor")
    if site.spec.bias != "none":
        return no(f"the ONNX bodies add no bias to the scores ({site.spec.bias})")
    support = replacement.operator.supports(replacement.settled())
    return supported(replacement.operator, spec) if support else support


@dataclass(frozen=True)
class Placed:
    """A node that was written.

    Args:
        site: Its site.
        output: What it gives, in the layout of the site's own output.
        original: The output it stands for.
        inputs: What it reads, in canonical layout: query, key, value, and key padding where there is any.
    """

    site: Site
    output: ir.Value
    original: ir.Value
    inputs: tuple[ir.Value, ...] = ()


def rewrite(model: ir.Model, replacements: Sequence[Replacement], *, replace: bool = True) -> list[Placed]:
    """Writes the nodes into a model, in place.

    Args:
        model: The model the sites were found in.
        replacements: In execution order; ``can_replace`` said yes to each.
        replace: Let the new nodes take over. Without it they stand beside the old ones and read the same tensors: so
            the error of an operator by itself is measured.

    Returns:
        What was written, one for each replacement.
    """
    functions: dict[tuple[Any, ...], ir.Function] = {}
    placed = []
    for number, replacement in enumerate(replacements):
        placed.append(_write(model, replacement, number, functions))
    for made in functions.values():
        model.functions[made.identifier()] = made
    if any(made.overload for made in functions.values()):
        model.ir_version = max(model.ir_version, _OVERLOADS_FROM)
    if placed:
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    if replace:
        for item in placed:
            name = item.original.name
            take_over(item.original)
            item.original.replace_all_uses_with(item.output, replace_graph_outputs=True)
            if item.output.is_graph_output():
                item.original.name, item.output.name = f"{name}_exact", name
        ir_passes.RemoveUnusedNodesPass()(model)
    return placed


def _write(
    model: ir.Model, replacement: Replacement, number: int, functions: dict[tuple[Any, ...], ir.Function]
) -> Placed:
    site, opset = replacement.site, model.opset_imports[""]
    spec = replacement.body_spec(opset)
    body = body_of(replacement.operator)
    if spec is None or body is None:
        raise ValueError(f"{site.name} cannot be replaced; ask can_replace first")
    key = (replacement.operator.token, spec)
    if key not in functions:
        same = sum(1 for made in functions.values() if made.name == body.op_type)
        functions[key] = function(replacement.operator, spec, f"v{same + 1}" if same else "")
    original = real_output(site.out.origin)
    producer = original.producer() if original is not None else None
    if original is None or producer is None or producer.graph is None:
        raise ValueError(f"{site.name}: the output of the attention is no node of the graph")
    writer = OnnxWriter(spec.dtype, f"fastattn_{number}_")
    groups = site.groups
    operands = (site.query, site.key, site.value)
    layout = Relayout(writer, [(x.origin.origin, x.origin_axes) for x in operands])
    kept = [atom for atom in leaves(groups.heads) if atom not in leaves(groups.repeated)]

    def canonical(operand: Operand, heads: Axes, length: Axes, channels: Axes) -> ir.Value:
        wanted = [groups.batch, *heads, *length, *channels]
        given = real(writer, operand.origin.origin)
        value: ir.Value = layout.emit(given, operand.origin_axes, wanted)
        return _typed(value, spec.dtype)

    inputs = [
        canonical(site.query, [groups.heads], [groups.query], [groups.channels]),
        canonical(site.key, [kept], [groups.key], [groups.channels]),
        canonical(site.value, [kept], [groups.key], [groups.value_channels]),
    ]
    padding = _padding(writer, layout, site) if site.mask.key_padding is not None else None
    learned = _initialisers(model, replacement, number)
    made = functions[key]
    output = writer.op(
        made.name, *node_inputs(inputs, padding, learned), domain=DOMAIN,
        **node_attributes(replacement.operator, spec, body),
    )  # fmt: skip
    node = output.producer()
    node.overload = made.overload
    node.name = f"fastattn_{number}_{body.op_type}"
    node.metadata_props["fastattn.site"] = site.name
    node.metadata_props["fastattn.config"] = replacement.operator.token
    batch = _dimension(site.query.origin.origin, site)
    output.shape = ir.Shape([batch, spec.heads, None, spec.value_dim])
    output.type = ir.TensorType(spec.dtype)
    inner = [groups.batch, groups.heads, groups.query, groups.value_channels]
    result = stored(writer, layout.emit(output, inner, site.out_axes), original)
    result.type, result.shape = original.type, original.shape
    producer.graph.insert_before(producer, writer.nodes)
    return Placed(site, result, original, (*inputs, *([] if padding is None else [padding])))


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.type is None:
        value.type = ir.TensorType(dtype)
    return value


def _initialisers(model: ir.Model, replacement: Replacement, number: int) -> list[ir.Value]:
    """The learned parameters as weights of the model."""
    wanted = replacement.operator.parameter_shapes(replacement.settled())
    got = {name: tuple(value.shape) for name, value in replacement.parameters.items()}
    if list(got) != list(wanted):
        raise ValueError(
            f"{replacement.site.name}: {replacement.operator} has parameters {wanted}, got {got}"
        )
    made = []
    for name, value in replacement.parameters.items():
        tensor = ir.tensor(value.detach().cpu().numpy(), name=f"fastattn_{number}_{name}")
        initialiser = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(value.shape),
            const_value=tensor,
        )
        model.graph.register_initializer(initialiser)
        made.append(initialiser)
    return made


def _dimension(query: ir.Value, site: Site) -> int | None:
    batch = site.spec.batch
    return batch if isinstance(batch, int) else None


def _padding(writer: OnnxWriter, layout: Relayout, site: Site) -> ir.Value:
    """Which keys are tokens, ``(batch, keys)`` boolean."""
    facts = FactWriter(writer)
    batch, keys = leaves(site.groups.batch), leaves(site.groups.key)
    expression = site.mask.key_padding
    if expression is None:
        raise ValueError(f"{site.name} has no key padding")
    found: ir.Value = emit(
        expression, ("batch", "key"), (layout.product(batch), layout.product(keys)), torch.device("cpu"), facts,
        lambda node: facts.load(node.origin),
    )  # fmt: skip
    return _typed(found, ir.DataType.BOOL)
