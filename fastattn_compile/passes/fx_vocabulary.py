"""What an FX node calls, in one spelling: names, argument names, in-place forms, operators, methods, modules.

``read_call`` turns any node that calls something into a ``Call``: a canonical name and arguments by canonical
names. The rules in ``fx_rules`` and ``fx_layout`` then say what the call computes; they never see how it was
spelled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.fx

from fastattn_compile.passes.fx_meta import example


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


# Canonical name -> the other names it goes by. In-place forms (``add_``, ``iadd``, ``__iadd__``) need no
# entry.
_NAMES: Mapping[str, str] = {
    "sub": "subtract",
    "mul": "multiply",
    "div": "truediv true_divide divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "neg": "negative",
    "abs": "absolute",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not inv",
    "le": "less_equal",
    "lt": "less",
    "ge": "greater_equal",
    "gt": "greater",
    "ne": "not_equal",
    "clamp": "clip hardtanh",
    "softmax": "_softmax _safe_softmax special_softmax",
    "log_softmax": "_log_softmax special_log_softmax",
    "sigmoid": "special_expit expit",
    "matmul": "mm bmm mv dot linalg_matmul",
    "cast": "to _to_copy type type_as float half bfloat16 double bool long int short char byte cuda cpu "
    "convert_element_type",
    "identity": "contiguous clone detach alias lift lift_fresh lift_fresh_copy positive requires_grad "
    "pin_memory data resolve_conj resolve_neg wait_tensor",
    "view": "reshape view_as reshape_as flatten unflatten ravel squeeze unsqueeze view_copy squeeze_copy "
    "unsqueeze_copy _unsafe_view _reshape_alias _reshape_copy",
    "transpose": "swapaxes swapdims transpose_copy",
    "permute": "permute_copy",
    "mT": "adjoint mH",
    "T": "H numpy_T",
    "t": "t_copy",
    "movedim": "moveaxis",
    "expand": "expand_as broadcast_to expand_copy",
    "cat": "concat concatenate",
    "slice": "slice_copy",
    "select": "select_copy",
    "split": "split_with_sizes split_copy split_with_sizes_copy unsafe_split",
    "chunk": "unsafe_chunk",
    "unbind": "unbind_copy",
    "dropout": "native_dropout",
    "zeros": "new_zeros zeros_like zero",
    "ones": "new_ones ones_like",
    "full": "new_full full_like fill",
    "tensor": "scalar_tensor as_tensor asarray",
    "scaled_dot_product_attention": "_scaled_dot_product_attention_math "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable",
}
ALIASES: Mapping[str, str] = {other: name for name, others in _NAMES.items() for other in others.split()}

# Operators written with their operands exchanged.
_REVERSED = words("rsub rtruediv rdiv rpow rfloordiv rmod radd rmul rand ror rmatmul")
_INPLACE_OPERATORS = words(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift iconcat"
)

# Argument names of builtins, methods and operators, in order; ``*rest`` takes a list or the remaining
# arguments. A spelling has its own entry where its order differs from the canonical one.
_ELEMENTWISE = "x y"
_SIGNATURES: Mapping[str, str] = {
    "softmax": "x dim dtype",
    "log_softmax": "x dim dtype",
    "_masked_softmax": "x mask dim mask_type",
    "where": "condition x y",
    "Tensor.where": "x condition y",
    "masked_fill": "x mask value",
    "view": "x *shape",
    "permute": "x *dims",
    "transpose": "x dim0 dim1",
    "movedim": "x source destination",
    "expand": "x *sizes",
    "repeat": "x *repeats",
    "tile": "x *repeats",
    "repeat_interleave": "x repeats dim",
    "getitem": "x index",
    "slice": "x dim start end step",
    "narrow": "x dim start length",
    "select": "x dim index",
    "index_select": "x dim index",
    "index": "x indices",
    "chunk": "x chunks dim",
    "split": "x split_size dim",
    "tensor_split": "x indices_or_sections dim",
    "unbind": "x dim",
    "broadcast_tensors": "*tensors",
    "cat": "tensors dim",
    "stack": "tensors dim",
    "full": "size fill_value",
    "new_full": "x size fill_value",
    "full_like": "x fill_value",
    "fill": "x fill_value",
    "tensor": "data",
    "tril": "x diagonal",
    "triu": "x diagonal",
    "clamp": "x min max",
    "clamp_min": "x min",
    "clamp_max": "x max",
    "sum": "x dim keepdim",
    "amax": "x dim keepdim",
    "max": "x dim keepdim",
    "min": "x dim keepdim",
    "cumsum": "x dim",
    "diff": "x n dim prepend append",
    "dropout": "x p training",
    "linear": "x weight bias",
    "addmm": "base a b",
    "baddbmm": "base a b",
    "embedding": "weight indices",
    "iota": "length",
    "tensordot": "x y dims",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal",
    "flex_attention": "query key value score_mod block_mask scale kernel_options score_mod_buffers "
    "mask_mod_buffers",
    "size": "x dim",
}

# Argument names that differ between spellings of one operator.
_RENAMES: Mapping[str, str] = {
    **dict.fromkeys(("self", "input", "tensor"), "x"),
    **dict.fromkeys(("other", "mat2", "vec2", "vec", "exponent"), "y"),
    **dict.fromkeys(("split_size_or_sections", "split_sizes"), "split_size"),
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
    "attn_bias": "attn_mask",
    "train": "training",
    "min_val": "min",
    "max_val": "max",
}
_RENAMES_OF: Mapping[str, Mapping[str, str]] = {
    "addmm": {"x": "base", "mat1": "a", "y": "b"},
    "baddbmm": {"x": "base", "batch1": "a", "batch2": "b"},
    "embedding": {"x": "indices"},
    "full": {"value": "fill_value"},
    "cast": {"a": "x"},
    "tile": {"dims": "repeats"},
    "matmul": {"tensor": "y"},
    "tensor": {"s": "data", "obj": "data"},
    "tensordot": {"a": "x", "b": "y"},
}

# Modules that are one call, by class: canonical name and the arguments their attributes give.
_MODULES: Mapping[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    torch.nn.Softmax: ("softmax", lambda m: {"dim": m.dim}),
    torch.nn.LogSoftmax: ("log_softmax", lambda m: {"dim": m.dim}),
    torch.nn.Dropout: ("dropout", lambda m: {"p": m.p, "training": m.training}),
    torch.nn.Identity: ("identity", lambda m: {}),
    torch.nn.Tanh: ("tanh", lambda m: {}),
    torch.nn.Sigmoid: ("sigmoid", lambda m: {}),
    torch.nn.ReLU: ("relu", lambda m: {}),
    torch.nn.Flatten: ("view", lambda m: {}),
    torch.nn.Unflatten: ("view", lambda m: {}),
}

_TORCH_MODULES = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Call:
    """What a node calls.

    Args:
        name: Canonical name, the key of the rules; the original one when there is no alias.
        spelled: The name before aliases, without in-place marks.
        arguments: By canonical names. Operands are still what the reader of arguments made of them.
        in_place: It changes its first argument.
        swapped: Its two operands stand in exchanged order.
    """

    name: str
    spelled: str
    arguments: Mapping[str, Any]
    in_place: bool = False
    swapped: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, ``default`` when it is absent or ``None``."""
        value = self.arguments.get(name)
        return default if value is None else value


def target_name(node: torch.fx.Node) -> tuple[str, bool]:
    """The bare name of what a node calls, and whether it is torch's or Python's own."""
    target = node.target
    if node.op == "call_method":
        return str(target), True
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return (name, True) if namespace in ("aten", "prims") else (f"{namespace}.{name}", False)
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, name = target._qualified_op_name.split("::")
        return (name, True) if namespace in ("aten", "prims") else (f"{namespace}.{name}", False)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name(), True
    if target is getattr:
        return str(node.args[1]), True
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None) or "torch"
    known = module.split(".")[0] in _TORCH_MODULES
    return (name, True) if known else (f"{module}.{name}", False)


def is_in_place(node: torch.fx.Node) -> bool:
    """Whether a node is spelled as an operation that changes its first argument (``add_``,
    ``operator.iadd``)."""
    if node.op not in ("call_method", "call_function"):
        return False
    name, known = target_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if not known or node.target is getattr:
        return False
    given = bind_python(node) or {}
    if given.get("inplace") is True:
        # torch.nn.functional.relu(x, inplace=True); a dropout hands its input through when not training.
        return "dropout" not in name or given.get("training") is not False
    bare = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    if bare in _INPLACE_OPERATORS:
        return True
    own_operator = getattr(node.target, "__module__", None) in ("_operator", "operator")
    return name.endswith("_") and not name.endswith("__") and not own_operator


@dataclass(frozen=True)
class _Spelling:
    """A name taken apart: canonical, as written, in place, with exchanged operands."""

    name: str
    spelled: str
    in_place: bool
    swapped: bool


def _spelling(node: torch.fx.Node) -> _Spelling:
    raw, known = target_name(node)
    if not known:
        return _Spelling(raw, raw, is_in_place(node), False)
    in_place = is_in_place(node)
    name = _bare(raw)
    if in_place and name in _INPLACE_OPERATORS:
        name = name[1:]
    elif name.endswith("_"):
        name = name.rstrip("_")
    swapped = name in _REVERSED
    name = name[1:] if swapped else name
    return _Spelling(ALIASES.get(name, name), name, in_place, swapped)


def _bare(name: str) -> str:
    """A special method's name without its underscores."""
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def canonical_name(node: torch.fx.Node) -> str:
    """The canonical name of what a node calls."""
    return _spelling(node).name


def read_call(node: torch.fx.Node, convert: Callable[[Any], Any]) -> Call:
    """Reads what a node calls.

    Args:
        node: A ``call_function``, ``call_method`` or ``call_module`` node.
        convert: Turns an argument (a node, a number, a slice, nested lists of them) into what rules work on.

    Returns:
        The call. Its name is that of the target when the target is unknown.
    """
    if node.op == "call_module":
        return _module_call(node, convert)
    spelling = _spelling(node)
    own = _RENAMES_OF.get(spelling.name, {})
    arguments: dict[str, Any] = {}
    for key, value in bind_arguments(node).items():
        key = key if key in own else _RENAMES.get(key, key)
        arguments[own.get(key, key)] = convert(value)
    return Call(spelling.name, spelling.spelled, arguments, spelling.in_place, spelling.swapped)


def _module_call(node: torch.fx.Node, convert: Callable[[Any], Any]) -> Call:
    owner = node.graph.owning_module
    module = owner.get_submodule(str(node.target)) if owner is not None else None
    known = _MODULES.get(type(module))
    operands = {f"arg{i}": convert(a) for i, a in enumerate(node.args)}
    operands |= {k: convert(v) for k, v in node.kwargs.items()}
    if known is None or not operands:
        return Call(type(module).__name__, type(module).__name__, operands)
    name, attributes = known
    return Call(name, name, {"x": next(iter(operands.values())), **attributes(module)})


@lru_cache(maxsize=4096)
def _python_signature(function: FunctionType) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def bind_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Arguments by the names their callee gives them; ``argN`` for those without one.

    The names come from the schema of an ATen overload, the signature of a Python function, the table of this
    module, or the ATen operator of the same name.
    """
    target, kwargs = node.target, node.kwargs
    args = node.args[:1] if target is getattr else node.args
    if isinstance(target, torch._ops.OpOverload):
        return {**dict(zip(_schema_names(target), args)), **kwargs}
    if (named := bind_python(node)) is not None:
        return named
    spelling = _spelling(node)
    keys = [f"Tensor.{spelling.spelled}"] if node.op == "call_method" else []
    table = next((_SIGNATURES[k] for k in (*keys, spelling.spelled, spelling.name) if k in _SIGNATURES), None)
    names = table.split() if table else _aten_names(spelling.spelled)
    bound: dict[str, Any] = {}
    for position, parameter in enumerate(names):
        if position >= len(args):
            break
        if parameter.startswith("*"):
            rest = args[position:]
            packed = len(rest) == 1 and (isinstance(rest[0], (list, tuple)) or _is_size(rest[0]))
            bound[parameter[1:]] = rest[0] if packed else tuple(rest)
            break
        bound[parameter] = args[position]
    else:
        bound |= {f"arg{i}": a for i, a in enumerate(args) if i >= len(names)}
    return {**bound, **kwargs}


def bind_python(node: torch.fx.Node) -> dict[str, Any] | None:
    """Arguments by name of a call of a Python function, ``None`` for anything else."""
    signature = _python_signature(node.target) if isinstance(node.target, FunctionType) else None
    if signature is None:
        return None
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()):
        return None
    try:
        return dict(signature.bind(*node.args, **node.kwargs).arguments)
    except TypeError:
        return None


def _schema_names(overload: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in overload._schema.arguments]


@lru_cache(maxsize=1024)
def _aten_names(name: str) -> list[str]:
    """Argument names of the ATen operator of a name that has only one form."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overload = getattr(packet, "default", None)
    if not isinstance(overload, torch._ops.OpOverload):
        return _ELEMENTWISE.split()
    arguments = overload._schema.arguments
    # Some names also have a form for plain numbers.
    tensor = bool(arguments) and isinstance(arguments[0].type, torch.TensorType)
    return _schema_names(overload) if tensor else _ELEMENTWISE.split()


def _is_size(value: Any) -> bool:
    """Whether an argument is a node that holds a whole ``torch.Size``."""
    if not isinstance(value, torch.fx.Node):
        return False
    return isinstance(example(value), (tuple, list))
