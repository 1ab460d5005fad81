"""ONNX files of a model: what exporters write of it, and what optimisers and quantisers make of that.

Exporting takes seconds and is done once: files stay in a folder, by name. What fails is remembered there too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from zoo import Entry

Feeds = Mapping[str, np.ndarray]
# name -> (torch.export, opset)
EXPORTERS: Mapping[str, tuple[bool, int]] = {
    "dynamo 18": (True, 18), "dynamo 23": (True, 23), "legacy 17": (False, 17),
    "dynamo 20": (True, 20), "dynamo 24": (True, 24), "legacy 14": (False, 14),
}  # fmt: skip
FUSED = frozenset({
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention", "QAttention",
    "DecoderMaskedMultiHeadAttention", "SparseAttention", "RelativePositionBiasAttention", "GatedRelativePositionBias",
})  # fmt: skip
_AXES = {
    "input_ids": "length", "attention_mask": "length", "decoder_input_ids": "decoder_length",
    "pixel_values": None, "input_features": None,
}  # fmt: skip


class First(nn.Module):
    """A model called by position that gives its first output alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.model(**dict(zip(self.names, inputs)))
        if isinstance(out, Tensor):
            return out
        first: Tensor = next(iter(out.values())) if hasattr(out, "values") else out[0]
        return first


def built(entry: Entry, implementation: str) -> tuple[First, dict[str, Tensor]]:
    """The model, always the same one, and its inputs."""
    torch.manual_seed(0)
    model = entry.build(implementation).eval()
    torch.manual_seed(1)
    inputs = {k: v for k, v in entry.inputs(entry.masked is not None).items() if v is not None}
    return First(model, tuple(inputs)), inputs


def exported(entry: Entry, implementation: str, exporter: str, dtype: torch.dtype, path: Path) -> None:
    """Exports a model, with free batch and lengths where it has them, and leaves the file at ``path``."""
    model, inputs = built(entry, implementation)
    model = model.to(dtype)
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs.values())
    dynamo, opset = EXPORTERS[exporter]
    free = {
        name: {0: "batch"} | ({1: _AXES[name]} if _AXES[name] else {}) for name in inputs if name in _AXES
    }
    common: dict[str, Any] = {"opset_version": opset, "input_names": list(inputs), "output_names": ["out"]}
    with torch.no_grad():
        if dynamo:
            shapes = [
                dict.fromkeys(free[name], torch.export.Dim.DYNAMIC) if name in free else {} for name in inputs
            ]
            program = torch.onnx.export(
                model,
                given,
                dynamo=True,
                dynamic_shapes=(tuple(shapes),),
                verbose=False,
                optimize=True,
                **common,
            )
            program.save(str(path))
            return
        was = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the older exporter does not know what it calls
        try:
            torch.onnx.export(model, given, str(path), dynamo=False, dynamic_axes=free, **common)
        finally:
            torch.backends.mha.set_fastpath_enabled(was)


def session(path: Path | bytes, save: Path | None = None, level: str = "ORT_ENABLE_EXTENDED") -> Any:
    """A session of one thread; what the runtime optimised goes to ``save``."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if save is not None:
        options.optimized_model_filepath = str(save)
    given = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(path: Path | bytes, feeds: Feeds) -> np.ndarray:
    """The first output, in float64."""
    made = session(path)
    wanted = {x.name: x.type for x in made.get_inputs()}
    cast = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    given = {
        name: array.astype(cast.get(wanted[name], array.dtype)) if array.dtype.kind == "f" else array
        for name, array in feeds.items()
        if name in wanted
    }
    first: np.ndarray = made.run(None, given)[0]
    return first.astype(np.float64)


def fused_nodes(path: Path) -> int:
    """Nodes that are a whole attention, in the file and its branches."""

    def count(graph: onnx.GraphProto) -> int:
        inner = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
        return sum(node.op_type in FUSED for node in graph.node) + sum(map(count, inner))

    model = onnx.load(str(path), load_external_data=False)
    called = {node.op_type for node in model.graph.node}
    return count(model.graph) + sum(
        node.op_type in FUSED for f in model.functions if f.name in called for node in f.node
    )


# ---- what is made of an exported file


class _Once:
    """Calibration data: the inputs, once."""

    def __init__(self, feeds: Feeds) -> None:
        self.left = [dict(feeds)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def _model_type(name: str) -> str:
    known = {
        "gpt2": "gpt2", "t5": "t5", "bart": "bart", "vit": "vit", "swin": "swin", "clip_vision": "clip",
        "clip_text": "clip", "whisper": "bart", "qwen3": "qwen3",
    }  # fmt: skip
    return known.get(name, "bert")


def float16(source: Path, target: Path, feeds: Feeds, name: str) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(source))
    # Shapes that were written as strings of several symbols stop its own inference; the file has its shapes.
    made = convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=bool(model.graph.value_info)
    )
    onnx.save(made, str(target))


def optimizer(source: Path, target: Path, feeds: Feeds, name: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(source), model_type=_model_type(name), num_heads=0, hidden_size=0, opt_level=0)
    made.save_model_to_file(str(target))


def optimised_session(source: Path, target: Path, feeds: Feeds, name: str) -> None:
    session(source, save=target)


def slim(source: Path, target: Path, feeds: Feeds, name: str) -> None:
    import onnxslim

    made = onnxslim.slim(onnx.load(str(source)))
    onnx.save(made, str(target))


def _static(form: str) -> Callable[[Path, Path, Feeds, str], None]:
    def quantise(source: Path, target: Path, feeds: Feeds, name: str) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            str(source), str(target), _Once(feeds), quant_format=getattr(QuantFormat, form),
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip

    return quantise


def _dynamic(**options: Any) -> Callable[[Path, Path, Feeds, str], None]:
    def quantise(source: Path, target: Path, feeds: Feeds, name: str) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(source), str(target), extra_options=options)

    return quantise


VARIANTS: Mapping[str, Callable[[Path, Path, Feeds, str], None]] = {
    "fp16": float16, "ORT optimizer": optimizer, "ORT session": optimised_session, "onnxslim": slim,
    "QDQ": _static("QDQ"), "QOperator": _static("QOperator"), "dynamic int8": _dynamic(),
    "dynamic int8, all products": _dynamic(MatMulConstBOnly=False),
}  # fmt: skip
# Exported from a model of this type, not converted afterwards.
TYPES = {"bf16 export": torch.bfloat16, "fp16 export": torch.float16}


class Files:
    """Files by model, implementation, exporter and variant, each made once.

    Args:
        folder: Where they stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, entry: Entry, implementation: str, exporter: str, variant: str, feeds: Feeds) -> Path:
        """The file.

        Raises:
            RuntimeError: The exporter or the tool cannot make it; the text says what it said.
        """
        path = self.folder / (
            re.sub(r"[^A-Za-z0-9]+", "_", f"{entry.name}-{implementation}-{exporter}-{variant}") + ".onnx"
        )
        failure = path.with_suffix(".failed")
        if failure.exists():
            raise RuntimeError(failure.read_text(encoding="utf-8"))
        if not path.exists():
            beside = path.with_suffix(f".{os.getpid()}.onnx")
            try:
                if variant in ("plain", *TYPES):
                    exported(entry, implementation, exporter, TYPES.get(variant, torch.float32), beside)
                else:
                    source = self.path(entry, implementation, exporter, "plain", feeds)
                    VARIANTS[variant](source, beside, feeds, entry.name)
                beside.rename(path)
            except Exception as error:  # exporters and tools fail in their own ways, and the table says so
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failure.write_text(text, encoding="utf-8")
                raise RuntimeError(text) from error
        return path
