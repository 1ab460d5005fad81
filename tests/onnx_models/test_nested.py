"""Attention in branches, in loops and in functions of the model: found, named and replaced as that of the main graph is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_models.helpers import run
from onnx_models.test_fused import CASES, EPS, HEAD_DIM, LENGTH, WIDTH, Q, arrays, model_of

import fastattn_compile as fa
from fastattn_compile.converting.expose import expose, hidden_in
from fastattn_compile.converting.source import prepare
from fastattn_compile.errors import ConversionError
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.passes.onnx.rewrite import Replacement, can_replace, rewrite
from fastattn_compile.passes.onnx.view import owners

Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", WIDTH])


def renamed(node: onnx.NodeProto, output: str, name: str) -> onnx.NodeProto:
    made = copy.deepcopy(node)
    made.output[0], made.name = output, name
    return made


def put(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto:
    del model.graph.node[:]
    model.graph.node.append(node)
    return model


def in_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """The node in both branches of an ``If`` on the input ``condition``."""

    def branch(name: str) -> onnx.GraphProto:
        out = copy.deepcopy(Y)
        out.name = f"y_{name}"
        return helper.make_graph([renamed(model.graph.node[0], out.name, name)], name, [], [out])

    node = helper.make_node(
        "If", ["condition"], ["y"], name="if", then_branch=branch("then"), else_branch=branch("else")
    )
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    return put(model, node)


def in_loop(model: onnx.ModelProto) -> onnx.ModelProto:
    """The node three times, each time on what it gave before."""
    first = model.graph.node[0].input[0]
    inner = renamed(model.graph.node[0], "after", "core")
    inner.input[0] = "before"
    before, after = copy.deepcopy(Y), copy.deepcopy(Y)
    before.name, after.name = "before", "after"
    go, on, turn = (
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("go", TensorProto.BOOL), ("on", TensorProto.BOOL), ("turn", TensorProto.INT64))
    )
    body = helper.make_graph(
        [inner, helper.make_node("Identity", ["go"], ["on"])], "body", [turn, go, before], [on, after]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3), "turns"))
    return put(model, helper.make_node("Loop", ["turns", "", first], ["y"], name="loop", body=body))


def in_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """All nodes as a function of the model."""
    graph = model.graph
    names = [x.name for x in (*graph.input, *graph.initializer)]
    name = f"Block{len(model.functions)}"
    body = helper.make_function("local", name, names, ["y"], list(graph.node), list(model.opset_import))
    if not model.functions:
        model.opset_import.append(helper.make_opsetid("local", 1))
        del body.opset_import[:]
        body.opset_import.extend(model.opset_import)
    model.functions.append(body)
    return put(model, helper.make_node(name, names, ["y"], domain="local", name="call"))


WRAPPED: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], list[str]]] = {
    "branches": (in_branches, ["else", "then"]),
    "loop": (in_loop, ["core"]),
    "function": (in_function, ["core"]),
    "function of a function": (lambda model: in_function(in_function(model)), ["core"]),
    "branches that call a function": (lambda model: in_branches(in_function(model)), ["core", "core_2"]),
    "function of branches": (lambda model: in_function(in_branches(model)), ["else", "then"]),
    "branches of loops": (lambda model: in_branches(in_loop(model)), ["core", "core#1"]),
}
KINDS = ("standard", "projections, padding", "separate, biased and padded", "grouped, local")


def exact_everywhere(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    prepared = prepare(model)
    wanted = [
        Replacement(s.site, make_operator("exact"), 64) for s in prepared.softmaxes if s.site is not None
    ]
    for one in wanted:
        support = can_replace(one, prepared.opset)
        assert support, support.reason
    rewrite(prepared.model, wanted)
    prepared.forget_inferred()
    return ir.to_proto(prepared.model), len(wanted)


def op_types(graph: onnx.GraphProto) -> set[str]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {node.op_type for node in graph.node}.union(*map(op_types, inner))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WRAPPED)
def test_what_stands_inside_is_found_named_and_replaced(where: str, kind: str) -> None:
    op_type, domain, inputs, weights, attributes, mask = CASES[kind]
    wrap, names = WRAPPED[where]
    model = wrap(model_of(op_type, domain, inputs, weights, **attributes))
    lines = prepare(model).softmaxes
    assert [(s.status, s.mask) for s in lines] == [("taken", mask)] * len(names), [s.reason for s in lines]
    assert sorted(s.name for s in lines) == names
    after, replaced = exact_everywhere(model)
    onnx.checker.check_model(after, full_check=True)
    assert (
        replaced == len(names) and op_type not in op_types(after.graph) and "Exact" in op_types(after.graph)
    )
    feeds = {n: x for n, x in inputs.items() if x is not None and n not in weights}
    for condition in (True, False):
        given = feeds | ({"condition": np.array(condition)} if "branches" in where else {})
        before, got = run(model, given)[0], run(after, given)[0]
        bound = 3 * 4 * (HEAD_DIM + LENGTH) * EPS * np.abs(before).max()  # as for one node, three rounds
        np.testing.assert_allclose(got, before, rtol=0, atol=bound)


def branches_of_two_widths() -> onnx.ModelProto:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate, causal"]
    return in_branches(model_of(op_type, domain, inputs, weights, **attributes))


def given(condition: bool, length: int = 40) -> dict[str, np.ndarray]:
    q, k, v = arrays((2, length, WIDTH), (2, length, WIDTH), (2, length, WIDTH))
    return {"q": q, "k": k, "v": v, "condition": np.array(condition)}


FMA = {"operator": "fma", "options": {"block": 8, "rank": 1}, "repeats": 1}


def test_a_branch_that_was_not_taken_has_no_error_and_says_so(tmp_path) -> None:
    report = fa.convert(branches_of_two_widths(), tmp_path / "out.onnx", inputs=given(True), **FMA)
    sites = {site.name: site for site in report.sites}
    assert sites["then"].own_error > 0 and "do not reach" not in sites["then"].reason
    assert sites["else"].own_error is None and "do not reach" in sites["else"].reason
    assert op_types(onnx.load(str(tmp_path / "out.onnx")).graph) >= {"If", "FMA"}


def test_a_tolerance_is_not_taken_to_hold_where_nothing_was_measured(tmp_path) -> None:
    target = tmp_path / "out.onnx"
    with pytest.raises(ConversionError, match="not reached by these inputs"):
        fa.convert(branches_of_two_widths(), target, inputs=given(True), tolerance=1e9, **FMA)
    assert not target.exists()
    report = fa.convert(branches_of_two_widths(), target, inputs=given(True), tolerance=1e9, repeats=1)
    sites = {site.name: site for site in report.sites}
    assert sites["then"].operator == "fma" and sites["else"].operator == "exact"
    assert "do not reach" in sites["else"].reason


def test_the_error_of_a_loop_is_that_of_all_rounds() -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate, causal"]
    q, k, v = arrays(Q, Q, Q)
    model = in_loop(model_of(op_type, domain, inputs, weights, **attributes))
    # Longer than a block by far: the operator errs.
    feeds = {"q": np.tile(q, (1, 4, 1)), "k": np.tile(k, (1, 4, 1)), "v": np.tile(v, (1, 4, 1))}
    (site,) = fa.convert(model, inputs=feeds, **FMA).sites
    assert site.operator == "fma" and 0 < site.own_error < site.accumulated_error


def test_a_scan_is_measured_as_a_loop_is(tmp_path) -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate, causal"]
    model = model_of(op_type, domain, inputs, weights, **attributes)
    one, each = copy.deepcopy(Y), copy.deepcopy(Y)
    one.name, each.name = "one", "each"
    inner = renamed(model.graph.node[0], "each", "core")
    inner.input[0] = "one"
    body = helper.make_graph([inner], "body", [one], [each])
    whole = [3, "batch", "length", WIDTH]
    for kept, name in ((model.graph.input, "q"), (model.graph.output, "y")):
        place = [x.name for x in kept].index(name)
        kept[place].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, whole))
    put(
        model,
        helper.make_node(
            "Scan", ["q"], ["y"], body=body, num_scan_inputs=1, scan_output_axes=[0], name="scan"
        ),
    )
    feeds = {name: x for name, x in given(True).items() if name != "condition"}
    feeds["q"] = np.stack([feeds["q"], feeds["k"], feeds["v"]])
    (site,) = fa.convert(model, tmp_path / "out.onnx", inputs=feeds, **FMA).sites
    assert site.operator == "fma" and site.own_error > 0, site.reason
    assert op_types(onnx.load(str(tmp_path / "out.onnx")).graph) >= {"Scan", "FMA"}


def test_learned_parameters_start_from_all_rounds_and_not_from_a_branch_nobody_took() -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate"]
    cast = {"operator": "cast", "options": {"clusters": 4, "cluster_size": 8}, "repeats": 1}
    feeds = {name: x for name, x in given(True).items() if name != "condition"}
    model = in_loop(model_of(op_type, domain, inputs, weights, **attributes))
    (site,) = fa.convert(model, inputs=feeds, **cast).sites
    assert site.operator == "cast" and "nobody has fitted" in site.reason
    model = in_branches(model_of(op_type, domain, inputs, weights, **attributes))
    with pytest.raises(ConversionError, match="give inputs that take its branch"):
        fa.convert(model, inputs=given(True), **cast)


def test_a_cache_in_a_branch_is_kept_with_its_reason() -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate"]
    model = model_of(op_type, domain, inputs, weights, **attributes)
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", 4, 3, HEAD_DIM])
    model.graph.node[0].input.extend(["", "", "", "past", "past"])
    model.graph.input.append(past)
    lines = prepare(in_branches(model)).softmaxes
    assert [s.status for s in lines] == ["exact"] * 2 and all("cache" in s.reason for s in lines)


def test_a_body_out_of_which_nothing_can_be_measured_stays_exact() -> None:
    op_type, domain, inputs, weights, attributes, _ = CASES["separate"]
    model = model_of(op_type, domain, inputs, weights, **attributes)
    one, each = copy.deepcopy(Y), copy.deepcopy(Y)
    one.name, each.name = "one", "each"
    inner = [
        renamed(model.graph.node[0], "attended", "core"),
        helper.make_node("Add", ["one", "attended"], ["each"]),
    ]
    body = helper.make_graph(inner, "body", [one], [each])
    mapped = [
        helper.make_node("SequenceConstruct", ["q", "q"], ["many"]),
        helper.make_node("SequenceMap", ["many"], ["done"], body=body, name="map"),
        helper.make_node("ConcatFromSequence", ["done"], ["y"], axis=0),
    ]
    del model.graph.node[:]
    model.graph.node.extend(mapped)
    feeds = {name: x for name, x in given(True).items() if name != "condition"}
    (site,) = fa.convert(model, inputs=feeds, **FMA).sites
    assert site.operator == "exact" and site.reason
    prepared = prepare(model)
    within = next(v for v, owner in owned(prepared.model) if owner.op_type == "SequenceMap")
    assert "SequenceMap" in hidden_in(prepared.model, within)
    with pytest.raises(ConversionError, match="SequenceMap"):
        expose(prepared.model, [within], "out_")


def owned(model: ir.Model) -> list[tuple[ir.Value, ir.Node]]:
    return [(v, node) for body, node in owners(model).items() for inner in body for v in inner.outputs]


def test_a_fused_node_that_is_the_output_of_the_model_is_converted(tmp_path) -> None:
    """What takes its place has its type and shape: a file without them is none."""
    op_type, domain, inputs, weights, attributes, _ = CASES["separate, causal"]
    model = model_of(op_type, domain, inputs, weights, **attributes)
    feeds = {name: x for name, x in given(True).items() if name != "condition"}
    fa.convert(model, tmp_path / "out.onnx", inputs=feeds, **FMA)
    (out,) = onnx.load(str(tmp_path / "out.onnx")).graph.output
    assert out == model.graph.output[0]
