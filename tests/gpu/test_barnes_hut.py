"""Barnes-Hut attention: the tree, the choice, the attention, decoding."""

import dataclasses

import pytest
import torch
from dense import check
from oracle import assert_as_good_as, make_inputs

from fastattn_compile.kernels import barnes_hut as face
from fastattn_compile.kernels.aten import barnes_hut as aten
from fastattn_compile.kernels.aten import barnes_hut_tree as aten_tree
from fastattn_compile.kernels.aten.barnes_hut_tree import TreePattern
from fastattn_compile.kernels.aten.window import LocalTiles
from fastattn_compile.kernels.dispatch import use_kernels
from fastattn_compile.kernels.gpu import barnes_hut, barnes_hut_decode, barnes_hut_far, barnes_hut_tree
from fastattn_compile.operators.barnes_hut.decode import BarnesHutDecoder
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator

SCALE = 0.3
SMALL = TreePattern(
    block=16, leaf=2, fanout=2, group=16, open=4, beam=4, sinks=3, statistic="mean", samples=0, share=True,
    causal=True, left=None, right=0, tolerance=0.0,
)  # fmt: skip


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def draw(device, dtype=torch.float32, batch=1, heads=2, kv_heads=1, length=100, channels=(16, 16), pad=False):
    query, key, value = (
        torch.randn(batch, length, h, c).to(device, dtype).transpose(1, 2)
        for h, c in ((heads, channels[0]), (kv_heads, channels[0]), (kv_heads, channels[1]))
    )
    padding = torch.rand(batch, length, device=device) > 0.2 if pad else None
    if padding is not None:
        # What stands at padding is never read.
        hidden = ~padding[:, None, :, None]
        query, key, value = (x.masked_fill(hidden, torch.nan) for x in (query, key, value))
    return query, key, value, padding


def taken_of(query, key, value, pattern, padding):
    return LocalTiles(query, key, value, aten.near_field(pattern), padding).fine


PATTERNS = {
    "mean": {},
    "cumulant": {"statistic": "cumulant", "causal": False, "right": None},
    "bound": {"statistic": "bound", "causal": False, "left": 70, "right": 60},
    "sampled": {"samples": 2, "left": 60, "leaf": 4, "fanout": 4},
    "own": {"share": False, "leaf": 1, "open": 6},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_tree_and_what_is_opened(name, device):
    pattern = small(**PATTERNS[name])
    query, key, value, padding = draw(device, heads=2, pad=True, length=80)
    query = query.nan_to_num(0.5)
    length, taken = key.shape[2], taken_of(query, key, value, pattern, padding)
    clean = key.double().masked_fill(~padding[:, None, :, None], 0).flatten(0, 1)
    tree = aten_tree.build_tree(pattern, clean, None, taken)
    made = barnes_hut_tree.build_tree(pattern, key, taken)
    for level, first, total in zip(tree.levels, made.first, made.total, strict=True):
        span = slice(first, first + total)
        count = made.count[:, span]
        assert torch.equal(count.double().log(), level.log_count)
        mean, more = made.main[:, span] / count.clamp(min=1)[..., None], made.more[:, span]
        found = {
            "mean": lambda: mean, "bound": lambda: torch.cat([more, made.main[:, span]], -1),
            "cumulant": lambda: torch.cat([mean, more / count.clamp(min=1)[..., None] - mean**2], -1),
        }[pattern.statistic]()  # fmt: skip
        there = count > 0
        torch.testing.assert_close(found[there], level.features[there].float(), rtol=1e-5, atol=1e-5)

    leaves, rest = barnes_hut_tree.choose(made, query, key.shape[1], SCALE, True)
    first = torch.arange(-(-length // pattern.group), device=device) * pattern.group
    voices = aten_tree.voices_of(pattern, query.double(), first, key.shape[1])
    choice = aten_tree.choose(pattern, tree.levels, voices, SCALE, first, length, rest=True)
    for got, wanted, real in zip(
        leaves.flatten(0, 1), choice.leaves.flatten(0, 2), choice.opened.flatten(0, 2)
    ):
        assert sorted(got[got >= 0].tolist()) == sorted(wanted[real].tolist())
    assert choice.closed.any()
    for got, many, wanted, real in zip(
        rest.nodes.flatten(0, 1), rest.count.flatten(), choice.rest.flatten(0, 2), choice.closed.flatten(0, 2)
    ):
        assert sorted(got[:many].tolist()) == sorted(wanted[real].tolist())


ATTENTIONS = {
    "grouped": ({}, {"heads": 4, "kv_heads": 2, "pad": True, "channels": (16, 24), "length": 70}),
    "bidirectional": (
        {"causal": False, "right": None},
        {"channels": (24, 16), "heads": 1, "pad": True, "length": 75},
    ),
    "tolerance": ({"tolerance": 0.4, "open": 8}, {"length": 60, "pad": True, "heads": 2, "batch": 2}),
    "band": ({"causal": False, "left": 50, "right": 40, "share": False}, {"length": 70}),
    "half": ({"group": 8}, {"dtype": torch.float16, "length": 60}),
    "bfloat": ({"block": 12, "leaf": 4, "group": 12}, {"dtype": torch.bfloat16, "length": 77, "heads": 3}),
}


def run(query, key, value, pattern, padding, seeds, pool=False):
    out, lse = barnes_hut.forward(query, key, value, SCALE, pattern, pool, padding)
    saved = out, lse, *seeds
    return [out, lse, *barnes_hut.backward(query, key, value, SCALE, pattern, pool, *saved, padding)]


def drawn(sizes, device):
    query, key, value, padding = draw(device, **sizes)
    seeds = (
        torch.randn(*query.shape[:3], value.shape[3], device=device).to(value.dtype),
        torch.randn(query.shape[:3], device=device),
    )
    return query.nan_to_num(0.5), key, value, padding, seeds


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_over_near_sinks_and_opened(name, device):
    pattern = small(**ATTENTIONS[name][0])
    query, key, value, padding, seeds = drawn(ATTENTIONS[name][1], device)
    got = run(query, key, value, pattern, padding, seeds)
    clean = [x.nan_to_num() for x in (key, value)]
    check(got, query, *clean, SCALE, met(query, *clean, pattern, padding), seeds)


POOLED = {
    "grouped": ({}, {"heads": 4, "kv_heads": 2, "pad": True, "channels": (16, 24), "length": 70, "batch": 2}),
    "bidirectional": (
        {"causal": False, "right": None, "statistic": "bound", "leaf": 4},
        {"channels": (24, 16), "heads": 1, "pad": True, "length": 75},
    ),
    "tolerance": ({"tolerance": 0.4, "open": 8, "group": 8}, {"length": 60, "pad": True, "batch": 2}),
    "band": (
        {"causal": False, "left": 50, "right": 40, "share": False, "statistic": "cumulant", "fanout": 4},
        {"length": 70},
    ),
    "alone": ({"open": 0, "sinks": 0, "block": 8, "group": 8}, {"length": 90, "heads": 1}),
    "short": ({}, {"length": 30, "heads": 1}),
    "half": ({"group": 8, "left": 70}, {"dtype": torch.float16, "length": 90}),
    "bfloat": ({"block": 12, "leaf": 4, "group": 12}, {"dtype": torch.bfloat16, "length": 100, "heads": 3}),
}


@pytest.mark.parametrize("name", POOLED)
def test_attention_that_meets_closed_nodes_as_rows(name, device, monkeypatch):
    # So few pairs of a program that nodes, and leaves, have several.
    monkeypatch.setattr(barnes_hut_far, "_PAIRS", 3)
    pattern = small(**POOLED[name][0])
    query, key, value, padding, seeds = drawn(POOLED[name][1], device)
    got = run(query, key, value, pattern, padding, seeds, pool=True)
    clean = [x.nan_to_num() for x in (key, value)]
    heads = key.shape[:2]
    taken = taken_of(query, key, value, pattern, padding).repeat_interleave(heads[1], 0)

    def rows(key, value):
        tree = aten_tree.build_tree(pattern, key.flatten(0, 1), value.flatten(0, 1), taken)
        pooled = (x.unflatten(0, heads) for x in (tree.keys, tree.values, tree.counts.log()))
        given = key, value, torch.zeros_like(key[..., 0])
        keys, values, bias = (torch.cat(pair, 2) for pair in zip(given, pooled))
        return keys, values, bias.repeat_interleave(query.shape[1] // heads[1], 1)[:, :, None]

    tokens, nodes = met(query, *clean, pattern, padding), closed(query, *clean, pattern, padding)
    assert nodes.any() == (name != "short")
    check(got, query, *clean, SCALE, torch.cat([tokens, nodes], 3), seeds, rows)


def closed(query, key, value, pattern, padding):
    """Which nodes stay closed for whom, ``(b, h, n, nodes)``, by the definition."""
    attention = aten._Attention(query.double(), key.double(), value.double(), SCALE, pattern, True, padding)
    place = torch.arange(key.shape[2], device=key.device)
    far = attention.far.met(place // pattern.group * pattern.group)
    shape = *far.rows.shape[:3], attention.given[0].shape[1]
    found = torch.zeros(shape, dtype=torch.int8, device=key.device)
    found.scatter_reduce_(3, far.rows, (far.bias > -torch.inf).to(torch.int8), "amax")
    speakers = query.shape[:2].numel() // shape[0] // shape[1]
    heads = found.bool().flatten(0, 1).repeat_interleave(speakers, 0)
    return heads.unflatten(0, query.shape[:2])[..., key.shape[2] :]


def met(query, key, value, pattern, padding):
    """Who meets whom, ``(b, h, n, n)``, by the definition."""
    length = key.shape[2]
    place = torch.arange(length, device=key.device)
    opened = aten.opened_keys(query.double(), key.double(), SCALE, pattern, place, padding)
    near = (place[:, None] // pattern.block - place // pattern.block).abs() <= 1
    real = torch.ones(1, length, dtype=torch.bool, device=key.device) if padding is None else padding
    sink = real & (real.cumsum(-1) <= pattern.sinks)
    shown = aten.near_field(pattern).shown(place[:, None], place)
    return (opened | near | sink[:, None, None]) & shown & real[:, None, None]


def test_a_tolerance_opens_as_many_leaves_as_the_mass_asks_for(device):
    query, key, value, _ = draw(device, length=100, heads=2, kv_heads=2)
    taken = (torch.arange(100, device=device) >= SMALL.sinks).expand(2, -1)
    pattern = small(tolerance=0.4, open=16, leaf=1, fanout=4)
    leaves = barnes_hut.Call(query, key, value, SCALE, pattern, False, None).leaves
    first = torch.arange(7, device=device) * pattern.group
    tree = aten_tree.build_tree(pattern, key.flatten(0, 1), None, taken)
    voices = aten_tree.voices_of(pattern, query, first, 2)
    all_of_them = aten_tree.choose(pattern, tree.levels, voices, SCALE, first, 100)
    opened, most = (leaves >= 0).sum(-1), all_of_them.opened.flatten(0, 1).sum(-1)
    assert (opened <= most).all() and (opened < most).any() and (opened[:, 2:] > 0).any()
    # The best leaves are opened, and stand before what fills up.
    kept = torch.arange(16, device=device) < opened[..., None]
    assert torch.equal(leaves >= 0, kept)
    assert torch.equal(leaves[kept].long(), all_of_them.leaves.flatten(0, 1)[kept])


@pytest.mark.parametrize("pool", [False, True])
def test_the_past_does_not_depend_on_the_future(pool, device):
    pattern = small(group=8)
    query, key, value, _ = draw(device, length=56 + 24 * pool)
    out, _ = barnes_hut.forward(query, key, value, SCALE, pattern, pool)
    later = query.clone(), key.clone(), value.clone()
    for x in later:
        x[:, :, -6:] = torch.nan
    changed, _ = barnes_hut.forward(*later, SCALE, pattern, pool)
    assert torch.equal(changed[:, :, :-6], out[:, :, :-6])


def test_who_meets_a_node_that_is_not_finite_gets_nan(device):
    pattern = small(left=45)
    query, key, value, _ = draw(device, length=110, heads=1)
    key[:, :, 20], value[:, :, 26, 3] = torch.nan, torch.inf
    out, lse = barnes_hut.forward(query, key, value, SCALE, pattern, True)
    wanted, wanted_lse = aten.forward(query, key, value, SCALE, pattern, True)
    spoiled = ~torch.isfinite(wanted).all(-1)
    assert spoiled[..., 60].all() and not spoiled[..., -1].any()
    assert torch.equal(~torch.isfinite(out).all(-1), spoiled)
    assert torch.equal(torch.isfinite(lse), torch.isfinite(wanted_lse))
    torch.testing.assert_close(out[~spoiled], wanted[~spoiled])


@pytest.mark.parametrize("pool", [False, True])
def test_the_same_gradients_every_time(pool, device):
    query, key, value, _ = draw(device, length=48 + 32 * pool, heads=1)
    seeds = torch.randn_like(query), torch.randn(query.shape[:3], device=device)
    first, second = (run(query, key, value, SMALL, None, seeds, pool) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


DECODED = {
    "shared": ({}, torch.float32),
    "own": ({"select": "bound", "share_group": False, "group": 4}, torch.float32),
    "sampled": ({"select": "sampled", "group": 4}, torch.float32),
    "tolerance": ({"tolerance": 0.3, "max_open": 8}, torch.float32),
    "pooled": ({"rest": "pool", "share_group": False, "group": 4}, torch.float32),
    "pooled-tolerance": ({"rest": "pool", "tolerance": 0.3, "max_open": 8}, torch.float32),
    "pooled-bfloat16": ({"rest": "pool"}, torch.bfloat16),
    "float16": ({}, torch.float16),
    "bfloat16": ({}, torch.bfloat16),
}


@pytest.mark.parametrize("case", DECODED)
def test_decoding(case, device, monkeypatch):
    config, kind = DECODED[case]
    length, steps, pad = 70, 3, not config
    operator = make_operator("barnes_hut", block=16, leaf=2, fanout=2, open=4, beam=4, sinks=3, **config)
    mask = "causal & key_padding" if pad else "causal & window(50)"
    sizes = {} if kind == torch.float32 else {"batch": 1, "heads": 2, "kv_heads": 1}
    inputs = make_inputs(mask, length=length + steps, head_dim=16, dtype=kind, **sizes)
    tensors = [x.to(device) for x in (inputs.query, inputs.key, inputs.value)]
    padding = None if inputs.key_padding is None else inputs.key_padding[:, :length].to(device)

    if device == "cpu":
        monkeypatch.setattr(face, "gpu_obstacle", lambda *tensors: "")

    def decode(dtype, kernels):
        decoder = operator.decoder(inputs.scale)
        prompt = [x[:, :, :length].to(dtype) for x in tensors]
        with use_kernels("aten"):
            decoder.prefill(AttentionInputs(*prompt, inputs.scale, inputs.mask, padding))
        with use_kernels(kernels):
            return [
                decoder.step(*(x[:, :, i : i + 1].to(dtype) for x in tensors))
                for i in range(length, length + steps)
            ]

    judged = decode(kind, "triton"), decode(torch.float64, "aten")
    # What the type costs is also that rows of nodes are in it.
    pooled = BarnesHutDecoder._pooled

    def rounded(self, *given):
        keys, values, bias = pooled(self, *given)
        return keys.to(kind).to(keys), values.to(kind).to(values), bias

    monkeypatch.setattr(BarnesHutDecoder, "_pooled", rounded)
    for got, oracle, formula in zip(*judged, decode(kind, "aten"), strict=True):
        assert_as_good_as(got.out, oracle=oracle.out, formula=formula.out)
        assert_as_good_as(got.log_sum_exp, oracle=oracle.log_sum_exp, formula=formula.log_sum_exp)


def test_the_op_of_a_step_keeps_its_contract(device):
    query, key, value = (torch.randn(*n, device=device) for n in ((1, 2, 1, 16), (1, 60, 16), (1, 60, 24)))
    fine = torch.arange(60, device=device)[None] >= 3
    sink = torch.arange(3, dtype=torch.int32, device=device)[None]
    leaves = torch.tensor([[[4, 9, -1, -1]]], dtype=torch.int32, device=device)
    rows = (torch.randn(1, 1, 5, c, device=device) for c in (16, 24))
    bias = torch.tensor([[[0.7, -torch.inf, 1.4, 0.0, -torch.inf]]], device=device)
    for nodes in ((None,) * 5, barnes_hut_decode.rows_of_nodes(*rows, bias, torch.float32)):
        given = query, key, value, fine, sink, leaves, *nodes, SCALE, 16, 2, True, -1
        torch.library.opcheck(
            barnes_hut_decode.attend_one, given, test_utils=["test_schema", "test_faketensor"]
        )


def test_obstacles():
    query, key, value, _ = draw("cpu", length=20)
    assert barnes_hut.obstacle(query, key, value, SMALL) == ""
    assert "power of two" in barnes_hut.obstacle(query, key, value, small(fanout=3))
    assert "differ" in barnes_hut.obstacle(query, key.half(), value, SMALL)
