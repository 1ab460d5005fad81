"""What every operator must do, tested once for all. A new operator joins with one line in ``OPERATORS``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_as_good_as,
    cast,
    gradients,
    leaves,
    make_inputs,
    make_parameters,
    relative_error,
    run,
)

from fastattn_compile.kernels.dispatch import recorded_kernels, use_kernels
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.library import attend, torch_op
from fastattn_compile.operators.mask import CAUSAL, NO_MASK, MaskStructure
from fastattn_compile.operators.registry import make_operator, operator_from_token

OPERATORS = {
    "exact": ("exact", {}),
    "fma": ("fma", {"block": 8, "rank": 2, "sinks": 3}),
    "fma-depthwise": ("fma", {"block": 8, "rank": 2, "sinks": 3, "basis": "depthwise"}),
    "fma-dense": ("fma", {"block": 8, "rank": 2, "sinks": 3, "basis": "dense"}),
    "fma-recursive": ("fma", {"block": 8, "rank": 2, "sinks": 3, "basis": "recursive"}),
    "fma-rotary": ("fma", {"block": 8, "rank": 2, "sinks": 3, "rotary_base": 50.0}),
    "fma-zero_pad": ("fma", {"block": 8, "rank": 2, "sinks": 0, "boundary": "zero_pad"}),
    "fma-pooled": ("fma", {"block": 8, "rank": 2, "sinks": 0, "queries": "pooled"}),
    "conv_basis": ("conv_basis", {"k": 9, "sinks": 3}),
    "cast": ("cast", {"clusters": 5, "clustering": "sa_topk", "combine": "lse", "select": "key"}),
    "cast-causal": (
        "cast",
        {"clusters": 5, "clustering": "token_choice", "cluster_size": 6, "combine": "lse", "select": "key"},
    ),
    "linformer": ("linformer", {"rank": 7}),
    "window": ("window", {"width": 12, "sinks": 3}),
    "barnes_hut": (
        "barnes_hut",
        {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 5, "beam": 4, "share_group": False},
    ),
    "per_head": (
        "per_head",
        {
            "parts": [
                {"operator": "window", "options": {"width": 12, "sinks": 3}},
                {
                    "operator": "fma",
                    "options": {"block": 8, "rank": 2, "sinks": 3, "basis": "depthwise"},
                },
            ],
            "heads": [1, 0],
        },
    ),
}
MASKS = [
    "none",
    "causal",
    "causal & window(21)",
    "left(30)",
    "right(13) & left(22)",
    "key_padding",
    "causal & key_padding",
    "causal & window(30) & key_padding",
    "chunk(16)",
    "causal & prefix(9)",
    "causal & segments",
    "causal & window(21) & segments",
    "key_padding & segments",
    "causal + alibi",
    "key_padding + alibi",
    "causal & segments + alibi",
    "none + bucketed",
    "causal & window(21) + bucketed",
    "causal & key_padding + bucketed",
]
# Float64 is the judge's own type: the drawn shapes at the end compare there.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_operator = pytest.mark.parametrize("case", OPERATORS)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


def sized(case: str, length: int = 75) -> int:
    """A length near the given one that the operator takes."""
    return 8 << max(1, (length // 8).bit_length() - 1) if case == "fma-zero_pad" else length


def own(case: str, mask: str) -> str:
    """A causal mask, or what remains of it for operators that are bidirectional only."""
    if build(case).supports(make_inputs("causal", length=sized(case)).spec()):
        return mask
    return mask.replace("causal & ", "").replace("causal", "none")


def build(case: str, inputs: AttentionInputs | None = None):
    name, options = OPERATORS[case]
    operator = make_operator(name, **options)
    if inputs is not None:
        support = operator.supports(inputs.spec())
        if not support:
            pytest.skip(support.reason)
    return operator


@each_operator
@each_mask
@each_dtype
def test_forward_is_as_accurate_as_its_type(case, mask, dtype):
    inputs = make_inputs(mask, length=sized(case), dtype=dtype, value_dim=6)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    got = run(operator, inputs, parameters)
    assert got.out.dtype == dtype and got.out.is_contiguous()
    assert got.log_sum_exp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    formula = operator.reference(inputs, parameters)
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in parameters))
    assert_as_good_as(got.out, oracle=oracle.out, formula=formula.out)
    assert_as_good_as(
        got.log_sum_exp, oracle=oracle.log_sum_exp, formula=formula.log_sum_exp, name="log_sum_exp"
    )


@each_operator
@each_mask
@each_dtype
def test_gradients_are_as_accurate_as_their_type(case, mask, dtype):
    inputs = make_inputs(mask, length=sized(case), dtype=dtype)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=inputs.value.dtype)

    def of(evaluate, given, params):
        given, params, sources = leaves(given, params)
        return gradients(evaluate(given, params), sources, tuple(s.to(given.value.dtype) for s in seeds))

    with recorded_kernels() as ran:
        got = of(lambda i, p: run(operator, i, p), inputs, parameters)
    formula = of(operator.reference, inputs, parameters)
    oracle = of(operator.reference, cast(inputs, torch.float64), tuple(p.double() for p in parameters))
    names = ["query", "key", "value"] + ["parameter"] * len(parameters) + ["bias"]
    if set(ran.values()) != {"aten"}:
        # Sums of few numbers that cancel err by luck: what ATen errs, which is judged first, is a second draw of what the
        # type explains.
        with use_kernels("aten"):
            plain = of(lambda i, p: run(operator, i, p), inputs, parameters)
        for name, g, f, o in zip(names, plain, formula, oracle):
            assert_as_good_as(g, oracle=o, formula=f, name=f"gradient of {name} by ATen")
        formula = [
            max(pair, key=lambda x, o=o: relative_error(x, o)) for *pair, o in zip(formula, plain, oracle)
        ]
    for name, g, f, o in zip(names, got, formula, oracle):
        assert g.dtype == dtype
        assert_as_good_as(g, oracle=o, formula=f, name=f"gradient of {name}")


@each_operator
@pytest.mark.parametrize(
    "mask", ["none", "causal", "causal & window(9)", "causal + alibi", "none + alibi", "none + bucketed"]
)
def test_gradcheck(case, mask):
    inputs = make_inputs(
        mask, batch=1, heads=2, kv_heads=1, length=sized(case, 35), head_dim=4, dtype=torch.float64
    )
    operator = build(case, inputs)
    inputs, _, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q, k, v, *others):
        *params, bias = others if mask.endswith("bucketed") else (*others, inputs.bias)
        given = dataclasses.replace(inputs, query=q, key=k, value=v, bias=bias)
        output = run(operator, given, tuple(params))
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


@each_operator
@pytest.mark.parametrize(
    "variant",
    ["plain", "transposed", "requires_grad", "bfloat16", "padded", "segments", "alibi", "bucketed"],
)
def test_opcheck(case, variant):
    mask = {"padded": "causal & key_padding", "segments": "causal & segments"}.get(variant, "causal")
    mask = own(case, mask)
    inputs = make_inputs(
        f"{mask} + {variant}" if variant in ("alibi", "bucketed") else mask, length=sized(case, 21), batch=1
    )
    operator = build(case, inputs)
    parameters = list(make_parameters(operator, inputs))
    tensors = [inputs.query, inputs.key, inputs.value]
    if variant == "transposed":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    if variant == "bfloat16":
        tensors, parameters = [x.bfloat16() for x in tensors], [p.bfloat16() for p in parameters]
    if variant in ("requires_grad", "bucketed", "alibi"):
        tensors, parameters = [x.requires_grad_() for x in tensors], [p.requires_grad_() for p in parameters]
    if variant == "bucketed":
        inputs.bias.requires_grad_()
    arguments = (
        *tensors,
        inputs.key_padding,
        inputs.segments,
        inputs.bias,
        parameters,
        0.3,
        str(inputs.mask),
        operator.token,
        "site",
    )
    torch.library.opcheck(torch_op(operator.name), arguments)


@each_operator
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_every_length(case, backend):
    mask = own(case, "causal")
    structure = CAUSAL if mask == "causal" else NO_MASK
    operator = build(case, make_inputs(mask, length=sized(case)))
    parameters = make_parameters(operator, make_inputs(mask, length=sized(case, 80)))
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def step(q, k, v):
        out, log_sum_exp = attend(q * 2, k, v, operator, mask=structure, parameters=parameters)
        return out.sin(), log_sum_exp

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, dynamic=True, fullgraph=True)
    for length in (40, 77, 64):
        inputs = make_inputs(mask, length=sized(case, length))
        results = []
        for function in (step, compiled):
            given, _, sources = leaves(inputs, ())
            out, log_sum_exp = function(given.query, given.key, given.value)
            results.append((out, log_sum_exp, *torch.autograd.grad(out.sum() + log_sum_exp.sum(), sources)))
        for eager, other in zip(*results):
            size = max(1.0, float(eager.detach().abs().max()))
            assert torch.allclose(eager, other, atol=1e-6 * size), length
    # Whether zero keys are defined depends on the length.
    assert counter.frame_count == (2 if case == "fma-zero_pad" else 1)


@each_operator
def test_inputs_of_mixed_types(case):
    """Autocast gives float32 queries and keys (rotary embedding) and bfloat16 values."""
    inputs = make_inputs(own(case, "causal"), length=sized(case))
    inputs = dataclasses.replace(inputs, value=inputs.value.bfloat16())
    operator = build(case, inputs)
    parameters = tuple(p.float() for p in make_parameters(operator, inputs))
    given, params, sources = leaves(inputs, parameters)
    got = run(operator, given, params)
    assert got.out.dtype == torch.bfloat16 and got.log_sum_exp.dtype == torch.float32
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in parameters))
    assert relative_error(got.out, oracle.out) <= torch.finfo(torch.bfloat16).eps
    grads = torch.autograd.grad(got.out.float().sum(), sources, allow_unused=True)
    assert [g.dtype for g in grads[:3]] == [torch.float32, torch.float32, torch.bfloat16]


@each_operator
@pytest.mark.parametrize("mask", ["causal", "causal & window(21)"])
def test_autocast_does_not_reach_into_the_kernels(case, mask):
    inputs = make_inputs(own(case, mask), length=sized(case))
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    results = []
    for enabled in (False, True):
        given, params, sources = leaves(inputs, parameters)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = run(operator, given, params)
            seeds = torch.ones_like(output.out), torch.ones_like(output.log_sum_exp)
            results.append((output.out, output.log_sum_exp, *gradients(output, sources, seeds)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@each_operator
@pytest.mark.parametrize(
    "mask",
    ["causal", "causal & window(21)", "causal & key_padding", "causal + alibi", "causal + bucketed"],
)  # fmt: skip
def test_the_future_does_not_move_the_past(case, mask):
    inputs = make_inputs(mask, length=sized(case))
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    before = run(operator, inputs, parameters)
    for now in (1, 8, 33, 64, 74):
        changed = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
        for x in changed:
            x[:, :, now:] = 50 * torch.randn_like(x[:, :, now:])
        after = run(
            operator,
            dataclasses.replace(inputs, query=changed[0], key=changed[1], value=changed[2]),
            parameters,
        )
        assert torch.equal(before.out[:, :, :now], after.out[:, :, :now])
        assert torch.equal(before.log_sum_exp[:, :, :now], after.log_sum_exp[:, :, :now])


@each_operator
@each_mask
def test_batch_and_heads_are_independent(case, mask):
    inputs = make_inputs(mask, length=sized(case), batch=3, heads=3, kv_heads=3)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    sequences, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    if case.startswith("cast"):  # all heads choose one clustering, each with parameters of its own
        heads = torch.arange(3)

    def moved(x):
        return None if x is None else x[sequences][:, heads] if x.dim() > 2 else x[sequences]

    plain = run(operator, inputs, parameters)
    permuted = run(
        operator,
        dataclasses.replace(
            inputs, query=moved(inputs.query), key=moved(inputs.key), value=moved(inputs.value),
            key_padding=moved(inputs.key_padding), segments=moved(inputs.segments),
            bias=None if inputs.bias is None else inputs.bias[heads],
        ),
        parameters,
    )  # fmt: skip
    assert torch.allclose(moved(plain.out), permuted.out, atol=1e-6)
    assert torch.allclose(moved(plain.log_sum_exp), permuted.log_sum_exp, atol=1e-6)


@each_operator
@pytest.mark.parametrize("mask", ["causal", "none + alibi", "causal + bucketed"])
def test_query_groups_equal_repeated_keys(case, mask):
    inputs = make_inputs(own(case, mask), length=sized(case), heads=6, kv_heads=2)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    repeated = dataclasses.replace(
        inputs, key=inputs.key.repeat_interleave(3, 1), value=inputs.value.repeat_interleave(3, 1)
    )
    served = operator.supports(repeated.spec())
    if not served or operator.parameter_shapes(inputs.spec()) != operator.parameter_shapes(repeated.spec()):
        pytest.skip(served.reason or "parameters belong to key heads")
    assert torch.allclose(
        run(operator, inputs, parameters).out, run(operator, repeated, parameters).out, atol=1e-6
    )


@each_operator
@pytest.mark.parametrize(
    "mask",
    ["key_padding", "causal & key_padding", "causal & window(30) & key_padding", "key_padding + alibi"],
)
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padding_has_no_influence(case, mask, garbage):
    inputs = make_inputs(mask)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    padding = ~inputs.key_padding[:, None, :, None]
    dirty = dataclasses.replace(
        inputs, key=inputs.key.masked_fill(padding, garbage), value=inputs.value.masked_fill(padding, garbage)
    )
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3])

    def results(tensors):
        tensors, params, sources = leaves(tensors, parameters)
        output = run(operator, tensors, params)
        return output.out, output.log_sum_exp, *gradients(output, sources, seeds)

    with recorded_kernels() as ran:
        assert not any(x.isnan().any() for x in results(dirty))
    # What is not finite is left to ATen by some kernels, which round otherwise: like is compared with like.
    with use_kernels("aten" if set(ran.values()) == {"aten"} else "auto"):
        cleans, others = results(inputs), results(dirty)
    for clean, other in zip(cleans, others, strict=True):
        assert not other.isnan().any()
        assert torch.allclose(clean, other, atol=1e-6)
    for gradient in others[3:5]:
        assert not gradient.masked_select(padding.expand_as(gradient)).any()


@each_operator
@pytest.mark.parametrize(
    "mask", ["key_padding", "causal & key_padding", "causal & key_padding + alibi", "key_padding + bucketed"]
)
@each_dtype
def test_queries_without_keys(case, mask, dtype):
    inputs = make_inputs(mask, dtype=dtype)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    padding = inputs.key_padding.clone()
    padding[0] = False
    padding[1, :40] = False
    given, params, sources = leaves(dataclasses.replace(inputs, key_padding=padding), parameters)
    output = run(operator, given, params)
    blind = ~given.visible(torch.arange(75)).any(-1).expand(2, 4, 75)
    assert blind.any() and not blind.all()
    assert not output.out[blind].any() and (output.log_sum_exp[blind] == -torch.inf).all()
    assert torch.isfinite(output.out).all() and torch.isfinite(output.log_sum_exp[~blind]).all()
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=dtype)
    grads = gradients(output, sources, seeds)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][blind].any()


@each_operator
@pytest.mark.parametrize(
    "mask", ["none", "causal", "causal & window(21)", "right(13) & left(22)", "key_padding"]
)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("place", [0, 5, 37, 74])
def test_nan_reaches_every_query_that_sees_it(case, mask, side, place):
    inputs = make_inputs(mask, dtype=torch.float64)
    operator = build(case, inputs)
    if inputs.key_padding is not None:
        inputs.key_padding[:, place] = True
    parameters = make_parameters(operator, inputs)
    moved, broken = (getattr(inputs, side).clone() for _ in range(2))
    moved[:, :, place] += 1
    broken[:, :, place, 0] = torch.nan
    plain = operator.reference(inputs, parameters)
    other = operator.reference(dataclasses.replace(inputs, **{side: moved}), parameters)
    sees = (plain.out != other.out).any(-1)
    got = run(operator, dataclasses.replace(inputs, **{side: broken}), parameters)
    # Of the keys conv_basis reads its anchors only.
    assert sees.any() or (case, side) == ("conv_basis", "key")
    assert got.out[sees].isnan().any(-1).all()
    if side == "key":
        assert got.log_sum_exp[sees].isnan().all()
    if inputs.mask.causal:
        assert not got.out[:, :, :place].isnan().any()


@each_operator
def test_nan_in_a_query_stays_in_its_row(case):
    inputs = make_inputs(own(case, "causal"), length=sized(case))
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    plain = operator.reference(inputs, parameters)
    inputs.query[1, 2, 33] += 1
    wanted = (operator.reference(inputs, parameters).out != plain.out).any(-1)
    inputs.query[1, 2, 33, 0] = torch.nan
    hit = run(operator, inputs, parameters).out.isnan().any(-1)
    # Pooled queries speak for their whole group.
    # Later rows of conv_basis read the query as well: a column is an older one slid down the diagonal.
    assert hit[1, 2, 33] and torch.equal(hit, wanted)
    assert hit.sum() == 1 or case in ("conv_basis", "fma-pooled")


@each_operator
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_strides(case, layout, batch):
    inputs = make_inputs(own(case, "causal"), length=sized(case), batch=batch)
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)

    def laid_out(x):
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "strided":
            return torch.stack([x, x.flip(-1)], -1)[..., 0]
        return x[:1].expand_as(x)

    given = [laid_out(x) for x in (inputs.query, inputs.key, inputs.value)]
    results = []
    for tensors in (given, [x.contiguous() for x in given]):
        sources = tuple(x.detach().requires_grad_() for x in tensors)
        out, _ = attend(*sources, operator, scale=inputs.scale, mask=str(inputs.mask), parameters=parameters)
        results.append((out, *torch.autograd.grad(out.sum(), sources)))
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-6)


@each_operator
def test_two_runs_are_bitwise_equal(case):
    inputs = make_inputs(own(case, "causal"), length=sized(case, 200))
    operator = build(case, inputs)
    parameters = make_parameters(operator, inputs)
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3])
    runs = []
    for _ in range(2):
        given, params, sources = leaves(inputs, parameters)
        output = run(operator, given, params)
        runs.append((output.out, output.log_sum_exp, *gradients(output, sources, seeds)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@each_operator
def test_exact_keys_are_visible_keys(case):
    for mask in ("causal", "key_padding", "causal & window(21)"):
        inputs = make_inputs(mask)
        operator = make_operator(OPERATORS[case][0], **OPERATORS[case][1])
        rows = torch.tensor([0, 3, 40, 74])
        parameters = make_parameters(operator, inputs)
        if not operator.supports(inputs.spec()):
            parameters = ()
        exact = operator.exact_keys(inputs, rows, parameters).expand(2, 4, 4, 75)
        # Linformer meets every key through projected rows.
        assert (exact.any() or case == "linformer") and not (exact & ~inputs.visible(rows)).any()
        # What is met whatever the parameters are is met with these.
        assert not (operator.exact_keys(inputs, rows) & ~exact).any()


@each_operator
def test_operators_say_whether_a_sample_moves_their_start(case):
    operator = build(case)
    inputs = make_inputs("causal" if operator.supports(make_inputs("causal").spec()) else "none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        without = operator.initial_parameters(inputs.spec())
        torch.manual_seed(0)
        sampled = operator.initial_parameters(inputs.spec(), inputs)
    moved = any(not torch.equal(without[name], sampled[name]) for name in without)
    assert moved == operator.starts_from_sample
    assert operator.learned == bool(without)


@each_operator
def test_the_token_reads_back(case):
    operator = build(case)
    assert operator_from_token(operator.token).config == operator.config


@each_operator
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mask": MaskStructure(opaque="made by a function")}, "made by a function"),
        ({"bias": "dense"}, "bias"),
        ({"softcap": 30.0}, "30"),
        ({"sink_logits": True}, "sink"),
        ({"dropout": 0.1}, "0.1"),
        ({"weights_used": True}, "weights"),
    ],
)
def test_refusals_say_why(case, change, word):
    spec = dataclasses.replace(make_inputs("causal").spec(), **change)
    support = build(case).supports(spec)
    assert not support and word in support.reason


@each_operator
def test_attention_of_disagreeing_shapes_is_refused(case):
    operator, mask = build(case), own(case, "causal")
    inputs = make_inputs(mask, length=sized(case))
    q, k, v = inputs.query, inputs.key, inputs.value
    with pytest.raises(ValueError, match="do not agree"):
        attend(q[..., :4], k, v, operator, mask=mask)
    with pytest.raises(ValueError, match="multiple of key heads"):
        attend(q[:, :3], k, v, operator, mask=mask)
    if operator.supports(make_inputs(f"{mask} & key_padding").spec()):
        with pytest.raises(ValueError, match="shape"):
            attend(q, k, v, operator, mask=mask, key_padding=torch.ones(2, 5, dtype=torch.bool))
        with pytest.raises(TypeError, match="boolean"):
            attend(q, k, v, operator, mask=mask, key_padding=torch.ones(2, 75))
    with pytest.raises(TypeError, match="floating-point"):
        attend(q.int(), k, v, operator, mask=mask)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@each_operator
def test_any_shape_equals_the_definition(case, data):
    name, options = OPERATORS[case]
    if name == "fma":
        block, rank = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (8, 8), (12, 3)]))
        sinks = data.draw(st.integers(0, block)) if options["sinks"] else 0
        options = {**options, "block": block, "rank": rank, "sinks": sinks}
        options["scale_attn"] = data.draw(st.booleans())
    group, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    inputs = make_inputs(
        data.draw(st.sampled_from(MASKS)), batch=data.draw(st.integers(1, 2)), heads=group * kv_heads,
        kv_heads=kv_heads, length=data.draw(st.integers(1, 70)), head_dim=data.draw(st.integers(1, 5)),
        value_dim=data.draw(st.integers(1, 5)), dtype=torch.float64, seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    operator = make_operator(name, **options)
    if not operator.supports(inputs.spec()):
        return
    given, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    seeds = torch.randn(shape, dtype=torch.float64), torch.randn(shape[:3], dtype=torch.float64)
    got, wanted = run(operator, given, parameters), operator.reference(given, parameters)
    assert relative_error(got.out, wanted.out) < 1e-12
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-12
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert float((g - w).abs().max()) < 1e-11 * max(1.0, float(w.abs().max()))
