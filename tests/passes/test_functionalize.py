"""Removing in-place operations: bitwise the same, or left alone and said so."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture

from fastattn_compile.passes.functionalize import erase_dead, functionalize
from fastattn_compile.passes.fx_view import view

torch.set_num_threads(1)

Q, K, V = (torch.randn(4, 6) for _ in range(3))
HIDDEN = torch.ones(4, 4, dtype=torch.bool).triu(1)


def in_place(gm: torch.fx.GraphModule) -> list[str]:
    """Names of the calls that still change something."""
    calls = [n for n in gm.graph.nodes if n.op.startswith("call_")]
    names = [getattr(n.target, "__name__", str(n.target)).split(".")[0] for n in calls]
    flagged = [n.name for n in gm.graph.nodes if n.kwargs.get("inplace") is True or "out" in n.kwargs]
    flagged += [n.name for n in gm.graph.nodes if n.target is F.relu and n.args[1:] == (True,)]
    operators = ("setitem", "iadd", "imul", "isub", "__imul__")
    return [x for x in names if x in operators or (x.endswith("_") and not x.endswith("__"))] + flagged


def run(gm: torch.fx.GraphModule, inputs: list[Any]) -> list[torch.Tensor]:
    """Outputs, and the inputs afterwards."""
    fresh = copy.deepcopy(inputs)
    torch.manual_seed(0)
    return [*gm(*fresh), *(x for x in fresh if isinstance(x, torch.Tensor))]


def check(
    fn: Callable[..., Any], *args: Any, left: list[str], tainted: set[str], dynamic: bool = False
) -> torch.fx.GraphModule:
    """Functionalizes what Dynamo makes of a function; outputs and inputs must stay bitwise the same."""
    ((gm, inputs),) = capture(fn, *copy.deepcopy(args), dynamic=dynamic)
    inputs = [copy.deepcopy(x) for x in inputs]
    before = run(gm, inputs)
    assert in_place(gm), "the sample has nothing in place"
    found = {node.name for node in functionalize(gm)}
    gm.graph.lint()
    assert in_place(gm) == left
    assert found == tainted
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        assert node.op == "output" or left or isinstance(value, (torch.Tensor, tuple, int, torch.SymInt))
    erase_dead(gm)
    gm.graph.lint()
    assert in_place(gm) == left
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))
    return gm


@pytest.mark.parametrize("dynamic", [False, True])
def test_scores_masked_in_place(dynamic: bool) -> None:
    def attention(q: Any, k: Any, v: Any, hidden: Any) -> Any:
        scores = q @ k.transpose(-1, -2)
        scores *= 0.5
        scores.masked_fill_(hidden, float("-inf"))
        return scores.softmax(-1) @ v

    gm = check(attention, Q, K, V, HIDDEN, left=[], tainted=set(), dynamic=dynamic)
    (softmax,) = view(gm).of_kind("softmax")
    masked = softmax.inputs[0]
    assert masked.kind == "where" and masked.inputs[2].kind == "mul"


@pytest.mark.parametrize(
    "change",
    [
        lambda s, h: s.add_(1.0), lambda s, h: s.mul_(2).sub_(s.amax()), lambda s, h: torch.relu_(s),
        lambda s, h: F.relu(s, inplace=True), lambda s, h: F.relu(s, True),
        lambda s, h: operator.iadd(s, 1), lambda s, h: s.clamp_(min=0),
        lambda s, h: s.fill_(2.0), lambda s, h: s.zero_(), lambda s, h: s.copy_(h.float()),
        lambda s, h: s.exp_(),
        lambda s, h: s.__imul__(2.0), lambda s, h: s.tril_(),
        lambda s, h: F.dropout(s, 0.5, True, inplace=True),
        lambda s, h: s.masked_fill_(mask=h, value=3.0), lambda s, h: s.index_fill_(0, torch.tensor([1]), 5.0),
        lambda s, h: torch.ops.aten.add_.Tensor(s, h),
    ],
)  # fmt: skip
def test_spellings(change: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, hidden: Any) -> Any:
        scores = q @ k.mT
        change(scores, hidden)
        return scores.softmax(-1), scores + 1

    check(fn, Q, K, HIDDEN, left=[], tainted=set())


def test_masks_by_assignment() -> None:
    def fn(q: Any, k: Any, hidden: Any) -> Any:
        scores = q @ k.mT
        scores[hidden] = float("-inf")
        return scores.softmax(-1)

    gm = check(fn, Q, K, HIDDEN, left=[], tainted=set())
    assert [n.kind for n in view(gm).nodes][-3:-1] == ["where", "softmax"]


def test_the_type_of_what_is_changed_stays() -> None:
    def fn(q: Any, bias: Any) -> Any:
        scores = q @ q.mT
        scores += bias
        return scores

    gm = check(fn, Q.bfloat16(), torch.randn(4, 4), left=[], tainted=set())
    assert gm(Q.bfloat16(), torch.randn(4, 4))[0].dtype == torch.bfloat16


def test_views_made_after_the_change() -> None:
    def fn(q: Any, hidden: Any) -> Any:
        scores = (q @ q.mT).view(2, 2, 4)
        scores.masked_fill_(hidden.view(2, 2, 4), 0.0)
        flat = scores.view(4, 4)
        flat += 1
        return flat.transpose(0, 1).contiguous().view(-1)

    check(fn, Q, HIDDEN, left=[], tainted=set())


def test_a_view_that_lives_on() -> None:
    def fn(q: Any, hidden: Any) -> Any:
        scores = q @ q.mT
        rows = scores.view(2, 2, 4)
        scores.masked_fill_(hidden, -1.0)
        return scores.softmax(-1), rows * 2

    check(fn, Q, HIDDEN, left=["masked_fill_"], tainted={"scores", "rows", "masked_fill_"})


def test_a_slice_changed_and_the_whole_read() -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        part = scores[:, :2]
        part.add_(1.0)
        again = part * 3
        scores[1:].mul_(2.0)
        return scores * 2, again

    check(fn, Q, left=[], tainted=set())


def test_a_part_changed_and_the_whole_read() -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        scores[:2, :2].add_(1.0)
        return scores * 2

    check(fn, Q, left=["add_"], tainted={"scores", "getitem", "add_"})


def test_a_slice_changed_and_another_read() -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        row = scores[0]
        scores[:, :2].add_(1.0)
        return scores * 2, row * 2

    check(fn, Q, left=["add_"], tainted={"scores", "getitem_1", "row", "add_"})


def test_identities_may_be_the_same_tensor() -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        same = F.dropout(scores.contiguous().to(torch.float32), 0.1, training=False)
        scores.add_(1.0)
        return scores, same * 2

    ((gm, inputs),) = capture(fn, Q)
    before = run(gm, inputs)
    tainted = {n.name for n in functionalize(gm)}
    assert in_place(gm) == ["add_"] and {"scores", "same", "add_"} <= tainted
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))


def test_inputs_keep_their_changes() -> None:
    def fn(x: Any) -> Any:
        y = x.view(-1)
        y.add_(1.0)
        return x * 2

    check(fn, Q, left=["add_"], tainted={"l_x_", "y", "add_"})


def test_inputs_that_share_storage() -> None:
    base = torch.zeros(6, 4)

    def fn(a: Any, b: Any) -> Any:
        a.add_(1.0)
        return b * 2

    ((gm, _),) = capture(fn, base, base[1:])
    assert {n.name for n in functionalize(gm)} == {"l_a_", "l_b_", "add_"}
    assert in_place(gm) == ["add_"]


def test_a_cache_is_written() -> None:
    def fn(cache: Any, position: Any, q: Any, k: Any) -> Any:
        cache.index_copy_(0, position, k)
        position.add_(1)
        return (q @ cache.mT).softmax(-1) @ cache, position * 2

    names = {"l_cache_", "index_copy_", "transpose", "l_position_", "add_", "getattr_1", "cache"}
    ((gm, inputs),) = capture(fn, torch.zeros(8, 6), torch.tensor([3]), Q, K[:1])
    before = run(gm, inputs)
    found = {n.name for n in functionalize(gm)}
    assert {"l_cache_", "index_copy_", "l_position_", "add_"} <= found <= names
    assert in_place(gm) == ["index_copy_", "add_"]
    erase_dead(gm)
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))
    assert in_place(gm) == ["index_copy_", "add_"]


def test_keys_put_together_by_assignment() -> None:
    def fn(rope: Any, nope: Any, q: Any) -> Any:
        keys = rope.new_zeros(4, 12)
        keys[..., :6] = nope
        keys[:, -6:] = rope
        keys[::2] = nope.repeat(1, 2)[:2]
        return (q.repeat(1, 2) @ keys.mT).softmax(-1)

    gm = check(fn, K, V, Q, left=[], tainted=set())
    assert sum(n.target is torch.slice_scatter for n in gm.graph.nodes) == 3


@pytest.mark.parametrize("index", [0, (slice(0, 2), slice(0, 2)), torch.tensor([0, 2])])
def test_other_assignments_stay(index: Any) -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        scores[index] = 1.0
        return scores.softmax(-1)

    ((gm, inputs),) = capture(fn, Q)
    before = run(gm, inputs)
    assert {"scores", "setitem"} <= {n.name for n in functionalize(gm)} and in_place(gm) == ["setitem"]
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))


def test_keys_put_together_in_new_memory() -> None:
    def fn(rope: Any, nope: Any, q: Any) -> Any:
        keys = rope.new_empty(4, 12)
        keys[:, :6].copy_(nope)
        keys[:, 6:] = rope
        return (q.repeat(1, 2) @ keys.mT).softmax(-1)

    check(fn, K, V, Q, left=[], tainted=set())


def test_keys_put_together_in_part() -> None:
    def fn(rope: Any, nope: Any, q: Any) -> Any:
        keys = rope.new_empty(4, 12)
        keys[0] = 0.0
        keys[:, :6] = nope
        keys[:, 6:].copy_(rope)
        return (q.repeat(1, 2) @ keys.mT).softmax(-1)

    ((gm, inputs),) = capture(fn, K, V, Q)
    before = run(gm, inputs)
    found = {n.name for n in functionalize(gm)}
    assert {"keys", "setitem", "copy_"} <= found and not found & {"l_rope_", "l_nope_", "l_q_", "softmax"}
    erase_dead(gm)
    assert in_place(gm) == ["setitem", "setitem", "copy_"]
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))


def test_out_arguments() -> None:
    def fn(q: Any) -> Any:
        buffer = torch.empty(4, 4)
        torch.matmul(q, q.mT, out=buffer)
        return buffer.softmax(-1)

    check(fn, Q, left=["matmul"], tainted={"buffer", "matmul"})


@pytest.mark.parametrize("part", [False, True])
def test_changes_without_gradient_stay(part: bool) -> None:
    def fn(q: Any) -> Any:
        scores = q @ q.mT
        with torch.no_grad():
            (scores[:, :2] if part else scores).mul_(2.0)
        return scores.square().sum()

    q = Q.clone().requires_grad_()
    ((gm, inputs),) = capture(fn, q)
    (before,) = torch.autograd.grad(gm(*inputs)[0], q)
    found = {n.name for n in functionalize(gm)}
    assert "mul_" in found and in_place(gm) == ["mul_"]
    (after,) = torch.autograd.grad(gm(*inputs)[0], q)
    assert torch.equal(before, after)


def test_gradients_are_the_same() -> None:
    def fn(q: Any, hidden: Any) -> Any:
        scores = q @ q.mT
        scores.masked_fill_(hidden, -1e4)
        scores += 0.5
        return scores.softmax(-1).square().sum()

    q = Q.clone().requires_grad_()
    ((gm, inputs),) = capture(fn, q, HIDDEN)
    (before,) = torch.autograd.grad(gm(*inputs)[0], q)
    assert functionalize(gm) == set() and in_place(gm) == []
    (after,) = torch.autograd.grad(gm(*inputs)[0], q)
    assert torch.equal(before, after)


def test_random_and_metadata_changes_stay() -> None:
    def fn(q: Any) -> Any:
        noise = (q * 1).uniform_()
        row = (q + 1).unsqueeze_(0)
        return noise, row

    ((gm, inputs),) = capture(fn, Q)
    before = run(gm, inputs)
    functionalize(gm)
    assert in_place(gm) == ["uniform_", "unsqueeze_"]
    assert all(torch.equal(a, b) for a, b in zip(before, run(gm, inputs)))


def test_bodies_that_write() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(q: Any) -> Any:
        return checkpoint(lambda x: (x * 2).add_(1.0).softmax(-1), q, use_reentrant=False)

    ((gm, _),) = capture(fn, Q.clone().requires_grad_())
    assert "l_q_" in {n.name for n in functionalize(gm)}


# ---- dead code


def test_dead_code_goes_and_effects_stay() -> None:
    def fn(cache: Any, q: Any, k: Any) -> Any:
        dead = F.dropout((q @ k.mT).mul(0.5).softmax(-1), 0.5, training=True).sin()
        cache.index_copy_(0, torch.tensor([0]), k[:1])
        torch._assert_async(q.sum() < 1e9)
        return q + 1, dead

    ((gm, _),) = capture(fn, torch.zeros(8, 6), Q, K)
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    output.args = (output.args[0][:1],)
    assert erase_dead(gm) >= 6
    left = [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes if n.op.startswith("call")]
    assert "index_copy_" in left and "_assert_async" in left
    assert not {"softmax", "matmul", "dropout", "sin"} & set(left)


def test_unknown_functions_stay() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(print, (x,))
    graph.call_method("backward", (x,))
    graph.call_function(torch.sin, (x,))
    graph.output((x,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert erase_dead(gm) == 1
    assert [n.name for n in gm.graph.nodes] == ["x", "print_1", "backward", "output"]


def test_mutated_placeholder_is_not_believed() -> None:
    def fn(length: Any) -> Any:
        mask = torch.arange(8) <= length
        length.add_(1)
        return mask

    ((gm, inputs),) = capture(fn, torch.tensor(3))
    tainted = functionalize(gm)
    seen = view(gm, tainted)
    (comparison,) = seen.of_kind("le")
    assert comparison.inputs[1].tainted and not comparison.tainted
    assert torch.equal(run(gm, inputs)[0], torch.arange(8) <= inputs[0])


def test_inference_dropout_changes_nothing() -> None:
    ((gm, _),) = capture(lambda q: F.dropout((q @ q.mT).softmax(-1), 0.5, False, inplace=True) @ q, Q)
    assert functionalize(gm) == set()
    (dropout,) = view(gm).of_kind("dropout")
    assert dropout.attributes == {"p": 0.0}
