"""Barnes-Hut attention: its identities, its choice, its estimate of what it leaves out, and its decoder."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from oracle import gradients, leaves, make_inputs, relative_error, run

from fastattn_compile.kernels.aten import barnes_hut as barnes_hut_aten
from fastattn_compile.operators.barnes_hut import BarnesHutAttention, BarnesHutConfig
from fastattn_compile.operators.barnes_hut.choice import choose_nodes
from fastattn_compile.operators.registry import make_operator

SMALL = {"block": 8, "leaf": 2, "fanout": 2, "sinks": 3, "open": 5, "beam": 4}
VARIANTS = {
    "single": {},
    "own-choice": {"share_group": False},
    "grouped": {"group": 4},
    "sampled": {"group": 8, "select": "sampled"},
    "cumulant": {"select": "cumulant"},
    "bound": {"select": "bound", "group": 2},
    "pooled": {"rest": "pool"},
    "pooled-alone": {"rest": "pool", "open": 0},
    "pooled-grouped": {"rest": "pool", "group": 4, "share_group": False},
    "tolerance": {"tolerance": 0.2, "max_open": 9},
    "tolerance-pooled": {"tolerance": 0.3, "max_open": 9, "rest": "pool", "group": 2},
    "threes": {"block": 9, "leaf": 3, "fanout": 3, "group": 3},
    "wide-leaf": {"leaf": 8, "open": 1},
}
MASKS = [
    "causal",
    "none",
    "causal & window(40)",
    "right(30) & left(33)",
    "key_padding",
    "causal & key_padding",
]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "single", **options) -> BarnesHutAttention:
    return BarnesHutAttention(BarnesHutConfig(**{**SMALL, **VARIANTS[variant], **options}))


def inputs_of(mask="causal", length=131, dtype=torch.float64, **sizes):
    return make_inputs(mask, length=length, dtype=dtype, **sizes)


def prefix(inputs, length):
    """The first tokens of a causal attention."""
    return dataclasses.replace(
        inputs, query=inputs.query[:, :, :length], key=inputs.key[:, :, :length],
        value=inputs.value[:, :, :length],
        key_padding=None if inputs.key_padding is None else inputs.key_padding[:, :length],
    )  # fmt: skip


def far_share(inputs, operator):
    """The true share of softmax mass on keys that a row does not meet."""
    rows = torch.arange(inputs.query.shape[2])
    keys = inputs.key.repeat_interleave(inputs.group, 1)
    scores = (inputs.scale * inputs.query @ keys.mT).masked_fill(~inputs.visible(rows), -torch.inf)
    return (scores.softmax(-1) * ~operator.exact_keys(inputs, rows)).sum(-1)


@each_variant
@pytest.mark.parametrize("mask", MASKS)
def test_kernel_equals_the_definition(variant, mask):
    operator, inputs = build(variant), inputs_of(mask)
    given, _, sources = leaves(inputs, ())
    got, wanted = run(operator, given), operator.reference(given)
    assert relative_error(got.out, wanted.out) < 1e-12
    assert relative_error(got.log_sum_exp, wanted.log_sum_exp) < 1e-12
    seeds = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:3], dtype=torch.float64)
    for g, w in zip(gradients(got, sources, seeds), gradients(wanted, sources, seeds)):
        assert relative_error(g, w) < 1e-11


@each_variant
@pytest.mark.parametrize("mask", MASKS)
def test_kernel_opens_the_leaves_of_the_definition(variant, mask):
    operator, inputs = build(variant), inputs_of(mask)
    config, length = operator.config, inputs.key.shape[2]
    got = barnes_hut_aten.opened_keys(
        inputs.query,
        inputs.key,
        inputs.scale,
        config.pattern(inputs.mask),
        torch.arange(length),
        inputs.key_padding,
    )
    opened = choose_nodes(config, inputs)[0].opened.expand(
        -1, -1, 2 // (2 if config.share_group else 1), -1, -1
    )
    keys = opened.repeat_interleave(config.group, -2)[..., :length, :].repeat_interleave(config.leaf, -1)[
        ..., :length
    ]
    if config.share_group:
        keys = keys.repeat_interleave(2, 2)
    real = torch.ones(2, length, dtype=torch.bool) if inputs.key_padding is None else inputs.key_padding
    taken = real & (real.cumsum(-1) > config.sinks)
    assert torch.equal(got, keys.flatten(1, 2) & taken[:, None, None])
    assert got.any() or variant == "pooled-alone"


@pytest.mark.parametrize("mask", ["causal", "none", "causal & key_padding"])
@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("group", [1, 4])
def test_opening_everything_is_exact_attention(mask, rest, group):
    inputs = inputs_of(mask)
    operator = build(open=200, beam=400, rest=rest, group=group)
    got, exact = run(operator, inputs), run(make_operator("exact"), inputs)
    assert relative_error(got.out, exact.out) < 1e-13
    assert relative_error(got.log_sum_exp, exact.log_sum_exp) < 1e-13


def test_opening_nothing_leaves_near_field_and_sinks():
    inputs = inputs_of()
    operator = build(open=0)
    rows = torch.arange(131)
    near = ((rows[:, None] // 8 - rows // 8).abs() <= 1) | (rows < 3)
    scores = inputs.scale * inputs.query @ inputs.key.repeat_interleave(2, 1).mT
    weights = scores.masked_fill(~(near & (rows <= rows[:, None])), -torch.inf).softmax(-1)
    assert relative_error(run(operator, inputs).out, weights @ inputs.value.repeat_interleave(2, 1)) < 1e-13


@each_variant
@pytest.mark.parametrize("now", [17, 40, 64, 97, 130])
def test_later_tokens_change_nothing_before_them(variant, now):
    operator, inputs = build(variant), inputs_of(dtype=torch.float32)
    changed = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
    for x in changed:
        x[:, :, now:] = 50 * torch.randn_like(x[:, :, now:])
    other = dataclasses.replace(inputs, query=changed[0], key=changed[1], value=changed[2])
    before, after = run(operator, inputs), run(operator, other)
    assert torch.equal(before.out[:, :, :now], after.out[:, :, :now])
    assert torch.equal(before.log_sum_exp[:, :, :now], after.log_sum_exp[:, :, :now])


@each_variant
def test_a_prefix_alone_gives_the_prefix_of_the_whole(variant):
    """The number of levels of the tree follows the length; the choice must not."""
    operator, inputs = build(variant), inputs_of(length=200)
    whole = run(operator, inputs).out
    for length in (30, 77, 128):
        assert relative_error(run(operator, prefix(inputs, length)).out, whole[:, :, :length]) < 1e-12


@pytest.mark.parametrize(
    ("variant", "mask", "prefilled"),
    [(x, "causal", 50) for x in VARIANTS]
    + [
        ("single", "causal", 1),
        ("pooled", "causal", 1),
        ("pooled-grouped", "causal & window(40)", 50),
        ("pooled-grouped", "causal & key_padding", 2),
        ("grouped", "causal & window(40)", 50),
        ("grouped", "causal & key_padding", 2),
    ],
)
def test_decoding_equals_one_pass(variant, mask, prefilled):
    operator, inputs = build(variant), inputs_of(mask, length=90)
    if inputs.key_padding is not None:
        padding = inputs.key_padding.clone()
        padding[:, prefilled:] = True
        inputs = dataclasses.replace(inputs, key_padding=padding)
    wanted = run(operator, inputs)
    decoder = operator.decoder(inputs.scale)
    outputs = [decoder.prefill(prefix(inputs, prefilled))]
    for now in range(prefilled, 90):
        at = slice(now, now + 1)
        outputs.append(decoder.step(*(x[:, :, at] for x in (inputs.query, inputs.key, inputs.value))))
    assert relative_error(torch.cat([x.out for x in outputs], 2), wanted.out) < 1e-12
    assert relative_error(torch.cat([x.log_sum_exp for x in outputs], 2), wanted.log_sum_exp) < 1e-12
    assert 90 < decoder.stored_rows() < 2 * 90 + 10


def test_decoding_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="causal"):
        build().decoder(1.0).prefill(make_inputs("none"))
    with pytest.raises(RuntimeError, match="prefill"):
        build().decoder(1.0).step(*(torch.zeros(1, 1, 1, 2),) * 3)


@pytest.mark.parametrize("variant", ["single", "pooled-grouped", "cumulant"])
def test_gradcheck(variant):
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, length=45, head_dim=3)
    operator = build(variant)
    given, _, sources = leaves(inputs, ())
    # A finite difference is only a derivative while the choice stands: the definition says that it does here.
    plain = [x.opened for x in choose_nodes(operator.config, inputs)]
    for sign in (-1, 1):
        moved = dataclasses.replace(inputs, query=inputs.query + sign * 1e-5, key=inputs.key + sign * 1e-5)
        assert all(torch.equal(a, b.opened) for a, b in zip(plain, choose_nodes(operator.config, moved)))

    def function(q, k, v):
        output = run(operator, dataclasses.replace(given, query=q, key=k, value=v))
        return output.out, output.log_sum_exp

    assert torch.autograd.gradcheck(function, sources, fast_mode=True)


def test_sequences_of_a_batch_choose_alone():
    operator, inputs = build(), inputs_of(batch=3)
    order = torch.tensor([2, 0, 1])
    moved = dataclasses.replace(
        inputs, query=inputs.query[order], key=inputs.key[order], value=inputs.value[order]
    )
    assert relative_error(run(operator, moved).out, run(operator, inputs).out[order]) < 1e-13


@pytest.mark.parametrize("select", ["mean", "cumulant"])
def test_the_estimate_ranks_rows_by_what_they_leave_out(select):
    inputs = inputs_of(length=200)
    inputs = dataclasses.replace(inputs, scale=2 * inputs.scale)
    operator = build(select=select)
    estimate, true = operator.unopened_mass(inputs), far_share(inputs, operator)
    assert ((estimate >= 0) & (estimate <= 1)).all()
    ranks = [x.flatten().argsort().argsort().double() for x in (estimate, true)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9
    assert not operator.unopened_mass(prefix(inputs, 16)).any()


@pytest.mark.parametrize("mask", ["causal", "none", "causal & key_padding"])
@pytest.mark.parametrize("group", [1, 4])
def test_the_bound_holds_for_every_row(mask, group):
    inputs = inputs_of(mask, length=200)
    operator = build(select="bound", group=group)
    seen = inputs.visible(torch.arange(200)).any(-1).expand(2, 4, 200)
    estimate, true = operator.unopened_mass(inputs), far_share(inputs, operator)
    assert (estimate[seen] >= true[seen] - 1e-12).all() and (estimate <= 1).all()


def test_the_error_is_bounded_by_the_unopened_mass():
    operator, inputs = build(), inputs_of(length=200)
    got, exact = run(operator, inputs).out, run(make_operator("exact"), inputs).out
    spread = (
        (inputs.value[:, :, :, None] - inputs.value[:, :, None])
        .norm(dim=-1)
        .amax((-2, -1))
        .repeat_interleave(2, 1)
    )
    assert ((got - exact).norm(dim=-1) <= far_share(inputs, operator) * spread[..., None] + 1e-12).all()


def test_a_smaller_tolerance_opens_more_and_errs_less():
    inputs = inputs_of(length=200)
    exact = run(make_operator("exact"), inputs).out
    rows = torch.arange(200)
    met, errors, left_out = [], [], []
    for tolerance in (0.8, 0.4, 0.2, 0.1, 0.02):
        operator = build(tolerance=tolerance, max_open=100, beam=100)
        keys = operator.exact_keys(inputs, rows)
        if met:
            assert not (met[-1] & ~keys).any()
        met.append(keys)
        left_out.append(float(operator.unopened_mass(inputs).max()))
        errors.append(relative_error(run(operator, inputs).out, exact))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.25 * errors[0]
    assert int(met[-1].sum()) > int(met[0].sum())
    # One choice for two query heads, each by its own estimate: what stays closed is tolerated for both.
    assert all(share <= tolerance + 1e-9 for share, tolerance in zip(left_out, (0.8, 0.4, 0.2, 0.1, 0.02)))


def test_a_needle_is_found_where_a_window_is_blind():
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, length=256, head_dim=16)
    query, key = inputs.query.clone(), inputs.key.clone()
    key[:, :, 41] = 12 * query[:, :1, 250]
    query[:, 1, 250] = query[:, 0, 250]
    inputs = dataclasses.replace(inputs, query=query, key=key)
    operator = build(open=2, beam=8)
    assert operator.exact_keys(inputs, torch.tensor([250]))[..., 41].all()
    exact = run(make_operator("exact"), inputs).out[:, :, 250]
    assert relative_error(run(operator, inputs).out[:, :, 250], exact) < 0.01
    blind = make_operator("window", width=int(operator.cost(inputs.spec()).keys_per_query) + 1, sinks=3)
    assert relative_error(run(blind, inputs).out[:, :, 250], exact) > 0.5


@each_variant
@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(40)", "right(30) & left(33)"])
def test_the_cost_counts_the_keys_that_are_met(variant, mask):
    operator, inputs = build(variant), inputs_of(mask, length=200)
    config = operator.config
    met = operator.exact_keys(inputs, torch.arange(200)).expand(2, 4, 200, 200).sum(-1).double().mean()
    pooled = 0.0
    if config.rest == "pool":
        closed = sum(x.closed.sum(-1) for x in choose_nodes(config, inputs)).double()
        pooled = float(closed.repeat_interleave(config.group, -1)[..., :200].mean())
    counted = operator.cost(inputs.spec()).keys_per_query
    if config.tolerance:
        assert counted >= met
    else:
        # Short nodes, beside the sinks and at the end, are counted as full: the data decides which are met.
        assert abs(counted - float(met) - pooled) <= config.leaf


@each_variant
def test_selection_products_are_the_candidates_of_the_descent(variant):
    operator, inputs = build(variant), inputs_of(length=200, batch=1)
    config = operator.config
    scored = sum((x.opened | x.closed).sum(-1) for x in choose_nodes(config, inputs)).double()
    levels = config.pattern(inputs.mask).levels(200)
    scored = scored - sum(
        (x.opened | x.closed).sum(-1).double() for x in choose_nodes(config, inputs)[levels:]
    )
    factor = (2 if config.select in ("cumulant", "bound") else 1) * (4 if config.select == "sampled" else 1)
    wanted = float(scored.mean()) * factor * scored.shape[-1] / 200
    # A leaf of nothing but sinks is counted among the children of its parent.
    assert operator.selection_products(inputs.spec()) == pytest.approx(wanted, rel=0.01)


def test_choosing_grows_with_the_logarithm_of_the_length():
    spec = make_inputs("causal").spec()
    work = [
        BarnesHutAttention().selection_products(dataclasses.replace(spec, query_len=n, key_len=n))
        for n in (4096, 8192, 16384, 32768, 65536)
    ]
    steps = [b - a for a, b in pairwise(work)]
    assert work[1] <= 250 and max(steps) < 64


def test_no_tensor_grows_with_the_square_of_the_length():
    inputs = make_inputs("causal", batch=1, heads=1, kv_heads=1, length=6144, head_dim=4)
    operator = BarnesHutAttention(BarnesHutConfig(open=8, beam=8))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    with Watch():
        output = operator.forward(inputs)
        operator.backward(inputs, (), output, torch.ones_like(output.out), None)
    assert largest < 6144 * 6144


@pytest.mark.parametrize(
    "options",
    [{"leaf": 5}, {"group": 3}, {"sinks": 65}, {"open": -1}, {"beam": 0}, {"fanout": 1}, {"tolerance": 1.0},
     {"select": "best"}, {"rest": "keep"}, {"max_open": 0}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_operator("barnes_hut", **options)


@pytest.mark.parametrize(("mask", "word"), [("chunk(16)", "chunk"), ("causal & prefix(9)", "prefix")])
def test_masks_it_cannot_honour(mask, word):
    support = build().supports(make_inputs(mask).spec())
    assert not support and word in support.reason
