"""PyTorch models that call our operators, exported: each call becomes the node, with its body, that a conversion writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
import torch

from fastattn_compile.errors import ConversionError
from fastattn_compile.lowering.onnx.body import DOMAIN, DOMAIN_VERSION, BodySpec
from fastattn_compile.lowering.onnx.function import function, node_attributes, node_inputs
from fastattn_compile.lowering.onnx.registry import body_of, supported
from fastattn_compile.lowering.onnx.writer import attribute
from fastattn_compile.operators.base import Operator
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import operator_from_token, operator_names

_CALL = "Call"  # what a call is in the graph until the exporter is done
_FIRST_IR_WITH_OVERLOADS = 10
_FURTHER = 12  # more than any operator has learned parameters


def export(
    module: torch.nn.Module, args: tuple[Any, ...], longest: int = 8192, **options: Any
) -> onnx.ModelProto:
    """``torch.onnx.export(dynamo=True)`` of a model that calls our operators.

    Args:
        module: The model.
        args: Example inputs.
        longest: Longest sequence the exported model must serve where the length is free.
        options: Of ``torch.onnx.export``, for example ``dynamic_shapes`` and ``opset_version``.

    Returns:
        The model; its calls are nodes of the domain ``fastattn`` with a function beside them.

    Raises:
        ConversionError: A call cannot be said in ONNX: it has a bias or packed documents, or its operator has no body for
            the site.
    """
    table = {torch_op(name): _call for name in operator_names()}
    table.update(options.pop("custom_translation_table", None) or {})
    with _schema():
        try:
            program = torch.onnx.export(
                module, args, dynamo=True, custom_translation_table=table, **{"verbose": False, **options}
            )
        except Exception as error:  # the exporter wraps what a translation raises
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ConversionError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from error
    if program is None:
        raise ConversionError("the exporter gave no model")
    _settle(program.model, longest)
    proto: onnx.ModelProto = ir.to_proto(program.model)
    return proto


def _call(
    query: Any, key: Any, value: Any, key_padding: Any, segments: Any, bias: Any, parameters: Any, scale: float, mask: str,
    config: str, site: str,
) -> Any:  # fmt: skip
    """One call as a node that still carries all it was told."""
    import onnxscript

    for what, given in (("segments", segments), ("bias", bias)):
        if given is not None:
            raise ConversionError(f"{site or 'a call'} has {what}, which cannot be said in ONNX yet")
    inputs = [query, key, value, *([] if key_padding is None else [key_padding]), *parameters]
    told = {"scale_exact": repr(float(scale)), "mask": mask, "config": config, "site": site}
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), _CALL)(*inputs, **told)


@contextlib.contextmanager
def _schema() -> Iterator[None]:
    """The exporter emits no node whose operator has no schema."""
    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    real = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    made = schema(
        _CALL, DOMAIN, DOMAIN_VERSION,
        inputs=[
            *(parameter(name, "T") for name in ("query", "key", "value")),
            # Padding where the mask has it, and learned parameters; the exporter does not understand variadic inputs.
            *(parameter(f"further_{i}", f"P{i}", param_option=optional) for i in range(_FURTHER)),
        ],
        outputs=[parameter("output", "T"), parameter("log_sum_exp", "S")],
        type_constraints=[
            ("T", real, ""), ("S", ["tensor(float)", "tensor(double)"], ""),
            *((f"P{i}", [*real, "tensor(bool)"], "") for i in range(_FURTHER)),
        ],
        attributes=[
            schema.Attribute(name, schema.AttrType.STRING, required=True)
            for name in ("scale_exact", "mask", "config", "site")
        ],
    )  # fmt: skip
    onnx.defs.register_schema(made)
    try:
        yield
    finally:
        onnx.defs.deregister_schema(_CALL, DOMAIN_VERSION, DOMAIN)


def _settle(model: ir.Model, longest: int) -> None:
    """Calls become nodes of their operators, and the functions come into the model."""
    functions: dict[tuple[str, BodySpec], ir.Function] = {}
    opset = model.opset_imports[""]
    for number, node in enumerate([n for n in model.graph if n.domain == DOMAIN and n.op_type == _CALL]):
        told = {name: node.attributes[name].as_string() for name in ("scale_exact", "mask", "config", "site")}
        operator = operator_from_token(told["config"])
        spec = _spec(node, float(told["scale_exact"]), MaskStructure.parse(told["mask"]), opset, longest)
        made = _function(operator, spec, told["site"], functions)
        body = body_of(operator)
        if body is None:
            raise ConversionError(f"{operator.name} has no ONNX body")
        if node.outputs[1].uses() or node.outputs[1].is_graph_output():
            raise ConversionError(
                f"{told['site'] or 'a call'}: its log-sum-exp is used, which the ONNX node does not give"
            )
        old, (query, key, value, *further) = node.outputs[0], node.inputs
        padding = further.pop(0) if spec.mask.key_padding else None
        new = ir.Node(
            DOMAIN, made.name, node_inputs([query, key, value], padding, further),
            [attribute(k, v) for k, v in node_attributes(operator, spec, body).items()],
            overload=made.overload, name=f"fastattn_{number}_{body.op_type}",
        )  # fmt: skip
        new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = old.name, old.type, old.shape
        new.metadata_props.update(node.metadata_props)
        new.metadata_props.update({"fastattn.site": told["site"], "fastattn.config": told["config"]})
        model.graph.insert_before(node, new)
        old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    for made in functions.values():
        model.functions[made.identifier()] = made
    if any(made.overload for made in functions.values()):
        model.ir_version = max(model.ir_version, _FIRST_IR_WITH_OVERLOADS)
    if functions:
        model.opset_imports[DOMAIN] = model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION


def _function(
    operator: Operator, spec: BodySpec, site: str, functions: dict[tuple[str, BodySpec], ir.Function]
) -> ir.Function:
    key = (operator.token, spec)
    if key not in functions:
        support = supported(operator, spec)
        if not support:
            raise ConversionError(f"{site or 'a call'} cannot be said in ONNX: {support.reason}")
        same = sum(1 for (token, _) in functions if operator_from_token(token).name == operator.name)
        functions[key] = function(operator, spec, f"v{same + 1}" if same else "")
    return functions[key]


def _spec(node: ir.Node, scale: float, mask: MaskStructure, opset: int, longest: int) -> BodySpec:
    shapes = [x.shape if x is not None else None for x in node.inputs[:3]]
    sizes = [None if shape is None else shape[at] for shape, at in zip((*shapes, shapes[2]), (1, 1, 3, 3))]
    sizes[2] = None if shapes[0] is None else shapes[0][3]
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    if dtype is None or not all(isinstance(size, int) for size in sizes):
        raise ConversionError(f"{node.name}: heads and channels must be numbers, got {sizes} of type {dtype}")
    heads, kv_heads, head_dim, value_dim = (int(size) for size in sizes)  # type: ignore[arg-type]
    length = shapes[1][2] if shapes[1] is not None else None
    return BodySpec(
        heads,
        kv_heads,
        head_dim,
        value_dim,
        scale,
        mask,
        dtype,
        opset,
        length if isinstance(length, int) else longest,
    )
