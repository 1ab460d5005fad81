"""In-place operations of a Dynamo graph: removed where that is safe, marked where it is not.

``s.masked_fill_(m, c)`` leaves later readers of ``s`` pointing at the node from before the mask: a matcher
that believes the edges loses the mask. Here ``x.op_()`` becomes ``y = x.op()`` and later readers of ``x``
read ``y``, when ``x`` is a temporary and nothing else that shares its storage is read afterwards. Otherwise
the operation stays and every node that shares the storage is returned as tainted. Which nodes share storage
is read off the fake tensors Dynamo ran.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor

from fastattn_compile.passes.functional_form import (
    HARMLESS,
    FunctionalCall,
    functional_form,
    scatter_form,
)
from fastattn_compile.passes.fx_meta import example, fake_call, same_sizes, tensors
from fastattn_compile.passes.fx_view import has_meaning
from fastattn_compile.passes.fx_vocabulary import canonical_name, is_in_place, target_name, words


def functionalize(gm: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Removes in-place operations from a graph where the result is bitwise the same.

    Args:
        gm: A Dynamo graph; changed in place and recompiled.

    Returns:
        The tainted nodes: those whose storage something that was left in the graph may change, and what
            changes it.
    """
    return _Functionalizer(gm).run()


def erase_dead(gm: torch.fx.GraphModule) -> int:
    """Removes nodes whose results nobody reads, never one that does something besides giving a result.

    Only calls that are known to be pure go. Dropout is one of them: its removal changes which random numbers
    the rest of the graph draws, not their distribution, and keeping it would keep the attention weights it
    was applied to.

    Args:
        gm: A graph; changed in place and recompiled.

    Returns:
        How many nodes were removed.
    """
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and _is_pure(node):
            gm.graph.erase_node(node)
            erased += 1
    if erased:
        gm.recompile()
    return erased


# Besides what the view knows.
_PURE = words(
    "size dim numel sym_size mean std var cos sin rsqrt silu gelu softplus erf log2 log1p floor ceil round "
    "sign any all argmax argmin topk sort isinf isnan isfinite nan_to_num logsumexp outer gather roll flip "
    "pad diagonal unfold as_strided layer_norm native_layer_norm rms_norm group_norm bucketize searchsorted "
    "empty new_empty empty_like"
)


def _is_pure(node: torch.fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or is_in_place(node) or "out" in node.kwargs:
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target.name() == "flex_attention"
    name, known = target_name(node)
    if not known or "assert" in name or (node.op == "call_method" and not hasattr(torch.Tensor, name)):
        return False
    if node.target is getattr:
        return True
    return has_meaning(node) or canonical_name(node) in _PURE


def storage_key(value: Any) -> int | None:
    """Identity of the storage of a fake tensor, ``None`` for what has none."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse and nested tensors
        return None


def _arguments(value: Any) -> Iterator[torch.fx.Node]:
    """The nodes in an argument."""
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(value, found.append)
    return iter(found)


class _Functionalizer:
    """Works on one graph; ``groups`` are the storages, by a union of what may share one."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: position for position, node in enumerate(gm.graph.nodes)}
        self.parent: dict[Any, Any] = {}
        self.keys: dict[torch.fx.Node, list[Any]] = {}
        self.grad_mode: dict[torch.fx.Node, Any] = {}
        self.members: dict[Any, set[torch.fx.Node]] = defaultdict(set)
        self.trial: list[torch.fx.Node] = []  # nodes of a replacement under way
        mode: Any = None
        for node in gm.graph.nodes:
            self.keys[node] = self._storages(node)
            if node.target is torch._C._set_grad_enabled:
                mode = node.args[0]
            self.grad_mode[node] = mode
        for node, keys in self.keys.items():
            for key in keys:
                self.members[self._find(key)].add(node)

    def run(self) -> set[torch.fx.Node]:
        tainted: set[torch.fx.Node] = set()
        changed = False
        for node in list(self.gm.graph.nodes):
            written = list(self._written(node))
            if not written:
                continue
            if (
                len(written) == 1
                and not (tainted & self._group(written[0]))
                and self._replace(node, written[0])
            ):
                changed = True
                continue
            tainted.add(node)
            for target in written:
                tainted |= self._group(target)
        if changed:
            self.gm.graph.lint()
            self.gm.recompile()
        return {node for node in tainted if node in self.order}

    # ---- what shares storage

    def _find(self, key: Any) -> Any:
        while key in self.parent:
            key = self.parent[key]
        return key

    def _storages(self, node: torch.fx.Node) -> list[Any]:
        """Storages a node's result lives in, united with those of its operands where fakes cannot tell."""
        found = list(tensors(example(node)))
        keys: list[Any] = [key for tensor in found if (key := storage_key(tensor)) is not None]
        unknown = "example_value" not in node.meta and "val" not in node.meta
        silent = node.op in ("output", "placeholder") or node.target is operator.setitem
        blind = len(keys) < len(found) or (unknown and not silent)
        if blind or _may_return_its_input(node):
            keys = keys or [node]
            for operand in node.all_input_nodes:
                for key in self.keys.get(operand, []):
                    a, b = self._find(keys[0]), self._find(key)
                    if a != b:
                        self.parent[a] = b
        return keys

    def _group(self, node: torch.fx.Node) -> set[torch.fx.Node]:
        """The nodes that may share storage with a node, itself included."""
        return {node}.union(*(self.members[self._find(key)] for key in self.keys.get(node, [])))

    # ---- what is written

    def _written(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        """The operands a node changes."""
        if node.op == "call_module":
            return
        if "out" in node.kwargs:
            yield from _arguments(node.kwargs["out"])
        if node.target is operator.setitem and isinstance(node.args[0], torch.fx.Node):
            yield node.args[0]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            if _body_writes(self.gm, node):
                yield from (x for x in node.all_input_nodes if self.keys.get(x))
        elif isinstance(node.target, torch._ops.OpOverload):
            for position, argument in enumerate(node.target._schema.arguments):
                if (
                    argument.alias_info is not None
                    and argument.alias_info.is_write
                    and argument.name != "out"
                ):
                    given = (
                        node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    )
                    yield from _arguments(given)
        elif is_in_place(node) and node.args and target_name(node)[0] not in HARMLESS:
            yield from _arguments(node.args[0])

    # ---- replacing

    def _replace(self, node: torch.fx.Node, target: torch.fx.Node) -> bool:
        """Puts the functional form in the place of an in-place call; false when the result could differ."""
        before, old = self.order[node], example(target)
        group = self._group(target)
        outside = any(member.op in ("placeholder", "get_attr") for member in group)
        if outside or not isinstance(old, FakeTensor):
            return False
        others = group - {target, node}
        live = [m for m in others if self.order[m] < before and any(self.order[u] > before for u in m.users)]
        whole = target.args[0] if target.op == "call_function" and target.args else None
        if live and live != [whole]:
            return False  # another view of the storage is read later
        for changed in (target, *live):
            requires_grad = getattr(example(changed), "requires_grad", False)
            if requires_grad and self.grad_mode[changed] != self.grad_mode[node]:
                return False  # under no_grad a value changes without its history
        with self.gm.graph.inserting_before(node):
            new = self._call(functional_form(node, target), node, target, None if live else old)
            if new is not None and example(new).dtype != old.dtype:
                # An in-place call keeps the type of what it changes.
                new = self._call(("to", (new, old.dtype), {}), node, target)
            filled = None
            if new is not None and live:
                # A slice was changed, and so what it is a slice of; who reads the slice reads it anew.
                filled = self._call(scatter_form(target, new), node, live[0], example(live[0]))
                again: FunctionalCall = (operator.getitem, (filled, *target.args[1:]), {})
                new = self._call(again, node, target, old) if filled is not None else None
        trial, self.trial = self.trial, []
        if new is None:
            for attempt in reversed(trial):
                self._forget(attempt)
            return False
        if filled is not None:
            self._read_instead(live[0], filled, before)
        node.replace_all_uses_with(new)
        self._read_instead(target, new, before)
        self._forget(node)
        return True

    def _read_instead(self, old: torch.fx.Node, new: torch.fx.Node, after: int) -> None:
        """Lets the readers of a node after a position read another."""
        for user in list(old.users):
            if self.order[user] > after:
                user.replace_input_with(old, new)

    def _forget(self, node: torch.fx.Node) -> None:
        for key in self.keys.pop(node):
            self.members[self._find(key)].discard(node)
        del self.order[node]
        self.gm.graph.erase_node(node)

    def _call(
        self, form: FunctionalCall | None, like: torch.fx.Node, target: torch.fx.Node, layout: Any = None
    ) -> torch.fx.Node | None:
        """Inserts a call in the place of ``like``.

        Args:
            form: The call.
            like: The in-place call it stands for.
            target: The node whose storage its result takes the place of.
            layout: A tensor whose sizes and strides the result must have.

        Returns:
            The node; ``None`` when the call cannot be run or gives another layout.
        """
        if form is None:
            return None
        try:
            value = fake_call(*form, example(target).fake_mode)
        except Exception:  # whatever it is, the operation stays as it was
            return None
        if not isinstance(value, torch.Tensor) or (layout is not None and not _same_layout(value, layout)):
            return None
        call, args, kwargs = form
        create = self.gm.graph.call_method if isinstance(call, str) else self.gm.graph.call_function
        new = create(call, args, kwargs)
        new.meta = {**like.meta, "example_value": value}
        self.trial.append(new)
        self.order[new], self.grad_mode[new] = self.order[like], self.grad_mode[like]
        # Later views were made of the old storage as far as the fakes know: the new node belongs to them.
        self.keys[new] = self.keys[target]
        for key in self.keys[new]:
            self.members[self._find(key)].add(new)
        return new


def _may_return_its_input(node: torch.fx.Node) -> bool:
    """Functions whose fakes are fresh though the real call may hand its input through, and unknown
    functions."""
    if node.op == "call_module":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    name, known = target_name(node)
    return not known or "dropout" in name


def _body_writes(gm: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a body of a higher-order operator holds an in-place operation, or cannot be looked into."""
    name = node.target.name()  # type: ignore[union-attr]
    if "mutation" in name or "auto_functionalized" in name:
        return True
    for operand in node.all_input_nodes:
        if operand.op != "get_attr":
            continue
        body = getattr(gm, str(operand.target), None)
        if isinstance(body, torch.fx.GraphModule):
            for inner in body.graph.nodes:
                higher = isinstance(inner.target, torch._ops.HigherOrderOperator)
                writes = is_in_place(inner) and target_name(inner)[0] not in HARMLESS
                if writes or inner.target is operator.setitem or "out" in inner.kwargs:
                    return True
                if higher and _body_writes(body, inner):
                    return True
    return False


def _same_layout(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Same sizes and strides: whatever view is taken of the old tensor can be taken of the new one."""
    return (
        new.device == old.device
        and same_sizes(new.shape, old.shape)
        and same_sizes(new.stride(), old.stride())
    )
