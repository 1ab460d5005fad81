"""CAST: kernels against the definition, padding, NaN, causality, decoding, memory."""

import dataclasses

import pytest
import torch
from cast_cases import CASES, SWITCHES, build, each_case, fitting
from oracle import (
    assert_as_good_as,
    cast,
    gradients,
    leaves,
    make_parameters,
    relative_error,
    run,
)

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.cast.config import CHOICES, CastConfig
from fastattn_compile.operators.library import torch_op
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_kernel_is_as_accurate_as_its_type(case, dtype, padded):
    operator = build(case)
    inputs = fitting(operator, padded, dtype=dtype, length=33, value_dim=6)
    parameters = make_parameters(operator, inputs)
    seeds = [torch.randn(2, 4, 33, 6, dtype=dtype), torch.randn(2, 4, 33, dtype=dtype)]
    results = []
    for evaluate, wide in (
        (lambda i, p: run(operator, i, p), False), (operator.reference, False), (operator.reference, True)
    ):  # fmt: skip
        given, params = inputs, parameters
        if wide:
            given, params = cast(inputs, torch.float64), tuple(p.double() for p in parameters)
        given, params, sources = leaves(given, params)
        output = evaluate(given, params)
        q, k, v, *learned = gradients(output, sources, tuple(s.to(given.value.dtype) for s in seeds))
        # A single number errs by luck; the learned parameters are judged together.
        flat = torch.cat([x.flatten() for x in learned])
        results.append((output.out, output.log_sum_exp, q, k, v, flat))
    names = ("out", "log_sum_exp", "query", "key", "value", "parameters")
    for name, got, formula, oracle in zip(names, *results):
        assert_as_good_as(got, oracle=oracle, formula=formula, name=name)


@each_case
def test_gradcheck(case):
    operator = build(case)
    inputs = fitting(operator, True, length=23, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    given, _parameters, sources = leaves(inputs, make_parameters(operator, inputs))

    def function(q, k, v, *params):
        output = run(operator, dataclasses.replace(given, query=q, key=k, value=v), params)
        return output.out, output.log_sum_exp.masked_fill(output.log_sum_exp == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


@pytest.mark.parametrize(("name", "value"), SWITCHES)
@pytest.mark.parametrize("clustering", CHOICES["clustering"])
@pytest.mark.parametrize("combine", CHOICES["combine"])
def test_every_switch_equals_the_definition(name, value, clustering, combine):
    options = {"clustering": clustering, "combine": combine, name: value}
    if combine == "lse" and value in ("included", "learned"):
        pytest.skip("refused at construction")
    operator = make_operator("cast", clusters=4, cluster_size=9, **options)
    inputs = fitting(operator, True, length=30, dtype=torch.float64, value_dim=3)
    given, parameters, sources = leaves(inputs, make_parameters(operator, inputs))
    seeds = torch.randn(2, 4, 30, 3, dtype=torch.float64), torch.randn(2, 4, 30, dtype=torch.float64)
    got, wanted = run(operator, given, parameters), operator.reference(given, parameters)
    assert relative_error(got.out, wanted.out) < 1e-12
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-12
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert float((g - w).abs().max()) < 1e-11 * max(1.0, float(w.abs().max()))


def test_switches_change_the_result():
    results = []
    for name, value in [("clusters", 4), *SWITCHES]:
        operator = make_operator(
            "cast", **{"clusters": 4, "cluster_size": 9, "clustering": "sa_topk", name: value}
        )
        inputs = fitting(operator, dtype=torch.float64, length=30)
        results.append((name, value, run(operator, inputs, make_parameters(operator, inputs)).out))
    default = results[0][2]
    changed = {(name, value) for name, value, out in results if not torch.allclose(out, default)}
    defaults = {(name, getattr(CastConfig(), name)) for name, _ in SWITCHES}
    # These three move affinities, though not always a cluster; the test above compares them all the same.
    quiet = {("head_reduce", "mean"), ("affinity_scale", "sqrt_width"), ("sa_order", "pair")}
    assert changed >= set(SWITCHES) - defaults - quiet
    assert not changed & defaults


@pytest.mark.parametrize("case", ["topk", "topk-overlapping", "sa-pairs", "causal"])
def test_exact_keys_are_those_that_the_definition_meets(case):
    operator = build(case)
    inputs = fitting(operator, True, dtype=torch.float64)
    parameters = make_parameters(operator, inputs)
    rows = torch.tensor([0, 7, 20, 40])
    marked = operator.exact_keys(inputs, rows, parameters)
    assert not (marked & ~inputs.visible(rows)).any() and marked.any()
    if operator.config.clustering != "topk":
        itself = rows[:, None] == torch.arange(41)
        assert torch.equal(operator.exact_keys(inputs, rows), inputs.visible(rows) & itself)
        assert not (operator.exact_keys(inputs, rows) & ~marked).any()
    size = operator.config.size(41) * (5 if operator.config.clustering == "topk" else 1)
    assert int(marked.sum(-1).max()) <= size


@each_case
def test_padding_has_no_influence(case):
    operator = build(case)
    inputs = fitting(operator, True)
    parameters = make_parameters(operator, inputs)
    padding = ~inputs.key_padding[:, None, :, None]
    dirty = dataclasses.replace(
        inputs, **{x: getattr(inputs, x).masked_fill(padding, torch.nan) for x in ("query", "key", "value")}
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
    inputs = fitting(operator, True)
    parameters = make_parameters(operator, inputs)
    padding = inputs.key_padding.clone()
    padding[0] = False
    given, params, sources = leaves(dataclasses.replace(inputs, key_padding=padding), parameters)
    output = run(operator, given, params)
    assert not output.out[0].any() and (output.log_sum_exp[0] == -torch.inf).all()
    assert output.out[1].any() and torch.isfinite(output.out).all()
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3])
    assert all(torch.isfinite(g).all() for g in gradients(output, sources, seeds))


@pytest.mark.parametrize("case", ["sa", "sa-pairs", "sa-lse"])
def test_clusters_may_stay_empty(case):
    """Fewer real tokens than clusters."""
    operator = build(case, clusters=7)
    inputs = fitting(operator, True, length=30, batch=1, dtype=torch.float64)
    padding = torch.zeros_like(inputs.key_padding)
    padding[:, [3, 11, 12]] = True
    given, parameters, sources = leaves(
        dataclasses.replace(inputs, key_padding=padding), make_parameters(operator, inputs)
    )
    got, wanted = run(operator, given, parameters), operator.reference(given, parameters)
    assert relative_error(got.out, wanted.out) < 1e-12
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=torch.float64)
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert torch.allclose(g, w, atol=1e-11)


@each_case
@pytest.mark.parametrize("side", ["query", "key", "value"])
def test_nan_ends_and_is_seen(case, side):
    operator = build(case)
    inputs = fitting(operator)
    parameters = make_parameters(operator, inputs)
    getattr(inputs, side)[0, 0, 17, 0] = torch.nan
    out = run(operator, inputs, parameters).out
    assert not out[1].isnan().any()
    if side == "query":
        assert out[0].isnan().any(-1).nonzero().tolist() == [[0, 17]]
    elif operator.config.causal:
        assert not out[0, :, :17].isnan().any() and out[0, :2, 17:].isnan().any(-1).all()
    elif side == "key":
        assert out[0].isnan().all()


@each_case
def test_inputs_and_parameters_of_mixed_types(case):
    operator = build(case)
    inputs = fitting(operator)
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
def test_the_torch_op_keeps_its_promises(case):
    operator = build(case)
    inputs = fitting(operator, length=21, batch=1)
    parameters = [p.requires_grad_() for p in make_parameters(operator, inputs)]
    tensors = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    arguments = (*tensors, None, None, None, parameters, 0.3, str(inputs.mask), operator.token, "site")
    torch.library.opcheck(torch_op("cast"), arguments)


@pytest.mark.parametrize("case", ["causal", "causal-own", "causal-lse"])
def test_the_future_does_not_move_the_past(case):
    operator = build(case)
    inputs = fitting(operator, length=150)
    parameters = make_parameters(operator, inputs)
    before = run(operator, inputs, parameters)
    for now in (1, 33, 64, 100):
        changed = {x: getattr(inputs, x).clone() for x in ("query", "key", "value")}
        for x in changed.values():
            x[:, :, now:] = 50 * torch.randn_like(x[:, :, now:])
        after = run(operator, dataclasses.replace(inputs, **changed), parameters)
        assert torch.equal(before.out[:, :, :now], after.out[:, :, :now])
        assert torch.equal(before.log_sum_exp[:, :, :now], after.log_sum_exp[:, :, :now])


@pytest.mark.parametrize("case", ["causal", "causal-own", "causal-lse"])
@pytest.mark.parametrize("prefill", [0, 1, 90])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_gives_what_one_pass_gives(case, prefill, padded):
    operator = build(case)
    inputs = fitting(operator, length=140, dtype=torch.float64)
    if padded:
        padding = torch.ones(2, 140, dtype=torch.bool)
        padding[1, : prefill // 2] = False
        inputs = dataclasses.replace(
            inputs, key_padding=padding, mask=MaskStructure(right=0, key_padding=True)
        )
    parameters = make_parameters(operator, inputs)
    whole = run(operator, inputs, parameters)
    decoder = operator.decoder(inputs.scale, parameters)

    def part(x, start, stop):
        return x[:, :, start:stop]

    outputs = []
    tensors = (inputs.query, inputs.key, inputs.value)
    if prefill:
        first = AttentionInputs(
            *(part(x, 0, prefill) for x in tensors), inputs.scale, inputs.mask,
            None if not padded else inputs.key_padding[:, :prefill],
        )  # fmt: skip
        outputs.append(decoder.prefill(first))
        with pytest.raises(ValueError, match="already"):
            decoder.prefill(first)
    rows = decoder.stored_rows()
    outputs += [decoder.step(*(part(x, t, t + 1) for x in tensors)) for t in range(prefill, 140)]
    assert torch.allclose(torch.cat([o.out for o in outputs], 2), whole.out, atol=1e-11)
    assert torch.allclose(torch.cat([o.log_sum_exp for o in outputs], 2), whole.log_sum_exp, atol=1e-11)
    assert decoder.stored_rows() == rows < 140


def test_only_the_causal_form_decodes():
    assert make_operator("cast").decoder(1.0) is None
    operator = build("causal")
    inputs = fitting(operator)
    with pytest.raises(ValueError, match="causal"):
        operator.decoder(1.0, make_parameters(operator, inputs)).prefill(
            dataclasses.replace(inputs, mask=MaskStructure())
        )


@each_case
def test_no_tensor_has_the_size_of_all_pairs(case):
    """Forward and backward allocate less than half an n x n matrix of float32, per head, at the most."""
    length, peak = 2048, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    peak.append(x.untyped_storage().nbytes())
            return result

    options = {**CASES[case], "clusters": 32, "cluster_size": 64}
    operator = make_operator("cast", **options)
    inputs = fitting(operator, length=length, batch=1, heads=1, kv_heads=1, head_dim=4)
    parameters = tuple(operator.initial_parameters(inputs.spec()).values())
    with Watch():
        output = operator.forward(inputs, parameters)
        operator.backward(inputs, parameters, output, output.out, output.log_sum_exp)
    assert max(peak) < 0.5 * length * length * 4
