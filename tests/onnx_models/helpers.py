"""Small ONNX models: one attention node with its body, attention written out, exports of torch modules."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

import fastattn_compile as fa
from fastattn_compile.converting.source import prepare
from fastattn_compile.lowering.onnx.body import DOMAIN, BodySpec
from fastattn_compile.lowering.onnx.function import function, node_attributes, node_inputs
from fastattn_compile.lowering.onnx.registry import body_of, supported
from fastattn_compile.lowering.onnx.writer import attribute
from fastattn_compile.operators.base import AttentionInputs, Operator
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.onnx.rewrite import Replacement, can_replace, rewrite


def attention_model(
    operator: Operator,
    spec: BodySpec,
    layers: int = 1,
    parameters: tuple[torch.Tensor, ...] = (),
    length: int | None = None,
) -> onnx.ModelProto:
    """Inputs query, key, value[, key_padding], of any length where it is not given; learned parameters are initialisers;
    output of one attention node, or of several in a row.
    """
    assert supported(operator, spec), supported(operator, spec).reason
    body, real, n = body_of(operator), ir.TensorType(spec.dtype), length or "n"
    sizes = {
        "query": (spec.heads, spec.head_dim), "key": (spec.kv_heads, spec.head_dim),
        "value": (spec.kv_heads, spec.value_dim),
    }  # fmt: skip
    inputs = [
        ir.Value(name=name, type=real, shape=ir.Shape(["batch", heads, n, channels]))
        for name, (heads, channels) in sizes.items()
    ]
    if spec.mask.key_padding:
        boolean = ir.TensorType(ir.DataType.BOOL)
        inputs.append(ir.Value(name="key_padding", type=boolean, shape=ir.Shape(["batch", n])))
    learned = []
    for name, value in zip(operator.parameter_shapes(spec.site()), parameters, strict=True):
        # numpy has no bfloat16; float32 says the same numbers
        wide = value.float() if value.dtype == torch.bfloat16 else value
        tensor = ir.tensor(wide.numpy(), name=name)
        learned.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    attributes = [attribute(k, v) for k, v in node_attributes(operator, spec, body).items()]
    query, nodes, padding = inputs[0], [], inputs[3] if spec.mask.key_padding else None
    for layer in range(layers):
        nodes.append(
            ir.Node(
                DOMAIN,
                body.op_type,
                node_inputs([query, *inputs[1:3]], padding, learned),
                attributes,
                name=f"attention_{layer}",
            )
        )
        query = nodes[-1].outputs[0]
        query.name = f"out_{layer}"
    query.type, query.shape = real, ir.Shape(["batch", spec.heads, n, spec.value_dim])
    graph = ir.Graph(
        inputs,
        [query],
        nodes=nodes,
        initializers=learned,
        opset_imports={"": spec.opset, DOMAIN: 1},
        name="attention",
    )
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function(operator, spec)]))


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, by ONNX Runtime with nothing of ours installed in it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return made.run(None, feeds)


_NUMBERS = {torch.bfloat16: onnx.TensorProto.BFLOAT16, torch.bool: np.bool_}


def native_session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session in which our kernels run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return fa.onnx.session(model.SerializeToString(), options)


def run_native(model: onnx.ModelProto, inputs: AttentionInputs) -> torch.Tensor:
    """The output of an ``attention_model`` by our kernels, in any type."""
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.key_padding is not None:
        given["key_padding"] = inputs.key_padding
    made = native_session(model)
    if inputs.query.dtype != torch.bfloat16:
        return torch.from_numpy(made.run(None, {k: v.numpy() for k, v in given.items()})[0])
    binding = made.io_binding()  # numpy has no bfloat16
    for name, tensor in given.items():
        of = _NUMBERS[tensor.dtype]
        binding.bind_input(name, "cpu", 0, of, tuple(tensor.shape), tensor.contiguous().data_ptr())
    out = torch.empty(*inputs.query.shape[:3], inputs.value.shape[3], dtype=torch.bfloat16)
    binding.bind_output("out_0", "cpu", 0, _NUMBERS[torch.bfloat16], tuple(out.shape), out.data_ptr())
    made.run_with_iobinding(binding)
    return out


def exact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ``exact`` in place of its one attention."""
    prepared = prepare(model)
    (line,) = prepared.softmaxes
    assert line.site is not None, line.reason
    replacement = Replacement(line.site, make_operator("exact"), 64)
    support = can_replace(replacement, prepared.opset)
    assert support, support.reason
    rewrite(prepared.model, [replacement])
    prepared.forget_inferred()
    return ir.to_proto(prepared.model)


def export(
    module: torch.nn.Module,
    *inputs: Any,
    dynamo: bool = True,
    opset: int = 18,
    names: tuple[str, ...] = ("x",),
) -> onnx.ModelProto:
    """An export with free batch and length (first two dimensions)."""
    buffer = io.BytesIO()
    if dynamo:
        batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=1 << 14)
        shapes = tuple({0: batch, 1: length} for _ in inputs)
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=list(names),
            verbose=False,
        )  # fmt: skip
        return program.model_proto
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        module.eval(),
        inputs,
        buffer,
        dynamo=False,
        opset_version=opset,
        dynamic_axes=axes,
        input_names=list(names),
    )
    return onnx.load_from_string(buffer.getvalue())


class Attention(torch.nn.Module):
    """Self-attention with projections: eager or SDPA, causal or not, with a key padding mask or not, grouped heads."""

    def __init__(
        self,
        *,
        fused: bool,
        causal: bool,
        padded: bool = False,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
    ):
        super().__init__()
        self.fused, self.causal, self.padded = fused, causal, padded
        self.heads, self.kv_heads, self.head_dim = 4, 2, 8
        width = 32
        self.q = torch.nn.Linear(width, width)
        self.k, self.v = (torch.nn.Linear(width, 16) for _ in range(2))
        self.o = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape

        def split(y: torch.Tensor, heads: int) -> torch.Tensor:
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        q, k, v = (
            split(self.q(x), self.heads),
            split(self.k(x), self.kv_heads),
            split(self.v(x), self.kv_heads),
        )
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        seen = mask[:, None, None, :] != 0 if self.padded else None
        if self.fused:
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=self.causal
            )
        else:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
            if self.causal:
                future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            if seen is not None:
                scores = scores.masked_fill(~seen, -1e9)
            y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))
