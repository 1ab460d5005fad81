"""Conv-basis attention against its specification: golden numbers, identities, bounds, masks, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import gradients, leaves, make_inputs, run

from fastattn_compile.kernels.aten.conv import fft_flops
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.conv_basis.basis import Basis, decompose, exponentiate, recover
from fastattn_compile.operators.conv_basis.bounds import score_error_for
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator

ANCHORS = ["sink_strided", "strided", "recover", "jumps"]
FORMS = ["fft", "buckets", "gather"]


def golden(text: str) -> torch.Tensor:
    """The rows of a table of the specification: numbers in pairs."""
    numbers = [float(x) for x in text.replace("(", " ").replace(")", " ").replace(",", " ").split()]
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 2)


QUERY = golden("(0,1)(-1,0)(0,-1)(1,0)(0,1)(-1,0)(0,-1)(1,0)")
KEY = golden("(0,1)(-1,0)(0,-1)(1,0)(-1,0)(0,-1)(1,0)(0,1)")
VALUE = golden("(1,0)(0,1)(2,-1)(-1,3)(1,1)(0,-2)(3,0)(-1,1)")
OUTPUT = golden(
    "1 0 0.2689414214 0.7310585786 1.4205124847 -0.4205124847 0.0553891543 1.4790574911 "
    "0.5675236915 0.7610906701 0.6076934484 0.4020926640 0.8980054257 -0.3217771223 0.7672233227 0.6773875230"
)
ROW_SUMS = [2.7182818285, 3.7182818285, 4.0861612696, 5.0861612696, 6.0861612696, 8.8044430981, 9.8044430981,
            10.1723225393]  # fmt: skip
GRAD_VALUE = golden(
    "(1.5741855040,0.6774383391)(0.5110302261,1.1482925912)(1.0029361875,0.4084969177)(0.2663017551,0.8434533537)"
    "(0.2663017551,0.3449045244)(0.2772499979,0.2118849845)(0.1019945743,0.2672233227)(0,0.0983059666)"
)
GRADS = {
    "softmax_formula": (
        golden(
            "(0,0)(-0.1966119332,-0.1966119332)(0.3476398485,-0.4233578085)(0.8475126048,0.1966119332)"
            "(-0.2353661438,0.1065719224)(-0.2606461952,0.3864063435)(0.1019945743,-0.0527289805)"
            "(0.4163080835,0.3932238665)"
        ),
        golden(
            "(-0.1151103648,0.2271902574)(-0.4041924983,0.3459833118)(-0.4930611800,-0.6044404565)"
            "(1.3249694811,-0.0639691432)(-0.1729305819,0.0606560698)(0.0096241572,0.2489720024)"
            "(-0.1810137446,-0.2143920418)(0.0317147314,0)"
        ),
    ),
    "implemented": (
        golden(
            "(0,1.3949733835)(0,-1.2892194662)(0,0.1226267663)(0,-0.7368831336)(-0.0443384106,1.3039402843)"
            "(0.2453879674,-0.3021581728)(0.2528002753,0.0154942082)(-0.0116671977,-0.0665912352)"
        ),
        golden("(0.7879032702,2.5607926933)(0,0)(0,0)(0,0)(0.2570551651,0.2971386858)(0,0)(0,0)(0,0)"),
    ),
}


def golden_inputs() -> AttentionInputs:
    q, k, v = (x[None, None] for x in (QUERY, KEY, VALUE))
    return AttentionInputs(q, k, v, 1.0, MaskStructure(right=0))


def planted(n: int, starts: list[int], seed: int, noise: float = 0.0, step: float = 3.0):
    """A lower-triangular matrix of slid columns with anchors at ``starts``, and one within ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for number, start in enumerate(starts):
        # Prefixes of different anchors, and of anchors and 0, are at least ``step`` apart at every offset.
        profile = step * (number + 1) + torch.rand(n, generator=generator, dtype=torch.float64) * 0.1
        stop = starts[number + 1] if number + 1 < len(starts) else n
        for j in range(start, stop):
            matrix[j:, j] = profile[: n - j]
    noisy = matrix + noise * (2 * torch.rand(n, n, generator=generator, dtype=torch.float64) - 1)
    return matrix, noisy.tril()


def exact_output(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


# The basis


def test_decomposition_of_a_random_matrix_has_n_terms_and_rebuilds_it():
    matrix = torch.randn(32, 32, dtype=torch.float64).tril()
    basis = decompose(matrix)
    assert basis.sizes == tuple(range(32, 0, -1))
    assert torch.allclose(basis.dense(), matrix, atol=1e-12)


def test_decomposition_of_a_planted_matrix_finds_its_terms():
    matrix, _ = planted(24, [3, 9, 17], seed=1)
    basis = decompose(matrix)
    assert basis.sizes == (21, 15, 7)
    assert torch.allclose(basis.dense(), matrix, atol=1e-12)
    assert decompose(torch.zeros(4, 4)).sizes == ()


@pytest.mark.parametrize("starts", [[0, 9, 17], [3, 9]])
def test_exponentiated_basis_is_the_exponential_also_where_no_term_covers(starts):
    """Without the correction for ``m_1 < n`` the error would be 1 on the uncovered columns."""
    matrix, _ = planted(24, starts, seed=2, step=0.5)
    assert torch.allclose(exponentiate(decompose(matrix)).dense(), matrix.exp().tril(), atol=1e-9)


def test_recover_finds_planted_anchors_under_the_noise_it_allows_and_meets_its_bound():
    n, probe, delta = 32, 4, 3.0
    eps = delta / (5 * probe)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        first, second = sorted((torch.randperm(n - probe - 1, generator=generator)[:2] + 1).tolist())
        # Prefixes differ by 4 entries of 1 at least.
        clean, noisy = planted(n, [0, first, second], seed, noise=eps, step=1.0)
        basis, _ = recover(lambda j, length: noisy[j - 1 : j - 1 + length, j - 1], n, 3, probe, delta, eps)
        assert basis.sizes == (n, n - first, n - second)
        value = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        error = (exact_output(basis.dense(), value) - exact_output(noisy, value)).abs().max()
        assert error <= 2 * math.tanh(2 * eps / 2) * value.abs().max()
        assert exponentiate(basis).dense().shape == clean.shape


def test_golden_recover_probes_and_basis():
    scores = QUERY @ KEY.T
    basis, probes = recover(lambda j, length: scores[j - 1 : j - 1 + length, j - 1], 8, 2, 2, 1.0, 0.0)
    steps = [(p.term, p.low, p.high, p.column, p.distance) for p in probes]
    assert steps == [
        (1, 1, 7, 4, 1),
        (1, 1, 4, 2, 1),
        (1, 1, 2, 1, 1),
        (2, 2, 7, 4, 0),
        (2, 5, 7, 6, 2),
        (2, 5, 6, 5, 2),
    ]
    assert basis.sizes == (8, 4)
    assert basis.vectors.tolist() == [[1, 0, -1, 0, 1, 0, -1, 0], [-1, 1, 1, -1, 0, 0, 0, 0]]
    e = math.e
    wanted = [[e, 1, 1 / e, 1, e, 1, 1 / e, 1], [1 - e, e - 1, 1 - 1 / e, 1 / e - 1, 0, 0, 0, 0]]
    after = exponentiate(basis)
    assert torch.allclose(after.vectors, torch.tensor(wanted, dtype=torch.float64))
    assert torch.allclose(after.dense().sum(1), torch.tensor(ROW_SUMS, dtype=torch.float64), atol=1e-9)
    assert isinstance(after, Basis)


def test_batched_recover_equals_the_one_written_down():
    """Every lane of the operator's search against RECOVER for one head, on generic content."""
    inputs = make_inputs("causal", length=60, dtype=torch.float64)
    for force in (True, False):
        config = {
            "k": 6,
            "anchors": "recover",
            "probe": 5,
            "delta": 2.0,
            "uncovered": "anchor" if force else "zeros",
        }
        operator = make_operator("conv_basis", **config)
        exact = operator.exact_keys(inputs, torch.tensor([59])).expand(2, 4, 1, 60)
        for b in range(2):
            for h in range(4):
                scores = inputs.scale * inputs.query[b, h] @ inputs.key[b, h // 2].T
                column = lambda j, length: scores[j - 1 : j - 1 + length, j - 1]  # noqa: E731
                if force:
                    found = [1, *_recover_after_first(column, 60, 6, 5, 2.0)]
                else:
                    found = [60 - m + 1 for m in recover(column, 60, 6, 5, 2.0, 0.0)[0].sizes]
                assert (exact[b, h, 0].nonzero()[:, 0] + 1).tolist() == found


def _recover_after_first(column, n, k, probe, delta):
    start, limit, found = 1, n - probe + 1, []
    seen = column(1, probe)
    for _ in range(k - 1):
        if start >= limit:
            break
        low, high = start + 1, limit
        while low < high:
            middle = (low + high) // 2
            apart = (column(middle, probe) - seen).abs().sum() >= delta
            low, high = (low, middle) if apart else (middle + 1, high)
        start = low
        seen = column(start, probe)
        found.append(start)
    return found


# Golden numbers of the operator


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("anchors", ["recover", "strided"])
@pytest.mark.parametrize("gradient", list(GRADS))
def test_golden_attention_and_gradients(form, anchors, gradient):
    operator = make_operator(
        "conv_basis", k=2, anchors=anchors, probe=2, delta=1.0, uncovered="ones", form=form, gradient=gradient
    )
    inputs, _, sources = leaves(golden_inputs(), ())
    output = run(operator, inputs)
    assert torch.allclose(output.out[0, 0], OUTPUT, atol=1e-9)
    assert torch.allclose(
        output.log_sum_exp[0, 0].exp(), torch.tensor(ROW_SUMS, dtype=torch.float64), atol=1e-8
    )
    upstream = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(4, 1)
    grads = torch.autograd.grad((output.out[0, 0] * upstream).sum(), sources)
    for got, wanted in zip(grads, (*GRADS[gradient], GRAD_VALUE)):
        assert torch.allclose(got[0, 0], wanted, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_golden_single_term(form):
    got = run(make_operator("conv_basis", k=1, anchors="strided", form=form), golden_inputs()).out[0, 0]
    rows = golden(
        "(0.6627407586,0.8136906513)(0.4125326859,-0.1833896235)(1.4529763828,-0.0382021441)(0.1536951210,1.0327285467)"
    )
    assert torch.allclose(got, torch.cat([OUTPUT[:4], rows]), atol=1e-9)


# Identities


@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize(
    "mask", ["causal", "none", "causal & window(7)", "left(4) & right(6)", "causal & key_padding"]
)
def test_as_many_terms_as_tokens_is_exact_attention(anchors, mask):
    """Recover finds every column when any difference counts as separation."""
    inputs = make_inputs(mask, length=30, dtype=torch.float64)
    operator = make_operator("conv_basis", k=30, anchors=anchors, probe=1, delta=1e-9)
    exact = make_operator("exact").reference(inputs)
    got = run(operator, inputs)
    rows = torch.ones(2, 30, dtype=torch.bool) if inputs.key_padding is None else inputs.key_padding
    rows = rows[:, None].expand(2, 4, 30)
    if anchors == "recover" and inputs.key_padding is not None:
        pytest.skip("equal columns of hidden keys inside the sequence end the search")
    assert torch.allclose(got.out[rows], exact.out[rows], atol=1e-9)
    assert torch.allclose(got.log_sum_exp[rows], exact.log_sum_exp[rows], atol=1e-9)


@pytest.mark.parametrize("gradient", ["implemented", "softmax_formula"])
def test_scores_of_positions_alone_are_exact_with_one_term(gradient):
    """Rotated constants: scores depend on i - j, and 7A is then the gradient of exact attention."""
    n = 40
    angle = torch.arange(n, dtype=torch.float64) * 0.3
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    value = torch.randn(1, 1, n, 3, dtype=torch.float64)
    inputs = AttentionInputs(turn[None, None] * 1.5, turn[None, None], value, 0.8, MaskStructure(right=0))
    inputs, _, sources = leaves(inputs, ())
    got = run(make_operator("conv_basis", k=1, anchors="strided", form="fft", gradient=gradient), inputs)
    exact = make_operator("exact").reference(inputs)
    assert torch.allclose(got.out, exact.out, atol=1e-12)
    if gradient == "softmax_formula":
        seeds = torch.randn_like(got.out), torch.randn_like(got.log_sum_exp)
        for g, w in zip(gradients(got, sources, seeds), gradients(exact, sources, seeds)):
            assert torch.allclose(g, w, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_on_equal_tokens_is_one_term(form, causal):
    n = 33
    key = torch.randn(1, 6, 1, 4, dtype=torch.float64).expand(1, 6, n, 4)
    value = torch.randn(1, 6, n, 2, dtype=torch.float64)
    mask = MaskStructure(right=0 if causal else None)
    operator = make_operator("conv_basis", k=1, anchors="strided", form=form, offset_bias="alibi")
    got = run(operator, AttentionInputs(key, key, value, 0.5, mask)).out
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], dtype=torch.float64)
    place = torch.arange(n)
    bias = -slopes[:, None, None] * (place[:, None] - place).abs()
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) & causal
    wanted = bias.masked_fill(hidden, -torch.inf).softmax(-1) @ value[0]
    assert torch.allclose(got[0], wanted, atol=1e-12)


@pytest.mark.parametrize("bias", ["alibi", "bucketed"])
@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(9)"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_the_site_costs_no_term(bias, mask, form):
    """Tokens that differ by a rotation alone have one profile; the site's bias is added to it (section 13)."""
    inputs = make_inputs(f"{mask} + {bias}", batch=1, length=40, head_dim=2, dtype=torch.float64)
    angle = torch.arange(40, dtype=torch.float64) * 0.3
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    inputs = dataclasses.replace(inputs, query=turn.expand(1, 4, -1, -1), key=turn.expand(1, 2, -1, -1))
    exact = make_operator("exact").reference(inputs)
    got = run(make_operator("conv_basis", k=1, anchors="strided", form=form), inputs)
    assert torch.allclose(got.out, exact.out, atol=1e-12)
    assert torch.allclose(got.log_sum_exp, exact.log_sum_exp, atol=1e-12)
    # A bias of the configuration is added to that of the site.
    both = run(make_operator("conv_basis", k=1, anchors="strided", form=form, offset_bias="alibi"), inputs)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    distance = torch.arange(-39, 40, dtype=torch.float64)
    of_site = inputs.bias if bias == "bucketed" else -inputs.bias[:, None] * distance.abs()
    inputs = dataclasses.replace(inputs, bias=of_site - slopes[:, None] * distance.abs())
    assert torch.allclose(both.out, make_operator("exact").reference(inputs).out, atol=1e-12)


@pytest.mark.parametrize("anchors", ANCHORS)
def test_equal_columns_are_exact_wherever_anchors_stand(anchors):
    """The search finds nothing that differs; an anchor more than is needed does no harm (section 3)."""
    inputs = make_inputs("causal", length=30, dtype=torch.float64)
    equal = [x[:, :, :1].expand(-1, -1, 30, -1) for x in (inputs.query, inputs.key)]
    inputs = dataclasses.replace(inputs, query=equal[0], key=equal[1])
    got = run(make_operator("conv_basis", k=5, anchors=anchors), inputs)
    assert torch.allclose(got.out, make_operator("exact").reference(inputs).out, atol=1e-12)


@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("mask", ["causal & key_padding", "key_padding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_sequence_alone(anchors, mask, side):
    alone = make_inputs(mask.replace(" & key_padding", "").replace("key_padding", "none"), length=41, batch=1,
                        dtype=torch.float64)  # fmt: skip
    pad = (0, 0, 9, 0) if side == "left" else (0, 0, 0, 9)
    real = torch.nn.functional.pad(torch.ones(1, 41, dtype=torch.bool), pad[2:])
    tensors = [
        torch.nn.functional.pad(x, pad, value=float("nan")) for x in (alone.query, alone.key, alone.value)
    ]
    padded = AttentionInputs(*tensors, alone.scale, MaskStructure.parse(mask), real)
    operator = make_operator("conv_basis", k=7, anchors=anchors, delta=2.0)
    got = run(operator, padded).out[:, :, real[0]]
    assert torch.allclose(got, run(operator, alone).out, atol=1e-12)


def test_telescoped_basis_equals_the_positive_form():
    inputs = make_inputs("causal", length=40, batch=1, heads=1, kv_heads=1, dtype=torch.float64)
    operator = make_operator(
        "conv_basis", k=6, anchors="recover", probe=4, delta=1.5, uncovered="ones", form="fft"
    )
    scores = inputs.scale * inputs.query[0, 0] @ inputs.key[0, 0].T
    basis, _ = recover(lambda j, length: scores[j - 1 : j - 1 + length, j - 1], 40, 6, 4, 1.5, 0.0)
    weights = exponentiate(basis).dense()
    wanted = weights @ inputs.value[0, 0] / weights.sum(1, keepdim=True)
    assert torch.allclose(run(operator, inputs).out[0, 0], wanted, atol=1e-9)


def test_shared_anchors_are_the_same_for_every_head_of_a_group():
    inputs = make_inputs("causal", heads=6, kv_heads=2, length=64)
    for anchors in ("recover", "jumps"):
        options = {"k": 5, "anchors": anchors, "delta": 2.0, "sinks": 1}
        rows = torch.tensor([63])
        alone = make_operator("conv_basis", **options).exact_keys(inputs, rows)
        shared = make_operator("conv_basis", **options, share_anchors=True).exact_keys(inputs, rows)
        groups = shared.unflatten(1, (2, 3))
        assert (groups == groups[:, :, :1]).all() and not (alone == shared).all()


def test_column_jumps_find_planted_changes():
    """Keys change at 20 and 45 only: these columns and the first are the anchors, and all is exact."""
    n = 64
    content = torch.randn(3, 6, dtype=torch.float64)
    part = (torch.arange(n) >= 20).int() + (torch.arange(n) >= 45).int()
    key = content[part][None, None]
    query = torch.ones(1, 1, n, 6, dtype=torch.float64)
    value = torch.randn(1, 1, n, 2, dtype=torch.float64)
    inputs = AttentionInputs(query, key, value, 1.0, MaskStructure(right=0))
    operator = make_operator("conv_basis", k=3, anchors="jumps", sinks=1)
    assert operator.exact_keys(inputs, torch.tensor([63]))[0, 0, 0].nonzero()[:, 0].tolist() == [0, 20, 45]
    assert torch.allclose(run(operator, inputs).out, make_operator("exact").reference(inputs).out, atol=1e-12)


# Bounds and the number of terms


@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(9)", "causal & key_padding"])
@pytest.mark.parametrize("spread", [0.02, 0.3, 2.0])
def test_the_error_stays_under_the_reported_bound(mask, spread):
    inputs = make_inputs(mask, length=50, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, query=spread * inputs.query)
    operator = make_operator("conv_basis", k=5)
    bound = operator.error_bound(inputs)
    error = (run(operator, inputs).out - make_operator("exact").reference(inputs).out).abs()
    if inputs.key_padding is not None:
        error = error.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    assert bound.certified
    assert (error.amax((-2, -1)) <= bound.output).all()
    assert (error.amax(-2) <= bound.channels).all()
    assert (bound.output <= bound.paper).all()
    if spread == 0.02:
        assert (bound.score_error < 0.11).all() and (error.amax((-2, -1)) > 0).all()
    sampled = operator.error_bound(inputs, rows=torch.tensor([3, 30]))
    assert not sampled.certified and (sampled.score_error <= bound.score_error + 1e-12).all()


@pytest.mark.parametrize("mask", ["causal & segments", "causal & segments & key_padding", "segments + alibi"])
def test_the_bound_of_packed_documents_is_that_of_the_worst_one(mask):
    """Anchors begin anew with every document, so its bound is that of the document by itself."""
    inputs = make_inputs(mask, batch=1, length=60, dtype=torch.float64)
    operator = make_operator("conv_basis", k=5, anchors="strided")
    bound, alone, variations = operator.error_bound(inputs), [], []
    for number in inputs.segments.unique():
        place = (inputs.segments[0] == number).nonzero()[:, 0]
        padding = None if inputs.key_padding is None else inputs.key_padding[:, place]
        one = dataclasses.replace(
            inputs, query=inputs.query[:, :, place], key=inputs.key[:, :, place], value=inputs.value[:, :, place],
            mask=dataclasses.replace(inputs.mask, segments=False), segments=None, key_padding=padding,
        )  # fmt: skip
        short = operator.shortened(len(place))
        alone.append(short.error_bound(one).score_error)
        variations.append(short._deviation(one, (), torch.arange(len(place))).variation)
    assert torch.equal(bound.score_error, torch.stack(alone).amax(0))
    error = (run(operator, inputs).out - make_operator("exact").reference(inputs).out).abs()
    if inputs.key_padding is not None:
        error = error.masked_fill(~inputs.key_padding[:, None, :, None], 0)
    assert (error.amax((-2, -1)) <= bound.output).all() and (error.amax((-2, -1)) > 0).all()
    whole = operator._deviation(inputs, (), torch.arange(60)).variation
    assert torch.allclose(whole, torch.cat(variations, -1), atol=1e-14)
    # More terms than any document has tokens: every document is exact.
    wide = make_operator("conv_basis", k=64)
    assert wide.error_bound(inputs).output.max() < 1e-13 and wide.diagnostics(inputs)["score_error"] < 1e-13


def test_score_error_for_an_output_error_inverts_the_bound():
    assert 2 * math.tanh(score_error_for(0.3) / 2) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="between 0 and 2"):
        score_error_for(2.5)


def test_terms_under_a_budget():
    inputs = make_inputs("causal", length=64, heads=8, kv_heads=8, batch=4)
    part = (torch.arange(64) >= 32).long()
    steps = dataclasses.replace(inputs, query=torch.ones_like(inputs.query), key=inputs.key[:, :, part * 40])
    operator = make_operator("conv_basis", anchors="strided")
    found = operator.choose_terms(steps, 0.3, most=64)
    assert found.k == 2 and found.error <= 0.3 < found.tried[0][1]
    # Nothing is left but the margin of 32 rows of 4 sequences: heads are no samples of their own.
    assert found.error == pytest.approx(2 * math.sqrt(math.log(2 / 0.05) / (2 * 32 * 4)), rel=1e-3)
    generic = operator.choose_terms(dataclasses.replace(inputs, query=9 * inputs.query), 0.3, most=8)
    assert generic.k is None and [k for k, _ in generic.tried] == [1, 2, 4, 8]
    # Above a two-hundredth of the length exact attention is faster: one term is all that is tried here.
    assert [k for k, _ in operator.choose_terms(inputs, 1e-3).tried] == [1]
    with pytest.raises(ValueError, match="positive"):
        operator.choose_terms(inputs, 0.0)


# Cost and refusals


@pytest.mark.parametrize(
    ("n", "ratios"),
    [(2048, (12, 1.9, 0.24)), (8192, (43, 6.5, 0.84)), (32768, (151, 23, 3.0)), (131072, (540, 82, 11))],
)
def test_flops_of_the_published_table(n, ratios):
    """Specification section 10, d = 128: exact causal attention ``2 n^2 d`` over transforms and anchors."""
    for k, ratio in zip((8, 64, 512), ratios):
        conv = fft_flops(n, k, 128, 1) + 2.0 * 128 * k * (n + 1) / 2
        assert 2.0 * n * n * 128 / conv == pytest.approx(ratio, rel=0.07), k


def test_cost_counts_what_the_site_needs():
    def cost(mask="causal", **options):
        spec = make_inputs(mask, length=4096, head_dim=64, heads=2, kv_heads=1, batch=1).spec()
        return make_operator("conv_basis", **options).cost(spec)

    assert (
        cost(k=8, form="fft").flops
        < cost(k=16, form="fft").flops
        < cost(k=16, form="fft", anchors="recover").flops
    )
    assert cost("none", k=8, form="fft").flops == pytest.approx(2 * cost(k=8, form="fft").flops, rel=0.01)
    assert cost(k=8).flops <= cost(k=8, form="gather").flops
    # Four sinks that every query meets, and of four anchors that stand evenly the mean query sees 2.5.
    assert cost(k=8).keys_per_query == pytest.approx(6.5, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"stride": 5}, {"anchors": "strided"}])
def test_cost_counts_the_anchors_that_are_met(options):
    inputs = make_inputs("causal", batch=1)
    operator = make_operator("conv_basis", k=9, **options)
    met = operator.exact_keys(inputs, torch.arange(75)).sum(-1).double().mean()
    assert operator.cost(inputs.spec()).keys_per_query == pytest.approx(float(met))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "positive number of terms"),
        ({"probe": 0}, "probe must be"),
        ({"sinks": -1}, "sinks must be"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"delta": float("nan")}, "delta must be a finite"),
        ({"eps": 0.3, "delta": 8.0, "probe": 8}, "at most delta"),
        ({"anchors": "guess"}, "sink_strided"),
        ({"gradient": "both"}, "softmax_formula"),
        ({"form": "dense"}, "gather"),
        ({"degree": 3}, "even"),
        ({"approximation": "low_rank", "offset_bias": "alibi"}, "Toeplitz"),
        ({"terms": 3}, "unknown option"),
    ],
)
def test_bad_options_are_refused_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        make_operator("conv_basis", **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mask": MaskStructure(right=0, prefix=4)}, "prefix"),
        ({"mask": MaskStructure(chunk=16)}, "chunked"),
        ({"kind": "cross"}, "cross"),
        ({"query_len": 1}, "1 queries against"),
        ({"query_len": 63, "key_len": 63}, "k=64 terms for 63 tokens"),
        ({"bias": "dense"}, "dense"),
    ],
)
def test_sites_that_cannot_be_served_are_refused_with_the_reason(change, text):
    spec = dataclasses.replace(make_inputs("causal", length=64).spec(), **change)
    support = make_operator("conv_basis", k=64).supports(spec)
    assert not support and text in support.reason


def test_wrong_calls_say_what_is_wrong():
    inputs = make_inputs("causal", length=20)
    with pytest.raises(ValueError, match="k=64 terms for 20 tokens"):
        make_operator("conv_basis").forward(inputs)
    with pytest.raises(ValueError, match="takes 1 parameters"):
        make_operator("conv_basis", k=4, offset_bias="learned").forward(inputs)
    with pytest.raises(ValueError, match=r"offset_bias must have shape \(4, 20 or more\)"):
        make_operator("conv_basis", k=4, offset_bias="learned").forward(inputs, (torch.zeros(4, 19),))
    with pytest.raises(ValueError, match="key_bias must have shape"):
        make_operator("conv_basis", k=4, key_bias=True).forward(inputs, (torch.zeros(3, 4, 20),))
    with pytest.raises(ValueError, match="dense bias"):
        make_operator("conv_basis", k=4).forward(dataclasses.replace(inputs, bias=torch.zeros(20, 20)))
