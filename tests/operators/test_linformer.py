"""Linformer: the paper's formula, its exact limit, starts of the projections, and what it refuses."""

import dataclasses

import pytest
import torch
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

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact.reference import exact_attention
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

CASES = {
    "shared": {},
    "per-head": {"sharing": "none", "max_length": 60},
    "data": {"start": "data"},
    "key-value": {"sharing": "key_value"},
}
each_case = pytest.mark.parametrize("case", CASES)


def build(case, rank=7):
    return make_operator("linformer", rank=rank, **CASES[case])


def fitting(padded=False, **sizes):
    return make_inputs("key_padding" if padded else "none", **{"length": 41, **sizes})


def test_the_formula_of_the_paper():
    """Equation 7, written out for one head."""
    operator = build("shared", rank=3)
    inputs = fitting(batch=1, heads=1, kv_heads=1, length=12, dtype=torch.float64)
    e, f = make_parameters(operator, inputs)
    q, k, v = (x[0, 0] for x in (inputs.query, inputs.key, inputs.value))
    scores = inputs.scale * q @ (e[0] @ k).T
    got = run(operator, inputs, (e, f))
    assert torch.allclose(got.out[0, 0], scores.softmax(-1) @ (f[0] @ v), atol=1e-13)
    assert torch.allclose(got.log_sum_exp[0, 0], scores.logsumexp(-1), atol=1e-13)


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_for_every_token_is_exact_attention(padded):
    operator = build("shared", rank=41)
    inputs = fitting(padded, dtype=torch.float64)
    parameters = tuple(p.double() for p in operator.initial_parameters(inputs.spec()).values())
    assert torch.equal(parameters[0][0], torch.eye(41, dtype=torch.float64))
    got, exact = run(operator, inputs, parameters), exact_attention(inputs)
    assert torch.allclose(got.out, exact.out, atol=1e-12)
    assert torch.allclose(got.log_sum_exp, exact.log_sum_exp, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_kernel_is_as_accurate_as_its_type(case, dtype, padded):
    operator = build(case)
    inputs = fitting(padded, dtype=dtype, value_dim=6)
    parameters = make_parameters(operator, inputs)
    seeds = [torch.randn(2, 4, 41, 6, dtype=dtype), torch.randn(2, 4, 41, dtype=dtype)]
    results = []
    for evaluate, wide in (
        (lambda i, p: run(operator, i, p), False), (operator.reference, False), (operator.reference, True)
    ):  # fmt: skip
        given, params = inputs, parameters
        if wide:
            given, params = cast(inputs, torch.float64), tuple(p.double() for p in parameters)
        given, params, sources = leaves(given, params)
        output = evaluate(given, params)
        results.append(
            (
                output.out,
                output.log_sum_exp,
                *gradients(output, sources, tuple(s.to(given.value.dtype) for s in seeds)),
            )
        )
    names = ("out", "log_sum_exp", "query", "key", "value", "key projection", "value projection")
    for name, got, formula, oracle in zip(names, *results):
        assert got.dtype == formula.dtype
        assert_as_good_as(got, oracle=oracle, formula=formula, name=name)


@each_case
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(case, padded):
    operator = build(case)
    inputs = fitting(padded, length=15, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    given, _parameters, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q, k, v, *params):
        output = run(operator, dataclasses.replace(given, query=q, key=k, value=v), params)
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


def test_shorter_sequences_use_the_first_columns():
    operator = make_operator("linformer", rank=4, max_length=40)
    inputs = fitting(length=15, dtype=torch.float64)
    start = operator.initial_parameters(inputs.spec())
    assert start["key_projection"].shape == (1, 4, 40)
    given, parameters, sources = leaves(inputs, tuple(p.double() for p in start.values()))
    got = run(operator, given, parameters)
    # Blocks of ten: two of them reach the sequence, the others stand for nothing and are not seen.
    rows = [
        torch.stack([x[:, :, :10].mean(2), x[:, :, 10:].sum(2) / 10], 2) for x in (inputs.key, inputs.value)
    ]
    pooled = AttentionInputs(inputs.query, *rows, inputs.scale)
    assert torch.allclose(got.out, exact_attention(pooled).out, atol=1e-12)
    grads = torch.autograd.grad(got.out.sum(), sources)
    assert grads[3].shape == (1, 4, 40) and not grads[3][..., 15:].any() and not grads[4][..., 15:].any()


@each_case
def test_padding_has_no_influence(case):
    operator = build(case)
    inputs = fitting(True)
    parameters = make_parameters(operator, inputs)
    padding = ~inputs.key_padding[:, None, :, None]
    dirty = dataclasses.replace(
        inputs, **{x: getattr(inputs, x).masked_fill(padding, torch.nan) for x in ("key", "value")}
    )
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3])
    results = []
    for given in (inputs, dirty):
        given, params, sources = leaves(given, parameters)
        output = run(operator, given, params)
        results.append((output.out, output.log_sum_exp, *gradients(output, sources, seeds)))
    assert all(torch.equal(clean, other) for clean, other in zip(*results))


@each_case
def test_sequences_of_padding_alone(case):
    operator = build(case)
    inputs = fitting(True)
    inputs.key_padding[0] = False
    given, params, sources = leaves(inputs, make_parameters(operator, inputs))
    output = run(operator, given, params)
    assert not output.out[0].any() and (output.log_sum_exp[0] == -torch.inf).all()
    assert torch.isfinite(output.out).all() and output.out[1].any()
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3])
    assert all(torch.isfinite(g).all() for g in gradients(output, sources, seeds))


@each_case
@pytest.mark.parametrize("side", ["query", "key", "value"])
def test_nan_reaches_every_query_that_sees_it(case, side):
    operator = build(case)
    inputs = fitting()
    parameters = make_parameters(operator, inputs)
    getattr(inputs, side)[0, 1, 17, 0] = torch.nan
    out = run(operator, inputs, parameters).out
    hit = out.isnan().any(-1)
    assert not hit[1].any()
    if side == "query":
        assert hit[0].nonzero().tolist() == [[1, 17]]
    else:
        assert hit[0, 2:].all() and not hit[0, :2].any()


@each_case
def test_inputs_and_parameters_of_mixed_types(case):
    operator = build(case)
    inputs = fitting()
    parameters = make_parameters(operator, inputs)
    inputs = dataclasses.replace(inputs, value=inputs.value.bfloat16())
    given, params, sources = leaves(inputs, parameters)
    got = run(operator, given, params)
    oracle = operator.reference(cast(inputs, torch.float64), tuple(p.double() for p in parameters))
    assert got.out.dtype == torch.bfloat16 and got.log_sum_exp.dtype == torch.float32
    assert relative_error(got.out, oracle.out) <= torch.finfo(torch.bfloat16).eps
    grads = gradients(got, sources, (torch.randn_like(got.out), torch.randn_like(got.log_sum_exp)))
    assert [g.dtype for g in grads] == [s.dtype for s in sources]


@each_case
@pytest.mark.parametrize("padded", [False, True])
def test_the_torch_op_keeps_its_promises(case, padded):
    operator = build(case)
    inputs = fitting(padded, length=21, batch=1)
    parameters = [p.requires_grad_() for p in make_parameters(operator, inputs)]
    tensors = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    arguments = (
        *tensors,
        inputs.key_padding,
        None,
        None,
        parameters,
        0.3,
        str(inputs.mask),
        operator.token,
        "site",
    )
    torch.library.opcheck(torch_op("linformer"), arguments)


def test_one_projection_serves_all_heads():
    inputs = fitting(dtype=torch.float64)
    shared = build("shared")
    parameters = make_parameters(shared, inputs)
    per_head = make_operator("linformer", rank=7, sharing="none")
    repeated = tuple(p.expand(2, -1, -1) for p in parameters)
    assert torch.allclose(
        run(shared, inputs, parameters).out, run(per_head, inputs, repeated).out, atol=1e-13
    )


def test_one_projection_serves_keys_and_values():
    inputs = fitting(dtype=torch.float64)
    operator = build("key-value")
    (projection,) = make_parameters(operator, inputs)
    assert list(operator.parameter_shapes(inputs.spec())) == ["projection"]
    both = run(build("shared"), inputs, (projection, projection))
    assert torch.equal(run(operator, inputs, (projection,)).out, both.out)


def test_a_start_from_data_finds_positions_that_are_alike():
    """Keys repeat with period five: rows that follow it are nearly exact, blocks of neighbours are not."""
    centers = 4 * torch.randn(5, 8)
    label = torch.arange(40) % 5
    key = (centers[label] + 0.01 * torch.randn(2, 1, 40, 8)).expand(-1, 2, -1, -1)
    value = torch.randn(5, 8)[label].expand(2, 2, -1, -1)
    inputs = AttentionInputs(torch.randn(2, 2, 40, 8), key, value, 8**-0.5)
    exact = exact_attention(inputs).out
    errors = []
    for start in ("data", "blocks"):
        for sharing in ("heads", "none"):
            operator = make_operator("linformer", rank=5, start=start, sharing=sharing, max_length=48)
            parameters = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
            errors.append(relative_error(run(operator, inputs, parameters).out, exact))
    # Eight columns beyond the sample share rows with it and thin out their means.
    assert max(errors[:2]) < 0.5 < min(errors[2:])
    operator = make_operator("linformer", rank=5, start="data")
    parameters = tuple(operator.initial_parameters(inputs.spec(), inputs).values())
    assert relative_error(run(operator, inputs, parameters).out, exact) < 0.02


def test_rows_start_as_means():
    for options in CASES.values():
        operator = make_operator("linformer", rank=7, **options)
        inputs = fitting()
        for value in operator.initial_parameters(inputs.spec(), inputs).values():
            assert value.shape == (
                2 if options.get("sharing") == "none" else 1,
                7,
                options.get("max_length", 41),
            )
            assert torch.allclose(value.sum(-1), torch.ones(value.shape[:2]))
            assert ((value > 0).sum(1) == 1).all()


@pytest.mark.parametrize("mask", ["causal", "causal & key_padding", "causal & window(9)", "right(3)"])
def test_causal_sites_are_refused_because_they_would_leak(mask):
    spec = dataclasses.replace(make_inputs("none").spec(), mask=MaskStructure.parse(mask))
    assert "leak" in make_operator("linformer").supports(spec).reason


@pytest.mark.parametrize(
    ("mask", "change", "words"),
    [
        ("left(3)", {}, "left"),
        ("chunk(8)", {}, "chunk"),
        ("segments", {}, "segments"),
        ("opaque(odd)", {}, "odd"),
        ("none", {"kind": "cross"}, "cross"),
        ("none", {"query_len": 1, "key_len": 1}, "single query"),
        ("none", {"query_len": 65, "key_len": 65}, "serve 64 positions"),
        ("none", {"bias": "dense"}, "bias"),
        ("causal", {"dropout": 0.1}, "dropout"),
    ],
)
def test_sites_that_do_not_fit_are_refused(mask, change, words):
    spec = make_inputs("none", length=40).spec()
    spec = dataclasses.replace(spec, mask=MaskStructure.parse(mask), **change)
    assert words in make_operator("linformer", rank=8, max_length=64).supports(spec).reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 8, "max_length": 7}, "at least rank"),
        ({"sharing": "layers"}, "heads, none, key_value"),
        ({"start": "random"}, "blocks, data"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_operator("linformer", **options)
    with pytest.raises(TypeError, match="max_length"):
        make_operator("linformer", max_length=64.0)


def test_parameters_that_do_not_fit_are_an_error():
    operator, inputs = build("shared"), fitting()
    for parameters in (
        (),
        (torch.zeros(1, 7, 40),) * 2,
        (torch.zeros(2, 7, 41),) * 2,
        (torch.zeros(1, 6, 41),) * 2,
    ):
        with pytest.raises(ValueError, match="initial_parameters"):
            run(operator, inputs, parameters)
    with pytest.raises(ValueError, match="the sample"):
        build("data").initial_parameters(fitting(length=20).spec(), inputs)


def test_cost_is_linear_and_no_key_is_met_exactly():
    operator = make_operator("linformer", rank=64)
    spec = make_inputs("none", batch=1, heads=2, kv_heads=1, length=1000, head_dim=16).spec()
    assert operator.cost(spec).flops == 2 * (2 + 1) * 1000 * 64 * (16 + 16)
    assert operator.cost(spec).keys_per_query == 64
    assert not operator.exact_keys(fitting(), torch.arange(3)).any()
    assert operator.learned


def test_no_tensor_has_the_size_of_all_pairs():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    sizes.append(x.untyped_storage().nbytes())
            return result

    operator = make_operator("linformer", rank=16)
    inputs = fitting(length=2048, batch=1, heads=1, kv_heads=1, head_dim=4)
    parameters = tuple(operator.initial_parameters(inputs.spec()).values())
    with Watch():
        output = operator.forward(inputs, parameters)
        operator.backward(inputs, parameters, output, output.out, output.log_sum_exp)
    assert max(sizes) <= 2048 * 16 * 4
