"""Which modules of which model a captured graph is the code of.

Where Dynamo breaks a graph it compiles the modules below the break one by one, each from a frame of its own. Such a graph
spells its modules from that frame on (``attn`` for ``blocks.3.attn``), and Dynamo calls it for every module that looks the
same. What the graph lacks the call stack of the compilation has: the modules that are being called, the outermost of
which is the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch.fx
from torch import nn

from fastattn_compile.passes.names import join_paths, module_root, plain_path

# Of every compilation (a call of ``torch.compile``): name to the codes, and which of their graphs, that have sites of this
# name, in the order of their first compilation, and how many each has.
_numbered: WeakKeyDictionary[Any, dict[str, dict[tuple[CodeType, int], int]]] = WeakKeyDictionary()
# Of every frame that is being compiled: how many graphs it has come in so far.
_parts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_PART = "fastattn_part"


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo made a graph of.

    Args:
        compilation: The object behind one ``torch.compile``.
        code: The frame's code; a continuation after a graph break has its own.
        modules: How the graph spells them (``L['self']``) to the modules among the frame's variables.
        own: Spelling of the module whose method the frame is, ``""`` when it is none.
        paths: Identity of every module of the compiled one to its paths there; empty when that is not known.
        within: Path of the compiled module in the model.
        part: Which of the frame's graphs this is: DDP's optimizer cuts one into several, by buckets of parameters.
    """

    compilation: Any
    code: CodeType
    modules: Mapping[str, nn.Module]
    own: str
    paths: Mapping[int, tuple[str, ...]] = field(repr=False)
    within: str = ""
    part: int = 0

    def path(self, spelling: str) -> str:
        """Path of a module of the frame in the compiled one, ``""`` for that itself or when unknown."""
        module = self.modules.get(spelling)
        return self.paths.get(id(module), ("",))[0] if module is not None else ""

    @property
    def inside(self) -> bool:
        """Whether the frame is of a module inside the model: its graph may be called several times a pass."""
        return any(self.path(spelling) for spelling in self.modules)

    def aliases(self, path: str) -> tuple[str, ...]:
        """All paths of the module at a path, from the root of the model."""
        for paths in self.paths.values():
            known = tuple(join_paths(self.within, known) for known in paths)
            if path in known:
                return known
        return (path,)

    def before(self, names: Sequence[str]) -> dict[str, int]:
        """How many sites of some names other graphs of the compilation have that were compiled before this one.

        Args:
            names: Names of this graph's sites before they are numbered.
        """
        counted = _numbered.setdefault(self.compilation, {})
        result = {}
        for name in dict.fromkeys(names):
            codes, own = counted.setdefault(name, {}), (self.code, self.part)
            codes[own] = names.count(name)
            result[name] = sum(list(codes.values())[: list(codes).index(own)])
        return result

    def bind(self) -> None:
        """Makes Dynamo use the graph for these modules alone: others that look the same get one of their own."""
        from torch._dynamo.guards import GuardBuilder, install_guard
        from torch._dynamo.source import GetItemSource, LocalSource

        free = self.code.co_freevars
        for spelling in self.modules:
            name = spelling[3 : spelling.index("]") - 1]
            source: Any = LocalSource(
                name,
                is_input=name not in free,
                is_derefed_cell_contents=name in (*free, *self.code.co_cellvars),
            )
            if spelling.endswith("[0]"):
                source = GetItemSource(source, 0)
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))

    def use_while(self, holds: Callable[[], bool], reason: str) -> None:
        """Makes Dynamo use the graph as long as a condition holds, and then compile the frame again.

        Args:
            holds: The condition, asked before every call.
            reason: What ``TORCH_LOGS=recompiles`` says where it does not.
        """
        from torch._dynamo.guards import install_guard
        from torch._dynamo.source import GlobalStateSource
        from torch._guards import Guard

        def create(builder: Any, guard: Guard) -> None:
            builder.add_python_lambda_leaf_guard_to_root(
                ["holds()"], [reason], closure_vars={"holds": holds}, is_epilogue=False
            )

        install_guard(Guard(GlobalStateSource(), create))


def current_frame(gm: torch.fx.GraphModule, within: str = "") -> Frame | None:
    """The frame that is being compiled, when a backend asks; ``None`` outside of a compilation by Dynamo.

    Args:
        gm: The graph that the backend was given, or a copy of it.
        within: Path of the compiled module in the model.
    """
    convert = sys.modules.get("torch._dynamo.convert_frame")
    if convert is None:
        return None
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return None
    compilation, called = _callers(str(convert.__file__))
    if compilation is None:
        return None
    variables = translator.f_locals
    modules = {f"L[{name!r}]": value for name, value in variables.items() if isinstance(value, nn.Module)}
    arguments = variables.get("args")
    if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], nn.Module):
        # A method behind a decorator.
        modules["L['args'][0]"] = arguments[0]
    own = next((name for name, module in modules.items() if called and module is called[0]), "")
    if _PART not in gm.meta:
        # Graphs of one frame share their dictionary.
        gm.meta = {**gm.meta, _PART: _parts.get(translator, 0)}
        _parts[translator] = gm.meta[_PART] + 1
    paths = _paths(called[-1]) if called else {}
    return Frame(compilation, translator.f_code, modules, own, paths, within, gm.meta[_PART])


def _callers(dynamo: str) -> tuple[Any, list[nn.Module]]:
    """The compilation that is running, and the modules whose methods it is in, innermost first."""
    from torch._dynamo.eval_frame import OptimizeContext

    called: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == dynamo:
            # What is inside is the compiler's work on the graph.
            called.clear()
        elif code.co_name == "compile_wrapper":
            owner = frame.f_locals.get("self")
            if isinstance(owner, OptimizeContext):
                return owner, called
        elif code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module):
                called.append(first)
        frame = frame.f_back  # type: ignore[assignment]
    return None, called


def _paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    found: dict[int, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[id(module)] = (*found.get(id(module), ()), plain_path(path))
    return found


def place(gm: torch.fx.GraphModule, frame: Frame | None, within: str = "") -> None:
    """Writes the modules of a graph's nodes as paths from the model's root, in place.

    Args:
        gm: A graph; nodes of the graphs inside it are written, too.
        frame: The frame it was made of.
        within: Path of the compiled module inside the model, for all nodes.
    """
    modules = frame.modules if frame is not None else {}
    inside = {spelling: frame.path(spelling) for spelling in modules} if frame is not None else {}
    if not within and not any(inside.values()):
        return
    owner = frame.own if frame is not None else ""
    own, here = modules.get(owner), join_paths(within, inside.get(owner, ""))
    for body in gm.modules():
        for node in body.graph.nodes if isinstance(body, torch.fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack") or {}
            if not stack and here:
                node.meta["nn_module_stack"] = {str(id(own)): (here, type(own))}
                continue
            written = {}
            for key, value in stack.items():
                spelled = str(value[0] if isinstance(value, (tuple, list)) else value)
                root, rest = module_root(spelled)
                path = join_paths(within, inside.get(root, ""), rest)
                written[key] = (path, *value[1:]) if isinstance(value, (tuple, list)) else path
            node.meta["nn_module_stack"] = written
